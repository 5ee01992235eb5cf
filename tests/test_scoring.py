"""Scoring while others are sampled: the same scores in the same order, whatever scores them."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlzoo.buffers.problems import EncodedProblem, Problem, encode_problems
from rlzoo.config import EvaluationSettings, Sampling
from rlzoo.errors import UserError
from rlzoo.evaluation import evaluate
from rlzoo.jobs.cached_results import CachedResults
from rlzoo.policy import Policy, load_policy
from rlzoo.reward import Reward, isolation
from rlzoo.reward.isolation import Limits, isolated
from rlzoo.rollout import Sample, Sampler, TransformersSampler, collect_rollouts, scoring

REWARDS = '''
import pathlib, time
HERE = pathlib.Path(__file__)

def mark(prompts, completions, **columns):
    HERE.with_suffix(".called").touch()
    return [float(len(text)) for text in completions]

def ranks(prompts, completions, hint, log_extra, **columns):
    """A completion's rank among those of its prompt in this call, and the number of these."""
    log_extra("together", [prompts.count(prompt) for prompt in prompts])
    return [float(sorted(c for p, c in zip(prompts, completions) if p == prompt).index(text))
            for prompt, text in zip(prompts, completions)]

def hang(prompts, completions, **columns):
    HERE.with_suffix(".called").touch()
    time.sleep(600)

class Picky:
    """Fails on the fourth sample of the third problem."""
    name = "picky"
    def __call__(self, completions, number, **columns):
        time.sleep(0.01 * len(completions))
        for text, n in zip(completions, number):
            if n == 2 and text == "3":
                raise ValueError("oh")
        return [1.0 for _ in completions]
    def answer_of(self, completion):
        return completion * 2

def crash(completions, number, **columns):
    import os
    if any(n == 1 and text == "2" for text, n in zip(completions, number)):
        os._exit(3)
    return [0.5 for _ in completions]
'''


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("embedded")


@pytest.fixture
def rewards(tmp_path: Path) -> Iterator[Callable[..., Reward]]:
    (tmp_path / "mine.py").write_text(REWARDS)

    def make(name: str, processes: int = 1, on_error: Any = "fail", limits: Limits | None = None) -> Reward:
        return isolated(f"{tmp_path / 'mine.py'}:{name}", limits or Limits(30.0, 4.0), on_error, processes)

    yield make
    for each in isolation._processes.values():
        each.close()


def problems_of(policy: Policy, count: int) -> Sequence[EncodedProblem]:
    """Problems of various lengths, of which some have a hint."""
    made = [
        Problem(f"p{i}", f"{i}" + "+12" * (1 + (5 * i) % 4) + "=?\n", {"number": i, **({} if i % 3 else {"hint": i})})
        for i in range(count)
    ]
    return encode_problems(policy.tokenizer, made)


class Batches(Sampler):
    """Answers with the number of the sample, one prompt after the other from the last to the first."""

    def __init__(self, before_next: Callable[[int], None] = lambda place: None) -> None:
        self.before_next = before_next

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        seed: int,
        greedy: bool = False,
        progress: Any = None,
        numbers: Any = None,
    ) -> list[list[Sample]]:
        made = [[Sample([30 + n], str(n), True) for n in range(1 if greedy else settings.samples)] for _ in prompts]
        for place in reversed(range(len(prompts))):
            self.finished(place, made[place])
            self.before_next(place)
        return made


class Silent(Batches):
    """The same of a sampler that tells nobody."""

    def finished(self, place: int, samples: list[Sample]) -> None:
        pass


def until(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not there():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_batch_is_scored_while_the_next_is_sampled(
    policy: Policy, rewards: Callable[..., Reward], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "CHUNK", 4)
    sampler = Batches(lambda place: until((tmp_path / "mine.called").exists))
    rows = collect_rollouts(policy, sampler, problems_of(policy, 3), rewards("mark"), Sampling(samples=4), 0)
    assert [row.reward for row in rows] == [1.0] * 12


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_scores_are_those_of_a_reward_in_this_process(
    processes: int, policy: Policy, rewards: Callable[..., Reward], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt's samples are scored together, and each gets the columns of all problems."""
    monkeypatch.setattr(scoring, "CHUNK", 5)
    problems, settings = problems_of(policy, 7), Sampling(samples=3, max_new_tokens=3, batch_size=6, top_p=0.9)
    here, there = rewards("ranks", limits=Limits(None, None)), rewards("ranks", processes)
    cached = CachedResults(tmp_path)
    expected = collect_rollouts(policy, TransformersSampler(policy), problems, here, settings, 1)
    assert len({row.reward for row in expected}) > 1
    assert collect_rollouts(policy, TransformersSampler(policy), problems, there, settings, 1) == expected
    assert all(row.columns["together"] == 3 for row in expected)
    for _ in range(2):
        assert collect_rollouts(policy, TransformersSampler(policy), problems, there, settings, 1, cached=cached) == (
            expected
        )
    plain = [one.problem for one in problems]
    how = EvaluationSettings(samples=3, max_new_tokens=3, batch_size=6)
    assert evaluate(policy, plain, there, how) == evaluate(policy, plain, here, how)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [Batches(), Silent()])
def test_an_offending_row_has_its_number_among_all(
    sampler: Sampler, policy: Policy, rewards: Callable[..., Reward], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "CHUNK", 4)
    problems, settings = problems_of(policy, 4), Sampling(samples=4)
    for processes, limits in ((1, None), (2, None), (1, Limits(None, None))):
        with pytest.raises(UserError, match=r"^reward 'picky' raised on row 11: ValueError: oh \(mine.py line 26\)$"):
            collect_rollouts(policy, sampler, problems, rewards("Picky", processes, limits=limits), settings, 0)
    lenient, plain = rewards("Picky", on_error="null"), [one.problem for one in problems]
    with pytest.warns(
        RuntimeWarning, match=r"^reward 'picky' raised on row 11: ValueError: oh \(.*\); scored as null$"
    ):
        found = evaluate(policy, plain, lenient, EvaluationSettings(samples=4), sampler=sampler)
    assert [row["reward"] for row in found.outcomes] == [1.0] * 11 + [None] + [1.0] * 8
    assert [row["answer"] for row in found.outcomes] == ["00", "11", "22", "33"] * 4 + ["00"] * 4
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = collect_rollouts(policy, sampler, problems, rewards("crash", on_error="null"), settings, 0)
    assert [row.reward for row in rows] == [0.5] * 6 + [None] + [0.5] * 9
    told = ["reward 'crash' ended its process with status 3 on row 6; scored as null"]
    assert [str(one.message) for one in caught] == told


@pytest.mark.slow
def test_a_broken_reward_ends_the_sampling(
    policy: Policy, rewards: Callable[..., Reward], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is left for its process to do."""
    monkeypatch.setattr(scoring, "CHUNK", 4)
    reward, sampled = rewards("Picky"), list[int]()
    processes = reward.function
    assert isinstance(processes, isolation.RewardProcesses)

    def before_next(place: int) -> None:
        sampled.append(place)
        if place == 1:  # all that was begun has been scored
            processes.submit(lambda process: None).result()

    with pytest.raises(UserError, match="on row 11"):
        collect_rollouts(policy, Batches(before_next), problems_of(policy, 4), reward, Sampling(samples=4), 0)
    assert sampled == [3, 2, 1]


def test_a_sampler_that_changes_its_mind_is_scored_by_what_it_returns(
    policy: Policy, rewards: Callable[..., Reward], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Changed(Batches):
        def sample(self, *arguments: Any, **options: Any) -> list[list[Sample]]:
            made = super().sample(*arguments, **options)
            return [[Sample(one.ids, one.text * 5, True) for one in made[0][:1]], *made[1:]]

    monkeypatch.setattr(scoring, "CHUNK", 4)
    rows = collect_rollouts(policy, Changed(), problems_of(policy, 3), rewards("mark"), Sampling(samples=2), 0)
    assert [row.reward for row in rows] == [5.0, 1.0, 1.0, 1.0, 1.0]


def test_ctrl_c_ends_the_wait_for_a_reward_that_hangs(
    policy: Policy, rewards: Callable[..., Reward], tmp_path: Path
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist ignores the signal

    def interrupt() -> None:
        until((tmp_path / "mine.called").exists)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        collect_rollouts(policy, Silent(), problems_of(policy, 2), rewards("hang"), Sampling(samples=2), 0)
    thread.join()
    signal.signal(signal.SIGINT, before)
