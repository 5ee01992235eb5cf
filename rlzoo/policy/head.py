"""The language-model head on selected positions, in chunks: no B × T × V tensor is ever materialised."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rlzoo.advantages import running_sum
from rlzoo.inputs import Input
from rlzoo.policy import compiled as compiling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_ENTRIES = 2**26
"""Logits held at a time on a CPU: 256 MB in float32. If there are more, the backward pass recomputes them."""
GPU_SHARE = 1 / 64
"""The fraction of a GPU's memory that logits held at a time may take, if that is more than `CHUNK_ENTRIES`.

Every chunk casts and reads the output layer's weight and adds to its gradient: some 30 bytes per entry in mixed
precision, regardless of its number of rows. At an H100's bandwidth this takes twice as long as the matrix products of
384 rows, and a third as long as those of 2048.
"""
TILE = 128
"""The tile size of a GPU's matrix products: the rows of a chunk are a multiple of it."""

LogitTerm = Callable[[Tensor, Tensor | None, Tensor], Tensor | None]
"""Logits [N, V], reference logits [N, V] or None, and targets [N] → a loss per token [N], or None."""


@dataclass(frozen=True)
class Head:
    """A model's output layer, with the scale and soft cap of logits in its configuration."""

    layer: nn.Linear
    scale: float = 1.0
    soft_cap: float | None = None
    compute: torch.dtype | None = None
    """The dtype of matrix products; None: that of the weights."""
    compiled: bool = False
    """Whether compiled kernels compute log-probs and their gradient in one pass each over the logits."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        """The head of a transformers causal LM, with the scale and cap of its configuration."""
        config = model.config.get_text_config()
        scale = 1.0
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
            scale *= getattr(config, name, None) or 1.0
        divisor = getattr(config, "logits_scaling", None)  # Granite divides by it, HyperCLOVA X multiplies
        if divisor:
            scale *= divisor if config.model_type == "hyperclovax" else 1 / divisor
        caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
        return cls(model.get_output_embeddings(), scale, next((cap for cap in caps if cap), None))

    def logits(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        """Logits, in at least float32."""
        return self.finish(self.raw(hidden))

    def raw(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        """The output of the linear layer, before scale and soft cap."""
        with computing_in(self.compute, hidden.device):
            found: Tensor = self.layer(hidden)
        return found

    def back(self, pull: Float[Tensor, "N V"]) -> Float[Tensor, "N H"]:
        """The gradient at the hidden states, given that at the output of `raw`."""
        weight = self.layer.weight.detach()
        with computing_in(self.compute, weight.device):
            return pull.to(weight.dtype) @ weight

    def finish(self, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """The logits z from the output of `raw`, in at least float32: cap · tanh(scale · z / cap)."""
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits


def computing_in(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    """A context with matrix products in this dtype (mixed precision); None: that of the weights or an outer context."""
    outer = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, dtype, enabled=dtype is not None or outer)


def token_log_probs(
    head: Head,
    hidden: Float[Tensor, "N H"],
    target: Int[Tensor, " N"],
    *,
    temperature: Float[Tensor, " N"] | None = None,
    top_p: float = 1.0,
    statistics: Collection[Input] = (),
    term: LogitTerm | None = None,
    reference: tuple[Callable[[Tensor], Tensor], Float[Tensor, "N H"]] | None = None,
) -> dict[str, Float[Tensor, " N"]]:
    """``logp`` of each target in nats, the requested statistics (without a graph), and ``term`` if one is given.

    log softmax(z / τ)[y], with logits z and ``temperature`` τ (None: 1). With ``top_p`` below 1, log-probs are those of
    nucleus sampling, and ``nucleus`` is the log-probability of the nucleus. ``reference`` is a frozen model's function
    from hidden states to logits, with its hidden states.
    """

    def run(part: Tensor, tokens: Tensor, heat: Tensor | None, reference_part: Tensor | None) -> tuple[Tensor, ...]:
        logits = head.logits(part)
        if heat is not None:
            logits = logits.div_(heat.to(logits.dtype))  # in place: not used elsewhere
        with torch.no_grad():
            found = [statistic.of_logits(logits, tokens) for statistic in wanted]
            if top_p < 1.0:
                found.append(_nucleus_mass(logits, top_p).log())
        if term is None:
            kind = _FusedLogProb if head.compiled else _LogProb
            return (kind.apply(logits, tokens), *found)  # type: ignore[no-untyped-call]
        logp = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)
        reference_logits = None
        if reference is not None and reference_part is not None:
            reference_logits = reference[0](reference_part).detach()
            if heat is not None:
                reference_logits = reference_logits.div_(heat.to(logits.dtype))
        value = term(logits, reference_logits, tokens)
        return (logp, *found, torch.zeros_like(logp) if value is None else value)

    wanted = list(statistics)
    size = chunk_rows(head.layer.weight.shape[0], hidden.device)
    recompute = hidden.requires_grad and len(hidden) > size
    chunks = []
    for start in range(0, max(len(hidden), 1), size):
        span = slice(start, start + size)
        heat = None if temperature is None else temperature[span, None]
        inputs = (hidden[span], target[span], heat, None if reference is None else reference[1][span])
        chunks.append(checkpoint(run, *inputs, use_reentrant=False) if recompute else run(*inputs))
    columns = [torch.cat(column) for column in zip(*chunks, strict=True)]
    values = dict(zip(["logp", *(statistic.key for statistic in wanted)], columns, strict=False))
    extra = columns[1 + len(wanted) :]
    if top_p < 1.0:
        values["nucleus"] = extra[0]
        values["logp"] = values["logp"] - extra[0]
    if term is not None:
        values["term"] = extra[-1]
    return values


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """The number of positions whose logits are held at a time."""
    if device.type != "cuda":
        return max(1, CHUNK_ENTRIES // vocabulary)
    entries = GPU_SHARE * total_memory(device) / 4
    rows = int(max(entries, CHUNK_ENTRIES)) // vocabulary
    return max(1, rows - rows % TILE if rows > TILE else rows)


@cache
def total_memory(device: torch.device) -> int:
    """A GPU's total memory in bytes, which unlike its free memory is the same in every run; 0 without a GPU."""
    return int(torch.cuda.get_device_properties(device).total_memory) if torch.cuda.is_available() else 0


class _LogProb(torch.autograd.Function):
    """log softmax(z)[y] per row, in the memory of the logits, which become exp(z - max z) and then the gradient.

    A pass over N × V entries takes a tenth of the time of the layer that computed them, and allocating memory for
    another copy as much again.
    """

    @staticmethod
    def forward(ctx: Any, logits: Float[Tensor, "N V"], target: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        own = logits.detach()  # shares its version counter: autograd rejects later uses of the logits
        chosen = own.gather(1, target[:, None])[:, 0]
        largest = own.amax(1)
        total = own.sub_(largest[:, None]).exp_().sum(1)
        ctx.save_for_backward(own, total, target)  # not on ctx itself, where a checkpoint would keep it alive
        return chosen - largest - total.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pull: Float[Tensor, " N"]) -> tuple[Tensor, None]:
        own, total, target = ctx.saved_tensors
        own.mul_((-pull / total)[:, None])  # autograd then rejects a second backward pass
        own.scatter_add_(1, target[:, None], pull[:, None])
        return own, None


class _FusedLogProb(torch.autograd.Function):
    """`_LogProb` in compiled kernels, which keep the logits unchanged until the gradient overwrites them."""

    @staticmethod
    def forward(ctx: Any, logits: Float[Tensor, "N V"], target: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        own = logits.detach()
        normaliser: Tensor = _compiled(_normalisers, compiling.BACKEND)(own)
        ctx.save_for_backward(own, normaliser, target)
        return own.gather(1, target[:, None])[:, 0] - normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pull: Float[Tensor, " N"]) -> tuple[Tensor, None]:
        own, normaliser, target = ctx.saved_tensors
        _compiled(_pulled, compiling.BACKEND)(own, normaliser, pull)
        own.scatter_add_(1, target[:, None], pull[:, None])
        return own, None


def _normalisers(logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """log Σ exp z of each row."""
    largest = logits.amax(1)
    return largest + (logits - largest[:, None]).exp().sum(1).log()


def _pulled(logits: Float[Tensor, "N V"], normaliser: Float[Tensor, " N"], pull: Float[Tensor, " N"]) -> None:
    """Overwrite the logits z with -softmax(z) · pull."""
    logits.copy_((logits - normaliser[:, None]).exp() * -pull[:, None])


@cache
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return compiling.compiled(function, backend)


def _nucleus_mass(logits: Float[Tensor, "N V"], top_p: float) -> Float[Tensor, " N"]:
    """The probability of the nucleus: the smallest set of most likely tokens that reaches ``top_p``."""
    probability = functional.softmax(logits, 1).sort(1, descending=True).values
    kept = running_sum(probability) - probability < top_p
    return (probability * kept).sum(1)
