"""The report of several comparisons, side by side: answers, settings that differ, results, and paired differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from rlzoo.comparison.outcomes import METRICS, ResultKey, ResultMatrix, difference_of, flipped, tested
from rlzoo.comparison.report import plots, tables
from rlzoo.comparison.report.answer import headline
from rlzoo.comparison.report.differences import checks_explained, run_difference_table
from rlzoo.comparison.report.schema import FinishedRun
from rlzoo.comparison.report.tables import on
from rlzoo.comparison.statistics import holm
from rlzoo.document import Block, Code, Entry, Figure, Heading, Paragraph, Table
from rlzoo.document.estimates import NONE

Runs = Mapping[str, FinishedRun]
"""The runs by the names under which they are shown."""
SHOWN_CHARACTERS = 160
"""Of the value of a setting."""
ABSENT = object()
UNSET: tuple[Any, ...] = (ABSENT, None, [], {})
"""Values that mean the same: a run of an older version may lack a setting that is not used."""
IGNORED = ("name", "description")
"""Settings that say nothing about how numbers came about."""


def contents_of_several(runs: Runs, command: str) -> Iterator[Block]:
    """The blocks of the report that a command writes, in order. Raises UserError for bad outcomes."""
    yield Heading(f"Side by side: {', '.join(runs)}", level=1)
    for name, run in runs.items():
        for benchmark in run.results.overall[:1]:
            yield Paragraph(f"{name}: {headline(run.results, run.matrices, benchmark)}", lead=True)
    first = next(iter(runs.values())).results.overall
    common = [name for name in first if all(name in run.results.overall for run in runs.values())]
    if common:
        yield _figure(runs, 0, common[0])
    yield from _settings(runs)
    yield from _results(runs, common)
    yield from _differences(runs, common)
    yield from _costs(runs)
    yield from _method(runs, command)


def _figure(runs: Runs, place: int, benchmark: str) -> Figure:
    return Figure(
        f"results-{place}",
        plots.results_of_runs({name: run.results for name, run in runs.items()}, benchmark),
        f"Results {on(benchmark)} of each algorithm in each run, as in the table below.",
        f"Results {on(benchmark)}: the mean of each metric over seeds and problems with its 95 % interval, one marker "
        "per run.",
        "Runs may differ in more than one setting: the next table has all of them.",
    )


def _settings(runs: Runs) -> Iterator[Block]:
    yield Heading("Differences in configuration")
    rows = list(differing([run.results.config for run in runs.values()]))
    versions = [{name: v for name, v in run.results.versions.items() if v} for run in runs.values()]
    rows += [(f"version of {path}", values) for path, values in differing(versions)]
    if not rows:
        yield Paragraph("The runs have the same settings and the same versions.")
        return
    yield Paragraph(
        "Only settings and versions that are not the same in all runs. What differs from the first run is bold; a dash "
        "is a setting that a run does not have."
    )
    body = [[Entry(path), *(Entry(_shown(value), value != values[0]) for value in values)] for path, values in rows]
    yield Table(["setting", *runs], body, words=list(runs))


def differing(configs: Sequence[Any], path: str = "") -> Iterator[tuple[str, list[Any]]]:
    """The settings that are not equal in all configurations: dotted name, and the value in each (or `ABSENT`)."""
    if all(isinstance(config, dict) for config in configs):
        for key in dict.fromkeys(key for config in configs for key in config):
            if path or key not in IGNORED:
                name = f"{path}.{key}" if path else str(key)
                yield from differing([config.get(key, ABSENT) for config in configs], name)
    elif any(config != configs[0] for config in configs) and any(config not in UNSET for config in configs):
        yield path or "everything", list(configs)


def _shown(value: Any) -> str:
    if value is ABSENT:
        return NONE
    if isinstance(value, str):
        text = value
    else:
        if isinstance(value, dict):
            value = {key: own for key, own in value.items() if own not in UNSET}
        text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
        text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"


def _results(runs: Runs, common: Sequence[str]) -> Iterator[Block]:
    yield Heading("Results")
    if not common:
        yield Paragraph("The runs have no benchmark in common.")
        return
    yield Paragraph(
        "Per cent correct, with 95 % intervals over further seeds and problems of the same kind. The best algorithm of "
        "each run is bold."
    )
    for index, benchmark in enumerate(common):
        yield Heading(benchmark, level=3)
        if (note := _problems_differ(runs, benchmark)) is not None:
            yield Paragraph(note)
        yield result_table(runs, benchmark)
        if index:
            yield _figure(runs, index, benchmark)
    alone = {name: [b for b in run.results.benchmarks if b not in common] for name, run in runs.items()}
    told = [f"{name}: {', '.join(own)}" for name, own in alone.items() if own]
    if told:
        yield Paragraph(f"Benchmarks that not all runs have are left out ({'; '.join(told)}).")


def _problems_differ(runs: Runs, benchmark: str) -> str | None:
    sets = {name: set(prompts(run.outcomes, benchmark).items()) for name, run in runs.items()}
    shared = set.intersection(*sets.values())
    if all(own == shared for own in sets.values()):
        return None
    sizes = ", ".join(f"{len(own)} in {name}" for name, own in sets.items())
    return f"The runs do not have the same problems here: {sizes}; {len(shared)} are common to all."


def result_table(runs: Runs, benchmark: str) -> Table:
    """The results of every algorithm in every run that has it, by algorithm, with the best of each run marked."""
    own = {name: tables.result_table(run.results, benchmark) for name, run in runs.items()}
    headers = [list(table.header) for table in own.values()]
    plain = {"avg_at_k": "avg@k (%)", "greedy": "greedy (%)", "pass_at_k": "pass@k (%)"}
    columns = [
        labels[0] if len(set(labels)) == 1 else plain[metric]
        for metric, labels in zip(METRICS, list(zip(*headers, strict=True))[1:], strict=False)
    ]
    return _interleaved(own, ["algorithm", *columns, "seeds"])


def _interleaved(own: Mapping[str, Table], header: Sequence[str]) -> Table:
    """The tables of all runs as one, sorted by their first column in order of appearance, with a column for the run."""
    rows = [
        [row[0], Entry(name), *row[1:]]
        for first in dict.fromkeys(row[0].text for table in own.values() for row in table.rows)
        for name, table in own.items()
        for row in table.rows
        if row[0].text == first
    ]
    return Table([header[0], "run", *header[1:]], rows, words=["run"])


def _differences(runs: Runs, common: Sequence[str]) -> Iterator[Block]:
    first, *others = runs
    found = {(name, on_): rows for name in others for on_ in common if (rows := paired(runs, first, name, on_))}
    if not found:
        return
    yield Heading("Paired differences")
    yield Paragraph(
        f"A run minus {first}, for the same algorithm, seeds and problems, in percentage points, with 95 % intervals. "
        "p-values are corrected for the number of rows in the table (Holm); those below 0.05 are bold. Problems count "
        "as the same if their names and prompts are, and results that are equal throughout are left out. The last "
        "column but one is the smallest difference that would be detected with 80 % power as a single planned one. A "
        "difference can come from any setting in the table above."
    )
    yield from map(Paragraph, checks_explained(max(row["seeds"] for rows in found.values() for row in rows))[:3])
    for (name, benchmark), rows in found.items():
        yield Heading(f"{name} minus {first}: {benchmark}", level=3)
        yield run_difference_table(rows, runs[name].results, benchmark)


def paired(runs: Runs, first: str, other: str, benchmark: str) -> list[dict[str, Any]]:
    """The paired differences of a run from the first, a row per algorithm and metric that both have.

    Rows have the keys algorithm and metric and those of `tested` and `flipped`; all p-values are corrected with `holm`.
    What is equal for every seed and problem, as the results of the same base model are, has no row.
    """
    one, two = (_comparable(runs, name, first, other) for name in (other, first))
    rows: list[dict[str, Any]] = []
    for (algorithm, on_, metric), matrix in one.items():
        reference = two.get((algorithm, on_, metric))
        difference = difference_of(matrix, reference) if on_ == benchmark and reference is not None else None
        if difference is not None and reference is not None and difference.values.any():
            row: dict[str, Any] = {"algorithm": algorithm, "metric": metric}
            rows.append(row | tested(difference) | flipped(matrix, reference))
    for key in ("p", "p_problems", "p_seeds"):
        for row, corrected in zip(rows, holm([row[key] for row in rows]), strict=True):
            row[key] = corrected
    return rows


def _comparable(runs: Runs, name: str, *pair: str) -> dict[ResultKey, ResultMatrix]:
    """The results of a run, without the problems that have another prompt in one of a pair of runs."""
    kept: dict[ResultKey, ResultMatrix] = {}
    differs: dict[str, set[str]] = {}
    for benchmark in runs[name].results.benchmarks:
        one, two = (prompts(runs[each].outcomes, benchmark) for each in pair)
        differs[benchmark] = {problem for problem, prompt in one.items() if two.get(problem, prompt) != prompt}
    for key, matrix in runs[name].matrices.items():
        wrong = differs.get(key[1]) or {f"{b}/{problem}" for b, own in differs.items() for problem in own}
        left = matrix.on([problem for problem in matrix.problems if problem not in wrong])
        if left.problems:
            kept[key] = left
    return kept


def prompts(outcomes: pa.Table, benchmark: str) -> dict[str, str]:
    """The prompt of each problem of a benchmark."""
    own = outcomes.filter(pc.field("benchmark") == benchmark)
    firsts = own.group_by("problem_id", use_threads=False).aggregate([("prompt", "min")]).to_pydict()
    return dict(zip(firsts["problem_id"], firsts["prompt_min"], strict=True))


def _costs(runs: Runs) -> Iterator[Block]:
    own = {name: tables.cost_table(run.results) for name, run in runs.items()}
    yield Heading("Costs")
    yield Paragraph("The cost of one cell: the mean over an algorithm's cells, and the maximum for peak memory.")
    yield _interleaved(own, next(iter(own.values())).header)


def _method(runs: Runs, command: str) -> Iterator[Block]:
    made = "; ".join(f"{name} was created {run.results.created}" for name, run in runs.items())
    yield Heading("How to reproduce this")
    yield Paragraph(f"{made}. A report of one run alone has its command, experiment and versions. This page:")
    yield Code(command, "sh")
