"""Conversations: the tokens of an assistant's turn, and where it starts and ends."""

from __future__ import annotations

import json

import pytest
from chat_templates import OPENS, STOPS, TEMPLATES, assistant, built, policy_of, tokenizer_of, turn, user

from rlzoo.buffers import encode, from_trl, to_trl
from rlzoo.buffers.problems import Problem, demonstrations, encode_problems
from rlzoo.config import Sampling
from rlzoo.errors import UserError
from rlzoo.policy.chat import messages, options_of, turn_of
from rlzoo.rollout import TransformersSampler
from rlzoo.rollout.vllm import _asked, _sample

GOOD = {"messages": [user("1"), assistant("2")]}

# The tokens of a turn

CONVERSATIONS = {
    "one turn": [user("1+1?"), assistant("2")],
    "several turns": [user("1+1?"), assistant("<think>\na\n</think>\n\n2"), user("2+2?"), assistant("4")],
    "spaces": [user(" 1+1?\n"), assistant("\n  2 \n")],
    "thinking": [user("1+1?"), assistant("<think>\none and one\n</think>\n\n2")],
}


@pytest.mark.filterwarnings("ignore:the chat template drops the prompt's last words")  # as TRL says, too
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_has_the_tokens_of_its_template_and_of_trl(template: str, conversation: str) -> None:
    tokenizer, turns = tokenizer_of(template), CONVERSATIONS[conversation]
    turns = [turn("system", "Be brief."), *turns] if template == "needsys" else turns
    (row,) = from_trl([{"prompt": turns[:-1], "completion": turns[-1:]}], tokenizer)
    (same,) = from_trl([{"messages": turns}], tokenizer)
    assert (row.prompt_ids, row.completion_ids) == (same.prompt_ids, same.completion_ids)
    assert row.completion == turns[-1]["content"] and not row.truncated
    if (template, conversation) == ("r1", "thinking"):
        return  # the one rendering that loses what is to be learned: see the next test
    whole = tokenizer.apply_chat_template(turns)["input_ids"]
    assert row.prompt_ids + row.completion_ids == whole
    if template == "nogen":
        return  # TRL has the model learn the turn's header as well
    data_utils = pytest.importorskip("trl.data_utils")
    prompt = data_utils._tokenize(tokenizer, turns[:-1], add_generation_prompt=True)["input_ids"]
    assert data_utils._tokenize(tokenizer, turns)["input_ids"] == whole
    assert len(row.prompt_ids) == data_utils.common_prefix_length(prompt, whole)


@pytest.mark.parametrize("answer", ["<think>\na\n</think>\n2", "<think>a\n</think>\n2", "a\n</think>\n2"])
@pytest.mark.parametrize("template", ["r1", "qwen3-thinking"])
def test_thinking_that_the_prompt_opens_is_opened_once_and_kept(template: str, answer: str) -> None:
    tokenizer = tokenizer_of(template)
    (row,) = from_trl([{"prompt": [user("1")], "completion": [assistant(answer)]}], tokenizer)
    text = tokenizer.decode(row.prompt_ids + row.completion_ids)
    assert text.count("<think>") == 1 and "<think>\na\n</think>" in text
    assert row.prompt_ids == encode_problems(tokenizer, [Problem("p", [user("1")], {})])[0].ids
    assert tokenizer.decode(row.completion_ids[-1:]) in ("<eos>", "\n")


def test_the_mark_of_thinking_is_not_doubled_where_the_template_adds_one() -> None:
    tokenizer = built(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + "
        "('<think>\n' if m['role'] == 'assistant' else '') + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    encoded = encode(tokenizer, [user("1")], "<think>\na</think>2")
    assert tokenizer.decode(encoded.prompt_ids).endswith("assistant\n<think>\n")
    assert tokenizer.decode(encoded.completion_ids) == "a</think>2<|im_end|>\n"


def test_a_template_without_a_generation_prompt_still_opens_the_turn() -> None:
    tokenizer = tokenizer_of("nogen")
    expected = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    (row,) = from_trl([{"messages": [user("1+1?"), assistant("2")]}], tokenizer)
    (problem,) = encode_problems(tokenizer, [Problem("p", [user("1+1?")], {})])
    assert row.prompt == problem.text == expected
    assert row.prompt_ids == problem.ids == tokenizer(expected)["input_ids"]
    assert tokenizer.decode(row.completion_ids) == "2<|im_end|>\n"


def test_a_token_across_the_start_of_a_turn_belongs_to_the_turn() -> None:
    """As in TRL; a warning counts such rows, as samples start with another token."""
    template = "{% for m in messages %}{{ m.role + '=' + m.content + ';' }}{% endfor %}"
    tokenizer = built(template + "{% if add_generation_prompt %}assistant={% endif %}", merges=[("=", "2")])
    turns = [user("1"), assistant("2")]
    with pytest.warns(UserWarning, match=r"drops the end of the prompt.*row 1: '='"):
        (row,) = from_trl([{"messages": turns}], tokenizer)
    whole = tokenizer.apply_chat_template(turns)["input_ids"]
    assert row.prompt_ids + row.completion_ids == [*whole, tokenizer.eos_token_id]
    assert (row.prompt, tokenizer.decode(row.completion_ids)) == ("user=1;assistant", "=2;<eos>")


def test_a_template_that_drops_the_system_turn_once_there_is_an_answer() -> None:
    """As Mistral's v0.3 does: the prompt stays the one that is sampled from."""
    tokenizer = built(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + (messages[0]['content'] + "
        "'\n\n' if loop.last and messages[0]['role'] == 'system' else '') + m['content'] + '[/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    prompt = [turn("system", "Be brief."), user("1+1?")]
    encoded = encode(tokenizer, prompt, "2")
    assert encoded.prompt_ids == encode_problems(tokenizer, [Problem("p", prompt, {})])[0].ids
    assert (
        tokenizer.decode(encoded.prompt_ids + encoded.completion_ids) == "<bos>[INST] Be brief.\n\n1+1?[/INST] 2<eos>"
    )


def test_a_turn_that_ends_in_plain_text_gets_an_end_of_sequence() -> None:
    """Nothing else could end a sample."""
    tokenizer = built("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant:")
    assert tokenizer.decode(encode(tokenizer, [user("1")], "2").completion_ids).endswith("<eos>")


def test_parts_of_text_are_joined_and_other_keys_reach_the_template() -> None:
    tokenizer = tokenizer_of("chatml")
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]
    plain, parted = (from_trl([{"messages": [user(c), assistant("2")]}], tokenizer)[0] for c in ("1+1?", parts))
    assert plain == parted
    (problem,) = encode_problems(tokenizer, [Problem("p", [user(parts)], {})])
    assert (problem.ids, problem.problem.prompt) == (plain.prompt_ids, [user("1+1?")])
    reasons = built(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m.get('reasoning_content', '') + m['content'] }}"
        "<|im_end|>\n{% endfor %}" + OPENS
    )
    answer = {"role": "assistant", "content": "2", "reasoning_content": "one and one: ", "tool_calls": None}
    (row,) = from_trl([{"prompt": [user("1+1?")], "completion": [answer]}], reasons)
    assert (reasons.decode(row.completion_ids), row.completion) == ("one and one: 2<|im_end|>\n", "2")
    assert row.completion_messages == [{**assistant("2"), "reasoning_content": "one and one: "}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    called = built("{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }};{% endfor %}")
    (row,) = from_trl([{"messages": [user("1+1?"), call, turn("tool", "2"), assistant("Two")]}], called)
    assert row.prompt == '1+1?;[{"function": {"name": "add"}}];2;'
    assert row.messages == [user("1+1?"), {**call, "content": ""}, turn("tool", "2")]


def test_what_a_row_gives_its_template_is_what_trl_gives_it() -> None:
    tokenizer = built(
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
        + TEMPLATES["qwen3"]
        + "{% if add_generation_prompt and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    )
    tools = [{"type": "function", "function": {"name": "add"}}]
    turns = [user("1+1?"), assistant("2")]
    for given in (tools, json.dumps(tools)):
        row = {"prompt": turns[:1], "completion": turns[1:], "tools": given}
        (made,) = from_trl([{**row, "chat_template_kwargs": {"enable_thinking": False, "x": None}}], tokenizer)
        assert made.prompt_ids + made.completion_ids == tokenizer.apply_chat_template(turns, tools=tools)["input_ids"]
        assert made.prompt.startswith("<|im_start|>system\n") and made.prompt.endswith("<think>\n\n</think>\n\n")
        columns = {"tools": given, "chat_template_kwargs": {"enable_thinking": False}}
        assert encode_problems(tokenizer, [Problem("p", turns[:1], columns)])[0].ids == made.prompt_ids
    for name, value in (("tools", "{"), ("tools", 3), ("chat_template_kwargs", "no")):
        with pytest.raises(UserError, match=f"row 1: column '{name}'"):
            from_trl([{**GOOD, name: value}], tokenizer)
    assert from_trl([{"prompt": "1", "completion": "2", "tools": 3}], tokenizer)[0].columns == {"tools": 3}


def test_what_a_row_leaves_empty_does_not_reach_the_template() -> None:
    """Parquet gives every row and message all columns; a template may ask whether a key is there."""
    assert messages([{**user("x"), "tool_calls": None, "name": None}]) == [user("x")]
    assert options_of({"tools": " ", "chat_template_kwargs": {"a": None, "b": False}}) == {"b": False}
    assert options_of({"tools": None, "chat_template_kwargs": None}) == {}


def test_conversations_are_exported_as_conversations() -> None:
    """Text alone would get TRL's end of sequence, and not the template's end of a turn."""
    tokenizer = tokenizer_of("gemma")
    buffer = from_trl([{**GOOD, "prompt_id": "p"}], tokenizer)
    exported = to_trl(buffer, "prompt_completion")
    assert exported["completion"][:] == [[assistant("2")]]
    assert list(from_trl(exported, tokenizer)) == list(buffer)


# Where a turn ends


@pytest.mark.parametrize("template", TEMPLATES)
def test_sampling_stops_where_the_template_ends_a_turn(template: str) -> None:
    tokenizer = tokenizer_of(template)
    policy = policy_of(tokenizer)
    stop = tokenizer.convert_tokens_to_ids(STOPS.get(template, "<|im_end|>"))
    assert policy.eos_ids == {tokenizer.eos_token_id, stop}
    assert set(_asked(policy, Sampling(), 0, 0, greedy=False, room=8)["stop_token_ids"]) == policy.eos_ids
    ids = tokenizer("2")["input_ids"][-1:]
    for made in (TransformersSampler(policy)._sample([*ids, stop, *ids]), _sample(policy, [*ids, stop], None)):
        assert (made.ids, made.text, made.truncated) == ([*ids, stop], "2", False)
    assert TransformersSampler(policy)._sample(ids).truncated


def test_samples_end_with_the_turn() -> None:
    tokenizer = tokenizer_of("chatml")
    policy, stop = policy_of(tokenizer), tokenizer.convert_tokens_to_ids("<|im_end|>")
    (problem,) = encode_problems(tokenizer, [Problem("p", [user("1")], {})])
    settings = Sampling(samples=64, max_new_tokens=48)
    (samples,) = TransformersSampler(policy).sample([problem.ids], settings, seed=0)
    assert not any(stop in sample.ids[:-1] for sample in samples)
    ended = [sample for sample in samples if sample.ids[-1] == stop]
    assert ended and not any(sample.truncated for sample in ended)
    assert all(sample.text == tokenizer.decode(sample.ids[:-1], skip_special_tokens=True) for sample in ended)


def test_a_turns_end_is_no_text_even_where_its_token_is_not_special() -> None:
    tokenizer = built("{% for m in messages %}{{ m['content'] + '<stop>' }}{% endfor %}")
    tokenizer.add_tokens(["<stop>"])
    policy = policy_of(tokenizer)
    ids = encode(tokenizer, [user("1")], "2").completion_ids
    made = TransformersSampler(policy)._sample(ids)
    assert (made.text, made.truncated) == ("2", False)


def test_a_turn_is_truncated_only_if_its_end_is_gone() -> None:
    tokenizer = tokenizer_of("chatml")
    whole = encode(tokenizer, [user("1")], "22")
    assert tokenizer.decode(whole.completion_ids) == "22<|im_end|>\n"
    for tokens, text, truncated in ((4, "22", False), (3, "22", False), (2, "22", True), (1, "2", True)):
        cut = encode(tokenizer, [user("1")], "22", max_completion_tokens=tokens)
        assert (cut.completion_ids, cut.completion) == (whole.completion_ids[:tokens], text)
        assert cut.truncated == truncated
        assert cut == encode(tokenizer, [user("1")], "22", max_length=len(whole.prompt_ids) + tokens)
    rows = demonstrations(tokenizer, [Problem("p", [user("1")], {}, ("22",))], max_tokens=2)
    assert [(row.completion, row.truncated) for row in rows] == [("22", True)]


def test_a_demonstration_and_a_sample_have_the_same_prompt() -> None:
    for template in TEMPLATES:
        tokenizer = tokenizer_of(template)
        prompt = [turn("system", "S"), user("1")] if template == "needsys" else [user("1")]
        answer = "<think>\na\n</think>\n2"
        (row,) = demonstrations(tokenizer, [Problem("p", prompt, {}, (answer,))])
        assert row.prompt_ids == encode_problems(tokenizer, [Problem("p", prompt, {})])[0].ids
        assert row.completion_ids == encode(tokenizer, prompt, answer).completion_ids


def test_pairs_of_one_prompt_stay_one_prompt_where_an_answer_has_no_thinking() -> None:
    tokenizer = tokenizer_of("r1")
    row = {"prompt": [user("1")], "chosen": [assistant("<think>\na\n</think>2")], "rejected": [assistant("3")]}
    with pytest.warns(
        UserWarning, match=r"drops the end of the prompt.*: 1 in all \(row 1, completion 2: '<think>\\n'\)"
    ):
        chosen, rejected = from_trl([row], tokenizer)
    assert chosen.prompt_id == rejected.prompt_id and chosen.prompt_ids != rejected.prompt_ids
    assert tokenizer.decode(rejected.prompt_ids) == rejected.prompt


def test_a_change_of_the_template_is_noticed() -> None:
    tokenizer = tokenizer_of("chatml")
    assert turn_of(tokenizer).stop == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = TEMPLATES["gemma"]
    assert turn_of(tokenizer).stop == tokenizer.convert_tokens_to_ids("<end_of_turn>")
    tokenizer.chat_template = None
    assert turn_of(tokenizer).stop is None


PARTS = {  # templates of models of images, for which a text is no content
    "loop": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}" + OPENS,
    "selectattr": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + OPENS,
}


@pytest.mark.parametrize("form", PARTS)
def test_a_template_of_parts_alone_gets_parts(form: str) -> None:
    tokenizer, said = built(PARTS[form]), ("1+1?", "2", "3+3?", "6")
    assert "1+1?" not in tokenizer.apply_chat_template([user("1+1?")], tokenize=False)
    plain = [turn(role, text) for role, text in zip(("user", "assistant") * 2, said, strict=True)]
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in plain]
    whole = tokenizer.apply_chat_template(parts)["input_ids"]
    for turns in (plain, parts):
        (row,) = from_trl([{"messages": turns}], tokenizer)
        assert row.prompt_ids + row.completion_ids == whole and row.completion == "6"
        assert tokenizer.decode(row.completion_ids) == "6<|im_end|>\n" and not row.truncated
        (problem,) = encode_problems(tokenizer, [Problem("p", turns[:-1], {})])
        assert problem.ids == row.prompt_ids
    assert turn_of(tokenizer).stop == tokenizer.convert_tokens_to_ids("<|im_end|>")
