"""Weights in 4 bits by bitsandbytes, for training adapters (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlzoo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# peft imports bitsandbytes where it is installed, which then logs that it could be faster on some CPUs
getLogger("bitsandbytes").setLevel(ERROR)


UNSHARDED = "lora.load_in_4bit: weights in 4 bits cannot be sharded: run without FSDP"


def in_4_bits(compute: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for linear layers, except the head, in NF4 with double quantisation.

    Their matrix products are in ``compute``. Raises UserError without bitsandbytes.
    """
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError("lora.load_in_4bit needs bitsandbytes: pip install 'rlzoo[qlora]'") from None
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        ),
        "device_map": {"": device},
    }


def with_one_numerics(model: nn.Module) -> None:
    """Make layers in 4 bits compute the same with and without a gradient.

    On some CPUs, bitsandbytes multiplies in bfloat16 without a gradient, whatever the dtype, so that log-probs would
    differ between scoring and training.
    """
    for module in model.modules() if is_in_4_bits(model) else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - not a parameter or a module


def is_in_4_bits(model: nn.Module) -> bool:
    """Whether a model was loaded with weights in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def entries(parameter: Tensor) -> int:
    """The number of weights in a parameter, which holds two per byte if it is in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def dequantised(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which weights in 4 bits are dequantised to the dtype that the model was loaded in."""
    if not is_in_4_bits(model):
        return weights
    from bitsandbytes.functional import dequantize_4bit

    states = {name: p.quant_state for name, p in model.named_parameters() if hasattr(p, "quant_state")}
    found = {}
    for name, value in weights.items():
        if (state := states.get(name)) is not None:
            found[name] = dequantize_4bit(value, state)
        elif not any(name.startswith(f"{one}.") for one in states):  # else part of a quantisation state
            found[name] = value
    return found


@contextmanager
def saved_as_whole(model: PreTrainedModel) -> Iterator[None]:
    """In this context, transformers saves the weights that it is given, without a quantisation config."""
    if not is_in_4_bits(model):
        yield
        return
    kept = model.hf_quantizer, model.config.quantization_config
    model.hf_quantizer = None
    del model.config.quantization_config
    try:
        yield
    finally:
        model.hf_quantizer, model.config.quantization_config = kept
