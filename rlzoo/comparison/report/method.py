"""The section of a report on how to repeat the comparison."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from rlzoo.comparison.report import tables
from rlzoo.comparison.report.schema import FinishedRun
from rlzoo.document import Block, Code, Heading, Paragraph


def method(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """The command, the experiment and the versions."""
    results = run.results
    yield Heading("How to reproduce this")
    took = f", in {tables.seconds(results.wall_seconds)}" if results.wall_seconds is not None else ""
    yield Paragraph(f"Created {results.created}{took}. To repeat it:")
    yield Code("rlzoo compare experiment.yaml  # the file next to this report", "sh")
    if results.config is not None:
        yield Paragraph("The experiment, with every default filled in:")
        yield Code(yaml.safe_dump(results.config, sort_keys=False, allow_unicode=True).rstrip(), "yaml")
    if results.versions:
        yield Paragraph("Versions:")
        yield Code("\n".join(f"{name} {version}" for name, version in sorted(results.versions.items())))
