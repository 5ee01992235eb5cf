"""Frozen models beside the policy of another library's trainer: they see the batch that the policy sees."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlzoo.errors import UserError
from rlzoo.policy import Sequences, load_policy
from rlzoo.policy.head import Head, token_log_probs
from rlzoo.policy.logits import ReferenceHead

NOT_INPUTS = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "fused_lm_head", "return_dict")
"""Arguments of a causal LM that its trunk does not take."""


def without_adapter(model: Any) -> Any:
    """A context in which a peft model is the one that its adapter is trained on: without it, or with that of the name
    "ref", which TRL loads for an adapter that is trained further. Other models are left as they are."""
    if not hasattr(model, "disable_adapter"):
        return nullcontext()
    if "ref" in getattr(model, "peft_config", {}):
        from trl.models import use_adapter  # in peft itself, adapters are switched without a context

        return use_adapter(model, adapter_name="ref")
    return model.disable_adapter()


def causal_lm(model: Any) -> Any:
    """The transformers model within a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class FrozenModels:
    """The initial policy, under None, and the models that an objective's inputs name, loaded once."""

    def __init__(self, policy: nn.Module, names: Iterable[str | None], reference: nn.Module | None = None) -> None:
        """``reference`` is the initial policy, if there is a copy already; a policy with an adapter needs none.

        Raises UserError as `load_policy` does.
        """
        self.policy = policy
        self.models: dict[str | None, nn.Module] = {}
        for name in dict.fromkeys(names):
            if name is not None:
                self.models[name] = _on(load_policy(name, frozen=True).model, policy)
            elif reference is not None:
                self.models[None] = _on(reference.eval().requires_grad_(False), policy)
            elif not hasattr(policy, "disable_adapter"):
                self.models[None] = copy.deepcopy(policy).eval().requires_grad_(False)

    def log_probs(self, name: str | None, inputs: Mapping[str, Any], rows: Sequences) -> Float[Tensor, "R T"]:
        """A model's log-probs of the learned tokens in nats, without a graph and without their logits in memory."""
        with torch.no_grad(), self._switched(name):
            head, hidden = self._run(name, inputs, rows)
            return rows.spread(token_log_probs(head, hidden, rows.targets, temperature=rows.temperatures)["logp"])

    def head(self, name: str | None, inputs: Mapping[str, Any], rows: Sequences) -> ReferenceHead:
        """A model's function from hidden states to logits, with its hidden states at the learned tokens."""
        with torch.no_grad(), self._switched(name):
            head, hidden = self._run(name, inputs, rows)

        def logits(part: Tensor) -> Tensor:
            with torch.no_grad(), self._switched(name):
                return head.logits(part)

        return logits, hidden

    def _switched(self, name: str | None) -> Any:
        return without_adapter(self.policy) if self._is_policy(name) else nullcontext()

    def _is_policy(self, name: str | None) -> bool:
        return name is None and None not in self.models

    def _run(self, name: str | None, inputs: Mapping[str, Any], rows: Sequences) -> tuple[Head, Float[Tensor, "N H"]]:
        model = causal_lm(self.policy if self._is_policy(name) else self.models[name])
        own = {key: value for key, value in inputs.items() if key not in NOT_INPUTS}
        states = model.base_model(**{**own, "use_cache": False}).last_hidden_state
        return Head.of(model), rows.predicting(states[:, -rows.ids.shape[1] :])


def _on(model: nn.Module, policy: nn.Module) -> nn.Module:
    device = next(policy.parameters()).device
    if any(hasattr(p, "full_tensor") for p in policy.parameters()):
        raise UserError("the policy is sharded: give the reference's log-probs as a column of the data")
    return model.to(device)
