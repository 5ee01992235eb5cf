"""`check_objective` and `check_reward` see what is wrong, and say it in words that the author understands."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from rlzoo.inputs import Context, Input, Reference, Stage
from rlzoo.objective import Normaliser, Objective
from rlzoo.testing import LossInLogits, check_objective, check_reward
from rlzoo.types import Coefficients, Coupling, Selection, TokenBatch

Method = Callable[[Any, TokenBatch], Any]


def tempered(batch: TokenBatch) -> Tensor:
    """-(1/N) Σ sg(p_t) log p_t."""
    logp = batch.logp[batch.mask]
    return -(logp.exp().detach() * logp).sum() / len(logp)


@dataclass(frozen=True)
class Tempered(Objective):
    """c_t = p_t, as it should be."""

    name: ClassVar[str] = "tempered"

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(batch.logp.exp())


class Kept(Coefficients):
    """Coefficients that keep their graph."""

    def __post_init__(self) -> None:
        pass


def row_mean(batch: TokenBatch, values: Tensor) -> Tensor:
    """The mean of each row [B, 1]: NaN where a row has no token."""
    return torch.where(batch.mask, values, 0).sum(1, keepdim=True) / batch.mask.sum(1, keepdim=True)


def of_step(batch: TokenBatch) -> Tensor:
    """A coefficient that looks at all rows."""
    p = batch.logp.exp()
    return p / p[batch.mask].max() if batch.mask.any() else p


def broken(coefficients: Callable[[TokenBatch], Tensor | Coefficients], **members: Any) -> Objective:
    """An objective with these coefficients and members."""

    def method(self: Objective, batch: TokenBatch) -> Coefficients:
        found = coefficients(batch)
        return found if isinstance(found, Coefficients) else Coefficients(found)

    made: Any = dataclass(frozen=True)(
        type("Broken", (Objective,), {"name": "broken", "coefficients": method, **members})
    )
    found: Objective = made()
    return found


def from_row_means(self: Objective, batch: TokenBatch) -> Tensor:
    """Advantages against the mean of the row means, one of which is NaN."""
    assert batch.reward is not None
    return (batch.reward - row_mean(batch, batch["reference_logp"]).mean())[:, None].expand(batch.mask.shape)


class Squared:
    """A normaliser whose Z is no sum over micro-batches."""

    def weight(self, batch: TokenBatch) -> Tensor:
        return torch.ones(len(batch.mask), 1, dtype=batch.dtype)

    def denominator(self, batch: TokenBatch) -> float:
        return float(batch.mask.sum()) ** 2


def seeded(batch: TokenBatch) -> Tensor:
    return torch.rand(batch.logp.shape, dtype=batch.dtype)


WRONG: Mapping[str, tuple[Objective, str]] = {
    "opposite sign": (broken(lambda b: -b.logp.exp()), "that of the loss: it has the opposite sign"),
    "twice as large": (broken(lambda b: 2 * b.logp.exp()), "that of the loss: it is 2 times as large"),
    "another power": (broken(lambda b: (2 * b.logp).exp()), "not that of the loss (relative difference 0."),
    "another normaliser": (broken(lambda b: b.logp.exp(), normaliser=Normaliser.SEQUENCE_SUM), "times as large"),
    "another reported loss": (
        broken(lambda b: Coefficients(b.logp.exp(), loss=b.logp.exp())),
        "reports the loss 0.",
    ),
    "a loss that is not finite": (
        broken(lambda b: Coefficients(b.logp.exp(), loss=row_mean(b, b.logp)[:, 0])),
        "reports a loss that is not finite on rows with one token or none",
    ),
    "looks at padding": (
        broken(lambda b: b.logp.exp() * b.logp.sum().sign().neg()),
        "depends on masked positions, which may hold anything",
    ),
    "reports padding": (
        broken(lambda b: Coefficients(b.logp.exp(), loss=-(b.logp.exp() * b.logp * b.mask).sum(1))),
        "depends on masked positions, which may hold anything",
    ),
    "an auxiliary term at padding": (
        broken(lambda b: b.logp.exp(), auxiliary=lambda self, b: {"extra": -b.logp.nan_to_num(0, 0, 0).sum(1)}),
        "masked positions",
    ),
    "looks at the width": (
        broken(lambda b: b.logp.exp() / b.mask.shape[1]),
        "depends on how far rows are padded",
    ),
    "counts positions": (
        broken(lambda b: b.logp.exp() * 0.9 ** torch.arange(b.mask.shape[1], dtype=b.dtype)),
        "depends on masked positions between tokens: count tokens with batch.mask.cumsum(1)",
    ),
    "looks at the first row": (
        broken(lambda b: b.logp.exp() * b.mask[0].sum()),
        "depends on the order of rows",
    ),
    "keeps its graph": (broken(lambda b: Kept(b["reference_logp"], None, {}), requires=(Reference(),)), "with a graph"),
    "looks at the whole step": (broken(of_step), "depends on how a batch is split into micro-batches"),
    "one per row": (broken(lambda b: b.logp.exp()[:, :1]), "coefficients of shape (14, 1): give one per token"),
    "a reduced metric": (
        broken(lambda b: Coefficients(b.logp.exp(), metrics={"mean": b.logp.mean()})),
        "'mean' of shape (): give [B, T] or [B], not reduced",
    ),
    "NaN of rows without a token": (
        broken(
            lambda b: torch.ones_like(b.logp) if b.advantage is None else b.advantage,
            advantages=from_row_means,
            requires=(Reference(),),
        ),
        "gradient that is not finite on rows with one token or none",
    ),
    "fails without a token": (
        broken(lambda b: b.logp.exp() / b.logp[b.mask].max().abs().clamp(1e9, 1e9) * 1e9),
        "fails where every token is masked: RuntimeError",
    ),
    "a constant in float64": (
        broken(lambda b: b.logp.exp() * torch.ones(b.logp.shape[1], dtype=torch.float64)),
        "computes in torch.float64 where log-probs are torch.float32: give constants the dtype of the batch",
    ),
    "cancels digits": (
        broken(lambda b: (b.logp.exp() + 1e6) - 1e6),
        "loses precision in torch.float32",
    ),
    "an input that is not listed": (
        broken(lambda b: b.logp - b.reference_logp),
        "the batch has no 'reference_logp': an objective gets the inputs that its requires lists, here none",
    ),
    "log-probs before they are there": (
        broken(lambda b: torch.ones_like(b.logp), advantages=lambda self, b: b.logp.exp()),
        "list Snapshot() in the objective's requires and read batch.snapshot_logp",
    ),
    "prepares otherwise where it has been scored": (
        broken(
            lambda b: torch.ones_like(b.logp) if b.advantage is None else b.advantage,
            advantages=lambda self, b: torch.full(b.mask.shape, 1.0 if b.get("logp") is None else 2.0, dtype=b.dtype),
        ),
        "has another gradient where prepare gets the policy's log-probs",
    ),
    "a normaliser that does not add up": (
        broken(lambda b: b.logp.exp(), normaliser=Squared()),
        "has a normaliser whose denominators do not add up",
    ),
    "a loss of nothing": (
        broken(
            lambda b: b.logp.exp(),
            normaliser=Normaliser.SEQUENCE_SUM,
            auxiliary=lambda self, b: {"constant": torch.ones(len(b.mask), dtype=b.dtype)},
        ),
        "has a loss or a gradient where every token is masked",
    ),
    "random": (broken(seeded), "gives another gradient the second time"),
}


@pytest.mark.slow
def test_what_is_right_passes() -> None:
    check_objective(Tempered(), tempered)
    coupled = broken(of_step, couples=Coupling.BATCH)
    check_objective(coupled)


@pytest.mark.parametrize("fault", WRONG)
def test_an_objective_that_is_wrong(fault: str) -> None:
    objective, told = WRONG[fault]
    with pytest.raises(AssertionError) as caught:
        check_objective(objective, tempered, through_trainer=False)
    message = str(caught.value)
    assert message.startswith("objective 'broken' ") and "\n" not in message
    assert told in message


@dataclass(frozen=True)
class Broken(Input):
    """An input that is well in tests and NaN in training."""

    stage: ClassVar[Stage] = Stage.BATCH
    key: ClassVar[str] = "weight"

    def compute(self, context: Context) -> Tensor:
        return torch.full(context.mask.shape, float("nan"))


IN_THE_TRAINER: Mapping[str, tuple[Objective, str]] = {
    "an input that is NaN": (
        broken(lambda b: b["weight"], requires=(Broken(),)),
        "objective 'broken' does not train: ",
    ),
    "looks at its partner": (
        broken(lambda b: b.mask.sum(1)[b.partner][:, None] * b.logp.exp(), learns_from=Selection.PAIRS),
        "objective 'broken' is trained differently with micro-batches of one row",
    ),
    "no gradient": (
        broken(lambda b: torch.zeros_like(b.logp)),
        "objective 'broken' does not train: its gradient is 0 in every step",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", IN_THE_TRAINER)
def test_an_objective_that_is_wrong_in_the_trainer_alone(fault: str) -> None:
    objective, told = IN_THE_TRAINER[fault]
    check_objective(objective, through_trainer=False)
    with pytest.raises(AssertionError, match=told):
        check_objective(objective)


def divergence(policy: Tensor, reference: Tensor) -> Tensor:
    """KL(π ‖ π_ref) of each position."""
    logp = policy.log_softmax(-1)
    return (logp.exp() * (logp - reference.log_softmax(-1))).sum(-1)


def mean_divergence(batch: TokenBatch, policy: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    return divergence(policy[batch.mask], reference[batch.mask]).mean()


TERMS: Mapping[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "right": (divergence, ""),
    "detached": (lambda p, r: divergence(p.detach(), r) + p.sum(1), "gradient in the logits that is not that of the l"),
    "shifted": (lambda p, r: divergence(p, r) + 1, "has the loss .* in the logits where it is "),
    "reduced": (lambda p, r: divergence(p, r).mean(), r"logit_term of shape \(\): give one value per position"),
    "looks at its chunk": (lambda p, r: divergence(p, r) * len(p), "depends on how a batch is split"),
    "loses digits": (lambda p, r: divergence((p + 1e3) - 1e3, r), "logit_term that loses precision in float32"),
    "overflows in float32": (lambda p, r: divergence(p, r) + 0 * (p + 100).exp().sum(1), "loses precision in float32"),
    "infinite": (lambda p, r: divergence(p, r) / 0, "gradient in the logits that is not finite"),
    "in float32": (lambda p, r: divergence(p.float(), r.float()), "logit_term in torch.float32 of logits in torch.f"),
}


@pytest.mark.parametrize("term", TERMS)
def test_a_logit_term_that_is_wrong(term: str) -> None:
    function, told = TERMS[term]
    objective = broken(
        lambda b: torch.zeros_like(b.logp),
        logit_term=lambda self, policy, reference, target: function(policy, reference),
    )

    def check() -> None:
        loss = None if term == "looks at its chunk" else mean_divergence
        check_objective(objective, loss_in_logits=loss, through_trainer=False)

    if told:
        with pytest.raises(AssertionError, match=told):
            check()
    else:
        check()


LOSSES: Mapping[str, tuple[Callable[[TokenBatch], Tensor], str]] = {
    "looks at padding": (lambda b: b.logp.sum(), "the loss given for 'tempered' depends on masked positions"),
    "has no graph": (lambda b: tempered(b.detach()), "must be a scalar, computed from batch.logp and its graph"),
    "is not reduced": (lambda b: b.logp, "must be a scalar"),
    "is constant": (lambda b: 0 * tempered(b), "has no gradient on a random batch, so it checks nothing"),
}


@pytest.mark.parametrize("fault", LOSSES)
def test_a_loss_that_checks_nothing(fault: str) -> None:
    loss, told = LOSSES[fault]
    with pytest.raises(AssertionError, match=told):
        check_objective(Tempered(), loss, through_trainer=False)


LOSSES_IN_LOGITS: Mapping[str, tuple[LossInLogits, str]] = {
    "looks at padding": (lambda b, p, r, y: divergence(p, r).mean(), "in logits given for 'broken' depends on masked"),
    "has no graph": (lambda b, p, r, y: mean_divergence(b, p.detach(), r, y), "computed from the logits and their"),
    "is not reduced": (lambda b, p, r, y: divergence(p[b.mask], r[b.mask]), "must be a scalar"),
    "is constant": (lambda b, p, r, y: 0 * mean_divergence(b, p, r, y), "no gradient on random logits, so it checks"),
}


@pytest.mark.parametrize("fault", LOSSES_IN_LOGITS)
def test_a_loss_in_logits_that_checks_nothing(fault: str) -> None:
    loss, told = LOSSES_IN_LOGITS[fault]
    objective = broken(
        lambda b: torch.zeros_like(b.logp),
        logit_term=lambda self, policy, reference, target: 2 * divergence(policy, reference),
    )
    with pytest.raises(AssertionError, match=told):
        check_objective(objective, loss_in_logits=loss, through_trainer=False)


def length(completions: list[str], **columns: Any) -> list[float | None]:
    return [float(len(completion)) for completion in completions]


def ranked(completions: list[str], **columns: Any) -> list[float]:
    """Each completion's place in its batch."""
    return [float(place) for place in range(len(completions))]


def against_the_mean(completions: list[str], **columns: Any) -> list[float]:
    return [len(c) - sum(map(len, completions)) / len(completions) for c in completions]


def one_too_few(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * (len(completions) - 1)


def without_a_guard(completions: list[str], **columns: Any) -> list[float]:
    return [1 / len(completion) for completion in completions]


def infinite(completions: list[str], **columns: Any) -> list[float]:
    return [float("inf")] * len(completions)


counter = itertools.count()
REWARDS: Mapping[str, tuple[Callable[..., Any], str]] = {
    "random": (lambda completions: [random.random() for _ in completions], "the second time; draw nothing at random"),
    "counts its calls": (lambda completions: [float(next(counter)) for _ in completions], "the second time"),
    "looks at the order": (ranked, "'ranked' gives completion 0 first 0.0, then 2.0 with its batch in another order"),
    "looks at its batch": (against_the_mean, "'against-the-mean' gives completion 0 first .* in a batch of its own"),
    "too few": (one_too_few, "'one-too-few' returned 2 values for 3 completions: return one number or None"),
    "infinite": (infinite, "'infinite' returned inf on row 0: return a finite number"),
    "fails on nothing": (without_a_guard, r"ZeroDivisionError: .*\(the completion is ''\)"),
}


@pytest.mark.parametrize("fault", REWARDS)
def test_a_reward_that_is_wrong(fault: str) -> None:
    reward, told = REWARDS[fault]
    with pytest.raises(AssertionError, match=told) as caught:
        check_reward(reward, ["q"] * 3, ["a", "bb", "ccc"])
    assert "\n" not in str(caught.value)


def test_a_reward_that_is_right() -> None:
    check_reward(length, ["q"] * 3, ["a", "bb", "ccc"])
    with pytest.raises(ValueError, match="at least 2 completions"):
        check_reward(length, ["q"], ["a"])
