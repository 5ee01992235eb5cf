"""What nobody thought of is a file of its own: plug-ins outside the package, which need no change to it.

Each objective passes the contract, trains, resumes bit for bit after kill -9, and has its gradients' noise measured.
A sampler is sampled from online, and its run resumes as well.
"""

from __future__ import annotations

import itertools
import math
import re
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from comparisons import forked, inline_pool, small

from rlzoo.buffers import OfflineBuffer
from rlzoo.buffers.problems import Problem, encode_problems, load_problems
from rlzoo.cli import main
from rlzoo.cli.catalogue import catalogue
from rlzoo.comparison import one_cell, resolve, runner
from rlzoo.comparison.outcomes import OVERALL
from rlzoo.config import ProblemSource, Sampling, Training
from rlzoo.errors import UserError
from rlzoo.evaluation import evaluation
from rlzoo.jobs.cached_results import CachedResults
from rlzoo.objective import get_objective
from rlzoo.policy import Policy, load_policy, log_probs
from rlzoo.policy.loading import save_policy
from rlzoo.rollout import Collector, TransformersSampler, collect_rollouts, register_sampler, sampler_of
from rlzoo.testing import check_objective
from rlzoo.training import Trainer, TrainingRecord, train
from rlzoo.types import Selector, TokenBatch, Trajectory, Unit, register_view, selector_of
from rlzoo.variance import VarianceProbe, analyze_variance

pytestmark = pytest.mark.usefixtures("sketched")

PLUGINS = Path(__file__).parent / "plugins"
OBJECTIVES = {
    "distillation": "OnPolicyDistillation",
    "token_rewards": "TokenRewards",
    "own_head": "WithHead",
    "whole_only": "WholeOnly",
    "rarely_solved": "Hard",
    "annealed": "Annealed",
    "weighted_entropy": "WeightedEntropy",
    "near_the_start": "NearTheStart",
}
SAMPLERS = {"replaying": "Replaying"}
SETTINGS = Training(steps=4, batch_size=4, learning_rate=1e-3, checkpoint_seconds=0.0)
KILLED_AT = 2
over_objectives = pytest.mark.parametrize("plugin", OBJECTIVES)


def spec(plugin: str) -> str:
    return f"{PLUGINS / plugin}.py:{(OBJECTIVES | SAMPLERS)[plugin]}"


def options(plugin: str, teacher: Path) -> dict[str, Any]:
    return {"teacher": str(teacher)} if plugin == "distillation" else {}


def buffer_of(policy: Policy) -> OfflineBuffer:
    """Demonstrations and samples, some of which are truncated, with a number for each token in a column."""
    rows = []
    for i in range(8):
        text = f"{i + 1}+{i + 2}=?\n", f"{i + 1}+{i + 2}={2 * i + 3} #### {2 * i + 3}"
        prompt, completion = (policy.tokenizer(part, add_special_tokens=False)["input_ids"] for part in text)
        (logp,) = log_probs(policy, [(prompt, completion)])
        columns: dict[str, object] = {"token_reward": [0.1 * (t % 3) for t in range(len(completion))]}
        row = Trajectory(*text, prompt, completion, str(i), source="policy", reward=1.0, columns=columns)
        rows += [replace(row, behaviour_logp=logp, truncated=i % 3 == 0), replace(row, source="demonstration")]
    return OfflineBuffer.from_trajectories(rows)


def fresh(policy: Policy, plugin: str) -> Collector:
    """Groups that a plug-in samples of the policy in training, of few prompts, so that each comes again."""
    problems = load_problems(ProblemSource(source="world:arithmetic/train", limit=3))
    settings = Sampling(samples=4, max_new_tokens=6, engine=spec(plugin), engine_options={"after": 1})
    return Collector(policy, sampler_of(policy, settings), problems, length, settings, SETTINGS)


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def run(plugin: str, folder: Path, checkpoints: Path | None, kill: bool = False) -> tuple[Policy, TrainingRecord]:
    """Train the embedded model with a plug-in; if asked to, die in the middle."""
    policy = load_policy("embedded")

    def die(trainer: Trainer, step: int) -> None:
        if kill and step == KILLED_AT + 1:
            signal.raise_signal(signal.SIGKILL)

    online = plugin in SAMPLERS
    objective = get_objective("grpo" if online else spec(plugin), **options(plugin, folder / "teacher"))
    source = fresh(policy, plugin) if online else buffer_of(policy)
    record = train(policy, objective, source, SETTINGS, callbacks=[die], checkpoints=checkpoints)
    return policy, record


def teacher_in(folder: Path) -> None:
    teacher = load_policy("embedded")
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.9)
    save_policy(teacher, folder / "teacher")


@pytest.mark.slow
@pytest.mark.parametrize("plugin", [*OBJECTIVES, *SAMPLERS])
def test_a_plugin_resumes_bit_for_bit_after_kill_9(plugin: str, tmp_path: Path) -> None:
    teacher_in(tmp_path)
    died = forked(lambda: run(plugin, tmp_path, tmp_path / "checkpoints", kill=True))
    assert died.status == -signal.SIGKILL, died.errors
    assert list((tmp_path / "checkpoints").glob(f"step-*{KILLED_AT}.result")), "it was stopped after a checkpoint"
    whole, record = run(plugin, tmp_path, None)
    resumed, rest = run(plugin, tmp_path, tmp_path / "checkpoints")
    assert rest.plain_steps() == record.plain_steps() and len(record.steps) == SETTINGS.steps
    assert record.steps[0]["gradient_norm"] > 0
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
@over_objectives
def test_a_plugin_works_in_the_analyzer(plugin: str, tmp_path: Path) -> None:
    teacher_in(tmp_path)
    policy = load_policy("embedded")
    objective = get_objective(spec(plugin), **options(plugin, tmp_path / "teacher"))
    found = analyze_variance(policy, {"it": objective, "sft": get_objective("sft")}, buffer_of(policy), draws=0)
    noise = found["objectives"]["it"]["data_noise"]
    assert noise["trace_cov"]["value"] > 0 and not found["skipped"]
    assert not policy.attached, "the analyzer leaves the policy as it was"


def loss_of_token_rewards(batch: TokenBatch) -> torch.Tensor:
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for logp, reward, mask in zip(batch.logp, batch["token_reward"], batch.mask, strict=True):
        rewards = reward[mask]
        for t, one in enumerate(logp[mask]):
            total = total - rewards[t:].sum() * one
            tokens += 1
    return total / tokens


def over_tokens(values: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    return -values.sum() / batch.mask.sum().clamp(min=1)


LOSSES: Mapping[str, Any] = {
    "distillation": lambda b: over_tokens((b["teacher_logp"] - b.logp)[b.mask].detach() * b.logp[b.mask], b),
    "token_rewards": loss_of_token_rewards,
    "own_head": None,
    "whole_only": lambda b: over_tokens(b.logp[b.mask & ~b["truncated"][:, None]], b),
    "rarely_solved": lambda b: over_tokens(b.logp[b.mask], b),
    "annealed": lambda b: over_tokens((b["progress"] * b.logp[b.mask]).detach().exp() * b.logp[b.mask], b),
    "weighted_entropy": None,
    "near_the_start": lambda b: (
        over_tokens(b.logp[b.mask], b)
        + 0.5 * (b["states"][b.mask] - b["first_states"][b.mask].detach()).square().sum() / b.mask.sum()
    ),
}


def weighted_entropy(batch: TokenBatch, logits: torch.Tensor, _: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    losses = []
    for row, t in batch.mask.nonzero().tolist():
        p = logits[row, t].softmax(0)
        losses.append(-p[target[row, t]].log() - batch["token_reward"][row, t] * -(p * p.log()).sum())
    return torch.stack(losses).mean()


@pytest.mark.slow
@over_objectives
def test_a_plugin_passes_the_contract(plugin: str, tmp_path: Path) -> None:
    teacher_in(tmp_path)
    objective = get_objective(spec(plugin), **options(plugin, tmp_path / "teacher"))
    in_logits = weighted_entropy if objective.has_logit_term else None
    check_objective(objective, LOSSES[plugin], loss_in_logits=in_logits)


def test_a_head_of_ones_own_learns(tmp_path: Path) -> None:
    policy, _ = run("own_head", tmp_path, None)
    assert policy.get_parameter("modules_of_inputs.confidence.weight").grad is not None
    assert not policy.frozen_copy().attached


def test_an_option_may_change_in_training(tmp_path: Path) -> None:
    """Four steps in two batches of two updates, and what a probe measures after each."""
    policy, objective = load_policy("embedded"), get_objective(spec("annealed"))
    buffer, probe = buffer_of(policy), VarianceProbe(buffer_of(policy), every=1, rows=2)
    settings = SETTINGS.model_copy(update={"updates_per_batch": 2})
    record = train(policy, objective, buffer, settings, callbacks=[probe])
    assert [step["exponent"] for step in record.steps] == [0, 0.25, 0.5, 0.75]
    assert record.steps[0]["coefficient"] == 1 > record.steps[1]["coefficient"]
    measured = [record["mean"] for record in probe.records]
    whole = analyze_variance(policy, [objective], buffer, rows=2, draws=0, trained=1.0)["objectives"]["annealed"]
    assert measured[-1] == whole["coefficients"]["mean"] and measured[0] > measured[-1]


def test_a_sampler_of_ones_own_in_a_rollout(tmp_path: Path) -> None:
    tell = ["rollout", "arithmetic", "--limit", "2", "--rollout-samples", "2", "--set", "rollouts.max_new_tokens=6"]
    assert main([*tell, "--set", f"rollouts.engine={spec('replaying')}", "--out", str(tmp_path / "buffer")]) == 0
    rows = list(OfflineBuffer.load(tmp_path / "buffer"))
    assert len(rows) == 4 and all(row.behaviour_logp for row in rows)


def test_a_rollout_that_was_stopped_goes_on_with_what_its_sampler_knew(tmp_path: Path) -> None:
    policy = load_policy("embedded")
    settings = Sampling(samples=4, batch_size=4, max_new_tokens=6, engine=spec("replaying"), temperature=2.0)
    problems = encode_problems(policy.tokenizer, [Problem(str(i), "1+2=?\n", {}) for i in range(3)])

    def collect(folder: str, reaches: int = 3) -> list[Trajectory]:
        sampler, calls = sampler_of(policy, settings), itertools.count(1)
        sample = sampler.sample

        def or_die(*arguments: Any, **options: Any) -> Any:
            if next(calls) > reaches:
                raise KeyboardInterrupt
            return sample(*arguments, **options)

        sampler.sample = or_die  # type: ignore[method-assign]
        return collect_rollouts(policy, sampler, problems, length, settings, 0, cached=CachedResults(tmp_path / folder))

    whole = collect("whole")
    assert len({row.completion for row in whole}) == 10, "two are replayed, and no others are equal by chance"
    assert whole[4].completion == whole[3].completion, "what the second prompt got first is the first's last"
    with pytest.raises(KeyboardInterrupt):
        collect("stopped", reaches=1)
    assert collect("stopped", reaches=2) == whole


def test_views_by_name_or_as_an_object() -> None:
    named = get_objective(spec("rarely_solved"))
    policy = load_policy("embedded")
    buffer = buffer_of(policy)
    for which in ("rarely-solved", f"{PLUGINS / 'rarely_solved.py'}:RarelySolved", selector_of(named.learns_from)):
        view = buffer.view(which, below=1.5)
        assert view.units == tuple((i,) for i in range(16)) and view.weights == (0.5,) * 16
    with pytest.raises(UserError, match=r"unknown option of the view 'rarely-solved' 'belwo'.*did you mean 'below'\?"):
        buffer.view("rarely-solved", belwo=1.0)
    with pytest.raises(UserError, match=r"the view 'rarely-solved' selects none of the buffer's 16 rows"):
        buffer.view("rarely-solved", minimum=2.0)
    with pytest.raises(UserError, match=r"unknown view 'groupz'.*did you mean 'groups'\?"):
        buffer.view("groupz")
    with pytest.raises(UserError, match=r"learns_from: 3 is not a view"):
        buffer.view(3)  # type: ignore[arg-type]
    twice = type("Other", (Selector,), {"name": "groups", "__module__": "mine"})
    with pytest.raises(UserError, match="view 'groups' is registered twice"):
        register_view(twice)
    assert {"demonstrations", "correct", "pairs", "groups", "unpaired"} <= {row["name"] for row in catalogue()["views"]}


def test_a_view_may_be_an_instance_with_options_of_its_own(tmp_path: Path) -> None:
    """As a dataclass, like an input: an experiment names the instance in its file."""
    buffer, file = buffer_of(load_policy("embedded")), tmp_path / "views.py"
    lengths = [len(row.completion_ids) for row in buffer]
    file.write_text(
        "from dataclasses import dataclass\n"
        "from rlzoo import Selector\n"
        "@dataclass(frozen=True)\n"
        "class Short(Selector):\n"
        "    name = 'short'\n"
        "    tokens: int = 100\n"
        "    is_imitated = True\n"
        "    def units(self, rows):\n"
        "        lengths = [len(ids) for ids in rows['completion_ids'].to_pylist()]\n"
        "        return tuple((row,) for row, length in enumerate(lengths) if length <= self.tokens)\n"
        f"VERY_SHORT = Short(tokens={min(lengths)})\n"
    )
    short = tuple((row,) for row, length in enumerate(lengths) if length == min(lengths))
    assert 0 < len(short) < len(buffer) == len(buffer.view(f"{file}:Short"))
    assert buffer.view(f"{file}:VERY_SHORT").units == buffer.view(selector_of(f"{file}:VERY_SHORT")).units == short
    ((which, options),) = resolve.views_of(small({"sft": {"learns_from": f"{file}:VERY_SHORT"}}), "sft")
    assert buffer.view(which, **options).units == short


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_row_of_a_comparison_learns_from_a_view_of_a_plugin(tmp_path: Path) -> None:
    view = f"{PLUGINS / 'rarely_solved.py'}:RarelySolved"
    rows = {"sft-hard": {"objective": "sft", "learns_from": view}, "hard": {"objective": spec("rarely_solved")}}
    evaluation = {"samples": 1, "max_new_tokens": 4, "curve_points": 0}
    found = runner.compare(small(rows, evaluation=evaluation, seeds=[1]), tmp_path / "out", 1)
    own, hard = found["cells"]
    assert own["costs"]["sampled_tokens"] == found["buffer"]["sampled_tokens"] > 0, "its rows are samples"
    assert [step["loss"] for step in own["training"]] == [step["loss"] for step in hard["training"]]


ROW, PAIR, GROUP = Unit.ROW, Unit.PAIR, Unit.GROUP


@pytest.mark.parametrize(
    ("kind", "units", "weights", "told"),
    [
        (ROW, lambda rows: ((len(rows),),), None, "selects row 16 of a buffer with rows 0 to 15"),
        (ROW, lambda rows: ((-1,),), None, "selects row -1 of"),
        (ROW, lambda rows: (), None, "selects none of the buffer's 16 rows"),
        (ROW, lambda rows: None, None, "gave no units, tuples of row indices: TypeError"),
        (ROW, lambda rows: (0, 1), None, "gave no units, tuples of row indices: TypeError"),
        (ROW, lambda rows: rows["nothing"], None, "gave no units, tuples of row indices: KeyError"),
        (ROW, lambda rows: ((True,), (False,)), None, "holds True, which is not a row index"),
        (ROW, lambda rows: ((0.0,),), None, "holds 0.0, which is not a row index"),
        (ROW, lambda rows: ((0, 1),), None, r"has the unit \(0, 1\), of 2 rows: it must be one row"),
        (ROW, lambda rows: ((0,), ()), None, r"has the unit \(\), of 0 rows: it must be one row"),
        (PAIR, lambda rows: ((0, 1), (2,)), None, r"has the unit \(2,\), of 1 rows: a pair is"),
        (PAIR, lambda rows: ((0, 1), (2, 2)), None, r"has the unit \(2, 2\), a row twice: a pair is"),
        (PAIR, lambda rows: ((0, 1), (2, 4)), None, r"has the unit \(2, 4\), of several prompts: a pair is"),
        (GROUP, lambda rows: ((0, 1), ()), None, r"has the unit \(\), of 0 rows: a group is"),
        (GROUP, lambda rows: ((0, 1, 0),), None, r"has the unit \(0, 1, 0\), a row twice: a group is"),
        (GROUP, lambda rows: ((0,), (1, 2)), None, r"has the unit \(1, 2\), of several prompts: a group is"),
        (ROW, lambda rows: ((0,), (1,)), lambda: (1.0,), "has 1 weights for 2 units: give one per unit"),
        (ROW, lambda rows: ((0,), (1,)), lambda: (1.0, math.nan), r"gives the unit \(1,\) the weight nan: it must be"),
        (ROW, lambda rows: ((0,), (1,)), lambda: (-1.0, 1.0), r"gives the unit \(0,\) the weight -1.0: it must be"),
        (ROW, lambda rows: ((0,), (1,)), lambda: (0.0, 0.0), "gives all 2 units the weight 0"),
        (ROW, lambda rows: ((0,), (1,)), lambda: 1.0, "gave no weights, a number per unit: TypeError"),
    ],
)
def test_what_a_view_of_ones_own_takes_is_checked(kind: Unit, units: Any, weights: Any, told: str) -> None:
    class Mine(Selector):
        name = "mine"
        unit = kind

        def units(self, rows: Any) -> Any:
            return units(rows)

        def weights(self, rows: Any, units: Any) -> Any:
            return None if weights is None else weights()

    with pytest.raises(UserError, match=f"^the view 'mine' {told}"):
        buffer_of(load_policy("embedded")).view(Mine())


def test_a_view_may_give_numpys_numbers() -> None:
    class Mine(Selector):
        name = "mine"
        unit = Unit.PAIR

        def units(self, rows: Any) -> Any:
            return np.arange(4).reshape(2, 2)

        def weights(self, rows: Any, units: Any) -> Any:
            return np.array([1.0, 3.0])

    view = buffer_of(load_policy("embedded")).view(Mine())
    assert repr(view.units) == "((0, 1), (2, 3))" and view.weights == (1.0, 3.0)


def test_samplers_by_name(tmp_path: Path) -> None:
    policy = load_policy("embedded")
    with pytest.raises(UserError, match=r"unknown sampler 'transformer'.*did you mean 'transformers'\?"):
        sampler_of(policy, Sampling(engine="transformer"))
    with pytest.raises(UserError, match=r"cannot take these engine_options: .*'before'"):
        sampler_of(policy, Sampling(engine=spec("replaying"), engine_options={"before": 1}))
    with pytest.raises(UserError, match=r"is not a subclass of rlzoo\.rollout\.Sampler"):
        sampler_of(policy, Sampling(engine=spec("own_head")))
    twice = type("Other", (TransformersSampler,), {"name": "transformers", "__module__": "mine"})
    with pytest.raises(UserError, match="sampler 'transformers' is registered twice"):
        register_sampler(twice)
    assert {"transformers", "vllm"} <= {row["name"] for row in catalogue()["samplers"]}


def documented(word: str) -> dict[str, Any]:
    """The names that the one example of docs/interface.md and docs/training.md with this word leaves."""
    docs = Path(__file__).parent.parent / "docs"
    text = "".join((docs / page).read_text(encoding="utf-8") for page in ("interface.md", "training.md"))
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if word in block)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_the_view_of_the_documentation() -> None:
    buffer, short = buffer_of(load_policy("embedded")), documented("register_view")["Short"]
    tokens = min(len(row.completion_ids) for row in buffer)
    assert 0 < len(buffer.view(short(), tokens=tokens)) < len(buffer) == len(buffer.view(short()))


@pytest.mark.slow
def test_the_ten_lines_of_the_documentation_train_online() -> None:
    record = documented("Collector(")["record"]
    assert len(record.steps) == 2 and record.costs.sampled_tokens > 0 and record.costs.flops > 0


@pytest.mark.slow
def test_a_composite_learns_from_a_buffer_and_from_fresh_samples() -> None:
    policy = load_policy("embedded")
    mixed = get_objective("mixture", weights={"sft": 0.5, "grpo": 0.5})
    record = train(policy, mixed, [buffer_of(policy), fresh(policy, "replaying")], SETTINGS)
    assert len(record.steps) == SETTINGS.steps and record.costs.sampled_tokens > 0
    with pytest.raises(UserError, match="has 2 components and 1 sources"):
        train(policy, mixed, fresh(policy, "replaying"), SETTINGS)
    with pytest.raises(UserError, match="a PosixPath is not a source: give a buffer, a Collector"):
        train(policy, get_objective("grpo"), PLUGINS, SETTINGS)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="there are no problems to sample completions for"):
        Collector(policy, TransformersSampler(policy), [], length)


def compared_online(out: Path, kill: bool = False) -> dict[str, Any]:
    """GRPO on what a plug-in samples of the policy in training; if asked to, die between two steps."""
    between = Trainer._between_batches

    def or_die(trainer: Trainer) -> None:
        between(trainer)
        if kill and trainer.step == KILLED_AT:
            signal.raise_signal(signal.SIGKILL)

    sampling = {"samples": 4, "max_new_tokens": 6, "engine": spec("replaying"), "engine_options": {"after": 1}}
    training = {"steps": 4, "batch_size": 8, "checkpoint_seconds": 0.0, "learning_rate": 1e-3}
    evaluation = {"samples": 1, "max_new_tokens": 4, "curve_points": 0}
    rows = {"online": {"objective": "grpo", "mode": "online"}}
    experiment = small(
        rows, rollouts=sampling, training=training, evaluation=evaluation, reward=f"{__file__}:length",
        train={"source": "world:arithmetic/train", "limit": 3}, seeds=[1],
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "pool", inline_pool)
        patch.setattr(runner, "write_report", lambda *_: None)
        patch.setattr(Trainer, "_between_batches", or_die)
        return runner.compare(experiment, out, 1)


@pytest.mark.slow
def test_a_comparison_with_a_plugins_sampler_resumes_bit_for_bit_after_kill_9(tmp_path: Path) -> None:
    died = forked(lambda: compared_online(tmp_path / "out", kill=True))
    assert died.status == -signal.SIGKILL, died.errors
    assert list((tmp_path / "out").rglob(f"step-*{KILLED_AT}.result")), "it was stopped after a checkpoint"
    found, whole = compared_online(tmp_path / "out"), compared_online(tmp_path / "whole")
    (cell,), (expected,) = found["cells"], whole["cells"]
    assert cell["training"] == expected["training"] and len(cell["training"]) == 4
    assert cell["training"][0]["gradient_norm"] > 0 and cell["metrics"] == expected["metrics"]
    texts = [pq.read_table(tmp_path / name / "outcomes.parquet").to_pylist() for name in ("out", "whole")]
    assert texts[0] == texts[1]


def compared(out: Path, kill: bool = False) -> dict[str, Any]:
    """Two objectives on two benchmarks, with a metric of a plug-in; if asked to, die in the last evaluation."""
    metrics = [f"{PLUGINS / 'distinct.py'}:distinct"]
    settings = {"samples": 3, "k": [2, 3], "max_new_tokens": 8, "curve_points": 0, "metrics": metrics}
    benchmarks = {"a": {"source": "world:facts/test", "limit": 4}, "b": {"source": "world:facts/unseen", "limit": 3}}
    calls, real = list[int](), evaluation.evaluate

    def evaluate(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if kill and len(calls) == 6:
            signal.raise_signal(signal.SIGKILL)
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "pool", inline_pool)
        patch.setattr(one_cell, "evaluate", evaluate)
        return runner.compare(small({"sft": {}, "dft": {}}, evaluation=settings, benchmarks=benchmarks), out, 1)


@pytest.mark.slow
def test_a_plugins_metric_is_reported_after_kill_9(tmp_path: Path) -> None:
    died = forked(lambda: compared(tmp_path / "out", kill=True))
    assert died.status == -signal.SIGKILL, died.errors
    found, whole = compared(tmp_path / "out"), compared(tmp_path / "whole")
    assert [cell["metrics"] for cell in found["cells"]] == [cell["metrics"] for cell in whole["cells"]]
    assert found["mean_over_benchmarks"] == whole["mean_over_benchmarks"] and found["base"] == whole["base"]
    texts: dict[tuple[str, str, str], set[str]] = {}
    for row in pq.read_table(tmp_path / "out" / "outcomes.parquet").to_pylist():
        if row["decoding"] == "sample":
            texts.setdefault((row["algorithm"], row["benchmark"], row["problem_id"]), set()).add(row["text"])
    shares = {
        name: {
            benchmark: mean(len(some) / 3 for (a, b, _), some in texts.items() if (a, b) == (name, benchmark))
            for benchmark in ("a", "b")
        }
        for name in ("base", "sft", "dft")
    }
    assert {name: of["distinct"] for name, of in found["base"].items()} == pytest.approx(shares["base"])
    report = (tmp_path / "out" / "report.md").read_text()
    further = report[report.index("## Further metrics") :]
    assert further.count("distinct answers (%)") == 3
    for cell in found["cells"]:
        own = shares[cell["algorithm"]]
        assert {name: of["distinct"] for name, of in cell["metrics"].items()} == pytest.approx(own)
        assert found["mean_over_benchmarks"][cell["algorithm"]]["distinct"] == pytest.approx(mean(own.values()))
        assert cell["mean_over_benchmarks"]["distinct"] == pytest.approx(mean(own.values()))
        for value in (*own.values(), mean(own.values())):
            assert f" {100 * value:.1f} |" in further
    overall = {(row["algorithm"], row["metric"]): row for row in found["summary"] if row["benchmark"] == OVERALL}
    assert overall["sft", "greedy"]["mean"] == pytest.approx(found["mean_over_benchmarks"]["sft"]["greedy"])
    assert found["metrics"]["pass_at_3"] == {"label": "pass@3", "unit": "%"} and "pass@3" in further


def test_asking_for_what_was_not_listed_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "greedy.py").write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\n\n"
        "from rlzoo import Coefficients, Objective\n\n\n"
        "@dataclass(frozen=True)\nclass Greedy(Objective):\n    name: ClassVar[str] = 'greedy'\n\n"
        "    def coefficients(self, batch):\n        return Coefficients(batch.logp - batch.reference_logp)\n"
    )
    policy = load_policy("embedded")
    objective = get_objective(f"{tmp_path / 'greedy.py'}:Greedy")
    with pytest.raises(UserError, match=r"the batch has no 'reference_logp'.* its requires lists"):
        train(policy, objective, buffer_of(policy), SETTINGS)
    with pytest.raises(UserError, match="the batch has no 'reference_logp'"):
        analyze_variance(policy, [objective], buffer_of(policy), draws=0)
    with pytest.raises(AssertionError, match="has no 'reference_logp'"):
        check_objective(objective)


@pytest.mark.parametrize(
    ("stage", "told"), [("FORWARD", r"of_logits\(logits, target\), or module"), ("STEP", "compute")]
)
def test_an_input_that_cannot_be_made_is_refused_at_once(stage: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text(
        "from dataclasses import dataclass\nfrom rlzoo import Coefficients, Objective\n"
        "from rlzoo.inputs import Input, Stage\n\n\n@dataclass(frozen=True)\nclass Nothing(Input):\n"
        f"    stage = Stage.{stage}\n    key = 'nothing'\n\n\n@dataclass(frozen=True)\nclass Empty(Objective):\n"
        "    name = 'empty'\n    requires = (Nothing(),)\n\n    def coefficients(self, batch):\n"
        "        return Coefficients(batch['nothing'])\n"
    )
    with pytest.raises(UserError, match=f"the input Nothing has the stage {stage.lower()} and must define {told}"):
        get_objective(f"{tmp_path / 'empty.py'}:Empty")


def test_no_plugin_is_longer_than_forty_lines() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in PLUGINS.glob("*.py")}
    assert len(lengths) >= 6 and max(lengths.values()) <= 40, lengths
