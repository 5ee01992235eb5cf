"""Metrics as a table: each is a name, a label, and a function from one problem's samples to a number."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from rlzoo.errors import UserError, unknown
from rlzoo.registry import Registry, one_line

if TYPE_CHECKING:
    from rlzoo.buffers.problems import Problem
    from rlzoo.config import EvaluationSettings


@dataclass(frozen=True)
class ProblemSamples:
    """The samples of one problem, for a metric. Each is a row of outcomes.parquet: text, reward, correct, length, …"""

    problem: Problem
    """The problem, with the columns of its data."""
    samples: Sequence[Mapping[str, Any]]
    """The completions sampled at the evaluation's temperature."""
    greedy: Mapping[str, Any] | None = None
    """The greedy completion; None without greedy decoding."""
    gold_logp: Sequence[Sequence[float]] = ()
    """The policy's log-probs of the tokens of each gold completion, in nats."""


@dataclass(frozen=True)
class Total:
    """A sum and its count, for an average in which problems with more samples or tokens have more weight."""

    total: float
    """The sum over the problem's samples or tokens."""
    count: float
    """Their number."""


NEEDS = ("gold_logp", "answer")
"""What a metric may list in `Metric.needs`."""
Found = float | Total | None
"""What a metric finds for one problem: a value to average over problems, a `Total`, or None for no value."""


@dataclass(frozen=True)
class Metric:
    """A row of the table of metrics. A metric without a value for any problem is left out of the results.

    Raises UserError for an unknown need.
    """

    name: str
    """The key in results.json."""
    of: Callable[[ProblemSamples], Found]
    """The value for one problem."""
    label: str = ""
    """The name in reports; by default ``name``."""
    unit: str = "%"
    """``%``: a fraction, shown as a percentage; anything else: the unit of a plain number."""
    needs: tuple[str, ...] = ()
    """What is computed only on request: ``gold_logp``, and the ``answer`` that the reward extracts from a sample."""

    def __post_init__(self) -> None:
        if wrong := [need for need in self.needs if need not in NEEDS]:
            raise unknown(f"need of metric {self.name!r}", wrong[0], NEEDS)
        object.__setattr__(self, "label", self.label or self.name.replace("_", " "))
        for name in ("__module__", "__qualname__", "__doc__"):  # errors distinguish two metrics of one name by these
            object.__setattr__(self, name, getattr(self.of, name, None))

    def average(self, problems: Sequence[ProblemSamples]) -> float | None:
        """Σ totals / Σ counts over the problems that have a value; None if none has.

        Raises UserError naming the problem if the metric raises, or returns anything but a finite number or None.
        """
        found = [value for value in map(self._value, problems) if value is not None]
        count = np.sum([value.count for value in found])
        return float(np.sum([value.total for value in found]) / count) if count else None

    def shown(self, value: float) -> str:
        """A value with its unit."""
        return f"{value:.1%}" if self.unit == "%" else f"{value:.4g} {self.unit}".rstrip()

    def _value(self, problem: ProblemSamples) -> Total | None:
        where = f"metric {self.name!r} on {problem.problem.label}"
        try:
            value = self.of(problem)
        except Exception as error:
            raise UserError(f"{where}: {one_line(error)}") from error
        if value is None:
            return None
        value = value.item() if hasattr(value, "item") else value  # an element of an array or a tensor
        total, count = (value.total, value.count) if isinstance(value, Total) else (value, 1)
        if not all(isinstance(each, numbers.Real) and math.isfinite(each) for each in (total, count)):
            raise UserError(f"{where}: it returned {value!r:.60}: return a finite number, a Total, or None")
        return Total(float(total), float(count))


_metrics: Registry[Metric] = Registry("metric", "rlzoo.evaluation", "rlzoo.metrics")


def register_metric(metric: Metric) -> Metric:
    """Register a metric under its name, for ``evaluation.metrics``. Raises UserError if the name is taken."""
    return _metrics.add(metric.name, metric)


def list_metrics() -> list[str]:
    """The names of all registered metrics: built-ins and those of installed packages' entry points."""
    return sorted(metric.name if isinstance(metric, Metric) else name for name, metric in _metrics.items())


def get_metric(spec: Any) -> Metric:
    """The metric of a name, ``package.module:Name`` or ``path/to/file.py:Name``; a `Metric` is returned unchanged.

    A function becomes a metric under its own name. Raises UserError for an unknown name and for anything else.
    """
    found = _metrics.get(spec) if isinstance(spec, str) else spec
    if isinstance(found, Metric):
        return found
    if not callable(found) or isinstance(found, type):
        wanted = "give a Metric, or a function from ProblemSamples to a number"
        raise UserError(f"metric {spec!r:.200} is {type(found).__name__}: {wanted}")
    return Metric(getattr(found, "__name__", type(found).__name__), found)


def get_metrics(spec: Any) -> list[Metric]:
    """As `get_metric`, of a name or an object that may also be a list of metrics."""
    found = _metrics.get(spec) if isinstance(spec, str) else spec
    return [get_metric(one) for one in found] if isinstance(found, (list, tuple)) else [get_metric(spec)]


# The built-in metrics


def pass_at_k(correct: Int[np.ndarray, "*n"], n: Int[np.ndarray, "*n"], k: int) -> Float[np.ndarray, "*n"]:
    """The unbiased estimate 1 - C(n-c, k) / C(n, k) of pass@k, the probability that any of k samples is correct.

    ``correct`` c and ``n`` are counts per problem; the result has their shape. Computed as 1 - Π_{j<k} (n-c-j)/(n-j),
    which neither overflows nor cancels. Raises UserError for k < 1 or k > n, ValueError unless 0 ≤ c ≤ n.
    Source: arXiv 2107.03374.
    """
    correct, n = np.asarray(correct), np.asarray(n)
    if np.any(correct < 0) or np.any(correct > n):
        raise ValueError("pass_at_k needs 0 ≤ correct ≤ n")
    if k < 1 or (n.size and k > n.min()):
        fewest = int(n.min()) if n.size else 0
        raise UserError(f"pass@{k} needs 1 ≤ k ≤ samples per problem, which is {fewest}: change k or take more samples")
    drawn = np.arange(k)
    failures = np.maximum((n - correct)[..., None] - drawn, 0)
    missed: Float[np.ndarray, "*n"] = 1.0 - np.prod(failures / (n[..., None] - drawn), axis=-1)
    return missed


def _total(values: Sequence[float]) -> Total:
    return Total(sum(values), len(values))


def _hits(problem: ProblemSamples) -> int:
    return sum(sample["correct"] for sample in problem.samples)


def _average(problem: ProblemSamples) -> Total:
    """The fraction of correct samples, the expected accuracy of one sample."""
    return Total(_hits(problem), len(problem.samples))


def _greedy(problem: ProblemSamples) -> float | None:
    """Whether the greedy completion is correct."""
    return None if problem.greedy is None else float(problem.greedy["correct"])


def _majority(samples: Sequence[Mapping[str, Any]]) -> float:
    """Whether the most frequent answer is correct; the mean over several if they tie.

    A sample's answer is what the reward's ``answer_of`` returns, or else its text up to case and spaces. A sample
    without an answer does not vote; without any votes the value is 0. Source: arXiv 2203.11171.
    """
    votes: dict[str, list[bool]] = {}
    for sample in samples:
        answer = sample.get("answer")
        answer = " ".join(sample["text"].split()).casefold() if answer is None else answer
        if answer:
            votes.setdefault(answer, []).append(sample["correct"])
    most = max(map(len, votes.values()), default=0)
    winners = [sum(voters) / most for voters in votes.values() if len(voters) == most]
    return sum(winners) / len(winners) if winners else 0.0


def _length(problem: ProblemSamples) -> Total:
    """The mean number of tokens in a completion."""
    return _total([sample["length"] for sample in problem.samples])


def _truncation(problem: ProblemSamples) -> Total:
    """The fraction of samples that were cut at ``max_new_tokens``."""
    return _total([sample["truncated"] for sample in problem.samples])


def _log_likelihood(problem: ProblemSamples) -> Total | None:
    """log π_θ(y | x) of the gold completions at temperature 1, end of sequence included, in nats per token."""
    tokens = [logp for completion in problem.gold_logp for logp in completion]
    return _total(tokens) if tokens else None


AVERAGE = register_metric(Metric("avg_at_k", _average, "avg@k"))
GREEDY = register_metric(Metric("greedy", _greedy, "greedy"))
MAJORITY = register_metric(Metric("maj_at_k", lambda problem: _majority(problem.samples), "maj@k", needs=("answer",)))
LENGTH = register_metric(Metric("mean_length", _length, "mean length", "tokens"))
TRUNCATION = register_metric(Metric("truncated", _truncation, "truncated"))
LOG_LIKELIHOOD = register_metric(
    Metric("log_likelihood", _log_likelihood, "held-out log-likelihood", "nats per token", needs=("gold_logp",))
)


def pass_metric(k: int, name: str | None = None) -> Metric:
    """pass@k, as `pass_at_k` estimates it; by default named ``pass_at_8`` for k = 8."""

    def estimate(problem: ProblemSamples) -> float:
        return float(pass_at_k(np.array(_hits(problem)), np.array(len(problem.samples)), k))

    return Metric(name or f"pass_at_{k}", estimate, f"pass@{k}")


def majority_metric(k: int) -> Metric:
    """maj@k, named ``maj_at_8`` for k = 8: the mean of the majority vote over consecutive groups of k samples."""

    def estimate(problem: ProblemSamples) -> float:
        groups = range(len(problem.samples) // k)
        return float(np.mean([_majority(problem.samples[k * group : k * (group + 1)]) for group in groups]))

    return Metric(f"maj_at_{k}", estimate, f"maj@{k}", needs=("answer",))


def component_metric(name: str) -> Metric:
    """The mean of one component of the reward, over the samples that have it."""

    def component(problem: ProblemSamples) -> Total:
        values = [json.loads(sample["components"]).get(name) for sample in problem.samples if sample.get("components")]
        return _total([value for value in values if value is not None])

    return Metric(f"component/{name}", component, name, "mean reward")


RESERVED = ("k", "samples")
"""Keys of the results that are not metrics."""


def metric_table(settings: EvaluationSettings, components: Sequence[str] = ()) -> list[Metric]:
    """The table of an evaluation: the built-in metrics, those of each k, one per component, and ``settings.metrics``.

    ``components`` are the names of the reward's components; a single one is the reward itself, and has no metric of its
    own. Raises UserError as `get_metrics` does, and for two metrics with one name.
    """
    first, *others = settings.pass_ks
    table = [
        replace(AVERAGE, label=f"avg@{settings.samples}"),
        GREEDY,
        pass_metric(first, "pass_at_k"),
        *map(pass_metric, others),
        replace(MAJORITY, label=f"maj@{settings.samples}"),
        *(majority_metric(k) for k in settings.pass_ks if k < settings.samples),
        LENGTH,
        TRUNCATION,
        LOG_LIKELIHOOD,
        *(component_metric(name) for name in components if len(components) > 1),
    ]
    there = {metric.name: metric for metric in table}
    for metric in (metric for spec in settings.metrics for metric in get_metrics(spec)):
        same = there.get(metric.name)
        if same is not None and same.of is metric.of:
            continue
        if same is not None or metric.name in RESERVED or metric.name.startswith("reward/"):
            raise UserError(f"evaluation.metrics: the results already have a {metric.name!r}: give it another name")
        there[metric.name] = metric
    return list(there.values())


def mean_over_benchmarks(cells: Sequence[Mapping[str, Mapping[str, float | None]]]) -> dict[str, float]:
    """The mean of each metric over seeds and benchmarks, with equal weight for each benchmark.

    ``cells`` are those of one algorithm: benchmark → metric → value. A metric that any benchmark lacks is left out.
    """
    found: dict[str, list[float]] = {}
    rows = [benchmark for cell in cells for benchmark in cell.values()]
    for row in rows:
        for name, value in row.items():
            if name not in RESERVED and value is not None:
                found.setdefault(name, []).append(value)
    return {name: sum(values) / len(rows) for name, values in found.items() if len(values) == len(rows)}
