"""Low-rank adapters (LoRA, arXiv 2106.09685), injected by peft into an otherwise unchanged transformers model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlzoo.errors import UserError
from rlzoo.policy.quantised import dequantised

NAME = "default"


def adapters(model: nn.Module) -> dict[str, Any]:
    """The adapted layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def add_lora(model: nn.Module, rank: int, alpha: float, target_modules: str | Sequence[str]) -> None:
    """Freeze ``model`` and inject adapters: W + (alpha / rank) B A, with B = 0 at first.

    Raises UserError without peft, for a model with adapters, and for ``target_modules`` that match no layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("LoRA needs peft: pip install 'rlzoo[lora]'") from None
    if adapters(model):
        raise UserError("the model already has an adapter: use a model without one")
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    try:
        inject_adapter_in_model(config, model)  # freezes all other weights
    except ValueError as error:
        raise UserError(f"lora.target_modules {target_modules!r}: {str(error).splitlines()[0]}") from None
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    for layer in adapters(model).values():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:  # bfloat16 would lose small updates
                parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def copy_adapters(model: nn.Module, into: nn.Module) -> None:
    """Copy the adapters of ``model``, if any, to the model ``into`` of the same architecture."""
    if not adapters(model):
        return
    from peft import inject_adapter_in_model

    inject_adapter_in_model(model.peft_config[NAME], into)  # type: ignore[index]
    values = dict(model.named_parameters())
    for name, parameter in into.named_parameters():
        if "lora_" in name:
            parameter.data = values[name].detach().clone()


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Disable the adapters in this context."""
    layers = adapters(model).values()
    before = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)  # this makes all of them trainable, even those of a frozen policy
        for parameter, trains in before:
            parameter.requires_grad_(trains)


def merged(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of whole ``weights`` with the adapters merged into them, under the names of the plain model.

    W + (alpha / rank) B A for each adapted weight, dequantised if it is in 4 bits.
    """
    found = dequantised(model, dict(weights))
    for name, layer in adapters(model).items():
        with torch.no_grad():
            delta = found[f"{name}.lora_B.{NAME}.weight"] @ found[f"{name}.lora_A.{NAME}.weight"]
            if layer.fan_in_fan_out:  # transformers' Conv1D stores its weight transposed
                delta = delta.mT
            base = found[f"{name}.base_layer.weight"]
            whole = (base + layer.scaling[NAME] * delta).to(base.dtype)
        found = {key: value for key, value in found.items() if not key.startswith(f"{name}.")} | {
            f"{name}.weight": whole,
            **{f"{name}.bias": value for key, value in found.items() if key == f"{name}.base_layer.bias"},
        }
    return found


def save_adapter(model: nn.Module, weights: dict[str, Tensor], folder: Path, base: str) -> None:
    """Write the adapter alone, in peft's format: load it with ``PeftModel.from_pretrained(base_model, folder)``."""
    from safetensors.torch import save_file

    config: Any = model.peft_config[NAME]  # type: ignore[index]
    config.base_model_name_or_path = base
    config.save_pretrained(folder)
    own = {
        f"base_model.model.{key.replace(f'.{NAME}.weight', '.weight')}": value.contiguous()
        for key, value in weights.items()
        if ".lora_" in key
    }
    save_file(own, folder / "adapter_model.safetensors", metadata={"format": "pt"})
