"""The contract of full-vocabulary terms, `Objective.logit_term`, checked in the logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlzoo.objective import Objective, surrogate
from rlzoo.testing.batches import LENGTH, ROWS, gap, permutation, random_batch
from rlzoo.types import TokenBatch

LossInLogits = Callable[[TokenBatch, Tensor, Tensor, Tensor], Tensor]
"""A whole loss as its paper writes it: a scalar of a batch without log-probs, logits, reference logits and target."""
VOCABULARY = 9


@dataclass(frozen=True)
class Logits:
    """A batch with logits of a policy and a reference, and a token, at each position; logits are NaN where masked."""

    batch: TokenBatch
    policy: Float[Tensor, "B T V"]
    reference: Float[Tensor, "B T V"]
    target: Int[Tensor, "B T"]


def random_logits(objective: Objective, seed: int = 0, dtype: torch.dtype = torch.float64) -> Logits:
    """Logits for the rows of `random_batch`."""
    batch, draw = random_batch(objective, seed), torch.Generator().manual_seed(seed)
    shape = (ROWS, LENGTH, VOCABULARY)
    policy, reference = (2 * torch.randn(shape, dtype=torch.float64, generator=draw) for _ in range(2))
    policy[~batch.mask] = reference[~batch.mask] = math.nan
    target = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=draw)
    return Logits(batch, policy.to(dtype).requires_grad_(), reference.to(dtype), target)


def check_logits(objective: Objective, loss: LossInLogits | None) -> None:
    """Check the gradient in the logits, of the term and of what goes through log-probs."""
    for seed in range(2):
        _check_gradient(objective, loss, random_logits(objective, seed))
    if not is_random(objective):
        _check_split(objective)
    _check_precision(objective)


def is_random(objective: Objective) -> bool:
    """Whether an objective's `logit_term` draws tokens, so that micro-batches agree only in expectation."""
    if not objective.has_logit_term:
        return False
    logits = random_logits(objective)
    torch.manual_seed(0)
    first, second = (_gradient(_surrogate(objective, logits), logits) for _ in range(2))
    return not torch.equal(first, second)


def _surrogate(
    objective: Objective, logits: Logits, mask: Tensor | None = None, denominator: float | None = None
) -> Tensor:
    """The surrogate with the term at the positions under ``mask``, as in the trainer."""
    mask = logits.batch.mask if mask is None else mask
    flat, target = logits.policy[mask], logits.target[mask]
    term = objective.logit_term(flat, logits.reference[mask], target)
    if term is None or term.shape != target.shape:
        shape = None if term is None else tuple(term.shape)
        raise AssertionError(
            f"objective {objective.name!r} has a logit_term of shape {shape}: give one value per position"
        )
    logp, per_token = (
        torch.zeros(mask.shape, dtype=flat.dtype).masked_scatter(mask, found)
        for found in (flat.log_softmax(1).gather(1, target[:, None])[:, 0], term.to(flat.dtype))
    )
    if term.dtype != flat.dtype:
        raise AssertionError(f"objective {objective.name!r} has a logit_term in {term.dtype} of logits in {flat.dtype}")
    batch = logits.batch.replace(logp=logp, mask=mask)
    z = objective.normaliser.denominator(batch) if denominator is None else denominator
    return surrogate(objective, batch, z, term=per_token)


def _gradient(loss: Tensor, logits: Logits) -> Float[Tensor, "N V"]:
    (found,) = torch.autograd.grad(loss, logits.policy)
    return found[logits.batch.mask].double()


def _check_gradient(objective: Objective, loss: LossInLogits | None, logits: Logits) -> None:
    torch.manual_seed(0)
    value = _surrogate(objective, logits)
    ours = _gradient(value, logits)
    if not bool(torch.isfinite(ours).all()):
        raise AssertionError(f"objective {objective.name!r} has a gradient in the logits that is not finite")
    if loss is None:
        return
    torch.manual_seed(0)
    wanted = loss(logits.batch.replace(logp=None), logits.policy, logits.reference, logits.target)
    given = f"the loss in logits given for {objective.name!r}"
    if wanted.ndim or not wanted.requires_grad:
        raise AssertionError(f"{given} must be a scalar, computed from the logits and their graph")
    theirs = _gradient(wanted, logits)
    if not bool(torch.isfinite(torch.cat((theirs.flatten(), wanted.detach()[None]))).all()):
        raise AssertionError(f"{given} depends on masked positions: take logits[batch.mask]")
    if not theirs.any():
        raise AssertionError(f"{given} has no gradient on random logits, so it checks nothing")
    if not (off := gap(ours, theirs)) <= 1e-10:
        raise AssertionError(
            f"objective {objective.name!r} has a gradient in the logits that is not that of the loss "
            f"(relative difference {off:.2g})"
        )
    if abs(float((value - wanted).detach())) > 1e-10 * max(1.0, abs(float(wanted.detach()))):
        raise AssertionError(
            f"objective {objective.name!r} has the loss {float(value.detach()):.6g} in the logits where it is "
            f"{float(wanted.detach()):.6g}"
        )


def _check_split(objective: Objective) -> None:
    logits = random_logits(objective, 1)
    mask, denominator = logits.batch.mask, objective.normaliser.denominator(logits.batch)
    whole = _gradient(_surrogate(objective, logits), logits)
    total = torch.zeros_like(whole)
    for rows in torch.split(permutation(ROWS), 4):
        part = torch.zeros_like(mask)
        part[rows] = mask[rows]
        total += _gradient(_surrogate(objective, logits, part, denominator), logits)
    if not gap(total, whole) <= 1e-12:
        raise AssertionError(
            f"objective {objective.name!r} has a logit_term that depends on how a batch is split into micro-batches: "
            "look at one position at a time"
        )


def _check_precision(objective: Objective) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        logits = random_logits(objective, dtype=dtype)
        found.append(_gradient(_surrogate(objective, logits), logits))
    if not (off := gap(*found)) <= 1e-5:  # NaN too
        raise AssertionError(
            f"objective {objective.name!r} has a logit_term that loses precision in float32 ({off:.2g})"
        )
