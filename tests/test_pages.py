"""Pages with tables and figures of studies: made again by a command, and in step with committed outcomes in docs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlzoo import cli
from rlzoo.comparison import pages, studies
from rlzoo.document import Table
from rlzoo.errors import UserError

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/results.md", "docs/dft.md", "docs/puzzles.md")
NUMBER = r"[+−]?\d[\d,.]*"
ESTIMATE = re.compile(rf"({NUMBER})(?: points?| %)? \[({NUMBER}), ({NUMBER})\]")
"""A number with its interval."""


@pytest.mark.slow
def test_a_page_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Before.\n\n<!-- table: facts results-facts; rows: dft, sft; columns: greedy -->\n| old |\n|---|\n| 1 |\n\n"
        "Between.\n\n<!-- figure: facts results-0 -->\n![bars](figures/bars.svg)\n<!-- a comment -->\n| my own |\n"
    )
    assert cli.main(["results", "refresh", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}: 2 tables and figures, 2 files changed\n"
    assert page.read_text() == (
        "Before.\n\n<!-- table: facts results-facts; rows: dft, sft; columns: greedy -->\n| algorithm | greedy (%) |\n"
        "|:---|---:|\n| sft | **95.4 [92.5, 97.2]** |\n| dft | 82.0 [76.5, 86.5] |\n\n"
        "Between.\n\n<!-- figure: facts results-0 -->\n![bars](figures/bars.svg)\n<!-- a comment -->\n| my own |\n"
    )
    assert ">unseen-facts<" not in (svg := (tmp_path / "figures/bars.svg").read_text()) and ">sft-low<" in svg
    assert cli.main(["results", "refresh", str(page)]) == 0
    assert capsys.readouterr().out.endswith("2 tables and figures, 0 files changed\n")


@pytest.mark.parametrize(
    ("marker", "reason"),
    [
        ("<!-- table: fact results-facts -->", "line 2: unknown study 'fact': did you mean 'facts'?"),
        (
            "<!-- table: facts results-facts; rows: sft, dtf -->",
            "line 2: unknown row of the table 'dtf': did you mean 'dft'?",
        ),
        ("<!-- table: facts results-facts; columns: best -->", "line 2: unknown column of the table 'best'"),
        ("<!-- table: facts results-facts; row: sft -->", "line 2: unknown option of a marker 'row'"),
        ("<!-- comparison: dft sftt -->", "line 2: unknown algorithm 'sftt'"),
        ("<!-- figure: facts results-0 -->\nText", "line 2: the figure 'results-0' needs an image below its marker"),
        ("<!-- table: facts results-facts -->\n![a](a.svg)", "line 2: an image is below the marker"),
        ("no marker", "has no marker, such as <!-- table:"),
    ],
)
def test_a_wrong_marker_is_named(marker: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Text\n{marker}\n")
    assert cli.main(["results", "refresh", str(page)]) == 2
    error = capsys.readouterr().err
    assert reason in error and str(page) in error and error.count("\n") == 1
    assert page.read_text() == f"Text\n{marker}\n", "nothing is written"


@pytest.mark.slow
def test_an_unknown_part_is_named() -> None:
    with pytest.raises(UserError, match="unknown table of facts 'results-fact': did you mean 'results-facts'"):
        pages.refreshed("<!-- table: facts results-fact -->\n", ROOT)


@pytest.mark.slow
def test_the_docs_follow_from_committed_outcomes() -> None:
    """Their tables and figures, and each number with an interval in their text, which is that of a table.

    Numbers may be the difference in the other order, and without its sign. One test, because all pages share reports.
    """
    tables = [file.read_text(encoding="utf-8") for file in studies.STUDIES.glob("*/*.csv")]
    texts = *reports(), *tables, (ROOT / "docs/variance.md").read_text(encoding="utf-8")
    known = {estimate for text in texts for estimate in estimates(text)}
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        again, figures = pages.refreshed(text, (ROOT / page).parent)
        assert again == text, f"rlzoo results refresh {page}"
        for file, svg in figures.items():
            assert words(svg) == words(file.read_text(encoding="utf-8")), f"rlzoo results refresh {page}"
        unknown = [one for one in estimates(text) if one not in known]
        assert not unknown, f"{page}: numbers that no table has"


DOCUMENTS = sorted(str(file.relative_to(ROOT)) for file in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))


@pytest.mark.parametrize("page", DOCUMENTS)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        place, _, anchor = target.partition("#")
        file = (ROOT / page).parent / place if place else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file), f"{page}: {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S), flags=re.M
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.slow
def test_the_experiment_for_data_of_ones_own_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (experiment,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/dft.md").read_text(encoding="utf-8"), flags=re.S)
    row = json.dumps({"question": "1 plus 1?", "solution": r"So \boxed{2}", "answer": "2"}) + "\n"
    for name in re.findall(r"\w+\.jsonl", experiment):
        (tmp_path / name).write_text(row)
        experiment = experiment.replace(name, str(tmp_path / name))
    (tmp_path / "mine.yaml").write_text(experiment)
    assert cli.main(["compare", str(tmp_path / "mine.yaml"), "--dry-run"]) == 0
    assert "27 cells" in capsys.readouterr().out


def words(svg: str) -> list[str]:
    """The labels of a figure, as far as versions of matplotlib agree on them."""
    return re.findall(r"<text\b[^>]*>([^<]*)</text>", svg)


def estimates(text: str) -> Iterator[tuple[float, ...]]:
    """The numbers with intervals in a text, each turned so that it is positive."""
    for found in ESTIMATE.findall(" ".join(text.split())):
        value, low, high = (float(one.replace(",", "").replace("−", "-").rstrip(".")) for one in found)
        if (value, low + high) < (0, 0):
            value, low, high = -value, -high, -low
        yield value, low, high


def reports() -> tuple[str, ...]:
    """The tables of all studies' reports."""
    found = []
    for study in studies.list_studies():
        parts = pages.parts_of(study)
        parts.known |= {(type(part), name): part for name, part in parts.made}
        tables = [part for part in parts.known.values() if isinstance(part, Table)]
        found.append("\n".join(entry.text for table in tables for row in table.rows for entry in row))
    return tuple(found)
