"""Data sets from files and from the Hub, and the errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlzoo.buffers import load_table
from rlzoo.errors import UserError

ROWS: list[dict[str, Any]] = [{"question": "1+1?", "answer": 2}, {"question": "a,\n“b”", "answer": 3}]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "lines.json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    table = datasets.Dataset.from_list(ROWS)
    match suffix:
        case "json":
            path.write_text(json.dumps(ROWS, indent=1))
        case "csv":
            table.to_csv(path)
        case "parquet":
            table.to_parquet(path)
        case _:
            path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS) + "\n", encoding="utf-8")
    assert load_table(path).to_list() == load_table(str(path), split="train").to_list() == ROWS


def test_a_column_that_a_row_lacks_is_null_there(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"b": {"c": [2.5]}}\n')
    assert load_table(tmp_path / "rows.jsonl").to_list() == [{"a": 1, "b": None}, {"a": None, "b": {"c": [2.5]}}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "empty.jsonl has no rows: it is empty"),
        ("blank.jsonl", "\n \n", "blank.jsonl has no rows: it is empty"),
        ("empty.json", "[]", "empty.json has no rows: it is empty"),
        ("empty.csv", "", "empty.csv has no rows: it is empty"),
        ("header.csv", "a,b\n", "header.csv has no rows: it is empty"),
        ("bad.jsonl", '{"a": 1}\n\n{"a": 1,}\n', "bad.jsonl line 3 is not JSON: "),
        ("list.jsonl", '{"a": 1}\n[1]\n', "list.jsonl line 2 is a list: every line must be an object"),
        ("types.jsonl", '{"a": 1}\n\n{"a": 2}\n{"a": "x"}\n', "types.jsonl line 4: column 'a' holds a value (str)"),
        ("bad.json", '[\n{"a": 1},\n{"a" 1}]', "bad.json line 3 is not JSON: "),
        ("list.json", '[{"a": 1}, 2]', "list.json row 2 is a int: every row must be an object"),
        ("ragged.csv", "a,b\n1,2\n3\n", "ragged.csv is not a readable CSV file: CSV parse error: Row #3"),
        ("bad.parquet", "PAR", "bad.parquet is not a readable Parquet file"),
        ("rows.xlsx", "x", "rows.xlsx has the ending '.xlsx': give one of .jsonl, .json, .parquet, .csv"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        load_table(tmp_path / name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_text_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl is not UTF-8 text \(byte 7\)"):
        load_table(tmp_path / "latin.jsonl")


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    for name in ("rows.jsonl", "./rows", str(tmp_path / "rows"), tmp_path / "rows.csv"):
        with pytest.raises(UserError, match=r"rows.* does not exist: give a file"):
            load_table(name)
    with pytest.raises(UserError, match="is a folder: give a file"):
        load_table(tmp_path)


def test_a_hub_id_may_name_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(repo: str, config: str | None, split: str | None) -> datasets.Dataset:
        asked.append((repo, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert load_table("openai/gsm8k:main", split="train").to_list() == ROWS
    assert load_table("rajpurkar/squad", split="test[:2]").to_list() == ROWS
    assert asked == [("openai/gsm8k", "main", "train"), ("rajpurkar/squad", None, "test[:2]")]


def test_the_split_must_be_said_if_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    with pytest.raises(UserError, match="openai/gsm8k:main has the splits train, test: say which with split"):
        load_table("openai/gsm8k:main")
    del splits["test"]
    assert load_table("openai/gsm8k:main").to_list() == ROWS


def test_what_the_hub_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(message: str) -> None:
        def hub(*_: object, **__: object) -> None:
            raise ValueError(message)

        monkeypatch.setattr(datasets, "load_dataset", hub)

    refuse("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\nExample")
    with pytest.raises(UserError, match="write openai/gsm8k:NAME with one of 'main', 'socratic'"):
        load_table("openai/gsm8k", split="train")
    refuse("Bad split: dev.\nAvailable splits: train, test")
    with pytest.raises(UserError, match=r"openai/gsm8k .*\(Bad split: dev\.\): check the name") as error:
        load_table("openai/gsm8k:main", split="dev")
    assert "\n" not in str(error.value)


def test_a_hub_id_that_cannot_be_had_offline_is_one_line() -> None:
    with pytest.raises(UserError, match="nobody/nothing is neither a file here nor a data set") as error:
        load_table("nobody/nothing")
    assert "\n" not in str(error.value)
