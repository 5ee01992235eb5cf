"""The output layer's part of a measurement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlzoo.policy import Sequences
from rlzoo.policy.head import Head
from rlzoo.variance.factored import Block, Projection, Sum, at_least_float32
from rlzoo.variance.modules import Covered
from rlzoo.variance.tasks import Pass, connected

if TYPE_CHECKING:
    from rlzoo.variance.gradients import Measurement

CHUNK_ENTRIES = 2**24
"""Logits that are held at a time, several times over: 64 MB in float32."""


@dataclass
class _Score:
    """∂ loss / ∂ logits at the positions of a cluster, up to a factor per position, for all tasks."""

    values: Float[Tensor, "n V"]
    hidden: Float[Tensor, "n H"]
    gram: Float[Tensor, "n n"] = field(init=False)
    """Inner products of the output layer's gradients of each two positions."""

    def __post_init__(self) -> None:
        self.gram = (self.values @ self.values.mT) * (self.hidden @ self.hidden.mT)

    def sketch(self, projection: Projection) -> Float[Tensor, "n D"]:
        """The projected gradient of the output layer of each position."""
        left, right = projection.matrices(self.values.shape[1], self.hidden.shape[1])
        return ((self.values @ left)[:, :, None] * (self.hidden @ right)[:, None, :]).flatten(1)


class HeadPass:
    """The output layer for all tasks at once: ∂ log π / ∂ logits is one tensor, whose rows each task scales.

    Rows that share a unit form a cluster; a few clusters fill a chunk of logits.
    """

    def __init__(
        self,
        run: Measurement,
        sequences: Sequences,
        hidden: Float[Tensor, "N H"],
        batch: Sequence[int],
        blocks: Mapping[str, Sequence[Block]],
        passes: Sequence[Pass],
    ) -> None:
        self.run, self.modules, self.head = run, run.meter.modules, run.meter.head
        self.shape = sequences.ids.shape
        self.sequences, self.hidden = sequences, hidden.to(at_least_float32(hidden.dtype))
        self.temperatures = sequences.temperatures
        self.pull = [torch.zeros_like(self.hidden) for _ in passes]
        """∂ loss / ∂ hidden of each pass."""
        self._unit = {name: self._units(some) for name, some in blocks.items()}
        self._crossed: dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {name: [] for name in blocks}
        self._position_row = sequences.rows
        index, width = torch.as_tensor(batch, device=hidden.device), sequences.mask.shape[1]

        def flat(per_token: Tensor) -> Tensor:
            return sequences.flat(per_token[index, :width]).to(self.hidden)

        tasks = {name: run.tasks[name] for name in blocks}
        self._weight = {name: flat(task.weight) for name, task in tasks.items()}
        self._shared = [None if shared.alone else flat(shared.weight) for shared in passes]
        self._alone = {name: n for n, shared in enumerate(passes) if shared.alone for name in shared.scale}
        self._term_weight = {
            name: flat(task.term_weight)
            for name, task in tasks.items()
            if task.term is not None and task.term_weight is not None
        }
        self._references: dict[int, Tensor] = {}
        """Hidden states of the models that give logits to terms, by the model's id."""
        for name in self._term_weight:
            model = tasks[name].reference
            if model is not None and id(model) not in self._references:
                with torch.no_grad():
                    self._references[id(model)] = model.hidden(sequences)
        for clusters in self._chunks():
            self._chunk(clusters)
        policy = run.meter.policy
        for name, task in tasks.items():
            for key, weight in task.input_weights.items():
                with torch.enable_grad():
                    leaf = hidden.detach().requires_grad_(True)
                    made = policy.of_hidden(key, leaf)
                    (pull,) = torch.autograd.grad(made, leaf, flat(weight).to(made.dtype))
                self.pull[self._alone[name]] += pull.to(self.hidden)

    def _units(self, blocks: Sequence[Block]) -> Int[Tensor, " B"]:
        """The unit of each row; -1 where it is in none of the task's."""
        unit = torch.full(self.shape[:1], -1, device=self.hidden.device)
        for block in blocks:
            unit[block.rows] = block.units[:, None]
        return unit

    def _chunks(self) -> Iterator[list[Tensor]]:
        """The positions of clusters, as many clusters at a time as a chunk of logits holds."""
        units_by_task = []
        for unit in self._unit.values():
            rows: dict[int, tuple[int, ...]] = {}
            for row, u in enumerate(unit.tolist()):
                if u >= 0:
                    rows[u] = (*rows.get(u, ()), row)
            units_by_task.append(rows.values())
        limit, held = CHUNK_ENTRIES // self.head.layer.weight.shape[0], 0
        chunk: list[Tensor] = []
        for cluster in connected(units_by_task):
            at = torch.isin(self._position_row, torch.tensor(cluster, device=self.hidden.device)).nonzero()[:, 0]
            if chunk and held + len(at) > limit:
                yield chunk
                held, chunk = 0, []
            held, chunk = held + len(at), [*chunk, at]
        if chunk:
            yield chunk

    def _chunk(self, clusters: Sequence[Int[Tensor, " n"]]) -> None:
        at = torch.cat(list(clusters))
        hidden, target, matrix = self.hidden[at], self.sequences.targets[at], self.head.layer.weight.detach()
        with torch.no_grad():
            raw = self.head.raw(hidden.to(matrix.dtype)).to(hidden.dtype)
        with torch.enable_grad():
            logits = self._finish(self.head, raw.requires_grad_(True), at)
            logp = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)
            terms = self._terms(logits, target, at)
        (score,) = torch.autograd.grad(logp.sum(), raw, retain_graph=bool(terms))
        extra = {name: torch.autograd.grad(term, raw, retain_graph=True)[0] for name, term in terms.items()}
        del logits, logp, terms, raw
        plain, back = self._scores(clusters, score, hidden), self.head.back(score).to(hidden.dtype)
        for pull, shared in zip(self.pull, self._shared, strict=True):
            if shared is not None:
                pull[at] = shared[at][:, None] * back
        for name in self._weight:
            weight = torch.where(self._unit[name][self._position_row[at]] >= 0, self._weight[name][at], 0)
            if name in extra:
                own = weight[:, None] * score + extra[name]
                scores, weight = self._scores(clusters, own, hidden), torch.ones_like(weight)
                self.pull[self._alone[name]][at] = self.head.back(own).to(hidden.dtype)
            else:
                own, scores = score, plain
                if name in self._alone:
                    self.pull[self._alone[name]][at] = weight[:, None] * back
            self._take(name, own, scores, weight, at, clusters)

    def _finish(self, head: Head, raw: Tensor, at: Tensor) -> Tensor:
        """Logits at the temperature of each position, from what the output layer gives."""
        logits = head.finish(raw)
        return logits if self.temperatures is None else logits / self.temperatures[at, None].to(logits.dtype)

    def _scores(self, clusters: Sequence[Tensor], score: Tensor, hidden: Tensor) -> list[_Score]:
        sizes = [len(cluster) for cluster in clusters]
        return [_Score(s, h) for s, h in zip(torch.split(score, sizes), torch.split(hidden, sizes), strict=True)]

    def _terms(self, logits: Tensor, target: Tensor, at: Tensor) -> dict[str, Tensor]:
        """The full-vocabulary losses of the tasks that have one, summed."""
        found = {}
        for name, weight in self._term_weight.items():
            term, reference = self.run.tasks[name].term, self.run.tasks[name].reference
            other = None
            if reference is not None:
                states = self._references[id(reference)][at]
                other = self._finish(reference.head, reference.head.raw(states), at).detach()
            value = None if term is None else term(logits, other, target)
            if value is not None:
                found[name] = (value * weight[at])[self._unit[name][self._position_row[at]] >= 0].sum()
        return found

    def _take(
        self, name: str, score: Tensor, scores: Sequence[_Score], weight: Tensor, at: Tensor, clusters: Sequence[Tensor]
    ) -> None:
        """The output layer's own parameters, for one task and one chunk."""
        own, layer = self.modules.head_parameters, self.modules.head_layer
        if layer is None:
            return
        found = self.run.found[name]
        if "weight" in own:
            weighted = weight[:, None] * torch.cat([s.hidden for s in scores])
            found.mean[own["weight"]].addmm_(score.mT, weighted, alpha=1 / len(found.squared_norm))
        for one, positions, w in zip(scores, clusters, torch.split(weight, [len(a) for a in clusters]), strict=True):
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
                    factored = Sum((one.values[chosen] * w[chosen, None])[None])
                    self.run.add(name, own["bias"], layer, u[None], factored)
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
