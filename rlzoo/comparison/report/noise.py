"""The section of a report on the variance of gradients, where `rlzoo variance` measured it for the same experiment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlzoo.comparison.report.schema import FinishedRun
from rlzoo.comparison.report.tables import interval
from rlzoo.document import Block, Entry, Heading, Paragraph, Table
from rlzoo.document.estimates import bound, estimate


def gradient_variance(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """The gradients of the objectives at the base model, next to their results; nothing where nobody measured them."""
    if run.variance is None or not run.results.benchmarks:
        return
    found, benchmark = run.variance, run.results.benchmarks[0]
    yield Heading("Variance of gradients")
    yield Paragraph(
        f"Measured by rlzoo variance for the model {found['model']}, before training, on {found['created'][:10]}: the "
        "norm of the expected gradient and its cosine, relative to SFT's; tr Σ, the trace of the covariance of one "
        "prompt's gradient; and the noise scale tr Σ / ‖G‖², the number of prompts whose mean has as much noise as "
        "gradient. Where noise hides the gradient there is no number, or a lower bound. The results are those above. "
        "That two columns agree does not show that one causes the other."
    )
    rows = [_row(run, benchmark, name, entry) for name, entry in found["objectives"].items()]
    label = f"{run.results.label('avg_at_k', benchmark)} on {benchmark} (%)"
    yield Table(
        ["objective", label, "norm / SFT's", "cosine to SFT", "tr Σ of a prompt", "noise scale (prompts)"], rows
    )


def _row(run: FinishedRun, benchmark: str, name: str, entry: Mapping[str, Any]) -> list[Entry]:
    noise = entry.get("data_noise", {})
    shown = [estimate(noise.get(key)) for key in ("norm_ratio_to_sft", "cosine_to_sft", "trace_cov")]
    result = interval(run.results.row(name, benchmark, "avg_at_k"))
    return [Entry(name), Entry(result), *map(Entry, shown), Entry(bound(noise.get("noise_scale")))]
