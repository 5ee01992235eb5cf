"""Sources of batches: whole units from a buffer, or fresh samples of the current policy."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch

from rlzoo.buffers import Buffer, View
from rlzoo.buffers.views import check_options
from rlzoo.config import Training
from rlzoo.errors import EmptyViewError, UnscoredError, UserError
from rlzoo.inputs import Input
from rlzoo.jobs.cached_results import random_state
from rlzoo.jobs.memory import on_device
from rlzoo.objective import Component, Objective, view_of
from rlzoo.policy.sequences import learned_tokens
from rlzoo.training.state import resumable
from rlzoo.types import Coupling, TokenBatch, Trajectory, WhichView, selector_of

Batch = tuple[list[Trajectory], list[tuple[int, ...]]]
"""Rows, and their units as indices into them."""


@runtime_checkable
class Source(Protocol):
    """A source of batches.

    Optional methods: ``draw_ahead()``, if its rows do not depend on the policy, reads the next batch while the GPU is
    still busy with the current step (see `BufferSource`); ``spent()`` returns costs by fields of `Costs`;
    ``lacks(input, at_sampling_temperature)`` tells whether any row lacks a stored input; ``state()`` and
    ``restore(state)`` are needed for checkpoints. The optional property ``batches`` is the number of batches in an
    epoch.
    """

    def draw(self) -> Batch:
        """The rows of one batch, and its units as indices into the rows."""
        ...


class BufferSource:
    """Epochs over a view of a fixed buffer, shuffled by ``seed``; batches consist of whole units.

    For a weighted view, an epoch is the same number of units, drawn with replacement in proportion to their weights.
    """

    def __init__(self, buffer: Buffer, view: View, batch_size: int, seed: int) -> None:
        self._buffer, self._view, self._batch_size = buffer, view, batch_size
        self.left_out = view.left_out
        self._random = random.Random(seed)
        self._queue: list[int] = []
        self._before = self._random.getstate()  # the generator's state before the queue was shuffled
        self._ahead: tuple[Batch, Any] | None = None
        """The next batch, if it has been prefetched, and the state before it."""

    def draw(self) -> Batch:
        """The next batch, of at most ``batch_size`` rows unless a single unit is larger."""
        if self._ahead is None:
            return self._next()
        (batch, _), self._ahead = self._ahead, None
        return batch

    def draw_ahead(self) -> None:
        """Prefetch the batch that `draw` returns next; until then, `state` is the state before it.

        An error in reading the batch is raised by `draw`.
        """
        if self._ahead is not None:
            return
        before = self.state()
        try:
            self._ahead = self._next(), before
        except Exception:
            self.restore(before)

    def _next(self) -> Batch:
        indices: list[int] = []
        units: list[tuple[int, ...]] = []
        while len(indices) < self._batch_size:
            if not self._queue:
                self._shuffle()
            unit = self._view.units[self._queue[-1]]
            if units and len(indices) + len(unit) > self._batch_size:
                break  # the unit starts the next batch
            self._queue.pop()
            units.append(tuple(range(len(indices), len(indices) + len(unit))))
            indices.extend(unit)
        rows = self._buffer.at(indices)
        self._buffer.release_pages()
        return rows, units

    @property
    def batches(self) -> float:
        """The number of batches in an epoch; the last may be a fraction of one."""
        sizes = [len(unit) for unit in self._view.units]
        largest = max(sizes)
        return sum(sizes) / (max(1, self._batch_size // largest) * largest)

    def lacks(self, one: Input, at_sampling_temperature: bool) -> bool:
        """Whether any row of the buffer lacks a stored input at the temperature at which it is needed."""
        return self._buffer.lacks(one.column, at_sampling_temperature)

    def _shuffle(self) -> None:
        self._before = self._random.getstate()
        self._queue = list(range(len(self._view)))
        if self._view.weights is None:
            self._random.shuffle(self._queue)
        else:
            self._queue = self._random.choices(self._queue, self._view.weights, k=len(self._queue))

    def state(self) -> Any:
        """The position in the epoch, as plain data: the random state before its shuffle, and the units left."""
        if self._ahead is not None:
            return self._ahead[1]
        before = self._before if self._queue else self._random.getstate()
        return {"before": before, "left": len(self._queue)}

    def restore(self, state: Any) -> None:
        """Resume from a ``state``."""
        self._ahead, self._queue = None, []
        self._random.setstate(random_state(state["before"]))
        if state["left"]:
            self._shuffle()
            del self._queue[state["left"] :]


Views = Sequence[tuple[WhichView, Mapping[str, Any]]]
"""The view that each component of an objective learns from, with the view's options."""


def views_of(objective: Objective) -> Views:
    """The views of an objective's components. Raises UserError for wrong options."""
    views = [view_of(component.objective) for component in objective.components]
    for which, options in views:
        check_options(selector_of(which), options)
    return views


def shares(batch_size: int, components: int) -> list[int]:
    """The number of rows per component: the batch split evenly, at least one each."""
    return [max(1, batch_size // components + (number < batch_size % components)) for number in range(components)]


def seeds(views: Views, seed: int) -> list[int]:
    """A seed per view. Each repetition of a view gets a different seed, or all would draw the same rows."""
    before = [[which for which, _ in views[:number]].count(views[number][0]) for number in range(len(views))]
    return [seed + 2**32 * repeats for repeats in before]


def buffer_sources(buffer: Buffer, views: Views, batch_size: int, seed: int) -> list[BufferSource]:
    """One `BufferSource` per view of the buffer; together they draw ``batch_size`` rows per step."""
    split = zip(views, shares(batch_size, len(views)), seeds(views, seed), strict=True)
    return [BufferSource(buffer, buffer.view(which, **options), size, own) for (which, options), size, own in split]


def check_sources(objective: Objective, sources: Sequence[object]) -> None:
    """Raise UserError unless there is one source per component of an objective."""
    if len(sources) != len(objective.components):
        raise UserError(
            f"objective {objective.name!r} has {len(objective.components)} components and {len(sources)} sources: "
            "give one per component"
        )


@dataclass(frozen=True)
class Drawn:
    """A component of an objective and its rows in a step."""

    component: Component
    rows: Sequence[Trajectory]
    units: Sequence[tuple[int, ...]]
    batch: TokenBatch


class FreshSource:
    """Fresh samples of the current policy for every batch; sampled again if the view is empty.

    `draw` raises UserError after `ATTEMPTS` empty batches in a row, and at once for what no other batch cures: any
    other error of the collector or the view, or a first batch in which the reward of every sample is None.
    """

    ATTEMPTS = 8

    def __init__(self, collect: Callable[[int], Buffer], selection: WhichView, **options: object) -> None:
        self._collect, self._selection, self._options = collect, selection, options
        self._version = 0
        self.left_out = Counter[str]()
        """Counts of what the views left out, and of batches that were sampled again."""

    def draw(self) -> Batch:
        """All rows that the view selects from a fresh buffer."""
        buffer, view = self._fresh()
        indices: list[int] = []
        units: list[tuple[int, ...]] = []
        for unit in view.units:
            units.append(tuple(range(len(indices), len(indices) + len(unit))))
            indices.extend(unit)
        return buffer.at(indices), units

    def _fresh(self) -> tuple[Buffer, View]:
        attempt = 0
        while True:
            attempt += 1
            buffer = self._collect(self._version)
            try:
                view = buffer.view(self._selection, **self._options)
            except EmptyViewError as error:
                if isinstance(error, UnscoredError) and self._version == 0:
                    raise UserError(
                        "the reward is None for every sample of the first batch, as for gold answers that it cannot "
                        "read: check the reward and the columns it needs; bad_rows: drop leaves out such problems"
                    ) from None
                if attempt == self.ATTEMPTS:
                    raise UserError(f"{attempt} fresh batches in a row have nothing to learn from: {error}") from None
                self.left_out["fresh batches with nothing to learn from"] += 1
                continue
            self._version += 1
            self.left_out.update(view.left_out)
            return buffer, view

    @property
    def batches(self) -> float | None:
        """The number of batches in an epoch over the problems; None if the collector does not say."""
        return getattr(self._collect, "batches", None)

    def spent(self) -> Mapping[str, float]:
        """The costs of sampling since the last call, by fields of `Costs`; empty if the collector does not count."""
        spent: Callable[[], Mapping[str, float]] = getattr(self._collect, "spent", dict)
        return spent()

    def state(self) -> Any:
        """The state as plain data, the collector's included. Raises UserError if the collector has none."""
        left_out = dict(self.left_out)
        return {"version": self._version, "left_out": left_out, "collect": resumable(self._collect).state()}

    def restore(self, state: Any) -> None:
        """Resume from a ``state``."""
        self._version, self.left_out = state["version"], Counter(state.get("left_out", {}))
        resumable(self._collect).restore(state["collect"])


def in_steps(settings: Training, sources: Sequence[Source]) -> Training:
    """The settings with their ``epochs`` in steps: until every source has been passed through as often.

    Raises UserError for a source that does not say how many batches it has.
    """
    if settings.epochs is None:
        return settings
    batches = [found for source in sources if (found := getattr(source, "batches", None)) is not None]
    if len(batches) < len(sources):
        raise UserError("training.epochs needs a source that says how many batches it has: give steps")
    return settings.in_steps(max(batches))


def lacks(source: Source, one: Input, at_sampling_temperature: bool) -> bool:
    """Whether rows of a source may lack a stored input; True if the source has no ``lacks`` of its own."""
    check: Callable[[Input, bool], bool] | None = getattr(source, "lacks", None)
    return check is None or check(one, at_sampling_temperature)


def micro_units(units: Sequence[tuple[int, ...]], coupling: Coupling) -> list[tuple[int, ...]]:
    """The sets of rows that a micro-batch must not separate."""
    if coupling in (Coupling.PAIR, Coupling.GROUP):
        return list(units)
    return [(row,) for unit in units for row in unit]


def in_mini_batches(drawn: Sequence[Drawn], number: int) -> list[list[Drawn]]:
    """A batch in ``number`` mini-batches of whole units, in their order; fewer if a component has fewer units.

    Advantages, snapshots and other inputs are those of the whole batch, except for STEP inputs and coupled log-probs,
    which `Assembler.renew` computes for each.
    """
    if number == 1:
        return [list(drawn)]
    number = min([number, *(len(some.units) for some in drawn)])
    return [[_part(some, place, number) for some in drawn] for place in range(number)]


def _part(drawn: Drawn, place: int, number: int) -> Drawn:
    """One of ``number`` mini-batches, of about as many units each."""
    first, end = (len(drawn.units) * at // number for at in (place, place + 1))
    own = drawn.units[first:end]
    index = [row for unit in own for row in unit]
    places = iter(range(len(index)))
    units = [tuple(next(places) for _ in unit) for unit in own]
    rows = [drawn.rows[row] for row in index]
    longest = max(map(learned_tokens, rows))
    batch = drawn.batch.rows(on_device(torch.tensor(index), drawn.batch.mask.device), longest)
    return replace(drawn, rows=rows, units=units, batch=batch)


def keeps_first_pass(objective: Objective, settings: Training) -> bool:
    """Whether a step's forward passes are those of the batch's log-probs: one component, no units, no logit term, and
    no mini-batches."""
    first, *others = (component.objective for component in objective.components)
    if settings.mini_batches > 1:
        return False
    return not others and first.couples not in (Coupling.PAIR, Coupling.GROUP) and not first.has_logit_term
