"""The experiments of the DFT paper: settings and published numbers as data, suites, and twins that run."""

from __future__ import annotations

import json
import string
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from comparisons import inline_pool
from rich.console import Console

from rlzoo.cli import main
from rlzoo.comparison import runner
from rlzoo.comparison.report.reported import MEAN, reported
from rlzoo.comparison.report.schema import read_run
from rlzoo.comparison.report.tables import seconds
from rlzoo.config import (
    BASE,
    Benchmark,
    get_suite,
    list_experiments,
    list_suites,
    load_experiment,
    validated,
)
from rlzoo.document import Paragraph, Table
from rlzoo.errors import UserError
from rlzoo.policy.chat import opened
from rlzoo.worlds.tokenizer import build_tokenizer

PAPER = sorted(name for name in list_experiments() if name.startswith("paper/"))
MODELS = {
    "paper/qwen2.5-math-1.5b": ("Qwen/Qwen2.5-Math-1.5B", 5e-5),
    "paper/qwen2.5-math-7b": ("Qwen/Qwen2.5-Math-7B", 5e-5),
    "paper/llama-3.2-3b": ("meta-llama/Llama-3.2-3B", 5e-5),
    "paper/llama-3.1-8b": ("meta-llama/Llama-3.1-8B", 2e-5),
    "paper/deepseekmath-7b": ("deepseek-ai/deepseek-math-7b-base", 5e-5),
}
FIVE = ("math500", "minerva", "olympiad", "aime24", "amc23")


# Suites


def columns_of(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


@pytest.mark.parametrize("name", sorted(list_suites()))
def test_a_suite_is_a_benchmark_of_columns_that_its_table_has(name: str) -> None:
    suite = get_suite(name)
    made = validated(Benchmark, {"suite": name}, name)
    assert made.source == suite.settings["source"] and made.reward is not None
    assert columns_of(made.prompt) | set(made.columns.values()) <= set(suite.fields)
    if name != "natural-questions":
        assert made.chat and made.system == "You are a helpful assistant."
        assert made.prompt.endswith("\nPlease reason step by step, and put your final answer within \\boxed{{}}.")


@pytest.mark.parametrize(
    ("name", "row", "prompt", "right"),
    [
        ("math500", {"problem": "1+1?", "answer": "2"}, "1+1?", "\\boxed{2}"),
        ("olympiad", {"question": "1+1?", "final_answer": ["2"]}, "1+1?", "\\boxed{2}"),
        ("gsm8k", {"question": "1+1?", "answer": "1+1 is <<1+1=2>>2\n#### 2"}, "1+1?", "The answer is 2."),
        ("svamp", {"Body": "Ann has 1.", "Question": "And one?", "Answer": "2.0"}, "Ann has 1. And one?", "\\boxed{2}"),
        ("gsm8k-format", {"question": "1+1?", "answer": "#### 2"}, "1+1?", "\\boxed{7}"),
    ],
)
def test_a_suite_prompts_and_scores(name: str, row: dict[str, Any], prompt: str, right: str, tmp_path: Path) -> None:
    from rlzoo.buffers.problems import load_problems
    from rlzoo.reward import get_reward

    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    benchmark = validated(Benchmark, {"suite": name, "source": str(tmp_path / "rows.jsonl")}, name)
    (problem,) = load_problems(benchmark)
    instruction = "Please reason step by step, and put your final answer within \\boxed{}."
    assert problem.prompt == [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": f"{prompt}\n{instruction}"},
    ]
    columns = {key: [value] for key, value in problem.columns.items()}
    reward = get_reward(benchmark.reward)
    assert [one.value for one in reward.score(["q"], [right], columns)] == [1.0]
    assert [one.value for one in reward.score(["q"], ["I give up."], columns)] == [0.0]


@pytest.mark.parametrize(
    "given", ["math500", ["math500", "aime24"], {"math500": "math500", "own": {"suite": "aime24"}}]
)
def test_suites_are_named_alone_in_a_list_or_with_changes(given: Any) -> None:
    made = load_experiment("facts", {"benchmarks": given, "benchmarks.math500.limit": 7})
    assert made.benchmarks["math500"].limit == 7
    assert made.benchmarks["math500"].source == "HuggingFaceH4/MATH-500"
    assert len(made.benchmarks) == (1 if given == "math500" else 2)
    assert load_experiment("facts", {"benchmarks": made.model_dump()["benchmarks"]}) == made
    with pytest.raises(UserError, match=r"benchmarks\.own: unknown suite 'math50': did you mean 'math500'\?"):
        load_experiment("facts", {"benchmarks": {"own": {"suite": "math50"}}})


# The files


def test_the_five_models_have_the_papers_settings() -> None:
    for name, (model, rate) in MODELS.items():
        experiment = load_experiment(name)
        training, evaluation, train = experiment.training, experiment.evaluation, experiment.train
        assert list(experiment.algorithms) == ["sft", "dft", "iw-sft"] and experiment.model == model
        assert (training.learning_rate, training.betas, training.weight_decay) == (rate, (0.9, 0.95), 0.01)
        assert (training.batch_size, training.max_length, training.epochs) == (256, 2048, 1)
        assert (training.warmup_ratio, training.max_gradient_norm, training.dtype) == (0.1, 1.0, "bfloat16-mixed")
        assert (evaluation.samples, evaluation.temperature, evaluation.top_p) == (16, 1.0, 1.0)
        assert evaluation.max_new_tokens == 4096 and tuple(experiment.benchmarks) == FIVE
        assert (train.source, train.limit, train.subset_seed) == ("AI-MO/NuminaMath-CoT", 100_000, 0)
        assert training.in_steps(100_000 / training.batch_size).steps == 391


def test_the_other_experiments_have_the_papers_settings() -> None:
    offline = load_experiment("paper/offline-rl")
    assert (offline.rollouts.samples, offline.rollouts.temperature) == (4, 1.0)
    assert list(offline.algorithms) == ["rft", "dft", "iw-sft", "dpo", "ppo", "grpo"]
    assert {name for name, row in offline.algorithms.items() if row.mode == "online"} == {"ppo", "grpo"}
    dpo, grpo = offline.training_of("dpo"), offline.training_of("grpo")
    assert (dpo.learning_rate, dpo.batch_size, dpo.warmup_ratio) == (1e-6, 2 * 128, 0.05)
    assert (grpo.learning_rate, grpo.batch_size, grpo.warmup_ratio) == (1e-6, 4 * 256, 0.1)
    lora = load_experiment("paper/lora").training.lora
    assert lora is not None and (lora.rank, lora.alpha) == (8, 16)
    weights = load_experiment("paper/weights").algorithms
    assert [row.options.get("variant", "token") for name, row in weights.items() if name.startswith("dft")] == [
        "token", "sentence", "geometric_mean",
    ]  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_reported_numbers_are_of_rows_and_benchmarks_of_the_experiment(name: str) -> None:
    experiment = load_experiment(name)
    if (found := experiment.reported) is None:
        assert name in ("paper/batch-size", "paper/learning-rate", "paper/token-probabilities"), "figures, not tables"
        return
    assert set(found.results) <= {BASE, *experiment.algorithms}
    for row in found.results.values():
        assert set(row) <= {*experiment.benchmarks, MEAN}
        assert all(0 <= value <= 100 for value in row.values())
        if MEAN in row and len(row) > 1:  # the paper's means are those of its columns
            assert fmean(row[one] for one in FIVE) == pytest.approx(row[MEAN], abs=0.011), row


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        (
            "paper/llama-3.2-3b",
            "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|end_of_text|>\n"
            "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|end_of_text|>\n"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("paper/deepseekmath-7b", "Be brief.\n\nUser: 1+1?\n\nAssistant:"),
    ],
)
def test_models_without_a_chat_template_are_asked_as_in_the_released_script(name: str, prompt: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = load_experiment(name).training.chat_template
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    assert opened(tokenizer, turns, {}) == prompt


# Twins


def same_twins() -> list[str]:
    """One experiment of each kind of twin."""
    twins = dict[str, str]()
    for name in PAPER:
        made = load_experiment(name, twin=True).model_dump(mode="json", exclude={"name", "description", "reported"})
        twins.setdefault(json.dumps(made), name)
    return list(twins.values())


SMALLEST = {
    "train.limit": 8,
    "training.batch_size": 8,
    "rollouts.prompts": 4,
    "rollouts.max_new_tokens": 24,
    "evaluation.samples": 1,
    "evaluation.max_new_tokens": 12,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", same_twins())
def test_a_twin_runs_and_its_report_shows_what_the_paper_reported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "pool", inline_pool)
    monkeypatch.setattr(runner, "write_report", lambda *_: None)  # its plots take longer than the training
    plain = load_experiment(name, twin=True)
    changes = {**SMALLEST, "scoring": {"seconds": None, "memory_gb": None}}
    changes |= {f"benchmarks.{one}.limit": 2 for one in plain.benchmarks}
    for row in plain.algorithms:
        changes |= {f"algorithms.{row}.training.steps": 1, f"algorithms.{row}.training.batch_size": 8}
    experiment = load_experiment(name, changes, twin=True)
    results = runner.compare(experiment, tmp_path / "out", console=Console(quiet=True))
    assert results["failed"] == [] and len(results["cells"]) == len(experiment.algorithms)
    assert results["experiment"] == f"{name}-twin"
    section = list(reported(read_run(tmp_path / "out"), ""))
    assert bool(section) == (experiment.reported is not None)
    if experiment.reported is not None:
        _, paragraph, warning, table = section[:4]
        assert isinstance(paragraph, Paragraph) and experiment.reported.source in paragraph.text
        assert isinstance(warning, Paragraph) and "not the numbers" in warning.text
        assert isinstance(table, Table) and [row[0].text for row in table.rows] == [
            *experiment.reported.results, *(set(experiment.algorithms) - set(experiment.reported.results)),
        ]  # fmt: skip


def test_an_experiment_without_a_twin_says_so() -> None:
    with pytest.raises(UserError, match="experiment 'facts' has no small twin"):
        load_experiment("facts", twin=True)


def test_a_twin_learns_for_as_many_epochs_as_it_says() -> None:
    """600 problems with three solutions each, 64 rows per batch."""
    assert load_experiment("paper/weights", twin=True).training.in_steps(3 * 600 / 64).steps == 29


@pytest.mark.parametrize("command", ["compare", "plan", "variance"])
def test_the_command_line_runs_a_twin(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stop(*given: Any, **_: Any) -> None:
        seen.append(given[0])
        raise UserError("far enough")

    monkeypatch.setattr("rlzoo.comparison.runner.compare", stop)
    monkeypatch.setattr("rlzoo.comparison.dry_run.unchecked", stop)
    monkeypatch.setattr("rlzoo.variance.run.run_variance", stop)
    assert main([command, "paper/lora", "--twin", "--set", "seeds=[7]"]) == 2
    assert seen == [load_experiment("paper/lora", {"seeds": [7]}, twin=True)]


# Dry runs


FAST = ("arithmetic", "facts", "paper/lora")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in sorted(list_experiments())]
)
def test_every_experiment_resolves_without_weights_or_a_connection(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run loads no weights")

    monkeypatch.setattr("rlzoo.policy.loading._weights", refused)
    experiment = load_experiment(name)
    if any(not Path(one.source).exists() for one in [experiment.train] if one.source.endswith(".jsonl")):
        pytest.skip("its data is made by a script")
    assert main(["compare", name, "--dry-run"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert all(f" {row} " in told for row in experiment.algorithms)
    assert "costs per cell" in told and "Nothing was trained, sampled or written." in told
    if name.startswith("paper/"):
        assert f"Not on this machine, and so not checked: the model {experiment.model}, the data set" in told
        assert all(f"benchmarks.{one} " in told for one in experiment.benchmarks)
    elif experiment.model == "embedded":
        assert "not checked" not in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("algorithms.sft.objective=sfft", "unknown objective 'sfft': did you mean 'sft'?"),
        ("algorithms.sft.options={beta: 2}", "unknown option of objective 'sft' 'beta'"),
        ("algorithms.sft.learns_from=corect", "algorithms.sft: unknown view 'corect': did you mean 'correct'?"),
        ("benchmarks.math500.reward=math-anwser", "unknown reward 'math-anwser'"),
        (
            "benchmarks.math500.prompt='{problme}'",
            "unknown column of HuggingFaceH4/MATH-500 in benchmarks.math500 'problme'",
        ),
        ("benchmarks.math500.columns={answer: solutoin}", "did you mean 'solution'?"),
        ("train.prompt='{problem'", "train: template '{problem': "),
        ("training.learning_rate=0", "training.learning_rate = 0: "),
        ("train.source=missing.jsonl", "missing.jsonl does not exist"),
        ("model=./missing", "model './missing' cannot be loaded: that folder does not exist"),
        ("evaluation.engine=vlm", "unknown sampler 'vlm'"),
        ("benchmarks.own={suite: math5000}", "unknown suite 'math5000': did you mean 'math500'?"),
    ],
)
def test_a_dry_run_names_what_is_wrong(change: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "paper/qwen2.5-math-1.5b", "--dry-run", "--set", change]) == 2
    said = capsys.readouterr().err.strip()
    assert told in said and "\n" not in said


@pytest.mark.slow
def test_a_dry_run_shows_the_stages_of_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = "algorithms={sft: {}, grpo: {mode: online}, both: {stages: [sft, grpo]}}"
    assert main(["compare", "arithmetic", "--dry-run", "--set", rows]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(" both ") and "→" in line)
    assert "sft → grpo" in row and "demonstrations → groups" in row


@pytest.mark.slow
def test_a_dry_run_renders_prompts_that_are_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded tokenizer has no chat template."""
    changes = ["--set", "model=embedded", "--set", "train={source: 'world:arithmetic/train', chat: true}"]
    changes += ["--set", "reward=exact-match"]
    assert main(["compare", "paper/qwen2.5-math-1.5b", "--dry-run", *changes]) == 2
    assert "the tokenizer has no chat template" in capsys.readouterr().err
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + ' ' }}{% endfor %}"
    changes += ["--set", f"training.chat_template={json.dumps(template)}"]
    assert main(["compare", "paper/qwen2.5-math-1.5b", "--dry-run", *changes]) == 0
    told = capsys.readouterr().out
    assert "the data set HuggingFaceH4/MATH-500" in told and "the model" not in told.partition("not checked")[2]


@pytest.mark.slow
def test_a_plan_without_a_connection_says_what_it_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "paper/qwen2.5-math-1.5b", "--gpu", "h100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == pytest.approx(1.54e9, rel=0.01) and found["cells"] == 9
    assert {row["steps"] for row in found["rows"]} == {391}
    assert found["rows"][0]["gradient_tokens"] == pytest.approx(391 * 256 * (150 + 400))
    tests = (500 + 272 + 674 + 30 + 40) * (16 + 1) * 400
    assert found["rows"][0]["evaluated_tokens"] == pytest.approx(tests)
    assert main(["plan", "paper/qwen2.5-math-1.5b", "--gpu", "h100"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "150 tokens per prompt and 400 per solution, because the data or the model's tokenizer is not" in told
    assert "not on this machine, and so not checked: the data set AI-MO/NuminaMath-CoT" in told
    assert main(["plan", "paper/qwen2.5-math-1.5b"]) == 2
    assert "--gpu NAME estimates the time without" in capsys.readouterr().err


# The documentation

DOCS = Path(__file__).parents[1] / "docs"


def test_the_documented_suites_are_those_that_there_are() -> None:
    text = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    table = text.partition("| suite |")[2].partition("\n\n")[0].splitlines()[2:]
    assert table == [
        f"| `{name}` | {one.problems:,} | `{one.settings['source']}`, {one.settings['split']} | {one.licence} |"
        for name, one in list_suites().items()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper/qwen2.5-math-1.5b", "paper/offline-rl"])
def test_the_documented_costs_are_those_of_the_plan(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"rlzoo plan {name} --gpu h100 --seeds 0"
    assert main([*command.split()[1:], "--json"]) == 0
    took = seconds(json.loads(capsys.readouterr().out)["seconds"])
    text = " ".join((DOCS / "paper.md").read_text(encoding="utf-8").split())
    assert text.partition(f"`{command}`")[2].removeprefix(" estimates").strip().startswith(took), took


def test_the_documented_experiment_extends_another(tmp_path: Path) -> None:
    blocks = (DOCS / "paper.md").read_text(encoding="utf-8").split("```yaml\n")[1:]
    (tmp_path / "mine.yaml").write_text(blocks[1].partition("```")[0] + blocks[0].partition("```")[0])
    mine, plain = load_experiment(str(tmp_path / "mine.yaml")), load_experiment("paper/qwen2.5-math-1.5b")
    assert (mine.name, mine.model, mine.training.learning_rate) == ("mine", plain.model, 2.5e-5)
    assert list(mine.algorithms) == ["sft", "dft"] and mine.training.epochs == 1
    assert mine.reported is not None and mine.reported.results == {"base": {"mean": 15.92}, "sft": {"mean": 16.87}}
    twin = load_experiment(str(tmp_path / "mine.yaml"), twin=True)
    assert (twin.model, twin.training.learning_rate, twin.training.batch_size) == ("embedded", 1e-4, 64)
