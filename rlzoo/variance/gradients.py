"""The norm of every unit's gradient: one forward pass over the batch, and at most one backward pass per objective.

A unit is any set of rows: a row, a pair, a group, or, as in the analyzer, all rows of a prompt. Inside a layer
y = W x the gradient of a unit is Σ_t e_t x_tᵀ over its positions, with e the gradient at y, so its norm follows from
what a backward pass computes anyway (arXiv 1510.01799; for sequences, arXiv 2205.09632). Either the Gram matrices of
e and x give it, or the product is formed for a few units of one layer at a time: no tensor of units × parameters ever
exists.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlzoo.policy import MicroBatches, Policy, Sequences
from rlzoo.policy.microbatches import token_batches
from rlzoo.policy.sequences import length
from rlzoo.types import Trajectory
from rlzoo.variance.factored import WIDTH, Block, Factored, Projection, at_least_float32
from rlzoo.variance.head_pass import HeadPass
from rlzoo.variance.modules import Covered, Modules
from rlzoo.variance.tasks import Task, UnitGradients, connected, shared_passes


class GradientMeter:
    """Measures the gradients of a policy's units, for several objectives at a time.

    Raises UserError for a model with a trainable parameter that `Modules` does not cover.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self.head, self.modules = policy, policy.head, Modules(policy)
        self.projections = {
            name: Projection(seed, parameter) for seed, (name, parameter) in enumerate(self.modules.trainable.items())
        }
        self.takes_positions = "position_ids" in inspect.signature(policy.model.base_model.forward).parameters

    def measure(
        self,
        rows: Sequence[Trajectory],
        tasks: Mapping[str, Task],
        micro: MicroBatches | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, UnitGradients]:
        """The gradients of all units of every task, from one forward pass over the rows that any task uses.

        Memory: the activations of a micro-batch (2,048 padded tokens unless ``micro`` says otherwise, or one unit that
        is larger), and one mean gradient per task.
        """
        micro, together = micro or MicroBatches(2048), connected(task.units for task in tasks.values())

        def work() -> Measurement:
            run = Measurement(self, tasks)
            for batch in token_batches(together, list(map(length, rows)), micro.token_budget):
                run.micro_batch(rows, batch)
                if progress is not None:
                    progress(len(batch))
            return run

        trained, training = list(self.modules.trainable.values()), self.policy.training
        self.policy.eval()
        try:
            for parameter in trained:
                parameter.requires_grad_(False)  # autograd then makes no gradient of its own for them
            run = micro.within_memory(rows, work, self.modules.forget)
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            self.policy.train(training)
        return {name: found.scaled(tasks[name].scale) for name, found in run.found.items()}


class Measurement:
    """One pass over the data: what accumulates, and the state of the current micro-batch."""

    def __init__(self, meter: GradientMeter, tasks: Mapping[str, Task]) -> None:
        self.meter, self.tasks = meter, tasks
        self.found = {name: self._empty(task) for name, task in tasks.items()}
        self._unit_of = {n: {row: u for u, unit in enumerate(t.units) for row in unit} for n, t in tasks.items()}
        self._leaves: list[Tensor] = []
        self._passes = shared_passes(tasks)
        self._members: list[tuple[str, list[Block], Tensor | None]] = []
        self._head: HeadPass

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
        sequences = Sequences.of([rows[i] for i in batch], policy.device)
        blocks = {name: found for name in self.tasks if (found := self._blocks_of(name, batch))}
        hidden = self._forward(sequences)
        passes = [shared for shared in self._passes if not blocks.keys().isdisjoint(shared.scale)]
        self._head = HeadPass(self, sequences, hidden.detach(), batch, blocks, passes)
        index = torch.as_tensor(batch, device=policy.device)
        for number, shared in enumerate(passes):
            scales = {name: scale[index] for name, scale in shared.scale.items() if name in blocks}
            self._members = [(n, blocks[n], None if bool((s == 1).all()) else s) for n, s in scales.items()]
            pull = self._head.pull[number].to(hidden.dtype)
            if hidden.requires_grad:  # else only the output layer trains
                torch.autograd.grad(hidden, self._leaves, pull, retain_graph=number + 1 < len(passes))
        self._leaves = []
        del self._head  # it refers to this measurement, and the cycle would keep its means alive
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
        """Called with the gradient at a module's output, for the tasks of the running backward pass."""
        e = covered.by_row(e, *self._head.shape)
        for task, blocks, scale in self._members:
            own = e if scale is None else e * scale.to(e.dtype)[:, None, None]
            for block in blocks:
                for name, factored in covered.factored(block, own):
                    self.add(task, name, covered.layer, block.units, factored)
            if covered is self.meter.modules.tied:
                self._head.cross(task, covered, own)

    def add(self, task: str, name: str, layer: int, units: Int[Tensor, " n"], factored: Factored) -> None:
        """Add one parameter's gradient of some units."""
        found = self.found[task]
        norms = factored.measure(found.mean[name], 1 / len(found.squared_norm))
        found.squared_norm[units, layer] += norms.to(torch.float64)
        found.sketch[units, layer] += factored.sketch(self.meter.projections[name]).to(found.sketch.dtype)
