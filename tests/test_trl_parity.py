"""TRL's own losses as the oracle: the same model and rows give the same loss and the same gradient.

TRL's methods run unbound, with a namespace of the attributes that they read in place of a trainer. TRL sees
padded sequences, as its collators make them; our log-probs are a plain log-softmax of each row by itself.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from rlzoo.objective import Objective, get_objective, list_objectives, objective_class, reduce, surrogate
from rlzoo.types import TokenBatch

TRL = "TRL 1.16"
trl = pytest.importorskip("trl", reason=f"the parity tests need {TRL}")
if not trl.__version__.startswith("1.16."):
    pytest.skip(f"the parity tests are written for {TRL}, not {trl.__version__}", allow_module_level=True)

from transformers.trainer_pt_utils import LabelSmoother  # noqa: E402
from trl import (  # noqa: E402 - only once trl is known to be there
    DPOConfig,
    DPOTrainer,
    GRPOTrainer,
    RLOOTrainer,
    SFTTrainer,
)
from trl.trainer.utils import add_fused_lm_head, nanstd  # noqa: E402

VOCABULARY, ROWS, GROUP_SIZE = 64, 8, 4
PROMPT_LENGTHS, COMPLETION_LENGTHS = (3, 5, 2, 7, 4, 4, 1, 6), (6, 1, 9, 4, 2, 7, 3, 5)


@dataclass(frozen=True)
class World:
    """A policy, a reference with other weights, and rows of prompt and completion ids."""

    policy: Any
    reference: Any
    prompts: list[Tensor]
    completions: list[Tensor]

    def logp(self, model: Any) -> Tensor:
        """log π(y_t | x, y_<t) of each row by itself, without padding; [B, T], 0 after the row's end."""
        rows = []
        for prompt, completion in zip(self.prompts, self.completions, strict=True):
            logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
            rows.append(logits.log_softmax(-1)[torch.arange(len(completion)), completion])
        return pad_sequence(rows, batch_first=True)

    def batch(self, **columns: Any) -> TokenBatch:
        mask = pad_sequence([torch.ones_like(c, dtype=torch.bool) for c in self.completions], batch_first=True)
        return TokenBatch(self.logp(self.policy), mask, **columns)

    def reference_logp(self) -> Tensor:
        with torch.no_grad():
            return self.logp(self.reference)

    def joined(self) -> dict[str, Tensor]:
        """Prompt and completion as one sequence, padded on the right, and where the completion is."""
        pairs = list(zip(self.prompts, self.completions, strict=True))
        padded = partial(pad_sequence, batch_first=True)
        return {
            "input_ids": padded([torch.cat(pair) for pair in pairs]),
            "attention_mask": padded([torch.ones(len(p) + len(c), dtype=torch.long) for p, c in pairs]),
            "completion_mask": padded([torch.cat([0 * p, 0 * c + 1]) for p, c in pairs]),
        }

    def apart(self) -> dict[str, Tensor]:
        """Prompts padded on the left, completions on the right."""
        left, right = (partial(pad_sequence, batch_first=True, padding_side=side) for side in ("left", "right"))
        return {
            "prompt_ids": left(self.prompts),
            "prompt_mask": left([torch.ones_like(p) for p in self.prompts]),
            "completion_ids": right(self.completions),
            "completion_mask": right([torch.ones_like(c) for c in self.completions]),
        }


def small_model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,  # far from uniform, so that ratios and weights differ from 1
    )
    model = LlamaForCausalLM(config)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model.train()


@pytest.fixture
def world() -> World:
    policy, reference = small_model(0), small_model(1)
    draw = partial(torch.randint, 1, VOCABULARY, generator=torch.Generator().manual_seed(2))
    prompts = [draw((length,)) for length in PROMPT_LENGTHS]
    return World(policy, reference.eval(), prompts, [draw((length,)) for length in COMPLETION_LENGTHS])


def trainer(model: Any, **attributes: Any) -> SimpleNamespace:
    """What TRL's losses read of ``self``: one process, no accumulation, no auxiliary loss, no logging."""

    def same(values: Any, **_: Any) -> Any:
        return values

    accelerator = SimpleNamespace(
        gather=same,
        gather_for_metrics=same,
        reduce=same,
        autocast=nullcontext,
        device=torch.device("cpu"),
        parallelism_config=None,
        num_processes=1,
        is_main_process=True,
    )
    return SimpleNamespace(
        model=model,
        accelerator=accelerator,
        state=SimpleNamespace(global_step=0),
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def trl_sft(world: World, loss_type: str, smoothing: float = 0.0) -> Tensor:
    inputs = world.joined()
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs.pop("completion_mask") == 0, -100)
    args = SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=True)
    smoother = LabelSmoother(epsilon=smoothing) if smoothing else None
    this = trainer(world.policy, args=args, compute_loss_func=None, label_smoother=smoother)
    loss: Tensor = SFTTrainer.compute_loss(this, world.policy, inputs)
    return loss


def trl_dpo(world: World, losses: Mapping[str, float], beta: float, **options: Any) -> Tensor:
    """TRL's preference losses and their weights; ``options`` as in its `DPOConfig`."""
    this = trainer(
        world.policy,
        ref_model=world.reference,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=options.pop("discopop_tau", 0.05)),
        ld_alpha=None,
        precompute_ref_logps=False,
        loss_types=list(losses),
        loss_weights=list(losses.values()),
        beta=beta,
        use_weighting=False,
        **{"f_divergence_type": "reverse_kl", "label_smoothing": 0.0, **options},
    )
    loss: Tensor = DPOTrainer._compute_loss(this, world.policy, world.joined(), return_outputs=False)
    return loss


BUDGET = 16
"""The constant of TRL's Dr. GRPO, which no completion of these rows reaches."""


def trl_grpo(
    world: World,
    loss_type: str,
    beta: float,
    clip: float,
    clip_high: float | None = None,
    level: str = "token",
    args: Mapping[str, Any] | None = None,
    **inputs: Tensor,
) -> Tensor:
    own = {"use_bias_correction_kl": False, "delta": None, "report_to": [], "steps_per_generation": 1, **(args or {})}
    this = trainer(
        world.policy,
        args=SimpleNamespace(**own),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        use_vllm=False,
        loss_type=loss_type,
        beta=beta,
        epsilon_low=clip,
        epsilon_high=clip if clip_high is None else clip_high,
        max_completion_length=BUDGET,
        _entropy_bonus_enabled=False,
    )
    inputs["num_items_in_batch"] = torch.tensor(sum(map(len, world.completions)))
    this._get_per_token_logps_and_entropies = partial(GRPOTrainer._get_per_token_logps_and_entropies, this)
    this.get_gamma_weights = GRPOTrainer.get_gamma_weights
    loss: Tensor = GRPOTrainer._compute_loss(this, world.policy, world.apart() | inputs)
    return loss


def trl_rloo(world: World, clip: float, **inputs: Tensor) -> Tensor:
    this = trainer(world.policy, epsilon_low=clip, epsilon_high=clip)
    this._get_per_token_logps_and_entropies = partial(RLOOTrainer._get_per_token_logps_and_entropies, this)
    loss: Tensor = RLOOTrainer._compute_loss(this, world.policy, world.apart() | inputs)
    return loss


def gradient(loss: Tensor, model: Any) -> Tensor:
    parameters = list(model.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()


def assert_parity(objective: Objective, batch: TokenBatch, world: World, theirs: Tensor) -> None:
    """Loss equal to 1e-5 relative; gradients of one direction (cosine ≥ 0.99999) and one length."""
    assert objective.compared_with.startswith(TRL), f"give {objective.name!r} compared_with = {TRL!r}"
    ours = surrogate(objective, batch)
    reported = objective.coefficients(batch.detach()).loss
    if reported is None:
        value = ours.item()
    else:
        value = reduce(reported, batch, objective.normaliser, objective.normaliser.denominator(batch)).item()
    assert value == pytest.approx(theirs.item(), rel=1e-5)
    assert_one_gradient(ours, world, theirs)


def assert_one_gradient(ours: Tensor, world: World, theirs: Tensor) -> None:
    our_gradient, their_gradient = gradient(ours, world.policy), gradient(theirs, world.policy)
    assert their_gradient.norm() > 1e-4
    assert torch.cosine_similarity(our_gradient, their_gradient, dim=0) >= 0.99999
    assert our_gradient.norm().item() == pytest.approx(their_gradient.norm().item(), rel=1e-4)


def test_objectives_that_the_docs_call_compared_are_compared_here() -> None:
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    said = {name: objective_class(name).compared_with for name in list_objectives()}
    for name, implementation in said.items():
        assert not implementation or (name in named and implementation.startswith(TRL)), name


@pytest.mark.parametrize(("name", "loss_type"), [("sft", "nll"), ("dft", "dft")])
def test_supervised(world: World, name: str, loss_type: str) -> None:
    assert_parity(get_objective(name), world.batch(), world, trl_sft(world, loss_type))


def test_label_smoothing(world: World) -> None:
    objective, batch = get_objective("sft", label_smoothing=0.2), world.batch()
    rows = zip(world.prompts, world.completions, strict=True)
    logits = [world.policy(torch.cat(row)[None]).logits[0, len(row[0]) - 1 : -1] for row in rows]
    terms = [objective.logit_term(z, None, y) for z, y in zip(logits, world.completions, strict=True)]
    ours = surrogate(objective, batch) + torch.cat([torch.as_tensor(term) for term in terms]).mean()
    theirs = trl_sft(world, "nll", 0.2)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert_one_gradient(ours, world, theirs)


SMOOTHING = {"label_smoothing": 0.1}
OF_PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ("dpo", {}, {}),
    "hinge": ("dpo", {"variant": "hinge"}, {}),
    "ipo": ("dpo", {"variant": "ipo"}, {}),
    "sigmoid_norm": ("dpo", {"variant": "sigmoid_norm"}, {}),
    "robust": ("dpo", {"variant": "robust", **SMOOTHING}, SMOOTHING),
    "exo_pair": ("exo", SMOOTHING, SMOOTHING),
    "nca_pair": ("nca", {}, {}),
    "bco_pair": ("bco", {"shift": "none"}, {}),
    "sppo_hard": ("sppo", {}, {}),
    "apo_zero": ("apo", {}, {}),
    "apo_down": ("apo", {"variant": "down"}, {}),
    "aot": ("aot", SMOOTHING, SMOOTHING),
    "aot_unpaired": ("aot", {"variant": "unpaired", **SMOOTHING}, SMOOTHING),
    "discopop": ("discopop", {"tau": 0.3}, {"discopop_tau": 0.3}),
}
"""TRL's loss: the objective, its options, and TRL's."""


def pairs_with_reference(world: World) -> TokenBatch:
    """TRL puts the better halves of all pairs first."""
    return pairs_of(world).replace(reference_logp=world.reference_logp())


def test_all_of_trls_preference_losses_are_compared() -> None:
    described = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert {*OF_PAIRS, "sft"} == set(re.findall(r"`'(\w+)'`", described))


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("loss_type", OF_PAIRS)
def test_preference(world: World, loss_type: str, beta: float) -> None:
    name, options, settings = OF_PAIRS[loss_type]
    theirs = trl_dpo(world, {loss_type: 1.0}, beta, **settings)
    assert_parity(get_objective(name, beta=beta, **options), pairs_with_reference(world), world, theirs)


@pytest.mark.parametrize(
    ("divergence", "type_"), [("forward_kl", "forward_kl"), ("js", "js_divergence"), ("alpha", "alpha_divergence")]
)
@pytest.mark.parametrize("variant", ["sigmoid", "sigmoid_norm", "hinge", "ipo"])
def test_preference_with_another_divergence(world: World, variant: str, divergence: str, type_: str) -> None:
    options = {"variant": variant, "divergence": divergence, "divergence_alpha": 0.3, "beta": 0.5}
    theirs = trl_dpo(world, {variant: 1.0}, 0.5, f_divergence_type=type_, f_alpha_divergence_coef=0.3)
    assert_parity(get_objective("dpo", **options), pairs_with_reference(world), world, theirs)


def test_preference_with_supervision(world: World) -> None:
    # TRL averages over the tokens of all better completions, the paper over those of each: the same for one length.
    same = replace(world, completions=[tokens.repeat(4)[:4] for tokens in world.completions])
    theirs = trl_dpo(same, {"sigmoid": 1.0, "sft": 0.7}, 0.1)
    assert_parity(get_objective("dpo", sft_coefficient=0.7), pairs_with_reference(same), same, theirs)


def off_policy(world: World) -> TokenBatch:
    """A batch whose behaviour policy is a noisy copy of the policy: ρ on both sides of 1 ± 0.2."""
    batch = world.batch(reference_logp=world.reference_logp())
    noise = torch.randn(batch.logp.shape, generator=torch.Generator().manual_seed(3))
    return batch.replace(behaviour_logp=batch.logp.detach() + 0.5 * noise)


def assert_clipped_on_both_sides(objective: Objective, batch: TokenBatch) -> None:
    advantage, behaviour = objective.needed(batch, "advantage", "behaviour_logp")
    ratio = (batch.logp - behaviour).detach().exp()
    for side in (batch.mask & (advantage > 0) & (ratio > 1.2), batch.mask & (advantage < 0) & (ratio < 0.8)):
        assert 0 < side.sum() < batch.mask.sum() / 2


@pytest.mark.parametrize("beta", [0.0, 0.04, 0.5])
def test_group_relative(world: World, beta: float) -> None:
    reward = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0])
    objective = get_objective("grpo", kl_coefficient=beta)
    batch = replace(off_policy(world), reward=reward, group=torch.arange(ROWS) // GROUP_SIZE)
    batch = objective.prepare(batch)
    assert_clipped_on_both_sides(objective, batch)
    grouped = reward.view(-1, GROUP_SIZE)
    advantages = (grouped - grouped.mean(1, keepdim=True)) / (nanstd(grouped, dim=1)[:, None] + 1e-4)
    assert batch.behaviour_logp is not None and batch.reference_logp is not None
    theirs = trl_grpo(
        world,
        "grpo",
        beta,
        0.2,
        advantages=advantages.flatten(),
        old_per_token_logps=batch.behaviour_logp,
        ref_per_token_logps=batch.reference_logp,
    )
    assert_parity(objective, batch, world, theirs)


def test_group_relative_on_its_own_samples(world: World) -> None:
    # ρ = 1: TRL detaches its own log-probs when it is given none.
    advantages = torch.tensor([1.5, -0.5, 2.0, 0.25, -1.0, 0.0, 0.5, 0.75])
    batch = world.batch()
    batch = batch.replace(behaviour_logp=batch.logp.detach(), advantage=advantages[:, None].expand_as(batch.logp))
    theirs = trl_grpo(world, "grpo", 0.0, 0.2, advantages=advantages)
    assert_parity(get_objective("grpo", kl_coefficient=0.0), batch, world, theirs)


def test_clipped_surrogate_with_an_advantage_a_token(world: World) -> None:
    batch = off_policy(world)
    advantage = torch.randn(batch.logp.shape, generator=torch.Generator().manual_seed(4))
    batch = replace(batch, advantage=advantage)
    assert batch.behaviour_logp is not None
    assert_clipped_on_both_sides(get_objective("ppo"), batch)
    theirs = trl_grpo(world, "bnpo", 0.0, 0.2, advantages=advantage, old_per_token_logps=batch.behaviour_logp)
    assert_parity(get_objective("ppo"), batch, world, theirs)


REWARD = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0])
OF_GROUPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dr-grpo": ({"clip": 0.2, "max_length": BUDGET}, {"loss_type": "dr_grpo", "clip": 0.2}),
    "dapo": ({"clip_low": 0.2, "clip_high": 0.28}, {"loss_type": "dapo", "clip": 0.2, "clip_high": 0.28}),
    "dapo-as-bnpo": ({"clip_low": 0.1, "clip_high": 0.3}, {"loss_type": "bnpo", "clip": 0.1, "clip_high": 0.3}),
    "gspo": (
        {"clip_low": 0.1, "clip_high": 0.1},
        {"loss_type": "grpo", "clip": 0.1, "level": "sequence"},
    ),
    "gspo-tight": ({}, {"loss_type": "grpo", "clip": 3e-4, "clip_high": 4e-4, "level": "sequence"}),
    "cispo": ({"ratio_max": 1.2}, {"loss_type": "cispo", "clip": 0.2, "clip_high": 1.2}),
}


def centred(reward: Tensor, divide: bool) -> Tensor:
    """TRL's advantages, with scale_rewards = group or none."""
    grouped = reward.view(-1, GROUP_SIZE)
    difference = grouped - grouped.mean(1, keepdim=True)
    return (difference / (nanstd(grouped, dim=1)[:, None] + 1e-4) if divide else difference).flatten()


@pytest.mark.parametrize("name", OF_GROUPS)
def test_variants_of_group_relative(world: World, name: str) -> None:
    options, settings = OF_GROUPS[name]
    objective = get_objective(name.removesuffix("-as-bnpo").removesuffix("-tight"), **options)
    batch = replace(off_policy(world), reward=REWARD, group=torch.arange(ROWS) // GROUP_SIZE)
    batch = objective.prepare(batch)
    clipped = objective.coefficients(batch.detach()).metrics["clipped"][batch.mask]
    assert 0 < clipped.sum() < len(clipped)
    assert batch.behaviour_logp is not None
    theirs = trl_grpo(
        world,
        beta=0.0,
        advantages=centred(REWARD, divide=name != "dr-grpo"),
        old_per_token_logps=batch.behaviour_logp,
        **settings,
    )
    assert_parity(objective, batch, world, theirs)


def test_dapo_is_trl_on_the_groups_that_vary(world: World) -> None:
    # TRL has no dynamic sampling: it is given the first group alone, whose tokens are then all that it counts.
    reward = torch.cat([REWARD[:GROUP_SIZE], torch.ones(GROUP_SIZE)])
    objective = get_objective("dapo")
    batch = objective.prepare(replace(off_policy(world), reward=reward, group=torch.arange(ROWS) // GROUP_SIZE))
    part = replace(world, prompts=world.prompts[:GROUP_SIZE], completions=world.completions[:GROUP_SIZE])
    assert batch.behaviour_logp is not None
    theirs = trl_grpo(
        part,
        "dapo",
        0.0,
        0.2,
        clip_high=0.28,
        advantages=centred(reward[:GROUP_SIZE], divide=True),
        old_per_token_logps=batch.behaviour_logp[:GROUP_SIZE],
    )
    assert_parity(objective, batch, world, theirs)


VESPO = {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
OPTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sapo": ("sapo", {}, {"args": {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}}),
    "vespo": ("vespo", {}, {"args": VESPO}),
    "token": ("grpo", {"aggregation": "token"}, {"loss_type": "dapo"}),
    "bnpo": ("grpo", {"aggregation": "token", "clip_high": 0.3}, {"loss_type": "bnpo", "clip_high": 0.3}),
    "constant": ("grpo", {"aggregation": "constant", "max_length": BUDGET}, {"loss_type": "dr_grpo"}),
    "batch": ("grpo", {"scale_rewards": "batch"}, {}),
    "none": ("grpo", {"scale_rewards": "none"}, {}),
    "delta": ("grpo", {"delta": 1.4}, {"args": {"delta": 1.4}}),
    "sequence": ("grpo", {"level": "sequence"}, {"level": "sequence"}),
    "luspo": (
        "grpo",
        {"level": "sequence", "aggregation": "constant", "max_length": 1},
        {"loss_type": "luspo", "level": "sequence"},
    ),
    "kl-correction": (
        "grpo",
        {"kl_coefficient": 0.5, "kl_correction": True},
        {"beta": 0.5, "args": {"use_bias_correction_kl": True}},
    ),
    "constant-kl": (
        "grpo",
        {"kl_coefficient": 0.5, "aggregation": "constant", "max_length": BUDGET},
        {"beta": 0.5, "loss_type": "dr_grpo"},
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_group_relative(world: World, option: str) -> None:
    name, options, settings = OPTIONS[option]
    objective = get_objective(name, **{"kl_coefficient": 0.0, **options} if name == "grpo" else options)
    flat = torch.cat([REWARD[:GROUP_SIZE], torch.ones(GROUP_SIZE)])  # a group of equal rewards counts its tokens
    reward = flat if option in ("token", "batch") else REWARD
    batch = objective.prepare(replace(off_policy(world), reward=reward, group=torch.arange(ROWS) // GROUP_SIZE))
    assert batch.behaviour_logp is not None and batch.reference_logp is not None
    advantages = centred(reward, divide=option not in ("batch", "none"))
    if option == "batch":
        advantages = advantages / (nanstd(reward) + 1e-4)
    theirs = trl_grpo(
        world,
        **{"beta": 0.0, "clip": 0.2, "loss_type": name, **settings},
        advantages=advantages,
        old_per_token_logps=batch.behaviour_logp,
        ref_per_token_logps=batch.reference_logp,
    )
    assert_parity(objective, batch, world, theirs)


def test_truncated_completions_are_masked_as_in_trl(world: World) -> None:
    # their rewards count in their groups, they count as sequences, and their tokens do not count
    truncated = torch.arange(ROWS) % 3 == 0
    for aggregation, loss_type in (("sequence", "grpo"), ("token", "bnpo")):
        objective = get_objective("grpo", kl_coefficient=0.0, truncated="mask", aggregation=aggregation)
        batch = replace(off_policy(world), reward=REWARD, group=torch.arange(ROWS) // GROUP_SIZE)
        batch = objective.prepare(batch.replace(mask=batch.mask & ~truncated[:, None]))
        assert batch.behaviour_logp is not None
        theirs = trl_grpo(
            world,
            loss_type,
            0.0,
            0.2,
            advantages=centred(REWARD, divide=True),
            old_per_token_logps=batch.behaviour_logp,
            completion_mask=world.apart()["completion_mask"] * ~truncated[:, None],
        )
        assert_parity(objective, batch, world, theirs)


@pytest.mark.parametrize("beta", [1e-3, 0.3])
def test_optimal_advantage_regression(world: World, beta: float) -> None:
    from trl.experimental.a2po import A2POTrainer

    reference = world.reference_logp()
    objective = get_objective("a-star-po", beta=beta)
    batch = world.batch(reference_logp=reference, reward=REWARD, group=torch.arange(ROWS) // GROUP_SIZE)
    values = 0.5 * (REWARD.view(-1, GROUP_SIZE) / 0.5).exp().mean(1).log()  # as TRL estimates them, in its first stage
    apart = world.apart()
    inputs = {
        "input_ids": torch.cat([apart["prompt_ids"], apart["completion_ids"]], 1),
        "attention_mask": torch.cat([apart["prompt_mask"], apart["completion_mask"]], 1),
        "logits_to_keep": apart["completion_ids"].shape[1],
        "ref_logps": reference.sum(1),
        "rewards": REWARD,
        "v_star": values.repeat_interleave(GROUP_SIZE),
    }
    this = trainer(world.policy, args=SimpleNamespace(beta2=beta), model_kwarg_keys=())
    this._get_sequence_logps = partial(A2POTrainer._get_sequence_logps, this)
    theirs = A2POTrainer.compute_loss(this, world.policy, inputs)
    assert_parity(objective, objective.prepare(batch), world, theirs)


def test_leave_one_out(world: World) -> None:
    # TRL's loss is a ratio of sequences, 1 on the policy's own samples: another value than ours, the same gradient.
    grouped = REWARD.view(-1, GROUP_SIZE)
    advantages = REWARD - (grouped.sum(1, keepdim=True) - grouped).flatten() / (GROUP_SIZE - 1)
    batch = replace(world.batch(), reward=REWARD, group=torch.arange(ROWS) // GROUP_SIZE)
    theirs = trl_rloo(world, 0.2, advantages=advantages, old_logps=batch.logp.detach().sum(1))
    assert_one_gradient(surrogate(get_objective("rloo"), batch), world, theirs)


def beside(world: World) -> dict[str, Tensor]:
    """Pairs as the CPO and ORPO trainers take them: the better half of the rows, and the worse half."""
    found = world.joined()
    found["labels"] = found["input_ids"].masked_fill(found.pop("completion_mask") == 0, -100)
    half = ROWS // 2
    halves = {"chosen": slice(0, half), "rejected": slice(half, ROWS)}
    return {f"{side}_{name}": value[rows] for side, rows in halves.items() for name, value in found.items()}


def pairs_of(world: World) -> TokenBatch:
    half = ROWS // 2
    return world.batch(partner=torch.arange(ROWS).roll(half), chosen=torch.arange(ROWS) < half)


def trl_beside(which: Any, world: World, **attributes: Any) -> Tensor:
    this = trainer(world.policy, is_encoder_decoder=False, pad_token_id=0, padding_value=0, **attributes)
    for name in ("concatenated_inputs", "get_batch_logps"):
        setattr(this, name, getattr(which, name))
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(which, name):
            setattr(this, name, partial(getattr(which, name), this))
    loss: Tensor = which.get_batch_loss_metrics(this, world.policy, beside(world))[0]
    return loss


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.0), (0.5, 0.0)])
def test_simple_preference(world: World, beta: float, gamma: float) -> None:
    from trl.experimental.cpo import CPOTrainer

    options = {"loss_type": "simpo", "alpha": 0.0, "cpo_alpha": 0.0, "label_smoothing": 0.0}
    theirs = trl_beside(CPOTrainer, world, beta=beta, simpo_gamma=gamma, **options)
    assert_parity(get_objective("simpo", beta=beta, gamma=gamma), pairs_of(world), world, theirs)


@pytest.mark.parametrize("lam", [0.1, 2.0])
def test_odds_ratio(world: World, lam: float) -> None:
    # TRL's SFT loss is a mean over all tokens of the better halves, prompts included. With prompts of one token, which
    # nothing predicts, and better completions of one length that is the mean over completions of ours.
    from trl.experimental.orpo import ORPOTrainer

    draw = partial(torch.randint, 1, VOCABULARY, generator=torch.Generator().manual_seed(5))
    lengths = (*[5] * (ROWS // 2), *COMPLETION_LENGTHS[ROWS // 2 :])
    even = replace(world, prompts=[draw((1,)) for _ in range(ROWS)], completions=[draw((n,)) for n in lengths])
    assert_parity(get_objective("orpo", lam=lam), pairs_of(even), even, trl_beside(ORPOTrainer, even, beta=lam))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.5)])
@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("swapped", [False, True])
def test_unpaired_preference(world: World, swapped: bool, beta: float, weights: tuple[float, float]) -> None:
    from trl import KTOTrainer

    if swapped:  # then the mismatched log-ratio has the other sign
        world = replace(world, policy=world.reference.train(), reference=world.policy.eval())
    label = torch.tensor([True, False, True, True, False, False, True, False])
    mixed = replace(world, completions=[world.completions[-1], *world.completions[:-1]])  # as TRL rotates them
    this = trainer(
        world.policy,
        ref_model=world.reference,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        calculate_KL=True,
        precompute_ref_logps=False,
        loss_type="kto",
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    this._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, this)
    inputs = {**world.joined(), **{f"KL_{k}": v for k, v in mixed.joined().items()}, "label": label}
    theirs = KTOTrainer._compute_loss(this, world.policy, inputs, return_outputs=False)
    with torch.no_grad():
        divergence = (mixed.logp(world.policy) - mixed.logp(world.reference)).sum(1).mean()
    batch = world.batch(reference_logp=world.reference_logp(), reward=label.float(), mismatched=divergence.expand(ROWS))
    assert (divergence > 0) == swapped
    assert this._metrics["train"]["kl"] == [pytest.approx(max(divergence.item(), 0.0), rel=1e-5)]
    objective = get_objective("kto", beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1])
    assert_parity(objective, batch, world, theirs)


def trl_sdft(world: World, teacher: Any, told: list[Tensor], cap: float | None, behaviour: Tensor) -> Tensor:
    """TRL's loss on sampled tokens, of a teacher with other prompts."""
    from trl.experimental.sdft import SDFTTrainer

    args = SimpleNamespace(
        distillation_mode="sampled_token", distillation_alpha=1.0, distillation_is_clip=cap, teacher_model_kind="ema"
    )
    this = trainer(world.policy, args=args, temperature=1.0, num_loss_tokens_to_skip=0, model_kwarg_keys=())
    for name in ("_forward_logits", "_get_teacher_context_for_self_distillation"):
        setattr(this, name, partial(getattr(SDFTTrainer, name), this))
    this._log_self_distillation_metric = lambda *_: None
    other = replace(world, prompts=told).apart()
    inputs = world.apart() | {"old_per_token_logps": behaviour}
    for kind in ("ids", "mask"):
        whole = torch.cat([other[f"prompt_{kind}"], other[f"completion_{kind}"]], dim=1)
        inputs[{"ids": "teacher_input_ids", "mask": "teacher_attention_mask"}[kind]] = whole
    logits = SDFTTrainer._compute_teacher_student_logits(this, world.policy, teacher, inputs)
    loss: Tensor = SDFTTrainer._compute_self_distillation_loss(this, world.policy, inputs, logits)
    return loss


@pytest.mark.parametrize("cap", [None, 1.2, 2.0])
@pytest.mark.parametrize("own", [True, False], ids=["live", "initial"])
def test_self_distillation(world: World, own: bool, cap: float | None) -> None:
    teacher = world.policy if own else world.reference
    told = [torch.cat([prompt, prompt.flip(0), prompt[:1]]) for prompt in world.prompts]
    with torch.no_grad():
        privileged = replace(world, prompts=told).logp(teacher)
    batch = off_policy(world).replace(privileged_logp=privileged)
    theirs = trl_sdft(world, teacher, told, cap, batch.behaviour_logp)
    assert_parity(get_objective("sdft", ratio_max=cap), batch, world, theirs)


def test_on_policy_distillation(world: World) -> None:
    from trl.experimental.iw_opd import IWOPDTrainer

    this = trainer(world.policy, temperature=1.0, iw_opd_gamma=0.0, iw_opd_epsilon=1e-8)
    apart, size = world.apart(), max(map(len, world.completions))
    ids, mask = (torch.cat([apart[f"prompt_{kind}"], apart[f"completion_{kind}"]], dim=1) for kind in ("ids", "mask"))
    logits = world.policy(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    batch = world.batch(teacher_logp=world.reference_logp())
    labels = torch.where(batch.mask, apart["completion_ids"], -100)
    theirs = IWOPDTrainer._compute_iw_opd_loss(
        this, logits[:, -size - 1 : -1], apart["completion_ids"], labels, batch.teacher_logp
    )
    # TRL takes log π_T - log π, detached, times log π, and so do we: the value of the loss is the same as well
    assert_parity(get_objective("opd", teacher="x", ratio_max=None), batch, world, theirs)
