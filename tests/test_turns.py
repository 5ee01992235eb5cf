"""Messages of prompts and completions in saved buffers: they come back as given, and reach rewards and TRL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from buffer_rows import sample, samples
from chat_templates import CALLS, WITH_TOOLS, assistant, built, turn, user

from rlzoo.buffers import SCHEMA, OfflineBuffer, from_trl, overview, to_trl
from rlzoo.buffers.card import buffer_card
from rlzoo.buffers.schema import CONVERSATIONS, arrow, to_dataset
from rlzoo.errors import UserError
from rlzoo.rollout.rescoring import rescored
from rlzoo.types import Trajectory


def call(**arguments: Any) -> dict[str, Any]:
    function = {"name": "add", "arguments": arguments}
    return {**assistant(""), "tool_calls": [{"id": "c1", "type": "function", "function": function}]}


RESULT = {**turn("tool", "2"), "tool_call_id": "c1", "name": "add"}
PROMPTS: list[list[dict[str, Any]] | None] = [
    [user("1+1?"), call(a=1, b=[1, None]), RESULT],
    [user([{"type": "text", "text": "1"}, {"type": "image", "path": None}]), assistant("")],
    [user("½ 😀"), {**assistant("2"), "reasoning_content": "one\nand one", "weight": 0}],
    [],
    None,
]
COMPLETIONS: list[list[dict[str, Any]] | None] = [
    [{**call(x="1"), "content": None}, {**RESULT, "content": ["2", {"text": "3"}]}, assistant("2")],
    [{"role": "assistant", "tool_calls": []}],
    [{**assistant("2"), "name": None, "extra": "e"}],
    None,
    [assistant("2")],
]


def conversations() -> list[Trajectory]:
    pairs = zip(PROMPTS, COMPLETIONS, strict=True)
    return [sample(n, 1.0, messages=one, completion_messages=other) for n, (one, other) in enumerate(pairs)]


# Storage


def saved(buffer: OfflineBuffer, path: Path) -> OfflineBuffer:
    write: dict[str, Callable[[Path], None]] = {".parquet": buffer.to_parquet, ".jsonl": buffer.to_jsonl}
    write.get(path.suffix, buffer.save)(path)
    return OfflineBuffer.load(path)


@pytest.mark.parametrize("name", ["folder", "b.parquet", "b.jsonl"])
def test_messages_come_back_with_the_keys_that_they_had_and_no_others(tmp_path: Path, name: str) -> None:
    rows = conversations()
    buffer = samples(*rows)
    loaded = saved(buffer, tmp_path / name)
    for one in (buffer, loaded, loaded.concatenate(buffer), loaded.with_rewards([2.0] * len(rows))):
        assert [one.column(which) for which in CONVERSATIONS] == [
            PROMPTS * (len(one) // 5),
            COMPLETIONS * (len(one) // 5),
        ]
    assert list(loaded) == rows and loaded.rows.features == SCHEMA
    assert list(saved(loaded, tmp_path / f"again-{name}")) == rows


@pytest.mark.parametrize("name", ["folder", "b.parquet", "b.jsonl"])
def test_a_buffer_of_an_earlier_version_is_read(tmp_path: Path, name: str) -> None:
    rows = [sample(0, 1.0, messages=[user("1"), assistant("2")]), sample(1, 0.0), sample(2, 0.0, messages=[])]
    path, before = tmp_path / name, [("role", pa.string()), ("content", pa.string())]
    table = arrow(samples(*rows).rows).drop_columns("completion_messages")
    place, messages = table.schema.get_field_index("messages"), pa.array([r.messages for r in rows])
    assert messages.type == pa.list_(pa.struct(before))
    old = to_dataset(table.set_column(place, "messages", messages))
    if path.suffix == ".jsonl":
        lines = [{key: value for key, value in vars(row).items() if key != "completion_messages"} for row in rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif path.suffix == ".parquet":
        old.to_parquet(path)
    else:
        old.save_to_disk(path)
    loaded = OfflineBuffer.load(path)
    assert list(loaded) == rows and loaded.rows.features == SCHEMA
    assert list(loaded.concatenate(samples(*conversations()))) == [*rows, *conversations()]


def test_what_json_cannot_hold_is_named() -> None:
    picture = {**user("1"), "image": b"x"}
    with pytest.raises(UserError, match=r"^key of a message 'image' holds a bytes, which JSON cannot hold: drop or"):
        samples(sample(0, 1.0, messages=[picture]))
    with pytest.raises(UserError, match="row 1 of the data set: completion_messages has a message without content"):
        samples(sample(0, 1.0, completion_messages=[{"role": "assistant", "content": None}]))


# Rewards, and what a buffer holds


def test_a_reward_of_conversations_gets_the_turns_of_a_saved_buffer(tmp_path: Path) -> None:
    seen = list[tuple[Any, Any]]()

    def told_two(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [float(any(m["role"] == "tool" and m["content"] == "2" for m in said)) for said in completions]

    alone = [*WITH_TOOLS[:2], assistant("2")]
    data = [{"messages": WITH_TOOLS, "reward": 0.5}, {"messages": alone, "reward": 0.5}]
    old = saved(from_trl(data, CALLS, turns="all"), tmp_path / "b.parquet")
    new = rescored(old, told_two)
    assert seen == [(WITH_TOOLS[:2], WITH_TOOLS[2:]), (WITH_TOOLS[:2], alone[2:])]
    assert new.column("reward") == [1.0, 0.0]
    assert list(new.with_rewards([0.5, 0.5])) == list(old)


def test_the_overview_and_the_card_count_completions_of_several_turns() -> None:
    masked = sample(9, 1.0, completion_ids=[3, 4], completion_mask=[True, False], behaviour_logp=None)
    buffer = samples(*conversations(), masked)
    assert overview(buffer)["turns"] == {"several": 1, "text": 1}
    told = "1 of 6 completions have several; 1 have masked tokens but not their messages"
    assert told in buffer_card(buffer, "b", "A buffer.", {}, {})
    assert "have several" not in buffer_card(samples(sample(0, 1.0)), "b", "A buffer.", {}, {})


# TRL


def test_tool_calls_and_results_go_to_trl_and_come_back() -> None:
    data: list[dict[str, Any]] = [
        {"prompt": [user("1+1?"), call(a=1), RESULT], "completion": [assistant("2")]},
        {"prompt": [user("2+2?")], "completion": [call(b="2")]},
        {"prompt": [user("3+3?")], "completion": [{**assistant("6"), "reasoning_content": "three and three"}]},
    ]
    reasons = built(CALLS.chat_template.replace("+ m.content", "+ (m.reasoning_content or '') + m.content"))
    buffer = from_trl(data, reasons)
    assert [row.completion_messages for row in buffer] == [None, data[1]["completion"], data[2]["completion"]]
    out = to_trl(buffer, "prompt_completion")
    assert out[0]["prompt"][1]["tool_calls"][0]["function"]["arguments"]["a"] == 1
    assert list(from_trl(out, reasons)) == list(buffer), "without the nulls that Arrow fills in"
    with pytest.raises(
        UserError, match=r"is a message with more than its text, such as tool calls: write conversations"
    ):
        to_trl(buffer, "prompt_completion", conversational=False)
    assert [row["prompt"] for row in to_trl(buffer, "prompt_only")][1][0]["content"] == "2+2?"
