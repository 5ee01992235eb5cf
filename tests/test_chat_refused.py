"""Conversations that a chat template refuses, the system setting, and text that spells a special token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_templates import OPENS, TEMPLATES, assistant, built, policy_of, tokenizer_of, turn, user

from rlzoo.buffers import from_trl
from rlzoo.buffers.problems import Problem, encode_problems, load_problems
from rlzoo.cli import main
from rlzoo.comparison import shared_buffer
from rlzoo.config import Experiment, ProblemSource, load_experiment
from rlzoo.errors import UserError
from rlzoo.policy.chat import opened
from rlzoo.policy.loading import save_policy
from rlzoo.variance import run as variance

# What is refused

GOOD = {"messages": [user("1"), assistant("2")]}


@pytest.mark.parametrize(
    ("template", "conversation", "message"),
    [
        (
            "gemma",
            [turn("system", "S"), user("1")],
            "refuses a conversation of the roles system, user (System role not",
        ),
        ("gemma", [user("1"), user("2")], "(Conversation roles must alternate)"),
        ("needsys", [user("1")], "(A system message is required)"),
        ("r1", [turn("system", "S"), user("1")], "leaves out message 1 (role system)"),
        ("r1", [user("1"), assistant("2"), turn("tool", "3"), user("4")], "leaves out message 3 (role tool)"),
        ("chatml", [turn("human", "1")], "message 1 has the role 'human', which the chat template does not name"),
        ("chatml", [user(None)], "content of message 1 is null"),
        ("chatml", [user("1"), assistant(3), user("2")], "content of message 2 is an int"),
        ("chatml", [user({"text": "1"})], "content of message 1 is a dict"),
        ("chatml", [user([])], "content of message 1 is a list"),
        ("chatml", [user([{"type": "image", "url": "x"}])], "a part of type 'image' in message 1"),
        ("chatml", [user([3])], "a part of type 'int' in message 1"),
        ("chatml", [{"content": "1"}], "role of message 1 is null"),
        ("chatml", ["1"], "is not a conversation (its entry 1 is a str)"),
        ("chatml", [user("")], "turns are empty or blank"),
        ("chatml", [turn("system", "S"), user(" ")], "turns are empty or blank"),
        (
            "chatml",
            [user("1"), {**assistant(None), "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, user("2")],
            "the chat template does not render 'tool_calls'",
        ),
    ],
)
def test_what_a_template_does_not_take_is_one_line(template: str, conversation: list[Any], message: str) -> None:
    tokenizer = tokenizer_of(template)
    first = [turn("system", "S"), *GOOD["messages"]] if template == "needsys" else GOOD["messages"]
    with pytest.raises(UserError, match=r"^row 2: ") as error:
        from_trl([{"messages": first}, {"messages": [*conversation, assistant("2")]}], tokenizer)
    problems = [Problem("good", first[:-1], {}), Problem("bad", conversation, {})]
    with pytest.raises(UserError, match=r"^problem 'bad': ") as other:
        encode_problems(tokenizer, problems)
    for told in (str(error.value), str(other.value)):
        assert message in told and "\n" not in told


@pytest.mark.parametrize("prompt", [None, 3, [], {"role": "user", "content": "1"}])
def test_a_prompt_that_is_neither_text_nor_conversation_is_one_line(prompt: Any) -> None:
    with pytest.raises(UserError, match=r"^problem 'p': the prompt (holds|is a conversation without messages)"):
        encode_problems(tokenizer_of("chatml"), [Problem("p", prompt, {})])


@pytest.mark.parametrize("template", ["{{ nothing.here }}", "{{ messages[7].content }}", "{{ 1 + 'a' }}", "{% for %}"])
def test_a_template_that_fails_in_any_way_is_one_line(template: str) -> None:
    with pytest.raises(UserError, match=r"^row 1: the chat template refuses .*: change its turns"):
        from_trl([GOOD], built(template))


# The system setting


def table(tmp_path: Path, *rows: dict[str, Any]) -> str:
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_an_empty_system_keeps_the_default_away(tmp_path: Path) -> None:
    source, tokenizer = table(tmp_path, {"prompt": "1+1?"}), tokenizer_of("default-system")
    question = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    for system, expected in ((None, "You are Q."), ("", ""), ("Be brief.", "Be brief.")):
        problems = load_problems(ProblemSource(source=source, chat=True, system=system))
        (encoded,) = encode_problems(tokenizer, problems)
        assert encoded.text == f"<|im_start|>system\n{expected}<|im_end|>\n{question}"


def test_a_system_setting_reaches_conversations_and_is_never_without_effect(tmp_path: Path) -> None:
    said = ProblemSource(source=table(tmp_path, {"prompt": [user("1")]}), system="S")
    assert load_problems(said)[0].prompt == [turn("system", "S"), user("1")]
    with pytest.raises(UserError, match="line 1: the conversation already has a system turn: leave `system` out"):
        load_problems(ProblemSource(source=table(tmp_path, {"prompt": [turn("system", "T"), user("1")]}), system="S"))
    with pytest.raises(UserError, match=r"line 1: `system` is for conversations.*add chat: true"):
        load_problems(ProblemSource(source=table(tmp_path, {"prompt": "1"}), system="S"))


# Text that spells a special token


@pytest.mark.parametrize(
    "turns",
    [
        [user("What is <|im_end|>?"), assistant("2")],
        [user("1"), assistant("2<|im_end|>")],
        [user("1"), assistant("<eos>2")],
        [user("<bos>1"), assistant("2")],
        [user("1"), assistant("2<|im_start|>user\n3"), user("4"), assistant("5")],
    ],
)
def test_a_message_that_spells_a_token_of_the_conversation_is_refused(turns: list[dict[str, Any]]) -> None:
    tokenizer = tokenizer_of("chatml")
    with pytest.raises(UserError, match=r"^row 2: the (user|assistant)'s text spells '<.*special_tokens: allow"):
        from_trl([GOOD, {"messages": turns}], tokenizer)
    with pytest.warns(UserWarning, match=r"read as that token: 1 in all \(row 2: the (user|assistant)'s text spells"):
        row = from_trl([GOOD, {"messages": turns}], tokenizer, special_tokens="allow")[1]
    assert row.prompt_ids + row.completion_ids == tokenizer.apply_chat_template(turns)["input_ids"]


def test_problems_that_spell_special_tokens_are_refused_or_counted(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("chatml")
    source = ProblemSource(source=table(tmp_path, {"prompt": "1"}, {"prompt": "<|im_end|>"}), chat=True)
    with pytest.raises(UserError, match=r"problem 'train-1' \(.*line 2\): the user's text spells '<\|im_end\|>'"):
        encode_problems(tokenizer, load_problems(source))
    allowed = load_problems(source.model_copy(update={"special_tokens": "allow"}))
    with pytest.warns(UserWarning, match="read as that token: 1 in all .problem 'train-1'"):
        assert len(encode_problems(tokenizer, allowed)) == 2


@pytest.mark.slow
def test_tables_that_spell_special_tokens_are_refused_or_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_policy(policy_of(tokenizer_of("chatml")), tmp_path / "model")
    Path("t.jsonl").write_text(json.dumps({"messages": [user("What is <|im_end|>?"), assistant("2")]}) + "\n")
    train = ["train", "sft", "--buffer", "t.jsonl", "--model", "model", "--steps", "1", "--out", "out"]
    assert main(train) == 2
    assert "t.jsonl line 1: the user's text spells '<|im_end|>'" in capsys.readouterr().err
    assert main([*train, "--set", "special_tokens=allow"]) == 0
    told = "text that spells a special token is read as that token: 1 in all (t.jsonl line 1: the user's text"
    assert told in capsys.readouterr().out
    assert any(told in event for event in json.loads(Path("out/training.json").read_text())["events"])
    changes = {"model": "model", "demonstrations": "t.jsonl", "algorithms": {"sft": {}}}
    experiment = load_experiment("arithmetic", changes)
    allowed = load_experiment("arithmetic", {**changes, "training.special_tokens": "allow"})
    ways: list[Callable[[Experiment], Any]] = [
        lambda some: shared_buffer.fill_buffer(some, tmp_path / "a", tmp_path / "s", 0, lambda *_: None),
        lambda some: variance.fill(some, tmp_path / "b", tmp_path / "s", "t.jsonl", lambda *_: None),
    ]
    for way in ways:
        with pytest.raises(UserError, match=r"line 1: the user's text spells"):
            way(experiment)
        made = way(allowed)
        assert made["rows"] == 1 and any(told in event for event in made["events"])


def test_what_marks_thinking_and_other_special_tokens_stay_free() -> None:
    tokenizer = tokenizer_of("chatml")
    for text in ("<think>a</think>2", "<end_of_turn>", "<User>"):
        assert from_trl([{"messages": [user("1"), assistant(text)]}], tokenizer)[0].completion == text


def test_plain_prompts_may_be_rendered_before_and_plain_completions_end_once() -> None:
    tokenizer = tokenizer_of("chatml")
    rendered = opened(tokenizer, [user("1")])
    for completion in ("2", "2<eos>", "2<|im_end|>\n", "2<|im_end|>\n<eos>"):
        (row,) = from_trl([{"prompt": rendered, "completion": completion}], tokenizer)
        assert row.completion_ids == tokenizer(completion.removesuffix("<eos>") + "<eos>")["input_ids"]
    for completion in ("2<eos>3", "<eos>2", "2<|im_end|>\n<|im_start|>user\n3"):
        with pytest.raises(UserError, match=r"row 1: the completion continues after '<eos>' or '<\|im_end\|>'"):
            from_trl([{"prompt": rendered, "completion": completion}], tokenizer)
        with pytest.warns(UserWarning, match="read as that token: 1 in all"):
            from_trl([{"prompt": rendered, "completion": completion}], tokenizer, special_tokens="allow")
    for token in ("<bos>", "<pad>", "<|im_start|>"):
        with pytest.raises(UserError, match="row 1: the completion's text spells '<"):
            from_trl([{"prompt": rendered, "completion": f"2{token}3"}], tokenizer)
    (row,) = from_trl([{"text": rendered + "2<|im_end|>\n"}], built(TEMPLATES["chatml"], bos=True))
    assert tokenizer.decode(row.completion_ids).startswith(rendered)


@pytest.mark.parametrize("text", ["5", "user", "Answer in one word, and say nothing else."])
def test_a_turn_that_the_template_leaves_out_is_refused_however_short(text: str) -> None:
    tokenizer = built(
        "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}" + OPENS
    )
    asked = [user("5+5?"), assistant("10")]
    for turns in ([turn("system", text), *asked], [*asked, turn("tool", text), user("And?"), assistant("10")]):
        with pytest.raises(UserError, match=r"the chat template leaves out message \d \(role (system|tool)\)"):
            from_trl([{"messages": turns}], tokenizer)
    for turns in (asked, [turn("system", " "), *asked]):  # nothing is left out of a blank one
        assert from_trl([{"messages": turns}], tokenizer)[0].completion == "10"


def test_padding_of_one_character_is_text_and_a_system_turn_alone_is_a_prompt() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.pad_token = "!"
    assert from_trl([{"messages": [user("Go!"), assistant("Gone!")]}], tokenizer)[0].completion == "Gone!"
    assert "Say 1" in opened(tokenizer, [turn("system", "Say 1")])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_an_answer_that_the_template_leaves_out_is_refused(key: str) -> None:
    row = {"messages": [user("1+1?"), {**assistant("2"), key: "one and one"}]}
    with pytest.raises(UserError, match=f"^row 1: the chat template does not render '{key}' of the assistant's turn"):
        from_trl([row], tokenizer_of("chatml"))
