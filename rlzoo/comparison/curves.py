"""Learning curves while a cell trains: what a point records, and when a curve is flat."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlzoo.config import EvaluationSettings
from rlzoo.training import Costs


def costs_at(costs: Costs) -> dict[str, Any]:
    """The costs that a point of a learning curve records: tokens, FLOPs, and seconds."""
    found: dict[str, Any] = {name: getattr(costs, name) for name in ("gradient_tokens", "sampled_tokens", "flops")}
    return {**found, "seconds": costs.wall_seconds}


def logged_at(point: Mapping[str, Any]) -> dict[str, float]:
    """What trackers receive of a point: avg@k on each benchmark, and on validation if it is measured."""
    results = {**point.get("metrics", {}), **({"validation": point["validation"]} if "validation" in point else {})}
    return {f"curve/{name}/avg_at_k": found["avg_at_k"] for name, found in results.items()}


def result_at(outcomes: Sequence[Mapping[str, Any]], samples: int) -> dict[str, Any]:
    """The result of an evaluation as a point records it: avg@k, and each problem's fraction of correct samples.

    ``outcomes`` are those of `Evaluation`, of which the first ``samples`` per problem count.
    """
    correct: dict[str, list[float]] = {}
    for row in outcomes:
        if row["decoding"] == "sample" and row["sample"] < samples:
            correct.setdefault(row["problem_id"], []).append(float(row["correct"]))
    by_problem = [sum(own) / len(own) for own in correct.values()]
    return {"avg_at_k": sum(map(sum, correct.values())) / sum(map(len, correct.values())), "by_problem": by_problem}


def brief(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point's step and results, without those of each problem."""

    def result(found: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in found.items() if name != "by_problem"}

    own = {"validation": result(point["validation"])} if point.get("validation") else {}
    return {
        "step": point["step"], **own, "metrics": {name: result(one) for name, one in point.get("metrics", {}).items()},
    }  # fmt: skip


def ends_the_curve(settings: EvaluationSettings) -> bool:
    """Whether an evaluation on the benchmarks includes the point of the learning curve at the same step.

    A point's samples are the first of those that an evaluation with the same seed draws. Curves that decide when to end
    also have a result on validation.
    """
    return settings.curve_samples <= settings.samples and settings.until_flat is None


def is_flat(curve: Sequence[Sequence[float]], patience: int) -> bool:
    """Whether each of the last ``patience`` points fails to exceed the best before it by more than its standard error.

    A point of ``curve`` is the result of each problem, in [0, 1]. It becomes the best if the mean of its differences d
    from the best so far exceeds s(d)/√n, the standard error of that mean over n problems.
    """
    best, since = np.asarray(curve[0]), 0
    for point in map(np.asarray, curve[1:]):
        gain = point - best
        error = gain.std(ddof=1) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
        best, since = (point, 0) if gain.mean() > error else (best, since + 1)
    return since >= patience
