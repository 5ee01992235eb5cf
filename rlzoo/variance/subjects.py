"""Which rows of a buffer each objective is measured on, and the weights on ∇ log π in its surrogate."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlzoo.buffers import Buffer, View
from rlzoo.buffers.views import view_in_place
from rlzoo.errors import UserError
from rlzoo.objective import Objective, get_objective, is_composite, surrogate_of
from rlzoo.objective import view_of as own_view
from rlzoo.policy import Assembler
from rlzoo.policy.sequences import learned_tokens
from rlzoo.registry import one_line
from rlzoo.types import (
    Coefficients,
    Selection,
    TokenBatch,
    Trajectory,
    WhichView,
    at_temperature,
    selector_of,
)
from rlzoo.variance.scoring import Scored
from rlzoo.variance.tasks import Task

BASELINE = "(demonstrations)"
"""The name of the objective that gradients are compared with, if no analysed objective is equivalent to it."""
LearnsFrom = WhichView | Mapping[str, WhichView] | None
Draw = tuple[int, int, bool]
"""A row of the buffer, how often it was drawn before, and whether it is taken at its sampling temperature.

A row that is drawn twice, or taken at two temperatures, counts as two rows.
"""


@dataclass(frozen=True)
class Likelihood(Objective):
    """The log-likelihood of demonstrations, which other gradients are compared with: c_t = 1."""

    name: ClassVar[str] = BASELINE

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(torch.ones_like(batch.logp))


@dataclass
class Subject:
    """An objective with the rows that it is measured on."""

    objective: Objective
    selection: WhichView
    units: list[tuple[int, ...]]
    """Rows of each unit, as indices into the rows of `Scored`."""
    prompts: dict[int, tuple[int, ...]]
    """The rows of each prompt, by the prompt's number, which is the same in all subjects."""

    @property
    def rows(self) -> list[int]:
        """The rows of all units."""
        return [row for unit in self.units for row in unit]

    @property
    def weights_expert_tokens(self) -> bool:
        """Whether its coefficients weight expert tokens, as the token moments require."""
        return self.selection == self.objective.learns_from and not selector_of(self.selection).is_sampled


@dataclass
class SubjectWeights:
    """The coefficients of an objective on its rows, and the gradient to measure."""

    batch: TokenBatch
    coefficients: Coefficients
    task: Task


def named_objectives(objectives: Sequence[str | Objective] | Mapping[str, Objective]) -> dict[str, Objective]:
    """Objectives by the names that they are reported under. Raises UserError for a repeated name, or no objective."""
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
    named: Mapping[str, Objective], buffer: Buffer, rows: int, seed: int, learns_from: LearnsFrom
) -> tuple[list[int], dict[str, Subject], dict[str, str]]:
    """The rows of the buffer that are used, the units of each objective, and why some objectives have none.

    The last subject is the baseline, if there are demonstrations.
    """
    prompt_of = _numbers(buffer.column("prompt_id"))
    chosen: dict[str, list[tuple[Draw, ...]]] = {}
    skipped: dict[str, str] = {}
    plain = {name: objective for name, objective in named.items() if not is_composite(type(objective))}
    selections = {name: view_of(name, objective, learns_from)[0] for name, objective in plain.items()}
    for name, objective in named.items():
        if name not in plain:
            skipped[name] = f"{objective.name!r} is a composite: analyse its components, which have their own rows"
            continue
        try:
            selection, options = view_of(name, objective, learns_from)
            chosen[name] = _sample(buffer.view(selection, **options), prompt_of, rows, seed)
        except UserError as error:
            skipped[name] = str(error)
    if not chosen:
        raise UserError(next(iter(skipped.values())))
    wanted = dict(named)
    try:
        chosen[BASELINE] = _sample(buffer.view(Selection.DEMONSTRATIONS), prompt_of, rows, seed)
        wanted[BASELINE], selections[BASELINE] = Likelihood(), Selection.DEMONSTRATIONS
    except UserError:
        pass  # then nothing is compared with it
    hot = np.array(buffer.column("temperature")) != 1.0
    for name in [name for name in chosen if wanted[name].at_sampling_temperature]:
        chosen[name] = [tuple((row, n, bool(hot[row])) for row, n, _ in unit) for unit in chosen[name]]
    picked = sorted({draw for units in chosen.values() for unit in units for draw in unit})
    place = {draw: i for i, draw in enumerate(picked)}
    subjects = {
        name: Subject(
            wanted[name],
            selections[name],
            [tuple(place[draw] for draw in unit) for unit in units],
            {p: tuple(place[draw] for draw in draws) for p, draws in _by_prompt(units, prompt_of).items()},
        )
        for name, units in chosen.items()
    }
    return [row for row, _, _ in picked], subjects, skipped


def rows_of(buffer: Buffer, picked: Sequence[int], subjects: Mapping[str, Subject]) -> list[Trajectory]:
    """The rows, each at the temperature at which the objectives that were given it take log-probs."""
    rows = buffer.at(picked)
    for subject in subjects.values():
        for place in subject.rows:
            rows[place] = at_temperature(rows[place], subject.objective.at_sampling_temperature)
    return rows


def view_of(name: str, objective: Objective, learns_from: LearnsFrom) -> tuple[WhichView, Mapping[str, object]]:
    """The view that an objective is measured on, with its options: its own, or another of single rows."""
    asked = learns_from.get(name) if isinstance(learns_from, Mapping) else learns_from
    own, options = own_view(objective)
    if asked is None or not (selector_of(own).is_imitated or isinstance(learns_from, Mapping)):
        return own, options
    try:
        return view_in_place(objective, asked)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _numbers(prompt_ids: Sequence[str]) -> list[int]:
    """A number for each row's prompt."""
    known: dict[str, int] = {}
    return [known.setdefault(name, len(known)) for name in prompt_ids]


def _sample(view: View, prompt_of: Sequence[int], rows: int, seed: int) -> list[tuple[Draw, ...]]:
    """The units of prompts drawn at random until they have ``rows`` rows, in the buffer's order.

    Prompts are drawn whole and in one order for all views, so that objectives look at the same prompts as far as
    their views have them; one with more than ``rows`` rows is cut to that. Units of a view with weights are drawn as in
    training, in proportion to them, whatever their prompt: one drawn twice counts as two.
    """
    units, draw = view.units, random.Random(seed)
    if view.weights is not None:
        order = draw.choices(range(len(units)), view.weights, k=len(units))
        kept, held = [], 0
        for index in order:
            if held >= rows:
                break
            kept.append(index)
            held += len(units[index])
    else:
        of_prompt: dict[int, list[int]] = {}
        for index, unit in enumerate(units):
            of_prompt.setdefault(prompt_of[unit[0]], []).append(index)
        kept, held = [], 0
        for prompt in draw.sample(range(max(prompt_of) + 1), max(prompt_of) + 1):
            if held >= rows:
                break
            own = 0
            for index in of_prompt.get(prompt, ()):
                if own < rows:
                    kept.append(index)
                    own += len(units[index])
            held += own
    kept.sort()
    return [tuple((row, n - bisect_left(kept, index), False) for row in units[index]) for n, index in enumerate(kept)]


def _by_prompt(units: Sequence[tuple[Draw, ...]], prompt_of: Sequence[int]) -> dict[int, tuple[Draw, ...]]:
    """The rows drawn of each prompt."""
    found: dict[int, tuple[Draw, ...]] = {}
    for unit in units:
        prompt = prompt_of[unit[0][0]]
        found[prompt] = (*found.get(prompt, ()), *unit)
    return found


def weights_of(assembler: Assembler, subject: Subject, scored: Scored) -> SubjectWeights:
    """The objective's coefficients on all its rows as one batch, and the weights that its surrogate puts on ∇ log π.

    Raises UserError where the objective fails on the batch or gives a coefficient that is not finite.
    """
    try:
        found = _weights_of(assembler, subject, scored)
    except UserError:
        raise
    except Exception as error:  # of a user's own objective
        raise UserError(f"objective {subject.objective.name!r} failed: {one_line(error)}") from error
    if not found.batch.mask.any():
        raise UserError(f"objective {subject.objective.name!r} learns from no token of its rows: all are masked")
    if not torch.isfinite(found.coefficients.values[found.batch.mask]).all():
        raise UserError(f"objective {subject.objective.name!r} gives coefficients that are not finite")
    return found


def _weights_of(assembler: Assembler, subject: Subject, scored: Scored) -> SubjectWeights:
    objective, chosen, policy = subject.objective, subject.rows, assembler.policy
    place = {row: i for i, row in enumerate(chosen)}
    rows, units = [scored.rows[i] for i in chosen], [tuple(place[row] for row in unit) for unit in subject.units]
    batch = objective.prepare(assembler.assemble(rows, units, objective))
    batch = batch.replace(**assembler.forward(rows, units, objective))
    found = objective.coefficients(batch.detach())
    made = {one.key: one for one in objective.requires if one == policy.attached.get(one.key)}
    leaves = {key: batch[key].clone().requires_grad_(True) for key in made}
    logp = batch.logp.clone().requires_grad_(True)
    with torch.enable_grad():
        loss = surrogate_of(found, objective, batch.replace(logp=logp, **leaves), denominator=1.0)
    gradient, *others = torch.autograd.grad(loss, [logp, *leaves.values()], allow_unused=True)
    denominator = objective.normaliser.denominator(batch)
    scale = len(subject.prompts) / denominator if denominator else 0.0

    def spread(part: Tensor | None) -> Tensor | None:
        """Spread values of the objective's rows over all rows."""
        if part is None:
            return None
        whole = part.new_zeros(len(scored.rows), max(map(learned_tokens, scored.rows)), *part.shape[2:])
        whole[torch.tensor(chosen, device=part.device), : part.shape[1]] = part
        return whole

    weight = spread(gradient)
    assert weight is not None
    term_weight = torch.where(batch.mask, objective.normaliser.weight(batch), 0)
    on_trunk = {
        key: spread(own)
        for (key, one), own in zip(made.items(), others, strict=True)
        if one.trunk(policy.modules_of_inputs[key]) is None
    }
    giver = next((one for one in objective.requires if one.gives_logits), None)
    task = Task(
        list(subject.prompts.values()),
        weight,
        scale,
        {key: own for key, own in on_trunk.items() if own is not None},
        objective.logit_term if objective.has_logit_term else None,
        None if giver is None else assembler.models.of(giver.models()[0]),
        spread(found.of_term(term_weight, batch.mask)) if objective.has_logit_term else None,
    )
    return SubjectWeights(batch, found, task)


def token_weights(subject: Subject, weighted: SubjectWeights, scored: Scored) -> Float[np.ndarray, " N"]:
    """The weights of all learned tokens of a subject's rows in its loss, in float64; 0 where a token is masked."""
    rows = subject.rows
    weights = (weighted.task.weight[rows] * weighted.task.scale).double().cpu().numpy()
    return np.concatenate([own[: learned_tokens(scored.rows[row])] for row, own in zip(rows, weights, strict=True)])


def baseline(weighted: Mapping[str, SubjectWeights]) -> str | None:
    """The objective that is the plain log-likelihood, or `BASELINE` if none is; None where there are no demonstrations.

    Of two that are the same, one backward pass is enough.
    """
    plain = weighted.get(BASELINE)
    if plain is None:
        return None

    def same(task: Task) -> bool:
        alike = task.units == plain.task.units and task.scale == plain.task.scale
        return alike and task.term is None and not task.input_weights and torch.equal(task.weight, plain.task.weight)

    return next(name for name, own in weighted.items() if same(own.task))


def tokens_of(values: Float[Tensor, "B T"], batch: TokenBatch) -> Float[np.ndarray, " N"]:
    """The completion tokens' values, one after the other."""
    found: Float[np.ndarray, " N"] = values[batch.mask].double().cpu().numpy()
    return found
