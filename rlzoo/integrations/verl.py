"""Any objective over groups as a policy loss of verl, with its advantages.

The signatures are those with which verl 0.10.0.dev calls them (commit 1dda039, 2026-08-22): ``ppo_loss`` in
verl/workers/utils/losses.py and ``compute_advantage`` in verl/trainer/ppo/ray_trainer.py. verl does not install here;
the tests call both functions as these two do. In a module that ``actor_rollout_ref.model.external_lib`` names:

    register_policy_loss("rlzoo-cispo")(policy_loss("cispo"))
    register_adv_est("rlzoo-cispo")(advantages("cispo"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlzoo.errors import UserError
from rlzoo.integrations.export import Exported, Stack, metrics_of_part
from rlzoo.objective import Objective
from rlzoo.types import Normaliser, TokenBatch, Unit

VERL = Stack(
    "verl", frozenset({Unit.GROUP}), frozenset({"behaviour_logp", "snapshot_logp"}),
    splits=True, hint="set its options so that it needs none, or use rlzoo.train",
)  # fmt: skip

PolicyLoss = Callable[..., tuple[Float[Tensor, ""], dict[str, Any]]]


def policy_loss(objective: str | Objective, **options: Any) -> PolicyLoss:
    """An objective as a function for verl's ``register_policy_loss``.

    Log-probs of the policy that sampled are verl's ``old_log_prob``; a KL to the reference is added by verl itself
    (``use_kl_loss``). The loss is reduced by the objective's own normaliser over verl's global batch;
    ``loss_agg_mode`` only concerns the terms that verl adds. ``rollout_is_weights`` multiply the coefficients. Raises
    UserError for an objective that needs more.
    """
    exported = Exported(objective, VERL, options)

    def loss(
        old_log_prob: Float[Tensor, "B T"],
        log_prob: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
        response_mask: Bool[Tensor, "B T"],
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Float[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        given = {"behaviour_logp": old_log_prob, "snapshot_logp": old_log_prob}
        batch = exported.batch(log_prob, response_mask.bool(), given, advantage=advantages)
        found = exported.loss(batch, _denominator(exported, batch, config), rollout_is_weights)
        return found.value, {f"actor/{name}": value for name, value in metrics_of_part(found).items()}

    return loss


def advantages(objective: str | Objective, **options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """An objective's advantages as a function for verl's ``register_adv_est``: ``(advantages, returns)``, both [B, T].

    A completion's reward is the sum of its ``token_level_rewards``; ``index`` has equal entries for samples of one
    prompt. Raises UserError for an objective whose advantages need log-probs.
    """
    exported = Exported(objective, VERL, options)

    def estimated(
        token_level_rewards: Float[Tensor, "B T"],
        response_mask: Bool[Tensor, "B T"],
        config: Any = None,
        index: Sequence[Any] | None = None,
        **others: Any,
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        name, mask = exported.objective.name, response_mask.bool()
        if index is None:
            raise UserError(f"verl: objective {name!r} needs to know which samples share a prompt: give index")
        numbers = {key: number for number, key in enumerate(dict.fromkeys(index))}
        group = torch.tensor([numbers[key] for key in index], device=mask.device)
        reward = torch.where(mask, token_level_rewards, 0).sum(1, dtype=torch.float64)
        batch = TokenBatch(None, mask, reward=reward, group=group)
        try:
            found = exported.objective.prepare(batch)
        except UserError:
            raise UserError(
                f"verl: the advantages of objective {name!r} need log-probs, which verl does not give an estimator: "
                "use one of verl's adv_estimator"
            ) from None
        if found.advantage is None:
            raise UserError(f"verl: objective {name!r} has no advantages: use one of verl's adv_estimator")
        advantage = torch.where(mask, found.advantage, 0).to(token_level_rewards.dtype)
        return advantage, advantage

    return estimated


def _denominator(exported: Exported, batch: TokenBatch, config: Any) -> float:
    """Z of verl's global batch, divided by the number of processes, over whose gradients verl averages."""
    normaliser = exported.objective.normaliser
    info: Mapping[str, Any] = getattr(config, "global_batch_info", None) or {}
    whole = info.get("batch_num_tokens" if normaliser is Normaliser.PER_TOKEN else "global_batch_size")
    if whole is None:
        if (info.get("dp_size") or 1) > 1:
            raise UserError("verl: the loss does not know the size of the global batch: use an engine that gives it")
        return float(normaliser.count(batch))
    return float(whole) / (info.get("dp_size") or 1)
