"""The page of samples: one problem at a time, with every algorithm's completion of it, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlzoo.comparison.dashboard.elements import Child, Html, cut, h, join, link, pre, url
from rlzoo.comparison.dashboard.layout import Content
from rlzoo.comparison.dashboard.outcomes import OutcomeStore, ProblemResults
from rlzoo.comparison.dashboard.overview import seconds_of
from rlzoo.comparison.dashboard.state import RunView
from rlzoo.config import BASE
from rlzoo.document import Answer, Answers
from rlzoo.document.estimates import number
from rlzoo.document.page import block_html

ORDERS = {
    "": "in their order",
    "disagreement": "where algorithms disagree most, first",
    "right": "all samples right",
    "wrong": "all samples wrong",
}


@dataclass(frozen=True)
class SampleQuery:
    """What is asked for: a benchmark's problem, by its place among those shown, and whose samples of it."""

    benchmark: str = ""
    order: str = ""
    place: int = 0
    rows: tuple[str, ...] = ()
    """Algorithms; none: all."""
    seed: str = ""
    decoding: str = "sample"

    def at(self, place: int) -> str:
        """The page of another place."""
        return url(
            "/samples", benchmark=self.benchmark, order=self.order, row=list(self.rows), seed=self.seed,
            decoding="" if self.decoding == "sample" else self.decoding, place=place,
        )  # fmt: skip


def samples_page(view: RunView, store: OutcomeStore, query: SampleQuery) -> Content:
    """A problem, its reference, and a completion per algorithm."""
    problems = store.problems(query.decoding)
    title, seconds = "Samples", seconds_of(view) if view.is_running else None
    if not problems:
        told = "There are no samples yet: the first come with the evaluation of the base model."
        parts = {"filter": h("h1", title), "problem": h("p", told if view.is_running else "This run has no samples.")}
        return Content(title, parts, seconds)
    shown = arranged([one for one in problems if not query.benchmark or one.benchmark == query.benchmark], query)
    place = min(max(query.place, 0), max(len(shown) - 1, 0))
    parts = {"filter": join(h("h1", title), _form(view, problems, query))}
    if not shown:
        return Content(title, {**parts, "problem": h("p", "No problem is like that.")}, seconds)
    rows = store.completions(shown[place], query.decoding)
    parts["problem"] = _problem(view, shown[place], rows, query, place, len(shown))
    return Content(title, parts, seconds)


def arranged(problems: Sequence[ProblemResults], query: SampleQuery) -> list[ProblemResults]:
    """The problems that an order keeps, in that order."""
    match query.order:
        case "disagreement":
            spread = {id(one): one.spread(query.rows) for one in problems}
            kept = [one for one in problems if spread[id(one)] > 0]
            return sorted(kept, key=lambda one: -spread[id(one)])
        case "right" | "wrong":
            return [one for one in problems if one.share(query.rows) == float(query.order == "right")]
        case _:
            return list(problems)


def _form(view: RunView, problems: Sequence[ProblemResults], query: SampleQuery) -> Html:
    benchmarks = dict.fromkeys(one.benchmark for one in problems)
    names = dict.fromkeys(name for one in problems for name in one.right if name != BASE)
    seeds = sorted({cell.seed for cell in view.cells})

    def choice(name: str, label: str, options: Mapping[str, str], chosen: str) -> Html:
        made = [h("option", told, value=value, selected=value == chosen) for value, told in options.items()]
        return h("label", label, " ", h("select", made, name=name))

    every = {"": "all"}
    boxes = [
        h("label", h("input", type="checkbox", name="row", value=name, checked=name in query.rows), " ", name)
        for name in names
    ]
    whose = h(
        "details",
        h("summary", f"Algorithms: {', '.join(query.rows) or 'all'}"),
        h("div", boxes, class_="choices"), open=bool(query.rows),
    )  # fmt: skip
    fields = [
        choice("benchmark", "Benchmark", every | {name: name for name in benchmarks}, query.benchmark),
        choice("order", "Problems", ORDERS, query.order),
        choice("seed", "Seed", {"": "first"} | {str(seed): str(seed) for seed in seeds}, query.seed),
        choice("decoding", "Decoding", {"sample": "sampled", "greedy": "greedy"}, query.decoding),
    ]
    return h("form", h("div", fields, class_="fields"), whose, h("button", "Show"), method="get", action="/samples")


def _problem(
    view: RunView, problem: ProblemResults, rows: Sequence[Mapping[str, Any]], query: SampleQuery, place: int, of: int
) -> Html:
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if not query.rows or row["algorithm"] in (*query.rows, BASE):
            by_name.setdefault(row["algorithm"], []).append(row)
    order = [BASE, *dict.fromkeys(cell.algorithm for cell in view.cells), *by_name]
    answers = [
        _answer(name, some)
        for name in dict.fromkeys(order)
        if name in by_name
        and (some := [row for row in by_name[name] if query.seed in ("", str(row["seed"])) or name == BASE])
    ]
    first = rows[0] if rows else {}
    steps = h(
        "nav",
        h("p", [
            link(query.at(place - 1), "← previous", class_="step") if place > 0 else h("span", "← previous"),
            f" {place + 1:,} of {of:,} ",
            link(query.at(place + 1), "next →", class_="step") if place + 1 < of else h("span", "next →"),
        ]),
        aria_label="Problems", class_="steps",
    )  # fmt: skip
    reference: Child = first.get("reference")
    told = h("p", "Of each algorithm the first sample, and how many of all its samples are right.")
    shown = Answers(f"{problem.benchmark}, {problem.id}", cut(str(first.get("prompt") or "")), answers)
    html = block_html(shown)
    if reference:  # between the prompt and the answers
        known = join(h("p", "Reference", class_="problem"), pre(reference))
        html = html.replace('<div class="answers"', f'{known}<div class="answers"', 1)
    return join(steps, told, Html(html))


def _answer(name: str, rows: Sequence[Mapping[str, Any]]) -> Answer:
    first, right = rows[0], sum(bool(row["correct"]) for row in rows)
    notes = [f"{right} of {len(rows)} right" if len(rows) > 1 else "", "" if name == BASE else f"seed {first['seed']}"]
    notes += [f"reward {number(first['reward'])}" if first["reward"] is not None else "no reward"]
    notes += [f"answer {first['answer']:.60}" if first["answer"] else "", f"{first['length']} tokens"]
    notes += ["truncated" if first["truncated"] else ""]
    return Answer(name, bool(first["correct"]), cut(first["text"] or ""), ", ".join(filter(None, notes)))
