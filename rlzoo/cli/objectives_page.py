"""docs/objectives.md: the built-in objectives, described from their classes and docstrings."""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import sys
import textwrap
import token
import tokenize
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal

from rlzoo.config.files import EXPERIMENTS
from rlzoo.errors import UserError
from rlzoo.objective import Objective, is_composite, list_objectives, objective_class, own_options_of, summary_of
from rlzoo.types import Selection, name_of_view

COMMAND = "rlzoo list --markdown > docs/objectives.md"
BUILT_IN = "rlzoo.algorithms."
COSTS = EXPERIMENTS / "results" / "step-cost.json"
"""What experiments/benchmarks/step_cost.py has measured."""
LAYOUT = (tokenize.NL, tokenize.COMMENT, token.NEWLINE, token.INDENT, token.DEDENT, token.ENDMARKER)
TITLES = {
    Selection.DEMONSTRATIONS: "From demonstrations",
    Selection.CORRECT: "From a policy's own correct samples",
    Selection.PAIRS: "From pairs of a better and a worse completion",
    Selection.UNPAIRED: "From single completions, good and bad",
    Selection.GROUPS: "From groups of rewarded samples",
    None: "Composites of other objectives",
}


def objectives_page() -> str:
    """The page in Markdown, without a newline at its end. It does not include plug-ins."""
    found = [objective_class(name) for name in list_objectives()]
    built_in = {title: [one for one in found if _is_under(one, selection)] for selection, title in TITLES.items()}
    names = [one.name for some in built_in.values() for one in some]
    costs: dict[str, Any] = json.loads(COSTS.read_text(encoding="utf-8")) if COSTS.exists() else {}
    intro = f"""\
# Objectives

The {len(names)} objectives that come with rlzoo, as described in their own files. This page is generated from the
classes:

    {COMMAND}

An objective gives each token a coefficient c_t, the factor of ∇ log π_θ(y_t) in the gradient; p_t is π_θ(y_t), the
probability of the token under the policy in training. [interface.md](interface.md) explains how coefficients become a
loss, and what an objective can request. [losses.md](losses.md) has all objectives for demonstrations on one map. "Code"
counts the lines of a file that are not blank, comment or docstring.

"Checked against" says how an objective is validated. `formula`: its loss is the one that its paper writes, in
tests/canonical.py, which shares no code with the objective, and its gradient is the one that automatic differentiation
finds for that. `TRL` and its version: on the same model and rows, both are also those of TRL's trainer.

Besides its own options, every objective except composites has the option `truncated`, for completions that were cut at
the length limit: `keep` (the default), `drop` or, if it learns from groups, `mask`. See
[buffers.md](buffers.md#truncated-completions)."""
    columns = ["objective", "coefficient", "learns from", "normaliser", "needs", "source", "checked against"]
    columns += ["step, × SFT", "code"]
    relative = costs.get("relative_to_sft", {})
    rows = [_row(one, relative) for some in built_in.values() for one in some]
    parts = [intro, *_of_costs(costs), _table(columns, rows)]
    for title, some in built_in.items():
        parts += [f"## {title}", *(_section(one, names) for one in some)]
    return "\n\n".join(parts)


def prose(docstring: str, names: Sequence[str]) -> str:
    """A docstring as Markdown: indented blocks are fenced, names become code, and objectives and papers are linked."""
    blocks = []
    for block in re.split(r"\n\n+", docstring):
        if block.startswith("    "):
            blocks.append(f"```text\n{textwrap.dedent(block)}\n```")
            continue
        text = re.sub(r"``(.+?)``", r"`\1`", block)
        for name in names:
            text = re.sub(rf"(?<!`)`{name}`(?!`)", f"[`{name}`](#{name})", text)
        blocks.append(_linked(text))
    return "\n\n".join(blocks)


def lines_of_code(source: str) -> int:
    """The number of lines of code: neither blank nor comment nor docstring, including docstrings of fields."""
    held: set[int] = set()
    for piece in tokenize.generate_tokens(io.StringIO(source).readline):
        if piece.type not in LAYOUT:
            held |= set(range(piece.start[0], piece.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            held -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(held)


def _is_under(objective: type[Objective], selection: Selection | None) -> bool:
    own = None if is_composite(objective) else objective.learns_from
    return own is selection and objective.__module__.startswith(BUILT_IN)


def _of_costs(costs: Mapping[str, Any]) -> list[str]:
    """What the column of measured costs is; nothing if there are none."""
    if not costs:
        return []
    machine, vocabulary, share = (costs[key] for key in ("machine", "vocabulary", "log_probs"))
    return [
        f"""\
"Step, × SFT" is the processor time of an optimizer step relative to one of SFT on the same rows, with default options:
the median of {costs["rounds"]} rounds on an {machine}, {costs["date"]}
(`python experiments/benchmarks/step_cost.py`). It includes every pass that a step needs, such as a critic's or that of
a teacher that moves; it does not include sampling, nor log-probs of a fixed model, which are computed once per row, at
{share[1]:.1f} × a step of SFT for as many rows. The model is the embedded one, with {vocabulary} tokens: in a larger
vocabulary, objectives that need logits or a statistic of the whole distribution cost more. A dash: not measured."""
    ]


def _row(objective: type[Objective], relative: Mapping[str, Sequence[float]]) -> list[str]:
    if is_composite(objective):
        own = ["as its components"] * 3
    else:
        own = [name_of_view(objective.learns_from), _words(_example(objective).normaliser.value), _needs(objective)]
    link = f"[{objective.name}](#{objective.name})"
    source, checked = _linked(objective.source) or "none", _checked(objective)
    return [link, summary_of(objective)[1], *own, source, checked, _cost(objective, relative), str(_code(objective))]


def _cost(objective: type[Objective], relative: Mapping[str, Sequence[float]]) -> str:
    """The median of its step's time relative to SFT's."""
    return f"{relative[objective.name][1]:.1f}" if objective.name in relative else "–"


def _section(objective: type[Objective], names: Sequence[str]) -> str:
    full, formula = summary_of(objective)
    facts = [["full name", full], ["coefficient", formula]]
    if is_composite(objective):
        facts += [["learns from, needs, coupling, normaliser", "as its components"]]
    else:
        facts += [
            ["learns from", name_of_view(objective.learns_from)],
            ["needs", "; ".join([_needs(objective), *_other_needs(objective)])],
            ["coupling", _coupling(objective)],
            ["normaliser", "; ".join([_words(_example(objective).normaliser.value), *_other_normalisers(objective)])],
        ]
    path = f"algorithms/{Path(inspect.getfile(objective)).name}"
    facts += [["source", _linked(objective.source) or "none"], ["checked against", _checked(objective)]]
    facts += [["code", f"[{path}](../{path}), {_code(objective)} lines"]]
    text = inspect.getdoc(sys.modules[objective.__module__]) or ""
    parts = [f"### {objective.name}", prose(text, names), _table(["", ""], facts)]
    if options := own_options_of(objective):
        required = _required(objective)
        rows = [
            [f"`{name}`", _type(option["type"]), "none: required" if name in required else f"`{option['default']}`"]
            for name, option in options.items()
        ]
        parts.append(_table(["option", "type", "default"], rows))
    return "\n\n".join(parts)


def _needs(objective: type[Objective], **options: Any) -> str:
    return ", ".join(sorted(one.label for one in _example(objective, **options).requires)) or "nothing"


def _example(objective: type[Objective], **options: Any) -> Objective:
    """An objective with its defaults; an option without one is given its own name."""
    return objective(**{name: name for name in _required(objective)} | options)


def _required(objective: type[Objective]) -> set[str]:
    return {field.name for field in fields(objective) if field.default is field.default_factory is MISSING}


def _other_needs(objective: type[Objective]) -> Iterator[str]:
    """How its needs change with another value of a `Literal` option, or with a weight of 0."""
    hints = typing.get_type_hints(objective)
    for field in fields(objective):
        hint = hints[field.name]
        values = typing.get_args(hint) if typing.get_origin(hint) is Literal else (0.0,) if hint is float else ()
        for value in values:
            with suppress(UserError):  # a value that the objective rejects
                needs = _needs(objective, **{field.name: value})
                if needs == _needs(objective):
                    continue
                yield f"with `{field.name}` = {value:g}: {needs}" if hint is float else f"with `{value}`: {needs}"


def _other_normalisers(objective: type[Objective]) -> Iterator[str]:
    """How its normaliser changes with another value of a `Literal` option."""
    for field, hint in typing.get_type_hints(objective).items():
        for value in typing.get_args(hint) if typing.get_origin(hint) is Literal else ():
            with suppress(UserError):
                normaliser = _example(objective, **{field: value}).normaliser
                if normaliser is not _example(objective).normaliser:
                    yield f"with `{value}`: {_words(normaliser.value)}"


def _checked(objective: type[Objective]) -> str:
    """What the tests compare it with: all with their paper's formula, some with another implementation too."""
    return ", ".join(["formula", *([objective.compared_with] if objective.compared_with else [])])


def _coupling(objective: type[Objective]) -> str:
    fixed = objective.advantages is not Objective.advantages or objective.prepare is not Objective.prepare
    return objective.couples.value + (", once advantages are fixed over the whole batch" if fixed else "")


def _type(text: str) -> str:
    choice = re.fullmatch(r"Literal\[(.*)\]", text)
    return choice[1].replace("'", "`").replace(", ", " or ") if choice else f"`{text}`"


def _words(value: str) -> str:
    return value.replace("_", " ")


def _code(objective: type[Objective]) -> int:
    return lines_of_code(inspect.getsource(sys.modules[objective.__module__]))


def _linked(text: str) -> str:
    text = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return re.sub(r"doi (10\.\d+/[\w.-]*\w)", r"[doi \1](https://doi.org/\1)", text)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
