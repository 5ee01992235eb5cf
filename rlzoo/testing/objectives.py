"""`check_objective`: the contract on random batches, one small check each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlzoo.errors import UserError
from rlzoo.objective import Objective, get_objective, is_composite, reduce, surrogate, surrogate_of
from rlzoo.registry import one_line
from rlzoo.testing.batches import (
    LENGTH,
    ROWS,
    cast,
    gap,
    gradients,
    leaves,
    permutation,
    prepared,
    random_batch,
    wider,
    with_gaps,
)
from rlzoo.testing.engine import check_analysis, check_training
from rlzoo.testing.logits import LossInLogits, check_logits, is_random
from rlzoo.training.sums import reported_loss
from rlzoo.types import Coefficients, Coupling, TokenBatch

Loss = Callable[[TokenBatch], Tensor]
"""A loss as its paper writes it, of a batch [B, T] without advantages: a scalar that autograd differentiates."""
Check = Callable[[Objective, Loss | None], None]

SEEDS = range(4)
EXACT, SUMMED = 1e-10, 1e-11
"""Relative differences: of a gradient and that of another formula, and of sums in another order, in float64."""


def check_objective(
    objective: Objective | str,
    loss: Loss | None = None,
    *,
    loss_in_logits: LossInLogits | None = None,
    through_trainer: bool = True,
) -> None:
    """Check an objective against the ``loss`` of its paper, and for everything that the trainer and the analyzer need.

    ``loss`` gets a batch [B, T] with everything that ``requires`` lists, log-probs in nats and float64, and garbage at
    masked positions. Its gradient with respect to log-probs and outputs of modules must be that of the objective, and
    its value the loss that the objective reports; without it neither is checked. The loss of an objective with a
    `logit_term` is ``loss_in_logits(batch, logits [B, T, V], reference logits [B, T, V], target [B, T])``, with a batch
    without log-probs.

    Also checked: masked positions, also between tokens, detached coefficients, the order of rows, padding,
    micro-batches, batches with all tokens masked, float32 and bfloat16; and, unless ``through_trainer`` is False,
    training on the embedded model and the variance analyzer, which take a second or two. Raises AssertionError, which
    says in one line what failed, and UserError for an objective that cannot be found or built.
    """
    found = get_objective(objective) if isinstance(objective, str) else objective
    for check, where in CHECKS.items():
        _run(found, where, lambda check=check: check(found, loss))  # type: ignore[misc]
    random = False
    if found.has_logit_term:
        _run(found, "on random logits", lambda: check_logits(found, loss_in_logits))
        random = is_random(found)
    if through_trainer:
        _run(found, "in the trainer", lambda: check_training(found, random))
        _run(found, "in the variance analyzer", lambda: check_analysis(found))


def _run(objective: Objective, where: str, check: Callable[[], None]) -> None:
    try:
        check()
    except AssertionError:
        raise
    except UserError as error:
        raise AssertionError(f"objective {objective.name!r} fails {where}: {error}") from error
    except Exception as error:
        raise AssertionError(f"objective {objective.name!r} fails {where}: {one_line(error)}") from error


def _demand(objective: Objective, holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(f"objective {objective.name!r} {message}")


def _kinds(objective: Objective, _: Loss | None) -> None:
    """Coefficients, metrics and the reported loss have the right shape and no graph, and are finite."""
    if is_composite(type(objective)):
        return
    batch = random_batch(objective)
    fixed = {
        one.key: batch[one.key].clone().requires_grad_()
        for one in objective.requires
        if one.key in batch.inputs and not batch[one.key].requires_grad and batch[one.key].is_floating_point()
    }
    ready = prepared(objective, batch).replace(**fixed)
    found = objective.coefficients(ready)
    shape = tuple(found.values.shape)
    _demand(objective, shape == (ROWS, LENGTH), f"gives coefficients of shape {shape}: give one per token, {_SHAPE}")
    others = {**found.metrics, **({} if found.loss is None else {"loss": found.loss})}
    for name, value in others.items():
        fits = tuple(value.shape) in ((ROWS, LENGTH), (ROWS,))
        _demand(objective, fits, f"gives {name!r} of shape {tuple(value.shape)}: give {_SHAPE} or [B], not reduced")
    for name, value in {"coefficients": found.values, **others}.items():
        _demand(objective, not value.requires_grad, f"gives {name} with a graph: detach them")


_SHAPE = "[B, T]"


def _finite(objective: Objective, _: Loss | None) -> None:
    """Rows of one token or none, and groups of one or of equal rewards, give no NaN; every call gives the same."""
    clean = random_batch(objective, padding=(0.0,))
    first, second = (gradients(surrogate(objective, prepared(objective, clean)), clean) for _ in range(2))
    among = "finite on rows with one token or none, and groups of one row or of equal rewards"
    _demand(objective, _is_finite(first), f"has a gradient that is not {among}: divide by no length or spread of 0")
    loss = _reported_loss(objective, clean)
    _demand(objective, loss is None or _is_finite(loss), f"reports a loss that is not {among}")
    same = torch.equal(first, second)
    _demand(objective, same, "gives another gradient the second time: draw with a torch.Generator of a fixed seed")


def _masked(objective: Objective, _: Loss | None) -> None:
    """Values at masked positions do not matter, and nothing is learned there."""
    clean, *dirty = (random_batch(objective, padding=(x,)) for x in (0.0, float("nan"), float("inf"), -1e9))
    loss = surrogate(objective, prepared(objective, clean))
    gradient = gradients(loss, clean)
    for batch in dirty:
        other = surrogate(objective, prepared(objective, batch))
        same = torch.equal(other, loss) and torch.equal(gradients(other, batch), gradient)
        reported = _reported_loss(objective, clean), _reported_loss(objective, batch)
        same = same and (reported[0] is None or torch.equal(*reported))  # type: ignore[arg-type]
        _demand(objective, same, f"depends on masked positions, which may hold anything: {_WHERE}")
    of_leaves = leaves(clean)
    for own, leaf in zip(torch.split(gradient, [leaf.numel() for leaf in of_leaves]), of_leaves, strict=True):
        outside = own.view(leaf.shape)[~clean.mask]
        _demand(objective, not outside.any(), f"has a gradient at masked positions: {_WHERE}")


_WHERE = "use torch.where(batch.mask, x, 0), as x * batch.mask keeps NaN"


def _gradient(objective: Objective, loss: Loss | None) -> None:
    """The gradient is that of the loss, whether or not the batch was prepared before."""
    for seed in SEEDS:
        batch = random_batch(objective, seed)
        ours = gradients(surrogate(objective, prepared(objective, batch)), batch)
        unprepared = gradients(surrogate(objective, batch), batch)
        _demand(
            objective, gap(unprepared, ours) <= 1e-12, "has another gradient where prepare gets the policy's log-probs"
        )
        if loss is not None:
            theirs = _gradient_of_the_loss(objective, loss, batch)
            message = f"has a gradient that is not that of the loss{_told(ours, theirs)}"
            _demand(objective, gap(ours, theirs) <= EXACT, message)


def _gradient_of_the_loss(objective: Objective, loss: Loss, batch: TokenBatch) -> Tensor:
    value = loss(batch)
    name = objective.name
    if value.ndim or not value.requires_grad:
        raise AssertionError(f"the loss given for {name!r} must be a scalar, computed from batch.logp and its graph")
    found = gradients(value, batch)
    if not _is_finite(found) or not _is_finite(value):
        raise AssertionError(f"the loss given for {name!r} depends on masked positions: take batch.logp[batch.mask]")
    if not found.any():
        raise AssertionError(f"the loss given for {name!r} has no gradient on a random batch, so it checks nothing")
    return found


def _told(ours: Tensor, theirs: Tensor) -> str:
    """How two gradients differ."""
    ratio = float(ours @ theirs / (theirs @ theirs))
    if ratio and gap(ours, ratio * theirs) < EXACT:
        return ": it has the opposite sign" if abs(ratio + 1) < EXACT else f": it is {ratio:.6g} times as large"
    return f" (relative difference {gap(ours, theirs):.2g})"


def _reported_loss(objective: Objective, batch: TokenBatch) -> Tensor | None:
    """The main loss that training reports, without auxiliary losses; None where it is -c log p."""
    if is_composite(type(objective)):
        return None
    ready = prepared(objective, batch)
    reported = objective.coefficients(ready.detach()).loss
    if reported is None:
        return None
    return reduce(reported, ready, objective.normaliser, objective.normaliser.denominator(ready))


def _reported(objective: Objective, loss: Loss | None) -> None:
    """The loss that training reports is the loss, auxiliary losses included."""
    if loss is None or is_composite(type(objective)):
        return
    for seed in SEEDS:
        batch = random_batch(objective, seed)
        ready = prepared(objective, batch)
        found, z = objective.coefficients(ready.detach()), objective.normaliser.denominator(ready)
        ours = reported_loss(objective, ready, found, surrogate_of(found, objective, ready, z), z)
        theirs = loss(batch).detach()
        close = abs(float(ours - theirs)) <= EXACT * max(1.0, abs(float(theirs)))
        message = (
            f"reports the loss {float(ours):.6g} where it is {float(theirs):.6g}: give it as Coefficients(…, loss=)"
        )
        _demand(objective, close, message)


def _order(objective: Objective, _: Loss | None) -> None:
    for seed in SEEDS:
        batch = random_batch(objective, seed)
        _same(objective, batch, batch.rows(permutation(ROWS, seed), LENGTH), "depends on the order of rows")


def _padding(objective: Objective, _: Loss | None) -> None:
    batch = random_batch(objective, 3)
    advice = "use batch.mask.sum(1), not the width of a batch"
    _same(objective, batch, wider(batch, 3), f"depends on how far rows are padded: {advice}")


def _gaps(objective: Objective, _: Loss | None) -> None:
    """Masked positions between tokens, as of a tool's result in other trainers' batches, count for nothing."""
    for seed in SEEDS:
        batch = random_batch(objective, seed)
        fault = "depends on masked positions between tokens: count tokens with batch.mask.cumsum(1), not positions"
        _same(objective, batch, with_gaps(batch, 4, seed), fault)


def _same(objective: Objective, batch: TokenBatch, changed: TokenBatch, fault: str) -> None:
    """The loss and its gradient are the same on a batch made from the first."""
    loss, other = (surrogate(objective, prepared(objective, one)) for one in (batch, changed))
    off = max(gap(other, loss), gap(gradients(other, batch), gradients(loss, batch)))
    _demand(objective, off <= SUMMED, f"{fault} (relative difference {off:.2g})")


def _split(objective: Objective, _: Loss | None) -> None:
    """Micro-batches add up to the whole batch."""
    if is_composite(type(objective)):
        return
    batch = random_batch(objective, 1)
    ready = prepared(objective, batch)
    whole, denominator = surrogate(objective, ready), objective.normaliser.denominator(ready)
    for units in (1, 2, 5):
        indices = _micro_batches(objective, ready, units)
        total = sum(objective.normaliser.denominator(ready.rows(index, LENGTH)) for index in indices)
        _demand(objective, total == denominator, "has a normaliser whose denominators do not add up")
        summed = _summed(objective, ready, indices)
        off = max(gap(summed, whole), gap(gradients(summed, batch), gradients(whole, batch)))
        advice = "if a coefficient depends on other rows, compute it in advantages or set couples"
        _demand(objective, off <= SUMMED, f"depends on how a batch is split into micro-batches: {advice}")


def _micro_batches(objective: Objective, batch: TokenBatch, units: int) -> list[Tensor]:
    """Rows in micro-batches of so many groups or pairs, in another order than in the batch."""
    if objective.couples is Coupling.GROUP:
        assert batch.group is not None
        together = [(batch.group == group).nonzero().flatten() for group in set(batch.group.tolist())]
    else:
        together = list(torch.arange(ROWS).view(-1, 2))
    order = permutation(len(together)).tolist()
    shuffled = [together[place] for place in order]
    return [torch.cat(shuffled[i : i + units]) for i in range(0, len(shuffled), units)]


def _summed(objective: Objective, ready: TokenBatch, indices: Sequence[Tensor]) -> Tensor:
    """The surrogate as a sum over micro-batches."""
    denominator = objective.normaliser.denominator(ready)
    coefficients = objective.coefficients(ready.detach()).values if objective.is_coupled else None
    total = torch.zeros((), dtype=ready.dtype)
    for index in indices:
        width = max(int(ready.mask[index].sum(1).max()), 1)
        part = ready.rows(index, width)
        if coefficients is None:
            total = total + surrogate(objective, part, denominator)
        else:  # they depend on the whole batch, and are known before the first backward pass
            total = total + surrogate_of(Coefficients(coefficients[index, :width]), objective, part, denominator)
    return total


def _nothing(objective: Objective, _: Loss | None) -> None:
    """A batch with all tokens masked has a loss and gradient of 0."""
    batch = random_batch(objective).replace(mask=torch.zeros(ROWS, LENGTH, dtype=torch.bool))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "every token of the batch is masked")
        loss = surrogate(objective, prepared(objective, batch))
    none = float(loss.detach()) == 0 and not gradients(loss, batch).any()
    _demand(objective, none, "has a loss or a gradient where every token is masked: both must be 0")


def _precision(objective: Objective, _: Loss | None) -> None:
    """In float32 and bfloat16, everything has the dtype of log-probs and is close to float64 on the same numbers."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        low = cast(random_batch(objective), dtype)
        high = cast(low, torch.float64)
        loss = surrogate(objective, prepared(objective, low))
        advice = "give constants the dtype of the batch, as in torch.tensor(x, dtype=batch.dtype)"
        message = f"computes in {loss.dtype} where log-probs are {dtype}: {advice}"
        _demand(objective, loss.dtype == dtype, message)
        exact = gradients(surrogate(objective, prepared(objective, high)), high)
        off = gap(gradients(loss, low).double(), exact)
        _demand(
            objective, off <= tolerance, f"loses precision in {dtype}: its gradient is off by {off:.2g} of its size"
        )


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


CHECKS: dict[Check, str] = {
    _kinds: "on a random batch",
    _finite: "on a random batch",
    _masked: "on a batch with garbage at masked positions",
    _order: "with rows in another order",
    _padding: "on a batch with more padding",
    _gaps: "on a batch with masked positions between tokens",
    _split: "in micro-batches",
    _nothing: "where every token is masked",
    _gradient: "on a random batch",
    _reported: "on a random batch",
    _precision: "in lower precision",
}
"""The checks, each with the circumstances to name if the objective raises an error there.

Checks that can name a cause come before that of the gradient, which notices most faults but cannot explain them.
"""
