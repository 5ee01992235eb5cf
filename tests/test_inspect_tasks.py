"""Tasks of inspect as benchmarks: the prompts, the scores, and what is refused, with the real library."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from rlzoo.buffers.problems import Problem, load_problems
from rlzoo.config import Benchmark, EvaluationSettings, Experiment, ProblemSource
from rlzoo.config.validation import validated
from rlzoo.errors import UserError
from rlzoo.evaluation import evaluate
from rlzoo.jobs.runs import run_in
from rlzoo.policy import load_policy
from rlzoo.reward import get_reward
from rlzoo.rollout import Sample, Sampler

FILE = Path(__file__).parent / "tasks" / "inspect_sums.py"


@pytest.fixture(scope="module")
def library() -> Any:
    """inspect, which only some environments have."""
    return pytest.importorskip("inspect_ai", reason="tasks of inspect are tested with inspect-ai (make test-inspect)")


def load(task: str, **settings: Any) -> list[Problem]:
    return list(load_problems(Benchmark(source=f"inspect:{FILE}@{task}", **settings)))


def scored(task: str, completions: list[str], problem: int = 0, **options: Any) -> list[float | None]:
    one = load(task)[problem]
    columns = {name: [value] * len(completions) for name, value in one.columns.items()}
    reward = get_reward({"name": "inspect-task", **options})
    return [score.value for score in reward.score([one.prompt] * len(completions), completions, columns)]


# Without the library


def test_a_task_in_an_experiment_comes_with_its_scorer_and_its_turns() -> None:
    data = {
        "name": "x", "model": "embedded", "train": {"source": "world:facts/train"}, "reward": "exact-match",
        "algorithms": {"sft": {}},
        "benchmarks": {"a": "inspect:t.py@a?n=2", "b": {"source": "inspect:t.py@b", "chat": False, "reward": "format"}},
    }  # fmt: skip
    found = validated(Experiment, data, "x").benchmarks
    assert (found["a"].source, found["a"].chat, found["a"].reward) == (
        "inspect:t.py@a?n=2",
        True,
        {"name": "inspect-task"},
    )
    assert (found["b"].chat, found["b"].reward) == (False, "format")
    again = Benchmark.model_validate({**found["a"].model_dump(), "reward": None})
    assert again == found["a"], "as with --test-data, which gives the other settings of a benchmark"


def test_without_the_package_an_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    with pytest.raises(UserError, match=r"^inspect task 'a\.py@b': .*: pip install rlzoo\[inspect\]$"):
        load_problems(ProblemSource(source="inspect:a.py@b"))


def test_results_are_not_those_of_a_changed_file_of_tasks(tmp_path: Path) -> None:
    (file := tmp_path / "t.py").write_text("old")
    settings = {"benchmarks": {"a": {"source": f"inspect:{file}@a?n=2"}}}
    for _ in range(2):
        with run_in(tmp_path / "out", "compare", settings) as run:
            finished = run.finished
    file.write_text("changed")
    with (
        pytest.raises(UserError, match=r"another run, finished .*t\.py"),
        run_in(tmp_path / "out", "compare", settings),
    ):
        pass
    assert finished


# With it


@pytest.mark.usefixtures("library")
def test_prompts_are_what_the_solver_asks_and_columns_what_the_sample_has() -> None:
    first, second = load("sums?word=Add")
    assert first.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add: 1+1"}]
    assert second.columns == {
        "target": ["5", "five"], "metadata": {"a": [1]}, "input": "2+3", "task": f"{FILE}@sums?word=Add", "sample": "b",
    }  # fmt: skip
    assert [first.id, second.id] == ["1", "b"]
    (alone,) = load("plain", limit=1, chat=False, prompt="{input}=", solution="{target}")
    assert (alone.prompt, alone.solutions) == ("1+1=", ("2",))
    (turns,) = load("told")
    assert [turn["content"] for turn in turns.prompt if isinstance(turn, dict)] == ["S", "First.", "1+1"]
    assert load("plain", limit=1, chat=False)[0].prompt == "1+1"
    assert load("plain?count=1")[0].prompt == [{"role": "user", "content": "1+1"}]
    assert load("beside")[0].columns["target"] == "8", "paths are relative to the file of tasks"
    assert len(load("shuffled?seed=1")) == 30


@pytest.mark.usefixtures("library")
def test_completions_have_the_scores_that_inspect_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSPECT_DISABLE_MODEL_API", "mine")
    assert scored("sums", ["It is 2", "It is 3", ""]) == [1.0, 0.0, 0.0]
    assert scored("sums", ["five", "5", "2"], problem=1) == [1.0, 1.0, 0.0]
    assert scored("choices", ["ANSWER: B", "ANSWER: A", "B"]) == [1.0, 0.0, 0.0]
    assert scored("stops", ["2\nor 3", "3\n2"]) == [1.0, 0.0]
    assert scored("several", ["12", "3"], score="measured.length") == [2.0, 1.0]
    assert scored("several", ["12"], score="measured.right") == [0.5]
    assert scored("several", ["12", "3"], score="match") == [1.0, 0.0]
    assert scored("unscored", ["2"]) == [None]
    assert os.environ["INSPECT_DISABLE_MODEL_API"] == "mine", "as it was before"


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("task", ["sums", "choices", "several"])
def test_inspect_itself_sends_the_same_prompts_and_gives_the_same_scores(
    task: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import tiktoken
    from inspect_ai import eval
    from inspect_ai.model import ModelOutput, get_model
    from inspect_ai.scorer import value_to_float

    class Bytes:
        """Counts tokens, for which tiktoken would need a network."""

        def encode(self, text: str, **_: Any) -> list[int]:
            return list(text.encode())

    monkeypatch.setattr(tiktoken, "get_encoding", lambda *_: Bytes())
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda *_: Bytes())
    monkeypatch.chdir(FILE.parent)
    texts = ["It is 2. ANSWER: B", "3"]
    model = get_model("mockllm/model", custom_outputs=[ModelOutput.from_content("mockllm/model", x) for x in texts])
    spec = f"{FILE.name}@{task}"
    (log,) = eval(spec, model=model, log_dir=str(tmp_path), display="none", max_samples=1, max_connections=1)
    assert log.status == "success" and log.samples
    for place, (sample, text) in enumerate(zip(log.samples, texts, strict=False)):
        asked = [{"role": turn.role, "content": turn.text} for turn in sample.messages[:-1]]
        assert asked == load(task)[place].prompt and sample.messages[-1].text == text
        for name, score in sample.scores.items():
            values = score.value if isinstance(score.value, dict) else {"": score.value}
            for key, value in values.items():
                which = f"{name}.{key}".rstrip(".")
                assert scored(task, [text], place, score=which) == [value_to_float()(value)]


class Canned(Sampler):
    """Two samples per prompt, a right one and a wrong one."""

    def sample(
        self, prompts: Any, settings: Any, seed: int, greedy: bool = False, progress: Any = None, numbers: Any = None
    ) -> Any:
        texts = ["It is 2"] if greedy else ["2", "3"]
        return [[Sample([5], text, truncated=False) for text in texts] for _ in prompts]


@pytest.mark.usefixtures("library")
def test_outcomes_and_metrics_are_those_of_any_benchmark() -> None:
    policy, problems = load_policy("embedded"), load("plain", chat=False)
    found = evaluate(policy, problems, "inspect-task", EvaluationSettings(samples=2), sampler=Canned())
    assert [(row["problem_id"], row["reward"]) for row in found.outcomes[:4]] == [
        ("1", 1.0), ("1", 0.0), ("b", 0.0), ("b", 0.0),
    ]  # fmt: skip
    assert found.metrics["avg_at_k"] == 0.25 and found.metrics["greedy"] == 0.5
    assert found.outcomes[0]["logged"] == '{"answer": "2"}'


ASKS_ONE = "use a task whose solver asks the model once, in text, and whose scorer asks none$"


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("graded", rf"its scorer 'model_graded_qa' asks a model of its own: {ASKS_ONE}"),
        ("critique", rf"its solver asks a model of its own: {ASKS_ONE}"),
        ("agent", rf"its solver asks a model of its own: {ASKS_ONE}"),
        ("twice", rf"its solver calls the model more than once: {ASKS_ONE}"),
        ("silent", rf"its solver never calls generate\(\), as agents do not: {ASKS_ONE}"),
        ("tools", rf"its solver gives the model tools: {ASKS_ONE}"),
        ("pictures", rf"its prompts have image content, and only text is sampled: {ASKS_ONE}"),
        ("boxed", "needs a sandbox, and rlzoo has none: use another$"),
        ("unjudged", "has no scorer: use another$"),
        ("drawn", "its solver makes another prompt of sample '1' each time: shuffle in its data set, with a seed$"),
        ("shuffled", "its data is in another order each time: shuffle it with a seed$"),
        ("alike", "two of its samples have the same id: give each its own$"),
        ("broken", r"cannot be loaded: FileNotFoundError: no data\.json \(inspect_sums\.py line \d+\)$"),
        ("nowhere", "cannot be loaded: PrerequisiteError: Task named 'nowhere' not found.$"),
        ("plain?cuont=1", r"unknown argument of inspect task .* 'cuont': did you mean 'count'\?"),
        ("plain?count", "'count' is not an argument: write NAME=VALUE$"),
        (
            "several",
            r"has the scores measured.length, measured.right, match: say which, as in \{name: inspect-task, score:",
        ),
        ("unscored", "its scorer 'strict' failed on sample '1': scoring_failed: no log-probs$"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line(task: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        scored(task, ["x"])
    assert f"inspect task '{FILE}@{task}'" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.usefixtures("library")
def test_other_mistakes_are_told() -> None:
    with pytest.raises(UserError, match=r"inspect_sums\.py': write .*inspect_sums\.py@TASK$"):
        load_problems(ProblemSource(source=f"inspect:{FILE}"))
    with pytest.raises(UserError, match=r"'nothing/here' is not there: write file\.py@TASK, or package/TASK"):
        load_problems(ProblemSource(source="inspect:nothing/here"))
    with pytest.raises(UserError, match=r"unknown scorer of inspect task .* 'macth': did you mean 'match'"):
        scored("sums", ["2"], score="macth")
    with pytest.raises(
        UserError, match=r"reward 'inspect-task': row 1 is not of an inspect task: score it with another$"
    ):
        get_reward("inspect-task")(["q"] * 2, ["2"] * 2, task=[f"{FILE}@sums", None], sample=["1", None])
    with pytest.raises(UserError, match="has no sample '9': has it changed, or is its data shuffled anew"):
        get_reward("inspect-task")(["q"], ["2"], task=[f"{FILE}@sums"], sample=["9"])


def test_the_signatures_that_are_used(library: Any) -> None:
    from inspect_ai._eval.loader import load_tasks
    from inspect_ai._util.registry import registry_params
    from inspect_ai.model import ModelOutput
    from inspect_ai.solver import Generate, TaskState

    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(load_tasks) == ["task_specs", "task_args"] and names(registry_params) == ["o"]
    assert names(TaskState)[:7] == ["model", "sample_id", "epoch", "input", "messages", "target", "choices"]
    assert "metadata" in names(TaskState)
    assert names(Generate.__call__) == ["self", "state", "tool_calls", "kwargs"]
    assert names(ModelOutput.from_content)[:2] == ["model", "content"]
    assert {"setup", "solver", "scorer", "sandbox", "config"} <= set(names(library.Task.__init__))
