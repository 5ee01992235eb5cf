"""The work of a comparison: on which problems, with which seeds and rates, and at what cost."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparisons import inline_pool, small
from rich.console import Console

from rlzoo.buffers import OfflineBuffer
from rlzoo.buffers.problems import load_problems
from rlzoo.comparison import one_cell, plan, runner, shared_buffer
from rlzoo.config import Experiment, ProblemSource, Rollouts, Sampling
from rlzoo.jobs.journal import JournaledTask
from rlzoo.jobs.pool import InThisProcess, WorkerDiedError
from rlzoo.objective import get_objective
from rlzoo.policy import Policy, Sequences, load_policy
from rlzoo.policy.loading import save_policy
from rlzoo.policy.microbatches import log_probs
from rlzoo.rollout import Sample, TransformersSampler
from rlzoo.training import train
from rlzoo.types import Trajectory

NO_CURVE = {"samples": 3, "k": 2, "max_new_tokens": 8, "curve_points": 0}


@dataclass(frozen=True)
class Call:
    """What a sampler was asked for, and gave."""

    prompts: tuple[tuple[int, ...], ...]
    settings: Sampling
    seed: int
    greedy: bool
    given: list[list[Sample]]
    weights: float
    """The sum of those of the policy that was sampled."""
    trained: int
    """How many of them take a gradient."""
    dtype: torch.dtype

    @property
    def trains(self) -> bool:
        """Whether it samples what is learned from."""
        return isinstance(self.settings, Rollouts)

    @property
    def tokens(self) -> tuple[int, int]:
        """Prompt and completion tokens of all samples, and completion tokens alone."""
        completions = [len(sample.ids) for samples in self.given for sample in samples]
        prompts = [len(p) * len(samples) for p, samples in zip(self.prompts, self.given, strict=True)]
        return sum(prompts) + sum(completions), sum(completions)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every call of the sampler."""
    made: list[Call] = []
    real = TransformersSampler.sample

    def sample(
        self: TransformersSampler,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        seed: int,
        greedy: bool = False,
        progress: Callable[[int], None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        given = real(self, prompts, settings, seed, greedy, progress, numbers)
        with torch.no_grad():
            weights = float(sum(p.double().sum() for p in self.policy.model.parameters()))
        trained = sum(p.numel() for p in self.policy.model.parameters() if p.requires_grad)
        dtype = self.policy.model.dtype
        made.append(Call(tuple(map(tuple, prompts)), settings, seed, greedy, given, weights, trained, dtype))
        return given

    monkeypatch.setattr(TransformersSampler, "sample", sample)
    return made


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run in this process, which gives no memory back after each, and no report is drawn."""
    monkeypatch.setattr(runner, "pool", inline_pool)
    monkeypatch.setattr(one_cell, "release_memory", lambda: None)
    monkeypatch.setattr(runner, "write_report", lambda *_: None)


@pytest.fixture(scope="module")
def base() -> Policy:
    return load_policy("embedded")


def compared(experiment: Experiment, out: Path) -> dict[str, Any]:
    found = runner.compare(experiment, out, 1, console=Console(file=io.StringIO()))
    assert found["failed"] == []
    return found


def prompts_of(policy: Policy, source: ProblemSource) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(policy.tokenizer.encode(str(problem.prompt))) for problem in load_problems(source))


def by_name(results: Mapping[str, Any]) -> dict[str, Any]:
    return {cell["algorithm"]: cell for cell in results["cells"]}


# Training


@pytest.mark.slow
def test_a_cell_trains_as_train_does_and_bears_its_share_of_the_costs(base: Policy, tmp_path: Path) -> None:
    """Sampled tokens were sampled and then scored once; the reference scored the whole buffer, and samples at T too."""
    rates = {"sft": 1e-2, "rft": 3e-3, "iw-sft": 2e-4, "dpo": 5e-4, "mixture": 1e-3}
    options: dict[str, dict[str, Any]] = {"rft": {"samples_per_prompt": 1}, "dpo": {"beta": 0.7}}
    options["mixture"] = {"weights": {"sft": 0.3, "dft": 0.7}}  # of one view, each with rows and a seed of its own
    rows = {name: {"learning_rates": [rate], "options": options.get(name, {})} for name, rate in rates.items()}
    experiment = small(rows, seeds=[3], evaluation=NO_CURVE, training__steps=3, rollouts__temperature=0.8)
    results = compared(experiment, tmp_path / "out")
    buffer = OfflineBuffer.load(tmp_path / "out" / "buffer")
    completions = sum(len(row.completion_ids) for row in buffer if row.source == "policy")
    scoring = scoring_of(base, [row for row in buffer if row.source == "policy"])
    sampling, reference = 2 * scoring, scoring_of(base, list(buffer)) + scoring
    shared = {"sft": (0, 0.0), "rft": (completions, sampling), "iw-sft": (0, reference)}
    shared["dpo"], shared["mixture"] = (completions, sampling + reference), (0, 0.0)
    assert results["buffer"]["sampled_tokens"] == completions > 0
    for name, cell in by_name(results).items():
        settings = experiment.training_of(name).model_copy(update={"learning_rate": rates[name]})
        objective = get_objective(name, **options.get(name, {}))
        alone = train(load_policy("embedded"), objective, buffer, settings, seed=3)
        assert cell["training"] == alone.plain_steps(), name
        assert max(row["learning_rate"] for row in cell["training"]) == rates[name] == cell["learning_rate"]
        sampled, flops = shared[name]
        assert cell["costs"]["sampled_tokens"] == sampled
        assert cell["costs"]["gradient_tokens"] == alone.costs.gradient_tokens
        assert cell["costs"]["flops"] == pytest.approx(alone.costs.flops + flops, rel=1e-12), name


def scoring_of(policy: Policy, rows: Sequence[Trajectory]) -> float:
    """The FLOPs of one forward pass over these rows."""
    completions = sum(len(row.completion_ids) for row in rows)
    return policy.flops(sum(len(row.prompt_ids) for row in rows) + completions, completions)


@pytest.mark.slow
def test_samples_of_others_are_scored_once_and_that_is_paid_for(base: Policy, tmp_path: Path) -> None:
    lines = [{"prompt": f"{i // 2}+1=?\n", "completion": f"#### {i}", "reward": i % 2} for i in range(4)]
    (tmp_path / "graded.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes = {"demonstrations": str(tmp_path / "graded.jsonl"), "training__behaviour": "current"}
    experiment = small({"rloo": {}}, **changes, evaluation=NO_CURVE)
    results = compared(experiment, tmp_path / "out")
    buffer = OfflineBuffer.load(tmp_path / "out" / "buffer")
    graded, own = list(buffer)[:4], list(buffer)[4:]
    assert [row.completion for row in graded] == [line["completion"] for line in lines]
    expected = log_probs(base, [(row.prompt_ids, row.completion_ids) for row in graded])
    for row, logp in zip(graded, expected, strict=True):
        assert row.behaviour_logp == pytest.approx(logp, abs=1e-5)
    (event,), (cell,) = results["events"], results["cells"]
    assert event.startswith("behaviour log-probs of 4 samples were computed")
    settings = experiment.training_of("rloo").model_copy(update={"learning_rate": cell["learning_rate"]})
    alone = train(load_policy("embedded"), get_objective("rloo"), buffer, settings, seed=0)
    shared = 2 * scoring_of(base, own) + scoring_of(base, graded)
    assert cell["costs"]["flops"] == pytest.approx(alone.costs.flops + shared, rel=1e-12)


@pytest.mark.slow
def test_an_online_cell_pays_for_what_it_samples(base: Policy, calls: list[Call], tmp_path: Path) -> None:
    """And for nothing of the shared buffer, which it does not read."""
    rows = {name: {"mode": "online", "options": {"kl_coefficient": 0.0}} for name in ("grpo", "ppo")}
    experiment = small({"rft": {}, **rows}, seeds=[0], evaluation=NO_CURVE, training__steps=3)
    results = compared(experiment, tmp_path / "out")
    _shared, *online = [call for call in calls if call.trains]
    assert len(online) == 6 and results["buffer"]["sampled_tokens"] > 0
    for name, own in (("grpo", online[:3]), ("ppo", online[3:])):
        tokens, completions = (sum(column) for column in zip(*(call.tokens for call in own), strict=True))
        costs = by_name(results)[name]["costs"]
        assert costs["sampled_tokens"] == completions
        assert costs["gradient_tokens"] == tokens
        plain, trunk = base.flops(tokens, completions), base.flops(tokens, 0)
        # sampled, scored, and three times a forward pass to train. PPO's critic, a trunk of its own, takes part in all
        # but the sampling, and says its values once before the update.
        expected = 5 * plain if name == "grpo" else plain + 5 * (plain + trunk)
        assert costs["flops"] == pytest.approx(expected, rel=1e-12), name


@pytest.mark.slow
def test_online_batches_have_seeds_of_their_own_and_go_through_the_prompts(
    base: Policy, calls: list[Call], tmp_path: Path
) -> None:
    """Two components of a mixture share the batch, each with prompts of its own; the buffer's prompts are no limit."""
    mixture = {"objective": "mixture", "options": {"weights": {"grpo": 0.3, "rloo": 0.7}}, "mode": "online"}
    experiment = small(
        {"grpo": {"mode": "online"}, "both": mixture}, seeds=[0, 1], evaluation=NO_CURVE, training__steps=3,
        rollouts__prompts=2,
    )  # fmt: skip
    compared(experiment, tmp_path / "out")
    online = [call for call in calls if call.trains]
    assert len(online) == 2 * (3 + 2 * 3)
    mixtures = online[3:9], online[12:]
    assert len({call.seed for mixed in mixtures for call in mixed}) == 2 * 6
    for mixed in mixtures:
        assert {len(call.prompts) for call in mixed} == {1}
        first, second = ([call.prompts for call in mixed[part::2]] for part in (0, 1))
        assert len({*first}) == len({*second}) == 3 and first != second
    online = [*online[:3], *online[9:12]]
    assert len({call.seed for call in online}) == 6
    everything = prompts_of(base, experiment.train)
    for own in (online[:3], online[3:]):  # 8 rows are 2 prompts of 4 samples: 3 batches are the 6 prompts
        assert sorted(prompt for call in own for prompt in call.prompts) == sorted(everything)
        assert len({call.weights for call in own}) == 3, "each batch is of the policy as it has become"
    assert online[0].prompts != online[3].prompts and online[0].weights == online[3].weights


@pytest.mark.slow
def test_an_online_cell_is_held_to_the_policy_it_began_as(tmp_path: Path) -> None:
    rows = {"grpo": {"mode": "online", "learning_rates": [1e-2]}}
    (cell,) = compared(small(rows, evaluation=NO_CURVE, training__steps=3), tmp_path / "out")["cells"]
    first, second, third = (row["kl"] for row in cell["training"])
    assert first == pytest.approx(0, abs=1e-6) and second > 1e-3 and third > 1e-3


@pytest.mark.slow
def test_what_is_drawn_in_a_cell_hangs_on_its_seed_alone(calls: list[Call], tmp_path: Path) -> None:
    """LoRA's first factor is drawn; on the same rows it decides the gradient of the second."""
    rows: list[Any] = []
    lora = {"rank": 2, "alpha": 64.0, "target_modules": ["q_proj", "v_proj"]}
    for attempt in range(2):
        torch.rand(attempt)
        experiment = small(
            {"sft": {}}, seeds=[0, 1], evaluation=NO_CURVE, training={"steps": 1, "batch_size": 6, "lora": lora}
        )
        rows.append([cell["training"] for cell in compared(experiment, tmp_path / str(attempt))["cells"]])
    assert rows[0] == rows[1]
    adapted = load_policy("embedded")
    adapted.add_lora(rank=2, target_modules=("q_proj", "v_proj"))
    expected = sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)
    assert {call.trained for call in calls if call.seed == 1} == {expected}
    (first,), (second,) = rows[0]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-6)
    assert first["gradient_norm"] != pytest.approx(second["gradient_norm"], rel=1e-3)


@pytest.mark.slow
def test_the_settings_of_a_row_are_its_own(tmp_path: Path) -> None:
    rows = {"sft": {}, "longer": {"objective": "sft", "training": {"steps": 3, "batch_size": 2}}}
    cells = by_name(compared(small(rows, evaluation=NO_CURVE), tmp_path / "out"))
    assert [len(cells[name]["training"]) for name in rows] == [2, 3]
    assert cells["longer"]["costs"]["gradient_tokens"] < cells["sft"]["costs"]["gradient_tokens"]


@pytest.mark.slow
def test_weights_have_the_dtype_that_was_asked_for_and_demonstrations_their_length(
    calls: list[Call], tmp_path: Path
) -> None:
    half = {"objective": "sft", "training": {"dtype": "float32"}}
    rows = {"rft": {}, "sft": {"learning_rates": [1e-3, 1e-2]}, "half": half}
    training = {"steps": 1, "batch_size": 8, "dtype": "float64", "max_completion_tokens": 1}
    compared(small(rows, training=training, evaluation=NO_CURVE), tmp_path / "out")
    shared, *others = [call.dtype for call in calls]
    # base, rft and half on the benchmark, sampled and greedy; sft's rates on validation, and the better one tested
    assert shared == torch.float64 and others.count(torch.float32) == 2 and others.count(torch.float64) == 8
    buffer = OfflineBuffer.load(tmp_path / "out" / "buffer")
    shown = [row for row in buffer if row.source == "demonstration"]
    assert len(shown) == 6 and all(row.truncated and len(row.completion_ids) == 1 for row in shown)


SPOILT = """\
import rlzoo, torch
class Spoilt(rlzoo.Objective):
    name, steps = "spoilt", []
    def coefficients(self, batch):
        self.steps.append(1)
        return rlzoo.Coefficients(torch.full_like(batch.logp, torch.inf if len(self.steps) == 2 else 1.0))
"""


@pytest.mark.slow
def test_a_step_that_was_skipped_is_told_in_the_results(tmp_path: Path) -> None:
    (tmp_path / "spoilt.py").write_text(SPOILT)
    rows = {"spoilt": {"objective": f"{tmp_path / 'spoilt.py'}:Spoilt"}}
    training = {"steps": 3, "batch_size": 8, "token_budget": 9999, "on_nonfinite": "skip"}
    (cell,) = compared(small(rows, training=training, evaluation=NO_CURVE), tmp_path / "out")["cells"]
    (event,) = cell["events"]
    assert event.startswith("step 2: the gradient norm is ") and event.endswith("; skipped")
    assert [row["gradient_norm"] is None for row in cell["training"]] == [False, True, False]


# The shared buffer

ENGINE = """
from dataclasses import replace
from rlzoo.rollout import TransformersSampler

class WithLogp(TransformersSampler):
    gives_logp = True

    def sample(self, *arguments, **options):
        given = super().sample(*arguments, **options)
        return [[replace(one, logp=[-2.0] * len(one.ids)) for one in samples] for samples in given]
"""


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", ["recompute", "sampler"])
def test_behaviour_log_probs_are_the_trainers_own_or_those_of_the_sampler(behaviour: str, tmp_path: Path) -> None:
    """Of a sampler that gives every token a log-prob of -2."""
    (tmp_path / "engine.py").write_text(ENGINE)
    rows = {"rft": {}, "grpo": {"mode": "online", "options": {"kl_coefficient": 0.0}}}
    changes = {"rollouts__behaviour": behaviour, "rollouts__engine": f"{tmp_path / 'engine.py'}:WithLogp"}
    experiment = small(rows, **changes, evaluation=NO_CURVE, training__steps=1)
    results = compared(experiment, tmp_path / "out")
    samples = [row for row in OfflineBuffer.load(tmp_path / "out" / "buffer") if row.source == "policy"]
    flat = [x for row in samples for x in row.behaviour_logp or []]
    (ratio,) = (row["ratio"] for row in by_name(results)["grpo"]["training"])
    if behaviour == "sampler":
        assert set(flat) == {-2.0} and results["buffer"]["mismatch"] is None
        assert ratio != pytest.approx(1, abs=0.05)
    else:
        gaps = [abs(x + 2.0) for x in flat]
        assert results["buffer"]["mismatch"]["tokens"] == len(flat) == results["buffer"]["sampled_tokens"]
        assert results["buffer"]["mismatch"]["mean_absolute"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)
        assert ratio == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_demonstrations_may_come_from_a_table(tmp_path: Path) -> None:
    lines = [{"prompt": f"{i}+1=?\n", "completion": f"#### {i + 1}"} for i in range(3)]
    (tmp_path / "shown.jsonl").write_text("\n".join(map(json.dumps, lines)))
    experiment = small({"sft": {}}, demonstrations=str(tmp_path / "shown.jsonl"), evaluation=NO_CURVE)
    results = compared(experiment, tmp_path / "out")
    buffer = OfflineBuffer.load(tmp_path / "out" / "buffer")
    assert [(row.prompt, row.completion, row.source) for row in buffer] == [
        (line["prompt"], line["completion"], "demonstration") for line in lines
    ]
    assert results["buffer"]["rows"] == 3


@pytest.mark.slow
def test_the_buffer_has_samples_of_as_many_prompts_as_were_asked_for(
    base: Policy, calls: list[Call], tmp_path: Path
) -> None:
    experiment = small({"rft": {}}, rollouts__prompts=2, rollouts__samples=5, evaluation=NO_CURVE)
    experiment = experiment.model_copy(
        update={"evaluation": experiment.evaluation.model_copy(update={"correct_at": 1.0})}
    )
    results = compared(experiment, tmp_path / "out")
    assert results["buffer"]["samples"] == 10
    sampled = [call for call in calls if call.trains]
    assert [p for call in sampled for p in call.prompts] == list(prompts_of(base, experiment.train)[:2])
    buffer = OfflineBuffer.load(tmp_path / "out" / "buffer")
    rewards = [row.reward for row in buffer if row.source == "policy"]
    assert results["buffer"]["correct"] == rewards.count(1.0) > 0 and 0.0 in rewards
    assert results["buffer"]["rows"] == len(buffer) == 10 + 6


@pytest.mark.slow
def test_an_online_cell_keeps_the_options_of_its_view(tmp_path: Path) -> None:
    """With a limit of one token every sample is truncated, and this row leaves those out."""
    rows = {name: {"mode": "online", "objective": "rloo", "options": {"truncated": name}} for name in ("keep", "drop")}
    experiment = small(rows, rollouts__max_new_tokens=1, training__steps=1, evaluation=NO_CURVE)
    found = runner.compare(experiment, tmp_path / "out", 1, console=Console(file=io.StringIO()))
    assert [cell["algorithm"] for cell in found["cells"]] == ["keep"]
    (failed,) = found["failed"]
    assert "8 fresh batches in a row have nothing to learn from" in failed["error"]


@pytest.mark.slow
def test_token_probabilities_are_of_the_demonstrations_before_and_after(
    base: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = small({"rft": {}, "sft": {"learning_rates": [1e-2]}}, evaluation=NO_CURVE)
    results = compared(experiment, tmp_path / "out")
    buffer = OfflineBuffer.load(tmp_path / "out" / "buffer")
    rows = [(row.prompt_ids, row.completion_ids) for row in buffer if row.source == "demonstration"]
    found = results["token_probabilities"]
    probabilities = np.exp(np.concatenate([np.array(logp) for logp in log_probs(base, rows)]))
    assert found["edges"] == pytest.approx(np.linspace(0, 1, 21))
    assert found["before"] == np.histogram(probabilities, np.linspace(0, 1, 21))[0].tolist()
    after = by_name(results)["sft"]["token_probabilities"]
    assert sum(after) == sum(found["before"]) and after != found["before"]
    monkeypatch.setattr(shared_buffer, "PROBED_ROWS", 4)  # where there are many, of the first ones
    some = shared_buffer.token_probabilities(base, buffer, 8192)["counts"]
    assert sum(some) == sum(len(completion) for _, completion in rows[:4])


# Evaluation


@pytest.mark.slow
def test_a_rate_is_chosen_on_validation_and_reported_on_the_benchmarks(
    base: Policy, calls: list[Call], tmp_path: Path
) -> None:
    rows = {"sft": {"learning_rates": [1e-4, 1e-2]}}
    experiment = small(rows, seeds=[0, 5], evaluation=NO_CURVE)
    results = compared(experiment, tmp_path / "out")
    assert experiment.validation is not None
    names = {
        prompts_of(base, experiment.validation): "validation",
        prompts_of(base, experiment.benchmarks["facts"]): "facts",
    }
    assert len(names) == 2
    made = [(names[call.prompts], call.seed, call.greedy) for call in calls]
    benchmark = [[("facts", seed, greedy) for greedy in (False, True)] for seed in (0, 0, 5)]
    validation = [("validation", seed, False) for seed in (0, 0, 5, 5)]
    assert made == [*benchmark[0], *validation, *benchmark[1], *benchmark[2]]
    tuned, reported = calls[2:6], calls[6:]
    assert len({call.weights for call in tuned}) == 4
    (scores,) = results["learning_rates"].values()
    best = max(scores, key=scores.__getitem__)
    assert {cell["learning_rate"] for cell in results["cells"]} == {float(best)}
    kept = [call.weights for call in tuned][list(rows["sft"]["learning_rates"]).index(float(best)) :: 2]
    assert [call.weights for call in reported[::2]] == kept, "the weights that validation saw"


@pytest.mark.slow
def test_benchmarks_are_sampled_with_the_seed_of_the_cell(calls: list[Call], tmp_path: Path) -> None:
    benchmarks = {
        "facts": {"source": "world:facts/test", "limit": 4},
        "unseen": {"source": "world:facts/unseen", "limit": 3},
    }
    experiment = small({"sft": {}}, seeds=[7], benchmarks=benchmarks, evaluation=NO_CURVE)
    results = compared(experiment, tmp_path / "out")
    assert [(len(call.prompts), call.seed, call.greedy) for call in calls] == [
        (size, seed, greedy) for seed in (0, 7) for size in (4, 3) for greedy in (False, True)
    ]
    for metrics in (results["base"], results["cells"][0]["metrics"]):
        assert list(metrics) == ["facts", "unseen"] and {m["samples"] for m in metrics.values()} == {3}


@pytest.mark.slow
def test_the_curve_is_drawn_along_training_on_a_few_problems(calls: list[Call], tmp_path: Path) -> None:
    evaluation = {**NO_CURVE, "curve_points": 2, "curve_problems": 2, "curve_samples": 1}  # fewer than pass@k's k
    experiment = small({"sft": {"learning_rates": [1e-2]}}, seeds=[4], evaluation=evaluation, training__steps=5)
    results = compared(experiment, tmp_path / "out")
    (cell,) = results["cells"]
    assert results["base_curve"]["step"] == 0
    assert [point["step"] for point in cell["curve"]] == [2, 5]
    drawn = [call for call in calls if call.settings.samples == 1]
    assert [(len(call.prompts), call.seed, call.greedy) for call in drawn] == [(2, 4, False)], (
        "its ends are evaluations"
    )
    assert drawn[0].settings.max_new_tokens == 8
    for point in (results["base_curve"], *cell["curve"]):
        assert 0 <= point["metrics"]["facts"]["avg_at_k"] <= 1


TOLD = """\
import json, pathlib
def told(completions, trainer_state, **columns):
    with pathlib.Path(__file__).with_suffix(".jsonl").open("a") as file:
        print(json.dumps([trainer_state.global_step, trainer_state.max_steps]), file=file)
    return [1.0] * len(completions)
"""


@pytest.mark.slow
def test_a_reward_is_told_how_far_the_policy_is_that_it_scores(tmp_path: Path) -> None:
    """The base is nowhere; then come each cell's curve and validation, and last the benchmarks of the better one."""
    (tmp_path / "told.py").write_text(TOLD)
    rows = {"sft": {"learning_rates": [1e-4, 1e-3], "training": {"steps": 4}}}
    rows["rloo"] = {"mode": "online", "training": {"steps": 3}}
    evaluation = {**NO_CURVE, "curve_points": 2, "curve_problems": 2}
    scoring = {"seconds": None, "memory_gb": None}
    compared(small(rows, evaluation=evaluation, reward=f"{tmp_path / 'told.py'}:told", scoring=scoring), tmp_path / "o")
    told = [tuple(json.loads(line)) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    assert [at for at, _ in groupby(told)] == [
        *[(0, 0), (2, 4), (4, 4), (2, 4), (4, 4)],
        *[(0, 3), (1, 3), (2, 3), (3, 3)],  # online its samples are scored too, after as many steps
        (4, 4),
    ]


# Progress


OWN = """\
import rlzoo
def graded(completions, answer, **_):
    return [None if right is None else 1 for right in answer]
class Failing(rlzoo.Objective):
    name = "failing"
    def coefficients(self, batch):
        raise RuntimeError("no [bold] step")
"""


@pytest.mark.slow
def test_a_log_says_what_was_done_and_what_was_left_out(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """In both files the first problem's solution spells the end of sequence, which may be so in training; the second
    has no prompt, the third no answer, the fourth no message, and the last is too long for anything to follow."""
    own, train, test = (tmp_path / name for name in ("own.py", "train.jsonl", "test.jsonl"))
    own.write_text(OWN)
    save_policy(make_policy("gpt2", dtype=torch.float32), tmp_path / "model")
    positions = 64  # of that model
    rows: list[dict[str, Any]] = [
        {"prompt": f"{i}+1=?\n", "solution": f"#### {i + 1}", "answer": f"{i + 1}"} for i in range(5)
    ]
    rows[0]["solution"], rows[1]["prompt"], rows[2]["answer"] = "<eos>2", None, None
    rows[3]["prompt"] = [{"role": "user"}]
    for path in (train, test):
        path.write_text("\n".join(map(json.dumps, [*rows[:4], rows[4] | {"prompt": "1" * positions}])))
    source = {"solution": "solution", "bad_rows": "drop"}
    algorithms = {
        "rft": {"options": {"threshold": 0}},
        "failing": {"objective": f"{own}:Failing"},
        "grpo": {"mode": "online", "options": {"kl_coefficient": 0.0}},
    }
    experiment = small(
        algorithms, model=str(tmp_path / "model"), seeds=[0, 1], reward=f"{own}:graded",
        train=source | {"source": str(train), "special_tokens": "allow"},
        benchmarks={"mine": source | {"source": str(test)}},
        scoring={"seconds": None, "memory_gb": None}, rollouts__per_seed=True, rollouts__max_new_tokens=2,
        evaluation={**NO_CURVE, "curve_points": 1, "curve_problems": 5},
    )  # fmt: skip
    log = io.StringIO()
    results = runner.compare(experiment, tmp_path / "out", workers=2, console=Console(file=log))

    left_out = {name: summary["first"] for name, summary in results["dropped_rows"].items()}
    long = {
        "train": f"has {positions + 3} tokens, and",
        "benchmark mine": f"has {positions} tokens, and",
    }
    assert list(left_out) == list(long)
    for path, (name, told) in zip((train, test), long.items(), strict=True):
        null, wrong, too_long = left_out[name]
        assert results["dropped_rows"][name] == {"count": 3, "of": 5, "first": left_out[name]}
        assert null.startswith(f"{path} line 2: the prompt, 'prompt', is null: ")
        assert f"{path} line 4" in wrong and "message" in wrong
        assert f"{path} line 5" in too_long and f"{told} the model has {positions} positions" in too_long
    cut = "4 of 4 samples were truncated at max_new_tokens (2)"
    goes_on = "line 1): the completion continues after '<eos>', where sampling stops"
    spelled, unscored, _, unsaid = results["events"]
    assert results["events"] == [spelled, unscored, cut, unsaid]
    assert unscored.startswith("train: problems not sampled, because their reward is None, as for an unreadable gold ")
    assert unscored.endswith(f"1 in all (problem 'train-2' ({train} line 3): its reward is None)")
    assert spelled.startswith("train: text that spells a special token is read as that token: 1 in all (problem ")
    assert spelled.endswith(f"'train-0' ({train} {goes_on})")
    assert unsaid.startswith("benchmark mine: gold completions without a log-likelihood: 1 in all (problem 'train-0'")
    assert unsaid.count(str(test)) == 1 and f"({test} {goes_on}: remove it, " in unsaid
    none = (
        "have no reward (the reward returned None, as it does for a missing gold answer); the first has the prompt "
        "'2+1=?'"
    )
    buffers = []
    for seed in (0, 1):
        name = f"  buffer of seed {seed}: "
        buffers += [f"{name}6 rows, 4 of 4 samples correct", f"{name}{spelled}", f"{name}{unscored}", f"{name}{cut}"]
    cells, expected = {(cell["algorithm"], cell["seed"]): cell for cell in results["cells"]}, []
    for number, cell in enumerate(plan.cells(experiment), 1):
        if cell.algorithm == "failing":
            expected.append(f"  [{number}/6] {cell.id} failed: RuntimeError: no [bold] step (own.py line 7)")
        else:
            expected.append(f"  [{number}/6] {cell.id}: avg@k mine 50.0 %")
            expected += [f"    {event}" for event in cells[cell.algorithm, cell.seed]["events"]]
    assert any("equal rewards" in line for line in expected)
    assert log.getvalue().splitlines() == [
        f"facts: 3 algorithms × 2 seeds, 6 cells in 2 processes; writing to {tmp_path / 'out'}",
        *buffers,
        "  base model: avg@k mine 50.0 %",
        *(f"  {name}: dropped 3 of 5 rows (bad_rows: drop): {'; '.join(why)}" for name, why in left_out.items()),
        f"  {unsaid}",
        *expected,
        f"  evaluation: 20 of 40 samples {none}; they count as wrong",
    ]


@contextmanager
def telling_pool(told: list[tuple[str, list[tuple[float, str]]]]) -> Iterator[InThisProcess]:
    """The progress that each task reported, by name, in order."""

    class Telling(InThisProcess):
        def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
            future: Future[Any] = Future()
            heard: list[tuple[float, str]] = []
            told.append((name, heard))
            future.set_result(function(*arguments, lambda share, what: heard.append((share, what))))
            return future

    yield Telling()


@pytest.mark.slow
def test_progress_is_told_from_beginning_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, list[tuple[float, str]]]] = []
    monkeypatch.setattr(runner, "pool", lambda *_: telling_pool(told))
    rows = {"dpo": {}, "sft": {"learning_rates": [1e-3, 1e-2]}}
    compared(small(rows, evaluation=NO_CURVE, rollouts__batch_size=8), tmp_path / "out")
    for name, heard in told:
        shares = [share for share, _ in heard]
        assert shares and shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1, name
    assert [name.split("-")[0] for name, _ in told] == ["model", "shared buffer", "base model", "dpo", *["sft"] * 3]
    sampling = [what for _, what in told[1][1]]
    assert sampling == [*[f"sampling the base policy {done}/6" for done in (2, 4, 6)], "reference log-probs"]
    assert told[3][1] == [(0.4, "step 1/2"), (0.8, "step 2/2"), (0.8, "evaluating facts")]


@pytest.mark.slow
def test_no_micro_batch_of_any_work_is_larger_than_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring of samples, references, gold completions and token probabilities, training, and samples made online."""
    sizes: dict[str, list[int]] = {}
    current: list[str] = []
    forward = Policy.forward

    def watched(self: Policy, sequences: Sequences | None = None, **options: Any) -> Any:
        if sequences is not None:
            sizes.setdefault(current[-1], []).append(sequences.ids.numel())
        return forward(self, sequences, **options)

    class Named(InThisProcess):
        def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
            current.append(name.split("-")[0])
            return super().submit(name, function, *arguments)

    monkeypatch.setattr(Policy, "forward", watched)
    monkeypatch.setattr(runner, "pool", lambda *_: nullcontext(Named()))
    rows: dict[str, Any] = {"dpo": {}, "grpo": {"mode": "online", "options": {"kl_coefficient": 0.0}}}
    compared(small(rows, training__token_budget=40, evaluation=NO_CURVE), tmp_path / "out")
    assert list(sizes) == ["shared buffer", "base model", "dpo", "grpo"]
    assert {name: max(found) for name, found in sizes.items() if max(found) > 40} == {}


class Dying(InThisProcess):
    """Each training and each evaluation dies twice before it works, and so is done in quarters."""

    def __init__(self) -> None:
        self.died: list[tuple[str, Any]] = []

    def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        task = function.function if isinstance(function, JournaledTask) else function
        attempt = (name, task)
        if task not in (one_cell.run_cell, one_cell.evaluate_cell) or self.died.count(attempt) == 2:
            return super().submit(name, function, *arguments)
        self.died.append(attempt)
        future: Future[Any] = Future()
        future.set_exception(WorkerDiedError(-9))
        return future


@pytest.mark.slow
def test_smaller_parts_change_what_fits_and_not_what_is_found(
    calls: list[Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As cells are done again whose processes ran out of memory."""
    experiment = small({"sft": {"learning_rates": [1e-3, 1e-2]}}, seeds=[0], evaluation=NO_CURVE)
    whole = compared(experiment, tmp_path / "whole")
    calls.clear()
    monkeypatch.setattr(runner, "pool", lambda *_: nullcontext(Dying()))
    again = compared(experiment, tmp_path / "again")
    assert [call.settings.batch_size for call in calls] == [256] * 2 + [64] * 4
    for one, other in zip(whole["cells"], again["cells"], strict=True):
        assert one["metrics"] == other["metrics"]
        for row, smaller in zip(one["training"], other["training"], strict=True):
            assert smaller == pytest.approx(row, rel=1e-4, abs=1e-6)
