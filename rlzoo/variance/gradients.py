"""The gradient of every unit of a batch by its norm alone: at most one backward pass an objective, and one forward.

A unit is what the optimizer draws as a whole: a row, a pair, a group. Inside a layer y = W x the gradient of a unit is
Σ_t e_t x_tᵀ over its positions, with e the gradient at y, so its norm follows from what a backward pass has in hand
anyway (arXiv 1510.01799; for sequences, arXiv 2205.09632). Either the Gram matrices of e and x give it, or the product
is formed for a few units of one layer at a time: no tensor of units × parameters ever exists.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlzoo.policy.head import Head, LogitTerm
from rlzoo.policy.policy import Policy, Sequences, token_batches
from rlzoo.types import Trajectory
from rlzoo.variance.modules import Covered, Modules
from rlzoo.variance.pieces import WIDTH, Block, Piece, Projection, Sum, at_least_float32

CHUNK_ENTRIES = 2**24
"""Logits that are held at a time, several times over: 64 MB in float32."""


@dataclass(frozen=True)
class Task:
    """The gradient of one objective: the sum over a unit's positions of weight · ∇ log π, and what comes with it.

    R rows are analysed, of at most T completion tokens.
    """

    units: Sequence[tuple[int, ...]]
    """The rows of each unit. No row is in two units."""
    weight: Float[Tensor, "R T"]
    """∂ loss / ∂ log π of each completion token."""
    scale: float = 1.0
    """What every unit's gradient is multiplied by in the end, so that their mean is the gradient of the batch."""
    value_weight: Float[Tensor, "R T"] | None = None
    """∂ loss / ∂ value, where a critic stands on the policy's own trunk."""
    term: LogitTerm | None = None
    """A loss a position over the full vocabulary."""
    term_weight: Float[Tensor, " R"] | None = None


@dataclass
class Pass:
    """Tasks that share a backward pass: in every row, the weights of each are those of the pass times one number."""

    weight: Float[Tensor, "R T"]
    scale: dict[str, Float[Tensor, " R"]]
    """By task: the number of each row; 0 where the task has no weight."""
    alone: bool = False
    """Whether more than weights on ∇ log π pulls on the hidden states, which is not shared."""

    def join(self, name: str, weight: Float[Tensor, "R T"]) -> bool:
        """Take a task in if its weights are proportional in each row that others use already."""
        used, wanted = (w.abs().amax(1) > 0 for w in (self.weight, weight))
        scale = (weight * self.weight).sum(1) / self.weight.square().sum(1).clamp(min=torch.finfo(weight.dtype).tiny)
        rest = (weight - scale[:, None] * self.weight).abs().amax(1)
        near = rest <= 16 * torch.finfo(weight.dtype).eps * weight.abs().amax(1)
        if self.alone or not bool(near[used & wanted].all()):
            return False
        free = wanted & ~used
        self.weight = torch.where(free[:, None], weight, self.weight)
        self.scale[name] = torch.where(free, 1, torch.where(wanted, scale, 0))
        return True


def shared_passes(tasks: Mapping[str, Task]) -> list[Pass]:
    """As few backward passes as it takes: a coefficient that is constant over a row only scales that row's gradient."""
    passes: list[Pass] = []
    for name, task in tasks.items():
        alone = task.term is not None or task.value_weight is not None
        if alone or not any(known.join(name, task.weight) for known in passes):
            used = task.weight.abs().amax(1) > 0
            passes.append(Pass(task.weight, {name: (used | alone).to(task.weight.dtype)}, alone))
    return passes


@dataclass
class UnitGradients:
    """What is kept of one objective's gradients: U units, L layers, D dimensions of a random projection."""

    squared_norm: Float[Tensor, "U L"]
    """‖g_u‖² by layer, exact, in float64."""
    sketch: Float[Tensor, "U L D"]
    """Projections whose inner products are those of the gradients in expectation."""
    mean: dict[str, Tensor] = field(repr=False)
    """The mean gradient, by parameter."""

    def scaled(self, factor: float) -> UnitGradients:
        """All gradients times a factor; the means are changed in place, as there may be no room for two."""
        means = {name: mean.mul_(factor) for name, mean in self.mean.items()}
        return UnitGradients(self.squared_norm * factor**2, self.sketch * factor, means)


class GradientMeter:
    """Measures the gradients of a policy's units, for several objectives at a time.

    Raises UserError for a model with a trainable parameter that `Modules` does not cover.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self.head, self.modules = policy, Head.of(policy.model), Modules(policy)
        self.projections = {
            name: Projection(seed, parameter) for seed, (name, parameter) in enumerate(self.modules.trainable.items())
        }
        self.takes_positions = "position_ids" in inspect.signature(policy.model.base_model.forward).parameters

    def measure(
        self,
        rows: Sequence[Trajectory],
        tasks: Mapping[str, Task],
        token_budget: int = 2048,
        reference: Policy | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, UnitGradients]:
        """The gradients of all units of every task, from one forward pass over the rows that any task uses.

        Memory: the activations of a micro-batch (``token_budget`` padded tokens, or one unit that is larger), and one
        mean gradient a task. ``reference`` gives logits to the tasks' terms.
        """
        run = _Measurement(self, tasks, reference)
        lengths = [len(row.prompt_ids) + len(row.completion_ids) for row in rows]
        trained, training = list(self.modules.trainable.values()), self.policy.training
        self.policy.eval()
        try:
            for parameter in trained:
                parameter.requires_grad_(False)  # autograd then makes no gradient of its own for them
            for batch in token_batches(connected(task.units for task in tasks.values()), lengths, token_budget):
                run.micro_batch(rows, batch)
                if progress is not None:
                    progress(len(batch))
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            self.policy.train(training)
        return {name: found.scaled(tasks[name].scale) for name, found in run.found.items()}


def connected(families: Iterable[Iterable[tuple[int, ...]]]) -> list[tuple[int, ...]]:
    """The rows of all units, those together that share a unit, directly or through others."""
    parent: dict[int, int] = {}

    def root(row: int) -> int:
        while parent.setdefault(row, row) != row:
            parent[row] = row = parent[parent[row]]
        return row

    for units in families:
        for first, *others in units:
            root(first)
            for other in others:
                parent[root(other)] = root(first)
    found: dict[int, list[int]] = {}
    for row in sorted(parent):
        found.setdefault(root(row), []).append(row)
    return [tuple(rows) for rows in found.values()]


class _Measurement:
    """One pass over the data: what accumulates, and what belongs to the micro-batch at hand."""

    def __init__(self, meter: GradientMeter, tasks: Mapping[str, Task], reference: Policy | None) -> None:
        self.meter, self.tasks, self.reference = meter, tasks, reference
        self.found = {name: self._empty(task) for name, task in tasks.items()}
        self._unit_of = {n: {row: u for u, unit in enumerate(t.units) for row in unit} for n, t in tasks.items()}
        self._leaves: list[Tensor] = []
        self._passes = shared_passes(tasks)
        self._members: list[tuple[str, list[Block], Tensor | None]] = []
        self._head: _HeadPass

    def _empty(self, task: Task) -> UnitGradients:
        device, units, layers = self.meter.policy.device, len(task.units), len(self.meter.modules.layers)
        return UnitGradients(
            torch.zeros(units, layers, dtype=torch.float64, device=device),
            torch.zeros(units, layers, WIDTH, device=device),
            {n: torch.zeros_like(p, dtype=at_least_float32(p.dtype)) for n, p in self.meter.modules.trainable.items()},
        )

    def micro_batch(self, rows: Sequence[Trajectory], batch: Sequence[int]) -> None:
        """Forward once, then backward for each pass with tasks that have units here."""
        policy = self.meter.policy
        sequences = Sequences.collate(
            [rows[i].prompt_ids for i in batch], [rows[i].completion_ids for i in batch], policy.device
        )
        blocks = {name: found for name in self.tasks if (found := self._blocks_of(name, batch))}
        hidden = self._forward(sequences)
        passes = [shared for shared in self._passes if not blocks.keys().isdisjoint(shared.scale)]
        self._head = _HeadPass(self, sequences, hidden.detach(), batch, blocks, passes)
        index = torch.as_tensor(batch, device=policy.device)
        for number, shared in enumerate(passes):
            scales = {name: scale[index] for name, scale in shared.scale.items() if name in blocks}
            self._members = [(n, blocks[n], None if bool((s == 1).all()) else s) for n, s in scales.items()]
            pull = self._head.pull[number].to(hidden.dtype)
            if hidden.requires_grad:  # else only the output layer trains
                torch.autograd.grad(hidden, self._leaves, pull, retain_graph=number + 1 < len(passes))
        self._leaves = []
        del self._head  # it knows this measurement, whose means would live on in the circle
        self.meter.modules.forget()

    def _blocks_of(self, name: str, batch: Sequence[int]) -> list[Block]:
        """The task's units that are in the micro-batch, those of one size together."""
        units, place = self.tasks[name].units, {row: i for i, row in enumerate(batch)}
        sizes: dict[int, list[int]] = {}
        for u in dict.fromkeys(self._unit_of[name].get(row, -1) for row in batch):
            if u >= 0:
                sizes.setdefault(len(units[u]), []).append(u)
        device = self.meter.policy.device
        return [
            Block(
                torch.tensor(some, device=device),
                torch.tensor([[place[row] for row in units[u]] for u in some], device=device),
            )
            for some in sizes.values()
        ]

    def _forward(self, sequences: Sequences) -> Float[Tensor, "N H"]:
        """The last hidden states, with hooks at every module that wait for the gradient at its output."""
        extra = {}
        if self.meter.takes_positions:  # else one row of position embeddings may serve all rows
            places = torch.arange(sequences.ids.shape[1], device=sequences.ids.device)
            extra["position_ids"] = places.expand(sequences.ids.shape)
        with self.meter.modules.watched(self._output), torch.enable_grad():
            return self.meter.policy.hidden(sequences, **extra)

    def _output(self, covered: Covered, output: Tensor) -> None:
        if output.is_leaf:  # where the graph begins, as parameters take no gradient now
            self._leaves.append(output.requires_grad_(True))
        register: Any = output.register_hook
        register(lambda e: self._receive(covered, e.detach()))

    def _receive(self, covered: Covered, e: Tensor) -> None:
        """The gradient at a module's output, for the tasks whose backward pass runs."""
        e = covered.by_row(e, *self._head.shape)
        for task, blocks, scale in self._members:
            own = e if scale is None else e * scale.to(e.dtype)[:, None, None]
            for block in blocks:
                for name, piece in covered.pieces(block, own):
                    self.add(task, name, covered.layer, block.units, piece)
            if covered is self.meter.modules.tied:
                self._head.cross(task, covered, own)

    def add(self, task: str, name: str, layer: int, units: Int[Tensor, " n"], piece: Piece) -> None:
        """Take in one parameter's gradient of some units."""
        found = self.found[task]
        norms = piece.measure(found.mean[name], 1 / len(found.squared_norm))
        found.squared_norm[units, layer] += norms.to(torch.float64)
        found.sketch[units, layer] += piece.sketch(self.meter.projections[name]).to(found.sketch.dtype)


@dataclass
class _Score:
    """∂ loss / ∂ logits at some positions that belong together, up to a factor a position, and what it costs once."""

    values: Float[Tensor, "n V"]
    hidden: Float[Tensor, "n H"]
    gram: Float[Tensor, "n n"] = field(init=False)
    """⟨gradients of the output layer⟩ of each two positions."""

    def __post_init__(self) -> None:
        self.gram = (self.values @ self.values.mT) * (self.hidden @ self.hidden.mT)

    def sketch(self, projection: Projection) -> Float[Tensor, "n D"]:
        """The projected gradient of the output layer of each position."""
        left, right = projection.matrices(self.values.shape[1], self.hidden.shape[1])
        return ((self.values @ left)[:, :, None] * (self.hidden @ right)[:, None, :]).flatten(1)


class _HeadPass:
    """The output layer for all tasks at once: ∂ log π / ∂ logits is one tensor, whose rows each task scales.

    Rows that share a unit are taken together; a few of such atoms fill a chunk of logits.
    """

    def __init__(
        self,
        run: _Measurement,
        sequences: Sequences,
        hidden: Float[Tensor, "N H"],
        batch: Sequence[int],
        blocks: Mapping[str, Sequence[Block]],
        passes: Sequence[Pass],
    ) -> None:
        self.run, self.modules, self.head = run, run.meter.modules, run.meter.head
        self.shape = sequences.ids.shape
        self.sequences, self.hidden = sequences, hidden.to(at_least_float32(hidden.dtype))
        self.pull = [torch.zeros_like(self.hidden) for _ in passes]
        """∂ loss / ∂ hidden of each pass."""
        self._unit = {name: self._units(some) for name, some in blocks.items()}
        self._crossed: dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {name: [] for name in blocks}
        self._position_row = sequences.mask.nonzero()[:, 0]
        index, width = torch.as_tensor(batch, device=hidden.device), sequences.mask.shape[1]

        def flat(per_token: Tensor) -> Tensor:
            return per_token[index, :width][sequences.mask].to(self.hidden)

        tasks = {name: run.tasks[name] for name in blocks}
        self._weight = {name: flat(task.weight) for name, task in tasks.items()}
        self._shared = [None if shared.alone else flat(shared.weight) for shared in passes]
        self._alone = {name: n for n, shared in enumerate(passes) if shared.alone for name in shared.scale}
        self._term_weight = {
            name: task.term_weight[index].to(self.hidden)[self._position_row]
            for name, task in tasks.items()
            if task.term is not None and task.term_weight is not None
        }
        self._reference = None
        if run.reference is not None and self._term_weight:
            with torch.no_grad():
                self._reference = run.reference.hidden(sequences)
        for atoms in self._chunks():
            self._chunk(atoms)
        value_head = run.meter.policy.value_head
        for name, task in tasks.items():
            if task.value_weight is not None and value_head is not None:
                pull = self.pull[self._alone[name]]
                pull += flat(task.value_weight)[:, None] * value_head.weight.detach()[0].to(self.hidden)

    def _units(self, blocks: Sequence[Block]) -> Int[Tensor, " B"]:
        """The unit of each row; -1 where it is in none of the task's."""
        unit = torch.full(self.shape[:1], -1, device=self.hidden.device)
        for block in blocks:
            unit[block.rows] = block.units[:, None]
        return unit

    def _chunks(self) -> Iterator[list[Tensor]]:
        """Positions of the atoms, as many at a time as a chunk of logits holds."""
        families = []
        for unit in self._unit.values():
            rows: dict[int, tuple[int, ...]] = {}
            for row, u in enumerate(unit.tolist()):
                if u >= 0:
                    rows[u] = (*rows.get(u, ()), row)
            families.append(rows.values())
        limit, held = CHUNK_ENTRIES // self.head.layer.weight.shape[0], 0
        chunk: list[Tensor] = []
        for atom in connected(families):
            at = torch.isin(self._position_row, torch.tensor(atom, device=self.hidden.device)).nonzero()[:, 0]
            if chunk and held + len(at) > limit:
                yield chunk
                held, chunk = 0, []
            held, chunk = held + len(at), [*chunk, at]
        if chunk:
            yield chunk

    def _chunk(self, atoms: Sequence[Int[Tensor, " n"]]) -> None:
        at = torch.cat(list(atoms))
        hidden, target, matrix = self.hidden[at], self.sequences.targets[at], self.head.layer.weight.detach()
        with torch.no_grad():
            raw = self.head.layer(hidden.to(matrix.dtype)).to(hidden.dtype)
        with torch.enable_grad():
            logits = self.head.finish(raw.requires_grad_(True))
            logp = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)
            terms = self._terms(logits, target, at)
        (score,) = torch.autograd.grad(logp.sum(), raw, retain_graph=bool(terms))
        extra = {name: torch.autograd.grad(term, raw, retain_graph=True)[0] for name, term in terms.items()}
        del logits, logp, terms, raw
        plain, back = self._scores(atoms, score, hidden), (score.to(matrix.dtype) @ matrix).to(hidden.dtype)
        for pull, shared in zip(self.pull, self._shared, strict=True):
            if shared is not None:
                pull[at] = shared[at][:, None] * back
        for name in self._weight:
            weight = torch.where(self._unit[name][self._position_row[at]] >= 0, self._weight[name][at], 0)
            if name in extra:
                own = weight[:, None] * score + extra[name]
                scores, weight = self._scores(atoms, own, hidden), torch.ones_like(weight)
                self.pull[self._alone[name]][at] = (own.to(matrix.dtype) @ matrix).to(hidden.dtype)
            else:
                own, scores = score, plain
                if name in self._alone:
                    self.pull[self._alone[name]][at] = weight[:, None] * back
            self._take(name, own, scores, weight, at, atoms)

    def _scores(self, atoms: Sequence[Tensor], score: Tensor, hidden: Tensor) -> list[_Score]:
        sizes = [len(atom) for atom in atoms]
        return [_Score(s, h) for s, h in zip(torch.split(score, sizes), torch.split(hidden, sizes), strict=True)]

    def _terms(self, logits: Tensor, target: Tensor, at: Tensor) -> dict[str, Tensor]:
        """The full-vocabulary losses of the tasks that have one, summed."""
        found = {}
        for name, weight in self._term_weight.items():
            term, reference = self.run.tasks[name].term, self.run.reference
            other = None
            if self._reference is not None and reference is not None:
                other = Head.of(reference.model).logits(self._reference[at]).detach()
            value = None if term is None else term(logits, other, target)
            if value is not None:
                found[name] = (value * weight[at])[self._unit[name][self._position_row[at]] >= 0].sum()
        return found

    def _take(
        self, name: str, score: Tensor, scores: Sequence[_Score], weight: Tensor, at: Tensor, atoms: Sequence[Tensor]
    ) -> None:
        """The output layer's own parameters, for one task and one chunk."""
        own, layer = self.modules.head_parameters, self.modules.head_layer
        if layer is None:
            return
        found = self.run.found[name]
        if "weight" in own:
            weighed = weight[:, None] * torch.cat([s.hidden for s in scores])
            found.mean[own["weight"]].addmm_(score.mT, weighed, alpha=1 / len(found.squared_norm))
        for one, positions, w in zip(scores, atoms, torch.split(weight, [len(a) for a in atoms]), strict=True):
            unit = self._unit[name][self._position_row[positions]]
            inside = unit >= 0
            if not inside.any():
                continue
            same = unit[:, None] == unit[None, :]
            if "weight" in own:
                norms = torch.where(same, one.gram, 0) @ w * w
                found.squared_norm[:, layer].index_add_(0, unit[inside], norms[inside].to(torch.float64))
                drawn = one.sketch(self.run.meter.projections[own["weight"]]) * w[:, None]
                found.sketch[:, layer].index_add_(0, unit[inside], drawn[inside].to(found.sketch.dtype))
            if "bias" in own:
                for u in torch.unique(unit[inside]):
                    chosen = unit == u
                    piece = Sum((one.values[chosen] * w[chosen, None])[None])
                    self.run.add(name, own["bias"], layer, u[None], piece)
            if self.modules.tied is not None:
                rows = torch.unique(self._position_row[positions])
                ids = self.sequences.ids[rows].flatten()
                places = self._unit[name][rows].repeat_interleave(self.shape[1])
                at_inputs = torch.where(unit[:, None] == places, one.values[:, ids], 0) * w[:, None]
                self._crossed[name].append((rows, at_inputs, one.hidden, unit))

    def cross(self, name: str, embedding: Covered, e: Float[Tensor, "B L H"]) -> None:
        """2 ⟨gradient as embedding, gradient as output layer⟩ of each unit, for a weight that is both."""
        e = embedding.looked_up(e.to(self.hidden.dtype))
        squared = self.run.found[name].squared_norm[:, embedding.layer]
        for rows, at_inputs, hidden, unit in self._crossed.pop(name):
            product = ((hidden @ e[rows].flatten(0, 1).mT) * at_inputs).sum(1)
            inside = unit >= 0
            squared.index_add_(0, unit[inside], 2 * product[inside].to(torch.float64))
