"""From a buffer to weights on ∇ log π: which rows an objective is measured on, and what its surrogate makes of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlzoo.buffers import Buffer
from rlzoo.errors import UserError
from rlzoo.objective import Objective, get_objective, surrogate_of
from rlzoo.policy import Policy, Sequences
from rlzoo.policy.policy import token_batches
from rlzoo.training.batches import static_batch
from rlzoo.types import STATISTICS, Coefficients, Need, Selection, TokenBatch, Trajectory
from rlzoo.variance.gradients import Task
from rlzoo.variance.moments import TokenTable

BASELINE = "(demonstrations)"
"""The name of what cosines and norm ratios are taken to, where no objective that is analysed is the same."""
BLOCKS = 128
"""Independent Monte-Carlo estimates that the draws of a token are split into."""
SINGLE_ROWS = (Selection.DEMONSTRATIONS, Selection.CORRECT)


@dataclass(frozen=True)
class Likelihood(Objective):
    """The log-likelihood of demonstrations, which other gradients are compared with: c_t = 1."""

    name: ClassVar[str] = BASELINE

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(torch.ones_like(batch.logp))


@dataclass
class Scored:
    """What forward passes say of some rows, in lists by row: n completion tokens each."""

    rows: list[Trajectory]
    logp: list[Float[Tensor, " n"]]
    statistics: dict[str, list[Float[Tensor, " n"]]]
    value: list[Float[Tensor, " n"]] | None
    reference: list[Float[Tensor, " n"]] | None
    hits: dict[str, dict[int, Int[np.ndarray, "n R"]]]
    """By objective and row: draws that hit the token, by block."""


@dataclass
class Subject:
    """One objective with the rows that it is measured on."""

    objective: Objective
    units: list[tuple[int, ...]]
    """Rows of each unit, as indices into the rows of `Scored`."""

    @property
    def rows(self) -> list[int]:
        return [row for unit in self.units for row in unit]

    @property
    def weighs_experts(self) -> bool:
        """Whether its coefficient weighs an expert's token, which the token moments ask for."""
        return self.objective.learns_from is Selection.DEMONSTRATIONS


@dataclass
class Weighed:
    """An objective's coefficients on its rows, and the gradient that they make."""

    batch: TokenBatch
    coefficients: Coefficients
    task: Task
    scaled: Float[Tensor, "R T"]
    """∂ loss / ∂ log π, scaled as the gradients are."""


def named_objectives(objectives: Sequence[str | Objective] | Mapping[str, Objective]) -> dict[str, Objective]:
    """Objectives by the names that they are reported under. Raises UserError for a name given twice, or none."""
    if isinstance(objectives, Mapping):
        named = dict(objectives)
    else:
        named = {}
        for given in objectives:
            objective = get_objective(given) if isinstance(given, str) else given
            if objective.name in named:
                raise UserError(f"objective {objective.name!r} is given twice: pass a mapping of names of your own")
            named[objective.name] = objective
    if not named:
        raise UserError("no objective to analyse: give at least one")
    return named


def subjects_of(
    named: Mapping[str, Objective], buffer: Buffer, rows: int, seed: int, learns_from: Selection | None
) -> tuple[list[int], dict[str, Subject], dict[str, str]]:
    """The buffer's rows that are used, each objective's units among them, and why some have none."""
    wanted = dict(named)
    wanted[BASELINE] = Likelihood()
    chosen: dict[str, list[tuple[int, ...]]] = {}
    skipped: dict[str, str] = {}
    for name, objective in wanted.items():
        selection, options = objective.learns_from, dict(objective.view_options)
        if learns_from in SINGLE_ROWS and selection in SINGLE_ROWS and selection is not learns_from:
            selection, options = learns_from, {}
        try:
            chosen[name] = _sample(buffer.view(selection, **options).units, rows, seed)
        except UserError as error:
            if name in named:
                skipped[name] = str(error)
    if not set(chosen) & set(named):
        raise UserError(next(iter(skipped.values())))
    picked = sorted({row for units in chosen.values() for unit in units for row in unit})
    place = {row: i for i, row in enumerate(picked)}
    subjects = {
        name: Subject(wanted[name], [tuple(place[row] for row in unit) for unit in units])
        for name, units in chosen.items()
    }
    return picked, subjects, skipped


def _sample(units: Sequence[tuple[int, ...]], rows: int, seed: int) -> list[tuple[int, ...]]:
    """Units drawn at random until they have ``rows`` rows, in the buffer's order."""
    order = random.Random(seed).sample(range(len(units)), len(units))
    kept, held = [], 0
    for index in order:
        if held >= rows:
            break
        kept.append(index)
        held += len(units[index])
    return [units[index] for index in sorted(kept)]


@torch.no_grad()
def score(
    policy: Policy,
    rows: list[Trajectory],
    needs: frozenset[Need],
    experts: Mapping[str, set[int]],
    draws: int,
    seed: int,
    reference: Policy | None,
    token_budget: int,
) -> Scored:
    """One forward pass over the rows, with ``draws`` samples a token for each objective that weighs experts."""
    statistics = sorted({Need.SQUARE_MASS, *(n for n in STATISTICS if n in needs)}, key=lambda need: need.value)
    training = policy.training
    policy.eval()
    names = [need.value for need in statistics]
    flat: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(rows) for name in ("logp", *names, "value", "other")}
    hits: dict[str, dict[int, Int[np.ndarray, "n R"]]] = {name: {} for name in experts}
    draw = {
        name: torch.Generator(policy.device).manual_seed(seed * 1000 + number) for number, name in enumerate(experts)
    }
    has_value = False
    everyone = set().union(*experts.values()) if draws else set()
    for batch in token_batches([(i,) for i in range(len(rows))], [_length(row) for row in rows], token_budget):
        sequences = Sequences.collate(
            [rows[i].prompt_ids for i in batch], [rows[i].completion_ids for i in batch], policy.device
        )
        sampled: dict[str, list[Tensor]] = {name: [] for name in experts}

        def look(logits: Tensor, _: Tensor | None, target: Tensor, into: dict[str, list[Tensor]] = sampled) -> None:
            probability = logits.softmax(1)
            for name, chosen in into.items():
                drawn = torch.multinomial(probability, draws, replacement=True, generator=draw[name])
                some = (drawn == target[:, None])[:, : draws // BLOCKS * BLOCKS]
                chosen.append(some.view(len(target), BLOCKS, -1).sum(2, dtype=torch.int32).cpu())

        term = look if everyone.intersection(batch) else None
        scores = policy(sequences, statistics=statistics, term=term)
        columns = {"logp": scores.logp, **scores.statistics}
        if scores.value is not None:
            columns["value"], has_value = scores.value, True
        if reference is not None:
            columns["other"] = reference(sequences).logp
        for place, row in enumerate(batch):
            for name, values in columns.items():
                flat[name][row] = values[place, : len(rows[row].completion_ids)]
        lengths = [len(rows[i].completion_ids) for i in batch]
        for name, parts in sampled.items():
            if parts:
                for row, part in zip(batch, torch.split(torch.cat(parts), lengths), strict=True):
                    if row in experts[name]:
                        hits[name][row] = part.numpy()
    policy.train(training)
    return Scored(
        rows,
        flat["logp"],
        {name: flat[name] for name in names},
        flat["value"] if has_value else None,
        flat["other"] if reference is not None else None,
        hits,
    )


def _length(row: Trajectory) -> int:
    return len(row.prompt_ids) + len(row.completion_ids)


def weigh(policy: Policy, subject: Subject, scored: Scored) -> Weighed:
    """The objective's coefficients on all its rows as one batch, and the weights that its surrogate puts on ∇ log π."""
    objective, chosen = subject.objective, subject.rows
    place = {row: i for i, row in enumerate(chosen)}
    rows, units = [scored.rows[i] for i in chosen], [tuple(place[row] for row in unit) for unit in subject.units]
    batch = static_batch(rows, units, objective.learns_from, policy.device)
    batch = objective.prepare(_filled(objective, batch, chosen, scored))
    found = objective.coefficients(batch.detach())
    leaves = [batch.logp.clone().requires_grad_(True)]
    if batch.value is not None:
        leaves.append(batch.value.clone().requires_grad_(True))
    live = replace(batch, logp=leaves[0], value=leaves[1] if len(leaves) > 1 else None)
    with torch.enable_grad():
        loss = surrogate_of(found, objective, live, denominator=1.0)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    denominator = objective.normaliser.denominator(batch)
    scale = len(units) / denominator if denominator else 0.0

    def spread(part: Tensor | None) -> Tensor | None:
        """From the objective's rows to all rows."""
        if part is None:
            return None
        whole = part.new_zeros(len(scored.rows), max(len(row.completion_ids) for row in scored.rows))
        whole[torch.tensor(chosen, device=part.device), : part.shape[1]] = part
        return whole

    has_term = type(objective).logit_term is not Objective.logit_term
    on_trunk = policy.critic is None and policy.value_head is not None
    weight = spread(gradients[0])
    assert weight is not None
    row_weight = spread(objective.normaliser.weight(batch).expand(batch.mask.shape).contiguous())
    task = Task(
        subject.units,
        weight,
        scale,
        spread(gradients[1]) if on_trunk and len(gradients) > 1 else None,
        objective.logit_term if has_term else None,
        row_weight[:, 0] if has_term and row_weight is not None else None,
    )
    return Weighed(batch, found, task, gradients[0] * scale)


def baseline(weighed: Mapping[str, Weighed]) -> str | None:
    """The objective that is the plain log-likelihood, or `BASELINE` if none is; None where there are no demonstrations.

    Of two that are the same, one backward pass is enough.
    """
    plain = weighed.get(BASELINE)
    if plain is None:
        return None

    def same(task: Task) -> bool:
        alike = task.units == plain.task.units and task.scale == plain.task.scale
        return alike and task.term is None and task.value_weight is None and torch.equal(task.weight, plain.task.weight)

    return next(name for name, own in weighed.items() if same(own.task))


def _filled(objective: Objective, batch: TokenBatch, chosen: Sequence[int], scored: Scored) -> TokenBatch:
    """The batch with all that the objective may look at."""
    needs = objective.requires

    def table(values: Sequence[Tensor]) -> Tensor:
        out = values[0].new_zeros(batch.mask.shape)
        for place, row in enumerate(chosen):
            out[place, : len(values[row])] = values[row]
        return out

    if Need.BEHAVIOUR in needs and batch.behaviour_logp is None:
        raise UserError("the buffer has no behaviour log-probs: fill it with `rlzoo rollout`, which records them")
    logp = table(scored.logp)
    stored = batch.reference_logp
    if Need.EMA_REFERENCE in needs or stored is None:
        stored = logp if scored.reference is None else table(scored.reference)
    value = None
    if Need.CRITIC in needs:
        value = torch.zeros_like(logp) if scored.value is None else table(scored.value)
    return replace(
        batch,
        logp=logp,
        reference_logp=stored,
        snapshot_logp=logp,
        value=value,
        old_value=value,
        statistics={name: table(values) for name, values in scored.statistics.items()},
    )


def tokens_of(values: Float[Tensor, "B T"], batch: TokenBatch) -> Float[np.ndarray, " N"]:
    """The completion tokens' values, one after the other."""
    found: Float[np.ndarray, " N"] = values[batch.mask].double().cpu().numpy()
    return found


def token_table(scored: Scored, rows: Sequence[int]) -> TokenTable:
    """The completion tokens of some rows, one after the other."""

    def flat(values: Sequence[Tensor]) -> Float[np.ndarray, " N"]:
        found: Float[np.ndarray, " N"] = torch.cat([values[r] for r in rows]).double().cpu().numpy()
        return found

    row = np.repeat(np.arange(len(rows)), [len(scored.logp[r]) for r in rows])
    return TokenTable(row, flat(scored.logp), flat(scored.statistics[Need.SQUARE_MASS.value]))
