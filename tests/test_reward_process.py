"""Rewards that hang, crash, eat memory or lie: a bounded time, one line, and no other row harmed."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from rlzoo import reward_process
from rlzoo.errors import UserError
from rlzoo.reward import Reward, Score
from rlzoo.reward_process import Limits, apart

BAD = """
import os, time, sys
def bad(prompts, completions, **columns):
    values = []
    print("a reward may print")
    for text in completions:
        if text == "hang":
            while True:
                time.sleep(1)
        if text == "spin":
            10 ** 10 ** 9
        if text == "exit":
            os._exit(7)
        if text == "memory":
            bytearray(2 ** 40)
        if text == "raise":
            raise RuntimeError("oh")
        values.append({"nan": float("nan"), "text": "high", "none": None}.get(text, float(len(text))))
    return values[1:] if "few" in completions else values
"""


@pytest.fixture
def bad(tmp_path: Path) -> Any:
    (tmp_path / "bad.py").write_text(BAD)

    def make(on_error: Any = "null", seconds: float = 2.0) -> Reward:
        return apart(f"{tmp_path / 'bad.py'}:bad", Limits(seconds, 1.0), on_error)

    yield make
    for process in reward_process._processes.values():
        process.close()


def judged(reward: Reward, *texts: str) -> tuple[list[float | None], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = reward.score(["?"] * len(texts), list(texts), {})
    return [score.value for score in scores], [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hang", "reward 'bad' took more than 2 s on row 1"),
        ("spin", "reward 'bad' took more than 2 s on row 1"),
        ("exit", "reward 'bad' ended its process with status 7 on row 1"),
        ("memory", "reward 'bad' raised on row 1: MemoryError"),
        ("raise", "reward 'bad' raised on row 1: RuntimeError: oh"),
        ("nan", "reward 'bad' returned nan on row 1: return a finite number"),
        ("text", "reward 'bad' returned 'high' on row 1: return a finite number"),
    ],
)
def test_a_bad_row_costs_a_bounded_time_and_no_other_row(bad: Any, text: str, told: str) -> None:
    started = time.monotonic()
    values, messages = judged(bad(), "ab", text, "abc")
    assert values == [2.0, None, 3.0]
    assert len(messages) == 1 and messages[0].startswith(told) and messages[0].endswith("; scored as null")
    assert time.monotonic() - started < 30
    with pytest.raises(UserError) as caught:
        bad("fail").score(["?"] * 3, ["ab", text, "abc"], {})
    assert str(caught.value).startswith(told)
    assert judged(bad(), "abcd") == ([4.0], []), "the process serves on"


def test_too_few_values_are_told(bad: Any) -> None:
    with pytest.raises(UserError, match="reward 'bad' returned 1 values for 2 completions"):
        bad("fail").score(["?"] * 2, ["few", "abc"], {})
    values, messages = judged(bad(), "few", "abc")
    assert values == [None, None] and len(messages) == 1


def test_a_reward_that_cannot_be_built_says_so_as_here(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown reward 'exakt': did you mean 'exact-match'"):
        apart("exakt", Limits())
    with pytest.raises(UserError, match="must be named"):
        apart(lambda completions: [0.0] * len(completions), Limits())


def test_it_gives_what_the_reward_gives_here() -> None:
    spec = [{"name": "exact-match"}, {"name": "format", "weight": 0.5, "pattern": "#### .*"}]
    columns = {"answer": ["3", "4"]}
    arguments = (["1+2", "2+2"], ["#### 3", "#### 5"], columns)
    here = apart(spec, Limits(None, None)).score(*arguments)
    there = apart(spec, Limits()).score(*arguments)
    assert here == there and all(isinstance(score, Score) and len(score.parts) == 2 for score in there)


HOSTILE = [
    r"\boxed{9^{9^{9^{9^{9}}}}}",
    r"\boxed{(((2^{100000})^{100000})^{100000})!}",
    r"\boxed{" + "{" * 20_000 + "1" + "}" * 20_000 + "}",
    r"\boxed{" + r"\frac{1}{" * 2_000 + "1" + "}" * 2_000 + "}",
    r"\boxed{" + "x^2+" * 100_000 + "1}",
    "the answer is " + "9" * 1_000_000,
    r"\sqrt{" * 50_000,
    "$" * 200_000,
    r"\boxed{\int_0^{10^{100}} \prod_{k=1}^{10^{9}} k^k dx}",
    "\0\ud7ff\u202e" * 1000,
]


def test_hostile_answers_cost_a_bounded_time() -> None:
    reward = apart("math-answer", Limits(6.0, 2.0), "null")
    started = time.monotonic()
    texts = [*HOSTILE, r"\boxed{42}", "#### 41"]
    values, _ = judged_with(reward, texts, ["42"] * len(texts))
    took = time.monotonic() - started
    assert values[-2:] == [1.0, 0.0]
    assert all(value in (0.0, None) for value in values[:-2])
    assert took < 6.0 * (len(HOSTILE) + 3), took


def judged_with(reward: Reward, texts: list[str], answers: list[str]) -> tuple[list[float | None], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = reward.score(["?"] * len(texts), texts, {"answer": answers})
    return [score.value for score in scores], [str(w.message) for w in caught]
