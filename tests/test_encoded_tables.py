"""Tables are tokenised in batches, with the tokens and the messages of rows that are read one by one; and once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from chat_templates import TEMPLATES, tokenizer_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlzoo.buffers import OfflineBuffer, cache, formats, from_trl, problems, read_buffer
from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.problems import Problem, demonstrations
from rlzoo.buffers.schema import to_row
from rlzoo.config import OnBadRow
from rlzoo.errors import UserError
from rlzoo.policy.encoding import Special, encode_batch
from rlzoo.policy.turns import Steps
from rlzoo.types import Trajectory
from rlzoo.worlds.tokenizer import build_tokenizer

Rows = list[dict[str, Any]]


def one_by_one(tokenizer: Any, rows: Iterable[Steps[Any]]) -> list[Any]:
    """`encode_batch` as its definition says: the steps of a row alone, and a call of the tokenizer per text."""
    found: list[Any] = []
    for steps in rows:
        try:
            text, special = next(steps)
            while True:
                text, special = steps.send(tokenizer(text, add_special_tokens=special)["input_ids"])
        except StopIteration as over:
            found.append(over.value)
        except UserError as error:
            found.append(error)
    return found


def outcome(rows: Rows, tokenizer: Any, mode: OnBadRow, special: Special, longest: int | None, cut: int | None) -> Any:
    """All that reading rows gives: the buffer or the error, and what is told of bad and of cut rows."""
    bad = BadRows(mode)
    try:
        found: Any = [to_row(row) for row in from_trl(rows, tokenizer, longest, cut, bad=bad, special_tokens=special)]
    except UserError as error:
        return str(error)
    return found, bad.lines(), bad.summary()


TEXT = st.lists(
    st.sampled_from(
        ["1+1=", "2", " ", "\n", "5", "is", "é", "中", "<eos>", "<|im_end|>", "<think>", "</think>", "<pad>"]
    ),
    max_size=5,
).map("".join)
ASKED, ANSWERED = (st.fixed_dictionaries({"role": st.just(role), "content": TEXT}) for role in ("user", "assistant"))
REWARD = st.sampled_from([0, 1.5, "x", None])
FORMS = {
    "text": st.fixed_dictionaries({"text": TEXT}),
    "demonstrations": st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}),
    "graded": st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT, "reward": REWARD}),
    "preferences": st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}),
    "conversations": st.fixed_dictionaries({"messages": st.tuples(ASKED, ANSWERED).map(list)}),
    "preferred answers": st.fixed_dictionaries(
        {"prompt": st.tuples(ASKED).map(list), **dict.fromkeys(("chosen", "rejected"), st.tuples(ANSWERED).map(list))}
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("template", [None, "chatml", "r1", "qwen3"])
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_in_batches_are_rows_one_by_one(
    template: str | None, form: str, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build_tokenizer() if template is None else tokenizer_of(template)
    rows = data.draw(st.lists(st.one_of(FORMS[form], FORMS[form], *FORMS.values()), max_size=12))
    mode: OnBadRow = data.draw(st.sampled_from(["reject", "drop"]))
    special: Special = data.draw(st.sampled_from(["reject", "allow"]))
    limits = data.draw(st.sampled_from([(None, None), (8, None), (None, 2)]))
    together = outcome(rows, tokenizer, mode, special, *limits)
    with monkeypatch.context() as patched:
        patched.setattr(formats, "encode_batch", one_by_one)
        patched.setattr(formats, "BATCH", 1)
        assert outcome(rows, tokenizer, mode, special, *limits) == together


def table(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(rows: int, **more: Any) -> Rows:
    return [{"prompt": f"{number}+1=", "completion": f"{number + 1}", **more} for number in range(rows)]


class Counting:
    """What a tokenizer was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
        self.texts: list[list[str]] = []
        call = type(tokenizer).__call__

        def counted(own: Any, text: Any, **options: Any) -> Any:
            self.texts.append([text] if isinstance(text, str) else list(text))
            return call(own, text, **options)

        monkeypatch.setattr(type(tokenizer), "__call__", counted)


def test_a_fast_tokenizer_is_called_on_batches(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called = Counting(monkeypatch, tokenizer)
    from_trl(numbered(500), tokenizer)
    assert len(called.texts) <= 6
    assert max(map(len, called.texts)) == 499


def test_solutions_are_tokenised_in_batches_too(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [Problem(str(n), f"{n}+1=", {}, (f"{n + 1}", "<eos>2" if n % 7 == 0 else f" {n + 1}")) for n in range(300)]
    made.insert(7, Problem("empty", "", {}, ("1",)))
    with monkeypatch.context() as patched:
        patched.setattr(problems, "encode_batch", one_by_one)
        patched.setattr(problems, "BATCH", 1)
        alone = BadRows("drop")
        expected = demonstrations(tokenizer, made, 1, alone, tokens_of)
    called, together = Counting(monkeypatch, tokenizer), BadRows("drop")
    assert demonstrations(tokenizer, made, 1, together, tokens_of) == expected
    assert (together.lines(), together.dropped) == (alone.lines(), alone.dropped)
    assert 50 < together.dropped < 200
    assert len(called.texts) <= 12


def tokens_of(prompt: Sequence[int], completion: Sequence[int]) -> None:
    """A model that cannot take every third row."""
    if sum(prompt) % 3 == 0:
        raise UserError("has a sum that the model cannot take")


def test_a_damaged_row_comes_after_the_bad_rows_before_it(tokenizer: Any, tmp_path: Path) -> None:
    rows = [*numbered(3), {"prompt": "1", "completion": None}, *numbered(3)]
    path = Path(table(tmp_path / "rows.csv", []))
    path.write_text("prompt,completion\n1,2\n3,\n" + "1,2\n" * 5 + '1,"2" 3\n')
    with pytest.raises(UserError, match=r"row 2: .*completion"):
        read_buffer(str(path), tokenizer)
    with pytest.raises(UserError, match=r"line 9 is not CSV"):
        read_buffer(str(path), tokenizer, bad=BadRows("drop"))
    with pytest.raises(UserError, match=r"line 4: no value in column 'completion'"):
        read_buffer(table(tmp_path / "rows.jsonl", [*rows, 5]), tokenizer)


# The cache


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return cache.folder()


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many batches of rows were encoded since the last question."""
    batches = list[int]()

    def counted(*arguments: Any) -> Any:
        batches.append(1)
        return encode_batch(*arguments)

    monkeypatch.setattr(formats, "encode_batch", counted)

    def since() -> int:
        found = len(batches)
        batches.clear()
        return found

    return since


def rows_of(buffer: Iterable[Trajectory]) -> list[Any]:
    return [to_row(row) for row in buffer]


def test_a_table_is_tokenised_once(tokenizer: Any, kept: Path, tmp_path: Path, tokenised: Callable[[], int]) -> None:
    rows = [*numbered(20, level={"a": [1, None]}), {"prompt": "1+1=", "completion": None}]
    path, states = table(tmp_path / "rows.jsonl", rows), []
    for _ in range(2):
        bad = BadRows("drop")
        buffer = read_buffer(path, tokenizer, 1, bad=bad)
        states.append((rows_of(buffer), bad.lines(), bad.summary()))
        assert (tokenised() > 0) == (len(states) == 1)
    assert states[0] == states[1]
    assert states[0][2] is not None
    assert "rows.jsonl line 21" in states[0][1][0]
    assert "completions cut" in states[0][1][1]


@pytest.mark.slow
def test_a_change_of_anything_that_decides_on_tokens_is_noticed(
    kept: Path, tmp_path: Path, tokenised: Callable[[], int], make_policy: Callable[..., Any]
) -> None:
    tokenizer, other = build_tokenizer(), build_tokenizer()
    other.add_tokens(["+1"])
    path = table(tmp_path / "rows.jsonl", numbered(5, other="7"))
    policy = make_policy()
    fits = policy.row_check()
    changes: list[Callable[[], OfflineBuffer]] = [
        lambda: read_buffer(path, tokenizer),
        lambda: read_buffer(path, other),
        lambda: read_buffer(path, tokenizer, 1),
        lambda: read_buffer(path, tokenizer, columns={"completion": "other"}),
        lambda: read_buffer(path, tokenizer, split="train[:3]"),
        lambda: read_buffer(path, tokenizer, special_tokens="allow"),
        lambda: read_buffer(path, tokenizer, bad=BadRows("drop")),
        lambda: read_buffer(path, tokenizer, fits=fits),
    ]
    made = []
    for change in changes:
        made.append(rows_of(change()))
        assert tokenised()
    for change, rows in zip(changes, made, strict=True):
        assert rows_of(change()) == rows
        assert not tokenised()
    read_buffer(path, tokenizer, fits=lambda prompt, completion: None)  # a function may do anything
    read_buffer(path, tokenizer, fits=lambda prompt, completion: None)
    assert tokenised() >= 2
    tokenizer.chat_template = TEMPLATES["chatml"]
    read_buffer(path, tokenizer)
    assert tokenised()
    table(tmp_path / "rows.jsonl", numbered(6))
    assert len(read_buffer(path, tokenizer)) == 6


def test_what_the_tokenizer_did_last_changes_nothing(kept: Path, tmp_path: Path, tokenised: Callable[[], int]) -> None:
    tokenizer, path = build_tokenizer(), table(tmp_path / "rows.jsonl", numbered(5))
    read_buffer(path, tokenizer)
    tokenizer(["1", "1+1"], padding=True, truncation=True, max_length=2)
    tokenised()
    read_buffer(path, tokenizer)
    assert not tokenised()


@pytest.mark.parametrize("damage", ["a byte", "no rows", "no end", "no sense"])
def test_a_damaged_cache_is_made_again(
    tokenizer: Any, kept: Path, tmp_path: Path, tokenised: Callable[[], int], damage: str
) -> None:
    path = table(tmp_path / "rows.jsonl", numbered(50))
    expected = rows_of(read_buffer(path, tokenizer))
    (rows,), (notes,) = kept.glob("*.arrow"), kept.glob("*.json")
    content = rows.read_bytes()
    match damage:
        case "a byte":
            rows.write_bytes(content[:-2000] + bytes([content[-2000] ^ 1]) + content[-1999:])
        case "no end":
            rows.write_bytes(content[: len(content) // 2])
        case "no rows":
            rows.unlink()
        case _:
            notes.write_text("{")
    tokenised()
    assert rows_of(read_buffer(path, tokenizer)) == expected
    assert tokenised()
    assert rows_of(read_buffer(path, tokenizer)) == expected
    assert not tokenised()


def test_what_has_not_been_used_for_a_month_is_removed(
    tokenizer: Any, kept: Path, tmp_path: Path, tokenised: Callable[[], int]
) -> None:
    def age() -> None:
        for file in kept.iterdir():
            before = file.stat().st_mtime - 86_400 * (cache.KEPT_DAYS + 1)
            os.utime(file, (before, before))

    first, second, third = (table(tmp_path / f"{n}.jsonl", numbered(n)) for n in (5, 6, 7))
    read_buffer(first, tokenizer)
    read_buffer(second, tokenizer)
    (kept / ".rows-of-a-killed-process.partial").write_text("")
    (kept / "folder").mkdir()
    age()
    tokenised()
    used = read_buffer(first, tokenizer)
    assert not tokenised() and len(list(kept.iterdir())) == 6, "nothing is removed by reading"
    read_buffer(third, tokenizer)
    assert {file.suffix for file in kept.iterdir()} == {".json", ".arrow", ""}
    assert len(list(kept.iterdir())) == 5
    tokenised()
    assert len(read_buffer(first, tokenizer)) == len(used) == 5 and not tokenised()
    read_buffer(second, tokenizer)
    assert tokenised()


def test_a_refused_table_leaves_nothing(tokenizer: Any, kept: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 21"):
        read_buffer(table(tmp_path / "rows.jsonl", [*numbered(20), {"prompt": "1", "completion": None}]), tokenizer)
    assert not list(kept.iterdir())


def test_caching_can_be_switched_off_and_may_be_impossible(
    tokenizer: Any, kept: Path, tmp_path: Path, tokenised: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(tmp_path / "rows.jsonl", numbered(5))
    datasets.disable_caching()
    try:
        expected = rows_of(read_buffer(path, tokenizer))
    finally:
        datasets.enable_caching()
    assert not kept.exists() or not list(kept.iterdir())
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")  # no folder can be made there
    assert rows_of(read_buffer(path, tokenizer)) == expected


@pytest.mark.parametrize("cached", [True, False])
def test_many_rows_are_in_a_file_and_not_in_memory(
    tokenizer: Any, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    monkeypatch.setattr(cache, "BATCH", 10)
    monkeypatch.setattr(cache, "CHUNK", 50)
    rows = numbered(93)
    if cached:
        buffer = read_buffer(table(tmp_path / "rows.jsonl", rows), tokenizer)
    else:
        assert not from_trl(rows[:50], tokenizer).rows.cache_files
        buffer = from_trl(rows, tokenizer)
    assert buffer.rows.cache_files
    assert [row.prompt for row in buffer] == [row["prompt"] for row in rows]
    assert len(list(kept.iterdir())) == 2 * cached  # a file without a name ends with its last user
    buffer.release_pages()
    buffer.save(tmp_path / "saved")
    assert rows_of(OfflineBuffer.load(tmp_path / "saved")) == rows_of(buffer)
