"""Estimating the cost of a comparison before it runs: tokens, FLOPs and memory of each of its algorithms.

Costs are counted as in training: batches are assembled by the same code for each algorithm, on a model without weights
whose forward passes are counted instead of computed. This covers plug-ins and models of any size. The length of
samples, which is unknown beforehand, is assumed, measured on a few samples, or taken from a finished run.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlzoo.comparison.curves import ends_the_curve
from rlzoo.comparison.plan import cells, first_stages, sampling_seeds
from rlzoo.comparison.resolve import learns_from_samples, objective_of, views_of
from rlzoo.comparison.sizes import Lengths, lengths_of, size_of, worked_in
from rlzoo.config import WARM_UP, Experiment, Training
from rlzoo.inputs import Stage
from rlzoo.objective import Objective
from rlzoo.policy import Assembler, MicroBatches, Models, Policy
from rlzoo.policy.defaults import CPU_TOKENS, bytes_of_training, bytes_per_token
from rlzoo.policy.sequences import Tokens, length
from rlzoo.training import Costs, stored_inputs
from rlzoo.training.batches import shares
from rlzoo.training.schedule import check_budget
from rlzoo.types import Trajectory, Unit, selector_of


@dataclass(frozen=True)
class RowForecast:
    """The costs per cell of an algorithm, and its number of cells."""

    algorithm: str
    cells: int
    steps: int
    """The number of optimizer steps: that of the settings, or fewer if a budget is spent before."""
    gradient_tokens: float
    """Prompt and completion tokens in backward passes."""
    sampled_tokens: float
    """Completion tokens sampled for online training."""
    evaluated_tokens: float
    """Completion tokens sampled for evaluation, during training and at the end."""
    flops: float
    """FLOPs of matrix products in forward and backward passes."""
    bytes: float
    """Memory in bytes: weights, gradients, the optimizer's moments, other models, and activations of a micro-batch."""


@dataclass(frozen=True)
class Forecast:
    """The estimated costs of a comparison."""

    rows: tuple[RowForecast, ...]
    lengths: Lengths
    shared_sampled_tokens: float
    """Completion tokens sampled for the shared buffers."""
    shared_evaluated_tokens: float
    """Completion tokens sampled to evaluate the base model."""
    shared_flops: float
    """FLOPs of forward passes for the shared buffers: log-probs of samples, and stored inputs."""
    flops_per_token: float
    """FLOPs of the forward pass of one completion token."""
    parameters: int
    """The model's number of parameters."""
    warm_up: RowForecast | None = None
    """The costs of the warm-up, which is trained once."""
    repeated: tuple[RowForecast, ...] = ()
    """Stages that are in the costs of several cells although they are trained once; ``cells`` is negative."""

    @property
    def sampled_tokens(self) -> float:
        """All sampled completion tokens, for training and for evaluation."""
        rows = (*self.rows, *self.repeated)
        own = sum(row.cells * (row.sampled_tokens + row.evaluated_tokens) for row in rows)
        return own + self.shared_sampled_tokens + self.shared_evaluated_tokens

    @property
    def flops(self) -> float:
        """All FLOPs of forward and backward passes, without those of sampling."""
        once = 0.0 if self.warm_up is None else self.warm_up.flops
        own = sum(row.cells * row.flops for row in (*self.rows, *self.repeated))
        return own + self.shared_flops + once

    def seconds(self, flops_per_second: float, tokens_per_second: float) -> float:
        """The duration in seconds: FLOPs / ``flops_per_second`` + sampled tokens / ``tokens_per_second``."""
        return self.flops / flops_per_second + self.sampled_tokens / tokens_per_second

    def as_dict(self) -> dict[str, Any]:
        """The costs as plain data."""
        return asdict(self)


def forecast(experiment: Experiment, model: Policy, sample_tokens: float | None = None) -> Forecast:
    """The costs of an experiment for a ``model``, which needs no weights (`rlzoo.policy.loading.load_shape`).

    ``sample_tokens`` is the mean length of a sample; None: the mean length of demonstrations or, without any, half of
    ``max_new_tokens``. Sizes and lengths of data that is not on this machine are assumed (`rlzoo.comparison.sizes`).
    Raises UserError for problems that cannot be loaded, or whose number is not known.
    """
    size, worked = size_of(experiment.train), worked_in(experiment.train)
    lengths = lengths_of(experiment, model, sample_tokens)
    offline = [name for name, row in experiment.single_rows.items() if row.mode == "offline"]
    sampled = any(learns_from_samples(views_of(experiment, name)) for name in offline)
    prompts = min(size, experiment.rollouts.prompts or size) if sampled else 0
    samples = prompts * experiment.rollouts.samples * len(sampling_seeds(experiment))
    tests = _tests(experiment, lengths)
    shared_flops = samples * lengths.flops(model, lengths.sample)
    stored = stored_inputs(objective_of(experiment, name) for name in offline)
    demonstrated = worked * lengths.flops(model, lengths.demonstration)
    shared_flops += len(stored) * (shared_flops + demonstrated * len(sampling_seeds(experiment)))
    count = dict.fromkeys(experiment.algorithms, 0)
    for cell in cells(experiment):
        count[cell.algorithm] += 1
    buffer = _Shared(prompts * experiment.rollouts.samples, worked, size)
    if sampled and any(experiment.training_of(name).epochs is not None for name in offline):
        told = "every sample of the base is learned from in an epoch, correct or not"
        lengths = replace(lengths, assumed="; ".join(filter(None, (lengths.assumed, told))))
    rows = tuple(_rows(experiment, name, model, lengths, count[name], tests, buffer) for name in experiment.algorithms)
    first = tests.along / max(experiment.evaluation.curve_points, 1)
    return Forecast(
        rows,
        lengths,
        samples * lengths.sample,
        tests.whole + first - tests.known + tests.text * lengths.sample,
        shared_flops + tests.text * lengths.flops(model, lengths.sample),
        model.flops(1, 1, modules=False),
        sum(p.numel() for p in model.model.parameters()),
        _warm_up(experiment, model),
        _repeated(experiment, model, lengths, tests, buffer),
    )


def _warm_up(experiment: Experiment, model: Policy) -> RowForecast | None:
    if (alone := experiment.of_warm_up) is None:
        return None
    lengths = lengths_of(alone, model, None)
    shared = _Shared(0, worked_in(alone.train), size_of(alone.train))
    row = _row(alone, WARM_UP, model, lengths, 1, _Tests(0.0, 0.0, 0.0, 0.0), shared)
    stored = shared.costs(alone, WARM_UP, model, lengths).flops
    return replace(row, algorithm="warm-up", flops=row.flops + stored)


class _Tests(NamedTuple):
    """The evaluations of a policy."""

    whole: float
    """Completion tokens of one full evaluation, on benchmarks and retention sets."""
    along: float
    """Completion tokens of all evaluations during training."""
    known: float
    """Those that a full evaluation at the same step includes."""
    text: float
    """The number of the base's completions that are scored for retention."""

    @property
    def before_another(self) -> _Tests:
        """Those of a stage that another one follows."""
        return _Tests(0.0, self.along, 0.0, 0.0)


def _tests(experiment: Experiment, lengths: Lengths) -> _Tests:
    settings = experiment.evaluation
    sizes = [size_of(one) for one in experiment.benchmarks.values()]
    kept = {name: size_of(one) for name, one in experiment.retention.items()}
    scored = sum(sizes) + sum(size for name, size in kept.items() if experiment.retention[name].is_scored)
    whole = scored * (settings.samples + 1)
    if settings.until_flat is not None and experiment.validation is not None:
        sizes.append(size_of(experiment.validation))
    point = sum(min(size, settings.curve_problems) for size in sizes) * settings.curve_samples * lengths.sample
    known = point if settings.curve_points and ends_the_curve(settings) else 0.0
    text = sum(kept.values()) * settings.samples
    return _Tests(whole * lengths.sample, settings.curve_points * point, known, text)


@dataclass(frozen=True)
class _Shared:
    """The size of a shared buffer."""

    samples: int
    demonstrations: int
    problems: int
    """The number of training problems, from which online training samples."""

    def costs(self, experiment: Experiment, name: str, model: Policy, lengths: Lengths) -> Costs:
        """What a cell is charged for its part in the buffer, as `shared_buffer.costs_before` does."""
        costs = Costs()
        if experiment.algorithms[name].mode == "online":
            return costs
        sampled = self.samples * lengths.flops(model, lengths.sample)
        if learns_from_samples(views_of(experiment, name)):
            costs.sampled_tokens = round(self.samples * lengths.sample)
            costs.flops = 2 * sampled
        costs.flops += self.scored(experiment, name, model, lengths)
        return costs

    def batches(self, experiment: Experiment, name: str) -> float:
        """The number of batches in an epoch of a cell, if it learns from all samples."""
        views, per_prompt = views_of(experiment, name), experiment.rollouts.samples
        online, found = experiment.algorithms[name].mode == "online", [1.0]
        for (which, _), size in zip(views, shares(experiment.training_of(name).batch_size, len(views)), strict=True):
            if not selector_of(which).is_sampled:
                found.append(self.demonstrations / size)
            else:
                found.append(self.problems / max(1, size // per_prompt) if online else self.samples / size)
        return max(found)

    def scored(self, experiment: Experiment, name: str, model: Policy, lengths: Lengths) -> float:
        """FLOPs of the stored inputs of a row."""
        sampled = self.samples * lengths.flops(model, lengths.sample)
        shown = self.demonstrations * lengths.flops(model, lengths.demonstration)
        return len(stored_inputs([objective_of(experiment, name)])) * (sampled + shown)


def _steps(training: Training, batch: Costs, before: Costs, where: str) -> int:
    """The number of optimizer steps: the most that are allowed, or about as many as spend the budget.

    ``batch`` is the cost of a batch with all of its steps. Raises UserError if the budget is spent ``before``.
    """
    if (budget := training.budget) is None:
        return training.steps
    start = float(getattr(before, budget.cost))
    check_budget(budget, start, where)
    batches = (budget.amount - start) / float(getattr(batch, budget.cost))
    return min(training.steps, math.ceil(batches * training.steps_per_batch))


def _rows(
    experiment: Experiment, name: str, model: Policy, lengths: Lengths, count: int, tests: _Tests, shared: _Shared
) -> RowForecast:
    """The costs of an algorithm of one stage or several, which are added up."""
    names, rates = experiment.stages_of(name), len(experiment.learning_rates_of(name))
    found = _stage(experiment, names, model, lengths, count, tests, shared, rates)
    for number in range(1, len(names)):
        row = _stage(experiment, names[:number], model, lengths, count, tests.before_another, shared)
        sums = {
            each: getattr(found, each) + getattr(row, each)
            for each in ("steps", "gradient_tokens", "sampled_tokens", "evaluated_tokens", "flops")
        }
        found = replace(found, **sums, bytes=max(found.bytes, row.bytes))
    return replace(found, algorithm=name)


def _repeated(
    experiment: Experiment, model: Policy, lengths: Lengths, tests: _Tests, shared: _Shared
) -> tuple[RowForecast, ...]:
    """Each stage that several cells continue from or report, minus as often as it is too often in their costs."""
    often, grid, tests = Counter[tuple[str, ...]](), cells(experiment), tests.before_another
    for one in first_stages(experiment):
        often[one.names] += 1 - sum(one.is_of(experiment, cell) for cell in grid)
    return tuple(_stage(experiment, names, model, lengths, n, tests, shared) for names, n in often.items())


def _stage(
    experiment: Experiment,
    names: Sequence[str],
    model: Policy,
    lengths: Lengths,
    count: int,
    tests: _Tests,
    shared: _Shared,
    rates: int = 1,
) -> RowForecast:
    """`_row` for the last of some stages; the stored inputs of a later one are not those of the shared buffer."""
    found = _row(experiment, names[-1], model, lengths, count, tests, shared, rates)
    if len(names) == 1 or experiment.algorithms[names[-1]].mode != "offline":
        return found
    return replace(found, flops=found.flops + shared.scored(experiment, names[-1], model, lengths))


def _row(
    experiment: Experiment,
    name: str,
    model: Policy,
    lengths: Lengths,
    count: int,
    tests: _Tests,
    shared: _Shared,
    rates: int = 1,
) -> RowForecast:
    """The costs of one stage; ``rates`` is the number of learning rates that are tried."""
    settings, objective = experiment.training_of(name), objective_of(experiment, name)
    settings = settings.in_steps(shared.batches(experiment, name))
    online = experiment.algorithms[name].mode == "online"
    policy = _Counted.of(model, settings, objective)
    micro = _CountedPasses()
    tokens = sampled = sampling = 0.0
    views = views_of(experiment, name)
    split = shares(settings.batch_size, len(views))
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    backward = 2 + trained / sum(p.numel() for p in policy.parameters())
    for component, (which, _), size in zip(objective.components, views, split, strict=True):
        selector, own = selector_of(which), component.objective
        completion = lengths.sample if selector.is_sampled else lengths.demonstration
        rows, units = _example(
            selector.unit, size, experiment.rollouts.samples, lengths.prompt, completion, own, online
        )
        tokens += sum(map(length, rows))
        if online and selector.is_sampled:
            sampled += sum(len(row.completion_ids) for row in rows)
            sampling += _passed(policy, rows)
            micro.flops += _passed(policy, rows)  # the behaviour log-probs
        assembler = Assembler(policy, _models(policy, own), micro)
        batch = assembler.assemble(rows, units, own)
        for _ in range(settings.mini_batches == 1, settings.updates_per_batch):  # mini-batches are all renewed
            assembler.renew(batch, rows, units, own)
        references = sum(one.gives_logits for one in own.requires)
        micro.flops += settings.updates_per_batch * (backward + references) * _passed(policy, rows)
    one_batch = Costs(round(settings.updates_per_batch * tokens), round(sampled), micro.flops + sampling)
    before = shared.costs(experiment, name, model, lengths)
    steps = _steps(settings, one_batch, before, name)
    batches = -(-steps // settings.steps_per_batch)
    whole, along, known, text = tests
    along -= known if rates == 1 else 0.0
    if rates > 1 and experiment.validation is not None:
        validated = size_of(experiment.validation) * experiment.evaluation.samples * lengths.sample
        chosen = 1 / rates  # the fraction of cells that are evaluated on benchmarks
        whole, text = chosen * whole + validated, chosen * text
    return RowForecast(
        name,
        count,
        steps,
        steps * tokens / settings.mini_batches,
        batches * sampled,
        whole + along,
        batches * micro.flops + text * lengths.flops(model, lengths.sample),
        _bytes(policy, settings, objective),
    )


def _bytes(policy: Policy, settings: Training, objective: Objective) -> float:
    """The memory of a training process, in bytes."""
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    frozen = {name for c in objective.components for one in c.objective.requires for name in one.models()}
    moving = sum(one.moving_model(policy) is not None for c in objective.components for one in c.objective.requires)
    copies = 0 if settings.lora is not None else len(frozen)
    kept = settings.token_budget if isinstance(settings.token_budget, int) else CPU_TOKENS
    return weights * (1 + copies + moving) + bytes_of_training(policy) + kept * bytes_per_token(policy)


class _Counted(Policy):
    """A policy without weights that accepts batches on the CPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @classmethod
    def of(cls, model: Policy, settings: Training, objective: Objective) -> _Counted:
        """A copy of the model with the adapters and modules that training with ``objective`` adds."""
        made = cls(copy.deepcopy(model.model), model.tokenizer, model.name, model.compute)
        if settings.lora is not None:
            made.add_lora(**settings.lora.model_dump(exclude={"load_in_4bit"}))
        made.attach(objective.requires)
        return made


class _CountedPasses(MicroBatches):
    """Counts the FLOPs of forward passes, and returns zeros."""

    def __init__(self) -> None:
        super().__init__(CPU_TOKENS)
        self.flops = 0.0

    def log_probs(self, policy: Policy, rows: Sequence[Tokens], statistics: Any = (), **_: Any) -> dict[str, Tensor]:  # type: ignore[override]
        self.flops += _passed(policy, rows)
        shape = len(rows), max((len(row.completion_ids) for row in rows), default=0)
        return {key: torch.zeros(shape) for key in ("logp", *(one.key for one in statistics), *policy.attached)}


def _passed(policy: Policy, rows: Sequence[Tokens]) -> float:
    return policy.flops(sum(map(length, rows)), sum(len(row.completion_ids) for row in rows))


def _models(policy: Policy, objective: Objective) -> Models:
    """All other models, assumed to be as large as the policy."""
    names = {name for one in objective.requires for name in one.models()}
    other = Policy(policy.model, policy.tokenizer, policy.name, policy.compute)
    return Models(policy, dict.fromkeys(names, other), dict.fromkeys(objective.requires, other))


def _example(
    unit: Unit, size: int, group: int, prompt: float, completion: float, objective: Objective, online: bool
) -> tuple[list[Trajectory], list[tuple[int, ...]]]:
    """A batch with rows of mean length. Fresh samples (``online``) lack the stored inputs that can be computed."""
    zeros = [0.0] * max(1, round(completion))
    stored = [one for one in objective.requires if one.stage is Stage.STORED]
    known = {one.column: zeros for one in stored if not (online and one.is_computed)}
    row = Trajectory("", "", [0] * max(1, round(prompt)), [0] * len(zeros), "", reward=0.0, inputs=known)
    row = replace(row, behaviour_logp=zeros, reference_logp=known.pop("reference_logp", None))
    of_unit = {Unit.PAIR: 2, Unit.GROUP: group}.get(unit, 1)
    units = [tuple(range(first, first + of_unit)) for first in range(0, max(size - of_unit + 1, 1), of_unit)]
    rows = [replace(row, prompt_id=str(number)) for number, some in enumerate(units) for _ in some]
    return rows, units
