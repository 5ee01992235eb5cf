"""Objectives in verl, prime-rl and slime, called as their trainers call a loss, and log-probs of given logits."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from batches import built
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlzoo.errors import UserError
from rlzoo.inputs import Statistic
from rlzoo.integrations import prime_rl, slime, verl
from rlzoo.objective import Objective, get_objective, list_objectives, surrogate
from rlzoo.policy import head
from rlzoo.policy.logits import log_probs_of_logits
from rlzoo.types import Coupling, Selection, TokenBatch

LENGTHS, REWARDS = (5, 3, 6, 2), (1.0, 0.0, 0.5, 0.0)
INDEX = np.array(["a", "a", "b", "b"], dtype=object)


def draw(seed: int = 0) -> dict[str, Tensor]:
    """Tensors [4, 6] of responses of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    logp, noise, advantage = (torch.randn(4, 6, generator=generator) for _ in range(3))
    logp = -logp.abs() - 0.05
    mask = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    return {"logp": logp, "old": logp + 0.3 * noise, "mask": mask, "advantage": advantage[:, :1].expand(4, 6).clone()}


def wanted(objective: Objective, data: dict[str, Tensor], weight: Tensor | None = None) -> Tensor:
    """The gradient of the surrogate in the log-probs, of the batch as a whole."""
    logp = data["logp"].clone().requires_grad_()
    known = {"behaviour_logp": data["old"], "snapshot_logp": data["old"], "reference_logp": data["old"]}
    batch = TokenBatch(logp, data["mask"], advantage=data["advantage"], inputs=known)
    if weight is not None:  # the surrogate is linear in its coefficients
        (plain,) = torch.autograd.grad(surrogate(objective, batch), logp)
        return plain * weight
    (found,) = torch.autograd.grad(surrogate(objective, batch), logp)
    return found


def of_verl(loss: Any, data: dict[str, Tensor], rows: slice, info: dict[str, Any], weight: Tensor | None = None) -> Any:
    """As verl's ppo_loss (verl/workers/utils/losses.py) calls it."""
    logp = data["logp"][rows].clone().requires_grad_()
    config = SimpleNamespace(global_batch_info=info, loss_agg_mode="token-mean")
    pg_loss, pg_metrics = loss(
        old_log_prob=data["old"][rows],
        log_prob=logp,
        advantages=data["advantage"][rows],
        response_mask=data["mask"][rows].to(torch.bool),
        loss_agg_mode=config.loss_agg_mode,
        config=config,
        rollout_is_weights=None if weight is None else weight[rows],
    )
    assert all(isinstance(value, float) for value in pg_metrics.values())
    return torch.autograd.grad(pg_loss, logp)[0]


@pytest.mark.parametrize("name", ["cispo", "gspo", "dr-grpo", "dapo", "rloo"])
def test_verl_has_the_gradient_of_the_whole_batch_over_its_micro_batches(name: str) -> None:
    objective, data = get_objective(name), draw()
    loss, weight = verl.policy_loss(name), torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(of_verl(loss, data, slice(0, 4), {}), wanted(objective, data))
    torch.testing.assert_close(of_verl(loss, data, slice(0, 4), {}, weight), wanted(objective, data, weight))
    # two processes of one micro-batch each, over whose gradients verl averages
    info = {"dp_size": 2, "batch_num_tokens": sum(LENGTHS), "global_batch_size": 4, "loss_scale_factor": None}
    parts = torch.cat([of_verl(loss, data, rows, info) for rows in (slice(0, 2), slice(2, 4))]) / 2
    torch.testing.assert_close(parts, wanted(objective, data))


@pytest.mark.parametrize("name", ["grpo", "rloo", "maxrl", "reinforce-pp"])
def test_verl_gets_the_advantages_of_an_objective(name: str) -> None:
    options = {"kl_coefficient": 0.0} if name in ("grpo", "reinforce-pp") else {}
    objective, mask = get_objective(name, **options), draw()["mask"]
    rewards = torch.zeros(4, 6)
    rewards[torch.arange(4), mask.sum(1) - 1] = torch.tensor(REWARDS)  # at the last token, as verl has them
    found, returns = verl.advantages(name, **options)(
        token_level_rewards=rewards, response_mask=mask.float(), config=None, index=INDEX
    )
    batch = TokenBatch(None, mask, reward=torch.tensor(REWARDS, dtype=torch.float64), group=torch.tensor([0, 0, 1, 1]))
    own = objective.prepare(batch).advantage
    assert own is not None and own.abs().max() > 0
    torch.testing.assert_close(found, torch.where(mask, own, 0))
    assert torch.equal(found, returns)


@dataclass
class LossInputs:
    """As in prime-rl's src/prime_rl/trainer/rl/loss.py."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = field(default=None)


@pytest.mark.parametrize("name", ["cispo", "dapo", "dppo"])
def test_prime_rl_has_the_gradient_of_the_whole_batch_over_its_samples(name: str) -> None:
    data = draw()
    logp = data["logp"].clone().requires_grad_()
    kwargs = {"objective": name}
    total: Any = logp[0].sum() * 0.0
    for place in range(4):
        own = {key: value[place] for key, value in data.items()}
        inputs = LossInputs(logp[place], own["old"], None, own["advantage"], own["mask"])
        result = prime_rl.loss(inputs, **kwargs)
        assert all(value.dim() == 0 for value in result.metrics.values())
        total = total + result.loss
    (found,) = torch.autograd.grad(total / sum(LENGTHS), logp)
    torch.testing.assert_close(found, wanted(get_objective(name), data))


def of_slime(loss: Any, data: dict[str, Tensor], per_token: bool, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """As slime's loss_function (slime/backends/megatron_utils/loss.py) calls it, and as Megatron scales the result."""
    lengths = list(LENGTHS)
    logp = data["logp"].clone().requires_grad_()

    def get_log_probs_and_entropy(
        logits: Tensor, *, args: Any, unconcat_tokens: Any, total_lengths: Any, response_lengths: Any,
        with_entropy: bool = False, non_loss_data: bool = True, top_p_token_ids: Any = None,
        top_p_token_offsets: Any = None,
    ) -> Any:  # fmt: skip
        rows = [row[:length] for row, length in zip(logits[0, :, 0].view(4, 6), response_lengths, strict=True)]
        return torch.empty((0,)), {"log_probs": rows}

    fake: Any = ModuleType("slime.backends.megatron_utils.loss")
    fake.get_log_probs_and_entropy = get_log_probs_and_entropy
    for name in ("slime", "slime.backends", "slime.backends.megatron_utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "slime.backends.megatron_utils.loss", fake)
    setattr(sys.modules["slime.backends.megatron_utils"], "loss", fake)  # noqa: B010 - a module has no such attribute

    def listed(name: str) -> list[Tensor]:
        return [row[:length] for row, length in zip(data[name], lengths, strict=True)]

    masks = [mask.float() for mask in listed("mask")]

    def sum_of_sample_mean(x: Tensor) -> Tensor:
        parts = zip(torch.split(x, lengths), masks, strict=True)
        return torch.stack([(own * mask).sum() / (1 if per_token else mask.sum()) for own, mask in parts]).sum()

    batch = {
        "advantages": listed("advantage"),
        "log_probs": listed("old"),
        "ref_log_probs": listed("old"),
        "loss_masks": masks,
        "unconcat_tokens": None,
        "total_lengths": [n + 2 for n in lengths],
        "response_lengths": lengths,
    }
    args = SimpleNamespace(
        calculate_per_token_loss=per_token, use_rollout_logprobs=False, context_parallel_size=1, loss_type="custom_loss"
    )
    value, log = loss(args, batch, logp.view(1, -1, 1), sum_of_sample_mean)
    torch.tensor([0, *log.values()])  # what slime does with it
    return torch.autograd.grad(value, logp)[0] / (sum(lengths) if per_token else 4)


@pytest.mark.parametrize(
    ("name", "per_token"), [("cispo", True), ("gspo", False), ("grpo", False), ("dr-grpo", False), ("rloo", False)]
)
def test_slime_has_the_gradient_of_the_whole_batch(name: str, per_token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = draw()
    found = of_slime(slime.custom_loss(name), data, per_token, monkeypatch)
    torch.testing.assert_close(found, wanted(get_objective(name), data))
    with pytest.raises(UserError, match=r"averages over .*--calculate-per-token-loss"):
        of_slime(slime.custom_loss(name), data, not per_token, monkeypatch)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: verl.policy_loss("dpo"), "verl: objective 'dpo' learns from pairs"),
        (
            lambda: verl.policy_loss("grpo"),
            "needs 'reference' .Reference., and there is no such value there: set its opt",
        ),
        (lambda: verl.policy_loss("otb"), "Statistic., and the loss gets no logits there"),
        (lambda: verl.policy_loss("ppo"), "Critic., and a module that is trained with the policy has no place there"),
        (lambda: verl.policy_loss("cispo", clip=3), "option"),
        (lambda: slime.custom_loss("otb"), "slime: objective 'otb' needs"),
        (
            lambda: prime_rl.loss(None, "grpo", kl_coefficient=0.0),
            "averages over sequences, and prime-rl divides by tokens",
        ),
        (lambda: prime_rl.loss(None, "reinforce-pp", kl_coefficient=0.0), "computes its advantages otherwise"),
    ],
)
def test_what_a_stack_cannot_serve_is_refused(build: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as raised:
        build()
    assert "\n" not in str(raised.value)


@dataclass(frozen=True)
class OfGroups(Objective):
    name = "of-groups"
    learns_from = Selection.GROUPS
    couples = Coupling.GROUP


@dataclass(frozen=True)
class OfBatch(Objective):
    name = "of-batch"
    learns_from = Selection.GROUPS
    couples = Coupling.BATCH


def test_couplings_of_rows_that_a_stack_spreads_are_refused() -> None:
    with pytest.raises(UserError, match="couples the samples of a prompt, which are spread over micro-batches there"):
        verl.policy_loss(OfGroups())
    for export in (verl.policy_loss, slime.custom_loss):
        with pytest.raises(UserError, match="may depend on all rows of the optimizer batch"):
            export(OfBatch())


def test_every_objective_is_either_served_or_refused_in_one_line() -> None:
    served = set()
    for name in list_objectives():
        try:
            verl.policy_loss(built(name))
            served.add(name)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
    assert {"cispo", "gspo", "dapo", "rloo", "sapo", "vespo", "dppo", "topr"} <= served
    assert not served & {"sft", "dpo", "ppo", "mixture", "kto"}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["eaft", "gift", "otr"])
def test_log_probs_of_given_logits_are_those_of_the_head(
    name: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks that each see a part, with the same random numbers in the value and in the gradient."""
    monkeypatch.setattr(head, "CHUNK_ENTRIES", 4 * 11)
    torch.manual_seed(0)
    logits, target, index = torch.randn(17, 11, dtype=torch.float64), torch.randint(11, (10,)), torch.randperm(17)[:10]
    reference, objective = torch.randn(10, 11, dtype=torch.float64), get_objective(name)
    term = objective.logit_term if objective.has_logit_term else None
    statistics = [Statistic("entropy"), Statistic("square_mass")]

    def run(chunked: bool) -> tuple[dict[str, Tensor], Tensor]:
        leaf = logits.clone().requires_grad_()
        torch.manual_seed(1)
        if chunked:
            found = log_probs_of_logits(
                leaf, index, target, temperature=temperature, statistics=statistics, term=term,
                reference=(lambda hidden: hidden, reference),
            )  # fmt: skip
        else:
            z = leaf[index] / temperature
            found = {"logp": z.log_softmax(1).gather(1, target[:, None])[:, 0]}
            found |= {one.key: one.of_logits(z.detach(), target) for one in statistics}
            if term is not None:
                parts = zip(*(torch.split(x, 4) for x in (z, reference / temperature, target)), strict=True)
                values = [term(*part) for part in parts]
                found["term"] = torch.cat([value for value in values if value is not None])
        pull = torch.linspace(-1, 2, 10, dtype=torch.float64)
        loss = (found["logp"] * pull).sum() + (found["term"] * pull).sum() if term else (found["logp"] * pull).sum()
        return found, torch.autograd.grad(loss, leaf)[0]

    (found, gradient), (plain, expected) = run(True), run(False)
    assert found.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(found[key], value)
        assert found[key].requires_grad == (key in ("logp", "term"))
    torch.testing.assert_close(gradient, expected)


def test_the_page_registers_a_loss_with_verl_and_makes_one_for_slime(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[str, Any] = {}
    core: Any = ModuleType("verl.trainer.ppo.core_algos")
    core.register_policy_loss = lambda name: lambda loss: registered.update({f"loss {name}": loss})
    core.register_adv_est = lambda name: lambda loss: registered.update({f"advantages {name}": loss})
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.core_algos", core)
    page = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text(encoding="utf-8")
    blocks = [
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "verl" in block or "slime" in block
    ]
    for block in blocks:
        exec(block, names := dict[str, Any]())
    data = draw()
    found = of_verl(registered["loss rlzoo-cispo"], data, slice(0, 4), {})
    torch.testing.assert_close(found, wanted(get_objective("cispo"), data))
    assert len(blocks) == 2 and callable(registered["advantages rlzoo-cispo"]) and callable(names["loss"])
    (settings,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    own = tomllib.loads(settings)["trainer"]["loss"]
    module, _, attribute = own["import_path"].rpartition(".")
    first = {name: value[0] for name, value in data.items()}
    inputs = LossInputs(first["logp"], first["old"], None, first["advantage"], first["mask"])
    assert torch.isfinite(getattr(importlib.import_module(module), attribute)(inputs, **own["kwargs"]).loss)


def test_no_wide_copy_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_ENTRIES", 4 * 11)
    widest = 0

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal widest
            found = function(*args, **(kwargs or {}))
            for value in found if isinstance(found, (tuple, list)) else [found]:
                if isinstance(value, Tensor) and value.dtype == torch.float32:
                    widest = max(widest, value.numel())
            return found

    logits = torch.randn(64, 11).bfloat16().requires_grad_()
    with Watch():  # type: ignore[no-untyped-call]
        found = log_probs_of_logits(logits, torch.arange(64), torch.zeros(64, dtype=torch.long))["logp"]
        (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.dtype == torch.bfloat16 and found.dtype == torch.float32
    assert 4 * 11 <= widest <= 64
