"""The section of a report that shows completions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow.compute as pc

from rlzoo.comparison.report.schema import FinishedRun
from rlzoo.config import BASE
from rlzoo.document import Block, Code, Heading, Paragraph

SHOWN_PROBLEMS = 3
SHOWN_CHARACTERS = 700


def samples(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """Completions of a few problems by every algorithm."""
    shown = [(problem, rows) for problem in _problems(run) if (rows := _completions(run, *problem))]
    if not shown:
        return
    yield Heading("Sample completions")
    yield Paragraph(
        "Not selected by content: the first problems in order of their names, and the first sample of the first seed."
    )
    for (benchmark, problem), rows in shown:
        yield Heading(f"{benchmark}: {problem}", level=3)
        yield Code(_shortened(rows[0]["prompt"]))
        for row in rows:
            verdict = ("correct" if row["correct"] else "wrong") + (", truncated" if row["truncated"] else "")
            yield Paragraph(f"{row['algorithm']} ({verdict})")
            yield Code(_shortened(row["text"]))


def _shortened(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"


def _problems(run: FinishedRun) -> list[tuple[str, str]]:
    """The first problems by name, taken from each benchmark in turn."""
    pairs = run.outcomes.select(["benchmark", "problem_id"]).group_by(["benchmark", "problem_id"]).aggregate([])
    ranked: dict[str, list[str]] = {}
    for row in sorted(pairs.to_pylist(), key=lambda row: row["problem_id"]):
        ranked.setdefault(row["benchmark"], []).append(row["problem_id"])
    turns = [(place, b, p) for b in run.results.benchmarks for place, p in enumerate(ranked.get(b, []))]
    return [(b, p) for _, b, p in sorted(turns, key=lambda turn: turn[0])[:SHOWN_PROBLEMS]]


def _completions(run: FinishedRun, benchmark: str, problem: str) -> list[dict[str, Any]]:
    """One sampled completion of the base model and of each algorithm, if there is one."""
    table = run.outcomes.filter(
        (pc.field("benchmark") == benchmark) & (pc.field("problem_id") == problem) & (pc.field("decoding") == "sample")
    )
    first: dict[str, dict[str, Any]] = {}
    for row in table.sort_by([("seed", "ascending"), ("sample", "ascending")]).to_pylist():
        first.setdefault(row["algorithm"], row)
    return [first[name] for name in dict.fromkeys((BASE, *run.results.algorithms)) if name in first]
