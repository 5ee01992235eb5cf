"""Samples of any temperature and top-p: ratios start at 1, and every gradient is the one that its objective means."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any

import pytest
import torch
from batches import built
from fake_vllm import install
from torch import Tensor

from rlzoo.buffers import Buffer, OfflineBuffer
from rlzoo.buffers.problems import Problem, demonstrations, encode_problems
from rlzoo.config import Sampling, Training
from rlzoo.errors import UserError
from rlzoo.inputs import Behaviour, Reference, Snapshot, Statistic
from rlzoo.objective import Objective, get_objective, is_composite, list_objectives, objective_class
from rlzoo.policy import Assembler, MicroBatches, Models, Policy, Sequences
from rlzoo.policy.microbatches import log_probs
from rlzoo.reward import Reward
from rlzoo.rollout import Sampler, TransformersSampler, VLLMSampler, collect_rollouts, mismatch
from rlzoo.training import Trainer, lacking, train, with_behaviour, with_reference
from rlzoo.training.batches import BufferSource, FreshSource
from rlzoo.training.sums import truncated_importance
from rlzoo.types import Coefficients, Selection, TokenBatch, Trajectory, WhichView
from rlzoo.variance import analyze_variance
from rlzoo.variance.gradients import GradientMeter
from rlzoo.variance.scoring import score
from rlzoo.variance.subjects import rows_of, subjects_of, weights_of

MakePolicy = Callable[..., Policy]
Rows = Callable[[str, float, float], list[Trajectory]]
Seen = list[tuple[TokenBatch, Coefficients]]
SETTINGS = list(product((0.6, 1.0, 1.3), (0.8, 1.0)))
OWN, RECOMPUTED, ENGINE = "the policy's own", "an engine's, recomputed", "an engine's"
PROBLEMS = [Problem(str(i), f"{i}+{i}=?\n", {"answer": str(2 * i)}, (f"#### {2 * i}",)) for i in range(3)]
REWARD = Reward("length", lambda completions, **_: [float(len(c) + i) % 3 for i, c in enumerate(completions)])
STEP = Training(steps=1, learning_rate=1e-2, warmup_ratio=0.0, weight_decay=0.0, max_gradient_norm=1e9)
WITH_RATIO = [
    name
    for name in list_objectives()
    if not is_composite(objective_class(name)) and {Behaviour(), Snapshot()} & set(built(name).requires)
]
OF_EACH_KIND = list({frozenset(built(name).requires): name for name in WITH_RATIO}.values())
"""One objective for each set of inputs: others with the same inputs get the same batches."""
FEW = [(0.6, 0.8), (1.3, 1.0)]
"""Settings for objectives other than GRPO: how samples are drawn and scored is no matter of the objective."""


@pytest.fixture(scope="module")
def policy(make_policy: MakePolicy) -> Policy:
    return make_policy()


@pytest.fixture(scope="module")
def rows(policy: Policy) -> Iterator[Rows]:
    """Samples by who computed their log-probs, by temperature and by top-p."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch, policy)

        @cache
        def sampled(kind: str, temperature: float, top_p: float) -> list[Trajectory]:
            sampler = TransformersSampler(policy) if kind == OWN else VLLMSampler(policy)
            return collected(policy, sampler, temperature, top_p, recompute=kind != ENGINE)

        yield sampled


def collected(
    policy: Policy, sampler: Sampler, temperature: float, top_p: float, recompute: bool = True, seed: int = 0
) -> list[Trajectory]:
    settings = Sampling(samples=4, temperature=temperature, top_p=top_p, max_new_tokens=5)
    problems = encode_problems(policy.tokenizer, PROBLEMS)
    return collect_rollouts(policy, sampler, problems, REWARD, settings, seed, recompute=recompute)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Objective], Seen]:
    """What an objective is given in training, and what it makes of it."""

    def watch(objective: Objective) -> Seen:
        seen: Seen = []
        own = type(objective).coefficients

        def coefficients(self: Objective, batch: TokenBatch) -> Coefficients:
            seen.append((batch, own(self, batch)))
            return seen[-1][1]

        monkeypatch.setattr(type(objective), "coefficients", coefficients)
        return seen

    return watch


def assert_ratios_are_one(seen: Seen, moved: bool = False) -> None:
    assert seen
    for batch, found in seen:
        own = {name: values for name, values in found.metrics.items() if name.endswith("ratio")}
        ratios = [values.exp() if name.endswith("log_ratio") else values for name, values in own.items()]
        assert ratios and batch.mask.any()
        for values in ratios:
            torch.testing.assert_close(values[batch.mask], torch.ones_like(values[batch.mask]), rtol=0, atol=2e-6)
        if "clipped" in found.metrics:
            assert not found.metrics["clipped"][batch.mask].any()
        if "kl" in found.metrics and not moved:
            assert float(found.metrics["kl"][batch.mask].abs().max()) < 1e-9
    seen.clear()


def view_of(objective: Objective) -> tuple[WhichView, Mapping[str, Any]]:
    """Samples, also for an objective of demonstrations: as ``learns_from: correct`` has it."""
    if objective.learns_from is Selection.DEMONSTRATIONS:
        return Selection.CORRECT, {"threshold": 0.0}
    return objective.learns_from, objective.view_options


def step_on(make_policy: MakePolicy, objective: Objective, buffer: Buffer, settings: Training = STEP) -> Trainer:
    selection, options = view_of(objective)
    policy, view = make_policy(), buffer.view(selection, **options)
    source = BufferSource(buffer, view, sum(map(len, view.units)), 0)  # each row once
    trainer = Trainer(policy, objective, source, settings)
    trainer.run()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("kind", [OWN, RECOMPUTED, ENGINE])
@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_ratios_to_a_buffer_start_at_one(
    name: str, kind: str, rows: Rows, policy: Policy, make_policy: MakePolicy, watched: Callable[[Objective], Seen]
) -> None:
    objective = built(name)
    seen = watched(objective)
    for temperature, top_p in SETTINGS if name == "grpo" else FEW:
        buffer = with_reference(OfflineBuffer.from_trajectories(rows(kind, temperature, top_p)), policy)
        record = step_on(make_policy, objective, buffer).record.steps[0]
        assert_ratios_are_one(seen)
        assert record.get("clipped", 0.0) == 0 and record["gradient_norm"] > 0


ENGINES = [(RECOMPUTED, 0.6, 0.8), (ENGINE, 1.3, 0.8)]


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_ratios_to_fresh_samples_start_at_one(
    name: str, make_policy: MakePolicy, watched: Callable[[Objective], Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two batches: the second is of a policy that has moved, and its reference has not."""
    objective = built(name)
    seen = watched(objective)
    selection, options = view_of(objective)
    own = SETTINGS if name == "grpo" else FEW
    for kind, temperature, top_p in [*((OWN, *settings) for settings in own), *ENGINES]:
        policy = make_policy()
        install(monkeypatch, policy)
        sampler = TransformersSampler(policy) if kind == OWN else VLLMSampler(policy)
        sample = partial(collected, policy, sampler, temperature, top_p, kind != ENGINE)

        def collect(version: int, sample: Callable[[int], list[Trajectory]] = sample) -> OfflineBuffer:
            return OfflineBuffer.from_trajectories(sample(version))

        settings = STEP.model_copy(update={"steps": 2})
        Trainer(policy, objective, FreshSource(collect, selection, **options), settings).run()
        has = Reference() in objective.requires
        assert len(seen) == 2 and {batch.get("reference_logp") is not None for batch, _ in seen} == {has}
        assert_ratios_are_one(seen, moved=True)


def logp_of(policy: Policy, row: Trajectory, temperature: float) -> Tensor:
    """log softmax(z/T)[y] of a row's tokens, with its graph, from the model's own logits."""
    ids, start = torch.tensor([row.prompt_ids + row.completion_ids]), len(row.prompt_ids) - 1
    logits = policy.model(ids).logits[0, start:-1] / temperature
    logp: Tensor = logits.log_softmax(1).gather(1, torch.tensor(row.completion_ids)[:, None])[:, 0]
    return logp


def gradients(policy: Policy) -> Tensor:
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


@pytest.mark.slow
@pytest.mark.parametrize("budget", [4096, 24])
@pytest.mark.parametrize("entries", [2**26, 300], ids=["one chunk", "many chunks"])
def test_rows_of_several_temperatures_in_one_batch(
    rows: Rows, policy: Policy, make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, budget: int, entries: int
) -> None:
    """GRPO's gradient, its KL included, by hand: each row with the logits over its own temperature."""
    monkeypatch.setattr("rlzoo.policy.head.CHUNK_ENTRIES", entries)
    mixed = [
        replace(row, prompt_id=f"{row.prompt_id}/{temperature}")
        for temperature in (0.6, 1.0, 1.3)
        for row in rows(OWN, temperature, 1.0)
    ]
    other = make_policy(seed=1)  # a reference that the KL has something to say about
    buffer = with_reference(OfflineBuffer.from_trajectories(mixed), other)
    objective = get_objective("grpo", kl_coefficient=0.5)
    found = step_on(make_policy, objective, buffer, STEP.model_copy(update={"token_budget": budget}))
    expected, losses = make_policy(), []
    for start in range(0, len(mixed), 4):
        group = mixed[start : start + 4]
        rewards = torch.tensor([row.reward for row in group], dtype=torch.float64)
        for row, r in zip(group, rewards, strict=True):
            advantage = (r - rewards.mean()) / (rewards.std() + 1e-4)
            logp = logp_of(expected, row, row.temperature)
            reference = logp_of(other, row, row.temperature).detach()
            gap = reference - logp
            losses.append((-(logp - logp.detach()).exp() * advantage + 0.5 * (gap.exp() - gap - 1)).mean())
    torch.autograd.backward(torch.stack(losses).mean())
    torch.testing.assert_close(gradients(found.policy), gradients(expected), rtol=1e-4, atol=1e-5)


def preference_rows(rows: Rows) -> OfflineBuffer:
    """A right and a wrong sample of each prompt, drawn at 0.6."""
    found = [
        replace(row, reward=float(i % 2), completion=str(i), prompt_id=str(i // 2))
        for i, row in enumerate(rows(OWN, 0.6, 0.8))
    ]
    return OfflineBuffer.from_trajectories(found)


@pytest.mark.parametrize("name", ["rft", "dpo", "kto", "simpo", "dft", "iw-sft", "psft"])
def test_what_learns_the_policy_at_one_does_not_ask_how_samples_were_drawn(
    name: str, rows: Rows, policy: Policy, make_policy: MakePolicy, watched: Callable[[Objective], Seen]
) -> None:
    objective = built(name)
    assert not objective.at_sampling_temperature
    seen = watched(objective)
    buffer = preference_rows(rows)
    plain = OfflineBuffer.from_trajectories([replace(row, temperature=1.0, top_p=1.0) for row in buffer])
    both = []
    for some in (buffer, plain):
        both.append(step_on(make_policy, objective, with_reference(some, policy)))
    assert torch.equal(gradients(both[0].policy), gradients(both[1].policy))
    assert both[0].record.plain_steps() == both[1].record.plain_steps()
    for batch, _ in seen:
        if Reference() in objective.requires:
            torch.testing.assert_close(batch.logp, batch.reference_logp.to(batch.logp), rtol=0, atol=1e-5)


def test_plain_policy_gradients_are_those_of_the_policy_that_samples(rows: Rows, make_policy: MakePolicy) -> None:
    """REINFORCE, by hand: the gradient of the reward that is expected of samples at the temperature."""
    own = rows(OWN, 0.6, 1.0)
    found = step_on(make_policy, get_objective("reinforce", baseline="none"), OfflineBuffer.from_trajectories(own))
    expected = make_policy()
    losses = [-(row.reward or 0.0) * logp_of(expected, row, 0.6).sum() for row in own]
    torch.autograd.backward(torch.stack(losses).mean())
    torch.testing.assert_close(gradients(found.policy), gradients(expected), rtol=1e-6, atol=1e-9)


def test_ratios_to_samples_without_log_probs_start_at_one(
    rows: Rows, make_policy: MakePolicy, watched: Callable[[Objective], Seen]
) -> None:
    bare = OfflineBuffer.from_trajectories([replace(row, behaviour_logp=None) for row in rows(OWN, 0.6, 0.8)])
    seen = watched(get_objective("grpo"))
    train(make_policy(), get_objective("grpo"), bare, STEP.model_copy(update={"behaviour": "current"}))
    assert_ratios_are_one(seen)


def test_parts_of_a_mixture_have_temperatures_of_their_own(
    rows: Rows, policy: Policy, make_policy: MakePolicy, watched: Callable[[Objective], Seen]
) -> None:
    grpo, dpo = watched(get_objective("grpo")), watched(get_objective("dpo"))
    train(make_policy(), get_objective("mixture", weights={"grpo": 1.0, "dpo": 1.0}), preference_rows(rows), STEP)
    (samples, found), (pairs, margins) = grpo[0], dpo[0]
    for batch in (samples, pairs):
        assert batch.reference_logp is not None
        torch.testing.assert_close(batch.logp, batch.reference_logp.to(batch.logp), rtol=0, atol=1e-5)
    assert_ratios_are_one([(samples, found)])
    assert float(margins.metrics["margin"].abs().max()) < 1e-5
    assert not torch.isclose(samples.logp[samples.mask].mean(), pairs.logp[pairs.mask].mean())


@pytest.fixture
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large buffer is read some rows at a time: here 4."""
    ids = Buffer.ids
    monkeypatch.setattr(Buffer, "ids", lambda self: ids(self, 4))


@pytest.mark.usefixtures("small_portions")
def test_samples_without_log_probs_are_scored_at_their_temperatures(rows: Rows, policy: Policy) -> None:
    shown, sampled = demonstrations(policy.tokenizer, PROBLEMS), list(rows(OWN, 0.6, 1.0))
    bare = [replace(row, behaviour_logp=None) for row in sampled[1:]]
    buffer, scored = with_behaviour(OfflineBuffer.from_trajectories([*shown, sampled[0], *bare]), policy, 40)
    assert scored == list(range(len(shown) + 1, len(buffer)))
    assert all(row.behaviour_logp is None for row in list(buffer)[: len(shown)])
    for row, before in zip(list(buffer)[len(shown) :], sampled, strict=True):
        assert row.behaviour_logp == pytest.approx(before.behaviour_logp, abs=1e-5)


@pytest.mark.usefixtures("small_portions")
def test_the_references_log_probs_are_kept_for_both_temperatures(rows: Rows, policy: Policy) -> None:
    shown = demonstrations(policy.tokenizer, PROBLEMS)
    plain = OfflineBuffer.from_trajectories([*shown, *rows(OWN, 0.6, 1.0)])
    buffer = with_reference(plain, policy, token_budget=40)
    for row in buffer:
        pair = [(row.prompt_ids, row.completion_ids)]
        assert row.reference_logp == pytest.approx(log_probs(policy, pair)[0], abs=1e-5)
        if row.source == "policy":
            assert row.tempered_reference_logp == pytest.approx(log_probs(policy, pair, temperature=0.6)[0], abs=1e-5)
            assert row.tempered_reference_logp == pytest.approx(row.behaviour_logp, abs=1e-5)
        else:
            assert row.tempered_reference_logp is None
    grpo, dpo, free = get_objective("grpo"), get_objective("dpo"), get_objective("grpo", kl_coefficient=0.0)
    mixture = get_objective("mixture", weights={"grpo": 1.0, "sft": 1.0})
    assert not lacking(buffer, grpo, dpo, mixture) and not lacking(plain, free)
    half = buffer.with_values("reference_logp", buffer.column("reference_logp"))  # as buffers were before
    assert lacking(plain, dpo) and not lacking(half, dpo)
    assert lacking(half, grpo) and lacking(half, dpo, mixture)
    cold = OfflineBuffer.from_trajectories(rows(OWN, 1.0, 0.8))
    assert not lacking(cold.with_values("reference_logp", cold.column("behaviour_logp")), grpo)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [True, False])
def test_engines_are_compared_like_with_like(
    rows: Rows, policy: Policy, monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    """An engine says log-probs of its nucleus; what is stored is of the whole distribution, its own error kept."""
    install(monkeypatch, policy, gap=0.125)
    for temperature, top_p in SETTINGS:
        found = collected(policy, VLLMSampler(policy), temperature, top_p, recompute)
        whole = log_probs(policy, [(row.prompt_ids, row.completion_ids) for row in found], temperature=temperature)
        for row, logp in zip(found, whole, strict=True):
            assert row.behaviour_logp == pytest.approx([x + (0 if recompute else 0.125) for x in logp], abs=1e-6)
        apart = mismatch(found)
        if not recompute:
            assert apart is None
            continue
        assert apart is not None and apart["largest"] == pytest.approx(0.125, abs=1e-5)
        assert apart["mean_absolute"] == pytest.approx(0.125, abs=1e-5)
        mask = Sequences.of(found, policy.device).mask
        weight = truncated_importance(found, mask, cap=2.0)[mask]
        torch.testing.assert_close(weight, torch.full_like(weight, math.exp(-0.125)), rtol=1e-4, atol=0)


def test_an_importance_cap_does_nothing_to_an_engine_that_agrees(
    rows: Rows, policy: Policy, make_policy: MakePolicy
) -> None:
    buffer = OfflineBuffer.from_trajectories(rows(RECOMPUTED, 0.6, 0.8))
    assert all(row.sampler_logp is not None for row in buffer)
    objective = get_objective("dr-grpo")
    plain, capped = (
        gradients(step_on(make_policy, objective, buffer, STEP.model_copy(update={"importance_cap": cap})).policy)
        for cap in (None, 1.5)
    )
    torch.testing.assert_close(plain, capped, rtol=1e-4, atol=1e-6)


def analysed(policy: Policy, buffer: Buffer, *names: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = analyze_variance(policy, names, buffer, rows=64, draws=0)["objectives"]
    return found


@pytest.mark.slow
def test_the_analyzer_takes_rows_at_the_same_temperature_as_training(
    rows: Rows, policy: Policy, make_policy: MakePolicy
) -> None:
    shown = demonstrations(policy.tokenizer, PROBLEMS)
    buffer = with_reference(OfflineBuffer.from_trajectories([*shown, *preference_rows(rows)]), policy)
    alone = {name: analysed(policy, buffer, name)[name] for name in ("grpo", "ppo", "dpo", "sft")}
    for name in ("grpo", "ppo"):
        ratios = alone[name]["importance_weights"]
        assert ratios["mean"] == pytest.approx(1, abs=1e-6) and ratios["second_moment"] == pytest.approx(1, abs=1e-6)
    together = analysed(policy, buffer, *alone)
    for name, entry in alone.items():
        assert together[name]["coefficients"] == entry["coefficients"]
        assert together[name]["data_noise"]["trace_cov"] == pytest.approx(entry["data_noise"]["trace_cov"], rel=1e-6)


@pytest.mark.parametrize("name", ["grpo", "otb", "ppo", "dpo"])
def test_the_analyzers_gradient_is_that_of_training(
    name: str, rows: Rows, policy: Policy, make_policy: MakePolicy
) -> None:
    shown = demonstrations(policy.tokenizer, PROBLEMS)
    buffer = with_reference(OfflineBuffer.from_trajectories([*shown, *preference_rows(rows)]), make_policy(seed=1))
    objective = built(name)
    picked, subjects, _ = subjects_of({"it": objective, "other": get_objective("rft")}, buffer, 64, 0, None)
    seen = rows_of(buffer, picked, subjects)
    micro = MicroBatches(60)
    assembler = Assembler(policy, Models(policy, {None: policy}), micro, remember=True)
    scored = score(assembler, seen, [one for one in objective.requires if one.is_statistic], {}, 0, 0)
    task = weights_of(assembler, subjects["it"], scored).task
    found = GradientMeter(policy).measure(seen, {"it": task}, micro)["it"]
    trained = step_on(make_policy, objective, buffer).policy
    for parameter, p in trained.model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(found.mean[parameter], p.grad, rtol=1e-5, atol=1e-7, msg=parameter)


def test_statistics_and_terms_are_of_the_tempered_logits(policy: Policy) -> None:
    prompts, completions, heats = [[20, 21], [22]], [[30, 31, 2], [32]], [0.6, 1.3]
    seen: list[Tensor] = []

    def term(logits: Tensor, reference: Tensor | None, target: Tensor) -> Tensor:
        assert reference is not None
        seen.extend((logits.clone(), reference.clone()))
        return -logits.log_softmax(1).mean(1)

    sequences = Sequences.collate(prompts, completions, policy.device, heats)
    plain = Sequences.collate(prompts, completions, policy.device)
    scores = policy(
        sequences,
        statistics=[Statistic("entropy"), Statistic("square_mass")],
        term=term,
        reference=policy.frozen_copy(),
    )
    hidden = policy.hidden(plain)
    logits = policy.head.logits(hidden) / torch.tensor([0.6] * 3 + [1.3], dtype=torch.float64)[:, None]
    logp = logits.log_softmax(1)
    torch.testing.assert_close(seen[0], logits)
    torch.testing.assert_close(seen[1], logits)
    mask = sequences.mask
    torch.testing.assert_close(scores.inputs["entropy"][mask], -(logp.exp() * logp).sum(1))
    torch.testing.assert_close(scores.inputs["square_mass"][mask], logp.exp().square().sum(1))
    torch.testing.assert_close(scores.logp[mask], logp.gather(1, plain.targets[:, None])[:, 0])
    assert (
        plain.temperature is None
        and Sequences.collate(prompts, completions, policy.device, [1.0, 1.0]).temperature is None
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"temperature": 0.0}, "row 2 of the data set: temperature is 0.0: it must be above 0"),
        ({"temperature": float("nan")}, "row 2 of the data set: temperature is nan: it must be above 0"),
        ({"top_p": 1.5}, "row 2 of the data set: top_p is 1.5: it must be above 0 and at most 1"),
    ],
)
def test_a_temperature_that_cannot_be(rows: Rows, change: dict[str, float], told: str) -> None:
    first, second, *_ = rows(OWN, 1.0, 1.0)
    with pytest.raises(UserError, match=told):
        OfflineBuffer.from_trajectories([first, replace(second, **change)])  # type: ignore[arg-type]
