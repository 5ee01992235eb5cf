"""Text to tokens, and TRL's data set formats to buffers and back."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from chat_templates import tokenizer_of
from tokenizers import processors

from rlzoo.buffers import OfflineBuffer, encode, encode_completion, encode_prompt, from_trl, to_trl
from rlzoo.errors import UserError
from rlzoo.types import Selection, Trajectory
from rlzoo.worlds.tokenizer import build_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def plain() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def chat() -> Any:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def ending() -> Any:
    """A tokenizer whose own special tokens stand on both sides of a text."""
    tokenizer: Any = build_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A <eos>", special_tokens=[("<unk>", 2), ("<eos>", 1)]
    )
    return tokenizer


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def assistant(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


# Text to tokens


def test_a_plain_prompt_keeps_its_special_tokens_but_never_an_end(ending: Any) -> None:
    text, ids = encode_prompt(ending, "1+1")
    assert (text, ids[0], len(ids)) == ("1+1", 2, 4)
    assert ids[-1] != ending.eos_token_id


def test_an_end_of_sequence_in_the_prompts_own_text_stays(plain: Any, ending: Any) -> None:
    assert encode_prompt(plain, "1<eos>")[1][-1] == plain.eos_token_id
    one = plain("1")["input_ids"]
    assert encode_prompt(ending, "1<eos>")[1] == [2, *one, 1], "once"
    assert encode_prompt(ending, "<eos>")[1] == [2, 1]


def test_a_conversation_goes_through_the_template_with_no_further_special_tokens(ending: Any, chat: Any) -> None:
    ending.chat_template = TEMPLATE
    text, ids = encode_prompt(ending, user("1+1"))
    assert text == "u:1+1\na:"
    assert ids == chat(text)["input_ids"]


def test_a_completion_ends_once(plain: Any, ending: Any) -> None:
    eos = plain.eos_token_id
    for tokenizer in (plain, ending):
        for text in ("22", "22<eos>"):
            ids = encode_completion(tokenizer, text)
            assert ids == [*plain("22")["input_ids"], eos]
    assert encode_completion(plain, "") == [eos]


def test_the_end_is_trained_on_even_where_it_is_the_padding(plain: Any) -> None:
    tokenizer: Any = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert encode_completion(tokenizer, "2") == [*plain("2")["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("max_length", range(3, 8))
def test_truncation_takes_the_end_first_and_says_so(plain: Any, max_length: int) -> None:
    whole = [*plain("123")["input_ids"], plain.eos_token_id]
    encoded = encode(plain, "1+", "123", max_length)
    assert len(encoded.prompt_ids) == 2
    assert encoded.completion_ids == whole[: max_length - 2]
    assert encoded.truncated == (max_length < 6)
    assert encoded.truncated == (encoded.completion_ids[-1] != plain.eos_token_id)
    assert encoded.completion == "123"[: max_length - 2]


def test_the_text_of_a_completion_holds_no_end_of_sequence(plain: Any) -> None:
    assert encode(plain, "1", "2<eos>").completion == "2"


def test_what_cannot_be_encoded_is_an_error(plain: Any) -> None:
    with pytest.raises(UserError, match="the prompt alone takes 3 of 3 tokens: raise max_length"):
        encode(plain, "1+1", "2", max_length=3)
    with pytest.raises(UserError, match="has no chat template"):
        encode_prompt(plain, user("1"))
    with pytest.raises(UserError, match="the prompt has no tokens"):
        encode_prompt(plain, "")
    endless: Any = build_tokenizer()
    endless.eos_token = None
    with pytest.raises(UserError, match=r"set tokenizer\.eos_token"):
        encode_completion(endless, "1")


# Import

ROWS: dict[str, tuple[dict[str, Any], list[tuple[str, str, str, float | None]]]] = {
    "prompt-completion": (
        {"prompt": "1+1=?\n", "completion": "2"},
        [("1+1=?\n", "2", "demonstration", None)],
    ),
    "conversational prompt-completion": (
        {"prompt": user("1+1"), "completion": assistant("2")},
        [("u:1+1\na:", "2", "demonstration", None)],
    ),
    "preference": (
        {"prompt": "1+1=?\n", "chosen": "2", "rejected": "3"},
        [("1+1=?\n", "2", "preference", 1.0), ("1+1=?\n", "3", "preference", 0.0)],
    ),
    "conversational preference": (
        {"prompt": user("1+1"), "chosen": assistant("2"), "rejected": assistant("3")},
        [("u:1+1\na:", "2", "preference", 1.0), ("u:1+1\na:", "3", "preference", 0.0)],
    ),
    "implicit preference": (
        {"chosen": "1+1= 2", "rejected": "1+1= 3"},
        [("1+1=", " 2", "preference", 1.0), ("1+1=", " 3", "preference", 0.0)],
    ),
    "conversational implicit preference": (
        {"chosen": user("1+1") + assistant("2"), "rejected": user("1+1") + assistant("3")},
        [("u:1+1\na:", "2", "preference", 1.0), ("u:1+1\na:", "3", "preference", 0.0)],
    ),
    "unpaired preference": (
        {"prompt": "1+1=?\n", "completion": "3", "label": False},
        [("1+1=?\n", "3", "preference", 0.0)],
    ),
    "conversational unpaired preference": (
        {"prompt": user("1+1"), "completion": assistant("2"), "label": True},
        [("u:1+1\na:", "2", "preference", 1.0)],
    ),
    "messages": (
        {"messages": user("1") + assistant("2") + user("3") + assistant("4")},
        [("u:1\na:2\nu:3\na:", "4", "demonstration", None)],
    ),
}


@pytest.mark.parametrize("as_dataset", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_recognised_by_its_columns(chat: Any, name: str, as_dataset: bool) -> None:
    row, expected = ROWS[name]
    rows: Any = [{**row, "answer": 2}] * 2
    buffer = from_trl(datasets.Dataset.from_list(rows) if as_dataset else rows, chat)
    assert [(t.prompt, t.completion, t.source, t.reward) for t in buffer] == expected * 2
    for made in buffer:
        assert made.prompt_ids == chat(made.prompt)["input_ids"]
        ending = "\n" if made.messages else ""  # of a turn in the template; no token of it would stop a sample
        assert made.completion_ids == [*chat(made.completion + ending)["input_ids"], chat.eos_token_id]
        assert made.columns == {"answer": 2}
        assert not made.truncated
        assert (made.messages is None) == (not made.prompt.startswith("u:"))
    assert len(set(buffer.column("prompt_id"))) == 1


def test_text_that_brings_its_own_bos_has_one() -> None:
    made = tokenizer_of("gemma")
    (row,) = from_trl([{"text": "<bos>1<eos>"}], made)
    assert made.decode(row.prompt_ids + row.completion_ids) == "<bos>1<eos>"
    rendered = made.apply_chat_template(user("1"), add_generation_prompt=True, tokenize=False)
    (row,) = from_trl([{"prompt": rendered, "completion": "2"}], made)
    assert made.decode(row.prompt_ids) == rendered
    assert encode_prompt(made, "1")[1] == encode_prompt(made, "<bos>1")[1]
    several = from_trl([{"prompt": str(n), "completion": "2"} for n in range(3)], made)
    assert [made.decode(row.prompt_ids) for row in several] == ["<bos>0", "<bos>1", "<bos>2"]


def test_rows_without_an_id_of_their_own_are_told_apart_by_their_prompts(plain: Any) -> None:
    """An id that is null, NaN or an empty cell would make one group of all such rows."""
    rows = [{"prompt": str(n), "completion": "2", "id": own} for n, own in enumerate((None, float("nan"), "", " ", 7))]
    found = from_trl(rows, plain).column("prompt_id")
    assert len(set(found)) == 5
    assert found[4] == "7"


def test_plain_text_needs_a_first_token(plain: Any, ending: Any) -> None:
    (row,) = from_trl([{"text": "1+1"}], ending)
    assert (row.prompt_ids, row.completion) == ([2], "1+1")
    (row,) = from_trl([{"text": "11+1"}], plain)
    assert (row.prompt, row.completion) == ("1", "1+1")
    (row,) = from_trl([{"text": "1+1"}], plain)  # the tokenizer has none: the text's own is given, not learned
    assert (row.prompt, row.completion) == ("1", "+1")
    assert row.prompt_ids + row.completion_ids == encode_completion(plain, "1+1")
    with pytest.raises(UserError, match="row 1: the text is a single token"):
        from_trl([{"text": "<eos>"}], plain)


def test_prompts_are_named_by_a_column_or_by_their_text(plain: Any) -> None:
    row = {"prompt": "1", "completion": "2"}
    extras: dict[str, dict[str, object]] = {"id": {"id": 7}, "both": {"id": 7, "prompt_id": "p"}, "none": {}}
    ids = {key: from_trl([{**row, **extra}], plain)[0] for key, extra in extras.items()}
    assert (ids["id"].prompt_id, ids["id"].columns) == ("7", {})
    assert (ids["both"].prompt_id, ids["both"].columns) == ("p", {"id": 7})
    # printf 1 | b2sum -l 64
    assert ids["none"].prompt_id == "f6fc42039fba3776"


def test_max_length_marks_cut_rows(plain: Any) -> None:
    buffer = from_trl([{"prompt": "1+1", "completion": text} for text in ("2", "222")], plain, max_length=6)
    assert buffer.column("truncated") == [False, True]
    assert buffer.column("completion") == ["2", "222"]
    assert buffer.tokens().tolist() == [5, 6]


def test_imported_preferences_are_pairs(plain: Any) -> None:
    rows = [{"prompt": "1", "chosen": str(i), "rejected": str(i + 5)} for i in range(3)]
    assert from_trl(rows, plain).view(Selection.PAIRS).units == ((0, 1), (2, 3), (4, 5))


GOOD = {"prompt": "1", "completion": "2"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the data set has no rows"),
        ([{"question": "1", "answer": "2"}], "row 1: the columns 'question', 'answer' match no format"),
        ([{"question": "1", "answer": "2"}], "text): name yours with --column prompt=NAME --column completion=NAME"),
        (
            [{"prompt": "1"}],
            "row 1: no column 'completion', which prompt-completion data need; the row has 'prompt': name yours",
        ),
        ([{"prompt": "1", "chosen": "2"}], "--column rejected=NAME"),
        ([GOOD, {"prompt": 5, "completion": "2"}], "row 2: column 'prompt' holds an int"),
        ([GOOD, {"prompt": b"\xff", "completion": "2"}], "row 2: column 'prompt' holds bytes"),
        ([{"prompt": "1", "completion": "2", "text": None}, {}], "row 2 has no columns"),
        ([{"messages": user(" \n") + assistant("2")}], "row 1: the prompt's turns are empty or blank"),
        ([{"instruction": "1", "output": None}], "row 1: column 'output' is null"),
        ([{"instruction": "1", "input": "", "output": " "}], "row 1: column 'output' is empty or blank"),
        ([{"instruction": None, "input": "1", "output": "2"}], "row 1: column 'instruction' is null"),
        ([{"instruction": "", "input": "", "output": "2"}], "row 1: column 'instruction' is empty or blank"),
        ([{"instruction": "1", "output": 2}], "row 1: column 'output' is an int: give text"),
        (
            [{"instruction": "1", "output": "2", "history": [{"role": "user", "content": "0"}]}],
            "row 1: column 'history' must hold pairs of texts",
        ),
        (
            [{"conversations": [{"from": "human"}, {"from": "gpt", "value": "2"}]}],
            "row 1: column 'conversations' has no text in 'value' of turn 1",
        ),
        (
            [{"prompt": "1", "chosen": "2", "rejected": ["3"]}],
            "row 1: column 'rejected' is not a conversation (its entry 1",
        ),
        ([GOOD, {"prompt": "1", "completion": None}], "row 2: no value in column 'completion'"),
        (
            [GOOD, {**GOOD, "label": True}],
            "row 2: this is unpaired preference data and the first row is prompt-completion",
        ),
        (
            [GOOD, {"prompt": user("1"), "completion": assistant("2")}],
            "row 2: column 'prompt' mixes conversations and plain text",
        ),
        ([{"prompt": user("1"), "completion": "2"}], "row 1: columns 'completion' and 'prompt' mix"),
        ([{**GOOD, "label": "yes"}], "row 1: column 'label' holds 'yes': give true or false"),
        ([{"prompt": "", "completion": "2"}], "row 1: column 'prompt' is empty"),
        ([{"prompt": 3, "completion": "2"}], "row 1: column 'prompt' holds an int"),
        ([{"prompt": "1", "chosen": "2", "rejected": "2"}], "row 1: columns 'chosen' and 'rejected' are the same"),
        ([{"chosen": "2", "rejected": "3"}], "row 1: columns 'chosen' and 'rejected' share no beginning"),
        ([{"chosen": "2", "rejected": user("3")}], "row 1: columns 'chosen' and 'rejected' mix"),
        (
            [{"chosen": user("2") + assistant("1"), "rejected": user("3") + assistant("1")}],
            "row 1: columns 'chosen' and 'rejected' differ before their last turn",
        ),
        ([{"messages": user("1")}], "row 1: column 'messages' must hold a prompt and end with the assistant's turn"),
        ([{"messages": assistant("1")}], "row 1: column 'messages' must hold a prompt"),
        ([{"messages": "1"}], "row 1: column 'messages' is plain text"),
        ([{"text": user("1")}], "row 1: column 'text' is a conversation"),
        ([{"messages": [{"role": "user"}]}], "row 1: column 'messages' has a message without text"),
        (
            [{"prompt": user("1"), "completion": assistant("2") + user("3")}],
            "row 1: column 'completion' must begin and end with a turn of the assistant",
        ),
        ([{"prompt": b"\xff", "completion": "2"}], "row 1: column 'prompt' holds bytes that are not UTF-8 text"),
        ([{**GOOD, "completion": "\ud83d"}], "row 1: column 'completion' holds a lone surrogate (\\ud83d)"),
        ([{**GOOD, "completion": ""}], "row 1: column 'completion' is empty or blank"),
        ([{"prompt": "1", "chosen": "2", "rejected": " \n"}], "row 1: column 'rejected' is empty or blank"),
        ([{"messages": user("1") + assistant("")}], "row 1: column 'messages' has an answer that is empty"),
        ([{**GOOD, "label": None}], "row 1: no value in column 'label', which unpaired preference data need"),
        ([{**GOOD, "reward": None}], "row 1: no value in column 'reward', which graded data need"),
        ([{**GOOD, "reward": "good"}], "row 1: column 'reward' holds 'good': give a finite number"),
        ([{**GOOD, "reward": float("nan")}], "row 1: column 'reward' holds nan: give a finite number"),
        (
            [{"prompt": "1", "completion": ["2"], "reward": [1, 0]}],
            "row 1: columns 'completion' and 'reward' hold lists of 1 and 2",
        ),
        (
            [{"conversations": [{"from": "alien", "value": "1"}]}],
            "row 1: column 'conversations' has a turn from 'alien'",
        ),
        (
            [{"conversations": [{"from": "human", "value": "1"}]}],
            "row 1: column 'conversations' must hold a prompt and end with the assistant's turn",
        ),
        ([{"conversations": None}], "row 1: no value in column 'conversations', which conversational"),
        ([{"text": None}], "row 1: no value in column 'text', which plain language-modelling data need"),
        ([{"prompt": "1", "completion": "2", "kto_tag": None}], "row 1: no value in column 'kto_tag', which unpaired"),
        (
            [{"question": "1", "chosen": "ab", "rejected": "ac"}],
            "no column 'prompt', but 'question': say whether it is",
        ),
        (
            [{"prompt": "[{'role': 'user', 'content': '1'}]", "completion": "2"}],
            "column 'prompt' holds a conversation as",
        ),
        (
            [{"messages": [*user("1"), {"role": "assistant", "content": "2", "reasoning_content": "one and one"}]}],
            "row 1: the chat template does not render 'reasoning_content' of the assistant's turn",
        ),
        (
            [{"conversations": [{"from": "human", "value": "1"}, {"from": "function_call", "value": "rate(USD)"}]}],
            "row 1: column 'conversations' has a tool call in turn 2 that is not JSON with a name and arguments",
        ),
    ],
)
def test_bad_data_name_the_row_the_column_and_the_mend(chat: Any, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError) as error:
        from_trl(rows, chat)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Export


@pytest.mark.parametrize("name", [name for name in ROWS if "unpaired" not in name])
def test_export_then_import_gives_the_same_buffer(chat: Any, name: str) -> None:
    row, expected = ROWS[name]
    numbered = [{**row, "prompt_id": f"p{i}", "answer": i} for i in range(3)]
    buffer = from_trl(numbered, chat)
    kind: Any = "preference" if expected[0][2] == "preference" else "prompt_completion"
    exported = to_trl(buffer, kind, conversational=buffer[0].messages is not None)
    assert list(from_trl(exported, chat)) == list(buffer)


@pytest.mark.parametrize("name", [name for name in ROWS if "unpaired" in name or name.endswith("preference")])
def test_unpaired_export_then_import_gives_the_same_buffer(chat: Any, name: str) -> None:
    buffer = from_trl([ROWS[name][0]] * 2, chat)
    exported = to_trl(buffer, "unpaired_preference", conversational=buffer[0].messages is not None)
    assert list(from_trl(exported, chat)) == list(buffer)


def test_many_preferences_of_one_prompt_are_all_exported(plain: Any) -> None:
    rows = [{"prompt": "1", "chosen": "2" * i, "rejected": "3" * i, "prompt_id": "p"} for i in range(1, 9)]
    assert to_trl(from_trl(rows, plain), "preference").to_list() == rows


def test_prompt_only_gives_each_prompt_once(chat: Any) -> None:
    buffer = from_trl([{"prompt": p, "completion": "2", "answer": p} for p in ("1", "3", "1")], chat)
    one, three = buffer.column("prompt_id")[:2]
    assert to_trl(buffer, "prompt_only").to_list() == [
        {"answer": "1", "prompt_id": one, "prompt": "1"},
        {"answer": "3", "prompt_id": three, "prompt": "3"},
    ]
    assert to_trl(buffer, "prompt_only", conversational=True)["prompt"][0] == user("1")


def test_truncated_completions_are_not_exported(plain: Any) -> None:
    rows = [{"prompt": "1+1", "completion": text} for text in ("2", "222")]
    exported = to_trl(from_trl(rows, plain, max_length=6), "prompt_completion")
    assert exported["completion"][:] == ["2"]
    preferences = [{"prompt": "1+1", "chosen": "2", "rejected": "222"}]
    cut = from_trl(preferences, plain, max_length=6)
    assert to_trl(cut, "unpaired_preference")["label"][:] == [True]
    with pytest.raises(UserError, match="no rows to write as preference"):
        to_trl(cut, "preference")


def test_export_of_sampled_rows(plain: Any) -> None:
    row = Trajectory("1", "2", [4], [5, 1], "p", source="policy", reward=0.7)
    (exported,) = to_trl(OfflineBuffer.from_trajectories([row]), "unpaired_preference")
    assert exported == {"prompt_id": "p", "prompt": "1", "completion": "2", "label": True}


def test_what_cannot_be_exported_is_an_error(plain: Any) -> None:
    buffer = from_trl([GOOD], plain)
    with pytest.raises(UserError, match="no rows to write as unpaired_preference"):
        to_trl(buffer, "unpaired_preference")
    with pytest.raises(UserError, match="the buffer has no pairs"):
        to_trl(buffer, "preference")
    with pytest.raises(UserError, match="unknown kind of TRL data set 'preferences': did you mean 'preference'"):
        to_trl(buffer, "preferences")  # type: ignore[arg-type]
    mixed = from_trl([{**GOOD, "answer": 1}, {**GOOD, "answer": "x"}], plain)
    with pytest.raises(UserError, match=r"exported row 2: column 'answer' holds a value \(str\)"):
        to_trl(mixed, "prompt_completion")
