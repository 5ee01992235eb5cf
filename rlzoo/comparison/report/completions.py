"""The section of a report in which every algorithm answers the same problems, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rlzoo.comparison.report.schema import FinishedRun
from rlzoo.config import BASE
from rlzoo.document import Answer, Answers, Block, Heading, Paragraph

FIRST_PROBLEMS = 3
DISPUTED_PROBLEMS = 3
SHOWN_CHARACTERS = 700
Problem = tuple[str, str]
"""Benchmark and problem id."""


def samples(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """A few problems answered by every algorithm: some not chosen by content, and those that divide them most."""
    first = first_problems(run)
    disputed = [problem for problem in disputed_problems(run) if problem not in first][:DISPUTED_PROBLEMS]
    if not first:
        return
    yield Heading("The same problems, side by side")
    yield Paragraph(
        "Each answer is the first sample of the first seed. Next to it is how many of all samples for the problem, by "
        "all seeds, are right."
    )
    yield Heading("Not selected by content", level=3)
    yield Paragraph("The first problems in order of their names, taken from each benchmark in turn.")
    yield from (_answers(run, *problem) for problem in first)
    if disputed:
        yield Heading("Where the algorithms disagree most", level=3)
        yield Paragraph(
            "The problems on which the share of right samples varies most between algorithms (in variance, without the "
            "base model). They are selected for their results, and do not show how often algorithms differ."
        )
        yield from (_answers(run, *problem) for problem in disputed)


def first_problems(run: FinishedRun) -> list[Problem]:
    """The first problems by name, taken from each benchmark in turn."""
    pairs = _sampled(run).group_by(["benchmark", "problem_id"], use_threads=False).aggregate([])
    ranked: dict[str, list[str]] = {}
    for row in sorted(pairs.to_pylist(), key=lambda row: row["problem_id"]):
        ranked.setdefault(row["benchmark"], []).append(row["problem_id"])
    turns = [(place, b, p) for b in run.results.benchmarks for place, p in enumerate(ranked.get(b, []))]
    return [(b, p) for _, b, p in sorted(turns, key=lambda turn: turn[0])[:FIRST_PROBLEMS]]


def disputed_problems(run: FinishedRun) -> list[Problem]:
    """The problems whose share of right samples varies between algorithms, those with the largest variance first."""
    shares: dict[Problem, list[float]] = {}
    for (algorithm, benchmark, metric), matrix in run.matrices.items():
        if metric == "avg_at_k" and algorithm != BASE and benchmark in run.results.benchmarks:
            for problem, share in zip(matrix.problems, matrix.values.mean(0), strict=True):
                shares.setdefault((benchmark, problem), []).append(float(share))
    variances = {problem: float(np.var(own)) for problem, own in shares.items()}
    order = {name: place for place, name in enumerate(run.results.benchmarks)}
    ranked = sorted(variances, key=lambda at: (-round(variances[at], 9), order[at[0]], at[1]))
    return [problem for problem in ranked if variances[problem] > 0]


def _sampled(run: FinishedRun) -> pa.Table:
    return run.outcomes.filter(pc.field("decoding") == "sample")


def _answers(run: FinishedRun, benchmark: str, problem: str) -> Answers:
    """One sampled completion of the base model and of each algorithm, if there is one."""
    table = _sampled(run).filter((pc.field("benchmark") == benchmark) & (pc.field("problem_id") == problem))
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in table.sort_by([("seed", "ascending"), ("sample", "ascending")]).to_pylist():
        rows.setdefault(row["algorithm"], []).append(row)
    names = [name for name in dict.fromkeys((BASE, *run.results.algorithms)) if name in rows]
    prompt = next(iter(rows.values()))[0]["prompt"]
    return Answers(f"{benchmark}, {problem}", _shortened(prompt), [_answer(name, rows[name]) for name in names])


def _answer(algorithm: str, rows: list[Mapping[str, Any]]) -> Answer:
    first, right = rows[0], sum(row["correct"] for row in rows)
    note = f"{right} of {len(rows)} samples right" + (", truncated" if first["truncated"] else "")
    return Answer(algorithm, bool(first["correct"]), _shortened(first["text"]), note)


def _shortened(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"
