"""Evaluation against a sampler whose answers are known."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch

from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.problems import Problem
from rlzoo.config import EvaluationSettings, Sampling, validated
from rlzoo.errors import UserError
from rlzoo.evaluation import (
    Metric,
    ProblemSamples,
    Total,
    evaluate,
    list_metrics,
    mean_over_benchmarks,
    metric_table,
    metrics,
    pass_at_k,
    register_metric,
)
from rlzoo.evaluation.styles import style_metrics
from rlzoo.experiments import smollm2
from rlzoo.policy import Policy, log_probs
from rlzoo.reward import Reward, get_reward
from rlzoo.rollout import Sample, Sampler
from rlzoo.worlds import arithmetic

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
            # three of four say "0"; four answers tie, one of them right; three tie, none right, and "" is no answer
            "maj_at_k": (1 + 1 / 4 + 0) / 3,
            # of the first two and of the last two: 1 and a tie, a tie and 0, 0 and 0
            "maj_at_2": (3 / 4 + 1 / 4 + 0) / 3,
        }
    )
    assert sampler.asked == [(3, False, 7), (3, True, 7)]
    assert done == [12, 3]  # sequences


def test_k_is_the_number_of_samples_unless_it_is_given(policy: Policy) -> None:
    found = evaluate(policy, PROBLEMS, Reward("match", match), settings(k=None), sampler=FakeSampler())
    assert found.metrics["k"] == 4
    assert found.metrics["pass_at_k"] == pytest.approx(2 / 3)


def test_several_k(policy: Policy) -> None:
    found = evaluate(policy, PROBLEMS, Reward("match", match), settings(k=[2, 1, 4]), sampler=FakeSampler()).metrics
    one = evaluate(policy, PROBLEMS, Reward("match", match), settings(), sampler=FakeSampler()).metrics
    assert {name: found.pop(f"pass_at_{name}") for name in (1, 4)} == pytest.approx({1: 4 / 12, 4: 2 / 3})
    assert found.pop("maj_at_1") == pytest.approx(4 / 12)
    assert found == one, "the first is what one number would be"
    for wrong in ([], [0], [2, 2], "x", 0):
        with pytest.raises(UserError, match=r"^e: k: .* is neither a whole number of at least 1 nor a list of dist"):
            validated(EvaluationSettings, {"k": wrong}, "e")


def test_no_greedy_score_unless_asked_for(policy: Policy) -> None:
    sampler = FakeSampler()
    found = evaluate(policy, PROBLEMS, Reward("match", match), settings(), sampler=sampler, greedy=False)
    assert "greedy" not in found.metrics
    assert {row["decoding"] for row in found.outcomes} == {"sample"}
    assert len(sampler.asked) == 1


def test_outcomes_are_one_row_a_sample(policy: Policy) -> None:
    found = evaluate(policy, PROBLEMS, Reward("match", match), settings(), sampler=FakeSampler())
    assert len(found.outcomes) == 15
    kept = ("problem_id", "prompt", "decoding", "sample", "reward", "correct", "length", "truncated", "text")
    assert {frozenset(row) for row in found.outcomes} == {frozenset((*kept, "reference"))}
    samples = [row for row in found.outcomes if row["decoding"] == "sample"]
    assert [(row["problem_id"], row["sample"], row["text"]) for row in samples] == [
        (f"p{i}", n, text) for i, row in enumerate(SAMPLED) for n, text in enumerate(row)
    ]
    greedy = [row for row in found.outcomes if row["decoding"] == "greedy"]
    assert [(row["prompt"], row["sample"], row["correct"]) for row in greedy] == [
        ("0=?\n", 0, True), ("1=?\n", 0, False), ("2=?\n", 0, True),
    ]  # fmt: skip


def test_what_a_reward_logs_is_of_the_samples_and_not_of_greedy_decoding(policy: Policy) -> None:
    def counting(completions: list[str], log_metric: Any, **_: Any) -> list[float]:
        log_metric("scored", len(completions))
        return [0.0] * len(completions)

    assert evaluate(policy, PROBLEMS, counting, settings(), sampler=FakeSampler()).metrics["reward/scored"] == 12


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
    all_wrong = evaluate(policy, PROBLEMS, Reward("match", match), settings(correct_at=2), sampler=FakeSampler())
    assert {name: all_wrong.metrics[name] for name in ("avg_at_k", "greedy", "pass_at_k")} == {
        "avg_at_k": 0, "greedy": 0, "pass_at_k": 0,
    }  # fmt: skip
    penalties = evaluate(policy, PROBLEMS, Reward("match", match), settings(correct_at=0), sampler=FakeSampler())
    assert penalties.metrics["avg_at_k"] == pytest.approx(11 / 12), "where 0 is the best, all that have a reward"


def test_the_log_likelihood_is_that_of_the_gold_completions(policy: Policy) -> None:
    """In nats per token; a problem without one, or with one that the model cannot take, has no part in it."""
    texts: list[tuple[str, ...]] = [("0 #### 0", "0"), (), ("2" * 200,)]
    problems = [replace(problem, solutions=some) for problem, some in zip(PROBLEMS, texts, strict=True)]
    bad = BadRows()
    found = evaluate(policy, problems, Reward("match", match), settings(), sampler=FakeSampler(), bad=bad)
    ids = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("0=?\n", *texts[0])]
    end = policy.tokenizer.eos_token_id
    scored = log_probs(policy, [(ids[0], [*completion, end]) for completion in ids[1:]])
    tokens = [logp for row in scored for logp in row]
    assert len(tokens) == len(ids[1]) + len(ids[2]) + 2
    assert found.metrics["log_likelihood"] == pytest.approx(sum(tokens) / len(tokens))
    gold = {row["problem_id"]: (row.get("gold_logp"), row.get("gold_tokens")) for row in found.outcomes}
    assert gold == {"p0": (pytest.approx(sum(tokens)), len(tokens)), "p1": (None, None), "p2": (None, None)}
    (event,) = bad.events()
    assert event.startswith("gold completions without a log-likelihood: 1 in all (problem 'p2'")
    without = evaluate(policy, PROBLEMS, Reward("match", match), settings(), sampler=FakeSampler())
    assert "log_likelihood" not in without.metrics
    assert {key: found.metrics[key] for key in without.metrics} == without.metrics


def test_components_of_a_weighted_reward_are_metrics_and_stand_in_the_outcomes(policy: Policy) -> None:
    def half(completions: list[str], **_: Any) -> list[float | None]:
        return [0.5 if text else None for text in completions]

    reward = get_reward([{"name": match, "weight": 2.0}, half])
    found = evaluate(policy, PROBLEMS, reward, settings(), sampler=FakeSampler())
    # of 12 samples one has no text, and so no reward: 4 are right, 2 say "3"
    assert found.metrics["component/match"] == pytest.approx((4 + 2 * 0.4) / 11)
    assert found.metrics["component/half"] == pytest.approx(0.5)
    first = found.outcomes[0]
    assert json.loads(first["components"]) == {"match": 1.0, "half": 0.5} and first["reward"] == 2.5


SHORT = {"name": "length", "target": 9, "limit": 10, "weight": 0.1}


@pytest.mark.parametrize(
    ("reward", "texts", "expected"),
    [
        ("exact-match", ["1 #### 7", "2 #### 7", "no #### 8", "or #### 9"], 1.0),
        ("exact-match", ["1 #### 7", "2 #### 7", "no #### 8", "or #### 8"], 0.5),  # a tie: the mean
        ("exact-match", ["#### 8", "#### 8", "#### 7", ""], 0.0),
        ("math-answer", [r"so \boxed{14/2}", "The answer is 7.0.", r"\boxed{8}", r"\boxed{9}"], 1.0),
        ([SHORT, "exact-match"], ["a #### 7", "#### 7", "8", "9"], 1.0),
        (match, ["7", " 7", "8", "9"], 0.5),  # a function's answers are texts, of which the second is wrong
        (match, ["a", "A", "7", "8"], 0.0),
        (match, ["", "", "7", "8"], 0.5),  # no text is no answer
        (match, ["", "", "", ""], 0.0),
    ],
)  # fmt: skip
def test_the_majority_votes_by_what_the_reward_calls_an_answer(
    reward: Any, texts: list[str], expected: float, policy: Policy
) -> None:
    class Says(FakeSampler):
        def sample(self, prompts: Any, settings: Sampling, *_: Any, **options: Any) -> list[list[Sample]]:
            return [[Sample([5], text, truncated=False) for text in texts] for _ in prompts]

    problems = [Problem("p", "?\n", {"answer": "7"})]
    found = evaluate(policy, problems, reward, settings(), sampler=Says(), greedy=False)
    assert found.metrics["maj_at_k"] == expected


def test_averages_have_the_digits_of_numpys_means() -> None:
    """As results had before metrics were a table."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        problems, n = rng.integers(1, 300), rng.integers(2, 9)
        correct, lengths = rng.random((problems, n)) < 0.4, rng.integers(1, 999, (problems, n))
        k = int(rng.integers(1, n + 1))
        seen = [
            ProblemSamples(
                Problem("", "", {}), [{"correct": bool(c), "length": int(x)} for c, x in zip(*row, strict=True)]
            )
            for row in zip(correct, lengths, strict=True)
        ]
        assert metrics.AVERAGE.average(seen) == float(correct.mean())
        assert metrics.LENGTH.average(seen) == float(np.mean(lengths))
        estimates = pass_at_k(correct.sum(1), np.full(problems, n), k)
        assert metrics.pass_metric(k).average(seen) == float(np.mean(estimates))


def test_a_metric_is_a_row_that_anyone_can_add(policy: Policy) -> None:
    def distinct(problem: ProblemSamples) -> float:
        return len({sample["text"] for sample in problem.samples})

    def wrong_length(problem: ProblemSamples) -> Total | None:
        wrong = [sample["length"] for sample in problem.samples if not sample["correct"]]
        return Total(sum(wrong), len(wrong)) if problem.problem.id != "p2" else None

    def nothing(problem: ProblemSamples) -> Total:
        return Total(0, 0)

    def of_a_tensor(problem: ProblemSamples) -> Any:
        return torch.tensor([sample["length"] for sample in problem.samples]).max()

    table = [distinct, Metric("wrong_length", wrong_length, unit="tokens"), nothing, of_a_tensor]
    found = evaluate(policy, PROBLEMS, match, settings(), sampler=FakeSampler(), metrics=table)
    assert found.metrics == {"distinct": (2 + 4 + 4) / 3, "wrong_length": 2.0, "of_a_tensor": 2, "k": 2, "samples": 4}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("1 / 0", r"metric 'mine' on problem 'p0': ZeroDivisionError"),
        ("float('nan')", r"metric 'mine' on problem 'p0': it returned nan: return a finite number"),
        ("'many'", r"it returned 'many'"),
        ("__import__('rlzoo').evaluation.Total(1.0, float('nan'))", r"it returned Total\(total=1.0, count=nan\)"),
    ],
)
def test_a_metric_that_fails_is_named(body: str, told: str, policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"def mine(problem):\n    return {body}\n")
    asked = settings(metrics=[f"{tmp_path / 'mine.py'}:mine"])
    with pytest.raises(UserError, match=told):
        evaluate(policy, PROBLEMS, match, asked, sampler=FakeSampler())


def test_names_of_metrics(tmp_path: Path) -> None:
    assert {"avg_at_k", "maj_at_k", "log_likelihood"} <= set(list_metrics())
    table = {metric.name: metric for metric in metric_table(settings(k=[2, 1]))}
    assert [table[name].label for name in ("avg_at_k", "maj_at_k", "pass_at_k", "pass_at_1", "log_likelihood")] == [
        "avg@4", "maj@4", "pass@2", "pass@1", "held-out log-likelihood",
    ]  # fmt: skip
    assert table["avg_at_k"].shown(0.5) == "50.0%" and table["mean_length"].shown(12.3456) == "12.35 tokens"
    assert Metric("wrong_length", lambda problem: 1.0).label == "wrong length"
    names = [metric.name for metric in metric_table(settings())]
    assert [metric.name for metric in metric_table(settings(metrics=["greedy"]))] == names, "it is there anyway"
    with pytest.raises(UserError, match=r"unknown metric 'gredy'.*greedy"):
        metric_table(settings(metrics=["gredy"]))
    (tmp_path / "mine.py").write_text(
        "def samples(problem):\n    return 1\n\ndef greedy(problem):\n    return 1\nx = 3\n"
        "from rlzoo.evaluation import Metric\nlogged = Metric('reward/x', samples)\n"
    )
    assert [metric.name for metric in metric_table(settings(), ["only"])] == names, "one component is the reward itself"
    for name, told in (("samples", "samples"), ("greedy", "greedy"), ("logged", "reward/x")):
        with pytest.raises(UserError, match=f"the results already have a '{told}': give it another name"):
            metric_table(settings(metrics=[f"{tmp_path / 'mine.py'}:{name}"]))
    with pytest.raises(UserError, match="is int: give a Metric, or a function"):
        metric_table(settings(metrics=[f"{tmp_path / 'mine.py'}:x"]))
    with pytest.raises(UserError, match="unknown need of metric 'mine' 'anser': did you mean 'answer'"):
        Metric("mine", lambda problem: 1.0, needs=("anser",))
    with pytest.raises(UserError, match="metric 'greedy' is registered twice"):
        register_metric(Metric("greedy", lambda problem: 1.0))


def test_the_share_and_the_accuracy_of_each_style(policy: Policy) -> None:
    """Five samples are "0", three of them right; six are "1", "2" or "3", one of them right; one has no text."""
    kinds = {"0": "none", "1": "few", "2": "few", "3": "few"}
    table = style_metrics(kinds.get, ["none", "few", "many"])
    found = evaluate(policy, PROBLEMS, match, settings(), sampler=FakeSampler(), metrics=[table]).metrics
    shares = {"share/none": 5 / 12, "share/few": 6 / 12, "share/many": 0, "share/other": 1 / 12}
    accuracies = {"accuracy/none": 3 / 5, "accuracy/few": 1 / 6, "accuracy/other": 0}
    assert found == pytest.approx(shares | accuracies | {"k": 2, "samples": 4})


def chain_sum(rng: random.Random, style: str) -> str:
    return arithmetic.solve(arithmetic.draw(rng, rng.randint(2, 4), 99), style, rng, slip_rate=0.3)


def chain(rng: random.Random, style: str) -> str:
    return smollm2.draw(rng, rng.randint(2, 4)).solution(style)


@pytest.mark.parametrize(
    ("style_of", "solve", "styles", "metrics"),
    [
        (arithmetic.style_of, chain_sum, arithmetic.STYLES, "rlzoo.evaluation.styles:CHAIN_SUMS"),
        (smollm2.style_of, chain, smollm2.STYLES, "rlzoo.experiments.smollm2:STYLE_METRICS"),
    ],
)
def test_the_style_of_a_derivation_is_told_by_its_form(
    style_of: Any, solve: Callable[[random.Random, str], str], styles: Sequence[str], metrics: str
) -> None:
    """Whether it is right or wrong; half of one style and half of another is none."""
    rng = random.Random(0)
    for style in styles:
        texts = [solve(rng, style) for _ in range(50)]
        assert {style_of(text) for text in texts} == {style}
        assert {style_of(text.partition("####")[0].rstrip()) for text in texts} == {style}, "cut before the answer"
    mixed = [solve(rng, a).partition("\n#")[0] + solve(rng, b) for a, b in permutations(styles, 2)]
    assert {style_of(text) for text in ("", "#### 3", "3", "words 3", *mixed)} == {None}
    names = {metric.name for metric in metric_table(settings(metrics=[metrics]))}
    assert names >= {f"{kind}/{style}" for kind in ("share", "accuracy") for style in (*styles, "other")}


def test_the_mean_over_benchmarks_counts_each_the_same() -> None:
    cells = [{"a": {"avg_at_k": x, "k": 2, "only": 1.0}, "b": {"avg_at_k": 0.5, "k": 2}} for x in (0.0, 1.0)]
    assert mean_over_benchmarks(cells) == {"avg_at_k": 0.5}


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
