"""The embedded worlds: splits, solutions, the tokenizer and the base model; and problem sets in general."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from rlzoo.buffers import OfflineBuffer
from rlzoo.buffers.problems import Problem, demonstrations, load_problems, world_problems
from rlzoo.config import ProblemSource
from rlzoo.errors import UserError
from rlzoo.policy import load_policy
from rlzoo.worlds import EMBEDDED_BASE, WORLDS, arithmetic, facts
from rlzoo.worlds.arithmetic import ChainSum
from rlzoo.worlds.recipe import train_base

ALL = [f"{world}/{split}" for world, splits in WORLDS.items() for split in splits]


def results_of(solution: str) -> list[int]:
    """The running results that a solution claims, in whichever style, and its final answer."""
    body, _, final = solution.partition("\n#### ")
    if body.startswith("start"):
        steps = re.findall(r"(\d+) makes (\d+)", body)
        return [*(int(r) for _, r in steps), int(final)]
    if body.startswith("="):
        left = body[1:].split("=")
        return [*(int(re.match(r"\d+", part)[0]) for part in left), int(final)]  # type: ignore[index]
    return [*(int(part.split("=")[1]) for part in body.split(";")), int(final)]


def evaluated(expression: str) -> list[int]:
    """The running results of a chain, from its text alone."""
    first, *rest = re.findall(r"[+-]?\d+", expression)
    total, out = int(first), []
    for term in rest:
        total += int(term)
        out.append(total)
    return out


@pytest.mark.parametrize("name", ALL)
def test_a_split_is_the_same_on_every_call(name: str) -> None:
    first, second = world_problems(name), world_problems(name)
    assert first == second
    assert len({p.id for p in first}) == len(first)
    assert len({str(p.prompt) for p in first}) == len(first)


@pytest.mark.parametrize("world", WORLDS)
def test_no_question_is_in_two_splits(world: str) -> None:
    prompts = {split: {str(p.prompt) for p in world_problems(f"{world}/{split}")} for split in WORLDS[world]}
    for a, b in combinations(prompts, 2):
        assert not prompts[a] & prompts[b], (a, b)


def test_sizes_of_the_arithmetic_splits() -> None:
    sizes = {split: len(world_problems(f"arithmetic/{split}")) for split in WORLDS["arithmetic"]}
    assert sizes == {name: count for name, (count, *_) in arithmetic.SPLITS.items()}
    assert sizes["test"] == 200 and sizes["validation"] == 100
    terms = Counter(str(p.prompt).count("+") + str(p.prompt).count("-") for p in world_problems("arithmetic/longer"))
    assert terms == {3: 200}


VARIANTS = ["", "?terms=2", "?terms=2,3", "?terms=4", "?largest=9", "?terms=2&largest=9"]


@pytest.mark.slow
def test_splits_are_disjoint_whatever_their_options() -> None:
    prompts = {
        split: {str(p.prompt) for how in VARIANTS for p in world_problems(f"arithmetic/{split}{how}")}
        for split in WORLDS["arithmetic"]
    }
    for a, b in combinations(prompts, 2):
        assert not prompts[a] & prompts[b], (a, b)


def test_options_of_arithmetic_change_what_they_say() -> None:
    plain = world_problems("arithmetic/test")
    assert world_problems("arithmetic/test?terms=3&largest=99") == plain
    harder = world_problems("arithmetic/test?terms=4,5&largest=20")
    numbers = [[int(number) for number in re.findall(r"\d+", str(p.prompt))] for p in harder]
    assert len(harder) == 200 and {len(some) for some in numbers} == {4, 5} == {p.columns["terms"] for p in harder}
    assert max(map(max, numbers)) == 20
    for problem in harder:  # checked from the text alone
        assert results_of(problem.solutions[1])[:-1] == evaluated(str(problem.prompt).removesuffix("=?\n"))
    assert not {p.id for p in harder} & {p.id for p in plain}
    few = world_problems("arithmetic/test?terms=2&largest=9")
    assert 0 < len(few) < 90 and len({str(p.prompt) for p in few}) == len(few)  # all that there are


def test_options_of_arithmetic_choose_among_solutions() -> None:
    plain = world_problems("arithmetic/train")[:6]
    words = world_problems("arithmetic/train?styles=words")[:6]
    assert [p.solutions for p in words] == [p.solutions[2:] for p in plain] and [p.id for p in words] == [
        p.id for p in plain
    ]
    each = world_problems("arithmetic/train?solutions=1")[:6]
    assert [p.solutions for p in each] == [(p.solutions[i % 3],) for i, p in enumerate(plain)]
    two = world_problems("arithmetic/train?styles=words,running&solutions=1")[:2]
    assert [p.solutions for p in two] == [plain[0].solutions[2:], plain[1].solutions[1:2]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arithmetic/test?term=3", "unknown option of arithmetic 'term': did you mean 'terms'?"),
        ("arithmetic/test?terms=3&terms=2", "the option terms of arithmetic is given twice"),
        ("arithmetic/test?terms=3,3", "the option terms of arithmetic repeats a value: 3,3"),
        ("arithmetic/test?terms=", "the option terms of arithmetic is a whole number from 2 to 9, not ''"),
        (
            "arithmetic/test?largest=1000",
            "the option largest of arithmetic is a whole number from 1 to 999",
        ),
        ("arithmetic/test?styles=prose", "unknown style of arithmetic 'prose': known: rewriting, running, words"),
        ("arithmetic/test?styles=words&solutions=2", "solutions of arithmetic is a whole number from 1 to 1, not '2'"),
        ("facts/test?terms=3", "world 'facts/test' has no options: leave out '?terms=3'"),
        ("arithmetic/tset?terms=3", "unknown world 'arithmetic/tset': did you mean 'arithmetic/test'?"),
    ],
)
def test_a_wrong_option_is_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_problems(ProblemSource(source=f"world:{name}"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_recipe_saves_models_on_the_way_without_changing_the_last_one(tmp_path: Path) -> None:
    train_base(tmp_path / "plain", 2)
    train_base(tmp_path / "saving", 2, save_at=[1])
    weights = [tmp_path / folder / "model.safetensors" for folder in ("plain", "saving", "saving/step-1")]
    last, same, first = (path.read_bytes() for path in weights)
    assert last == same != first
    assert load_policy(str(tmp_path / "saving" / "step-1")).eos_ids == load_policy("embedded").eos_ids
    with pytest.raises(UserError, match=r"^--save-at 3: training has the steps 1 to 2$"):
        train_base(tmp_path / "other", 2, save_at=[3])


def test_sizes_of_the_fact_splits() -> None:
    # 120 entities, 90 of them demonstrated, in 3 relations: 270 facts. Each is trained in two phrasings; those
    # with an index divisible by 4, the entities 0, 4, ..., 88 of each relation, are for validation.
    sizes = {split: len(world_problems(f"facts/{split}")) for split in WORLDS["facts"]}
    assert sizes == {"train": 540, "validation": 69, "test": 201, "unseen": 90}


def test_facts_are_asked_about_in_training_unless_they_are_unseen() -> None:
    answers = {str(p.prompt): p.columns["answer"] for p in world_problems("facts/train")}
    trained = {(f.entity, f.relation) for _, f, _ in facts.questions("train")}
    for split in ("validation", "test"):
        assert {(f.entity, f.relation) for _, f, _ in facts.questions(split)} <= trained
    assert not {(f.entity, f.relation) for _, f, _ in facts.questions("unseen")} & trained
    known = facts.facts()
    assert len({(f.entity, f.relation) for f in known}) == len(known) == 360
    for fact in known:
        if fact.demonstrated:
            assert answers[fact.question(0)] == answers[fact.question(1)] == fact.answer


@pytest.mark.parametrize("split", WORLDS["arithmetic"])
def test_every_step_of_every_solution_is_right_in_every_style(split: str) -> None:
    for problem in world_problems(f"arithmetic/{split}"):
        expected = evaluated(str(problem.prompt).removesuffix("=?\n"))
        assert problem.columns["answer"] == str(expected[-1])
        assert min(expected) >= 0
        rewriting, running, words = problem.solutions
        assert rewriting.startswith("=") and ";" not in rewriting
        assert running[0].isdigit() and "start" not in running
        assert words.startswith("start ")
        for solution in problem.solutions:
            assert results_of(solution) == [*expected, expected[-1]]


def test_the_left_sides_of_worked_steps_are_right_too() -> None:
    problem = ChainSum((17, 25, 8), (1, -1))
    assert problem.question == "17+25-8=?\n"
    assert arithmetic.solve(problem, "rewriting") == "=42-8=34\n#### 34"
    assert arithmetic.solve(problem, "running") == "17+25=42;42-8=34\n#### 34"
    assert arithmetic.solve(problem, "words") == "start 17 plus 25 makes 42 minus 8 makes 34\n#### 34"
    with pytest.raises(ValueError, match="unknown style"):
        arithmetic.solve(problem, "prose")


def test_slips_happen_at_their_rate_and_are_carried_on() -> None:
    rng = random.Random(0)
    problems = [arithmetic.draw(rng, 3, 99) for _ in range(600)]
    assert all(arithmetic.solve(p, s, rng, 0.0) == arithmetic.solve(p, s) for p in problems for s in arithmetic.STYLES)
    slipped = 0
    for problem in problems:
        first, second, final = results_of(arithmetic.solve(problem, "running", rng, 0.25))
        right = problem.numbers[0] + problem.signs[0] * problem.numbers[1]
        slipped += first != right
        assert second == final >= 0
    assert slipped / 600 == pytest.approx(0.25, abs=0.06)
    always = [results_of(arithmetic.solve(p, "running", rng, 1.0))[0] for p in problems]
    assert all(a != p.numbers[0] + p.signs[0] * p.numbers[1] for a, p in zip(always, problems, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_the_tokenizer_restores_every_text(name: str, tokenizer: Any) -> None:
    for problem in world_problems(name)[:400]:
        for text in (str(problem.prompt), *problem.solutions):
            ids = tokenizer.encode(text)
            assert tokenizer.unk_token_id not in ids and tokenizer.eos_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_the_tokenizer_knows_the_wrong_answers_too(tokenizer: Any) -> None:
    for fact in facts.facts():
        for text in (fact.answer, *fact.distractors, *(fact.question(i) for i in range(3))):
            ids = tokenizer.encode(text)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_the_base_is_small_loads_and_speaks_the_worlds_language(tokenizer: Any) -> None:
    size = sum(path.stat().st_size for path in EMBEDDED_BASE.iterdir())
    assert size <= 4 * 2**20
    policy = load_policy("embedded")
    assert policy.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert policy.model.dtype == torch.float32
    for text in ("17+25-8=?\n", facts.facts()[0].question(2)):
        assert policy.tokenizer.encode(text) == tokenizer.encode(text)
        assert policy.tokenizer.decode(tokenizer.encode(text)) == text
    assert policy.eos_ids == {tokenizer.eos_token_id}


def test_an_unknown_world_lists_those_that_there_are() -> None:
    with pytest.raises(UserError, match=r"unknown world 'arithmetic/tset': did you mean 'arithmetic/test'\?"):
        world_problems("arithmetic/tset")
    with pytest.raises(UserError, match=r"known: arithmetic/longer, .*facts/unseen"):
        load_problems(ProblemSource(source="world:chess"))


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = tmp_path / "problems.jsonl"
    rows = [{"question": "1+1=?", "level": 1, "work": "#### 2"}, {"question": "2+2=?", "level": 2, "work": None}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_problems_of_a_table(table: str) -> None:
    source = ProblemSource(
        source=table, prompt="{question} at {level}\n{{", solution="work", columns={"answer": "work"}, split="test"
    )
    first, second = load_problems(source)
    assert first.prompt == "1+1=? at 1\n{"
    assert first.id == "test-0"
    assert first.columns["answer"] == "#### 2" and first.columns["level"] == 1
    assert first.solutions == ("#### 2",)
    assert second.solutions == ()  # no solution is not the text "None"
    chat = ProblemSource(source=table, prompt="question", chat=True, system="Add.", limit=1)
    (only,) = load_problems(chat)
    assert only.prompt == [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1=?"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "text"}, "no column 'text'; it has: question, level, work"),
        ({"prompt": "{text}"}, "no column 'text'"),
        ({"prompt": "question", "solution": "proof"}, "no column 'proof'"),
        ({"prompt": "question", "columns": {"answer": "gold"}}, "no column 'gold'"),
        ({"prompt": "{question} in \\boxed{}"}, "name a column"),
        ({"prompt": "{question} in {"}, "write {{ and }} for braces that are text"),
    ],
)
def test_what_is_wrong_with_a_problem_source_is_said(table: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_problems(ProblemSource(source=table, **changes))
    assert "\n" not in str(caught.value)


def test_demonstrations_end_unless_they_are_cut(tokenizer: Any) -> None:
    problem = Problem("a", "17+25=?\n", {"answer": "42"}, ("=42\n#### 42", "17+25=42\n#### 42"))
    whole = demonstrations(tokenizer, [problem])
    assert [row.completion for row in whole] == list(problem.solutions)
    assert all(row.completion_ids[-1] == tokenizer.eos_token_id and not row.truncated for row in whole)
    assert all(
        tokenizer.decode(row.prompt_ids + row.completion_ids[:-1]) == row.prompt + row.completion for row in whole
    )
    longest = len(whole[0].completion_ids)
    first, cut = demonstrations(tokenizer, [problem], max_tokens=longest)
    assert first == whole[0]
    assert cut.truncated and len(cut.completion_ids) == longest
    assert tokenizer.eos_token_id not in cut.completion_ids
    assert cut.completion == tokenizer.decode(cut.completion_ids)
    assert list(OfflineBuffer.from_trajectories([first, cut])) == [first, cut]


def test_problems_have_ids_of_their_own(tmp_path: Path) -> None:
    table = tmp_path / "rows.jsonl"
    rows = [{"id": None, "prompt": "a"}, {"id": 7, "prompt": "b"}, {"prompt": "c"}]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [p.id for p in load_problems(ProblemSource(source=str(table)))] == ["train-0", "7", "train-2"]
    table.write_text("".join(json.dumps({"id": 7, "prompt": text}) + "\n" for text in "abc"))
    with pytest.raises(UserError, match=r"rows\.jsonl line 2: the id '7' is that of .*rows\.jsonl line 1"):
        load_problems(ProblemSource(source=str(table)))


@pytest.mark.slow
def test_a_quality_column_becomes_the_reward_of_demonstrations(tokenizer: Any) -> None:
    source = ProblemSource(source="world:arithmetic/train", limit=40, quality="terms")
    rows = demonstrations(tokenizer, load_problems(source))
    assert {row.reward for row in rows} == {2.0, 3.0}
    for row in rows:
        assert row.reward == row.prompt.count("+") + row.prompt.count("-") + 1
    assert all(
        row.reward is None for row in demonstrations(tokenizer, load_problems(ProblemSource(source=source.source)))
    )
    with pytest.raises(UserError, match=r"problem .*: quality column 'beauty' is missing: give a number"):
        load_problems(ProblemSource(source=source.source, quality="beauty"))
