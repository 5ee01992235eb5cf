"""Which weights can be trained with which settings."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from rlzoo.config import Training
from rlzoo.errors import UserError
from rlzoo.policy import Policy
from rlzoo.policy.adapters import adapters
from rlzoo.policy.quantised import UNSHARDED, is_in_4_bits

ROUNDED = (
    "training.dtype: bfloat16 rounds away small updates of weights: use bfloat16-mixed, which keeps them in float32, "
    "or train adapters (training.lora)"
)


def check_precision(dtypes: Iterable[torch.dtype]) -> None:
    """Raise UserError if trained weights are in a 16-bit dtype, which rounds away small updates."""
    if {torch.bfloat16, torch.float16} & set(dtypes):
        raise UserError(ROUNDED)


def check_quantised(policy: Policy, settings: Training, is_sharded: bool) -> None:
    """Raise UserError if a policy in 4 bits cannot be trained with these settings, or they ask for 4 bits in vain."""
    wanted, found = settings.lora is not None and settings.lora.load_in_4bit, is_in_4_bits(policy.model)
    if wanted and not found:
        raise UserError("lora.load_in_4bit: the policy was loaded without it: use load_policy(..., load_in_4bit=True)")
    if found and settings.lora is None and not adapters(policy.model):
        raise UserError("weights in 4 bits cannot be trained: train adapters (training.lora)")
    if found and is_sharded:
        raise UserError(UNSHARDED)
