"""Any objective over groups as the custom loss of prime-rl.

The signature is that with which prime-rl 0.8.1.dev9 calls it (commit 559b447, 2026-08-21): ``setup_rl_loss_fn`` and
``compute_loss`` in src/prime_rl/trainer/rl/loss.py. prime-rl does not install here; the tests call the function as they
do. In the configuration:

    [trainer.loss]
    type = "custom"
    import_path = "rlzoo.integrations.prime_rl.loss"
    kwargs = { objective = "cispo" }
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rlzoo.bases import PolicyGradient
from rlzoo.errors import UserError
from rlzoo.integrations.export import Exported, Stack, metrics_of_part
from rlzoo.types import Normaliser, Unit

PRIME_RL = Stack(
    "prime-rl", frozenset({Unit.GROUP}), frozenset({"behaviour_logp", "snapshot_logp", "reference_logp"}),
    splits=True, hint="set its options so that it needs none, or use rlzoo.train",
)  # fmt: skip
_known: dict[str, Exported] = {}


class SampleLoss(NamedTuple):
    """What prime-rl reads of a loss's result."""

    loss: Float[Tensor, ""]
    """The sum over the sample's tokens, which prime-rl divides by the tokens of the step."""
    metrics: dict[str, Tensor]


def loss(inputs: Any, objective: str, **options: Any) -> SampleLoss:
    """An objective's loss of one sample, from prime-rl's ``LossInputs``; ``options`` are the objective's.

    Log-probs of the policy that sampled are prime-rl's ``inference_logprobs``, and advantages those of its ``algo``.
    ``loss_weights`` multiply the coefficients. Raises UserError for an objective that needs more, that does not average
    over tokens, or that has advantages per token of its own.
    """
    key = repr((objective, sorted(options.items(), key=lambda item: item[0])))
    if key not in _known:
        _known[key] = _checked(Exported(objective, PRIME_RL, options))
    exported, mask = _known[key], inputs.loss_mask.bool()[None]
    logp, behaviour = inputs.trainer_logprobs[None], inputs.inference_logprobs[None]
    given = {"behaviour_logp": behaviour, "snapshot_logp": behaviour}
    if inputs.ref_logprobs is not None:
        given["reference_logp"] = inputs.ref_logprobs[None]
    weight = None if inputs.loss_weights is None else inputs.loss_weights[None]
    batch = exported.batch(logp, mask, given, advantage=inputs.advantages[None])
    found = exported.loss(batch, 1.0, weight)
    return SampleLoss(found.value, {name: torch.tensor(value) for name, value in metrics_of_part(found).items()})


def _checked(exported: Exported) -> Exported:
    objective = exported.objective
    if objective.normaliser is not Normaliser.PER_TOKEN:
        raise UserError(
            f"prime-rl: objective {objective.name!r} averages over sequences, and prime-rl divides by tokens: use one "
            "that averages over tokens, such as cispo or dapo"
        )
    if type(objective).advantages is not PolicyGradient.advantages:
        raise UserError(
            f"prime-rl: objective {objective.name!r} computes its advantages otherwise than per completion, and "
            "prime-rl gives it others: use rlzoo.train"
        )
    return exported
