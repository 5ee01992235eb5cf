"""The tables of paired differences: results of tests, what they could have detected, and their robustness."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import rich.table
from rich.text import Text

from rlzoo.comparison.outcomes import METRICS, check_robustness, compare_to
from rlzoo.comparison.report.schema import FinishedRun, Results
from rlzoo.comparison.report.tables import listed, p_number, points, significance, size
from rlzoo.comparison.robust import FEWEST_FOR_BOOTSTRAP, FEWEST_FOR_IMPROVEMENT
from rlzoo.comparison.statistics import SIGNIFICANT
from rlzoo.document import Entry, Table
from rlzoo.document.estimates import NONE
from rlzoo.document.terminal import plain_table


def difference_table(rows: Sequence[Mapping[str, Any]], results: Results, benchmark: str) -> Table:
    """Paired differences in percentage points, each with its own interval and its corrected p-value.

    Those that are distinguishable from zero after the correction are marked.
    """
    cells: dict[str, dict[str, Entry]] = {}
    for row in rows:
        if row["benchmark"] == benchmark:
            text = f"{_difference(row)}, {significance(row['p'])}"
            cells.setdefault(row["algorithm"], {})[row["metric"]] = Entry(text, row["p"] < SIGNIFICANT)
    body = [[Entry(name), *(found.get(metric, Entry(NONE)) for metric in METRICS)] for name, found in cells.items()]
    return Table(["algorithm", *(f"{results.label(metric, benchmark)} (points)" for metric in METRICS)], body)


def detectable(rows: Sequence[Mapping[str, Any]], results: Results, benchmark: str) -> str:
    """Which differences these seeds and problems detect, in a sentence: the medians over a table of differences."""
    here = [row for row in rows if row["benchmark"] == benchmark]
    sizes: dict[str, dict[str, float]] = {"detectable": {}, "detectable_alone": {}}
    for key, found in sizes.items():
        for metric in METRICS:
            if known := [row[key] for row in here if row["metric"] == metric]:
                found[metric] = statistics.median(known)
    seeds, problems = (max(row[key] for row in here) for key in ("seeds", "problems"))
    design = f"With {seeds} seed{'s' * (seeds > 1)} and {problems} problems"
    if not any(sizes["detectable"].values()):
        return f"{design}, no two results differ, which says nothing about the differences that would be detected."
    of = [
        f"{size(value)} points in {results.label(metric, benchmark)}" for metric, value in sizes["detectable"].items()
    ]
    alone = listed([size(value) for value in sizes["detectable_alone"].values()])
    return (
        f"{design}, a difference of {listed(of)} would be detected with 80 % power after the correction, and one of "
        f"{alone} as a single planned difference (medians over the rows)."
        + (" One seed shows nothing about further seeds." if seeds == 1 else "")
    )


def robustness_table(rows: Sequence[Mapping[str, Any]], results: Results, benchmark: str, baseline: str) -> Table:
    """The checks of `check_robustness`, a row per algorithm and metric; corrected p-values below 0.05 are marked."""
    body = []
    for row in rows:
        if row["benchmark"] == benchmark:
            name = f"{row['algorithm']} (baseline)" if row["algorithm"] == baseline else row["algorithm"]
            iqm = _with_ends(row["iqm"], row["iqm_low"], row["iqm_high"])
            body.append([Entry(name), Entry(results.label(row["metric"], benchmark)), *_checks(row), Entry(iqm)])
    header = ["algorithm", "metric", *CHECKS, "IQM (%)"]
    return Table(header, body, words=["metric"])


LABELS = {"avg_at_k": "avg@k", "pass_at_k": "pass@k"}
"""Metrics whose k may differ between studies."""
CHECKS = ("p, problems", "p, seeds", "P(better) (%)")


def checks_explained(seeds: int) -> list[str]:
    """What each column of `robustness_table` says, and what not, for a comparison with so many seeds."""
    least = f"with {seeds} seeds, p is at least {p_number(2 / 2**seeds)} even before correction" if seeds > 1 else ""
    return [
        "p, problems: a permutation test that swaps the two algorithms within problems, all seeds at once. It tests "
        "whether these very models differ on further problems of the same kind, and says nothing about further seeds.",
        "p, seeds: a permutation test that swaps the two algorithms within seeds, all problems at once. It tests "
        f"whether models trained with further seeds differ on these problems{': ' if least else ''}{least}. Both "
        "p-values are corrected for the number of rows (Holm); those below 0.05 are bold.",
        "P(better): the probability that one run has a better result than one of the baseline, with its 95 % interval "
        f"over further seeds (from {FEWEST_FOR_IMPROVEMENT} seeds). It does not say how much better.",
        "IQM: the interquartile mean of the seeds' results, over all benchmarks in the mean over them. One run that "
        "collapsed hardly moves it. Its bootstrap interval over further seeds is shown from "
        f"{FEWEST_FOR_BOOTSTRAP} seeds, since with 3 it would cover the true value in 75 % of cases, with 5 in 90 %.",
    ]


def _checks(row: Mapping[str, Any]) -> list[Entry]:
    if "better" not in row:
        return [Entry(NONE)] * len(CHECKS)
    p_values = [Entry(p_number(row[key]), row[key] < SIGNIFICANT) for key in ("p_problems", "p_seeds")]
    return [*p_values, Entry(_with_ends(row["better"], row["better_low"], row["better_high"], digits=0))]


def _with_ends(value: float, low: float, high: float, digits: int = 1) -> str:
    ends = "" if math.isnan(low) else f" [{100 * low:.{digits}f}, {100 * high:.{digits}f}]"
    return f"{100 * value:.{digits}f}{ends}"


def across_tables(rows: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
    """Paired differences of two algorithms with all tests of them: study and benchmark → a row per metric.

    The last column is the smallest difference that the design detects with 80 % power, as a single planned one.
    """
    found: dict[str, list[list[Entry]]] = {}
    for row in rows:
        metric = LABELS.get(row["metric"], row["metric"])
        entries = [Entry(metric), *_tests(row, row), Entry(size(row["detectable_alone"]))]
        found.setdefault(f"{row['study']}: {row['benchmark']}", []).append(entries)
    return {name: Table(["metric", *TESTS, "detectable"], body) for name, body in found.items()}


def across_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Paired differences of two algorithms in one table: a row per study and benchmark, as in `difference_table`."""
    body: dict[tuple[str, str], dict[str, Entry]] = {}
    for row in rows:
        entry = Entry(f"{_difference(row)}, {significance(row['p'])}", row["p"] < SIGNIFICANT)
        body.setdefault((row["study"], row["benchmark"]), {})[row["metric"]] = entry
    lines = [[Entry(a), Entry(b), *(own.get(m, Entry(NONE)) for m in METRICS)] for (a, b), own in body.items()]
    header = [f"{LABELS.get(metric, metric)} (points)" for metric in METRICS]
    return Table(["study", "benchmark", *header], lines, words=["benchmark"])


def run_difference_table(rows: Sequence[Mapping[str, Any]], results: Results, benchmark: str) -> Table:
    """Paired differences of two runs with all tests of them, a row per algorithm and metric; as `across_tables`."""
    body = [
        [
            Entry(row["algorithm"]),
            Entry(results.label(row["metric"], benchmark)),
            *_tests(row, row),
            Entry(size(row["detectable_alone"])),
            Entry(str(row["seeds"])),
        ]
        for row in rows
    ]
    return Table(["algorithm", "metric", *TESTS, "detectable", "seeds"], body, words=["metric"])


TESTS = ("difference (points)", "p", *CHECKS)


def _tests(row: Mapping[str, Any], checks: Mapping[str, Any]) -> list[Entry]:
    return [Entry(_difference(row)), Entry(p_number(row["p"]), row["p"] < SIGNIFICANT), *_checks(checks)]


def differences_of(run: FinishedRun) -> list[dict[str, Any]]:
    """The paired differences from the baseline: rows of `compare_to`, with what `check_robustness` adds to them."""
    results, baseline = run.results, run.results.baseline()
    keys = ("algorithm", "benchmark", "metric")
    checks = {tuple(row[key] for key in keys): row for row in check_robustness(run.outcomes, baseline, results.k)}
    rows = compare_to(run.outcomes, baseline, results.k)
    return [checks[tuple(row[key] for key in keys)] | row for row in rows]


def numbers_of(run: FinishedRun) -> dict[str, Any]:
    """The results of a comparison as plain data: means with intervals, and differences with all tests of them."""
    results = run.results
    return {
        "experiment": results.experiment,
        "created": results.created,
        "baseline": results.baseline(),
        "base_summary": [row.model_dump() for row in results.base_summary],
        "summary": [row.model_dump() for row in results.summary],
        "differences": differences_of(run),
    }


def tables_of_tests(run: FinishedRun) -> list[rich.table.Table]:
    """The paired differences from the baseline with all tests of them, for the terminal: a table per benchmark."""
    results, rows = run.results, differences_of(run)
    found = []
    for benchmark in [name for name in results.overall if any(row["benchmark"] == name for row in rows)]:
        body = [
            [
                Entry(row["algorithm"]),
                Entry(results.label(row["metric"], benchmark)),
                *_tests(row, row),
            ]
            for row in rows
            if row["benchmark"] == benchmark
        ]
        shown = Table(["algorithm", "metric", *TESTS], body, words=["metric"])
        table = plain_table(shown, f"{benchmark}: differences from {results.baseline()}")
        table.caption, table.caption_justify = Text(detectable(rows, results, benchmark)), "left"
        found.append(table)
    return found


def _difference(row: Mapping[str, Any]) -> str:
    return f"{points(row['difference'])} [{points(row['ci_low'])}, {points(row['ci_high'])}]"
