"""Pages with tables and figures of studies: made again by a command, and in step with committed outcomes in docs."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlzoo import cli
from rlzoo.cli import pages
from rlzoo.comparison import studies
from rlzoo.comparison.statistics import SIGNIFICANT
from rlzoo.config import load_experiment
from rlzoo.document import Paragraph, Table
from rlzoo.errors import UserError

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/results.md", "docs/dft.md", "docs/puzzles.md", "docs/variance.md")
NUMBER = r"[+−]?\d[\d,.]*"
ESTIMATE = re.compile(rf"({NUMBER})(?: points?| %)? \[({NUMBER}), ({NUMBER})\]")
"""A number with its interval."""
P = r"p [=<] [\d.]*\d(?![\d/])"
TESTED = re.compile(rf"{ESTIMATE.pattern}(?:, |[^.;()\[\]]*\()({P})")
"""A number with its interval and its p-value, in a table or in a sentence."""
MEASURED = re.compile(rf"({NUMBER})(?= (?:%|(?:points?|per cent|nats)\b))")
"""A number without an interval that is one of a study by its unit."""


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
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "reading the studies" not in line]
    assert reason in error and str(page) in error
    assert page.read_text() == f"Text\n{marker}\n", "nothing is written"


@pytest.mark.slow
def test_an_unknown_part_is_named() -> None:
    with pytest.raises(UserError, match="unknown table of facts 'results-fact': did you mean 'results-facts'"):
        pages.refreshed("<!-- table: facts results-fact -->\n", ROOT)


@pytest.mark.slow
def test_the_docs_follow_from_committed_outcomes() -> None:
    """Their tables and figures are those of the studies, and so are the numbers in their text.

    A number with an interval is one of a table, with the p-value beside it; other percentages, points, nats and
    p-values are those of its section's studies, rounded. Numbers may be the difference in the other order, and without
    its sign. One test, because all pages share reports.
    """
    reports = {study: report(study) for study in (*studies.list_studies(), *studies.list_analyses())}
    for table in studies.STUDIES.glob("*/*.csv"):
        reports[table.parent.name] = f"{reports.get(table.parent.name, '')}\n{entries_of(table)}"
    texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    markers = [found for text in texts.values() for found in pages.MARKER.finditer(text)]
    across = "\n".join(found[0] for found in markers if found[1] == "comparison")  # in no report
    every = "\n".join((*reports.values(), across))
    for page, text in texts.items():
        again, figures = pages.refreshed(text, (ROOT / page).parent)
        assert again == text, f"rlzoo results refresh {page}"
        for file, svg in figures.items():
            assert words(svg) == words(file.read_text(encoding="utf-8")), f"rlzoo results refresh {page}"
        for known in (estimates, with_p_values):
            unknown = set(known(text)) - set(known(every))
            assert not unknown, f"{page}: numbers that no table has"
        for heading, told, named in sections(text):
            source = "\n".join((*(reports[name] for name in named), across)) if named else every
            numbers, p_values = numbers_of(source), {*re.findall(P, source), f"p < {SIGNIFICANT}"}
            wrong = [one for one in MEASURED.findall(told) if not rounded(one, numbers)]
            wrong += [one for one in re.findall(P, told) if one not in p_values]
            assert not wrong, f"{page}, {heading!r}: numbers that are not in the reports of {named}"


def test_numbers_in_prose_are_found_and_looked_up() -> None:
    text = "## A\n\nBy 2.5 [1.1, 3.9] points (p = 0.041), or `7 points`, and 6.3 % of\n8 points.\n\n    9 points\n"
    ((heading, told, named),) = sections(text)
    assert (heading, named) == ("A", []) and MEASURED.findall(told) == ["6.3", "8"] and "p = 0.041" in told
    assert list(with_p_values(text)) == [(2.5, 1.1, 3.9, "p = 0.041")]
    assert list(with_p_values("| −2.5 [−3.9, −1.1], p &lt; 0.001 |")) == [(2.5, 1.1, 3.9, "p < 0.001")]
    assert rounded("6.3", [6.25]) and rounded("6", [6.49]) and not rounded("6.3", [6.2, 63, 6.36])


def test_the_papers_numbers_are_those_of_its_experiments() -> None:
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8").partition("## The paper's figures")[2]
    rows = re.findall(r"^\| ([\w.-]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for model, *means in rows:
        reported = load_experiment(f"paper/{model.lower()}").reported
        assert reported is not None
        found = [reported.results[name]["mean"] for name in ("base", "sft", "dft", "iw-sft")]
        assert [float(one) for one in means] == found


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
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    return {anchor(title) for title in re.findall(r"^#+ (.+)$", text, flags=re.M)}


def anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


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
        value, low, high = map(as_number, found)
        if (value, low + high) < (0, 0):
            value, low, high = -value, -high, -low
        yield value, low, high


def report(study: str) -> str:
    """The tables and paragraphs of a study's report."""
    parts = pages.blocks_of(study)
    entries = [
        part.text if isinstance(part, Paragraph) else "\n".join(entry.text for row in part.rows for entry in row)
        for part in parts
        if isinstance(part, Paragraph | Table)
    ]
    return "\n".join(entries)


def entries_of(table: Path) -> str:
    """The rows of a CSV table, a p-value as in other tables: after what it is of."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if "p" in row:
            row["p"] = f"p {row['p']}" if row["p"].startswith("<") else f"p = {row['p']}"
    return "\n".join(", ".join(row.values()) for row in rows)


def with_p_values(text: str) -> Iterator[tuple[object, ...]]:
    """The numbers of a text that have an interval and a p-value, each turned so that it is positive."""
    for *estimate, p in TESTED.findall(" ".join(text.replace("&lt;", "<").split())):
        (turned,) = estimates("{} [{}, {}]".format(*estimate))
        yield *turned, p


def sections(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """The sections of a page, and rows that lead to one: heading, prose, and the studies of it and of where it links.

    Prose is what is neither made by a marker nor code, nor a number with an interval.
    """
    known = {folder.name for folder in studies.STUDIES.iterdir() if folder.is_dir()}
    parts = list(filter(None, re.split(r"^(?=## )", text, flags=re.MULTILINE)))
    own: dict[str, set[str]] = {}
    for part in parts:
        told = [re.split("[ ;]", told)[0] for _, told, _ in pages.MARKER.findall(part)]
        own[anchor(heading_of(part))] = {*told, *re.findall(r"\| `([\w-]+)` \|", part)} & known
    for part in parts:
        rows = re.findall(r"^\|.*\]\(#[\w-]+\) \|$", part, flags=re.MULTILINE)
        rest = re.sub("|".join(map(re.escape, rows)), "", part) if rows else part
        for one in (*rows, rest):
            links = {anchor(heading_of(part)) if one is rest else "", *re.findall(r"\]\(#([\w-]+)\)", one)}
            yield heading_of(one), prose(one), sorted(set().union(*(own.get(link, set()) for link in links)))


def heading_of(part: str) -> str:
    return part.partition("\n")[0].lstrip("# ")


def prose(text: str) -> str:
    code = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|^ {4}[^\n]*$", re.DOTALL | re.MULTILINE)
    return ESTIMATE.sub("", " ".join(code.sub("", pages.MARKER.sub("", text)).split()))


def numbers_of(text: str) -> list[float]:
    """The sizes of all numbers in a text."""
    return [abs(as_number(one)) for one in re.findall(rf"{NUMBER}", text)]


def as_number(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-").rstrip("."))


def rounded(text: str, numbers: list[float]) -> bool:
    """Whether a number is the size of one of the others, rounded to its own digits."""
    digits = len(text.rstrip(".").partition(".")[2])
    return any(abs(one - abs(as_number(text))) <= 0.5 * 10**-digits + 1e-9 for one in numbers)
