"""Buffers: the schema, storage, and what derives one buffer from another."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from buffer_rows import sample, samples
from hypothesis import given, settings
from hypothesis import strategies as st

from rlzoo.buffers import SCHEMA, OfflineBuffer, RolloutBuffer
from rlzoo.buffers.schema import from_row, to_row
from rlzoo.errors import UserError
from rlzoo.jobs.outputs import replacing
from rlzoo.types import Selection, Trajectory

FULL = Trajectory(
    prompt="1+1=?\n",
    completion="2 ½ 😀",
    prompt_ids=[5, 6, 7],
    completion_ids=[8, 1],
    prompt_id="p",
    source="policy",
    reward=0.1,
    reward_components={"format": 0.25, "answer": None},
    behaviour_logp=[-0.5, -math.inf],
    reference_logp=[-0.25, -2.0],
    tempered_reference_logp=[-0.125, -1.0],
    policy_version=3,
    truncated=True,
    temperature=0.6,
    top_p=0.9,
    messages=[{"role": "user", "content": "1+1=?"}, {"role": "tool", "content": "2", "tool_call_id": "c"}],
    completion_messages=[{"role": "assistant", "content": None, "tool_calls": [{"arguments": {"a": 1, "b": None}}]}],
    columns={"answer": 2, "nested": {"steps": [1, 2.5, None, "x"]}},
)
PLAIN = Trajectory("a", "b", [1], [2], "q")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


log_probs = st.floats(width=32, allow_nan=False, max_value=0.0)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
columns: st.SearchStrategy[dict[str, object]] = st.dictionaries(
    texts, st.recursive(st.none() | st.integers() | texts, st.lists, max_leaves=4), max_size=2
)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)
    completion_ids = draw(ids)
    logp = st.none() | st.lists(log_probs, min_size=len(completion_ids), max_size=len(completion_ids))
    parts, others = st.lists(st.fixed_dictionaries({"text": texts}), max_size=2), st.none() | texts | columns
    message = st.fixed_dictionaries(
        {"role": texts, "content": texts | parts}, optional={"name": others, "extra": others}
    )
    messages = st.none() | st.lists(message, max_size=2)
    return Trajectory(
        prompt=draw(texts),
        completion=draw(texts),
        prompt_ids=draw(ids),
        completion_ids=completion_ids,
        prompt_id=draw(texts),
        source=draw(st.sampled_from(["demonstration", "policy", "preference"])),
        reward=draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)),
        reward_components=draw(st.dictionaries(texts, st.none() | st.floats(allow_nan=False), max_size=2)),
        behaviour_logp=draw(logp),
        reference_logp=draw(logp),
        tempered_reference_logp=draw(logp),
        policy_version=draw(st.integers(0, 9)),
        truncated=draw(st.booleans()),
        temperature=draw(st.floats(0, 4, exclude_min=True)),
        top_p=draw(st.floats(0, 1, exclude_min=True)),
        messages=draw(messages),
        completion_messages=draw(messages),
        columns=draw(columns),
    )


# The schema and storage


@pytest.mark.slow
@given(st.lists(trajectories(), max_size=4))
def test_every_trajectory_comes_back_exactly(rows: list[Trajectory]) -> None:
    buffer = OfflineBuffer.from_trajectories(rows)
    assert list(buffer) == rows
    assert [buffer[i] for i in range(len(buffer))] == rows
    assert buffer.at([*range(len(buffer))][::-1] * 2) == rows[::-1] * 2
    assert [from_row(to_row(row)) for row in rows] == rows


@pytest.mark.slow
@given(st.lists(trajectories(), max_size=4))
def test_a_column_is_the_field_of_every_row(rows: list[Trajectory]) -> None:
    buffer = OfflineBuffer.from_trajectories(rows)
    for name in SCHEMA:
        assert buffer.column(name) == [getattr(row, name) for row in rows]
    assert buffer.tokens().tolist() == [len(row.prompt_ids) + len(row.completion_ids) for row in rows]


@pytest.mark.parametrize("suffix", ["", ".parquet", ".jsonl"])
def test_a_saved_buffer_comes_back_exactly(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "deep" / f"buffer{suffix}"
    buffer = samples(FULL, PLAIN)
    write: dict[str, Callable[[Path], None]] = {
        "": buffer.save,
        ".parquet": buffer.to_parquet,
        ".jsonl": buffer.to_jsonl,
    }
    write[suffix](path)
    loaded = OfflineBuffer.load(path)
    assert list(loaded) == [FULL, PLAIN]
    assert loaded.rows.features == SCHEMA
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_saved_folder_opens_memory_mapped(tmp_path: Path) -> None:
    rows = [sample(i, 1.0, text="long text " * 100) for i in range(2000)]
    OfflineBuffer.from_trajectories(rows).save(tmp_path / "b")
    before = pa.total_allocated_bytes()
    loaded = OfflineBuffer.load(tmp_path / "b")
    tripled = loaded.with_rewards([0.0] * 2000).concatenate(loaded).concatenate(loaded)
    assert loaded.rows.cache_files
    assert len(tripled.view(Selection.GROUPS)) == 2000
    assert pa.total_allocated_bytes() - before < 500_000  # the rows are 2 MB a copy


def test_saving_replaces_a_buffer_even_the_one_it_reads_from(tmp_path: Path) -> None:
    samples(FULL, PLAIN).save(tmp_path / "b")
    OfflineBuffer.load(tmp_path / "b").with_rewards([1.0, None]).save(tmp_path / "b")
    assert OfflineBuffer.load(tmp_path / "b").column("reward") == [1.0, None]


def test_saving_never_replaces_what_is_not_a_buffer(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not a buffer: choose another path"):
        samples(PLAIN).save(tmp_path)
    with pytest.raises(UserError, match="is not a buffer"):
        samples(PLAIN).save(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "rows") as beside:
        beside.write_text("half")
        raise RuntimeError
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("rows", "old")]


def test_loading_what_is_no_buffer_names_the_file_and_the_mend(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "bad.parquet").write_text("x")
    datasets.Dataset.from_dict({"prompt": ["a"]}).to_parquet(tmp_path / "other.parquet")
    for name, message in {
        "none": "none does not exist: give a folder",
        "folder": "folder is not a saved buffer",
        "text.txt": "text.txt is not a buffer: give a folder",
        "bad.parquet": "bad.parquet is not a readable Parquet file",
        "other.parquet": "other.parquet has no column 'completion', so it is not a saved buffer",
    }.items():
        with pytest.raises(UserError, match=message):
            OfflineBuffer.load(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": [1.5]}, r"line 2: prompt_ids\.0: input should be a valid integer"),
        ({"prompt_ids": None}, "line 2: prompt_ids: input should be a valid list"),
        ({"label": 1}, "line 2: a buffer has no field 'label': keep it in 'columns'"),
    ],
)
def test_a_bad_line_of_a_jsonl_buffer_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    samples(PLAIN, PLAIN).to_jsonl(tmp_path / "b.jsonl")
    first, second = (tmp_path / "b.jsonl").read_text().splitlines()
    (tmp_path / "b.jsonl").write_text("\n".join([first, json.dumps({**json.loads(second), **change})]))
    with pytest.raises(UserError, match=message):
        OfflineBuffer.load(tmp_path / "b.jsonl")


def test_rows_must_fit_the_schema() -> None:
    rows = samples(FULL).rows
    assert list(OfflineBuffer(rows.select_columns(list(reversed(SCHEMA))).add_column("x", [1]))) == [FULL]
    shuffled = samples(FULL, PLAIN).rows.select([1, 0])
    assert list(OfflineBuffer(shuffled)) == [PLAIN, FULL]
    assert OfflineBuffer(shuffled).column("source") == ["demonstration", "policy"]
    with pytest.raises(UserError, match=r"^row 1 of the data set: prompt_id is null: every row needs one$"):
        OfflineBuffer(datasets.Dataset.from_list([{**to_row(PLAIN), "prompt_id": None}], features=SCHEMA))
    with pytest.raises(UserError, match="no column 'rewards': known: prompt, "):
        samples(FULL).column("rewards")


def test_log_probs_of_another_length_than_the_completion_are_refused() -> None:
    with pytest.raises(ValueError, match="behaviour_logp of prompt 'q' has 2 values for 1 completion tokens"):
        samples(replace(PLAIN, behaviour_logp=[-1.0, -1.0]))


def test_a_column_that_json_cannot_hold_is_named() -> None:
    with pytest.raises(UserError, match="column 'image' holds a bytes, which JSON cannot hold"):
        samples(replace(PLAIN, columns={"id": 1, "image": b"x"}))


def test_push_to_hub_sends_the_rows_to_a_private_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setattr(
        datasets.Dataset, "push_to_hub", lambda rows, name, private: sent.append((name, len(rows), private))
    )
    samples(FULL, PLAIN).push_to_hub("me/rollouts")
    assert sent == [("me/rollouts", 2, True)]


# New buffers from old ones


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system alone decides")
def test_pages_that_were_read_can_be_given_back(tmp_path: Path) -> None:
    def mapped() -> int:
        """How much of the buffer's own files is in memory, in kB."""
        found, is_own = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                is_own = str(tmp_path) in line
            elif is_own and line.startswith("Rss:"):
                found += int(line.split()[1])
        return found

    rows = [replace(FULL, prompt_id=str(i), completion=f"{i} " * 2000) for i in range(2000)]
    OfflineBuffer.from_trajectories(rows).save(tmp_path / "buffer")
    buffer = OfflineBuffer.load(tmp_path / "buffer")
    assert buffer.column("completion") == [row.completion for row in rows]
    assert mapped() > 10_000
    buffer.release_pages()
    assert mapped() < 2_000
    assert [row.completion for row in buffer] == [row.completion for row in rows]


def test_token_values_and_rewards_make_a_new_buffer() -> None:
    buffer = samples(FULL, PLAIN)
    derived = (
        buffer.with_values("reference_logp", [[-1, -2], [-3]])
        .with_behaviour_logp([None, np.array([-4.0])])
        .with_rewards([1, None], [{"a": 1.0, "b": None}, {}])
    )
    assert derived.column("reference_logp") == [[-1, -2], [-3]]
    assert derived.column("behaviour_logp") == [None, [-4]]
    assert derived.column("reward") == [1.0, None]
    assert derived.column("reward_components") == [{"a": 1.0, "b": None}, {}]
    assert derived.rows.features == SCHEMA
    assert list(buffer) == [FULL, PLAIN]
    same = derived.with_behaviour_logp([FULL.behaviour_logp, None])
    for name in ("reference_logp", "tempered_reference_logp"):
        same = same.with_values(name, [getattr(FULL, name), None])
    assert list(same.with_rewards([FULL.reward, None], [FULL.reward_components, {}])) == [FULL, PLAIN]


def test_values_of_the_wrong_length_are_refused() -> None:
    buffer = samples(FULL, PLAIN)
    with pytest.raises(ValueError, match="reference_logp has 1 rows for 2 rows"):
        buffer.with_values("reference_logp", [[-1, -2]])
    with pytest.raises(ValueError, match="behaviour_logp of row 1 has 2 values for 1 completion tokens"):
        buffer.with_behaviour_logp([[-1, -2], [-3, -4]])
    with pytest.raises(ValueError, match="3 rewards for 2 rows"):
        buffer.with_rewards([1, 2, 3])
    with pytest.raises(ValueError, match="1 reward components for 2 rows"):
        buffer.with_rewards([1, 2], [{}])


def test_concatenate_appends() -> None:
    assert list(samples(FULL).concatenate(samples(PLAIN, FULL))) == [FULL, PLAIN, FULL]


@pytest.mark.slow
@settings(max_examples=40)
@given(st.integers(1, 3), st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=5))
def test_a_rollout_buffer_holds_the_newest_versions(capacity: int, batches: list[list[int]]) -> None:
    buffer = RolloutBuffer(capacity)
    held: list[int] = []
    for batch in batches:
        buffer.add(sample(0, 1.0, version=version) for version in batch)
        newest = sorted({*held, *batch})[-capacity:]
        held = [version for version in held + batch if version in newest]
        assert buffer.column("policy_version") == held


def test_a_rollout_buffer_freezes_saves_and_views(tmp_path: Path) -> None:
    buffer = RolloutBuffer(2)
    buffer.add([sample(0, 1.0, version=1), sample(0, 0.0, version=2)])
    frozen = buffer.freeze()
    buffer.save(tmp_path / "b")
    loaded = RolloutBuffer.load(tmp_path / "b")
    assert loaded.view(Selection.PAIRS).units == ((0, 1),)
    loaded.add([sample(1, 1.0, version=3)])
    assert loaded.column("policy_version") == [2, 3]
    assert buffer.column("policy_version") == frozen.column("policy_version") == [1, 2]
    with_rewards = loaded.with_rewards([5, 6])
    assert isinstance(with_rewards, RolloutBuffer)
    assert with_rewards.capacity_versions == 2
    frozen.save(tmp_path / "frozen")
    with pytest.raises(UserError, match=r"is not a rollout buffer: open it with OfflineBuffer\.load"):
        RolloutBuffer.load(tmp_path / "frozen")
    with pytest.raises(UserError, match="capacity_versions of at least 1, got 0"):
        RolloutBuffer(0)
