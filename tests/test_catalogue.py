"""docs/objectives.md: in step with the classes, complete, and shown by Markdown as it was meant."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from canonical import CANONICAL, CANONICAL_IN_LOGITS
from markdown_it import MarkdownIt

from rlzoo import objective as objective_module
from rlzoo import registry as registry_module
from rlzoo.cli import main
from rlzoo.cli import objectives_page as objectives_page_module
from rlzoo.cli.catalogue import catalogue
from rlzoo.cli.objectives_page import COMMAND, lines_of_code, objectives_page, prose
from rlzoo.experiments.benchmarks.step_cost import measure, measured
from rlzoo.objective import Objective, is_composite, list_objectives, objective_class

PAGE = Path(__file__).parents[1] / "docs" / "objectives.md"


@pytest.fixture(autouse=True)
def leave_the_registry_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    list_objectives()
    entries = objective_module._objectives._entries
    monkeypatch.setattr(objective_module._objectives, "_entries", dict(entries))


def built_in() -> list[type[Objective]]:
    found = [objective_class(name) for name in list_objectives()]
    return [objective for objective in found if objective.__module__.startswith("rlzoo.algorithms.")]


def docstring(objective: type[Objective]) -> str:
    return inspect.getdoc(sys.modules[objective.__module__]) or ""


over_built_ins = pytest.mark.parametrize("objective", built_in(), ids=lambda objective: objective.name)


def test_the_page_is_in_step_with_the_classes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--markdown"]) == 0
    # not ==: pytest would show both pages, and not the line below
    assert (capsys.readouterr().out == PAGE.read_text(encoding="utf-8")) is True, f"run: {COMMAND}"


@pytest.mark.slow
def test_the_cost_of_a_step_is_the_measured_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def shown(relative: Mapping[str, Sequence[float]]) -> dict[str, str]:
        medians = {name: f"{relative[name][1]:.1f}" for name in relative}
        return {one.name: medians.get(one.name, "–") for one in built_in()}

    committed = objectives_page_module.COSTS
    if committed.exists():
        relative = json.loads(committed.read_text(encoding="utf-8"))["relative_to_sft"]
        assert set(relative) <= set(measured()) and all(low <= mid <= high for low, mid, high in relative.values())
        assert column_of(PAGE.read_text(encoding="utf-8"), "step, × SFT") == shown(relative)
    own = {
        "date": "2026-02-01", "machine": "x86_64 CPU, one thread", "rounds": 3, "vocabulary": 64,
        "log_probs": [0.3, 0.34, 0.4], "relative_to_sft": {"dft": [1.2, 1.27, 1.3], "ppo": [2.0, 2.4, 2.5]},
    }  # fmt: skip
    monkeypatch.setattr(objectives_page_module, "COSTS", tmp_path / "some.json")
    assert set(column_of(objectives_page(), "step, × SFT").values()) == {"–"}  # nothing measured
    (tmp_path / "some.json").write_text(json.dumps(own), encoding="utf-8")
    page = objectives_page()
    assert column_of(page, "step, × SFT") == shown({}) | {"dft": "1.3", "ppo": "2.4"}
    assert "3 rounds on an x86_64 CPU, one thread, 2026-02-01" in page and "\n0.3 × a step of SFT" in page


def column_of(page: str, name: str) -> dict[str, str]:
    """A column of the page's first table, by objective."""
    head, _, *rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")][
        : len(built_in()) + 2
    ]
    return {row[0].partition("]")[0].strip("["): row[head.index(name)] for row in rows}


@pytest.mark.slow
def test_a_step_is_measured_with_what_the_objective_needs() -> None:
    assert set(measured()) == {one.name for one in built_in() if not is_composite(one)}
    some = ["sft", "ppo", "dpo", "opd", "kto"]
    found = measure(some, rows=8, rounds=1, steps=1)
    assert list(found["relative_to_sft"]) == some
    assert all(0 < low == mid == high for low, mid, high in found["relative_to_sft"].values())
    assert found["relative_to_sft"]["ppo"][1] > found["log_probs"][1] > 0


@pytest.mark.slow
def test_plug_ins_do_not_change_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    before = objectives_page()
    point = EntryPoint("own", "test_catalogue:Own", "rlzoo.objectives")
    monkeypatch.setattr(objective_module._objectives, "_filled", False)
    monkeypatch.setattr(registry_module, "entry_points", lambda group: [point] * (group == point.group))
    assert "own" in list_objectives()
    assert objectives_page() == before
    (row,) = (row for row in catalogue()["objectives"] if row["name"] == "own")
    assert row["summary"] == ""  # it has no docstring


class Own(Objective):
    name = "own"

    def coefficients(self, batch: Any) -> Any:
        raise NotImplementedError


@over_built_ins
def test_a_docstring_says_what_the_page_needs(objective: type[Objective]) -> None:
    summary, text = (objective.__doc__ or "").splitlines()[0], docstring(objective)
    form = r"[A-Z][^:]+: ∇L = .+\." if is_composite(objective) else r"[A-Z][^:]+: c_t = .+\."
    assert re.fullmatch(form, summary), f"{objective.name}: write 'Full name: c_t = ….'"
    if objective.source:
        assert objective.source in text
        assert re.fullmatch(r"arXiv \d{4}\.\d{5}|doi 10\.\d+/\S+", objective.source)
        assert re.search(r"\bSources?:|\(arXiv", text)
    else:
        assert "Source: none" in text, f"{objective.name} has no source: say so in its docstring"
    assert all(re.search(r"arXiv \d{4}\.\d{5}", found) for found in re.findall(r"arXiv\s+.{10}", text, re.DOTALL))


def letters(text: str) -> str:
    """Without white space and the signs of code."""
    return re.sub(r"[`\s]", "", text)


@over_built_ins
def test_markdown_shows_a_section_as_its_docstring_reads(objective: type[Objective]) -> None:
    """Rendered by CommonMark: no emphasis, no HTML, no heading or list that the docstring does not have."""
    page = PAGE.read_text(encoding="utf-8")
    section = re.split(r"\n##+ ", page.split(f"\n### {objective.name}\n", 1)[1])[0]
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(section)
    spans = [span for token in tokens for span in token.children or []]
    assert {token.type for token in tokens} <= {
        "paragraph_open", "paragraph_close", "inline", "fence",
        "bullet_list_open", "bullet_list_close", "list_item_open", "list_item_close",
        *(f"{part}_{side}" for part in ("table", "thead", "tbody", "tr", "th", "td") for side in ("open", "close")),
    }  # fmt: skip
    assert {span.type for span in spans} <= {"text", "softbreak", "code_inline", "link_open", "link_close"}
    shown = [token.content if token.type == "fence" else "" for token in tokens]
    for i, token in enumerate(tokens):
        shown[i] += "".join(span.content for span in token.children or [])
    bullets = sum(token.type == "list_item_open" for token in tokens)
    assert bullets == len(re.findall(r"^- ", docstring(objective), re.MULTILINE))
    text = letters(re.sub(r"^- ", "", docstring(objective), flags=re.MULTILINE))
    assert letters("".join(shown))[: len(text)] == text
    assert f"algorithms/{objective.__module__.rsplit('.', 1)[1]}.py" in section


def test_every_link_on_the_page_leads_somewhere() -> None:
    page = PAGE.read_text(encoding="utf-8")
    headings = set(re.findall(r"^### (.+)$", page, re.MULTILINE))
    assert headings == {objective.name for objective in built_in()}
    for target in re.findall(r"\]\(([^)]+)\)", page):
        if target.startswith("#"):
            assert target[1:] in headings
        elif not target.startswith("https://"):
            assert (PAGE.parent / target.split("#")[0]).is_file(), target


def test_needs_that_depend_on_an_option_are_told() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "| needs | reference; with `ema`: moving reference |" in page
    assert "| needs | behaviour, reference; with `kl_coefficient` = 0: behaviour |" in page
    assert "| `variant` | `zero` or `down` | `zero` |" in page
    assert "| `weights` | `Mapping[str, float \\| Mapping[float, float]]` | none: required |" in page


def test_the_page_tells_how_each_is_checked() -> None:
    """Every objective has its paper's loss in tests/canonical.py, where `test_objectives` looks for it."""
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| [")]
    checked = {row[0].split("[")[1].split("]")[0]: row[-3] for row in rows}
    assert set(checked) == set(CANONICAL) | set(CANONICAL_IN_LOGITS)
    others = {name: objective_class(name).compared_with for name in checked}
    assert checked == {name: f"formula, {other}" if other else "formula" for name, other in others.items()}
    assert checked["grpo"] == "formula, TRL 1.16" and checked["trsft"] == "formula"


SOURCE = '''\
"""A module.

With two paragraphs."""

# a comment
from a import (
    b,  # another
)


class C:
    """A docstring."""

    d: int = 1
    """Of a field,
    on two lines."""

    def e(self):
        return """a string
that is code"""
'''


def test_lines_of_code() -> None:
    # three of the import, the class, the field, the def, and two of the string that is returned
    assert lines_of_code(SOURCE) == 8


def test_prose() -> None:
    text = (
        "A ``b`` of `dft` and `other` (arXiv 2508.05629, eq. 9).\n\n    x = 1\n      y\n\n- ``dft``: doi 10.1007/BF1."
    )
    assert prose(text, ["dft"]) == (
        "A `b` of [`dft`](#dft) and `other` ([arXiv 2508.05629](https://arxiv.org/abs/2508.05629), eq. 9).\n\n"
        "```text\nx = 1\n  y\n```\n\n- [`dft`](#dft): [doi 10.1007/BF1](https://doi.org/10.1007/BF1)."
    )
