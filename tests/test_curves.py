"""The map of losses for demonstrations: its numbers, and the committed page, table and figure."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import matplotlib as mpl
import pytest
import torch

from rlzoo import objective as objective_module
from rlzoo.cli import main
from rlzoo.cli.curves import ALTERNATIVES, AT, COMMAND, GRID, Curve, curves, files_of, markdown_of, weight_of
from rlzoo.errors import UserError
from rlzoo.inputs import Column, Critic, Input
from rlzoo.objective import Objective, get_objective, list_objectives, objective_class, register
from rlzoo.types import Coefficients, Selection, TokenBatch

DOCS = Path(__file__).parents[1] / "docs"
MARK = "<!-- table: rlzoo list --curves -->"


@pytest.fixture(autouse=True)
def leave_the_registry_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    list_objectives()
    entries = objective_module._objectives._entries
    monkeypatch.setattr(objective_module._objectives, "_entries", dict(entries))


@pytest.fixture(scope="module")
def found() -> tuple[list[Curve], dict[str, str]]:
    return curves(AT)


def test_every_objective_for_demonstrations_is_shown_or_told_why(found: tuple[list[Curve], dict[str, str]]) -> None:
    at, skipped = found
    shown = {name.split(" ")[0] for one in at for name in one.names}
    demonstrations = {
        name for name in list_objectives() if objective_class(name).learns_from is Selection.DEMONSTRATIONS
    }
    assert shown - {"rft"} | set(skipped) == demonstrations - {"mixture"}
    assert skipped == {"otr": "it draws tokens", "dft-control": "its weight depends on the other tokens of the batch"}


P = (0.001, 0.1, 0.25, 0.6, 0.9)


def test_weights_by_hand() -> None:
    """With one other token the entropy is that of a coin, and Σ π² is p² + (1 - p)²; with 1,000, those of many."""

    def weights(name: str, others: int = 1, **options: float) -> list[float]:
        values: list[float] = weight_of(get_objective(name, **options), P, others).tolist()
        return values

    coin = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in P]
    for others in ALTERNATIVES:
        assert weights("sft", others) == pytest.approx([1] * 5)
        assert weights("dft", others) == pytest.approx(P)
        assert weights("asft", others) == pytest.approx(P)
        assert weights("trsft", others) == pytest.approx([0.01, 1, 1, 1, 1])
        assert weights("memft", others) == pytest.approx([1, 1, 1, 0, 0])
        assert weights("gift", others, beta=2.0) == pytest.approx([p / (p + 1 / math.expm1(2)) for p in P])
    assert weights("eaft") == pytest.approx([h / math.log(20) for h in coin])
    assert weights("deft") == pytest.approx([p ** (p**2 + (1 - p) ** 2) for p in P])
    many = [p ** (p**2 + (1 - p) ** 2 / 1000) for p in P]
    assert weights("deft", 1000) == pytest.approx(many)
    entropy = [h + (1 - p) * math.log(1000) for h, p in zip(coin, P, strict=True)]
    exponents = [min(max(math.exp(-math.log(p) - h), 0.1), 2.0) for p, h in zip(P, entropy, strict=True)]
    assert weights("idft", 1000) == pytest.approx([p**gamma for p, gamma in zip(P, exponents, strict=True)])


@dataclass(frozen=True)
class Own(Objective):
    """Own: c_t = p_t², or p_t times an input."""

    name: ClassVar[str] = "own"

    needs: str = ""

    @property
    def requires(self) -> tuple[Input, ...]:
        return {"": (), "critic": (Critic(),), "column": (Column("hardness"),)}[self.needs]

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients((2 * batch.logp).exp())


def test_plug_ins_are_shown_too() -> None:
    register(Own)
    found, _ = curves(P)
    (own,) = (one for one in found if "own" in one.names)
    assert not own.needs_entropy and own.weights[1] == pytest.approx([p**2 for p in P])


@pytest.mark.parametrize("needs", ["critic", "column"])
def test_an_input_that_is_not_known_is_an_error(needs: str) -> None:
    with pytest.raises(UserError, match=r"value|hardness"):
        weight_of(Own(needs=needs), P, 1)


def test_the_page_has_the_table(found: tuple[list[Curve], dict[str, str]]) -> None:
    page = (DOCS / "losses.md").read_text(encoding="utf-8")
    assert COMMAND in page
    table = page.partition(f"{MARK}\n\n")[2].partition("\n\n")[0]
    assert (table == markdown_of(found[0])) is True, f"paste after {MARK}:\n{markdown_of(found[0])}"


@pytest.mark.slow
def test_the_figure_and_its_numbers_are_those_of_the_code() -> None:
    found, _ = curves(GRID)
    files = files_of(found)
    kept = {name: (DOCS / "figures" / name).read_text(encoding="utf-8") for name in files}
    ours, theirs = (list(csv.DictReader(one["loss-curves.csv"].splitlines())) for one in (files, kept))
    names = ("objective", "other_tokens", "p")
    assert [[row[x] for x in names] for row in ours] == [[row[x] for x in names] for row in theirs], f"run: {COMMAND}"
    weights = [[float(row["weight"]) for row in rows] for rows in (ours, theirs)]
    assert weights[0] == pytest.approx(weights[1], rel=1e-3, abs=1e-6), f"run: {COMMAND}"
    if f"matplotlib=={mpl.__version__}" in (DOCS.parent / "constraints.txt").read_text().split():
        assert (files["loss-curves.svg"] == kept["loss-curves.svg"]) is True, f"run: {COMMAND}"


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--curves", "--out", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert "trsft" in out and "otr is not shown: it draws tokens" in out
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"loss-curves.csv", "loss-curves.svg"}
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--curves", "--json"), "--json and --curves: give one"), (("--out", "x"), "give --curves with it")],
)
def test_wrong_arguments(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", *arguments]) == 2
    assert message in capsys.readouterr().err
