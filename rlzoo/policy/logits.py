"""Log-probs from logits that another library's model has computed, in chunks: no float32 copy of them all is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlzoo.inputs import Input
from rlzoo.policy.head import LogitTerm, chunk_rows

ReferenceHead = tuple[Callable[[Tensor], Tensor], Float[Tensor, "N H"]]
"""A frozen model's function from hidden states to logits, with its hidden states at the same positions."""


def log_probs_of_logits(
    logits: Float[Tensor, "M V"],
    index: Int[Tensor, " N"],
    target: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
    statistics: Sequence[Input] = (),
    term: LogitTerm | None = None,
    reference: ReferenceHead | None = None,
) -> dict[str, Float[Tensor, " N"]]:
    """``logp`` of each target in nats, the statistics without a graph, and ``term`` if one is given.

    log softmax(z / τ)[y], with logits z the rows ``index`` of ``logits``, which stay unchanged; each row is used once.
    Computed in at least float32. Besides one chunk, memory holds only the gradient in the logits, in their dtype.
    """
    size = chunk_rows(logits.shape[1], logits.device)
    work = _Work(size, index, target, temperature, tuple(statistics), term, reference)
    found = _OfLogits.apply(logits, work)  # type: ignore[no-untyped-call]
    names = ["logp", *(one.key for one in statistics), *(["term"] if term is not None else [])]
    return dict(zip(names, found, strict=True))


@dataclass(frozen=True)
class _Work:
    """The positions of one call, and what is computed at them."""

    size: int
    """The positions of a chunk."""
    index: Int[Tensor, " N"]
    target: Int[Tensor, " N"]
    temperature: float
    statistics: tuple[Input, ...]
    term: LogitTerm | None
    reference: ReferenceHead | None

    def spans(self) -> list[slice]:
        return [slice(start, start + self.size) for start in range(0, max(len(self.index), 1), self.size)]

    def wide(self, logits: Tensor, span: slice) -> Float[Tensor, "n V"]:
        """The logits of a chunk divided by the temperature: a copy, in at least float32."""
        found = logits.detach().index_select(0, self.index[span])
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        return found if self.temperature == 1.0 else found.div_(self.temperature)

    def of_term(self, z: Float[Tensor, "n V"], span: slice) -> Float[Tensor, " n"]:
        assert self.term is not None
        other = None
        if self.reference is not None:
            other = self.reference[0](self.reference[1][span]).detach().to(z.dtype)
            other = other if self.temperature == 1.0 else other / self.temperature
        value = self.term(z, other, self.target[span])
        return z.new_zeros(len(z)) if value is None else value


class _OfLogits(torch.autograd.Function):
    """Everything that `log_probs_of_logits` returns, with the gradient in the logits computed chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, logits: Float[Tensor, "M V"], work: _Work) -> tuple[Tensor, ...]:
        chunks, normalisers, states = [], [], []
        for span in work.spans():
            z = work.wide(logits, span)
            normalisers.append(z.logsumexp(1))
            logp = z.gather(1, work.target[span, None])[:, 0] - normalisers[-1]
            found = [one.of_logits(z, work.target[span]) for one in work.statistics]
            if work.term is not None:
                states.append(_random_state(z.device))
                found.append(work.of_term(z, span))
            chunks.append((logp, *found))
        columns = [torch.cat(column) for column in zip(*chunks, strict=True)]
        ctx.save_for_backward(logits, torch.cat(normalisers))
        ctx.work, ctx.states = work, states
        ctx.mark_non_differentiable(*columns[1 : 1 + len(work.statistics)])
        return tuple(columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *pulls: Float[Tensor, " N"]) -> tuple[Tensor, None]:
        (logits, normaliser), work = ctx.saved_tensors, ctx.work
        gradient = torch.zeros_like(logits)
        for number, span in enumerate(work.spans()):
            z, pull = work.wide(logits, span), pulls[0][span, None]
            rows = (z - normaliser[span, None]).exp_().mul_(-pull)
            rows.scatter_add_(1, work.target[span, None], pull)
            if work.term is not None:
                rows += _gradient_of_term(work, z, span, pulls[-1][span], ctx.states[number])
            rows = rows if work.temperature == 1.0 else rows.div_(work.temperature)
            gradient.index_copy_(0, work.index[span], rows.to(gradient.dtype))
        return gradient, None


def _gradient_of_term(
    work: _Work, z: Float[Tensor, "n V"], span: slice, pull: Float[Tensor, " n"], state: tuple[Tensor, Tensor | None]
) -> Float[Tensor, "n V"]:
    """The term is computed again, with the random numbers that its value was computed with."""
    on_gpu = [z.device] if z.device.type == "cuda" else []
    with torch.random.fork_rng(on_gpu), torch.enable_grad():
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], z.device)
        leaf = z.detach().requires_grad_()
        value = work.of_term(leaf, span)
        if not value.requires_grad:
            return torch.zeros_like(z)
        return torch.autograd.grad(value, leaf, pull)[0]


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
