"""Logs of other stacks as buffers: tokens, log-probs, rewards and groups."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import logs
import pyarrow.parquet as pq
import pytest
from chat_templates import CALLS, OPENS, TURNS, assistant, built, policy_of, tokenizer_of, turn, user

from rlzoo.buffers import Importer, LoggedSample, OfflineBuffer, get_importer, import_log, list_importers
from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.files import file_rows
from rlzoo.buffers.importing import MISSING, OTHER_TOKENS, TEMPERED
from rlzoo.buffers.problems import Problem, encode_problems
from rlzoo.buffers.stripped import Restorer
from rlzoo.config import Training
from rlzoo.errors import UserError
from rlzoo.objective import get_objective
from rlzoo.training import train
from rlzoo.types import Selection, Trajectory


@pytest.fixture(scope="module")
def chat() -> Any:
    return tokenizer_of("chatml")


def imported(
    form: str, log: Path, tokenizer: Any, bad: BadRows | None = None, limit: int | None = None, **options: Any
) -> OfflineBuffer:
    return import_log(get_importer(form, **options), log, tokenizer, limit, bad or BadRows())


def check(buffer: OfflineBuffer, tokenizer: Any, columns: set[str]) -> None:
    """The four samples of each of the three questions, with tokens as if rlzoo had sampled them."""
    expected = list(logs.samples())
    assert len(buffer) == len(expected)
    (problem,) = encode_problems(tokenizer, [Problem("p", logs.conversation("1+1=?"), {})])
    assert buffer[0].prompt == problem.text and buffer[0].prompt_ids == problem.ids
    for row, (question, _, answer, reward) in zip(buffer, expected, strict=True):
        assert row.messages == logs.conversation(question) or row.messages is None
        assert (row.completion, row.source, row.truncated) == (answer, "policy", False)
        assert tokenizer.decode(row.completion_ids) == answer + "<|im_end|>"
        assert row.reward is None or bool(row.reward) == bool(reward)
        assert columns <= set(row.columns)
    assert [len(unit) for unit in buffer.view(Selection.UNPAIRED).units] == [1] * 12 if buffer[0].reward else True
    assert len(set(buffer.column("prompt_id"))) == 3


# TRL


def test_trl_plain(tokenizer: Any, tmp_path: Path) -> None:
    logs.trl(tmp_path, 1, gold=["2"] * 12, logged=list(range(12)))
    buffer = imported("trl", tmp_path, tokenizer)
    assert [(row.prompt, row.completion, row.reward) for row in buffer] == [(q, a, r) for q, _, a, r in logs.samples()]
    assert buffer[1].completion_ids == tokenizer("#### 5")["input_ids"] + [tokenizer.eos_token_id]
    assert buffer[0].reward_components == {"exact": 1.0} and buffer[0].columns == {"gold": "2", "logged": 0}
    assert buffer.column("policy_version") == [1] * 12 and not buffer.has("behaviour_logp").any()
    assert len(buffer.view(Selection.PAIRS)) == 4


def test_trl_conversations_with_several_rewards(chat: Any, tmp_path: Path) -> None:
    rows = list(logs.samples())
    logs.trl(
        tmp_path,
        prompt=[logs.conversation(question) for question, *_ in rows],
        completion=[[assistant(answer)] for _, _, answer, _ in rows],
        format=[None if row % 2 else 0.5 for row in range(12)],
    )
    buffer = imported("trl", tmp_path, chat)
    assert buffer[0].messages == logs.conversation("1+1=?") and buffer[0].completion == "#### 2"
    assert chat.decode(buffer[0].prompt_ids) == "<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.decode(buffer[0].completion_ids) == "#### 2<|im_end|>"
    assert buffer[0].reward == 1.5 and buffer[0].reward_components == {"exact": 1.0, "format": 0.5}
    assert buffer[1].reward == 0.0 and buffer[1].reward_components == {"exact": 0.0, "format": None}
    weighted = imported("trl", tmp_path, chat, rewards={"exact": 2, "format": 0.2})
    assert weighted[0].reward == pytest.approx(2.1)
    with pytest.raises(UserError, match=r"row 1: no column 'accuracy'; it has: step"):
        imported("trl", tmp_path, chat, rewards={"accuracy": 1})


def test_trl_logs_the_same_batch_at_several_steps(tokenizer: Any, tmp_path: Path) -> None:
    for step, extra in enumerate(("a", "a", "b"), 1):
        logs.trl(tmp_path, step, extra=[extra] * 12, unscored=[float("nan")] * 12)
    bad = BadRows()
    buffer = imported("trl", tmp_path, tokenizer, bad)
    assert sorted(set(buffer.column("policy_version"))) == [1, 3] and len(buffer) == 24
    (event,) = bad.events()
    assert "logged again" in event and "12 in all" in event and "completions_00002.parquet" in event
    assert imported("trl", tmp_path / "completions" / "completions_00002.parquet", tokenizer).column("reward")


def test_trl_several_turns(chat: Any, tmp_path: Path) -> None:
    """A tool's result is context; the assistant's turns are learned from."""
    turns = [assistant("a"), turn("tool", "b"), assistant("c")]
    row = imported("trl", logs.trl(tmp_path, prompt=[[user("1")]] * 12, completion=[turns] * 12), chat)[0]
    assert chat.decode(row.completion_ids) == (
        "a<|im_end|>\n<|im_start|>tool\nb<|im_end|>\n<|im_start|>assistant\nc<|im_end|>"
    )
    assert row.completion_mask is not None
    kept = [token for token, learned in zip(row.completion_ids, row.completion_mask, strict=True) if learned]
    assert chat.decode(kept).replace("\n", "") == "a<|im_end|>c<|im_end|>" and row.completion_messages == turns
    path = logs.trl(tmp_path, prompt=[[user("1")]] * 12, completion=[turns[:2]] * 12)
    with pytest.raises(UserError, match=rf"{path.name} row 1: column 'completion' has the turns assistant, tool: the"):
        imported("trl", path, chat)


def call(arguments: Any) -> dict[str, Any]:
    """A turn of the assistant that calls a tool."""
    return {**assistant(""), "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": arguments}}]}


def test_trl_tool_calls_are_as_they_were_before_parquet(tmp_path: Path) -> None:
    """Where Arrow gave each message, and each call, the keys of all."""
    said = [call({"a": 1}), {**turn("tool", "2"), "name": "add"}, assistant("c")]
    other = [call({"b": "x"})]
    path = logs.trl(tmp_path, prompt=[[user("1")]] * 12, completion=[said, other, [assistant("d")]] * 4)
    assert pq.read_table(path)["completion"][2].as_py()[0].keys() == {"role", "content", "tool_calls", "name"}
    buffer = imported("trl", path, CALLS)
    assert buffer.column("completion_messages")[:3] == [said, other, None]
    assert [CALLS.decode(row.completion_ids).count("null") for row in buffer] == [0] * 12


# verl


TOLD = [assistant("2?"), turn("tool", "It is 2."), assistant("Sure.")]


@pytest.mark.parametrize("role", ["tool", "user"])
@pytest.mark.parametrize("template", ["chatml", "llama3", "qwen3"])
@pytest.mark.parametrize("space", ["\n", ""])
def test_verl_several_turns(template: str, role: str, space: str, tmp_path: Path) -> None:
    """verl's agents add a tool's turn without the line break that the template has after the assistant's."""
    tokenizer, turns = tokenizer_of(template), [TOLD[0], turn(role, "It is 2."), TOLD[2]]
    text = tokenizer.apply_chat_template([user("1+1=?"), *turns[:2]], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True)
    given = logs.stripped(tokenizer, "1+1=?")
    said = whole.removeprefix(given).replace("2?\n", f"2?{space}") + "Sure."
    path = logs.write_lines(tmp_path / "1.jsonl", [{"input": given, "output": said, "score": 1.0, "step": 1}])
    with pytest.raises(UserError, match=r"line 1: its completion has the header of another turn .*completions=several"):
        imported("verl", path, tokenizer)
    (single,) = imported("verl", path, tokenizer, completions="single")
    assert (single.completion_messages, single.completion_mask, single.completion) == (None, None, said)
    if template == "qwen3":  # the last answer gets an empty thinking, which is lost once a turn follows
        with pytest.raises(UserError, match="line 1: the chat template renders turn 1 of the completion otherwise"):
            imported("verl", path, tokenizer, completions="several")
        return
    (row,) = imported("verl", path, tokenizer, completions="several")
    assert row.completion_messages == turns and row.reward == 1.0
    kept = [token for token, learned in zip(row.completion_ids, row.completion_mask or [], strict=True) if learned]
    stop = "<|eot_id|>" if template == "llama3" else "<|im_end|>"
    assert tokenizer.decode(kept).replace("\n", "") == f"2?{stop}Sure.{stop}"


def test_verl_results_in_a_turn_of_the_user(tmp_path: Path) -> None:
    """As Qwen's template has them, several in one turn."""
    tool = "<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n"
    tokenizer = built(TURNS.replace("{{ '", "{{ '" + tool + "' if m.role == 'tool' else '", 1) + OPENS)
    said = "add\nuser\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>\nassistant\nIt is 5."
    row = {"input": logs.stripped(tokenizer, "1+1=?"), "output": said, "score": 1.0, "step": 1}
    (found,) = imported("verl", logs.write_lines(tmp_path / "1.jsonl", [row]), tokenizer, completions="several")
    results = turn("tool", "2\n</tool_response>\n<tool_response>\n3")
    assert found.completion_messages == [assistant("add"), results, assistant("It is 5.")]
    hidden = [t for t, kept in zip(found.completion_ids, found.completion_mask or [], strict=True) if not kept]
    assert tokenizer.decode(hidden).startswith("<|im_start|>user\n<tool_response>\n2")


def test_verl_turns_that_end_early_or_are_not_the_templates(chat: Any, tmp_path: Path) -> None:
    given = logs.stripped(chat, "1+1=?")

    def read(output: str, tokenizer: Any = chat, **options: Any) -> Trajectory:
        path = logs.write_lines(tmp_path / "1.jsonl", [{"input": given, "output": output, "score": 0.0, "step": 1}])
        (row,) = imported("verl", path, tokenizer, completions="several", **options)
        return row

    cut = read("2?\ntool\nIt is 2.\nassistant\n")  # the length limit was the tool's
    assert cut.completion_messages is None and cut.completion == "2?"
    assert read("no turns").completion_messages is None
    with pytest.raises(UserError, match=r"line 1: the turns of a completion are found by the chat template, but"):
        read("2?", turns="none")
    with pytest.raises(UserError, match=r"line 1: the completion was logged without its special tokens, and the chat"):
        read("a\n<think>b</think>tool\nIt is 2.\nassistant\nSure.", tokenizer_of("qwen3"))
    with pytest.raises(UserError, match=r"completion's turns cannot be told apart without their special tokens: give"):
        given = "\n1+1=?\n\n"
        read("2?", tokenizer_of("phi"), turns="single")


def test_verl(chat: Any, tmp_path: Path) -> None:
    for step in (10, 2):
        logs.verl(tmp_path, chat, step)
    buffer = imported("verl", tmp_path, chat)
    assert buffer.column("policy_version") == [2] * 12 + [10] * 12
    check(OfflineBuffer(buffer.rows.select(range(12))), chat, {"gts", "acc"})
    assert buffer[0].messages == logs.conversation("1+1=?") and buffer[0].reward == 1.0
    limited = imported("verl", tmp_path, chat, limit=len(buffer[0].completion_ids) - 1)
    assert limited[0].truncated and limited[0].completion_ids == buffer[0].completion_ids[:-1]
    assert not imported("verl", tmp_path, chat, limit=len(buffer[0].completion_ids))[0].truncated


CONVERSATIONS = (
    [user("1+1?")],
    [turn("system", "Be\nbrief."), user("1+1?")],
    [user("1+1?"), assistant("2"), user("2+2?\n\nuser")],
)


@pytest.mark.parametrize("template", ["chatml", "default-system", "llama3", "gemma", "qwen3"])
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_turns_are_found_again_without_special_tokens(template: str, number: int) -> None:
    tokenizer, conversation = tokenizer_of(template), CONVERSATIONS[number]
    if template == "gemma" and number == 1:
        pytest.skip("its template takes no system turn")
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bare = tokenizer.decode(ids, skip_special_tokens=True)
    assert bare != text
    found = Restorer(tokenizer).conversation(bare)
    again = tokenizer.apply_chat_template(found, tokenize=False, add_generation_prompt=True)
    assert again == text and found[-1] == conversation[-1]


def test_turns_that_only_special_tokens_mark_are_not_guessed() -> None:
    restorer = Restorer(tokenizer_of("phi"))
    with pytest.raises(UserError, match=r"turns cannot be told apart without their special tokens: .* turns=single"):
        restorer.conversation("\n1+1?\n2\n\n")
    assert restorer.conversation("\n1+1?\n2\n\n", "single") == [user("1+1?\n2")]


def test_a_prompt_of_another_template_is_refused_or_read_as_text(chat: Any, tmp_path: Path) -> None:
    path = logs.verl(tmp_path, tokenizer_of("llama3"))
    with pytest.raises(UserError, match=r"1\.jsonl line 1: the prompt was logged without its special tokens, and the"):
        imported("verl", path, chat)
    plain = imported("verl", path, chat, turns="none")
    assert plain[0].prompt == "user\n\n1+1=?assistant\n\n" and plain[0].messages is None
    assert plain[0].completion_ids[-1] == chat.eos_token_id


# Tokens and log-probs in the log


def test_open_instruct(chat: Any, tmp_path: Path) -> None:
    logs.open_instruct(tmp_path, chat)
    buffer = imported("open-instruct", tmp_path, chat)
    check(buffer, chat, {"ground_truth", "dataset"})
    assert all(row.behaviour_logp == [-0.5] * len(row.completion_ids) for row in buffer)
    assert buffer.column("policy_version") == [3] * 12 and buffer.column("reward")[:2] == [10.0, 0.0]
    assert len(buffer.view(Selection.GROUPS)) == 3
    heated = imported("open-instruct", tmp_path, chat, temperature=0.7)  # its log-probs are of the samples' temperature
    assert heated[0].temperature == 0.7 and heated[0].behaviour_logp is not None


def test_open_instruct_cut_and_with_tools(chat: Any, tmp_path: Path) -> None:
    _, said = logs.tokens_of(chat, "1+1=?", "##", stop="")
    cut = {"response_tokens": said, "logprobs": [-1.0, -2.0], "finish_reason": "length"}
    buffer = imported("open-instruct", logs.open_instruct(tmp_path, chat, **cut), chat)
    assert buffer[0].truncated and buffer[0].completion_ids == said and buffer[0].behaviour_logp == [-1.0, -2.0]
    bad = BadRows()
    short = imported("open-instruct", logs.open_instruct(tmp_path, chat, logprobs=[-1.0]), chat, bad)
    assert not short.has("behaviour_logp").any() and OTHER_TOKENS in bad.events()[0]
    called = {"num_calls": 1, "tool_calleds": True, "tool_outputs": "2"}
    for logp in ([-1.0] * 3, None):
        tools = logs.open_instruct(tmp_path, chat, request_info=called, logprobs=logp)
        with pytest.raises(UserError, match=r"line 1 has the output of tools among its tokens, and no log-probs of 0"):
            imported("open-instruct", tools, chat)
    parts = [
        chat(text, add_special_tokens=False)["input_ids"] for text in ("add<|im_end|>", "[2]", "It is 2.<|im_end|>")
    ]
    values = [value for part, logp in zip(parts, (-0.5, 0.0, -0.25), strict=True) for value in [logp] * len(part)]
    used, bad = (
        {"response_tokens": [*parts[0], *parts[1], *parts[2]], "logprobs": values, "request_info": called},
        BadRows(),
    )
    row = imported("open-instruct", logs.open_instruct(tmp_path, chat, **used), chat, bad)[0]
    kept = [len(parts[0]), len(parts[1]), len(parts[2])]
    assert row.completion_mask == [True] * kept[0] + [False] * kept[1] + [True] * kept[2]
    assert row.behaviour_logp == values and row.completion_messages is None
    assert bad.events()[0].startswith("completions with the output of tools") and "12 in all" in bad.events()[0]
    foreign = logs.open_instruct(tmp_path, chat, prompt_tokens=[10**6])
    with pytest.raises(UserError, match=r"its tokens are not those of its text under this tokenizer: give the model"):
        imported("open-instruct", foreign, chat)


def test_open_instruct_traces_of_a_step(chat: Any, tmp_path: Path) -> None:
    prompt, said = logs.tokens_of(chat, "1+1=?", "2")
    step = {"queries": [prompt] * 2, "responses": [said, said[:-1]], "scores": [1.0, 0.0], "training_step": 4}
    row = {**step, "finish_reasons": ["stop", "length"], "ground_truths": ["2", "2"], "datasets": ["a", "a"]}
    buffer = imported("open-instruct", logs.write_lines(tmp_path / "traces_run.jsonl", [row]), chat)
    assert [(r.reward, r.truncated, r.policy_version) for r in buffer] == [(1.0, False, 4), (0.0, True, 4)]


def test_prime_rl(chat: Any, tmp_path: Path) -> None:
    logs.prime_rl(tmp_path, chat)
    buffer = imported("prime-rl", tmp_path, chat)
    check(buffer, chat, {"answer", "idx", "metric_turns"})
    assert all(row.behaviour_logp == [-0.125] * len(row.completion_ids) for row in buffer)
    assert buffer[0].reward_components == {"exact": 1.0, "format": 1.0} and buffer[0].reward == 1.0
    assert buffer.column("policy_version") == [5] * 12 and len(buffer.view(Selection.GROUPS)) == 3


def test_prime_rl_traces_that_cannot_be_used(chat: Any, tmp_path: Path) -> None:
    (row, *_) = [json.loads(line) for line in logs.prime_rl(tmp_path, chat).read_text().splitlines()]
    trace = row["traces"][0]

    def read(**changes: Any) -> Trajectory:
        (found,) = imported("prime-rl", logs.write_lines(tmp_path / "t.jsonl", [{**trace, **changes}]), chat)
        return found

    assert read(info={"prime_rl": {"policy_version": 9}}).policy_version == 9  # a trace per line, as it was until 2026
    assert read(stop_condition="max_output_tokens").truncated and read(calls=[{"finish_reason": "length"}]).truncated
    with pytest.raises(UserError, match=r"line 1 ended in an error \(Timeout\): drop it|line 1: ended in an error"):
        read(ok=False, errors=[{"type": "Timeout", "message": "m"}])
    tool = {
        "parent": 1,
        "message": {"role": "tool", "content": "b"},
        "token_ids": [65],
        "mask": [False],
        "logprobs": [],
    }
    again = {**trace["nodes"][1], "parent": 2}
    several = read(nodes=[*trace["nodes"], tool, again, {**tool, "parent": 3}])
    once = read()
    turned = len(once.completion_ids)
    assert several.prompt_ids == once.prompt_ids
    assert several.completion_ids == [*once.completion_ids, 65, *again["token_ids"]]
    assert several.completion_mask == [True] * len(once.completion_ids) + [False] + again["mask"]
    assert several.behaviour_logp == [-0.125] * turned + [0.0] * (1 + sum(not kept for kept in again["mask"])) + [
        -0.125
    ] * sum(again["mask"])
    assert not several.truncated and once.completion_mask is None
    said = trace["nodes"][1]["message"]
    assert several.completion_messages == [said, tool["message"], said] and once.completion_messages is None
    flat = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "name": "add", "arguments": '{"a": 1}'}]}
    result = {"role": "tool", "content": "b", "tool_call_id": "c"}
    begun = {**trace["nodes"][1], "message": flat}
    called = read(nodes=[trace["nodes"][0], begun, {**tool, "message": result}, again])
    made = call({"a": 1})
    made["tool_calls"][0]["id"] = "c"
    assert called.completion_messages == [made, result, said]
    judged = {"traces": [{**trace, "agent": {"trainable": False}}]}
    with pytest.raises(UserError, match="has no trace of an agent that is trained"):
        imported("prime-rl", logs.write_lines(tmp_path / "t.jsonl", [judged]), chat)


def test_results_of_verifiers(chat: Any, tmp_path: Path) -> None:
    buffer = imported("prime-rl", logs.verifiers_results(tmp_path / "results.jsonl", chat), chat)
    check(buffer, chat, {"answer", "task"})
    assert buffer.has("behaviour_logp").all()
    texts = imported("prime-rl", logs.verifiers_results(tmp_path / "results.jsonl", chat, trajectory=None), chat)
    assert [row.completion_ids for row in texts] == [row.completion_ids for row in buffer]
    assert not texts.has("behaviour_logp").any()


# OpenAI-style responses


def test_openai_chat(chat: Any, tmp_path: Path) -> None:
    bad = BadRows()
    buffer = imported("openai", logs.responses(tmp_path / "r.jsonl", chat), chat, bad, reward="metadata.score")
    check(buffer, chat, {"model"})
    assert all(row.behaviour_logp == [-0.25] * len(row.completion_ids) for row in buffer) and not bad.events()
    assert buffer.column("reward") == [reward for *_, reward in logs.samples()]


def openai_line(tmp_path: Path, **row: Any) -> Path:
    return logs.write_lines(tmp_path / "r.jsonl", [row])


def test_openai_log_probs_that_cannot_be_used(chat: Any, tmp_path: Path) -> None:
    asked = {"messages": logs.conversation("1+1=?")}

    def notes(response: dict[str, Any], **request: Any) -> str:
        bad = BadRows()
        path = openai_line(tmp_path, request=asked | request, response=response)
        assert not imported("openai", path, chat, bad).has("behaviour_logp").any()
        return bad.events()[0]

    assert notes(logs.chat_response(chat, "23", end=False)).startswith(MISSING)
    unknown = logs.chat_response(chat, "23")
    unknown["choices"][0]["logprobs"]["content"][1]["logprob"] = -9999.0
    assert notes(unknown).startswith(MISSING)
    other = logs.chat_response(chat, "23")
    other["choices"][0]["message"]["content"] = "24"
    assert notes(other).startswith(OTHER_TOKENS)
    assert notes(logs.chat_response(chat, "23"), temperature=0.7).startswith(TEMPERED)
    assert notes(logs.chat_response(chat, "23"), temperature=0).startswith(TEMPERED)


def test_openai_token_ids_of_vllm(chat: Any, tmp_path: Path) -> None:
    prompt, said = logs.tokens_of(chat, "1+1=?", "23")
    ids: dict[str, Any] = {"token_ids": said, "finish_reason": "length"}
    response = {**logs.chat_response(chat, "23", **ids), "prompt_token_ids": prompt}
    (row,) = imported("openai", openai_line(tmp_path, **response), chat)  # no request: the prompt is its tokens
    assert (row.prompt_ids, row.completion_ids, row.truncated) == (prompt, said, True)
    assert row.prompt == chat.decode(prompt) and row.behaviour_logp == [-0.25] * len(said)
    named = logs.chat_response(chat, "23")
    for entry, token in zip(named["choices"][0]["logprobs"]["content"], said, strict=True):
        entry["token"] = f"token_id:{token}"
    (row,) = imported("openai", openai_line(tmp_path, **named, messages=logs.conversation("1+1=?")), chat)
    assert row.completion_ids == said and row.behaviour_logp is not None


def test_openai_completions(chat: Any, tmp_path: Path) -> None:
    def choice(index: int, text: str) -> dict[str, Any]:
        logprobs = {"tokens": [*text, ""], "token_logprobs": [-1.0] * (len(text) + 1)}
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": "stop"}

    response = {
        "object": "text_completion",
        "choices": [choice(i, text) for i, text in enumerate(("2", "3", "4", "5"))],
    }
    buffer = imported("openai", openai_line(tmp_path, **response, prompt=["1+1=", "2+2="], reward=0.5), chat)
    assert [(row.prompt, row.completion) for row in buffer] == [
        ("1+1=", "2"),
        ("1+1=", "3"),
        ("2+2=", "4"),
        ("2+2=", "5"),
    ]
    assert all(row.behaviour_logp == [-1.0, -1.0] and row.reward == 0.5 for row in buffer)


def test_openai_batches(chat: Any, tmp_path: Path) -> None:
    logs.batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", chat)
    buffer = imported("openai", tmp_path / "out.jsonl", chat, requests=str(tmp_path / "in.jsonl"))
    assert [(row.messages, row.completion) for row in reversed(list(buffer))] == [
        (logs.conversation(question), answer) for question, _, answer, _ in logs.samples()
    ]
    assert buffer.has("behaviour_logp").all() and not buffer.has("reward").any()
    with pytest.raises(UserError, match=r"line 1 has no prompt: keep the request beside the response"):
        imported("openai", tmp_path / "out.jsonl", chat)
    with pytest.raises(UserError, match=r"line 1: custom_id 'request-11' is not among the requests in .*few\.jsonl"):
        few = logs.write_lines(tmp_path / "few.jsonl", [{"custom_id": "x", "body": {}}])
        imported("openai", tmp_path / "out.jsonl", chat, requests=str(few))
    failed = {"id": "1", "custom_id": "x", "response": None, "error": {"message": "expired"}}
    with pytest.raises(UserError, match=r"has no response \(.*expired"):
        imported("openai", openai_line(tmp_path, **failed), chat)


def test_openai_conversations(tmp_path: Path) -> None:
    asked, result = logs.conversation("1+1=?"), {**turn("tool", "2"), "tool_call_id": "c"}
    whole = [*asked, {**call('{"a": 1}'), "content": None}, result, assistant("It is 2.")]
    (row,) = imported("openai", openai_line(tmp_path, messages=whole, reward=0.5), CALLS)
    assert row.messages == [*asked, call({"a": 1}), result] and row.completion == "It is 2." and row.reward == 0.5
    assert '"arguments": {"a": 1}' in row.prompt and row.completion_messages is None
    answered = {**logs.chat_response(CALLS, "It is 2."), "messages": whole[:-1], "reward": 0.5}
    (same,) = imported("openai", openai_line(tmp_path, **answered), CALLS)
    assert (same.prompt_ids, same.messages) == (row.prompt_ids, row.messages) and same.behaviour_logp is not None
    bad = BadRows()
    (several,) = imported("openai", openai_line(tmp_path, **answered), CALLS, bad, turns="all")
    assert several.messages == asked and several.completion_messages == [call({"a": 1}), result, assistant("It is 2.")]
    hidden = [t for t, kept in zip(several.completion_ids, several.completion_mask or [], strict=True) if not kept]
    assert CALLS.decode(hidden).strip() == "<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant"
    assert several.prompt_ids + several.completion_ids == row.prompt_ids + row.completion_ids
    assert several.behaviour_logp is None and bad.events()[0].startswith(OTHER_TOKENS)
    (alone,) = imported("openai", openai_line(tmp_path, messages=[*asked, assistant("2")]), CALLS, turns="all")
    assert alone.completion_messages is None and alone.completion_mask is None
    with pytest.raises(UserError, match="line 1 has no 'choices': every line must hold a response"):
        imported("openai", openai_line(tmp_path, messages=asked), CALLS)
    with pytest.raises(
        UserError, match=r"the response has a str for a tool call: give its function, \{name, arguments"
    ):
        imported("openai", openai_line(tmp_path, messages=[*asked, {"role": "assistant", "tool_calls": ["f"]}]), CALLS)


# Evaluations


def test_lm_eval(tokenizer: Any, tmp_path: Path) -> None:
    path, bad = logs.lm_eval(tmp_path / "samples_gsm8k_2026-11-28T00-00-00.jsonl"), BadRows()
    buffer = imported("lm-eval", tmp_path, tokenizer, bad)
    assert [(row.prompt, row.completion, row.reward) for row in buffer] == [
        (question, "#### 2", float(gold == "2")) for question, gold in logs.QUESTIONS.items()
    ]
    assert buffer[0].columns == {"doc_id": 0, "question": "1+1=?", "answer": "2", "target": "2"}
    assert "other filters of the same responses: 3 in all" in bad.events()[0]
    assert len(imported("lm-eval", path, tokenizer, filter="flexible-extract")) == 3
    logs.lm_eval(tmp_path / "samples_a.jsonl", ["none"], resps=[["3"]])  # of another task, before it
    assert len(imported("lm-eval", tmp_path, tokenizer)) == 6
    with pytest.raises(UserError, match=r"unknown metric 'f1': known: exact_match"):
        imported("lm-eval", path, tokenizer, metric="f1")


def test_lm_eval_repeats_multiple_choice_and_conversations(chat: Any, tmp_path: Path) -> None:
    path, bad = tmp_path / "samples.jsonl", BadRows()
    buffer = imported("lm-eval", logs.lm_eval(path, ["none"], resps=[["2", "3"]]), chat, bad)
    assert len(buffer) == 6 and not buffer.has("reward").any() and "repeats" in bad.events()[0]
    several = logs.lm_eval(path, ["none"], resps=[["2", "3"]], exact_match=[1.0, None])
    assert imported("lm-eval", several, chat).column("reward") == [1.0, None] * 3
    choice: dict[str, Any] = {
        "arguments": {"gen_args_0": {"arg_0": "1+1=", "arg_1": " 2"}},
        "resps": [[["-1.0", "True"]]],
    }
    with pytest.raises(UserError, match="line 1 has no arguments of a generation: only tasks that generate text"):
        imported("lm-eval", logs.lm_eval(path, **choice), chat)
    turns = {"gen_args_0": {"arg_0": [json.dumps(logs.conversation("1+1=?"))], "arg_1": {"temperature": 0.5}}}
    row = imported("lm-eval", logs.lm_eval(path, arguments=turns), chat)[0]
    assert row.messages == logs.conversation("1+1=?") and row.temperature == 0.5
    rendered = chat.apply_chat_template(logs.conversation("1+1=?"), tokenize=False, add_generation_prompt=True)
    plain = imported("lm-eval", logs.lm_eval(path, arguments=[[rendered, {}]]), chat)[0]
    assert plain.prompt_ids == row.prompt_ids and plain.completion_ids == row.completion_ids


def test_lighteval(tokenizer: Any, tmp_path: Path) -> None:
    logs.lighteval(tmp_path)
    buffer = imported("lighteval", tmp_path, tokenizer)
    assert [(row.prompt, row.completion, row.reward) for row in buffer] == [
        (question, "#### 2", float(gold == "2")) for question, gold in logs.QUESTIONS.items()
    ]
    assert buffer[1].columns["answer"] == "5" and buffer[0].reward_components == {"extractive_match": 1.0}
    several = imported("lighteval", logs.lighteval(tmp_path, text=["2", "3"]), tokenizer)
    assert len(several) == 6 and not several.has("reward").any()
    with pytest.raises(UserError, match=r"row 1: unknown metric 'f1': known: extractive_match"):
        imported("lighteval", tmp_path, tokenizer, metric="f1")
    with pytest.raises(UserError, match="column 'model_response' holds no generated text"):
        imported("lighteval", logs.lighteval(tmp_path, text=[]), tokenizer)


# What they are for

NO_LOGP = "the buffer has no groups ({} samples have a reward but no behaviour log-probs, for which --set training."
NO_PAIRS = "the buffer has no pairs (0 of 3 sampled prompts have both a completion that reaches reward 0.5 and one"
LACKING: dict[str, dict[str, str]] = {
    "trl": {"grpo": NO_LOGP.format(12)},
    "verl": {"grpo": NO_LOGP.format(12)},
    "prime-rl": {},
    "open-instruct": {},
    "openai": {},
    "lm-eval": {"dpo": NO_PAIRS, "grpo": NO_LOGP.format(3)},
    "lighteval": {"dpo": NO_PAIRS, "grpo": NO_LOGP.format(3)},
}
"""What each log lacks for which objective."""


@pytest.mark.parametrize("form", LACKING)
def test_every_log_trains_what_it_can_and_else_says_what_is_missing(form: str, chat: Any, tmp_path: Path) -> None:
    name = form.replace("-", "_")
    options: dict[str, Any] = {"reward": "metadata.score"} if form == "openai" else {}
    match form:
        case "openai":
            logs.responses(tmp_path / "responses.jsonl", chat)
        case "lm-eval":
            logs.lm_eval(tmp_path / "samples_a.jsonl")
        case "trl" | "lighteval":
            getattr(logs, name)(tmp_path)
        case _:
            getattr(logs, name)(tmp_path, chat)
    buffer, policy = imported(form, tmp_path, chat, **options), policy_of(chat)
    for objective in ("rft", "dpo", "grpo"):
        settings = Training(steps=1, batch_size=8)
        if objective in LACKING[form]:
            with pytest.raises(UserError, match=re.escape(LACKING[form][objective])):
                train(policy, get_objective(objective), buffer, settings)
            continue
        (step,) = train(policy, get_objective(objective), buffer, settings).steps
        assert step["gradient_norm"] > 0


@pytest.mark.parametrize("form", LACKING)
def test_a_value_of_another_type_is_a_bad_row_and_no_crash(form: str, chat: Any, tmp_path: Path) -> None:
    """One good row, and for each of its values rows in which that is something else."""
    match form:
        case "openai":
            path = logs.responses(tmp_path / "log.jsonl", chat)
        case "lm-eval":
            path = logs.lm_eval(tmp_path / "log.jsonl")
        case "trl" | "lighteval":
            path = getattr(logs, form)(tmp_path)
        case _:
            path = getattr(logs, form.replace("-", "_"))(tmp_path, chat)
    _, good = next(file_rows(path))
    assert isinstance(good, dict)
    rows = [good, *broken(good)]
    bad, log = BadRows("drop"), logs.write_lines(tmp_path / "broken.jsonl", rows)
    buffer = imported(form, log, chat, bad)
    assert 0 < len(buffer) < len(rows) > 30 and bad.dropped >= 10
    assert all(re.match(rf"{re.escape(str(log))} line \d+(: | has | is | holds )", reason) for reason in bad.first)


def broken(value: Any) -> Iterator[Any]:
    """The value with each of its parts replaced, one at a time."""
    places: Any = value.items() if isinstance(value, dict) else enumerate(value[:2])
    for place, part in places:
        others = [None, 3, "x", [3], {"a": 1}, [], *(broken(part) if isinstance(part, dict | list) else ())]
        for other in others:
            twin = value.copy()
            twin[place] = other
            yield twin


# The table of formats


class Mine(Importer):
    """Our sampler's JSON lines."""

    name = "mine"
    scale: float = 1.0

    def samples(self, row: Any) -> Iterator[LoggedSample]:
        if row["points"] is None:
            raise UserError("has no points: drop it")
        yield LoggedSample(prompt=row["q"], completion=row["a"], reward=self.scale * row["points"])


def test_a_format_of_ones_own(tokenizer: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"q": "1+1=?", "a": "2", "points": 5}, {"q": "1+1=?", "a": "3", "points": None}]
    log = logs.write_lines(tmp_path / "log.jsonl", rows)
    bad = BadRows("drop")
    (row,) = imported(f"{__name__}:Mine", log, tokenizer, bad, scale="0.1")
    assert row.reward == 0.5 and bad.lines() == [
        f"dropped 1 of 2 rows (bad_rows: drop): {log} line 2 has no points: drop it"
    ]
    with pytest.raises(
        UserError, match=r"unknown setting in rlzoo import mine 'size': known: scale, temperature, top_p"
    ):
        get_importer(f"{__name__}:Mine", size=1)
    with pytest.raises(UserError, match=r"rlzoo import mine: temperature = 0: Input should be greater than 0"):
        get_importer(f"{__name__}:Mine", temperature=0)
    with pytest.raises(UserError, match=r"unknown log format 'very': did you mean 'verl'\?"):
        get_importer("very")
    with pytest.raises(UserError, match="is not an importer: give a subclass of rlzoo"):
        get_importer(f"{__name__}:check")
    assert list_importers() == ["lighteval", "lm-eval", "open-instruct", "openai", "prime-rl", "trl", "verl"]


def test_a_folder_without_the_log(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no file \*\*/completions_\*\.parquet of trl: give the log's folder or"):
        imported("trl", tmp_path, tokenizer)
