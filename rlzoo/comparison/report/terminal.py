"""The results of a comparison for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import rich.table
from rich.text import Text

from rlzoo.comparison.report.endings import rising_at_the_end
from rlzoo.comparison.report.retention import retention_table
from rlzoo.comparison.report.schema import Results, parse_results
from rlzoo.comparison.report.tables import cost_table, online_counterparts, result_table
from rlzoo.document.terminal import plain_table


def report_table(results: Results | Mapping[str, Any]) -> list[rich.table.Table]:
    """Results on each benchmark with 95 % intervals, with what to know of them as a caption; retention; and costs.

    Takes the content of a results.json. Raises UserError naming the first field that is wrong.
    """
    checked = results if isinstance(results, Results) else parse_results(results)
    scores = [
        plain_table(result_table(checked, benchmark), f"{benchmark}: mean and 95 % interval")
        for benchmark in checked.overall
    ]
    notes = [note for note in (rising_at_the_end(checked), online_counterparts(checked)) if note is not None]
    if scores and notes:
        scores[-1].caption, scores[-1].caption_justify = Text("\n".join(notes)), "left"
    if checked.retention is not None and checked.retention.summary:
        kept = {f"retention, {name}": retention_table(checked, name) for name in checked.retention.base}
        scores += [plain_table(table, f"{title}: mean and 95 % interval") for title, table in kept.items()]
    return [*scores, plain_table(cost_table(checked), "costs: mean of a cell")]
