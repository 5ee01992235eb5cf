"""What a command that fails leaves where it was told to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlzoo.errors import UserError
from rlzoo.outputs import new_output


def test_a_failed_run_takes_nothing_of_others_with_it(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(RuntimeError), new_output(runs / "a" / "deep"):
        (runs / "a" / "deep" / "half.json").write_text("{")
        (runs / "b").mkdir()  # another command, meanwhile
        (runs / "b" / "results.json").write_text("{}")
        raise RuntimeError("out of luck")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == [
        "runs",
        "runs/b",
        "runs/b/results.json",
    ]


def test_a_failed_run_removes_the_folders_it_made(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_output(tmp_path / "runs" / "a"):
        raise RuntimeError("out of luck")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_of_the_user_stays(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_output(tmp_path):
        (tmp_path / "half.json").write_text("{")
        raise RuntimeError("out of luck")
    assert tmp_path.is_dir() and list(tmp_path.iterdir()) == []


def test_a_failed_file_is_removed_and_a_present_one_kept(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with pytest.raises(RuntimeError), new_output(file, "file"):
        file.write_text("half")
        raise RuntimeError("out of luck")
    assert not file.exists()
    file.write_text("mine")
    with pytest.raises(UserError, match="exists already"), new_output(file, "file"):
        pytest.fail("must not come here")
    assert file.read_text() == "mine"
