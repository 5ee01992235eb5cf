"""The nouns of rlzoo. Shapes stand in the annotations: B sequences, T completion positions, N flat positions.

A completion position ``t`` holds the token ``y_t`` and what was computed to predict it. The prompt is cut away,
rows are padded on the right, and everything at a masked position is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Selection(Enum):
    """The part of a buffer that an objective learns from, and the rows that must stay together."""

    DEMONSTRATIONS = "demonstrations"
    """Single rows written by an expert."""
    CORRECT = "correct"
    """Single rows sampled by a policy and rewarded as correct."""
    PAIRS = "pairs"
    """A better and a worse completion of one prompt."""
    GROUPS = "groups"
    """All samples of one prompt."""
    UNPAIRED = "unpaired"
    """Single rows that have a reward, good and bad ones."""


class Need(Enum):
    """What an objective asks the trainer to put into its `TokenBatch`."""

    BEHAVIOUR = "behaviour"
    """``behaviour_logp``: log-probs under the policy that sampled the completion."""
    REFERENCE = "reference"
    """``reference_logp``: log-probs under the frozen initial policy."""
    REFERENCE_LOGITS = "reference_logits"
    """The frozen initial policy's logits, for `Objective.logit_term`; the trainer keeps that policy in memory."""
    EMA_REFERENCE = "ema_reference"
    """``reference_logp`` under an exponential average of the trained weights (`Objective.reference_decay`)."""
    SNAPSHOT = "snapshot"
    """``snapshot_logp``: log-probs under the policy at the start of the batch."""
    CRITIC = "critic"
    """``value`` and ``old_value``: a critic's estimate of the return before each token."""
    MISMATCHED = "mismatched"
    """``mismatched``: how much likelier than the reference finds them the policy finds answers to other prompts."""
    ENTROPY = "entropy"
    """``statistics["entropy"]``: -Σ_v π_v log π_v, in nats."""
    TOP_ENTROPY = "top_entropy"
    """``statistics["top_entropy"]``: the entropy of the 20 likeliest tokens, renormalised, in nats."""
    SQUARE_MASS = "square_mass"
    """``statistics["square_mass"]``: Σ_v π_v²."""


class Coupling(Enum):
    """Which other rows of the batch a coefficient looks at."""

    NONE = "none"
    PAIR = "pair"
    GROUP = "group"
    BATCH = "batch"


STATISTICS = (Need.ENTROPY, Need.TOP_ENTROPY, Need.SQUARE_MASS)


@dataclass(frozen=True)
class TokenBatch:
    """Everything an objective may look at. Optional fields are None unless asked for by `Objective.requires`."""

    logp: Float[Tensor, "B T"]
    """log π_θ(y_t | x, y_<t) in nats, at the temperature of `Objective.at_sampling_temperature`; carries the graph."""
    mask: Bool[Tensor, "B T"]
    """True at completion tokens, end of sequence included."""
    behaviour_logp: Float[Tensor, "B T"] | None = None
    reference_logp: Float[Tensor, "B T"] | None = None
    snapshot_logp: Float[Tensor, "B T"] | None = None
    advantage: Float[Tensor, "B T"] | None = None
    returns: Float[Tensor, "B T"] | None = None
    value: Float[Tensor, "B T"] | None = None
    """The critic's estimate; carries the graph."""
    old_value: Float[Tensor, "B T"] | None = None
    """The critic's estimate at the start of the batch."""
    reward: Float[Tensor, " B"] | None = None
    group: Int[Tensor, " B"] | None = None
    """Equal for rows of one prompt."""
    partner: Int[Tensor, " B"] | None = None
    """Row index of the other half of a pair."""
    chosen: Bool[Tensor, " B"] | None = None
    """True for the better half of a pair."""
    truncated: Bool[Tensor, " B"] | None = None
    """True where the completion was cut at the limit on its length, and so has no end of sequence."""
    mismatched: Float[Tensor, " B"] | None = None
    """Mean over the whole step of Σ_t log π_θ/π_ref of a completion that is put to another row's prompt; no graph.

    The same in all rows, so that a coefficient may look at it whatever the micro-batch.
    """
    statistics: Mapping[str, Float[Tensor, "B T"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.logp.ndim != 2 or self.mask.dtype != torch.bool:
            raise ValueError(
                f"TokenBatch needs logp [B, T] and a boolean mask, got {tuple(self.logp.shape)}, {self.mask.dtype}"
            )
        rows, length = self.logp.shape
        for name, value in self._tensors().items():
            expected = (rows, length) if value.ndim == 2 else (rows,)
            if tuple(value.shape) != expected:
                raise ValueError(f"TokenBatch.{name} has shape {tuple(value.shape)}, expected {expected}")

    def _tensors(self) -> dict[str, Tensor]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "statistics"}
        return {name: value for name, value in own.items() if value is not None}

    def detach(self) -> TokenBatch:
        """The same batch with no graph."""
        values = {name: value.detach() for name, value in self._tensors().items()}
        return replace(self, **values, statistics={k: v.detach() for k, v in self.statistics.items()})

    def rows(self, index: Int[Tensor, " R"], length: int) -> TokenBatch:
        """The rows at ``index``, cut to ``length`` positions. Partners must come along; they are renumbered."""
        values = {n: v[index] if v.ndim == 1 else v[index, :length] for n, v in self._tensors().items()}
        if self.partner is not None:
            place = torch.full((self.logp.shape[0],), -1, dtype=torch.long, device=index.device)
            place[index] = torch.arange(len(index), device=index.device)
            values["partner"] = place[self.partner[index]]
        statistics = {k: v[index, :length] for k, v in self.statistics.items()}
        return replace(self, **values, statistics=statistics)


@dataclass(frozen=True)
class Coefficients:
    """An objective's coefficients c_t, always detached, and what is worth plotting about them."""

    values: Float[Tensor, "B T"]
    loss: Float[Tensor, "B T"] | Float[Tensor, " B"] | None = None
    """The loss as the paper writes it, before normalisation, where it is not -c·log π; for reporting only."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Unreduced: [B, T] is averaged over completion tokens, [B] over rows; NaN entries do not count."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", self.values.detach())
        if self.loss is not None:
            object.__setattr__(self, "loss", self.loss.detach())
        object.__setattr__(self, "metrics", {k: v.detach() for k, v in self.metrics.items()})


@dataclass(frozen=True)
class Trajectory:
    """One row of a buffer: a prompt, a completion, and what is known about it."""

    prompt: str
    """The text that the model saw, chat template applied."""
    completion: str
    prompt_ids: list[int]
    completion_ids: list[int]
    """Its end included, unless truncated: the end of sequence, or what ends a turn in the chat template."""
    prompt_id: str
    """Equal for completions of one prompt."""
    source: str = "demonstration"
    """``demonstration``, ``policy``, or ``preference``."""
    reward: float | None = None
    reward_parts: dict[str, float | None] = field(default_factory=dict)
    behaviour_logp: list[float] | None = None
    """One log-prob per completion token, in nats, of the policy that sampled: at ``temperature``, without ``top_p``."""
    sampler_logp: list[float] | None = None
    """The same as the engine that sampled computed it, where that is not the one that trains."""
    reference_logp: list[float] | None = None
    """Of the frozen reference, at temperature 1."""
    tempered_reference_logp: list[float] | None = None
    """Of the frozen reference at ``temperature``, where that is not 1."""
    policy_version: int = 0
    truncated: bool = False
    temperature: float = 1.0
    """The temperature that the completion was sampled at; 1 for what no policy of this run's kind sampled."""
    top_p: float = 1.0
    """The nucleus that it was sampled from."""
    messages: list[dict[str, str]] | None = None
    """The conversation behind ``prompt``, if it was one."""
    columns: dict[str, object] = field(default_factory=dict)
    """The problem's other columns, which rewards may ask for."""
