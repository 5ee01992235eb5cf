"""Rewards as people bring them: written for TRL or verl, with modules beside them, for the other form of text."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import math
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlzoo.buffers.problems import Problem, encode_problems
from rlzoo.comparison.one_stage import collector_of
from rlzoo.config import EvaluationSettings, Sampling, Training, load_experiment
from rlzoo.errors import UserError
from rlzoo.evaluation import evaluate
from rlzoo.objective import get_objective
from rlzoo.policy import Policy
from rlzoo.reward import Reward, Score, get_reward
from rlzoo.reward.calling import TrainerState
from rlzoo.reward.isolation import Limits, isolated
from rlzoo.rollout import Sample, Sampler, collect_rollouts

FORMS: Sequence[Callable[[str], Any]] = (lambda text: text, lambda text: [{"role": "assistant", "content": text}])


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What TRL passes


def curriculum(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
    return [trainer_state.global_step / max(trainer_state.max_steps, 1)] * len(completions)


def by_name(completions: list[str], **columns: Any) -> list[float]:
    return [float(columns["trainer_state"].global_step)] * len(completions)


def logging(completions: list[str], log_extra: Any, log_metric: Any, **columns: Any) -> list[float]:
    log_extra("length", np.array([len(c) for c in completions]))
    for completion in completions:  # in several goes
        log_extra("upper", [completion.upper()])
    log_metric("longest", max(len(c) for c in completions))
    log_metric("longest", np.float32(0))
    return [1.0] * len(completions)


def test_the_trainers_state_has_transformers_fields_and_defaults() -> None:
    from transformers import TrainerState as Theirs

    theirs = asdict(Theirs())
    assert asdict(TrainerState()) == {**theirs, "epoch": 0}  # None in transformers 5.0


def test_a_reward_is_told_how_far_training_is() -> None:
    assert get_reward(curriculum)([""], ["a"]) == [0.0]
    assert get_reward(curriculum).at(3, 12)([""] * 2, ["a", "b"]) == [0.25, 0.25]
    assert get_reward([by_name, curriculum]).at(3, 12)([""], ["a"]) == [3.25]
    assert len({get_reward(curriculum), get_reward(curriculum).at(3, 12)}) == 1, "it can be a key, and is one reward"
    theirs = TrainerState(global_step=7)
    assert get_reward(by_name).at(3, 12)([""], ["a"], trainer_state=theirs) == [7.0], "TRL passes its own"


def test_what_a_reward_logs_stands_in_its_scores() -> None:
    expected = [
        Score(1.0, {"logging": 1.0}, {"length": 1, "upper": "A"}, {"longest": 1.0}),
        Score(1.0, {"logging": 1.0}, {"length": 2, "upper": "BC"}, {"longest": 1.0}),
    ]
    assert get_reward(logging).score([""] * 2, ["a", "bc"], {}) == expected
    (both,) = get_reward([logging, {"name": curriculum}]).score([""], ["a"], {})
    assert both.extra == {"length": 1, "upper": "A"} and both.metrics == {"longest": 0.5}


def test_a_trainer_that_passes_its_own_functions_to_log_with_gets_what_is_logged() -> None:
    def mine(completions: list[str], log_extra: Callable[[str, Any], None], **_: Any) -> list[float]:
        log_extra("length", [len(c) for c in completions])
        return [1.0] * len(completions)

    got: dict[str, Any] = {}
    assert get_reward(mine)(["q"], ["four"], log_extra=got.__setitem__) == [1.0] and got == {"length": [4]}


def test_rows_that_fail_keep_their_numbers_and_have_null_components() -> None:
    def odd(completions: list[str], gold: Any, weight: Any) -> list[float]:
        assert (gold[0], weight[0]) in (("a", 1), ("b", 2), ("c", 3))
        return [float(c) for c in completions]

    with pytest.warns(RuntimeWarning) as caught:
        columns = {"gold": ("a", "b", "c"), "weight": np.array([1, 2, 3])}
        scores = get_reward(odd, "null").score(["q"] * 3, ["1", "one", "nan"], columns)
    assert [score.components for score in scores] == [{"odd": 1.0}, {"odd": None}, {"odd": None}]
    told = ["reward 'odd' raised on row 1: ", "reward 'odd' returned nan on row 2: "]
    assert [str(w.message)[: len(t)] for w, t in zip(caught, told, strict=True)] == told


@pytest.mark.slow
def test_a_reward_of_trls_may_run_in_a_process_of_its_own(tmp_path: Path) -> None:
    body = inspect.getsource(curriculum) + inspect.getsource(logging)
    (tmp_path / "mine.py").write_text(f"from typing import Any\nimport numpy as np\n{body}")
    spec = [f"{tmp_path / 'mine.py'}:curriculum", f"{tmp_path / 'mine.py'}:logging"]
    here, there = (isolated(spec, limits).at(3, 12) for limits in (Limits(None, None), Limits()))
    found = there.score([""] * 2, ["a", "bc"], {})
    assert found == here.score([""] * 2, ["a", "bc"], {})
    assert [score.value for score in found] == [1.25, 1.25]
    assert found[1].extra == {"length": 2, "upper": "BC"} and found[1].metrics == {"longest": 1.0}


def test_logging_that_goes_wrong_costs_no_reward() -> None:
    def odd(completions: list[str], log_extra: Any, log_metric: Any, **columns: Any) -> list[float]:
        log_extra("x", [Decimal("0.5"), torch.tensor(2)])
        log_metric("y", math.nan)
        log_metric("z", math.inf)
        log_metric("z", 3)
        return [1.0] * len(completions)

    found = get_reward(odd).score([""] * 2, ["a", "b"], {})
    assert [score.extra for score in found] == [{"x": "0.5"}, {"x": 2}] and found[0].metrics == {"z": 3.0}

    def few(completions: list[str], log_extra: Any, **columns: Any) -> list[float]:
        log_extra("x", [1])
        return [1.0] * len(completions)

    with pytest.warns(RuntimeWarning, match="reward 'few' logged 1 values of 'x' for 2 completions; they are ignored"):
        found = get_reward(few).score([""] * 2, ["a", "b"], {})
    assert found == [Score(1.0, {"few": 1.0})] * 2

    def wrong(completions: list[str], log_metric: Any, **columns: Any) -> list[float]:
        log_metric("x", "much")
        return [1.0] * len(completions)

    assert "raised on row 0: ValueError: could not convert" in one_line(lambda: get_reward(wrong)([""], ["a"]))


class FakeSampler(Sampler):
    """Answers with the number of the sample."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        seed: int,
        greedy: bool = False,
        progress: Callable[[int], None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        copies = 1 if greedy else settings.samples
        return [[Sample([30 + n], str(n), truncated=True) for n in range(copies)] for _ in prompts]


def test_what_a_reward_logs_reaches_buffers_outcomes_and_metrics(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("gpt2")
    problems = [Problem("p", "17+25=?\n", {"answer": "1", "upper": "data"})]
    rows = collect_rollouts(
        policy, FakeSampler(), encode_problems(policy.tokenizer, problems), logging, Sampling(samples=2), seed=0
    )
    assert [row.columns for row in rows] == [
        {"answer": "1", "upper": "data", "length": 1, "logged_upper": str(n)} for n in range(2)
    ]
    assert [row.reward_components for row in rows] == [{"logging": 1.0, "longest": 0.5}] * 2

    found = evaluate(policy, problems, logging, EvaluationSettings(samples=2), sampler=FakeSampler())
    assert found.metrics["reward/longest"] == 0.5
    assert [row["logged"] for row in found.outcomes] == [json.dumps({"length": 1, "upper": upper}) for upper in "010"]


def test_the_components_of_a_reward_and_its_metrics_are_metrics_of_training(make_policy: Callable[..., Policy]) -> None:
    from rlzoo import OfflineBuffer, train

    policy = make_policy("gpt2")
    problems = encode_problems(policy.tokenizer, [Problem("p", "17+25=?\n", {})])

    def first(completions: list[str], log_metric: Any, **_: Any) -> list[float]:
        log_metric("seen", len(completions))
        return [float(c == "0") for c in completions]

    rows = collect_rollouts(policy, FakeSampler(), problems, first, Sampling(samples=2), seed=0)
    record = train(policy, get_objective("grpo"), OfflineBuffer.from_trajectories(rows), Training(steps=1))
    assert record.steps[0]["reward/seen"] == 2.0 and record.steps[0]["reward/first"] == record.steps[0]["reward"] == 0.5
    alone = OfflineBuffer.from_trajectories([replace(row, reward_components={"first": row.reward}) for row in rows])
    (step,) = train(policy, get_objective("grpo"), alone, Training(steps=1)).steps
    assert step["reward"] == 0.5 and "reward/first" not in step, "one part alone is the reward itself"


def test_fresh_samples_are_rewarded_as_of_their_step(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def mine(completions, trainer_state, log_metric, **columns):\n"
        "    log_metric('epoch', trainer_state.epoch)\n"
        "    return [trainer_state.global_step / trainer_state.max_steps] * len(completions)\n"
    )
    changes = {"reward": f"{tmp_path / 'mine.py'}:mine", "rollouts.samples": 2, "rollouts.max_new_tokens": 1}
    experiment = load_experiment(
        "facts", {**changes, "train.limit": 4, "scoring": {"seconds": None, "memory_gb": None}}
    )
    training = Training(steps=8, updates_per_batch=2)
    collect = collector_of(experiment, make_policy("gpt2"), training, 4, seed=0)
    for version in (0, 3):  # three batches of two prompts each were drawn, and two steps made on each
        rows = [row for row in collect(version) if row.source == "policy"]
        assert len(rows) == 4
        for row in rows:
            assert row.reward == version * 2 / 8
            assert row.reward_components == {"epoch": version * 2 / 4, "mine": row.reward}


def test_columns_with_the_names_of_what_rlzoo_passes_do_not_take_its_place(make_policy: Callable[..., Policy]) -> None:
    def reward(prompts: Any, completions: Any, trainer_state: Any, log_metric: Any, answer: Any) -> list[float]:
        log_metric("step", trainer_state.global_step)
        return [float(prompt == "1+1=") for prompt in prompts]

    own = dict.fromkeys(("prompts", "completions", "completion_ids", "trainer_state", "log_metric"), "x")
    problems = [Problem("p", "1+1=", {**own, "answer": "2"})]
    settings = EvaluationSettings(samples=2, max_new_tokens=2)
    found = evaluate(make_policy("gpt2"), problems, reward, settings, greedy=False)
    assert found.metrics["avg_at_k"] == 1.0 and found.metrics["reward/step"] == 0.0


# Other signatures


def compute_score(data_source: Any, solution_str: Any, ground_truth: Any, extra_info: Any = None) -> float:
    return float(ground_truth in solution_str)


def process_results(doc: Any, results: Any, **options: Any) -> dict[str, float]:
    return {"acc": 1.0}


async def grade(response: str, label: str) -> float:
    return 1.0


@pytest.mark.parametrize("function", [compute_score, process_results, grade, functools.partial(grade, label="x")])
def test_a_function_of_another_signature_is_told_trls(function: Any) -> None:
    told = one_line(lambda: get_reward(function))
    name = getattr(function, "func", function).__name__
    assert "a reward has TRL's signature, reward(prompts, completions, **columns): wrap it" in told
    assert f"return [{name}(...) for completion in completions]" in told


def test_a_parameter_that_is_no_column_is_told_the_signature() -> None:
    def reward_func(completions: list[str], labels: list[str]) -> list[float]:
        return [1.0] * len(completions)

    told = one_line(lambda: get_reward(reward_func)(["p"], ["c"], answer=["4"]))
    assert told.startswith("reward 'reward-func' needs the column 'labels'; the data's columns: answer; ")
    assert "`columns: {labels: COLUMN}`" in told and "TRL's signature, reward(prompts, completions, **columns)" in told


def openrlhf(queries: list[str], prompts: list[str], labels: list[str], **options: Any) -> list[float]:
    return [1.0] * len(queries)


def trlx(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
    return [1.0] * len(samples)


class Verifier:  # as in open-instruct
    def __call__(self, tokenized_prediction: list[int], prediction: str, label: str) -> float:
        return 1.0


@pytest.mark.parametrize("function", [openrlhf, trlx, Verifier])
def test_a_function_that_does_not_look_at_completions_is_told_trls_signature(function: Any) -> None:
    told = one_line(lambda: get_reward(function)(["p"], ["c"], labels=["4"]))
    assert " rather than completions; a reward has TRL" in told
    assert "a reward has TRL's signature, reward(prompts, completions, **columns): wrap it" in told


class Orm:  # as in ms-swift
    def __call__(self, completions: list[str], solution: list[str], **columns: Any) -> list[float]:
        return [float(text == gold) for text, gold in zip(completions, solution, strict=True)]


def test_a_class_whose_objects_score_is_a_reward() -> None:
    assert get_reward(Orm)(["p", "p"], ["4", "5"], solution=["4", "4"]) == [1.0, 0.0]


def test_a_decorator_that_changes_the_signature() -> None:
    @functools.wraps(compute_score)
    def adapted(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [compute_score(None, c, a) for c, a in zip(completions, answer, strict=True)]

    assert get_reward(adapted)(["p"] * 2, ["4", "5"], answer=["4", "4"]) == [1.0, 0.0]


def test_a_decorator_that_passes_everything_on() -> None:
    def strict(completions: list[str], answer: list[str]) -> list[float]:
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    @functools.wraps(strict)
    def timed(*arguments: Any, **columns: Any) -> Any:
        return strict(*arguments, **columns)

    assert get_reward(timed)(["p"], ["4"], answer=["4"], other=[1]) == [1.0]


# Text and conversations

TAKE_CONVERSATIONS: dict[str, Callable[..., list[float]]] = {
    "content": lambda completions, **_: [float(len(c[0]["content"])) for c in completions],
    "last": lambda completions, **_: [float("4" in c[-1]["content"].split("####")[1]) for c in completions],
    "get": lambda completions, **_: [float(len(c[0].get("content"))) for c in completions],
    "prompt": lambda prompts, **_: [float(len(p[-1]["content"])) for p in prompts],
    "join": lambda completions, **_: [float(len("".join(m["content"] for m in c))) for c in completions],
}
TAKE_TEXT: dict[str, Callable[..., list[float]]] = {
    "strip": lambda completions, **_: [float(len(c.strip())) for c in completions],
    "search": lambda completions, **_: [float(bool(__import__("re").search("4", c))) for c in completions],
    "float": lambda completions, **_: [float(c) for c in completions],
    "add": lambda completions, **_: [float(len(c + "x")) for c in completions],
    "split": lambda completions, **_: [float(c.split("####")[1]) for c in completions],
    "in": lambda completions, **_: [float("4" in c) for c in completions],
    "equal": lambda completions, **_: [float(c == "4") for c in completions],
    "differs": lambda completions, **_: [float(c != "4") for c in completions],
    "key": lambda completions, **_: [{"4": 1.0}.get(c, 0.0) for c in completions],
    "prompt": lambda prompts, **_: [float(p.endswith("?")) for p in prompts],
}


@pytest.mark.parametrize(
    ("name", "text"), [*((name, text) for name in TAKE_CONVERSATIONS for text in ("4", "#### 4")), ("content", "")]
)
def test_a_reward_that_takes_conversations_and_gets_text(name: str, text: str) -> None:
    reward = get_reward(TAKE_CONVERSATIONS[name])
    told = one_line(lambda: reward(["1 + 3?"], [text]))
    assert "it expects conversations, but these prompts and completions are plain text: set `chat: true`" in told


@pytest.mark.parametrize("name", TAKE_TEXT)
@pytest.mark.parametrize("text", ["4", "#### 4"])
def test_a_reward_that_takes_text_and_gets_conversations(name: str, text: str) -> None:
    told = one_line(lambda: get_reward(TAKE_TEXT[name])([FORMS[1]("1 + 3?")], [FORMS[1](text)]))
    assert "it expects plain text, but these completions are conversations" in told and "remove `chat: true`" in told


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "reward",
    [
        lambda completions, **_: [1 / 0 for _ in completions],
        lambda completions, info, **_: [i["level"] for i in info],  # a column of JSON as text
        lambda completions, answer, **_: [{"a": 1}[a] for a in answer],
        lambda completions, answer, **_: [a.strip() for a in answer],
        lambda completions, **_: [completions[7] for _ in completions],
        lambda completions, **_: [__import__("re").search("z", str(c)).group(1) for c in completions],
    ],
)
def test_no_other_error_is_put_down_to_the_form(reward: Any, form: Callable[[str], Any]) -> None:
    told = one_line(lambda: get_reward(reward)([form("q")], [form("4")], info=['{"level": 1}'], answer=[5]))
    assert "raised on row 0" in told and "chat: true" not in told


def test_an_error_of_another_kind_says_nothing_of_the_form() -> None:
    told = one_line(
        lambda: get_reward(lambda completions: [1 / (not isinstance(c, str)) for c in completions])("q", "a")
    )
    assert "raised on row 0: ZeroDivisionError: division by zero (test_reward_calls.py line" in told


def test_a_conversation_is_a_list_in_all_else() -> None:
    def mine(completions: Any, **columns: Any) -> list[float]:
        for c in completions:
            assert c not in ("", None) and "" not in c
            assert isinstance(c, list) and c == [{"role": "assistant", "content": "4"}]
            assert json.loads(json.dumps(c)) == [*c] and {"role": "assistant", "content": "4"} in c
        return [1.0] * len(completions)

    assert get_reward(mine)([FORMS[1]("q")], [FORMS[1]("4")]) == [1.0]


def test_the_hint_is_there_in_a_process_of_its_own_and_for_null(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def mine(completions, **columns):\n    return [c[0]['content'] for c in completions]\n"
    )
    reward = isolated(f"{tmp_path / 'mine.py'}:mine", Limits(), "null")
    with pytest.warns(RuntimeWarning, match="on row 0: TypeError: .*set `chat: true`.*; scored as null"):
        assert reward(["q"], ["4"]) == [None]


def test_a_column_that_a_reward_looks_up_by_itself() -> None:
    def mine(completions: list[str], **columns: Any) -> list[float]:
        return [float(c == s) for c, s in zip(completions, columns["solution"], strict=True)]

    told = one_line(lambda: get_reward(mine)(["q"], ["4"], answer=["4"]))
    assert "KeyError: 'solution' (" in told and told.endswith("); the data's columns: answer")


# Modules beside a file


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two folders with a file of one name, each with modules of its own beside it."""
    for name in ("one", "two"):
        folder = tmp_path / name
        (folder / "tools" / "deep").mkdir(parents=True)
        (folder / "plain").mkdir()
        (folder / "helpers.py").write_text(f"import second\nNAME = {name!r}\n")
        (folder / "second.py").write_text("VALUE = 1.0\n")
        (folder / "tools" / "__init__.py").write_text("from helpers import NAME\n")
        (folder / "tools" / "deep" / "__init__.py").write_text("from ..sides import two\n")
        (folder / "tools" / "sides.py").write_text("import second\ntwo = 2 * second.VALUE\n")
        (folder / "plain" / "part.py").write_text("three = 3.0\n")
        (folder / "random.py").write_text("raise RuntimeError('not meant')\n")
        (folder / "mine.py").write_text(
            "from __future__ import annotations\n"
            "import random\n"
            "from helpers import NAME\n"
            "from .second import VALUE\n"
            "import tools.deep\n"
            "from plain import part\n"
            "import rlzoo\n"
            "def mine(completions, **columns):\n"
            "    from tools import NAME as late\n"
            "    import helpers, plain.part as again\n"
            "    assert late == NAME == helpers.NAME == columns['name'][0] and again.three == part.three\n"
            "    return [VALUE + tools.deep.two + part.three + 10 * random.randint(1, 1)] * len(completions)\n"
            "class Mine(rlzoo.Objective):\n"
            "    name = 'mine'\n"
            "    def coefficients(self, batch):\n"
            "        return rlzoo.Coefficients(VALUE * batch.mask.float())\n"
        )
    return tmp_path


def test_a_file_imports_what_lies_beside_it_and_nothing_of_another_folder(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("plain", "tools"):  # folders of data in the working directory, say
        (folders / "here" / name).mkdir(parents=True)
    (folders / "here" / "helpers.py").write_text("raise RuntimeError('not meant')")
    monkeypatch.setattr(sys, "path", [*sys.path, str(folders / "here")])
    path, modules = list(sys.path), set(sys.modules)
    for name in ("one", "two"):
        assert get_reward(f"{folders / name / 'mine.py'}:mine")(["q"], ["4"], name=[name]) == [16.0]
        assert get_objective(f"{folders / name / 'mine.py'}:Mine").name == "mine"
    assert sys.path == path
    new = {name.partition(".")[0] for name in set(sys.modules) - modules}
    assert not {"helpers", "second", "tools", "plain"} & new


@pytest.mark.slow
def test_a_file_imports_what_lies_beside_it_in_a_process_of_its_own(folders: Path) -> None:
    spec = [f"{folders / name / 'mine.py'}:mine" for name in ("one", "one")]
    assert isolated(spec, Limits())(["q"], ["4"], name=["one"]) == [32.0]


def test_a_module_that_a_plain_import_finds_there_is_imported_once(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a file in the working directory, where a command finds package.module:Name too."""
    (folders / "one" / "shared_by_both.py").write_text("class Kind: ...\n")
    (folders / "one" / "uses.py").write_text("from shared_by_both import Kind\ndef mine(completions): return []\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(folders / "one")])
    reward = get_reward(f"{folders / 'one' / 'uses.py'}:mine")
    assert inspect.getmodule(reward.function).Kind.__module__ == "shared_by_both"  # type: ignore[union-attr]
    del sys.modules["shared_by_both"]


def test_a_module_beside_that_is_broken_or_missing_is_one_line(folders: Path) -> None:
    (folders / "one" / "broken.py").write_text("def f(:\n")
    for name, told in (("broken", "SyntaxError: .*broken.py"), ("nowhere_to_be_found", "No module named")):
        file = folders / "one" / f"uses-{name}.py"
        file.write_text(f"import {name}\n")
        with pytest.raises(UserError, match=f"uses-{name}.py' cannot be loaded: .*{told}"):
            get_reward(f"{file}:mine")


# What a reward may be, return and do


class Scorer:
    def __call__(self, completions: list[str], answer: list[str] | None = None, **columns: Any) -> list[bool]:
        return [c == a for c, a in zip(completions, answer or [], strict=True)]

    async def later(self, completions: list[str], answer: list[str], **columns: Any) -> list[bool]:
        return self(completions, answer)


@pytest.mark.parametrize(
    "reward",
    [
        Scorer(),
        Scorer().later,
        functools.partial(Scorer(), unused=1),
        lambda completions, answer, **_: np.array([c == a for c, a in zip(completions, answer, strict=True)]),
        lambda completions, answer, **_: (float(c == a) for c, a in zip(completions, answer, strict=True)),
        lambda *_, **given: map(lambda c, a: c == a, given["completions"], given["answer"]),
        lambda *, prompts, completions, answer, **_: [
            torch.tensor(c == a) for c, a in zip(completions, answer, strict=True)
        ],
        lambda completions, answer, **_: {c: c == a for c, a in zip(completions, answer, strict=True)}.values(),
    ],
)
def test_what_can_be_called_with_completions_is_a_reward(reward: Any) -> None:
    assert get_reward(reward)(["q"] * 2, ["4", "5"], answer=["4", "4"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ([[1.0], [0.0]], r"returned \[1.0\] on row 0"),
        ([np.array([1.0, 2.0]), 1.0], r"returned \[1.0, 2.0\] on row 0"),
        (np.ones((2, 1)), r"returned \[1.0\] on row 0"),
        ([{"score": 1.0}, {"score": 0.0}], r"returned \{'score': 1.0\} on row 0"),
        ({"score": [1.0, 0.0]}, "returned dict for 2 completions"),
        (b"ab", "returned bytes for 2 completions"),
        ({1.0, 0.0}, "returned set for 2 completions"),
        (torch.tensor(1.0), "returned float for 2 completions"),
    ],
)
def test_a_result_that_is_not_a_number_for_each(result: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        get_reward(lambda completions: result)(["q"] * 2, ["4", "5"])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_reward_that_exits_ends_no_run(asynchronous: bool) -> None:
    def leaves(completions: list[str], **columns: Any) -> list[float]:
        if "leave" in completions:
            sys.exit(0)
        return [1.0] * len(completions)

    async def later(completions: list[str], **columns: Any) -> list[float]:
        return leaves(completions)

    reward = get_reward(later if asynchronous else leaves, on_error="null")
    with pytest.warns(RuntimeWarning, match="raised on row 1: .*SystemExit: 0.*; scored as null"):
        assert reward(["q"] * 3, ["a", "leave", "b"]) == [1.0, None, 1.0]


def test_a_generator_that_raises_is_told_with_its_row() -> None:
    def lazily(completions: list[str], **columns: Any) -> Any:
        return (1 / len(c) for c in completions)

    assert "on row 1, an empty completion: ZeroDivisionError" in one_line(
        lambda: get_reward(lazily)(["q"] * 2, ["a", ""])
    )


def test_a_reward_may_change_what_it_gets() -> None:
    def wild(prompts: list[Any], completions: list[Any], answer: list[str], info: list[Any], **_: Any) -> list[float]:
        for completion, one in zip(completions, info, strict=True):
            completion[0]["content"] = "changed"
            one.clear()
        prompts.clear()
        return [float(len(answer.pop())) for _ in completions]

    prompts, completions = [FORMS[1]("q")] * 2, [FORMS[1]("4"), FORMS[1]("5")]
    columns: dict[str, Any] = {"answer": ["a", "b"], "info": [{"x": [1]}, {"x": [2]}]}
    kept = [repr(x) for x in (prompts, completions, columns)]
    reward = get_reward([wild, lambda completions, **_: [float(c[0]["content"] == "4") for c in completions]])
    assert [score.value for score in reward.score(prompts, completions, columns)] == [2.0, 1.0]
    assert [repr(x) for x in (prompts, completions, columns)] == kept


def test_async_rewards_share_a_loop_between_calls() -> None:
    """A client or a semaphore that a reward keeps belongs to the loop in which it was first used."""
    loops, lock = [], asyncio.Lock()

    async def keeps(completions: list[str], **columns: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        async with lock:
            await asyncio.sleep(0)
        return [1.0] * len(completions)

    for _ in range(3):
        assert get_reward(keeps)(["q"], ["a"]) == [1.0]
    assert loops[0] is loops[2] and not loops[0].is_closed()


def test_evaluate_takes_whatever_get_reward_takes(make_policy: Callable[..., Policy]) -> None:
    policy, problems = make_policy("gpt2"), [Problem("p", "17+25=?\n", {"answer": "0"})]
    settings = EvaluationSettings(samples=2)
    function = lambda completions, answer, **_: [c == a for c, a in zip(completions, answer, strict=True)]  # noqa: E731
    for reward in (function, get_reward(function), "exact-match", {"name": "exact-match"}, Scorer()):
        assert evaluate(policy, problems, reward, settings, sampler=FakeSampler()).metrics["avg_at_k"] == 0.5
    with pytest.raises(UserError, match="reward 3 is int"):
        evaluate(policy, problems, 3, settings, sampler=FakeSampler())


def test_a_reward_of_a_thread_of_ones_own() -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(Reward("later", Scorer().later)(["q"], ["4"], answer=["4"])))
    thread.start()
    thread.join()
    assert found == [1.0]
