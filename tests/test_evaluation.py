"""Evaluation against a sampler whose answers are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pydantic
import pytest

from rlzoo.config import EvaluationSettings, Sampling, validated
from rlzoo.errors import UserError
from rlzoo.evaluation import evaluate
from rlzoo.policy import Policy
from rlzoo.problems import Problem
from rlzoo.reward import Reward
from rlzoo.rollout import Sample, Sampler

PROBLEMS = [Problem(f"p{i}", f"{i}=?\n", {"answer": str(i)}) for i in range(3)]
SAMPLED = [["0", "0", "1", "0"], ["1", "0", "2", "3"], ["0", "1", "", "3"]]
"""3 of 4, 1 of 4 and 0 of 4 are right."""
GREEDY = ["0", "7", "2"]


class FakeSampler(Sampler):
    """Gives the answers above, and remembers how it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, bool, int]] = []

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        seed: int,
        greedy: bool = False,
        progress: Callable[[int], None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        self.asked.append((len(prompts), greedy, seed))
        if progress is not None:
            progress(len(prompts))
        texts = [[t] for t in GREEDY] if greedy else [row[: settings.samples] for row in SAMPLED]
        return [[Sample([5] * (len(t) + 1), t, truncated=t == "3") for t in row] for row in texts]


def match(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    """1 for the answer, 0.4 for "3", 0 for another one, None for no text."""
    return [
        None if not text else 1.0 if text == right else 0.4 if text == "3" else 0.0
        for text, right in zip(completions, answer, strict=True)
    ]


@pytest.fixture
def policy(make_policy: Callable[..., Policy]) -> Policy:
    return make_policy("gpt2")


def settings(**changes: Any) -> EvaluationSettings:
    return EvaluationSettings(**{"samples": 4, "k": 2, **changes})


def test_metrics_of_known_answers(policy: Policy) -> None:
    sampler = FakeSampler()
    done: list[int] = []
    found = evaluate(policy, PROBLEMS, Reward("match", match), settings(), 7, sampler, progress=done.append)
    assert found.metrics == pytest.approx(
        {
            "avg_at_k": 4 / 12,
            # 1 - C(n-c, 2)/C(4, 2): 1 - 0/6, 1 - 3/6, 1 - 6/6
            "pass_at_k": (1 + 0.5 + 0) / 3,
            "greedy": 2 / 3,
            "k": 2,
            "samples": 4,
            "mean_length": (11 * 2 + 1) / 12,
            "truncated": 2 / 12,
        }
    )
    assert sampler.asked == [(3, False, 7), (3, True, 7)]
    assert sum(done) == 6


def test_k_is_the_number_of_samples_unless_it_is_given(policy: Policy) -> None:
    found = evaluate(policy, PROBLEMS, Reward("match", match), settings(k=None), sampler=FakeSampler())
    assert found.metrics["k"] == 4
    assert found.metrics["pass_at_k"] == pytest.approx(2 / 3)


def test_no_greedy_score_unless_asked_for(policy: Policy) -> None:
    sampler = FakeSampler()
    found = evaluate(policy, PROBLEMS, Reward("match", match), settings(), sampler=sampler, greedy=False)
    assert "greedy" not in found.metrics
    assert {row["decoding"] for row in found.outcomes} == {"sample"}
    assert len(sampler.asked) == 1


def test_outcomes_are_one_row_a_sample(policy: Policy) -> None:
    found = evaluate(policy, PROBLEMS, Reward("match", match), settings(), sampler=FakeSampler())
    assert len(found.outcomes) == 15
    assert {frozenset(row) for row in found.outcomes} == {
        frozenset(("problem_id", "prompt", "decoding", "sample", "reward", "correct", "length", "truncated", "text"))
    }
    samples = [row for row in found.outcomes if row["decoding"] == "sample"]
    assert [(row["problem_id"], row["sample"], row["text"]) for row in samples] == [
        (f"p{i}", n, text) for i, row in enumerate(SAMPLED) for n, text in enumerate(row)
    ]
    greedy = [row for row in found.outcomes if row["decoding"] == "greedy"]
    assert [(row["prompt"], row["sample"], row["correct"]) for row in greedy] == [
        ("0=?\n", 0, True), ("1=?\n", 0, False), ("2=?\n", 0, True),
    ]  # fmt: skip


def test_a_null_reward_is_wrong_and_stays_null(policy: Policy) -> None:
    found = evaluate(policy, PROBLEMS, Reward("match", match), settings(), sampler=FakeSampler())
    (empty,) = (row for row in found.outcomes if row["text"] == "")
    assert empty["reward"] is None
    assert empty["correct"] is False
    assert empty["length"] == 1


def test_the_threshold_of_correctness_is_a_setting(policy: Policy) -> None:
    strict = evaluate(policy, PROBLEMS, Reward("match", match), settings(), sampler=FakeSampler())
    lenient = evaluate(policy, PROBLEMS, Reward("match", match), settings(correct_at=0.4), sampler=FakeSampler())
    assert lenient.metrics["avg_at_k"] - strict.metrics["avg_at_k"] == pytest.approx(2 / 12)


def test_no_problems_is_an_error(policy: Policy) -> None:
    with pytest.raises(UserError, match="no problems to evaluate on"):
        evaluate(policy, [], Reward("match", match), settings(), sampler=FakeSampler())


def test_k_over_samples_is_an_error(policy: Policy) -> None:
    with pytest.raises(pydantic.ValidationError, match="k = 5 needs at least 5 samples"):
        settings(k=5)
    with pytest.raises(UserError, match="k = 5 needs at least 5 samples, and samples = 4"):
        validated(EvaluationSettings, {"samples": 4, "k": 5}, "evaluation")
    sampler = FakeSampler()
    unchecked = settings().model_copy(update={"k": 5})
    with pytest.raises(UserError, match="pass@5 needs"):
        evaluate(policy, PROBLEMS, Reward("match", match), unchecked, sampler=sampler)
    assert not sampler.asked  # before anything is sampled
