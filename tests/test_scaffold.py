"""``rlzoo new objective``: what it writes works at once, its test can fail, and nothing is overwritten."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from comparisons import Ended, forked

from rlzoo.cli import main

ROOT = Path(__file__).parents[1]
FORMULA = "(self.alpha * batch.logp).exp()"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def new(name: str, *options: str) -> None:
    assert main(["new", "objective", name, *options]) == 0


def refused(capsys: pytest.CaptureFixture[str], name: str, *options: str) -> str:
    """The line that ``rlzoo new objective`` refuses a name with. It must leave everything as it was."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    capsys.readouterr()
    assert main(["new", "objective", name, *options]) == 2
    out, errors = capsys.readouterr()
    assert out == "" and errors.startswith("rlzoo: ") and errors.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    return errors


def pytested(*arguments: str) -> Ended:
    """Run pytest in this folder."""
    return forked(lambda: pytest.main(["-q", *arguments]))


@pytest.mark.slow
def test_its_test_passes_and_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a folder with nothing else in it, by the lines that the command prints."""
    new("My_Tempered")
    told = capsys.readouterr().out
    assert len(told.splitlines()) <= 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my_tempered.py", "test_my_tempered.py"]
    command = re.search(r"^  2\. pytest (.+)$", told, re.MULTILINE)
    compared = re.search(r"^  3\. rlzoo compare arithmetic --algorithms sft,(.+)$", told, re.MULTILINE)
    assert command is not None and compared is not None
    tested = pytested(command[1])
    assert tested.status == 0 and "3 passed" in tested.out, tested.out

    rows = [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ["train", compared[1], "--option", "alpha=0.25", "--buffer", "rows.jsonl", "--steps", "2"]
    trained = forked(lambda: main([*train, "--set", "batch_size=4", "--out", "out"]))
    assert trained.status == 0, trained.errors
    steps = json.loads((tmp_path / "out" / "training.json").read_text())["steps"]
    assert [row["step"] for row in steps] == [1, 2] and steps[0]["gradient_norm"] > 0


WRONG = {
    "wrong-sign": (f"-{FORMULA}", "not that of the loss: it has the opposite sign"),
    "wrong-power": ("(2 * self.alpha * batch.logp).exp()", "not that of the loss"),
    "wrong-length": (f"{FORMULA} / batch.logp.shape[1]", "depends on how far rows are padded"),
    "wrong-loss": (f"{FORMULA}, loss={FORMULA}", "reports the loss"),
    "looks-at-padding": (f"{FORMULA} * batch.logp.sum().sign().neg()", "depends on masked positions"),
    "looks-at-rows": (f"{FORMULA} / {FORMULA}[batch.mask].sum()", "depends on how a batch is split"),
    "one-a-row": (f"{FORMULA}[:, :1]", "give one per token"),
    "not-listed": ("batch.logp - batch.reference_logp", "the batch has no 'reference_logp'"),
}
"""Objectives that are wrong: what takes the place of the coefficient, and what its test must say."""


@pytest.mark.slow
def test_its_test_fails_for_an_objective_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each wrong one its own test fails, and one that is right passes beside them."""
    monkeypatch.setenv("COLUMNS", "400")  # or pytest cuts what a failed test says
    new("right-one")
    for name, (changed, _) in WRONG.items():
        new(name)
        file = tmp_path / f"{name.replace('-', '_')}.py"
        text = file.read_text()
        assert text.count(FORMULA) == 1
        file.write_text(text.replace(FORMULA, changed))
    done = pytested("-rf", "--tb=no", "-k", "not right_one or 0.5")  # the others of its test take as long and pass, too
    assert done.status == 1, done.out
    failed = re.findall(r"^FAILED test_\w+\.py::test_(\w+)\[.*?\] - AssertionError: (.+)$", done.out, re.MULTILINE)
    assert {name.replace("_", "-") for name, _ in failed} == set(WRONG), done.out
    for name, (_, told) in WRONG.items():
        assert any(test.replace("_", "-") == name and told in message for test, message in failed), name


@pytest.mark.slow
def test_in_a_clone_it_joins_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clone = tmp_path / "clone"
    for name in ("rlzoo", "algorithms", "rewards", "experiments"):
        shutil.copytree(ROOT / name, clone / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (clone / "tests").mkdir()
    for name in ("canonical.py", "conftest.py"):
        shutil.copy(ROOT / "tests" / name, clone / "tests")
    shutil.copy(ROOT / "pyproject.toml", clone)
    new("tempered", "--folder", "clone")
    told = capsys.readouterr().out
    assert len(told.splitlines()) <= 6
    assert "add that loss as 'tempered' to CANONICAL in clone/tests/canonical.py" in told
    assert "rlzoo list --markdown > docs/objectives.md\n" in told and told.endswith("--algorithms sft,tempered\n")
    written = ["algorithms/tempered.py", "tests/test_tempered.py"]
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    command = [sys.executable, "-m", "pytest", "-q", written[1], "-k", "0.5"]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for arguments in (["check"], ["format", "--check"]):  # by the rules of this repository
        command = [sys.executable, "-m", "ruff", *arguments, *written]
        linted = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
        assert linted.returncode == 0, linted.stdout
    assert "exists already" in refused(capsys, "tempered", "--folder", "clone")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("IW_SFT", "'iw-sft' is registered already"),
        ("1st", "letters, digits and dashes, a letter first"),
        ("two words", "letters, digits and dashes"),
        ("../up", "letters, digits and dashes"),
        ("a--b", "letters, digits and dashes"),
        ("", "letters, digits and dashes"),
        ("token-batch", "TokenBatch means something else"),
        ("lambda", "Lambda means something else"),
        ("none", "None means something else"),
        ("torch", "torch.py would hide the module 'torch'"),
    ],
)
def test_names_that_cannot_be(name: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in refused(capsys, name)


@pytest.mark.parametrize("there", ["mine.py", "test_mine.py"])
def test_nothing_is_overwritten(there: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(there).write_text("of a user")
    assert f"'{there}' exists already" in refused(capsys, "mine")
    new("mine", "--folder", "new/folder")
    assert sorted(path.name for path in Path("new/folder").iterdir()) == ["mine.py", "test_mine.py"]
    assert f"'{there}/yours.py' cannot be written" in refused(capsys, "yours", "--folder", there)


@pytest.mark.slow
def test_the_objective_and_the_reward_of_the_guide_pass_their_contracts() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL)]
    files = ("my_objective.py", "test_my_objective.py", "brevity.py", "test_brevity.py")
    given = {'"my-objective"': '"my_objective.py:MyObjective"', '"brevity"': '"brevity.py:brevity"'}
    for file, text in zip(files, blocks, strict=True):
        for name, spec in given.items():
            text = text.replace(name, spec) if file.startswith("test_") else text
        Path(file).write_text(text)
    check = ["check", files[0], files[2], "--ignore", "I001"]  # tests need no docstrings; rlzoo is not beside them here
    for command in (check, ["format", "--check", *files]):
        run = [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml")]
        linted = subprocess.run(run, capture_output=True, text=True, check=False)
        assert linted.returncode == 0, linted.stdout
    tested = pytested()
    assert tested.status == 0 and "2 passed" in tested.out, tested.out
