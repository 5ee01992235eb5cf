"""Data sets from files and from the Hub, and the errors that name the line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from buffer_rows import sample, samples

from rlzoo.buffers import OfflineBuffer, load_table, read_buffer
from rlzoo.buffers.problems import load_problems
from rlzoo.buffers.tables import read_rows
from rlzoo.buffers.values import find
from rlzoo.config import ProblemSource
from rlzoo.config.files import load_experiment
from rlzoo.errors import UserError
from rlzoo.jobs.sharing import hub_id

ROWS: list[dict[str, Any]] = [{"question": "1+1?", "answer": 2}, {"question": "a,\n“b”", "answer": 3}]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere than the data, of whose folder every file is read."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


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
    rows = [{name: str(value) for name, value in row.items()} for row in ROWS] if suffix == "csv" else ROWS
    assert load_table(path).to_list() == load_table(str(path), split="train").to_list() == rows


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sources = ["~/rows.jsonl", "~/*.jsonl"]
    assert [load_table(source).to_list() for source in sources] == [ROWS, ROWS]
    problems = [load_problems(ProblemSource(source=source, prompt="question")) for source in sources]
    assert [problem.prompt for found in problems for problem in found] == [row["question"] for row in ROWS] * 2
    buffer = samples(sample(0, 1.0), sample(1, 0.0))
    buffer.save("~/buffer")
    buffer.to_jsonl("~/buffer.jsonl")
    assert [one.name for one in sorted(tmp_path.glob("buffer*"))] == ["buffer", "buffer.jsonl"]
    for source in ("~/buffer", "~/buffer.jsonl"):
        assert list(OfflineBuffer.load(source)) == list(buffer)
    assert list(read_buffer("~/buffer", None)) == list(buffer)
    (tmp_path / "mine.yaml").write_text("extends: arithmetic\ntrain: {source: ~/rows.jsonl, prompt: question}\n")
    assert load_experiment("~/mine.yaml").train.source == "~/rows.jsonl"
    assert hub_id("~/buffer") is None
    with pytest.raises(UserError, match=r"~nobody-of-that-name/rows.jsonl does not exist"):
        load_table("~nobody-of-that-name/rows.jsonl")


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
        ("list.json", '[{"a": 1}, 2]', "list.json row 2 is an int: every row must be an object"),
        ("number.json", "5", "number.json holds an int: give a list of rows, or one object per line"),
        ("two.json", '{"train": [{"a": 1}], "test": [{"a": 2}]}', "two.json holds several lists of rows (train, test)"),
        ("cut.jsonl", '{"a": "1', "cut.jsonl line 1 is not JSON: Unterminated string starting at column 7"),
        ("twice.csv", "a,b,a\n1,2,3\n", "twice.csv line 1 has the column 'a' more than once"),
        ("lfs.jsonl", "version https://git-lfs.github.com/spec/v1\nsize 1\n", "lfs.jsonl is a Git LFS pointer"),
        ("lfs.parquet", "version https://git-lfs.github.com/spec/v1\nsize 1\n", "lfs.parquet is a Git LFS pointer"),
        ("ragged.csv", "a,b\n1,2\n3\n", "ragged.csv row 2 has 1 values for 2 columns"),
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
    with pytest.raises(UserError, match=r"latin\.jsonl line 1 is not UTF-8 text \(byte 8 of the line\)"):
        load_table(tmp_path / "latin.jsonl")


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    for name in ("rows.jsonl", "./rows", str(tmp_path / "rows"), tmp_path / "rows.csv"):
        with pytest.raises(UserError, match=r"rows.* does not exist: give a file"):
            load_table(name)
    with pytest.raises(UserError, match="is a folder without data: give a file"):
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


def rows_in(folder: Path, *names: str) -> None:
    """JSONL files, one row in each, which says where it is from."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"prompt": name, "completion": "2"}) + "\n")


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("ending", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)]
)
def test_compressed_files_are_read_and_damaged_ones_named(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    for name, content in {"a.jsonl": lines, "b.json": json.dumps(ROWS).encode(), "c.csv": b"question\n1+1?\n"}.items():
        file = tmp_path / f"{name}.{ending}"
        file.write_bytes(compress(content))
        assert load_table(file)[0]["question"] == "1+1?"
        file.write_bytes(compress(content)[:-3])
        with pytest.raises(UserError, match=rf"{name}\.{ending} cannot be read"):
            load_table(file)


def test_a_folder_of_shards_is_one_table(tmp_path: Path, tokenizer: Any) -> None:
    rows_in(tmp_path, "data/train-00001-of-00002.jsonl", "data/train-00000-of-00002.jsonl", ".cache/x.jsonl")
    (tmp_path / "dataset_infos.json").write_text("{}")
    names = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    assert load_table(tmp_path)["prompt"][:] == names
    assert read_buffer(str(tmp_path), tokenizer).column("prompt") == names
    rows_in(tmp_path, "data/test-00000-of-00001.jsonl")
    assert load_table(tmp_path, "train")["prompt"][:] == names
    assert load_table(tmp_path, "train[1:]")["prompt"][:] == names[1:]
    with pytest.raises(UserError, match="has the splits test, train: say which with split"):
        load_table(tmp_path)
    with pytest.raises(UserError, match="has the splits test, train and no 'dev'"):
        load_table(tmp_path, "dev")


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["part-10.jsonl", "part-2.jsonl"], "train", ["part-2.jsonl", "part-10.jsonl"]),
        (["gsm8k_train.jsonl", "gsm8k_test.jsonl"], "test", ["gsm8k_test.jsonl"]),
        (["train/0.jsonl", "dev/0.jsonl"], "validation", ["dev/0.jsonl"]),
        (["train_prefs-00000-of-00001.jsonl", "train_sft-00000-of-00001.jsonl"], "train_sft", None),
    ],
)
def test_names_of_files_and_folders_tell_splits(
    tmp_path: Path, names: list[str], split: str, expected: list[str] | None
) -> None:
    rows_in(tmp_path, *names)
    assert load_table(tmp_path, split)["prompt"][:] == (expected or [n for n in names if n.startswith(split)])


def test_folders_that_cannot_be_one_table_say_what_to_give(tmp_path: Path) -> None:
    rows_in(tmp_path / "configs", "main/train-00000-of-00001.jsonl", "socratic/train-00000-of-00001.jsonl")
    with pytest.raises(UserError, match=r"data in several folders \(main, socratic\): name one of them"):
        load_table(tmp_path / "configs", "train")
    rows_in(tmp_path / "kinds", "a.jsonl", "b.csv")
    with pytest.raises(UserError, match=r"several kinds \(\.csv, \.jsonl\): give a pattern such as .*/kinds/\*\.csv$"):
        load_table(tmp_path / "kinds")


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_in(tmp_path, "a/1.jsonl", "a/b/2.jsonl")
    monkeypatch.chdir(tmp_path)
    assert load_table("a/*.jsonl")["prompt"][:] == ["a/1.jsonl"]
    assert load_table(str(tmp_path / "a/**/*.jsonl"))["prompt"][:] == ["a/1.jsonl", "a/b/2.jsonl"]
    for pattern in ("a/*.csv", "**a/?.jsonl"):
        with pytest.raises(UserError, match="matches no file"):
            load_table(pattern)


def test_shards_of_parquet_agree_or_are_named(tmp_path: Path) -> None:
    for number, value in enumerate([1, 2]):
        datasets.Dataset.from_list([{"a": value}]).to_parquet(tmp_path / f"s-0000{number}-of-00002.parquet")
    assert load_table(tmp_path)["a"][:] == [1, 2]
    datasets.Dataset.from_list([{"a": "x"}]).to_parquet(tmp_path / "s-00001-of-00002.parquet")
    with pytest.raises(UserError, match=r"s-00000-of-00002\.parquet and the files after it have other columns"):
        load_table(tmp_path)


def test_saved_data_sets_are_tables(tmp_path: Path, tokenizer: Any) -> None:
    one = datasets.Dataset.from_list([{"prompt": "1", "completion": "2"}] * 2)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=one.select([0])).save_to_disk(tmp_path / "several")
    assert len(load_table(tmp_path / "one", "train")) == 2
    assert len(load_table(tmp_path / "one", "train[:50%]")) == 1
    assert len(read_buffer(str(tmp_path / "several"), tokenizer, split="test")) == 1
    with pytest.raises(UserError, match="several has the splits train, test: say which with split"):
        read_buffer(str(tmp_path / "several"), tokenizer)
    (next((tmp_path / "one").glob("*.arrow"))).write_bytes(b"")
    with pytest.raises(UserError, match="one is not a readable saved data set"):
        load_table(tmp_path / "one")


def test_json_and_csv_as_programs_write_them(tmp_path: Path) -> None:
    """One object with the rows in it, one object that is the only row, other separators, an unnamed index."""
    row = '{"prompt": "1", "completion": "2"}'
    for name, content in (
        ("data.json", f'{{"version": 1, "data": [{row}]}}'),
        ("one.json", row.replace(",", ",\n")),
        ("chat.json", '{"prompt": "1", "completion": "2", "messages": [{"role": "user", "content": "1"}]}'),
        ("semicolons.csv", "prompt;completion\n1;2\n"),
        ("tabs.csv", "prompt\tcompletion\n1\t2\n"),
        ("unnamed.csv", ",prompt,completion,\n0,1,2,\n"),
    ):
        (tmp_path / name).write_text(content)
        rows = load_table(tmp_path / name)
        assert (rows["prompt"][:], rows["completion"][:]) == (["1"], ["2"]), name


def test_a_parquet_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.Table.from_arrays([pa.array(["1"])] * 2, names=["a", "a"]), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice\.parquet has the column 'a' more than once"):
        list(read_rows(tmp_path / "twice.parquet"))


def test_a_part_of_a_file_is_that_part(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"a": {i}}}\n' for i in range(10)))
    assert load_table(tmp_path / "rows.jsonl", "train[:3]")["a"][:] == [0, 1, 2]
    assert load_table(tmp_path / "rows.jsonl", "test[80%:]")["a"][:] == [8, 9]
    with pytest.raises(UserError, match=r"split 'train\[x\]'"):
        load_table(tmp_path / "rows.jsonl", "train[x]")


@pytest.mark.parametrize(
    "content", ['[{"a": 1},\n {"a": 2}]', '[\n{\n"a": 1\n},\n{"a": 2}]', ' [ {"a": 1}, {"a": 2} ]\n']
)
def test_a_list_of_rows_may_be_called_jsonl(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    assert load_table(tmp_path / "rows.jsonl")["a"][:] == [1, 2]


def test_a_value_that_is_nested_too_deep_is_an_error_where_it_is_used(tmp_path: Path) -> None:
    file = tmp_path / "deep.jsonl"
    file.write_text('{"a": 1, "d": ' + "[" * 900 + "]" * 900 + "}\n")
    ((_, row),) = read_rows(file)
    assert isinstance(row, dict) and find(row, "a") == 1
    with pytest.raises(UserError, match="column 'd' is nested too deep"):
        find(row, "d")


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_an_arrow_file_is_read(tmp_path: Path, new: Callable[..., Any]) -> None:
    table, file = (
        pa.table({"a": pa.array(["x", "y", "x"]).dictionary_encode(), "n": [1, 2, 3]}),
        tmp_path / "rows.arrow",
    )
    with pa.OSFile(str(file), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table)
    assert load_table(file)["a"][:] == ["x", "y", "x"]
    file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(UserError, match=r"rows\.arrow is not a readable Arrow file"):
        load_table(file)


@pytest.mark.parametrize(
    ("name", "content", "place", "key"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 1, "b": 2, "a": 1}\n', "line 2", "a"),
        ("b.jsonl", '{"a": 1}\n{"a": {"b": [{"c": 1, "c": 2}]}}\n', "line 2", "c"),
        ("c.json", '[{"a": 1}, {"a": 1, "a": 2}]', "row 2", "a"),
        ("d.json", '{"a": 1, "a": 1}\n{"a": 2}\n', "line 1", "a"),
        ("e.json", '{"data": [{"a": 1}], "data": [{"a": 2}]}', "", "data"),
    ],
)
def test_a_key_that_is_there_twice_is_named(tmp_path: Path, name: str, content: str, place: str, key: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    where = f"{file} {place}".strip()
    with pytest.raises(UserError, match=f"^{re.escape(where)} has the key '{key}' more than once: keep one"):
        load_table(file)
    if place:
        (wrong,) = (one for one in read_rows(file) if isinstance(one[1], UserError))
        assert wrong[0] == where
