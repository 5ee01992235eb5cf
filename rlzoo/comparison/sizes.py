"""How many problems a set has, and how long they are: measured, or assumed for data that is not on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.problems import Problem, encode_problems, load_problems
from rlzoo.comparison.shared_buffer import demonstrations_of
from rlzoo.config import Benchmark, Experiment, ProblemSource, get_suite
from rlzoo.errors import UnreachableError
from rlzoo.policy import Policy

READ = 256
"""The number of problems whose lengths are averaged."""
PROMPT, SOLUTION = 150, 400
"""The assumed lengths, in tokens, of a prompt and a worked solution that cannot be read: about those of NuminaMath."""


@dataclass(frozen=True)
class Lengths:
    """Mean lengths in tokens."""

    prompt: float
    demonstration: float
    """The length of a worked solution; 0 if there are none."""
    sample: float
    """The length of a sampled completion."""
    assumed: str | None
    """What was assumed, in words; None if all of it was measured."""

    def flops(self, model: Policy, completion: float) -> float:
        """FLOPs of a forward pass on a prompt and a completion of ``completion`` tokens."""
        return model.flops(1, 0) * (self.prompt + completion) + model.flops(0, 1) * completion


def size_of(source: ProblemSource) -> int:
    """The number of problems of a set. If it is not on this machine: its ``limit``, or the number in its suite.

    Raises UserError as `load_problems` does, and UnreachableError if neither is known.
    """
    try:
        return len(load_problems(source))
    except UnreachableError:
        suite = source.suite if isinstance(source, Benchmark) else None
        known = [size for size in (source.limit, suite and get_suite(suite).problems) if size]
        if not known:
            raise
        return min(known)


def worked_in(source: ProblemSource) -> int:
    """The number of worked solutions of a set; one per problem if it is not on this machine."""
    try:
        return sum(len(problem.solutions) for problem in load_problems(source))
    except UnreachableError:
        return 0 if source.solution is None else size_of(source)


def lengths_of(experiment: Experiment, model: Policy, sample: float | None) -> Lengths:
    """The mean lengths of an experiment's training problems; ``sample``: of the samples, if it is known."""
    most, found = experiment.rollouts.max_new_tokens, _first(experiment.train, model)
    if found is None:
        prompt, shown = float(PROMPT), float(SOLUTION)
        shown = 0.0 if experiment.train.solution is None else min(shown, experiment.evaluation.max_new_tokens)
        why = "because the data or the model's tokenizer is not on this machine"
        told = f"{prompt:.0f} tokens per prompt and {shown:.0f} per solution, {why}"
    else:
        bad = BadRows(experiment.train.bad_rows)
        encoded = encode_problems(model.tokenizer, found, bad)
        rows = list(demonstrations_of(model, found, experiment.training, bad))
        prompt = statistics.fmean(len(one.ids) for one in encoded)
        shown, told = statistics.fmean(len(row.completion_ids) for row in rows) if rows else 0.0, ""
    if sample is None:
        sample = min(shown, most) if shown else most / 2
        rule = "samples have the mean length of demonstrations" if shown else "samples have half of max_new_tokens"
        told = "; ".join(filter(None, (told, rule)))
    return Lengths(prompt, shown, sample, told or None)


def _first(source: ProblemSource, model: Policy) -> Sequence[Problem] | None:
    """The first problems of a set; None if it, or the model's tokenizer, is not on this machine."""
    tokenizer: Any = model.tokenizer
    try:
        return None if tokenizer is None else load_problems(source)[:READ]
    except UnreachableError:
        return None
