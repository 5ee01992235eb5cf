"""Any objective over groups as the custom loss of slime.

The signature is that with which slime 0.3.1 calls it (commit 624b824, 2026-08-21): ``loss_function`` in
slime/backends/megatron_utils/loss.py. slime does not install here; the tests call the function as it does. In a module
``my_losses.py``, with ``--loss-type custom_loss --custom-loss-function-path my_losses.loss``:

    loss = custom_loss("cispo")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlzoo.errors import UserError
from rlzoo.integrations.export import Exported, Stack, metrics_of_part
from rlzoo.objective import Objective
from rlzoo.types import Normaliser, Unit

SLIME = Stack(
    "slime", frozenset({Unit.GROUP}), frozenset({"behaviour_logp", "snapshot_logp", "reference_logp"}),
    splits=True, hint="set its options so that it needs none, or use rlzoo.train",
)  # fmt: skip

CustomLoss = Callable[..., tuple[Float[Tensor, ""], dict[str, Tensor]]]


def custom_loss(objective: str | Objective, **options: Any) -> CustomLoss:
    """An objective as a function for slime's ``--custom-loss-function-path``.

    Log-probs of the policy come from slime's ``get_log_probs_and_entropy``, which knows of tensor parallelism and the
    sampling temperature; those of the policy that sampled are slime's ``log_probs``, or ``rollout_log_probs`` with
    ``--use-rollout-logprobs``. Advantages are slime's. An objective that averages over tokens needs
    ``--calculate-per-token-loss``, any other must not have it. Raises UserError for an objective that needs more, and
    at the first batch for such a setting.
    """
    exported = Exported(objective, SLIME, options)

    def loss(
        args: Any, batch: Mapping[str, Any], logits: Float[Tensor, "1 N V"], sum_of_sample_mean: Callable[..., Tensor]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        _check(exported, args, batch)
        rows = _log_probs(args, batch, logits)
        logp, mask = _padded(rows), _padded([each.bool() for each in batch["loss_masks"]])
        old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
        given = {"behaviour_logp": _padded(old) if old else logp.detach()}
        given["snapshot_logp"] = given["behaviour_logp"]
        if batch.get("ref_log_probs"):
            given["reference_logp"] = _padded(batch["ref_log_probs"])
        own = exported.batch(logp, mask, given, advantage=_padded(batch["advantages"]))
        found = exported.loss(own, 1.0)
        if exported.objective.normaliser is Normaliser.PER_SEQUENCE:
            # slime's own mean, over all samples of a rollout: they may be in several micro-batches
            losses = -found.coefficients.values * own.logp
            reported = losses if found.coefficients.loss is None else found.coefficients.loss.expand_as(losses)
            value, reported = (sum_of_sample_mean(_flat(x, rows)) for x in (losses, reported))
            value = value + (reported - value).detach()
        else:
            value = found.value
        if not mask.any():
            value = value + 0 * logits.sum()
        metrics = {name: torch.tensor(x, device=logits.device) for name, x in metrics_of_part(found).items()}
        return value, {"loss": value.detach().clone(), **metrics}

    return loss


def _check(exported: Exported, args: Any, batch: Mapping[str, Any]) -> None:
    name, normaliser = exported.objective.name, exported.objective.normaliser
    per_token = normaliser is Normaliser.PER_TOKEN
    if per_token != bool(args.calculate_per_token_loss):
        needed = "averages over tokens: give" if per_token else "averages over sequences: leave out"
        raise UserError(f"slime: objective {name!r} {needed} --calculate-per-token-loss")
    if getattr(args, "context_parallel_size", 1) > 1:
        raise UserError(f"slime: objective {name!r} needs whole completions: set --context-parallel-size 1")
    if any(one.key == "reference_logp" for one in exported.objective.requires) and not batch.get("ref_log_probs"):
        raise UserError(f"slime: objective {name!r} needs the reference's log-probs: give --ref-load and --use-kl-loss")


def _log_probs(args: Any, batch: Mapping[str, Any], logits: Tensor) -> list[Float[Tensor, " n"]]:
    """The log-probs of each sample's response, with their graph."""
    from slime.backends.megatron_utils import loss as of_slime  # type: ignore[import-not-found]

    top_p: Any = getattr(of_slime, "get_rollout_top_p_logprob_kwargs", lambda args, batch: {})
    _, found = of_slime.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=False,
        **top_p(args, batch),
    )
    log_probs: list[Tensor] = found["log_probs"]
    return log_probs


def _padded(rows: Any) -> Tensor:
    return pad_sequence(list(rows), batch_first=True)


def _flat(values: Float[Tensor, "B T"], rows: list[Tensor]) -> Float[Tensor, " N"]:
    """The rows of a padded tensor, one after another, each as long as its response."""
    return torch.cat([value[: len(row)] for value, row in zip(values, rows, strict=True)])
