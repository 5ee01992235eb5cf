"""The pages of a buffer: its rows, its groups, and a single row."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlzoo.comparison.dashboard.buffers import PAGE, BufferNumbers, RowQuery, WatchedBuffer
from rlzoo.comparison.dashboard.charts import ChartLine, chart, colour, legend
from rlzoo.comparison.dashboard.elements import Child, Html, facts, h, join, link, pre, table, url
from rlzoo.comparison.dashboard.layout import Content
from rlzoo.document.estimates import NONE, number

BRIEF = 160
"""The characters of a completion in a list."""
NOTHING = "The buffer cannot be read: it is being written, is empty, or is damaged."
LOG_PROBS = ("behaviour_logp", "sampler_logp", "reference_logp", "tempered_reference_logp")


def _path(buffer: WatchedBuffer, *more: str) -> str:
    return "/".join(["/buffer", buffer.key, *more])


def rows_page(buffer: WatchedBuffer, query: RowQuery) -> Content:
    """A page of the rows that a query keeps."""
    table_ = buffer.table()
    if table_ is None:
        return Content(buffer.name, {"rows": join(h("h1", buffer.name), h("p", NOTHING))})
    rows, after = buffer.page(table_, query)
    numbers = buffer.numbers(table_)
    header = [("row", "name"), ("prompt", "word"), ("source", "word"), ("reward", "number"), ("tokens", "number")]
    header += [("mean log-prob", "number"), ("completion", "prose")]
    body = [
        [
            link(_path(buffer, "row", str(row["row"])), f"{row['row']:,}"),
            link(url(_path(buffer), prompt=row["prompt_id"]), row["prompt_id"]),
            row["source"], _number(row.get("reward")), _number(row["tokens"]), _number(row["logp"]),
            [_brief(row["completion"]), " (truncated)" if row.get("truncated") else None],
        ]
        for row in rows
    ]  # fmt: skip
    more = url(_path(buffer), source=query.source, prompt=query.prompt_id, q=query.text, start=after)
    found = f"Prompt {query.prompt_id}" if query.prompt_id else f"Rows from {query.start:,} on"
    return Content(buffer.name, {"rows": join(
        h("h1", buffer.name), _summary(numbers), _form(buffer, query, numbers), h("h2", found),
        table(header, body, "rows") if body else h("p", "No row is like that."),
        h("p", link(more, "next →", class_="step")) if after is not None else None,
    )})  # fmt: skip


def groups_page(buffer: WatchedBuffer, start: int, equal: str) -> Content:
    """The groups of samples, with their rewards: all, or those whose rewards are equal or not."""
    table_ = buffer.table()
    if table_ is None:
        return Content(buffer.name, {"groups": join(h("h1", buffer.name), h("p", NOTHING))})
    groups = buffer.groups(table_)
    if equal:
        groups = [g for g in groups if (g["reward_min"] == g["reward_max"]) == (equal == "yes")]
    start = max(0, start)
    header = [("prompt", "name"), ("rows", "number"), ("mean reward", "number"), ("min", "number"), ("max", "number")]
    body = [
        [
            link(url(_path(buffer), prompt=group["prompt_id"]), group["prompt_id"]), _number(group["source_count"]),
            *(_number(group[f"reward_{kind}"]) for kind in ("mean", "min", "max")),
        ]
        for group in groups[start : start + PAGE]
    ]  # fmt: skip
    filters = [("", "all"), ("no", "different rewards"), ("yes", "equal rewards")]
    choices = [
        [link(url(_path(buffer, "groups"), equal=value), told, class_="chosen" if value == equal else None), " "]
        for value, told in filters
    ]
    steps: list[Child] = []
    for place, told in ((start - PAGE, "← previous"), (start + PAGE, "next →")):
        if 0 <= place < len(groups):
            steps += [link(url(_path(buffer, "groups"), equal=equal, start=place), told, class_="step"), " "]
    last = min(start + PAGE, len(groups))
    return Content(f"{buffer.name}: groups", {"groups": join(
        h("h1", f"{buffer.name}: groups"), h("p", link(_path(buffer), "← rows")), h("p", choices, class_="choices"),
        h("p", f"{start + 1:,} to {last:,} of {len(groups):,} prompts with samples") if body else h("p", "None."),
        table(header, body, "groups") if body else None, h("p", steps),
    )})  # fmt: skip


def row_page(buffer: WatchedBuffer, at: int) -> Content | None:
    """One row with everything it holds; None if there is no such row."""
    table_ = buffer.table()
    row = None if table_ is None else buffer.row(table_, at)
    if row is None:
        return None
    title = f"{buffer.name}: row {at:,}"
    told: list[tuple[str, Child]] = [
        ("prompt", link(url(_path(buffer), prompt=row["prompt_id"]), row["prompt_id"])),
        ("source", row["source"]), ("reward", _number(row.get("reward"))[0]),
        *((f"reward: {one['name']}", _number(one["value"])[0]) for one in row.get("reward_components") or ()),
        ("policy version", str(row.get("policy_version"))),
        ("temperature, top-p", f"{row.get('temperature')}, {row.get('top_p')}"),
        ("truncated", "yes" if row.get("truncated") else "no"),
        ("prompt tokens", str(len(row["prompt_ids"]))), ("completion tokens", str(len(row["completion_ids"]))),
        *((str(name), str(value)[:1000]) for name, value in row["columns"].items()),
    ]  # fmt: skip
    prompt = _turns(row.get("messages")) or join(h("p", "Prompt", class_="problem"), pre(row["prompt"]))
    completion = _turns(row.get("completion_messages")) or pre(row["completion"])
    return Content(title, {"row": join(
        h("h1", title), h("p", link(_path(buffer), "← rows")), prompt,
        h("p", "Completion", class_="problem"), completion, facts(told), _log_probs(row),
    )})  # fmt: skip


def _turns(messages: list[dict[str, Any]] | None) -> list[Html]:
    """A conversation: the role and text of each message, and what else it has, such as tool calls, as JSON."""
    return [
        join(h("p", one["role"], class_="problem"), [pre(text) for text in (one["content"], one.get("extra")) if text])
        for one in messages or ()
    ]


def _log_probs(row: dict[str, Any]) -> Html:
    """The log-probs of the completion's tokens, each kind as a line."""
    own = {name: row.get(name) for name in LOG_PROBS} | {one["name"]: one["values"] for one in row.get("inputs") or ()}
    lines = [
        ChartLine(name.replace("_logp", "").replace("_", " "), colour(place), np.stack([np.arange(len(v)), v], 1))
        for place, (name, v) in enumerate((name, v) for name, v in own.items() if v)
    ]
    if not lines:
        return Html("")
    learned = row.get("completion_mask")
    shows = f"{sum(learned):,} of {len(learned):,} tokens are learned from." if learned else ""
    drawn = chart("Log-prob per token of the completion, in nats", lines, shows, along="token")
    return join(h("h2", "Log-probs"), legend(lines), h("div", drawn, class_="charts"))


def _summary(numbers: BufferNumbers) -> Html:
    count, mean, low, high = numbers.rewards
    told = "none" if mean is None else f"{count:,}, mean {number(mean)}, {number(low)} to {number(high)}"
    least, middle, most = numbers.tokens
    sources = ", ".join(f"{many:,} {name}" for name, many in numbers.sources.items())
    return facts([
        ("rows", f"{numbers.rows:,}: {sources}"), ("prompts", f"{numbers.prompts:,}"), ("rewards", told),
        ("completion tokens", f"{least:,} to {most:,}, mean {number(middle)}"),
        ("with behaviour log-probs", f"{numbers.with_logp:,}"),
    ])  # fmt: skip


def _form(buffer: WatchedBuffer, query: RowQuery, numbers: BufferNumbers) -> Html:
    options = [h("option", "all", value="")] + [
        h("option", name, value=name, selected=name == query.source) for name in numbers.sources
    ]
    fields = [
        h("label", "Prompt or completion has ", h("input", type="search", name="q", value=query.text)),
        h("label", "Source ", h("select", options, name="source")),
        h("label", "From row ", h("input", type="number", name="start", value=query.start, min=0)),
        h("input", type="hidden", name="prompt", value=query.prompt_id) if query.prompt_id else None,
    ]
    groups = link(_path(buffer, "groups"), "Groups by prompt")
    return h("form", h("div", fields, class_="fields"), h("button", "Show"), " ", groups, method="get",
             action=_path(buffer))  # fmt: skip


def _number(value: Any) -> tuple[str, float | None]:
    known = isinstance(value, int | float) and value == value
    return (number(float(value)), float(value)) if known else (NONE, None)


def _brief(value: str) -> str:
    line = " ".join(value[: 2 * BRIEF].split())
    return line if len(line) <= BRIEF and len(value) <= 2 * BRIEF else f"{line[:BRIEF]}…"
