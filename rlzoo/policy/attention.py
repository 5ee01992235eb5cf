"""Attention with PyTorch's fused kernels on all devices, registered as transformers' attention function."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, masking_utils
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rlzoo.policy.packing import HALF, attention_of_pack, computed_in, is_causal, is_pack, mask_of_pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "rlzoo"
"""The name under which `attention` is registered with transformers."""


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attention on padded rows or on a pack: queries [B, H, L, D] and keys [B, K, P, D] → [B, L, H, D].

    The signature is that of transformers' attention functions; the second value, attention weights, is None.
    """
    if is_pack(attention_mask):
        return attention_of_pack(_of_rows, module, query, key, value, attention_mask, **options), None
    return _of_rows(module, query, key, value, attention_mask, **options)


def _of_rows(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' call of PyTorch's attention, except for query heads that share a key head.

    With one new position, query heads are treated as positions of their key head: the library would copy the whole
    cache for each of them at every step. With several positions on a GPU in float32, keys are repeated, because the
    only kernel that needs no repetition materialises all scores. In bfloat16 without a mask, the library itself does
    not repeat keys (transformers 5.0 to 5.19).
    """
    if (cap := options.get("softcap")) is not None:
        return _capped(module, query, key, value, attention_mask, cap, **options), None
    rows, heads, positions, size = query.shape
    shared, bias = heads // key.shape[1], options.get("position_bias")
    if shared > 1 and bias is None:
        scale = options.get("scaling")
        if positions == 1 and (attention_mask is None or attention_mask.shape[1] == 1):
            grouped = query.view(rows, key.shape[1], -1, size)
            out = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scale)
            return out.reshape(rows, 1, heads, -1), None
        if query.device.type == "cuda" and computed_in(value) not in HALF:
            causal = is_causal(module, options.get("is_causal"))
            out = functional.scaled_dot_product_attention(
                query,
                repeat_kv(key, shared),
                repeat_kv(value, shared),
                attn_mask=attention_mask,
                dropout_p=options.get("dropout", 0.0),
                scale=scale,
                is_causal=positions > 1 and attention_mask is None and causal,
            )
            return out.transpose(1, 2).contiguous(), None
    found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return found


def _capped(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, cap: float, **options: Any
) -> Float[Tensor, "B L H D"]:
    """Attention with scores cap · tanh(score / cap), as in Gemma 2: the fused kernels would ignore the cap."""
    shared, length = query.shape[1] // key.shape[1], query.shape[2]
    scores = query @ repeat_kv(key, shared).transpose(2, 3)
    scores = cap * torch.tanh(scores * (options.get("scaling") or query.shape[-1] ** -0.5) / cap)
    if attention_mask is None and length > 1 and is_causal(module, options.get("is_causal")):
        attention_mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = functional.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    weights = functional.dropout(weights, options.get("dropout", 0.0))
    found: Tensor = weights @ repeat_kv(value, shared)
    return found.transpose(1, 2).contiguous()


def _mask(*args: Any, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **options: Any) -> Any:
    """A pack, or transformers' mask, without its check for padding on a GPU, which would wait for the GPU."""
    if (pack := mask_of_pack(**options)) is not None:
        return pack
    checks = attention_mask is None or attention_mask.device.type == "cpu"
    return sdpa_mask(
        *args, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip and checks, **options
    )


# compiled layers call it uncompiled, as packs are not traceable
AttentionInterface.register(NAME, torch.compiler.disable(attention))  # type: ignore[no-untyped-call]
AttentionMaskInterface.register(NAME, _mask)


def use(model: PreTrainedModel) -> None:
    """Make a model that uses transformers' "sdpa" attention use `attention` instead.

    A model whose code compares the name of its attention function with "sdpa" is left unchanged.
    """
    home = inspect.getmodule(type(model))
    compares_name = home is None or re.search(r'_attn_implementation (==|!=|in) .*"sdpa"', inspect.getsource(home))
    if compares_name or not getattr(model, "_supports_attention_backend", False):
        return
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if config._attn_implementation == "sdpa":
            config._attn_implementation = NAME


@contextmanager
def without_packing_detection() -> Iterator[None]:
    """In this context, transformers takes each row as one sequence; detecting packed rows would wait for the GPU."""
    plain = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = plain
