"""Per-unit gradients against torch.func and against the trainer's own surrogate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from batches import built
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from rlzoo import OfflineBuffer
from rlzoo.errors import UserError
from rlzoo.inputs import Input, ReferenceLogits
from rlzoo.objective import Objective, get_objective, is_composite, list_objectives, objective_class, surrogate
from rlzoo.policy import Assembler, MicroBatches, Models, Policy, Sequences
from rlzoo.types import Coefficients, TokenBatch, Trajectory
from rlzoo.variance import analyze_variance, factored, head_pass
from rlzoo.variance.gradients import GradientMeter, Measurement
from rlzoo.variance.modules import Modules
from rlzoo.variance.noise import gradient_squared_norm, trace_cov
from rlzoo.variance.over_data import default_held, portions
from rlzoo.variance.scoring import score
from rlzoo.variance.subjects import named_objectives, subjects_of, weights_of
from rlzoo.variance.tasks import Task, UnitGradients, shared_passes

MakeModel = Callable[..., Policy]
ROWS = 9
UNITS: Mapping[str, list[tuple[int, ...]]] = {
    "rows": [(i,) for i in range(ROWS)],
    "pairs": [(0, 5), (3, 1), (2, 7)],
    "groups": [(1, 2, 3), (4,), (8, 0)],
}


@pytest.fixture(scope="module")
def make_model(tokenizer: Any) -> MakeModel:
    """Small stock transformers models in float64; their normalisations have weights that are not 1."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    def make(kind: str = "llama", tied: bool = True, **changes: Any) -> Policy:
        torch.manual_seed(0)
        common = {"vocab_size": len(tokenizer), "initializer_range": 0.3, "tie_word_embeddings": tied, **changes}
        sizes = {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 48, "max_position_embeddings": 64,
        }  # fmt: skip
        model: Any
        if kind == "gpt2":
            ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
            model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **ends, **common))
        elif kind == "llama":
            model = LlamaForCausalLM(LlamaConfig(**sizes, **common))
        else:
            model = Qwen2ForCausalLM(Qwen2Config(**sizes, **common))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, 1.0, 0.2)
        return Policy(model.double().eval(), tokenizer, kind)

    return make


def random_rows(policy: Policy, seed: int = 1) -> tuple[list[Trajectory], Tensor]:
    """Rows of unequal lengths and a weight for each of their completion tokens."""
    draw = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(3, len(policy.tokenizer), (length,), generator=draw).tolist()

    rows = [Trajectory("", "", ids(2, 6), ids(2, 9), str(i)) for i in range(ROWS)]
    width = max(len(row.completion_ids) for row in rows)
    return rows, torch.randn(ROWS, width, dtype=torch.float64, generator=draw)


def by_torch_func(policy: Policy, rows: Sequence[Trajectory], weight: Tensor) -> dict[str, Tensor]:
    """Each row's gradient of Σ_t weight_t log π_t, with the padding that a batch has."""
    sequences = Sequences.collate([r.prompt_ids for r in rows], [r.completion_ids for r in rows], policy.device)
    spread = torch.zeros(sequences.ids.shape, dtype=torch.float64)
    spread[sequences.predicts] = weight[sequences.mask]
    parameters = {name: p.detach() for name, p in policy.model.named_parameters()}

    def loss(p: dict[str, Tensor], ids: Tensor, w: Tensor) -> Tensor:
        logits = functional_call(policy.model, p, (ids[None],), {"use_cache": False}).logits[0]
        total: Tensor = (logits.log_softmax(1).gather(1, ids.roll(-1)[:, None])[:, 0] * w).sum()
        return total

    found: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, sequences.ids, spread)
    return found


def of_units(by_row: Mapping[str, Tensor], units: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.stack([g[list(unit)].sum(0) for unit in units]) for name, g in by_row.items()}


def flat(by_row: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in by_row.values()], 1)


def assert_equal(found: UnitGradients, expected: Mapping[str, Tensor], rtol: float = 1e-9) -> None:
    """Norms of every unit, and the mean gradient of every parameter."""
    squares = flat(expected).square().sum(1)
    torch.testing.assert_close(found.squared_norm.sum(1), squares, rtol=rtol, atol=0)
    assert set(found.mean) == set(expected)
    for name, gradient in expected.items():
        mean = gradient.mean(0)
        assert float((found.mean[name] - mean).norm()) <= rtol * max(float(mean.norm()), 1e-3), name


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_norms_and_means_are_those_of_torch_func(make_model: MakeModel, kind: str, tied: bool) -> None:
    policy = make_model(kind, tied)
    rows, weight = random_rows(policy)
    by_row = by_torch_func(policy, rows, weight)
    # powers of two, as transformers' RMSNorm rounds gradients to float32 whatever the dtype
    tasks = {name: Task(units, weight * 2.0**k) for k, (name, units) in enumerate(UNITS.items())}
    found = GradientMeter(policy).measure(rows, tasks, MicroBatches(40))
    for k, (name, units) in enumerate(UNITS.items()):
        expected = {n: 2.0**k * g for n, g in of_units(by_row, units).items()}
        assert_equal(found[name], expected)
        assert found[name].squared_norm.shape[1] == len(Modules(policy).layers)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_layers_have_the_norms_of_their_own_parameters(make_model: MakeModel) -> None:
    policy = make_model("gpt2", False)
    rows, weight = random_rows(policy)
    by_row, meter = by_torch_func(policy, rows, weight), GradientMeter(policy)
    found = meter.measure(rows, {"a": Task(UNITS["rows"], weight)})["a"]
    assert meter.modules.layers == ["wte", "wpe", "h.0", "h.1", "ln_f", "lm_head"]
    for number in range(6):
        own = {n: by_row[n] for n, layer in meter.modules.layer_of.items() if layer == number}
        torch.testing.assert_close(found.squared_norm[:, number], flat(own).square().sum(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("factor", [0.0, 1e9], ids=["products", "grams"])
def test_both_ways_to_a_norm_agree(make_model: MakeModel, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_model()
    rows, weight = random_rows(policy)
    tasks = {name: Task(units, weight) for name, units in UNITS.items()}
    usual = GradientMeter(policy).measure(rows, tasks)
    monkeypatch.setattr(factored, "GRAM_FACTOR", factor)
    monkeypatch.setattr(factored, "PRODUCT_ENTRIES", 32 * 48 * 2)  # two units of the largest matrix at a time
    other = GradientMeter(policy).measure(rows, tasks)
    for name in tasks:
        torch.testing.assert_close(other[name].squared_norm, usual[name].squared_norm, rtol=1e-12, atol=0)
        torch.testing.assert_close(other[name].mean, usual[name].mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("token_budget", [1, 30, 10_000])
def test_micro_batches_do_not_matter(make_model: MakeModel, token_budget: int) -> None:
    policy = make_model("gpt2")
    rows, weight = random_rows(policy)
    tasks = {name: Task(units, weight) for name, units in UNITS.items()}
    found, whole = (GradientMeter(policy).measure(rows, tasks, MicroBatches(b)) for b in (token_budget, 100_000))
    for name in tasks:
        torch.testing.assert_close(found[name].squared_norm, whole[name].squared_norm, rtol=1e-10, atol=0)
        torch.testing.assert_close(found[name].sketch, whole[name].sketch, rtol=1e-4, atol=1e-4)


def test_a_task_scales_all_its_gradients(make_model: MakeModel) -> None:
    policy = make_model()
    rows, weight = random_rows(policy)
    plain, scaled = (
        GradientMeter(policy).measure(rows, {"a": Task(UNITS["pairs"], weight, scale)})["a"] for scale in (1.0, 3.0)
    )
    torch.testing.assert_close(scaled.squared_norm, 9 * plain.squared_norm)
    torch.testing.assert_close(scaled.sketch, 3 * plain.sketch)
    name = "model.norm.weight"
    torch.testing.assert_close(scaled.mean[name], 3 * plain.mean[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_projected_inner_products_are_right_on_average(make_model: MakeModel, tied: bool) -> None:
    policy = make_model("llama", tied)
    rows, weight = random_rows(policy)
    by_row = flat(by_torch_func(policy, rows, weight))
    exact = by_row @ by_row.mT
    estimates = []
    for seed in range(60):
        meter = GradientMeter(policy)
        meter.projections = {
            name: factored.Projection(1000 * seed + i, p) for i, (name, p) in enumerate(meter.modules.trainable.items())
        }
        sketch = meter.measure(rows, {"a": Task(UNITS["rows"], weight)})["a"].sketch.double()
        estimates.append(torch.einsum("uld,vld->uv", sketch, sketch))
    found = torch.stack(estimates)
    error = (found.mean(0) - exact).abs() / (found.std(0) / 60**0.5)
    assert float(error.max()) < 5 and float(found.std(0).norm() / exact.norm()) < 0.3


def test_frozen_parameters_stay_out_and_everything_is_as_before(make_model: MakeModel) -> None:
    policy = make_model("qwen2", False)
    rows, weight = random_rows(policy)
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    policy.train()
    before = {name: (p.requires_grad, p.grad) for name, p in policy.model.named_parameters()}
    meter = GradientMeter(policy)
    found = meter.measure(rows, {"a": Task(UNITS["rows"], weight)})["a"]
    assert meter.modules.layers == ["layers.1"] and all("layers.1" in name for name in found.mean)
    assert float(found.squared_norm.min()) > 0
    assert {name: (p.requires_grad, p.grad) for name, p in policy.model.named_parameters()} == before
    assert policy.training and not any(m._forward_hooks for m in policy.modules())


# What is not covered is named


class Scaled(nn.Module):
    """A layer that nobody knows."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class MixingNorm(nn.Module):
    """A normalisation whose weight does not act entry by entry."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.cumsum(0)


@pytest.mark.parametrize("module", [Scaled(32), MixingNorm(32)], ids=["unknown", "not entry by entry"])
def test_a_module_that_is_not_covered_is_named(make_model: MakeModel, module: nn.Module) -> None:
    policy = make_model()
    policy.model.model.layers[1].input_layernorm = module
    with pytest.raises(UserError, match=rf"'model.layers.1.input_layernorm' \({type(module).__name__}\)"):
        GradientMeter(policy)
    policy.model.model.layers[1].input_layernorm.requires_grad_(False)
    GradientMeter(policy)


def test_shared_parameters_are_named(make_model: MakeModel) -> None:
    policy = make_model()
    layers = policy.model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(UserError, match=r"'model.layers.0.mlp.up_proj.weight' is shared by the modules"):
        GradientMeter(policy)


def test_a_module_that_runs_twice_is_named(make_model: MakeModel) -> None:
    policy = make_model()
    policy.model.model.layers[1] = policy.model.model.layers[0]
    rows, weight = random_rows(policy)
    with pytest.raises(UserError, match="runs twice in one forward pass"):
        GradientMeter(policy).measure(rows, {"a": Task(UNITS["rows"], weight)})
    assert all(p.requires_grad for p in policy.parameters()) and not any(m._forward_hooks for m in policy.modules())


class GatedNorm(nn.Module):
    """A normalisation that needs a second input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, dtype=torch.float64))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.weight * x * gate


class Doubled(nn.Linear):
    """Called a linear layer, and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("place", ["norm", "linear", "head"])
def test_a_class_is_not_believed_by_its_name(make_model: MakeModel, place: str) -> None:
    policy = make_model("llama", tied=False)
    layer = policy.model.model.layers[0]
    if place == "norm":
        layer.input_layernorm = GatedNorm(32)
    elif place == "linear":
        layer.mlp.up_proj = Doubled(32, 48, bias=False).double()
    else:
        policy.model.lm_head = Doubled(32, len(policy.tokenizer), bias=False).double()
    with pytest.raises(UserError, match=r"no known gradient per row|not a plain linear layer"):
        GradientMeter(policy)


def test_a_module_that_does_not_run_is_named(make_model: MakeModel) -> None:
    policy = make_model()
    policy.model.model.spare = nn.Linear(3, 3).double()
    rows, weight = random_rows(policy)
    with pytest.raises(UserError, match=r"'model.spare' has parameters that train and does not run"):
        GradientMeter(policy).measure(rows, {"a": Task(UNITS["rows"], weight)})


class ScaledEmbedding(nn.Embedding):
    """As Gemma has it."""

    def forward(self, ids: Tensor) -> Tensor:
        return 3.5 * super().forward(ids)


class NormedEmbedding(nn.Embedding):
    """One whose rows are not merely scaled."""

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(ids), dim=-1)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_scaled_embedding_and_a_padding_row(make_model: MakeModel, tied: bool) -> None:
    policy = make_model("gpt2", tied)
    old = policy.model.transformer.wte
    for kind in (ScaledEmbedding, NormedEmbedding):
        new = kind(old.num_embeddings, old.embedding_dim, padding_idx=7, dtype=torch.float64)
        new.weight = old.weight
        policy.model.transformer.wte = new
        if kind is NormedEmbedding:
            with pytest.raises(UserError, match=r"'transformer.wte' \(NormedEmbedding\) has no known gradient"):
                GradientMeter(policy)
            continue
        rows, weight = random_rows(policy)
        rows[0] = replace(rows[0], prompt_ids=[7, 9, 7], completion_ids=rows[0].completion_ids)
        by_row = by_torch_func(policy, rows, weight)
        found = GradientMeter(policy).measure(rows, {n: Task(u, weight) for n, u in UNITS.items()})
        for name, units in UNITS.items():
            assert_equal(found[name], of_units(by_row, units))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_head_in_chunks_and_with_a_bias(make_model: MakeModel, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_model("llama", tied)
    policy.model.lm_head.bias = nn.Parameter(torch.randn(len(policy.tokenizer), dtype=torch.float64))
    rows, weight = random_rows(policy)
    monkeypatch.setattr(head_pass, "CHUNK_ENTRIES", 9 * len(policy.tokenizer))  # a row or two at a time
    expected = by_torch_func(policy, rows, weight)
    found = GradientMeter(policy).measure(rows, {n: Task(u, weight) for n, u in UNITS.items()})
    for name, units in UNITS.items():
        assert_equal(found[name], of_units(expected, units))


@pytest.mark.parametrize("way", ["checkpointing", "head alone"])
def test_graphs_that_begin_elsewhere(make_model: MakeModel, way: str) -> None:
    policy = make_model("llama", tied=False)
    rows, weight = random_rows(policy)
    task = {"a": Task(UNITS["rows"], weight)}
    whole = GradientMeter(policy).measure(rows, task)["a"]
    if way == "checkpointing":
        policy.model.gradient_checkpointing_enable()
        torch.testing.assert_close(GradientMeter(policy).measure(rows, task)["a"].squared_norm, whole.squared_norm)
        return
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight")
    alone = GradientMeter(policy)
    assert alone.modules.layers == ["lm_head"]
    torch.testing.assert_close(alone.measure(rows, task)["a"].squared_norm[:, 0], whole.squared_norm[:, -1])


def test_a_model_without_trainable_parameters_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(UserError, match="no parameter that trains"):
        GradientMeter(make_model().frozen_copy())


# Objectives


@dataclass(frozen=True)
class Flattened(Objective):
    """DFT with a pull of the whole distribution towards uniform: a full-vocabulary term, with a weight per token."""

    name: ClassVar[str] = "flattened"

    @property
    def requires(self) -> tuple[Input, ...]:
        return (ReferenceLogits(),)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(batch.logp.exp(), logit_weight=2 - batch.logp.exp())

    def logit_term(self, policy_logits: Tensor, reference_logits: Tensor | None, target: Tensor) -> Tensor:
        assert reference_logits is not None
        return -0.3 * policy_logits.log_softmax(1).mean(1)


def buffer_of(policy: Policy) -> OfflineBuffer:
    """Demonstrations, and groups of four samples with a right and a wrong one."""
    rows, _ = random_rows(policy, 2)
    more, _ = random_rows(policy, 3)
    draw = np.random.default_rng(0)
    samples = [
        Trajectory(
            "", "", rows[i // 4].prompt_ids, row.completion_ids, f"p{i // 4}", source="policy",
            reward=float(draw.random() if i % 4 else 1.0) if i % 4 != 1 else 0.0,
            behaviour_logp=(-1 - draw.random(len(row.completion_ids))).tolist(),
            reference_logp=(-1 - draw.random(len(row.completion_ids))).tolist(),
            columns={"answer": "7"}, inputs={"logp of embedded": [-0.5 - i % 2] * len(row.completion_ids)},
        )
        for i, row in enumerate([*more, *rows[:3]])
    ]  # fmt: skip
    experts = [
        Trajectory(
            "", "", row.prompt_ids, row.completion_ids, f"p{i}", reward=0.5 + i % 3,
            behaviour_logp=[-1.0 - i % 2] * len(row.completion_ids),
        )
        for i, row in enumerate(rows)
    ]  # fmt: skip
    return OfflineBuffer.from_trajectories([*experts, *samples])


@pytest.mark.parametrize(
    "name", [*(n for n in list_objectives() if not is_composite(objective_class(n))), "flattened", "shared-ppo"]
)
def test_the_mean_gradient_is_that_of_the_surrogate(make_model: MakeModel, name: str) -> None:
    policy = make_model("gpt2")
    policy.train()
    objective: Objective
    if name == "flattened":
        objective = Flattened()
    elif name == "shared-ppo":
        objective = get_objective("ppo", critic="shared")
        policy.attach(objective.requires)
        nn.init.normal_(policy.get_parameter("modules_of_inputs.value.head.weight"))
    elif name == "otr":
        objective = get_objective(name, temperature=1e-6)  # draws the likeliest token, in whatever order
    else:
        objective = built(name)
    buffer = buffer_of(policy)
    picked, subjects, _ = subjects_of({"x": objective}, buffer, 100, 0, None)
    rows, subject = [buffer[i] for i in picked], subjects["x"]
    statistics, micro = [one for one in objective.requires if one.is_statistic], MicroBatches(100)
    assembler = Assembler(policy, Models(policy, {None: policy}), micro, remember=True)
    scored = weights_of(assembler, subject, score(assembler, rows, statistics, {}, 0, 0))
    found = GradientMeter(policy).measure(rows, {"x": scored.task}, micro)["x"]

    policy.eval()
    own = [rows[i] for i in subject.rows]
    sequences = Sequences.collate([r.prompt_ids for r in own], [r.completion_ids for r in own], policy.device)
    term = objective.logit_term if objective.has_logit_term else None
    scores = policy(sequences, term=term, reference=policy.frozen_copy(), statistics=statistics)
    batch = scored.batch
    live = batch.replace(logp=scores.logp, **scores.of(objective.requires))
    loss = surrogate(objective, live)
    if scores.term is not None:
        weight = 2 - scores.logp.detach().exp() if name == "flattened" else 1
        loss = loss + (weight * scores.term).sum() / batch.mask.sum()
    policy.zero_grad()
    torch.autograd.backward(loss)
    for parameter, p in policy.model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(found.mean[parameter], p.grad, rtol=1e-6, atol=1e-8, msg=parameter)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_the_reported_noise_is_that_of_torch_func(make_model: MakeModel, kind: str, tied: bool) -> None:
    """tr Σ, ‖G‖², cosines and norm ratios of the report, from one gradient per row by torch.func."""
    policy = make_model(kind, tied)
    random, _ = random_rows(policy)
    prompts = [[3 + i, *random[0].prompt_ids] for i in range(12)]  # alike, so that the gradient stands out
    rows = [Trajectory("", "", ids, random[0].completion_ids, str(i)) for i, ids in enumerate(prompts)]
    report = analyze_variance(policy, ["sft", "dft"], OfflineBuffer.from_trajectories(rows), draws=0, token_budget=60)
    n, ones = len(rows), torch.ones(len(rows), len(rows[0].completion_ids), dtype=torch.float64)
    sequences = Sequences.collate([r.prompt_ids for r in rows], [r.completion_ids for r in rows], policy.device)
    with torch.no_grad():
        p = policy(sequences).logp.exp()
    gradients, norms = {}, {}
    for name, weight in (("sft", ones), ("dft", p)):
        by_row = gradients[name] = flat(by_torch_func(policy, rows, weight)) / len(rows[0].completion_ids)
        power, squared = float(by_row.square().sum(1).mean()), float(by_row.mean(0).square().sum())
        norms[name] = gradient_squared_norm(n, power, squared)
        noise = report["objectives"][name]["data_noise"]
        assert noise["trace_cov"]["value"] == pytest.approx(trace_cov(n, power, squared), rel=1e-9)
        assert noise["grad_norm_sq"]["value"] == pytest.approx(norms[name], rel=1e-9)
        assert trace_cov(n, power, squared) == pytest.approx(float(by_row.var(0).sum()), rel=1e-9)
    # over all pairs of different rows, as an unbiased inner product is
    products = gradients["dft"] @ gradients["sft"].T
    inner = float(products.sum() - products.trace()) / (n * (n - 1))
    noise, cosine = report["objectives"]["dft"]["data_noise"], inner / (norms["dft"] * norms["sft"]) ** 0.5
    assert noise["norm_ratio_to_sft"]["value"] == pytest.approx((norms["dft"] / norms["sft"]) ** 0.5, rel=1e-9)
    assert noise["cosine_to_sft"]["value"] == pytest.approx(cosine, rel=1e-2)  # ⟨g, g'⟩ of one row is projected
    assert report["cosines"]["dft"]["sft"] == pytest.approx(noise["cosine_to_sft"])
    assert report["cosines"]["sft"]["dft"] == report["cosines"]["dft"]["sft"]
    assert noise["cosine_to_sft"]["ci_low"] < cosine < noise["cosine_to_sft"]["ci_high"]


@pytest.mark.slow
def test_rows_of_one_prompt_are_one_draw(make_model: MakeModel) -> None:
    """A row four times over under one prompt is no more evidence than once."""
    policy = make_model()
    random, _ = random_rows(policy)
    once = [Trajectory("", "", r.prompt_ids, r.completion_ids, str(i)) for i, r in enumerate(random)]
    apart = [replace(row, prompt_id=f"{row.prompt_id}-{k}") for row in once for k in range(4)]
    one, four, wrong = (
        analyze_variance(policy, ["sft"], OfflineBuffer.from_trajectories(rows), draws=0)["objectives"]["sft"]
        for rows in (once, [row for row in once for _ in range(4)], apart)
    )
    assert (four["rows"], four["prompts"], wrong["prompts"]) == (36, 9, 36)
    assert_close_nested(four["data_noise"], one["data_noise"])
    assert wrong["data_noise"]["grad_norm_sq"]["value"] > one["data_noise"]["grad_norm_sq"]["value"] + 1e-9


def test_objectives_look_at_the_same_prompts(make_model: MakeModel) -> None:
    policy = make_model()
    rows = list(buffer_of(policy))
    rows = [replace(row, prompt_id=row.prompt_id.removeprefix("p")) for row in rows]  # samples of the experts' prompts
    named = {name: get_objective(name) for name in ("sft", "grpo", "dpo")}
    _, subjects, _ = subjects_of(named, OfflineBuffer.from_trajectories(rows), 8, 0, None)
    prompts = {name: set(subject.prompts) for name, subject in subjects.items()}
    assert prompts["grpo"] <= prompts["dpo"] and prompts["grpo"] & prompts["sft"]
    for subject in subjects.values():
        assert sorted(row for own in subject.prompts.values() for row in own) == sorted(subject.rows)


def test_bfloat16_measures_in_float32(make_model: MakeModel) -> None:
    policy = make_model()
    rows, weight = random_rows(policy)
    exact = GradientMeter(policy).measure(rows, {"a": Task(UNITS["rows"], weight)})["a"]
    policy.model.to(torch.bfloat16)
    found = GradientMeter(policy).measure(rows, {"a": Task(UNITS["rows"], weight.float())})["a"]
    assert {m.dtype for m in found.mean.values()} == {torch.float32}
    torch.testing.assert_close(found.squared_norm.sum(1), exact.squared_norm.sum(1), rtol=0.15, atol=0)


@pytest.mark.slow
def test_gradients_are_measured_in_smaller_parts_where_memory_runs_out(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_model()
    rows, weight = random_rows(policy)
    task = {"a": Task(UNITS["rows"], weight)}
    whole = GradientMeter(policy).measure(rows, task, MicroBatches(400))["a"]
    plain, budgets = Measurement.micro_batch, list[int]()

    def limited(self: Measurement, rows: Sequence[Trajectory], batch: Sequence[int]) -> None:
        plain(self, rows, batch)
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Measurement, "micro_batch", limited)
    micro = MicroBatches(400, lambda before, now: budgets.append(now))
    found = GradientMeter(policy).measure(rows, task, micro)["a"]
    assert budgets and budgets == sorted(budgets, reverse=True) and budgets[-1] < 50
    torch.testing.assert_close(found.squared_norm, whole.squared_norm)
    torch.testing.assert_close(found.mean, whole.mean)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_mixed_precision_measures_the_policys_own_gradient(make_model: MakeModel, tied: bool) -> None:
    """What autograd makes of the policy's forward pass in bfloat16, and not of another one in float32."""
    policy = make_model("qwen2", tied)
    policy.model.float()
    rows, weight = random_rows(policy)

    def by_autograd() -> Tensor:
        policy.zero_grad()
        (policy(Sequences.of(rows, policy.device)).logp * weight.float()).sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]) / ROWS

    exact = by_autograd()
    policy.compute = torch.bfloat16
    own, products = by_autograd(), list[torch.dtype]()
    handle = policy.model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda *seen: products.append(seen[2].dtype)
    )
    found = GradientMeter(policy).measure(rows, {"a": Task(UNITS["rows"], weight.float())})["a"]
    handle.remove()
    mean = torch.cat([found.mean[name].flatten() for name, _ in policy.model.named_parameters()])
    assert set(products) == {torch.bfloat16} and mean.dtype == torch.float32
    assert (mean - own).norm() < 0.3 * (exact - own).norm()


@pytest.mark.slow
def test_two_passes_say_what_one_says(make_model: MakeModel) -> None:
    policy = make_model("gpt2")
    buffer, names = buffer_of(policy), ["dft", "dpo", "sft", "grpo", "rft"]
    one, several = (analyze_variance(policy, names, buffer, rows=100, draws=0, means_held=held) for held in (None, 2))
    for name in names:
        for key in ("data_noise", "layers", "proxies"):
            assert_close_nested(several["objectives"][name][key], one["objectives"][name][key])
        assert set(several["cosines"][name]) == ({"sft", "dft"} if name in ("sft", "dft") else {"sft", name})
    assert set(one["cosines"]["dft"]) == set(names)
    with pytest.raises(UserError, match="means_held = 1"):
        analyze_variance(policy, names, buffer, draws=0, means_held=1)


def test_means_are_held_as_memory_allows() -> None:
    small, large = torch.empty(10), torch.empty(2**27, dtype=torch.bfloat16, device="meta")  # 512 MB in float32
    assert default_held([small], 7) == 7 and default_held([large], 4) == 4
    assert default_held([large], 7) == 3 and default_held([large, large], 3) == 3
    assert portions(["a", "x", "b", "c"], "x", 3) == [["x", "a", "b"], ["c"]]
    assert portions(["a", "b", "c"], None, 2) == [["a", "b"], ["c"]]
    assert portions(["x"], "x", 2) == [["x"]]


@pytest.mark.slow
def test_proportional_weights_share_a_backward_pass(make_model: MakeModel) -> None:
    policy = make_model("gpt2")
    rows, weight = random_rows(policy)
    by_row = by_torch_func(policy, rows, weight)
    scale = torch.linspace(-2, 3, ROWS, dtype=torch.float64)[:, None]
    some = torch.zeros(ROWS, 1, dtype=torch.float64).index_fill(0, torch.tensor([2, 5, 7]), 1.0)
    late = torch.zeros(ROWS, 1, dtype=torch.float64).index_fill(0, torch.tensor([0, 1]), 1.0)
    weights = {"some": weight * some, "all": weight * scale, "square": weight.square(), "late": weight * late}
    passes = shared_passes({name: Task(UNITS["rows"], w) for name, w in weights.items()})
    assert [set(shared.scale) for shared in passes] == [{"some", "all", "late"}, {"square"}]
    for shared in passes:
        for name, numbers in shared.scale.items():
            torch.testing.assert_close(numbers[:, None] * shared.weight, weights[name])
    for units in UNITS.values():
        together = GradientMeter(policy).measure(
            rows, {n: Task(units, w) for n, w in weights.items()}, MicroBatches(60)
        )
        for name, w in weights.items():
            alone = GradientMeter(policy).measure(rows, {name: Task(units, w)}, MicroBatches(60))[name]
            torch.testing.assert_close(together[name].squared_norm, alone.squared_norm, rtol=1e-10, atol=1e-15)
            torch.testing.assert_close(together[name].mean, alone.mean, rtol=1e-9, atol=1e-12)
    scaled = {name: g * scale.view(-1, *[1] * (g.ndim - 1)) for name, g in by_row.items()}
    assert_equal(
        GradientMeter(policy).measure(rows, {n: Task(UNITS["rows"], w) for n, w in weights.items()})["all"], scaled
    )


def assert_close_nested(a: Any, b: Any) -> None:
    if isinstance(b, dict):
        assert set(a) == set(b)
        for key in b:
            assert_close_nested(a[key], b[key])
    elif isinstance(b, (float, list)):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-12)
    else:
        assert a == b


def test_named_objectives_are_told_apart() -> None:
    with pytest.raises(UserError, match="'dpo' is given twice"):
        named_objectives([get_objective("dpo"), get_objective("dpo", beta=1.0)])
    with pytest.raises(UserError, match="no objective"):
        named_objectives([])
    assert list(named_objectives({"a": get_objective("dpo"), "b": get_objective("dpo")})) == ["a", "b"]
