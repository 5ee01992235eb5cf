"""The report of an analysis: variance.json as report.md, report.html and figures, and tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import rich.table

from rlzoo.document import Block, Code, Entry, Figure, Heading, Paragraph, Table, write_document
from rlzoo.document.drawing import Drawing
from rlzoo.document.estimates import NONE, bound, estimate, number
from rlzoo.document.terminal import plain_table
from rlzoo.errors import UserError
from rlzoo.variance import plots
from rlzoo.variance.class_report import class_blocks, class_table

Found = Mapping[str, Any]


def is_analysis(directory: Path) -> bool:
    """Whether a folder was written by ``rlzoo variance``, and not by ``rlzoo compare``."""
    return (directory / "variance.json").is_file() and not (directory / "results.json").is_file()


def read_report(directory: Path) -> tuple[str, list[Block]]:
    """The title and the blocks of the report on a folder's variance.json. Raises UserError if there is none."""
    file = directory / "variance.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return f"{found['experiment']}: variance · rlzoo", list(contents(found))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(file)!r} was not written by rlzoo variance ({error}): run it again") from error


def write_report(directory: Path, out: Path | None = None) -> None:
    """Write report.md, report.html and figures/ from a folder's variance.json, into it or ``out``.

    Raises UserError if there is none.
    """
    title, blocks = read_report(directory)
    write_document(out or directory, title, blocks)


def _noise(key: str) -> Callable[[Found], str]:
    return lambda entry: estimate(entry.get("data_noise", {}).get(key))


def hidden(found: Found) -> list[str]:
    """The objectives whose gradient over all layers is hidden by noise."""
    return [
        name
        for name, entry in found["objectives"].items()
        if "noise_scale" in entry.get("data_noise", {})
        and "hides" in entry["data_noise"]["noise_scale"].get("reason", "")
    ]


def without_noise_scale(found: Found) -> dict[str, list[str]]:
    """The objectives that were measured without a value for their noise scale, by reason."""
    by_reason: dict[str, list[str]] = {}
    for name, entry in found["objectives"].items():
        if reason := entry.get("data_noise", {}).get("noise_scale", {}).get("reason"):
            by_reason.setdefault(reason, []).append(name)
    return by_reason


def _slope(entry: Found) -> str:
    moments = entry["token_moments"]
    interval = moments.get("slope_ci") or (None, None)
    return estimate({"value": moments["slope"], "ci_low": interval[0], "ci_high": interval[1]}, digits=3)


NOISE_COLUMNS: dict[str, Callable[[Found], str]] = {
    "norm / SFT's": _noise("norm_ratio_to_sft"),
    "cosine to SFT": _noise("cosine_to_sft"),
    "tr Σ of a prompt": _noise("trace_cov"),
    "noise scale (prompts)": lambda entry: bound(entry.get("data_noise", {}).get("noise_scale")),
    "prompts": lambda entry: str(entry["prompts"]),
    "rows": lambda entry: str(entry["rows"]),
}
COEFFICIENT_COLUMNS: dict[str, Callable[[Found], str]] = {
    "mean c": lambda entry: number(round(entry["coefficients"]["mean"], 6)),
    "cv": lambda entry: number(entry["coefficients"]["cv"]),
    "max / mean": lambda entry: number(entry["coefficients"]["max_over_mean"]),
    "kurtosis": lambda entry: number(entry["coefficients"]["kurtosis"]),
    "tail index": lambda entry: number(entry["coefficients"]["hill"]),
    "ESS": lambda entry: number(entry["coefficients"]["ess_fraction"]),
}
MOMENT_COLUMNS: dict[str, Callable[[Found], str]] = {
    "Σ tr Cov": lambda entry: number(entry["token_moments"]["predicted_trace_cov"]),
    "where p ≥ 0.01": lambda entry: number((entry["token_moments"]["comparable"] or {}).get("predicted")),
    "by Monte Carlo": lambda entry: _monte_carlo(entry["token_moments"]["comparable"]),
    "slope at equal S": _slope,
    "with S": lambda entry: number(entry["token_moments"].get("slope_raw")),
    "E[w²]": lambda entry: _power((entry["importance_weights"] or {}).get("log10_second_moment")),
}


def _power(exponent: float | None) -> str:
    return NONE if exponent is None else number(10**exponent) if exponent < 300 else f"10^{exponent:.0f}"


def _monte_carlo(comparable: Found | None) -> str:
    return NONE if comparable is None else estimate({**comparable, "value": comparable["monte_carlo"]})


IN_TERMINAL = (
    "norm / SFT's",
    "cosine to SFT",
    "noise scale (prompts)",
    "mean c",
    "cv",
    "ESS",
    "Σ tr Cov",
    "slope at equal S",
)


def report_tables(found: Found) -> list[rich.table.Table]:
    """The main columns of the tables, for the terminal."""
    made = []
    for title, columns in (
        ("gradients over the data", NOISE_COLUMNS),
        ("tokens", COEFFICIENT_COLUMNS | MOMENT_COLUMNS),
    ):
        shown = {column: show for column, show in columns.items() if column in IN_TERMINAL}
        made.append(plain_table(_table(found, shown), title))
    classes = class_table(found)
    return made if classes is None else [*made, plain_table(classes[0], f"classes of tokens: {classes[1]}")]


def _table(found: Found, columns: Mapping[str, Callable[[Found], str]]) -> Table:
    rows = [
        [Entry(name), *(Entry(show(entry)) for show in columns.values())] for name, entry in found["objectives"].items()
    ]
    return Table(["objective", *columns], rows)


def contents(found: Found) -> Iterator[Block]:
    """The blocks of the report, in order."""
    yield Heading(f"Gradient variance: {found['experiment']}", level=1)
    yield from _answer(found)
    yield Heading("Per token")
    yield Paragraph(
        "SFT can be read as a policy gradient that samples a token y from the policy and weights it by "
        "1[y = y*]/π(y*), where y* is the expert's token. For one prefix, the variance of that estimator is S(1−p)/p, "
        "with p = π(y*) and S the squared norm of ∇ log π(y*) in the logits: unbounded as p → 0. DFT's weight p turns "
        "it into p(1−p)S. The slope is that of log(tr Cov / S) against log p over tokens with p ≤ 0.1: a property of "
        "how the coefficient depends on p, not of the model. With S included, it also reflects how S changes with p. "
        "w = c/p is the importance weight, and E[w²] = c²/p its second moment under the policy, averaged over tokens."
    )
    yield _table(found, MOMENT_COLUMNS)
    yield from _figure(
        found, "law", plots.law, "Variance of a token's estimate against its probability.",
        "Lines: the exact variance, averaged over the tokens of a bin; points: Monte-Carlo estimates of it with 95 % "
        "intervals, shown on the right as ratios. Dashed: the predicted laws for S = 1.",
        "It does not show the noise of training on demonstrations, where nothing is sampled from the policy: given the "
        "data, SFT's gradient has no such variance, and for one prefix the noise relative to the mean, (1−p)/p, is the "
        "same for SFT and DFT. Below p = 0.01 Monte Carlo is infeasible, and only exact values are shown.",
    )  # fmt: skip
    yield from _sequences(found)
    yield Heading("Coefficients")
    yield _table(found, COEFFICIENT_COLUMNS)
    yield from _figure(
        found, "coefficients", plots.coefficients, "Histograms of the coefficients of each objective.",
        "The number of tokens with each coefficient, on a log scale. A spread-out histogram means that few tokens "
        "carry the gradient: the effective sample size in the table is the share of tokens that would have the same "
        "effect at equal weight.",
        "It does not show whether the tokens with large coefficients are the right ones to learn from.",
    )  # fmt: skip
    if any("data_noise" in entry for entry in found["objectives"].values()):
        yield from _over_data(found)
    yield from class_blocks(found)
    if found.get("training"):
        yield Heading("In the course of training")
    yield from _figure(
        found, "training", plots.along_training, "Noise in the course of training, one line per objective.",
        "The gradient's covariance, the noise scale tr Σ/‖G‖² and the effective sample size of the coefficients at the "
        "policy in training, always on the same rows. There are gaps where noise hides the gradient.",
        "A single run with one seed on few rows: a difference between two lines is an observation, not a finding.",
    )  # fmt: skip
    yield from _method(found)


def summary(found: Found) -> Iterator[Block]:
    """The answer of the report, and its two main tables, for the card."""
    yield from _answer(found)
    if any("data_noise" in entry for entry in found["objectives"].values()):
        yield Heading("Gradients over the data")
        yield _table(found, NOISE_COLUMNS)
    yield Heading("Coefficients of tokens")
    yield _table(found, COEFFICIENT_COLUMNS)


def _answer(found: Found) -> Iterator[Block]:
    probabilities = found.get("token_probabilities")
    comparable = [row for row in found["bins"] if row["comparable"]]
    if probabilities:
        p = probabilities["p"]
        yield Paragraph(
            f"The experts' {probabilities['tokens']:,} tokens have a median probability of {p['0.5']:.4f}; the "
            f"least likely has {number(p['0'])}, where SFT read as a policy gradient has a weight of "
            f"{number(1 / p['0'])}.",
            lead=True,
        )
    if comparable:
        inside = sum(row["ci_low"] <= row["predicted"] <= row["ci_high"] for row in comparable)
        yield Paragraph(
            f"Exact and Monte-Carlo variances agree within the 95 % interval in {inside} of {len(comparable)} bins "
            "that can be compared.",
            lead=True,
        )
    for name, reason in {**found["skipped"], **found.get("failed", {})}.items():
        yield Paragraph(f"{name} was left out: {reason}.")


def _sequences(found: Found) -> Iterator[Block]:
    sequences = next(
        (
            e["token_moments"]["sequence_level"]
            for e in found["objectives"].values()
            if "sequence_level" in e["token_moments"]
        ),
        None,
    )
    if sequences is None:
        return
    yield Paragraph(
        "The same formula in log space with the whole completion as one action: log10 of the probability P and of the "
        "variance, over sequences. Monte Carlo cannot estimate these: it would take about 1/P samples to hit the "
        f"expert's completion once, and only {number(100 * sequences['comparable']['fraction'])} % of the sequences "
        "have a large enough P."
    )
    header = ["quantile", *(f"{float(q):.0%}" for q in sequences["log10_p"])]
    rows = [
        [Entry(label), *(Entry(number(value)) for value in sequences[key].values())]
        for label, key in (
            ("log10 P", "log10_p"), ("log10 tr Cov, SFT", "log10_trace_cov_sft"),
            ("log10 tr Cov, weighted by P", "log10_trace_cov_dft"),
        )
    ]  # fmt: skip
    yield Table(header, rows)


def _over_data(found: Found) -> Iterator[Block]:
    yield Heading("Over the data")
    yield Paragraph(
        "This is the noise that training sees: given its rows, a gradient is deterministic; what varies is which "
        "prompts are drawn. All rows of a prompt that an objective learns from contribute one gradient, and intervals "
        "are for new prompts of the same kind, for this model. tr Σ is the trace of the covariance of a prompt's "
        "gradient over all parameters, and the noise scale tr Σ/‖G‖² is the batch size, in prompts, at which noise and "
        "gradient are equal. Norm ratio and cosine are estimates for the expected gradients, without the noise that "
        "two objectives share; each interval is for a single number."
    )
    yield _table(found, NOISE_COLUMNS)
    if names := hidden(found):
        yield Paragraph(
            f"Noise hides the gradient of {', '.join(names)}: a test at 5 % does not distinguish it from 0, so neither "
            "direction nor length is reported, and the table gives a lower bound on the noise scale, if there is one. "
            "Use more rows."
        )
    for reason, others in without_noise_scale(found).items():
        if others != names:
            yield Paragraph(f"There is no noise scale for {', '.join(others)}: {reason}.")
    yield from _cosines(found)
    yield from _figure(
        found, "directions", plots.directions, "Cosine, norm ratio and noise scale of each objective.",
        "Direction and length of each mean gradient relative to SFT's, and its noise scale, with 95 % intervals; an "
        "arrow marks an interval without an upper end. The norm relative to SFT's acts like a learning rate in plain "
        "gradient descent.",
        "It does not show the effect of the optimizer: AdamW and clipping remove most differences of scale.",
    )  # fmt: skip
    yield from _figure(
        found, "chart", plots.chart, "The objectives by the length and direction of their mean gradients.",
        "The norm of each objective's expected gradient and its cosine with SFT's, which is below 0 if the two "
        "conflict. Thin lines are 95 % intervals; the area of a point shows the effective sample size of the "
        "coefficients over tokens. Objectives whose gradient is hidden by noise are left out.",
        "It does not show where training leads: neighbours here may end up far apart.",
    )  # fmt: skip
    yield from _figure(
        found, "layers", plots.layers, "Noise and direction by layer.",
        "Each layer's share of tr Σ, and the cosine of its expected gradient with SFT's.",
        "A layer's share also depends on its number of parameters: it does not show how much the layer matters.",
    )  # fmt: skip
    yield from _figure(
        found, "proxies", plots.proxies, "Logit-space proxies against exact squared gradient norms.",
        "Each point is a prompt: the proxy Σ a²S, which needs no backward pass, against the exact squared norm of its "
        "gradient. The table has their rank correlations.",
        "It does not show the scale: the proxy is in logits and the norm in parameters, so only ranks are compared.",
    )  # fmt: skip
    rows = [
        [
            Entry(name),
            Entry(estimate(entry["proxies"]["score_norm"]["rank_correlation"])),
            Entry(estimate(entry["proxies"]["total_power"]["rank_correlation"])),
        ]
        for name, entry in found["objectives"].items()
    ]
    yield Table(["objective", "rank correlation of Σ S", "of Σ a²S"], rows)


MOST_COSINES = 8
"""The largest number of objectives for which a table of all cosines is readable."""


def _cosines(found: Found) -> Iterator[Block]:
    """The cosines between all objectives, if there are any besides those with the baseline; variance.json has all."""
    drowned = hidden(found)
    names = [name for name in found["cosines"] if name not in drowned]
    if not 3 <= len(names) <= MOST_COSINES:
        return
    yield Paragraph("Cosines between the expected gradients of the objectives that noise does not hide:")
    rows = [[Entry(a), *(Entry(estimate(found["cosines"][a].get(b))) for b in names)] for a in names]
    yield Table(["objective", *names], rows)


def _figure(
    found: Found, name: str, draw: Callable[[Found], Drawing | None], alt: str, shows: str, hides: str
) -> Iterator[Block]:
    drawing = draw(found)
    if drawing is not None:
        yield Figure(name, drawing, alt, shows, hides)


def _method(found: Found) -> Iterator[Block]:
    yield Heading("How it was measured")
    warm = found.get("warm_up")  # results of earlier versions have none
    after = f" after a warm-up of {warm['steps']} steps of {warm['objective']}" if warm else ""
    yield Paragraph(
        f"Model {found['model']}{after}, analysed {found['created']}. Exact means one forward pass and closed forms. "
        "Gradients are exact, from one backward pass per objective; their intervals use inner products between "
        "prompts from random projections. variance.json has every number, and docs/measuring-variance.md explains them."
    )
    settings = {**found["settings"], **found["versions"]}
    yield Code("\n".join(f"{key} {value}" for key, value in settings.items()))
