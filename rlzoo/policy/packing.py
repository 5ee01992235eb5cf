"""Micro-batches without padding: rows are concatenated to one sequence, and each attends only to itself.

While a trunk runs on a pack, the pack itself takes the place of transformers' attention mask and tells attention where
rows begin. A model that does anything else with its mask raises an error in a trial run, and is then run padded.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlzoo.config import Packing
from rlzoo.errors import UserError
from rlzoo.jobs.memory import is_out_of_memory, on_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HALF = (torch.bfloat16, torch.float16)
ROUNDING = 0.02
"""The tolerated rounding error of hidden states in bfloat16, relative to the largest entry."""
CHANGES = ("softcap", "s_aux", "sinks", "position_bias", "alibi")
"""Arguments with which models modify their attention, and which the kernel does not support."""


class CannotPackError(Exception):
    """A model that cannot run on a pack; the message is the reason."""


@dataclass(frozen=True)
class Pack:
    """Concatenated rows of N tokens in total."""

    lengths: tuple[int, ...]
    bounds: Int[Tensor, " R1"]
    """The start of each row, and the end of the last one."""
    positions: Int[Tensor, "1 N"]
    """The position of each token in its row."""
    window: int | None = None
    """The number of positions that a token attends to, itself included; None: all up to itself."""

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> Self:
        """The pack of rows with these lengths."""
        sizes = torch.tensor([0, *lengths])
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        return cls(lengths, on_device(sizes.cumsum(0).int(), device), on_device(positions, device))

    def attended(self, fused: bool) -> None:
        """Called by every layer's attention; ``fused``: in one call of the kernel, rather than row by row."""


@dataclass(frozen=True)
class _Trial(Pack):
    """A pack that records how each layer attended."""

    fused: list[bool] = field(default_factory=list)

    def attended(self, fused: bool) -> None:
        self.fused.append(fused)


_current: ContextVar[Pack | None] = ContextVar("pack", default=None)
"""The pack that a trunk is currently running on."""


@contextmanager
def running(pack: Pack | None) -> Iterator[dict[str, Tensor]]:
    """In this context, a trunk runs on ``pack``, if any; yields additional arguments for the trunk."""
    if pack is None:
        yield {}
        return
    token = _current.set(pack)
    try:
        yield {"position_ids": pack.positions}
    finally:
        _current.reset(token)


def mask_of_pack(**options: Any) -> Pack | None:
    """The mask of a layer while a trunk runs on a pack: the pack with the layer's window; otherwise None.

    Raises CannotPackError for attention that is not causal.
    """
    if (pack := _current.get()) is None:
        return None
    if options.get("use_vmap") or options.get("allow_is_bidirectional_skip"):
        raise CannotPackError("its attention is not causal")
    return replace(pack, window=options.get("local_size"))


def is_pack(attention_mask: Any) -> bool:
    """Whether a mask is a pack. Raises CannotPackError if a trunk runs on a pack but has passed another mask."""
    if not isinstance(attention_mask, Pack) and _current.get() is not None:
        raise CannotPackError("it does not pass row boundaries to its attention")
    return isinstance(attention_mask, Pack)


def attention_of_pack(
    by_row: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, pack: Pack, **options: Any
) -> Float[Tensor, "1 N H D"]:
    """Attention within each row of a pack: in one call of a kernel if possible, else ``by_row`` on each row.

    Raises CannotPackError for attention that is modified or not causal.
    """
    if changed := [name for name in CHANGES if options.get(name) is not None]:
        raise CannotPackError(f"its attention uses {changed[0]}")
    if not is_causal(module, options.get("is_causal")):
        raise CannotPackError("its attention is not causal")
    fused = _fits_kernel(query, key, value, options)
    pack.attended(fused)
    if fused:
        return _by_kernel(query, key, value, pack, options.get("scaling"))
    rows = []
    for q, k, v in zip(*(torch.split(x, list(pack.lengths), dim=2) for x in (query, key, value)), strict=True):
        mask = _window_mask(q.shape[2], pack.window, q.device)
        rows.append(by_row(module, q, k, v, mask, **options)[0])
    return torch.cat(rows, dim=1)


def is_causal(module: nn.Module, argument: bool | None) -> bool:
    """Whether a layer's attention is causal: the ``argument`` of the call or, if None, the layer's own attribute."""
    return bool(getattr(module, "is_causal", True) if argument is None else argument)


def _window_mask(length: int, window: int | None, device: torch.device) -> Bool[Tensor, "1 1 L L"] | None:
    """The sliding-window mask of a row, if it is longer than the window."""
    if window is None or length <= window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return (ones.tril() & ~ones.tril(-window))[None, None]


def _by_kernel(
    query: Float[Tensor, "1 H N D"],
    key: Float[Tensor, "1 K N D"],
    value: Float[Tensor, "1 K N D"],
    pack: Pack,
    scale: float | None,
) -> Float[Tensor, "1 N H D"]:
    """All rows in one call. The kernel supports query heads that share a key head, without copies of keys."""
    kernel, grouped = _kernel()
    dtype, longest = computed_in(value), max(pack.lengths)
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    window = -1 if pack.window is None or pack.window >= longest else pack.window - 1
    out: Tensor = kernel(
        q, k, v, pack.bounds, pack.bounds, longest, longest, scale=scale, window_size=(window, 0), **grouped
    )
    return out[None]


def computed_in(value: Tensor) -> torch.dtype:
    """The dtype of the attention's products: rotary embeddings leave queries and keys in float32 under autocast."""
    kind = value.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype


def _fits_kernel(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    size = query.shape[-1]
    return (
        has_kernel(query.device)
        and computed_in(value) in HALF
        and size == key.shape[-1] == value.shape[-1] <= 256
        and size % 8 == 0
        and not options.get("dropout")
    )


def has_kernel(device: torch.device) -> bool:
    """Whether PyTorch has a kernel for packs on the device: torch ≥ 2.11, and an NVIDIA GPU from Ampere on."""
    return device.type == "cuda" and _kernel() is not None and _is_recent(device)


@cache
def _is_recent(device: torch.device) -> bool:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _kernel() -> Any:
    """The kernel and its arguments for grouped queries; None without a kernel, and for that of torch 2.10, which has
    neither a scale nor a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        return None
    return varlen_attn, {"enable_gqa": True} if "enable_gqa" in known else {}


def packs(model: PreTrainedModel, compute: torch.dtype | None, packing: Packing) -> bool:
    """Whether a model's micro-batches are packed; ``auto``: if one kernel call attends to all rows of a pack, in
    bfloat16 or float16 on a GPU.

    Raises UserError for ``packed`` if the model does not support it.
    """
    if packing == "padded" or (packing == "auto" and not has_kernel(model.device)):
        return False
    trial, reason = _tried(model, compute)
    if packing == "auto":
        return reason is None and all(trial)
    if reason is not None:
        raise UserError(f"training.packing: packed: {reason}: set padded, or auto")
    return True


def _tried(model: PreTrainedModel, compute: torch.dtype | None) -> tuple[list[bool], str | None]:
    """Per layer, whether the kernel was used in a trial run; and the reason if the model cannot run on a pack."""
    trunk, config = model.base_model, model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if getattr(model, "_is_stateful", False) or kinds:
        return [], "the model has layers that are not attention, or of another kind"
    if "position_ids" not in inspect.signature(trunk.forward).parameters:
        return [], "the model does not take position_ids"
    trial = _Trial.of((3, 3), model.device)
    training = model.training
    try:
        model.eval()
        with torch.no_grad(), torch.autocast(model.device.type, compute, enabled=compute is not None):
            reason = _mixes(trunk, trial)
        return (
            trial.fused,
            reason if trial.fused else "the model does not use transformers' attention interface",
        )
    except CannotPackError as error:
        return [], str(error)
    except Exception as error:  # a model's own code can do anything with its mask
        if is_out_of_memory(error):
            raise
        return [], f"the model's code rejects packs ({(str(error).splitlines() or [type(error).__name__])[0]:.120})"
    finally:
        model.train(training)


def _mixes(trunk: nn.Module, trial: Pack) -> str | None:
    """An error message if the rows of a pack affect each other in a trunk; else None."""

    def run(*ids: int) -> Tensor:
        with running(trial) as more:
            states = trunk(input_ids=torch.tensor([ids], device=trial.bounds.device), use_cache=False, **more)
        found: Tensor = states.last_hidden_state[0].float()
        return found

    both, other_first, other_last = run(1, 2, 3, 1, 2, 3), run(4, 5, 6, 1, 2, 3), run(1, 2, 3, 4, 5, 6)
    gap, scale = (both[:3] - both[3:]).abs().max(), both.abs().max()
    alike = [(both[3:] == other_first[3:]).all(), (both[:3] == other_last[:3]).all(), gap <= ROUNDING * scale]
    return None if all(map(bool, alike)) else "the rows of a pack affect each other in this model"
