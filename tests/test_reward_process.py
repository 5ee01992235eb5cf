"""Rewards that hang, crash, eat memory or lie: a bounded time, one line, and no other row harmed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rlzoo.errors import UserError
from rlzoo.reward import Reward, Score, get_reward, isolation
from rlzoo.reward.isolation import Limits, isolated

BAD = """
import os, pathlib, time, warnings
def bad(prompts, completions, **columns):
    values = []
    print("a reward may print")
    warnings.warn("and warn")
    for text in completions:
        if text == "hang":
            while True:
                time.sleep(1)
        if text == "spin":
            10 ** 10 ** 9
        if text == "exit":
            os._exit(7)
        if text == "ask":
            input()
        if text == "memory":
            bytearray(2 ** 30)
        if text == "mark":
            pathlib.Path(__file__).with_suffix(".pid").write_text(str(os.getpid()))
            time.sleep(600)
        if text == "raise":
            raise RuntimeError("oh")
        values.append({"nan": float("nan"), "text": "high", "none": None}.get(text, float(len(text))))
    return values[1:] if "few" in completions else values
"""


@pytest.fixture
def bad(tmp_path: Path) -> Any:
    (tmp_path / "bad.py").write_text(BAD)

    def make(on_error: Any = "null", seconds: float | None = 1.0, memory: float = 1.0) -> Reward:
        return isolated(f"{tmp_path / 'bad.py'}:bad", Limits(seconds, memory), on_error)

    yield make
    for process in isolation._processes.values():
        process.close()


@pytest.mark.slow
def test_answers_are_found_in_the_process_too(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import time\nclass Mine:\n    name = 'mine'\n    def __call__(self, completions, **columns):\n"
        "        return [1.0 for _ in completions]\n    def answer_of(self, completion):\n"
        "        time.sleep(600 if completion == 'hang' else 0)\n"
        "        return completion[1:] and 1 / int(completion[1:])\n"
    )
    spec = f"{tmp_path / 'mine.py'}:Mine"
    reward = isolated(spec, Limits(1.0, 1.0))
    assert reward.answers(["x1", "x2", "x"]) == ["1.0", "0.5", ""]
    assert reward.answers(["x1", "hang"]) == [None, None], "in time, and none of them"
    with pytest.raises(
        UserError, match=r"^reward 'mine': answer_of raised ZeroDivisionError: division by zero \(mine.py line 8\)$"
    ):
        reward.answers(["x0"])
    lenient = isolated(spec, Limits(1.0, 1.0), "null")
    with pytest.warns(RuntimeWarning, match="answer_of raised ZeroDivisionError"):
        assert lenient.answers(["x0"]) == [None]
    weighted = get_reward(["format", spec, "exact-match"])
    assert weighted.answers(["x4", "x"]) == ["0.25", ""], "of the first that has some"
    for process in isolation._processes.values():
        process.close()


def scored(reward: Reward, *texts: str) -> tuple[list[float | None], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = reward.score(["?"] * len(texts), list(texts), {})
    return [score.value for score in scores], [str(w.message) for w in caught]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hang", "reward 'bad' took more than 1 s on row 1"),
        ("spin", "reward 'bad' took more than 1 s on row 1"),
        ("exit", "reward 'bad' ended its process with status 7 on row 1"),
        ("memory", "reward 'bad' raised on row 1: MemoryError"),
        ("raise", "reward 'bad' raised on row 1: RuntimeError: oh"),
        ("ask", "reward 'bad' raised on row 1: EOFError"),
        ("nan", "reward 'bad' returned nan on row 1: return a finite number"),
        ("text", "reward 'bad' returned 'high' on row 1: return a finite number"),
    ],
)
def test_a_bad_row_costs_a_bounded_time_and_no_other_row(bad: Any, text: str, told: str) -> None:
    seconds = 1.0 if "took" in told else 60.0  # whatever else the machine has to do
    values, messages = scored(bad(seconds=seconds), "ab", text, "abc")
    assert values == [2.0, None, 3.0]
    assert len(messages) == 1 and messages[0].startswith(told) and messages[0].endswith("; scored as null")
    with pytest.raises(UserError) as caught:
        bad("fail", seconds).score(["?"] * 3, ["ab", text, "abc"], {})
    assert str(caught.value).startswith(told)
    assert scored(bad(seconds=seconds), "abcd") == ([4.0], []), "the process serves on"


@pytest.mark.slow
def test_rows_that_have_to_be_scored_alone_keep_their_numbers(bad: Any) -> None:
    reward = bad(seconds=1.0)
    values, messages = scored(reward, "ab", "hang", "raise", "nan")
    assert values == [2.0, None, None, None]
    told = ["took more than 1 s on row 1", "raised on row 2: RuntimeError", "returned nan on row 3"]
    assert [message.removeprefix("reward 'bad' ")[: len(t)] for message, t in zip(messages, told, strict=True)] == told
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert reward.score(["?"], ["exit"], {}) == [Score(None, {"bad": None})]


@pytest.mark.slow
def test_other_limits_are_another_process(bad: Any) -> None:
    assert scored(bad(seconds=None), "memory")[0] == [None]
    assert scored(bad(seconds=60.0, memory=8.0), "memory") == ([6.0], [])


@pytest.mark.slow
def test_a_process_finds_modules_and_gets_what_a_reward_here_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_this.py").write_text(
        "import os\n"
        "def mine(prompts, completions, completion_ids=None, **columns):\n"
        "    assert prompts == ['q'] and columns['gold'] == ['g'], (prompts, columns)\n"
        "    return [len(completion_ids[0]) if completion_ids else os.getpid()]\n"
        "def leads(completions):\n    return [float(os.getsid(0) == os.getpid())]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert isolated("beside_this:leads", Limits())(["q"], ["a"]) == [1.0], "Ctrl-C does not come to it"
    made: list[Reward] = []
    thread = threading.Thread(target=lambda: made.append(isolated("beside_this:mine", Limits())))
    thread.start()
    thread.join()
    (mine,) = made
    own = {"gold": ["g"], "prompts": ["not this"]}
    assert [score.value for score in mine.score(["q"], ["a"], own, [[1, 2, 3]])] == [3.0]
    (started,) = isolation._processes[next(key for key in isolation._processes if "beside_this:mine" in key)].processes
    assert started.pid is not None and mine(["q"], ["a"], gold=["g"]) == [started.pid], "it outlives the thread"
    for each in isolation._processes.values():
        each.close()


def test_threads_take_turns_at_one_process(bad: Any) -> None:
    reward = bad()
    with ThreadPoolExecutor(4) as threads:
        texts = ["x" * n for n in range(20)]
        found = list(threads.map(lambda text: reward.score(["?"], [text], {})[0].value, texts))
    assert found == [float(n) for n in range(20)]


@pytest.mark.slow
def test_a_file_of_the_same_name_in_another_folder_is_another_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "mine.py").write_text(f"def mine(completions, **_): return [{number}.0]")
        monkeypatch.chdir(tmp_path / str(number))
        assert scored(isolated("mine.py:mine", Limits()), "x") == ([number], [])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks the system to end a process with its parent")
def test_a_reward_that_hangs_does_not_outlive_a_run_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(BAD)
    script = "import sys; from rlzoo.reward.isolation import *; isolated(sys.argv[1], Limits())"
    script += ".score(['?'], ['mark'], {})"
    run = subprocess.Popen([sys.executable, "-c", script, f"{tmp_path / 'bad.py'}:bad"])
    mark = tmp_path / "bad.pid"
    while not (mark.exists() and mark.read_text()):
        assert run.poll() is None
        time.sleep(0.05)
    run.kill()
    run.wait()
    process = Path("/proc", mark.read_text(), "cmdline")
    for _ in range(1200):
        if not process.exists() or not process.read_bytes():  # the second: ended, and nobody asked how
            return
        time.sleep(0.05)
    os.kill(int(mark.read_text()), signal.SIGKILL)
    pytest.fail("the reward goes on without the run")


def test_too_few_values_are_told(bad: Any) -> None:
    with pytest.raises(UserError, match="reward 'bad' returned 1 values for 2 completions"):
        bad("fail").score(["?"] * 2, ["few", "abc"], {})
    values, messages = scored(bad(), "few", "abc")
    assert values == [None, None] and len(messages) == 1


@pytest.mark.slow
def test_a_reward_that_cannot_be_built_says_so_as_here(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown reward 'exakt': did you mean 'exact-match'"):
        isolated("exakt", Limits())
    with pytest.raises(UserError, match="must be given by name"):
        isolated(lambda completions: [0.0] * len(completions), Limits())


@pytest.mark.slow
def test_it_gives_what_the_reward_gives_here() -> None:
    spec = [{"name": "exact-match"}, {"name": "format", "weight": 0.5, "pattern": "#### .*"}]
    columns = {"answer": ["3", "4"]}
    arguments = (["1+2", "2+2"], ["#### 3", "#### 5"], columns)
    here = isolated(spec, Limits(None, None)).score(*arguments)
    there = isolated(spec, Limits()).score(*arguments)
    assert here == there and all(isinstance(score, Score) and len(score.components) == 2 for score in there)


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


@pytest.mark.slow
def test_hostile_answers_cost_a_bounded_time() -> None:
    reward = isolated("math-answer", Limits(6.0, 2.0), "null")
    texts = [*HOSTILE, r"\boxed{42}", "#### 41"]
    values, _ = scored_with(reward, texts, ["42"] * len(texts))
    assert values[-2:] == [1.0, 0.0]
    assert all(value in (0.0, None) for value in values[:-2])
    # that it returns is the bound: each of these would take for ever


def scored_with(reward: Reward, texts: list[str], answers: list[str]) -> tuple[list[float | None], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = reward.score(["?"] * len(texts), texts, {"answer": answers})
    return [score.value for score in scores], [str(w.message) for w in caught]
