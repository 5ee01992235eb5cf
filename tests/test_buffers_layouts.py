"""Data in the layouts that people have: UltraFeedback, ShareGPT, Alpaca, graded samples; renamed columns."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_templates import built

from rlzoo.buffers import OfflineBuffer, from_trl, read_buffer
from rlzoo.buffers.problems import load_problems
from rlzoo.config import ProblemSource, Training
from rlzoo.errors import UserError
from rlzoo.objective import get_objective
from rlzoo.policy import load_policy
from rlzoo.policy.microbatches import log_probs
from rlzoo.training import train, with_behaviour
from rlzoo.types import Selection
from rlzoo.worlds.tokenizer import build_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chat() -> Any:
    made = build_tokenizer()
    made.chat_template = TEMPLATE
    return made


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def turn(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


ASKED, GOOD, BAD = says("user", "1+1"), says("assistant", "2"), says("assistant", "3")
SYSTEM = says("system", "S")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1+1", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "1+1", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "1+1", "chosen": GOOD, "rejected": BAD},
        {"instruction": "1+1", "input": "", "chosen": "2", "rejected": "3"},
        {"conversations": [turn("human", "1+1")], "chosen": turn("gpt", "2"), "rejected": turn("gpt", "3")},
    ],
)
def test_preferences_beside_a_prompt_of_text(chat: Any, row: dict[str, Any]) -> None:
    extra = {"messages": [ASKED, GOOD], "score_chosen": 8.0}
    buffer = from_trl([{**row, **extra} if "prompt" in row else row], chat)
    assert [(t.prompt, t.completion, t.reward) for t in buffer] == [("u:1+1\na:", "2", 1.0), ("u:1+1\na:", "3", 0.0)]
    assert buffer.view(Selection.PAIRS).units == ((0, 1),)
    assert buffer[0].messages == [ASKED]


def test_the_prompt_of_whole_conversations_is_what_they_share(chat: Any) -> None:
    row = {"prompt": "1+1", "chosen": [SYSTEM, ASKED, GOOD], "rejected": [SYSTEM, ASKED, BAD]}
    assert from_trl([row], chat)[0].messages == [SYSTEM, ASKED]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"conversations": [turn("human", "1"), turn("gpt", "2")]}, "u:1\na:"),
        ({"conversations": [turn("system", "S"), turn("human", "1"), turn("gpt", "2")]}, "s:S\nu:1\na:"),
        ({"system": "S", "conversations": [turn("human", "1"), turn("gpt", "2")]}, "s:S\nu:1\na:"),
        ({"system": "", "conversations": [says("user", "1"), GOOD]}, "u:1\na:"),
        ({"messages": [turn("human", "1"), turn("gpt", "2")]}, "u:1\na:"),
        (
            {"conversations": [turn("human", "1"), turn("gpt", "?"), turn("observation", "3"), turn("gpt", "2")]},
            "u:1\na:?\nt:3\na:",
        ),
        ({"conversations": [turn("Human", "1"), turn("GPT", "2")]}, "u:1\na:"),
        ({"conversations": [{"role": "user", "value": "1"}, {"from": "gpt", "content": "2"}]}, "u:1\na:"),
        ({"messages": json.dumps([says("user", "1"), GOOD])}, "u:1\na:"),
        ({"instruction": " ", "input": "1", "output": "2"}, "u:1\na:"),
        ({"instruction": "1", "input": None, "output": "2"}, "u:1\na:"),
        ({"instruction": "1", "input": "x", "output": "2"}, "u:1\n\nx\na:"),
        ({"instruction": "1", "output": "2", "system": "S", "history": [["5", "6"]]}, "s:S\nu:5\na:6\nu:1\na:"),
        ({"prompt": "1", "completion": [GOOD]}, "u:1\na:"),
        ({"prompt": "1", "completion": [says("user", "1"), GOOD]}, "u:1\na:"),
    ],
)
def test_conversations_and_instructions_are_read(chat: Any, row: dict[str, Any], prompt: str) -> None:
    (made,) = from_trl([row], chat)
    assert (made.prompt, made.completion, made.source, made.columns) == (prompt, "2", "demonstration", {})


def test_alpaca_without_a_chat_template_has_its_own_prompt(tokenizer: Any) -> None:
    (made,) = from_trl([{"instruction": "Add.", "input": "1+1", "output": "2"}], tokenizer)
    assert made.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1+1\n\n### Response:\n")
    (made,) = from_trl([{"instruction": "Add.", "input": None, "output": "2"}], tokenizer)
    assert "### Input" not in made.prompt and "None" not in made.prompt
    with pytest.raises(UserError, match="row 1: the tokenizer has no chat template"):
        from_trl([{"conversations": [turn("human", "1"), turn("gpt", "2")]}], tokenizer)


# Graded samples

GRADED = [
    {"prompt": "1+1=", "completion": "2", "reward": 1, "id": 0},
    {"prompt": "1+1=", "completion": "3", "reward": False, "id": 1},
    {"prompt": "1+2=", "completion": "3", "reward": "0.75", "id": 2},
]


def test_rows_with_rewards_are_samples(tokenizer: Any) -> None:
    buffer = from_trl(GRADED, tokenizer)
    assert [(row.source, row.reward, row.columns) for row in buffer] == [
        ("policy", 1.0, {"id": 0}),
        ("policy", 0.0, {"id": 1}),
        ("policy", 0.75, {"id": 2}),
    ]
    assert buffer.view(Selection.CORRECT).units == ((0,), (2,))
    assert buffer.view(Selection.PAIRS).units == ((0, 1),), "samples of one prompt, whatever ids they have"
    (plain,) = from_trl(GRADED[:1], tokenizer, columns={"reward": None})
    assert (plain.source, plain.reward) == ("demonstration", None)


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_scored_conversations_are_no_demonstrations(chat: Any, column: str) -> None:
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "3"}]
    (disliked,) = from_trl([{column: turns, "label": False}], chat)
    (graded,) = from_trl([{column: turns, "reward": 0.25}], chat)
    (shown,) = from_trl([{column: turns}], chat)
    assert (disliked.source, disliked.reward) == ("preference", 0.0)
    assert (graded.source, graded.reward) == ("policy", 0.25)
    assert (shown.source, shown.reward) == ("demonstration", None)
    for row in (disliked, graded):
        assert (row.prompt_ids, row.completion_ids) == (shown.prompt_ids, shown.completion_ids)
    with pytest.raises(UserError, match="no value in column 'label'"):
        from_trl([{column: turns, "label": None}], chat)


def test_columns_of_other_names_stand_for_those_of_a_format(tokenizer: Any) -> None:
    nested = {"question": "1+1=", "one": {"ok": True, "said": "2"}, "two": {"ok": False, "said": "3"}}
    columns: dict[str, Any] = {"prompt": "question", "completion": "one.said", "reward": "one.ok"}
    assert [(row.completion, row.reward) for row in from_trl([nested], tokenizer, columns=columns)] == [("2", 1.0)]
    columns |= {"completion": ["one.said", "two.said"], "reward": ["one.ok", "two.ok"]}
    buffer = from_trl([nested], tokenizer, columns=columns)
    assert [(row.completion, row.reward) for row in buffer] == [("2", 1.0), ("3", 0.0)]
    listed = {"instruction": "1+1=", "completions": [{"text": "2", "score": 7.5}, {"text": "3", "score": 2}]}
    columns = {"prompt": "instruction", "completion": "completions.text", "reward": "completions.score"}
    assert [row.reward for row in from_trl([listed], tokenizer, columns=columns)] == [7.5, 2.0]
    with pytest.raises(UserError, match=r"--column completion=NAME"):
        from_trl([{"prompt": "1", "response": "2", "helpfulness": 3}], tokenizer)


@pytest.mark.slow
def test_samples_without_behaviour_log_probs_can_have_those_of_the_policy() -> None:
    policy = load_policy("embedded")
    buffer = from_trl(GRADED, policy.tokenizer)
    settings = {"steps": 1, "batch_size": 3}
    grpo = get_objective("grpo")
    with pytest.raises(UserError, match=r"3 samples have a reward but no behaviour log-probs.*behaviour: current"):
        train(policy, grpo, buffer, Training(**settings))
    expected = log_probs(policy, next(buffer.ids()))
    record = train(policy, grpo, buffer, Training(**settings, behaviour="current"))
    told = "behaviour log-probs of 3 samples were computed with the policy before training (behaviour: current)"
    assert record.events[0] == told
    assert record.steps[0]["ratio"] == pytest.approx(1.0)
    record = train(policy, get_objective("rloo"), buffer, Training(**settings, behaviour="current"))
    assert record.events[0] == told, "groups need them, whether or not the objective has a ratio"
    mixed = get_objective("mixture", weights={"rft": 1.0, "grpo": 1.0})
    assert train(policy, mixed, buffer, Training(**settings, behaviour="current")).events[0] == told
    assert told not in train(policy, get_objective("rft"), buffer, Training(**settings, behaviour="current")).events
    known = buffer.with_behaviour_logp([[-1.0] * len(expected[0]), None, None])
    scored, which = with_behaviour(known, load_policy("embedded"))
    assert which == [1, 2]
    assert scored.column("behaviour_logp")[0] == [-1.0] * len(expected[0]), "what was recorded stays"
    assert scored.column("behaviour_logp")[1:] == [pytest.approx(logp) for logp in expected[1:]]
    assert with_behaviour(scored, load_policy("embedded")) == (scored, [])


# The longest completion


def test_completions_are_cut_to_the_longest_that_is_asked_for(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "1+1=", "completion": "222"}\n{"prompt": "1+1=", "completion": "2"}'
    )
    buffer = read_buffer(str(tmp_path / "rows.jsonl"), tokenizer, max_completion_tokens=2)
    assert [(row.completion, len(row.completion_ids), row.truncated) for row in buffer] == [
        ("22", 2, True),
        ("2", 2, False),
    ]


@pytest.mark.parametrize("save", [OfflineBuffer.save, OfflineBuffer.to_parquet, OfflineBuffer.to_jsonl])
def test_demonstrations_of_a_saved_buffer_are_cut_and_samples_are_not(
    tmp_path: Path, tokenizer: Any, save: Callable[[Any, Path], None]
) -> None:
    rows = from_trl([{"prompt": "1", "completion": "222"}], tokenizer)
    rows = rows.with_values("reference_logp", [[-1.0, -2.0, -3.0, -4.0]])
    rows = rows.concatenate(from_trl([{"prompt": "1", "completion": "222", "reward": 1}], tokenizer))
    path = tmp_path / {"save": "b", "to_parquet": "b.parquet", "to_jsonl": "b.jsonl"}[save.__name__]
    save(rows, path)
    cut, sample = read_buffer(str(path), tokenizer, max_completion_tokens=2)
    assert (cut.completion, len(cut.completion_ids), cut.truncated, cut.reference_logp) == ("22", 2, True, [-1.0, -2.0])
    assert (len(sample.completion_ids), sample.truncated) == (4, False)
    assert list(read_buffer(str(path), tokenizer, max_completion_tokens=4)) == list(rows)


def test_a_conversation_may_be_the_json_text_that_a_csv_file_has(tmp_path: Path, chat: Any) -> None:
    shared, sides = [ASKED], {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    made = from_trl([{name: json.dumps(value) for name, value in sides.items()}], chat)
    assert [row.messages for row in made] == [shared, shared] and [row.completion for row in made] == ["2", "3"]
    (row,) = from_trl([{"prompt": json.dumps(shared), "completion": json.dumps([GOOD])}], chat)
    assert (row.prompt, row.completion) == ("u:1+1\na:", "2")
    text = '[{"value": 1}]'
    assert from_trl([{"prompt": "1", "completion": text}], chat)[0].completion == text, "an answer may be JSON"
    with (tmp_path / "p.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt"], [json.dumps(shared)]])
    assert load_problems(ProblemSource(source=str(tmp_path / "p.csv")))[0].prompt == shared


@pytest.mark.parametrize("column", ["conversation", "conversations"])
def test_llama_factorys_names(chat: Any, column: str) -> None:
    turns = [turn("human", "1+1"), turn("gpt", "2")]
    for row in ({column: turns}, {"conversation": None, "conversations": None, "messages": None, column: turns}):
        assert from_trl([row], chat)[0].completion == "2"
    rows = [{column: turns, "kto_tag": True}, {"instruction": "1+1", "output": "3", "kto_tag": False}]
    assert [(row.source, row.reward) for row in from_trl(rows, chat)] == [("preference", 1.0), ("preference", 0.0)]


CALL = {"name": "rate", "arguments": {"of": "USD"}}
TOOLS = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + ' ' + (c.function.arguments | tojson) }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


@pytest.mark.parametrize(
    "value", [json.dumps(CALL), json.dumps([CALL]), "<think>\nUSD?\n</think>\n" + json.dumps(CALL)]
)
def test_sharegpts_calls_of_tools_are_those_of_the_template(chat: Any, value: str) -> None:
    tokenizer, thought = built(TOOLS), value[: value.rfind(">") + 1]
    asked = [turn("human", "USD?"), turn("function_call", value)]
    (row,) = from_trl([{"conversations": asked}], tokenizer)
    assert tokenizer.decode(row.completion_ids) == thought + '<call>rate {"of": "USD"}\n<eos>'
    (later,) = from_trl([{"conversations": [*asked, turn("observation", "0.9"), turn("gpt", "It is 0.9")]}], tokenizer)
    assert later.prompt == f"u:USD?\na:{thought}<call>rate " + '{"of": "USD"}\nt:0.9\na:'
    with pytest.raises(UserError, match="does not render 'tool_calls'"):
        from_trl([{"conversations": asked}], chat)


FUNCTION = {"name": "rate", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize(
    ("tools", "shown"),
    [
        (json.dumps([FUNCTION]), [WRAPPED]),  # as LLaMA-Factory writes them
        ([FUNCTION], [WRAPPED]),
        ([json.dumps(FUNCTION)], [WRAPPED]),
        (json.dumps([WRAPPED]), [WRAPPED]),
        ("", None),
        (" ", None),
        (None, None),
        ("[]", None),
    ],
)
@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_sharegpts_tools_are_those_of_the_template(column: str, tools: Any, shown: Any) -> None:
    tokenizer = built("{% if tools %}tools:{{ tools | tojson }}\n{% endif %}" + TOOLS)
    (row,) = from_trl([{column: [turn("human", "USD?"), turn("gpt", "0.9")], "tools": tools}], tokenizer)
    asked = [{"role": "user", "content": "USD?"}]
    assert row.prompt == tokenizer.apply_chat_template(asked, tools=shown, add_generation_prompt=True, tokenize=False)
    assert ("tools:" in row.prompt) == (shown is not None)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{}], "row 1: column 'tools' has an entry without a name"),
        (["rate"], "row 1: column 'tools' has an entry without a name"),
        ("rate()", "row 1: column 'tools' is text that is not JSON"),
        (3, "row 1: column 'tools' holds an int: give a list"),
    ],
)
def test_tools_that_are_none(chat: Any, tools: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_trl([{"conversations": [turn("human", "USD?"), turn("gpt", "0.9")], "tools": tools}], chat)


def test_errors_name_a_column_as_the_table_does(chat: Any) -> None:
    with pytest.raises(UserError, match="row 1: column 'response' is empty or blank"):
        from_trl([{"prompt": "1", "response": ""}], chat, columns={"completion": "response"})
