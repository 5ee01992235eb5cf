"""Conversations: the tokens of an assistant's turn, where it starts and ends, and what templates refuse."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlzoo.buffers import encode, from_trl, to_trl
from rlzoo.chat import opened, turn_of
from rlzoo.config import ProblemSource, Sampling
from rlzoo.errors import UserError
from rlzoo.policy import Policy
from rlzoo.problems import Problem, demonstrations, encode_problems, load_problems
from rlzoo.rollout import TransformersSampler
from rlzoo.rollout.vllm import _asked, _sample

SPECIAL = [
    "<pad>", "<eos>", "<bos>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<User>",
    "<Assistant>", "<think>", "</think>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]",
    "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
]  # fmt: skip
TURNS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
OPENS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    "chatml": TURNS + OPENS,
    "nogen": TURNS,
    "default-system": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Q.<|im_end|>\n' }}"
    "{% endif %}" + TURNS + OPENS,
    "needsys": "{% if messages[0]['role'] != 'system' %}{{ raise_exception('A system message is required') }}"
    "{% endif %}" + TURNS + OPENS,
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "r1": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<User>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set c = m['content'] %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<Assistant>' + c + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}",
    "llama3": "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' %}{{ bos_token + c if loop.first else c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    # the last answer has its thinking, or an empty one; those before have lost it
    "qwen3": "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% set think = c.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in c else '' %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{% set c = '<think>\n' + think + '\n</think>\n\n' + c %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}" + OPENS,
    "qwen3-thinking": "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% set think = c.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in c else '' %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{% set c = '<think>\n' + think + '\n</think>\n\n' + c %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    # closes the whole, and not only the turn, when it does not open the next
    "phi": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
}
ADDS_BOS = ("gemma", "r1", "llama3", "mistral")
STOPS = {"gemma": "<end_of_turn>", "r1": "<eos>", "mistral": "<eos>", "llama3": "<|eot_id|>", "phi": "<|end|>"}


def built(template: str | None, bos: bool = False, more: Sequence[str] = ()) -> Any:
    """A tokenizer of bytes whose end of sequence, ``<eos>``, ends no turn but R1's and Mistral's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in SPECIAL])
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", inner.token_to_id("<bos>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = template
    tokenizer.add_tokens([AddedToken(token, special=True) for token in more])
    return tokenizer


def tokenizer_of(name: str) -> Any:
    return built(TEMPLATES[name], name in ADDS_BOS)


def policy_of(tokenizer: Any, vocabulary: int | None = None) -> Policy:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return Policy(LlamaForCausalLM(config).eval(), tokenizer, "tiny")


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def user(content: Any) -> dict[str, Any]:
    return turn("user", content)


def assistant(content: Any) -> dict[str, Any]:
    return turn("assistant", content)


# The tokens of a turn

CONVERSATIONS = {
    "one turn": [user("1+1?"), assistant("2")],
    "several turns": [user("1+1?"), assistant("<think>\na\n</think>\n\n2"), user("2+2?"), assistant("4")],
    "spaces": [user(" 1+1?\n"), assistant("\n  2 \n")],
    "thinking": [user("1+1?"), assistant("<think>\none and one\n</think>\n\n2")],
    "an empty answer": [user("1+1?"), assistant("")],
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
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    called = built("{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }};{% endfor %}")
    (row,) = from_trl([{"messages": [user("1+1?"), call, turn("tool", "2"), assistant("Two")]}], called)
    assert row.prompt == '1+1?;[{"function": {"name": "add"}}];2;'
    assert row.messages == [user("1+1?"), assistant(""), turn("tool", "2")]


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
    assert set(_asked(policy, Sampling(), 0, 0, greedy=False)["stop_token_ids"]) == policy.eos_ids
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
    with pytest.warns(UserWarning, match=r"last words before an answer.*: 1 in all \(row 1: '<think>\\n'\)"):
        chosen, rejected = from_trl([row], tokenizer)
    assert chosen.prompt_id == rejected.prompt_id and chosen.prompt_ids != rejected.prompt_ids
    assert tokenizer.decode(rejected.prompt_ids) == rejected.prompt


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
        ("chatml", [user("1"), assistant(3), user("2")], "content of message 2 is a int"),
        ("chatml", [user({"text": "1"})], "content of message 1 is a dict"),
        ("chatml", [user([])], "content of message 1 is a list"),
        ("chatml", [user([{"type": "image", "url": "x"}])], "a part of type 'image' in message 1"),
        ("chatml", [user([3])], "a part of type 'int' in message 1"),
        ("chatml", [{"content": "1"}], "role of message 1 is null"),
        ("chatml", ["1"], "role of message 1 is null"),
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
    with pytest.raises(UserError, match=r"^problem 'p': the prompt (holds|is a conversation of no messages)"):
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
    with pytest.raises(UserError, match="row 0: the conversation has a system turn of its own: leave `system` out"):
        load_problems(ProblemSource(source=table(tmp_path, {"prompt": [turn("system", "T"), user("1")]}), system="S"))
    with pytest.raises(UserError, match=r"row 0: `system` is for conversations.*add chat: true"):
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
    with pytest.raises(UserError, match=r"problem 'train-1': the user's text spells '<\|im_end\|>'"):
        encode_problems(tokenizer, load_problems(source))
    allowed = load_problems(source.model_copy(update={"special_tokens": "allow"}))
    with pytest.warns(UserWarning, match="read as that token: 1 in all .problem train-1"):
        assert len(encode_problems(tokenizer, allowed)) == 2


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
        with pytest.raises(UserError, match=r"row 1: the completion goes on after '<eos>' or '<\|im_end\|>'"):
            from_trl([{"prompt": rendered, "completion": completion}], tokenizer)
        with pytest.warns(UserWarning, match="read as that token: 1 in all"):
            from_trl([{"prompt": rendered, "completion": completion}], tokenizer, special_tokens="allow")
    for token in ("<bos>", "<pad>", "<|im_start|>"):
        with pytest.raises(UserError, match="row 1: the completion's text spells '<"):
            from_trl([{"prompt": rendered, "completion": f"2{token}3"}], tokenizer)
    (row,) = from_trl([{"text": rendered + "2<|im_end|>\n"}], built(TEMPLATES["chatml"], bos=True))
    assert tokenizer.decode(row.completion_ids).startswith(rendered)


def test_a_change_of_the_template_is_noticed() -> None:
    tokenizer = tokenizer_of("chatml")
    assert turn_of(tokenizer).stop == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = TEMPLATES["gemma"]
    assert turn_of(tokenizer).stop == tokenizer.convert_tokens_to_ids("<end_of_turn>")
    tokenizer.chat_template = None
    assert turn_of(tokenizer).stop is None
