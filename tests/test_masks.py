"""Completions of several turns: what is learned from is what the mask says, from the data to the gradient."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import built as built_objective
from batches import of_each_kind
from chat_templates import (
    CALLS,
    OPENS,
    TEMPLATES,
    TURNS,
    WITH_TOOLS,
    assistant,
    built,
    policy_of,
    tokenizer_of,
    turn,
    user,
)

from rlzoo.buffers import BadRows, OfflineBuffer, RolloutBuffer, from_trl, read_buffer, to_trl
from rlzoo.buffers.overview import overview
from rlzoo.buffers.problems import Problem
from rlzoo.cli import main
from rlzoo.comparison.base_text import text_results
from rlzoo.comparison.retention import LIKELIHOOD
from rlzoo.config import Sampling, Training
from rlzoo.errors import UserError
from rlzoo.objective import get_objective, list_objectives
from rlzoo.policy import Assembler, MicroBatches, Policy, load_policy, log_probs
from rlzoo.policy.loading import save_policy
from rlzoo.policy.sequences import learned, learned_tokens
from rlzoo.rollout import Collector, Sample, mismatch, sampler_of
from rlzoo.rollout.rescoring import rescored
from rlzoo.testing.engine import SameRows, rows_of, units_of
from rlzoo.training import Trainer, train, with_behaviour, with_reference
from rlzoo.training.sums import truncated_importance
from rlzoo.types import Trajectory

PLUGIN = f"{Path(__file__).parent / 'plugins' / 'with_tool'}.py:WithTool"
TALK = [user("1+1?"), assistant("2"), user("2+2?"), assistant("4")]


# From data to masks


def spans(row: Trajectory) -> list[list[int]]:
    """The tokens learned from, as one list per run."""
    mask, found, before = row.completion_mask or [True] * len(row.completion_ids), list[list[int]](), False
    for token, kept in zip(row.completion_ids, mask, strict=True):
        if kept and not before:
            found.append([])
        if kept:
            found[-1].append(token)
        before = kept
    return found


def assert_rows_of_their_own(row: Trajectory, tokenizer: Any, turns: Sequence[dict[str, Any]], own: list[int]) -> None:
    """Each turn learned from has the tokens and the context that it has as the last one; nothing else is learned."""
    ids = row.prompt_ids + row.completion_ids
    starts = [place + len(row.prompt_ids) for place in learned(row)]
    expected: list[int] = []
    for place in own:
        (alone,) = from_trl([{"messages": list(turns[: place + 1])}], tokenizer)
        begin = len(alone.prompt_ids)
        assert ids[:begin] == alone.prompt_ids
        same = [a == b for a, b in zip(alone.completion_ids, ids[begin:], strict=False)]
        length = same.index(False) if False in same else len(same)
        lost = tokenizer.decode(alone.completion_ids[length:])
        assert lost in ("", "<eos>"), "only what closes the whole may be missing within it"
        expected += range(begin, begin + length)
    assert starts == expected and row.prompt_ids == ids[: expected[0]]


@pytest.mark.filterwarnings("ignore:the chat template drops the end of the prompt")
@pytest.mark.parametrize("template", TEMPLATES)
def test_turns_have_the_tokens_of_rows_of_their_own_or_are_refused(template: str) -> None:
    tokenizer = tokenizer_of(template)
    turns = [turn("system", "S"), *TALK] if template == "needsys" else TALK
    own = [place for place, message in enumerate(turns) if message["role"] == "assistant"]
    if template.startswith("qwen3"):  # the last answer gets an empty thinking, which is lost once a turn follows
        with pytest.raises(UserError, match=r"^row 1: the chat template renders turn 1 of the completion otherwise"):
            from_trl([{"messages": turns}], tokenizer, turns="all")
        return
    (row,) = from_trl([{"messages": turns}], tokenizer, turns="all")
    assert_rows_of_their_own(row, tokenizer, turns, own)
    assert len(spans(row)) == 2 and row.messages == turns[: own[0]] and not row.truncated
    assert row.completion.lstrip().startswith("2") and "2+2?" in row.completion and row.completion.endswith("4")


def test_thinking_that_is_dropped_once_turns_follow_is_refused() -> None:
    thinks = [user("1"), assistant("<think>\na\n</think>\n2"), user("3"), assistant("4")]
    with pytest.raises(UserError, match=r"renders turn 1 of the completion otherwise once turns follow it: learn"):
        from_trl([{"messages": thinks}], tokenizer_of("r1"), turns="all")
    (last,) = from_trl([{"messages": thinks}], tokenizer_of("r1"))
    assert last.completion_mask is None and last.completion == "4"


def test_tool_calls_and_results_are_one_completion_of_which_the_assistants_turns_are_learned_from() -> None:
    (row,) = from_trl([{"messages": WITH_TOOLS}], CALLS, turns="all")
    assert_rows_of_their_own(row, CALLS, WITH_TOOLS, [2, 4, 6])
    texts = [CALLS.decode(span) for span in spans(row)]
    assert texts[1:] == ["It is 2.<|im_end|>\n", "4<|im_end|>\n"] and '"name": "add"' in texts[0]
    hidden = [t for t, kept in zip(row.completion_ids, row.completion_mask or [], strict=True) if not kept]
    assert "tool\n2" in CALLS.decode(hidden) and "2+2?" in CALLS.decode(hidden)
    for place in (2, 4, 6):
        (alone,) = from_trl([{"messages": WITH_TOOLS[: place + 1]}], CALLS, turns="all")
        assert alone.completion_ids == (
            row.completion_ids if place == 6 else row.completion_ids[: len(alone.completion_ids)]
        )


def test_which_turns_are_learned_from() -> None:
    tokenizer = tokenizer_of("chatml")
    flagged = [user("1"), {**assistant("2"), "weight": 0}, user("3"), {**assistant("4"), "weight": 1}, user("5")]
    flagged += [{**assistant("6"), "weight": 0}, user("7"), assistant("8")]
    (row,) = from_trl([{"messages": flagged}], tokenizer, turns="weight")
    assert [tokenizer.decode(span) for span in spans(row)] == ["4<|im_end|>\n", "8<|im_end|>\n"]
    assert row.prompt.endswith("3<|im_end|>\n<|im_start|>assistant\n")
    (last,) = from_trl([{"messages": flagged}], tokenizer, turns="last")
    assert last == from_trl([{"messages": flagged}], tokenizer)[0] and last.completion == "8"
    single = [*flagged[:2], *flagged[2:4], user("5"), {**assistant("6"), "weight": 0}]
    (one,) = from_trl([{"messages": single}], tokenizer, turns="weight")
    (same,) = from_trl([{"messages": single[:4]}], tokenizer)
    assert (one.prompt_ids, one.completion_ids, one.completion_mask) == (same.prompt_ids, same.completion_ids, None)
    shared = [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2", "train": False}]
    shared += [{"from": "human", "value": "3"}, {"from": "gpt", "value": "4", "train": True}]
    (sharegpt,) = from_trl([{"conversations": shared}], tokenizer, turns="train")
    assert sharegpt.completion_mask is None and sharegpt.completion == "4"


def test_completions_and_samples_of_several_turns() -> None:
    tokenizer = tokenizer_of("chatml")
    (whole,) = from_trl([{"messages": TALK}], tokenizer, turns="all")
    row = {"prompt": TALK[:1], "completion": TALK[1:]}
    (row_of_all,) = from_trl([row], tokenizer, turns="all")
    assert row_of_all == whole
    (row_of_last,) = from_trl([row], tokenizer)
    assert row_of_last.prompt_ids == whole.prompt_ids and spans(row_of_last) == spans(whole)[1:]
    (graded,) = from_trl([{"messages": TALK, "reward": 0.5}], tokenizer, turns="all")
    assert (graded.source, graded.reward, graded.completion_mask) == ("policy", 0.5, whole.completion_mask)
    pair = {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": [assistant("3"), user("2+2?"), assistant("5")]}
    chosen, rejected = from_trl([pair], tokenizer, turns="all")
    assert chosen.prompt_id == rejected.prompt_id and chosen.completion_mask == rejected.completion_mask


WRONG: list[tuple[dict[str, Any], str, str]] = [
    (
        {"messages": [user("1"), {**assistant("2"), "weight": 0.5}]},
        "weight",
        "'weight' = 0.5 in message 2: give 0 or 1",
    ),
    (
        {"messages": [user("1"), {**assistant("2"), "weight": 0}]},
        "weight",
        "has no turn of the assistant that is learned",
    ),
    ({"messages": [assistant("1"), user("2"), assistant("3")]}, "all", "begins with a turn of the assistant"),
    ({"messages": [user("1"), assistant(" "), user("2"), assistant("3")]}, "all", "has an answer that is empty"),
    (
        {"prompt": [user("1")], "completion": [user("2"), assistant("3")]},
        "all",
        "must begin and end with a turn of the",
    ),
    ({"input_ids": [1, 2], "labels": [-100, 3]}, "last", "column 'labels' has 3 for token 2 at place 1"),
    (
        {"input_ids": [1, 2], "assistant_masks": [1]},
        "last",
        "has 2 tokens and a mask or label of 1: give one per token",
    ),
    ({"input_ids": [1, 2], "assistant_masks": [0, 0]}, "last", "has no token that is learned from"),
]


@pytest.mark.parametrize(("row", "turns", "told"), WRONG, ids=[told for *_, told in WRONG])
def test_what_cannot_be_learned_from_is_named(row: dict[str, Any], turns: str, told: str) -> None:
    with pytest.raises(UserError, match=rf"^row 1: .*{re.escape(told)}") as error:
        from_trl([row], tokenizer_of("chatml"), turns=turns)
    assert "\n" not in str(error.value)


def test_conversations_without_the_key_are_counted() -> None:
    bad = BadRows()
    rows = [{"messages": TALK}, {"messages": [user("1"), {**assistant("2"), "weight": 1}]}]
    made = from_trl(rows, tokenizer_of("chatml"), turns="weight", bad=bad)
    assert len(spans(made[0])) == 2
    (event,) = bad.events()
    assert event.startswith("conversations in which no turn has the key of training.turns") and "1 in all" in event


def test_a_cut_leaves_something_to_learn_from_or_the_row_is_bad(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("chatml")
    row = {"prompt": TALK[:1], "completion": TALK[1:]}
    (whole,) = from_trl([row], tokenizer, turns="all")
    first = len(spans(whole)[0])
    (cut,) = from_trl([row], tokenizer, max_completion_tokens=first + 2, turns="all")
    assert (cut.completion_mask, cut.truncated) == ([True] * first + [False] * 2, True)
    assert len(whole.completion_messages or []) == 3 and cut.completion_messages is None
    (same,) = from_trl([row], tokenizer, max_length=len(whole.prompt_ids) + first, turns="all")
    assert same.completion_mask is None and same.truncated
    with pytest.raises(UserError, match=rf"row 1: the turns learned from begin after the first {first} tokens"):
        from_trl([row], tokenizer, max_completion_tokens=first, turns="last")
    last = from_trl([row, {"prompt": TALK[:1], "completion": TALK[1:2]}], tokenizer, turns="last")
    last.save(tmp_path / "saved")
    bad = BadRows("drop")
    kept = read_buffer(str(tmp_path / "saved"), tokenizer, max_completion_tokens=first, bad=bad)
    assert len(kept) == 1 and bad.dropped == 1 and "the tokens learned from begin after" in bad.first[0]
    from_trl([row], tokenizer, turns="all").save(tmp_path / "both")
    (saved,) = read_buffer(str(tmp_path / "both"), tokenizer, max_completion_tokens=first + 2)
    assert saved == cut


MARKED = ("qwen3", "llama3", "gemma", "phi3", "qwen2_5")


@pytest.mark.parametrize("family", MARKED)
def test_marks_in_templates_say_the_same_as_rows_of_their_own(family: str) -> None:
    """TRL's templates for training: with their marks, and without them by comparing with each turn as the last."""
    trl = pytest.importorskip("trl")
    template = (Path(trl.__file__).parent / "chat_templates" / f"{family}_training.jinja").read_text()
    plain, marked = built(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)), built(template)
    turns = [user("1+1?"), assistant("2"), user("2+2?"), assistant("4"), user("3+3?"), assistant("6")]
    rows = [from_trl([{"messages": turns}], tokenizer, turns="all")[0] for tokenizer in (plain, marked)]
    assert [marked.decode(span).strip() for span in spans(rows[1])] == [
        marked.decode(s).strip() for s in spans(rows[0])
    ]
    assert rows[0].prompt_ids == rows[1].prompt_ids and len(spans(rows[1])) == 3
    made = marked.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    ids = rows[1].prompt_ids + rows[1].completion_ids
    assert ids == made["input_ids"][: len(ids)]
    learns = [place + len(rows[1].prompt_ids) for place in learned(rows[1])]
    assert {place for place, one in enumerate(made["assistant_masks"]) if one} >= set(learns)


def test_a_template_with_marks_may_change_earlier_turns() -> None:
    """It says what is learned from where each turn as the last one would say otherwise."""
    tokenizer = built(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ ('<think>\n\n</think>\n\n' if loop.last else '') + m['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}" + OPENS
    )
    (row,) = from_trl([{"messages": TALK}], tokenizer, turns="all")
    assert [tokenizer.decode(span) for span in spans(row)] == ["2<|im_end|>", "<think>\n\n</think>\n\n4<|im_end|>"]
    everything = built(
        re.sub(r"(\{\{.*\}\})", r"{% generation %}\1{% endgeneration %}", TURNS, flags=re.DOTALL) + OPENS
    )
    with pytest.raises(
        UserError, match=r"generation %\} marks 1 parts of a conversation with 2 turns of the assistant"
    ):
        from_trl([{"messages": TALK}], everything, turns="all")


def test_tokenised_rows_go_to_other_trainers_and_come_back() -> None:
    tokenizer = tokenizer_of("chatml")
    buffer = from_trl([{"messages": TALK, "prompt_id": "p"}, {"messages": TALK[:2]}], tokenizer, turns="all")
    out = to_trl(buffer, "tokenised")
    row = buffer[0]
    learns = {place + len(row.prompt_ids) for place in learned(row)}
    assert out[0]["labels"] == [t if at in learns else -100 for at, t in enumerate(out[0]["input_ids"])]
    assert out[0]["completion_mask"].index(1) == len(row.prompt_ids)
    back = from_trl(out, tokenizer)
    keys = ("prompt_ids", "completion_ids", "completion_mask", "prompt", "completion", "prompt_id")
    assert [[getattr(r, k) for k in keys] for r in back] == [[getattr(r, k) for k in keys] for r in buffer]
    masks = [int(at in learns) for at in range(len(out[0]["input_ids"]))]
    (trl,) = from_trl([{"input_ids": out[0]["input_ids"], "assistant_masks": masks}], tokenizer)
    assert (trl.completion_ids, trl.completion_mask) == (row.completion_ids, row.completion_mask)
    with pytest.raises(UserError, match="has tokens that are not learned from, which text cannot say"):
        to_trl(buffer, "prompt_completion")


# Buffers


def test_masks_are_kept_and_checked_and_old_buffers_have_none(tmp_path: Path) -> None:
    row = Trajectory("p", "c", [1], [2, 3, 4], "0", completion_mask=[True, False, True])
    buffer = OfflineBuffer.from_trajectories([row, replace(row, completion_mask=None)])
    for name in ("folder", "rows.parquet", "rows.jsonl"):
        (buffer.save if name == "folder" else buffer.to_parquet if "parquet" in name else buffer.to_jsonl)(
            tmp_path / name
        )
        assert list(OfflineBuffer.load(tmp_path / name)) == list(buffer)
    wrong = {"3 values for": [True] * 2, "is false for all tokens": [False] * 3}
    for told, mask in (("2 values for 3", wrong["3 values for"]), *list(wrong.items())[1:]):
        with pytest.raises(UserError, match=f"completion_mask .*{told}"):
            OfflineBuffer.from_trajectories([row, replace(row, completion_mask=mask)])
    assert buffer.learned_tokens().tolist() == [2, 3] and overview(buffer)["learned_tokens"]["sum"] == 5
    old = buffer.rows.remove_columns("completion_mask")
    assert list(OfflineBuffer(old)) == [replace(row, completion_mask=None)] * 2
    old.to_parquet(tmp_path / "old.parquet")
    assert len(OfflineBuffer.load(tmp_path / "old.parquet")) == 2


def test_stored_inputs_have_a_value_for_every_token() -> None:
    policy = policy_of(tokenizer_of("chatml"))
    row = Trajectory("p", "c", [5, 6], [7, 8, 9], "0", "policy", completion_mask=[True, False, True])
    buffer = OfflineBuffer.from_trajectories([row])
    filled, _ = with_behaviour(with_reference(buffer, policy), policy)
    (whole,) = with_reference(OfflineBuffer.from_trajectories([replace(row, completion_mask=None)]), policy)
    assert filled[0].reference_logp == whole.reference_logp and len(filled[0].behaviour_logp or []) == 3
    engine = replace(
        filled[0], sampler_logp=[x + y for x, y in zip(filled[0].behaviour_logp or [], (0, 9, 0), strict=True)]
    )
    assert (mismatch([engine]) or {})["tokens"] == 2 and (mismatch([engine]) or {})["largest"] < 1e-5
    weight = truncated_importance([engine], torch.ones(1, 2, dtype=torch.bool), 2.0)
    assert torch.allclose(weight, torch.ones(1, 2), atol=1e-5)


# From masks to gradients


@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_log_probs_of_learned_tokens_are_those_of_the_whole_completion(packing: Any) -> None:
    policy = policy_of(tokenizer_of("chatml"))
    policy.pack(packing)
    draw = torch.Generator().manual_seed(0)
    rows = []
    for length in (3, 7, 12):
        ids = torch.randint(3, 200, (4 + length,), generator=draw).tolist()
        mask = (torch.rand(length, generator=draw) < 0.5).tolist()
        rows.append(Trajectory("", "", ids[:4], ids[4:], "", completion_mask=[*mask[:-1], True]))
    found = MicroBatches(64).log_probs(policy, rows)["logp"]
    whole = MicroBatches(64).log_probs(policy, [replace(row, completion_mask=None) for row in rows])["logp"]
    assert found.shape == (3, max(map(learned_tokens, rows)))
    for own, all_, row in zip(found, whole, rows, strict=True):
        assert torch.allclose(own[: learned_tokens(row)], all_[learned(row)], atol=1e-6)


PREFIX = [9, 10, 11]
RUBBISH = 1e6


@cache
def tokenizer_of_embedded() -> Any:
    return load_policy("embedded").tokenizer


@cache
def log_probs_of() -> Policy:
    """The policy whose log-probs rows have."""
    return policy_of(tokenizer_of_embedded())


def trained(objective: Any, rows: Sequence[Trajectory]) -> torch.Tensor:
    """The weights of a tiny model after two updates on these rows."""
    policy = policy_of(tokenizer_of_embedded())
    sources = [SameRows(rows, units_of(component.objective)) for component in objective.components]
    settings = Training(steps=2, updates_per_batch=2, learning_rate=1e-2, warmup_ratio=0.0, importance_cap=2.0)
    Trainer(policy, objective, sources, settings).run()
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


LEARNED = {name: built_objective(name) for name in list_objectives() if name not in ("sdft", "mixture")}
"""All but one whose teacher sees another prompt, and one of other objectives."""


@pytest.mark.parametrize("name", of_each_kind(LEARNED))
def test_tokens_that_are_not_learned_from_are_context_like_the_prompt(name: str) -> None:
    """Bit for bit, whatever their stored log-probs: ratios, lengths, advantages and statistics are of the others."""
    objective = LEARNED[name]
    rows = [replace(row, sampler_logp=row.behaviour_logp) for row in rows_of(log_probs_of(), objective)]
    extended = [replace(row, prompt_ids=row.prompt_ids + PREFIX) for row in rows]
    hidden = []
    for row in rows:
        stored = {key: value and [RUBBISH] * 3 + value for key, value in vars(row).items() if key.endswith("_logp")}
        columns = {k: [RUBBISH] * 3 + v if isinstance(v, list) and len(v) > 1 else v for k, v in row.columns.items()}
        inputs = {key: [RUBBISH] * 3 + value if len(value) > 1 else value for key, value in row.inputs.items()}
        mask = [False] * 3 + [True] * len(row.completion_ids)
        own: dict[str, Any] = {"completion_ids": PREFIX + row.completion_ids, "completion_mask": mask, **stored}
        hidden.append(replace(row, **own, columns=columns, inputs=inputs))
    assert torch.equal(trained(objective, hidden), trained(objective, extended))


@pytest.mark.parametrize("name", ["sft", "gspo", "ppo"])
def test_what_is_between_two_turns_has_no_weight_but_is_seen(name: str) -> None:
    rows = rows_of(log_probs_of(), objective := built_objective(name))

    def with_result(tool: list[int], logp: float) -> list[Trajectory]:
        made = []
        for row in rows:
            half, whole = len(row.completion_ids) // 2, len(row.completion_ids)
            ids = [*row.completion_ids[:half], *tool, *row.completion_ids[half:]]
            mask = [True] * half + [False] * len(tool) + [True] * (whole - half)
            old = row.behaviour_logp or [0.0] * whole
            stored = [*old[:half], *[logp] * len(tool), *old[half:]]
            changes: dict[str, Any] = {"behaviour_logp": stored, "reference_logp": None, "completion_mask": mask}
            made.append(replace(row, completion_ids=ids, inputs={}, **changes))
        return made

    weights = [
        trained(objective, with_result(tool, logp)) for tool, logp in ((PREFIX, 0.0), (PREFIX, -50.0), ([12], 0.0))
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.slow
def test_a_samplers_mask_reaches_training_and_its_turns_the_reward(tmp_path: Path) -> None:
    policy = load_policy("embedded")
    settings = Sampling(samples=4, max_new_tokens=5, engine=PLUGIN)
    seen: list[Any] = []

    def length(completions: list[Any], **_: Any) -> list[float]:
        seen.extend(completions)
        return [float(len(str(completion))) for completion in completions]

    problems = [Problem(str(i), f"{i}+{i}=?\n", {}) for i in range(4)]
    training = Training(steps=2, batch_size=8, learning_rate=1e-3)
    collector = Collector(policy, sampler_of(policy, settings), problems, length, settings, training)
    kept = RolloutBuffer(capacity_versions=2)
    kept.add(collector(0))
    rows = list(kept)
    assert len(rows) == 8 and all(re.search(r"=\d+;", completion) for completion in seen)
    for row in rows:
        hidden = [t for t, on in zip(row.completion_ids, row.completion_mask or [], strict=True) if not on]
        assert re.fullmatch(r"=\d+;", policy.tokenizer.decode(hidden).strip())
        assert len(row.behaviour_logp or []) == len(row.completion_ids)
    assert collector.spent()["sampled_tokens"] == sum(map(learned_tokens, rows))
    kept.save(tmp_path / "kept")
    assert list(RolloutBuffer.load(tmp_path / "kept")) == rows
    record = train(policy, get_objective("grpo"), collector, training)
    assert len(record.steps) == 2 and all(math.isfinite(step["gradient_norm"]) for step in record.steps)
    assert record.steps[0]["ratio"] == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_rewards_of_conversations_get_the_turns() -> None:
    tokenizer = tokenizer_of("chatml")
    policy: Policy = policy_of(tokenizer)
    settings, seen = Sampling(samples=1, max_new_tokens=3, engine=PLUGIN), list[Any]()

    def note(completions: list[Any], **_: Any) -> list[float]:
        seen.extend(completions)
        return [1.0] * len(completions)

    def told_a_number(completions: list[Any], **_: Any) -> list[float]:
        return [
            float(any(re.fullmatch(r"=\d+;", m["content"]) and m["role"] == "tool" for m in c)) for c in completions
        ]

    rows = Collector(policy, sampler_of(policy, settings), [Problem("p", [user("1")], {})], note, settings)(0)
    assert [message["role"] for message in seen[0]] == ["assistant", "tool", "assistant"]
    assert rows.column("completion_messages") == seen and set(rescored(rows, told_a_number).column("reward")) == {1.0}


def test_lengths_and_likelihoods_are_of_what_the_policy_sampled() -> None:
    policy, mask = log_probs_of(), [True, False, True]
    assert Sample([7, 8, 9], "", truncated=False, mask=mask).length == 2
    text = {"problem_id": "p", "prompt": "", "prompt_ids": [5, 6], "completions": [[7, 8, 9]], "masks": [mask]}
    (logp,) = log_probs(policy, [([5, 6], [7, 8, 9])])
    found, _ = text_results(policy, [{**text, "logp": 0.0}], 64)
    assert found[LIKELIHOOD] == pytest.approx((logp[0] + logp[2]) / 2)


@pytest.mark.slow
def test_the_setting_reaches_training(tmp_path: Path) -> None:
    policy = policy_of(tokenizer_of("chatml"))
    save_policy(policy, tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    given = ["--buffer", str(tmp_path / "rows.jsonl"), "--model", str(tmp_path / "model"), "--steps", "1"]
    tokens = {}
    for turns in ("last", "all"):
        out = tmp_path / turns
        assert main(["train", "sft", *given, "--set", f"turns={turns}", "--out", str(out)]) == 0
        tokens[turns] = json.loads((out / "training.json").read_text())["steps"][0]["logp"]
    assert tokens["last"] != tokens["all"]


# The same completion after a prompt that says more


@pytest.mark.parametrize("template", ["chatml", "r1", "gemma", "tools"])
@pytest.mark.parametrize("turns", ["all", "last"])
def test_a_teacher_that_is_told_more_scores_the_tokens_that_are_learned_from(template: str, turns: str) -> None:
    """With nothing more said, the privileged log-probs are the policy's own, at the same positions."""
    with_tools = "{% if tools %}{{ tools | tojson }}{% endif %}" + TURNS + OPENS
    tokenizer = built(with_tools) if template == "tools" else tokenizer_of(template)
    data = {"prompt": TALK[:1], "completion": TALK[1:], "answer": "4"}
    (row,) = from_trl([data | ({"tools": [{"name": "add"}]} if template == "tools" else {})], tokenizer, turns=turns)
    policy = policy_of(tokenizer)
    told_more = swapped(tokenizer, row.prompt_ids, "1+1?", "1+1? (4)")
    for teacher, ids in (("{prompt}", row.prompt_ids), ("{prompt} ({answer})", told_more)):
        sdft = get_objective("sdft", template=teacher, teacher="live", ratio_max=None)
        batch = Assembler(policy).assemble([row], [(0,)], sdft)
        found = batch["privileged_logp"]
        (own,) = log_probs(policy, [(ids, row.completion_ids)])
        assert found.shape == batch.mask.shape == (1, learned_tokens(row))
        assert found[0].tolist() == pytest.approx([own[place] for place in learned(row)], rel=1e-5)


def swapped(tokenizer: Any, ids: Sequence[int], old: str, new: str) -> list[int]:
    """The tokens of a text with a part of it replaced."""
    text = tokenizer.decode(ids)
    assert text.count(old) == 1
    found: list[int] = tokenizer.encode(text.replace(old, new), add_special_tokens=False)
    return found
