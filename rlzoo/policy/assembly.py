"""From rows to the batch that an objective gets, for the trainer, the variance analyzer and the contract tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlzoo.errors import UserError
from rlzoo.inputs import Input, Stage
from rlzoo.inputs.base import NO_COLUMNS
from rlzoo.jobs.memory import on_device
from rlzoo.objective import Objective
from rlzoo.policy.chat import options_of
from rlzoo.policy.encoding import encode_prompt
from rlzoo.policy.loading import load_policy
from rlzoo.policy.microbatches import FirstPass, Forward, MicroBatches
from rlzoo.policy.policy import Policy
from rlzoo.policy.sequences import Tokens, learned, learned_tokens, length
from rlzoo.types import TokenBatch, Trajectory, Unit, selector_of

Units = Sequence[tuple[int, ...]]
"""Units of a batch, as indices into its rows."""


class Models:
    """The models that inputs use besides the policy: frozen ones, each loaded once, and moving ones, one per input."""

    def __init__(
        self,
        policy: Policy,
        frozen: Mapping[str | None, Policy] | None = None,
        moving: Mapping[Input, Policy] | None = None,
    ) -> None:
        self.policy = policy
        self.frozen: dict[str | None, Policy] = dict(frozen or {})
        self.moving: dict[Input, Policy] = dict(moving or {})

    @classmethod
    def load(
        cls, policy: Policy, inputs: Iterable[Input], initial: Policy | None = None, moving: bool = True
    ) -> Models:
        """Load all models of ``inputs``, before training starts; ``initial`` is a copy of the initial policy, if any.

        Without ``moving``, the policy stands in for moving models, which equal it before the first step. Raises
        UserError as `load_policy` does, and for a model with another vocabulary than the policy's.
        """
        found = cls(policy, {} if initial is None else {None: initial})
        for one in inputs:
            for name in one.models():
                if name not in found.frozen:
                    found.frozen[name] = policy.reference() if name is None else _loaded(name, policy)
            if moving and one not in found.moving and (model := one.moving_model(policy)) is not None:
                found.moving[one] = model
        return found

    def of(self, name: str | None) -> Policy:
        """The frozen model ``name``; None: the initial policy. Raises UserError for one that was not loaded."""
        if name not in self.frozen:
            model = "the initial policy" if name is None else repr(name)
            raise UserError(f"{model} is not loaded: an input that uses it must list it in models()")
        return self.frozen[name]

    def own(self, one: Input) -> Policy:
        """An input's moving model; the policy if it has none."""
        return self.moving.get(one, self.policy)

    @property
    def initial(self) -> Policy | None:
        """The initial policy, if it is loaded."""
        return self.frozen.get(None)


def _loaded(name: str, policy: Policy) -> Policy:
    dtype = "float32" if policy.compute is None else "bfloat16-mixed"
    model = load_policy(name, dtype, policy.device, frozen=True)
    if model.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise UserError(f"the model {name!r} has another vocabulary than the policy: use one with the same tokenizer")
    model.pack("auto" if policy.packs else "padded")
    return model


class Assembler:
    """Turns rows into batches, for a policy in training or analysis."""

    def __init__(
        self,
        policy: Policy,
        models: Models | None = None,
        micro: MicroBatches | None = None,
        on_forward: Callable[[Policy, Sequence[Tokens]], None] | None = None,
        remember: bool = False,
        first: FirstPass | None = None,
        progress: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """``on_forward`` is called with the model and rows of every forward pass without a graph, to count costs.

        With ``remember``, each model's log-probs of a row are computed once and cached: for models that do not change.
        ``first`` keeps the first pass of the policy's own log-probs for the gradient of the same rows. ``progress``
        returns the fraction of training that is done.
        """
        self.policy, self.models = policy, models or Models(policy)
        self.micro = micro or MicroBatches(8192)
        self.first, self.progress = first, progress
        self._on_forward = on_forward
        self._known: dict[tuple[int, int], tuple[Tokens, dict[str, Tensor]]] | None = {} if remember else None

    def assemble(self, rows: Sequence[Trajectory], units: Units, objective: Objective) -> TokenBatch:
        """The batch with all STORED, BATCH and STEP inputs, without a graph, ready for `Objective.prepare`.

        It has ``logp`` [B, T] for an objective with a `Snapshot` or with coupling BATCH. Raises UserError for stored
        inputs that rows lack and that cannot be computed.
        """
        context = _Context(self, rows, units, objective)
        batch = fixed_batch(rows, units, objective, self.policy.device)
        context.mask = batch.mask
        batch = batch.replace(
            **{one.key: context.value_of(one) for one in objective.requires if one.stage in (Stage.STORED, Stage.BATCH)}
        )
        if objective.is_coupled:
            context.now()
        if context.forward_values is not None:
            batch = batch.replace(**context.forward_values)
        return self._step(batch, context)

    def forward(self, rows: Sequence[Trajectory], units: Units, objective: Objective) -> dict[str, Tensor]:
        """``logp`` and the objective's FORWARD inputs [B, T] by key, without a graph."""
        context = _Context(self, rows, units, objective)
        keys = ["logp", *(one.key for one in objective.requires if one.stage is Stage.FORWARD and not one.gives_logits)]
        return {key: context.now(key) for key in keys}

    def values(self, one: Input, rows: Sequence[Trajectory]) -> list[Float[np.ndarray, " n"]]:
        """The computed values of a stored input per row, in float32: one per completion token, or a single one.

        Tokens that are not learned from have values too, as in all columns of a buffer.
        """
        if not rows:
            return []
        rows = [row if row.completion_mask is None else replace(row, completion_mask=None) for row in rows]
        context = _Context(self, rows, [(place,) for place in range(len(rows))], None)
        context.mask = on_device(fixed_mask(rows), self.policy.device)
        context.input = one
        found = one.compute(context).float().cpu().numpy()
        return [
            value[: len(row.completion_ids)] if found.ndim == 2 else value[None]
            for value, row in zip(found, rows, strict=True)
        ]

    def renew(self, batch: TokenBatch, rows: Sequence[Trajectory], units: Units, objective: Objective) -> TokenBatch:
        """The batch before its next update: with new STEP inputs and, for coupling BATCH, new log-probs."""
        context = _Context(self, rows, units, objective)
        context.mask = batch.mask
        if objective.is_coupled:
            context.now()
            batch = batch.replace(**(context.forward_values or {}))
        return self._step(batch, context)

    @staticmethod
    def _step(batch: TokenBatch, context: _Context) -> TokenBatch:
        requires = () if context.objective is None else context.objective.requires
        return batch.replace(**{one.key: context.value_of(one) for one in requires if one.stage is Stage.STEP})

    def after_step(self) -> None:
        """Call `Input.after_step` of all inputs with a model or module of their own."""
        for one in {*self.models.moving, *self.policy.attached.values()}:
            context = _Context(self, [], [], None)
            context.input = one
            one.after_step(context)

    def log_probs(
        self,
        model: Policy,
        rows: Sequence[Trajectory],
        statistics: Sequence[Input] = (),
        forward: Forward | None = None,
        progress: Callable[[int], None] | None = None,
        undo: Callable[[], None] | None = None,
    ) -> dict[str, Float[Tensor, "R T"]]:
        """`MicroBatches.log_probs`, counted by ``on_forward`` and cached with ``remember``."""
        if self._known is not None and (known := self._recalled(model, rows, statistics)) is not None:
            return known
        found = self.micro.log_probs(model, rows, statistics, forward=forward, progress=progress, undo=undo)
        if self._on_forward is not None:
            self._on_forward(model, rows)
        if self._known is not None:
            for place, row in enumerate(rows):
                kept = {key: value[place, : learned_tokens(row)] for key, value in found.items()}
                self._known[id(model), id(row)] = row, kept  # keeps the row alive, so that its id stays unique
        return found

    def _recalled(
        self, model: Policy, rows: Sequence[Trajectory], statistics: Sequence[Input]
    ) -> dict[str, Tensor] | None:
        assert self._known is not None
        kept = [self._known.get((id(model), id(row))) for row in rows]
        wanted = {"logp", *(one.key for one in statistics), *(self.policy.attached if model is self.policy else ())}
        if not rows or not all(one is not None and wanted <= one[1].keys() for one in kept):
            return None
        columns = [one[1] for one in kept if one is not None]
        return {key: _padded([column[key] for column in columns]) for key in wanted}


class _Context:
    """`rlzoo.inputs.Context` for one batch."""

    def __init__(
        self, assembler: Assembler, rows: Sequence[Trajectory], units: Units, objective: Objective | None
    ) -> None:
        self.assembler, self.rows, self.units, self.objective = assembler, rows, units, objective
        self.mask: Bool[Tensor, "B T"] = torch.zeros(0, 0, dtype=torch.bool)
        self.forward_values: dict[str, Tensor] | None = None
        """The policy's current log-probs and the objective's FORWARD inputs, once they have been computed."""
        self.input: Input | None = None

    @property
    def policy(self) -> Policy:
        return self.assembler.policy

    @property
    def own(self) -> Policy:
        assert self.input is not None
        return self.assembler.models.own(self.input)

    @property
    def progress(self) -> float:
        return self.assembler.progress()

    def model(self, name: str | None) -> Policy:
        return self.assembler.models.of(name)

    def encode(self, prompt: Any, columns: Mapping[str, Any] = NO_COLUMNS) -> list[int]:
        return encode_prompt(self.policy.tokenizer, prompt, options=options_of(columns))[1]

    def log_probs(self, model: Policy, rows: Sequence[Trajectory] | None = None) -> Float[Tensor, "R T"]:
        if rows is None and model is self.policy:
            return self.now()
        rows = self.rows if rows is None else rows
        _check_positions(model, rows)
        return self.assembler.log_probs(model, rows)["logp"]

    def now(self, key: str = "logp") -> Float[Tensor, "B T"]:
        requires = () if self.objective is None else self.objective.requires
        if self.forward_values is None:
            statistics = [one for one in requires if one.is_statistic]
            forward, undo = None, None
            if (first := self.assembler.first) is not None:
                forward, undo = first.forward(self.policy, statistics), first.drop
            found = self.assembler.log_probs(self.policy, self.rows, statistics, forward, undo=undo)
            keys = {"logp", *(one.key for one in requires)}
            self.forward_values = {key: value for key, value in found.items() if key in keys}
        if key not in self.forward_values:
            constant = next((one.initial for one in requires if one.key == key), None)
            if constant is None:
                raise UserError(f"Snapshot({key!r}) needs a FORWARD input with this key in the objective's requires")
            return torch.full_like(self.forward_values["logp"], constant)
        return self.forward_values[key]

    def value_of(self, one: Input) -> Tensor:
        """The input's values [B, T] or [B] for all rows."""
        if one.stage is Stage.STORED:
            own = [one.stored(row) for row in self.rows]
            if not any(value is None for value in own):
                return self._table(one, own)
        self.input = one
        return one.compute(self)

    def _table(self, one: Input, values: Sequence[Any]) -> Tensor:
        """Stored values of rows as a tensor [B, T] or [B]. Raises UserError for a row with a wrong number of values."""
        device = self.mask.device
        if any(len(row.completion_ids) != 1 for row in self.rows) and all(
            isinstance(value, Sequence) and len(value) == 1 for value in values
        ):
            values = [value[0] for value in values]  # a buffer stores one number per row as a list
        if not any(isinstance(value, Sequence) for value in values):
            return on_device(torch.as_tensor(np.asarray(values)), device)  # in float64, as rewards are
        table = torch.zeros(self.mask.shape)
        for place, (value, row) in enumerate(zip(values, self.rows, strict=True)):
            if not isinstance(value, Sequence) or len(value) != len(row.completion_ids):
                held = f"{len(value)} values" if isinstance(value, Sequence) else "one value"
                raise UserError(
                    f"{one.column!r} has {held} in a row of prompt {row.prompt_id!r} whose completion has "
                    f"{len(row.completion_ids)} tokens, its end included: give one per token"
                )
            own = torch.as_tensor(value)
            own = own if row.completion_mask is None else own[learned(row)]
            table[place, : len(own)] = own
        return on_device(table, device)


def fixed_batch(rows: Sequence[Trajectory], units: Units, objective: Objective, device: torch.device) -> TokenBatch:
    """The fields that come from the rows themselves: the mask [B, T], and rewards, groups and pairs [B].

    Rewards are in float64, because differences within a group may be small relative to a common offset. Raises
    UserError for a row whose prompt or completion has no tokens, not even an end of sequence.
    """
    for row in rows:
        if not (row.prompt_ids and row.completion_ids):
            lacking = "completion" if row.prompt_ids else "prompt"
            raise UserError(f"a row of prompt {row.prompt_id!r} has no tokens in its {lacking}: drop the row")
        if not learned_tokens(row):
            raise UserError(f"a row of prompt {row.prompt_id!r} has no token that is learned from: drop the row")
    mask = fixed_mask(rows, objective.truncated == "mask")
    unit = selector_of(objective.learns_from).unit
    pairs = unit is Unit.PAIR
    partner, chosen = torch.zeros(len(rows), dtype=torch.long), torch.zeros(len(rows), dtype=torch.bool)
    for better, worse in units if pairs else ():
        partner[better], partner[worse], chosen[better] = worse, better, True
    reward = None
    if all(row.reward is not None for row in rows):
        reward = torch.tensor([float(row.reward or 0.0) for row in rows], dtype=torch.float64)
    return TokenBatch(
        None,
        on_device(mask, device),
        reward=None if reward is None else on_device(reward, device),
        group=on_device(torch.tensor(_groups(rows, units, unit)), device),
        partner=on_device(partner, device) if pairs else None,
        chosen=on_device(chosen, device) if pairs else None,
    )


def fixed_mask(rows: Sequence[Trajectory], masks_truncated: bool = False) -> Bool[Tensor, "B T"]:
    """True at learned tokens [B, T]; with ``masks_truncated``, False throughout truncated rows."""
    lengths = list(map(learned_tokens, rows))
    mask = torch.zeros(len(rows), max(lengths), dtype=torch.bool)
    for place, (row, tokens) in enumerate(zip(rows, lengths, strict=True)):
        mask[place, : 0 if masks_truncated and row.truncated else tokens] = True
    return mask


def _groups(rows: Sequence[Trajectory], units: Units, kind: Unit) -> list[int]:
    """The group number of each row: that of its unit if units are groups (policy versions may share a prompt), or else
    that of its prompt."""
    keys: list[object] = [row.prompt_id for row in rows]
    if kind is Unit.GROUP:
        for number, unit in enumerate(units):
            for row in unit:
                keys[row] = number
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [numbers[key] for key in keys]


def _check_positions(model: Policy, rows: Sequence[Trajectory]) -> None:
    """Raise UserError naming a row that has more tokens than a model has positions.

    Rows of a buffer have been checked for the policy; those with another prompt, and other models, have not.
    """
    limit, longest = model.positions, max(rows, key=length, default=None)
    if limit is not None and longest is not None and length(longest) > limit:
        raise UserError(
            f"an input of the objective scores {length(longest)} tokens for a row of prompt {longest.prompt_id!r}, and "
            f"its model has {limit} positions: drop the row, or cut it"
        )


def _padded(values: Sequence[Float[Tensor, " n"]]) -> Float[Tensor, "R T"]:
    return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True)
