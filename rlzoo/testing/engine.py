"""An objective in the trainer and in the variance analyzer, on the embedded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlzoo.buffers import OfflineBuffer
from rlzoo.config import Training
from rlzoo.errors import UserError
from rlzoo.inputs import Input, Stage
from rlzoo.objective import Objective, is_composite
from rlzoo.policy import Policy, load_policy, log_probs
from rlzoo.testing.batches import inputs_of
from rlzoo.training import Trainer
from rlzoo.types import Trajectory, Unit, selector_of
from rlzoo.variance import analyze_variance

SETTINGS = Training(steps=2, updates_per_batch=2, learning_rate=1e-4, warmup_ratio=0.0, on_nonfinite="stop")
PROMPTS, SAMPLES = 4, 2


def check_training(objective: Objective, is_random: bool) -> None:
    """Train on two batches of two updates: there must be a gradient, and the micro-batch size must not matter.

    ``is_random``: the objective draws tokens, so micro-batches agree only in expectation.
    """
    whole, single = (_trained(objective, token_budget) for token_budget in (8192, 1))
    gap = float((single - whole).norm() / whole.norm())
    if not is_random and not gap <= 1e-7:
        raise AssertionError(
            f"objective {objective.name!r} is trained differently with micro-batches of one row (weights differ by "
            f"{gap:.1g}): set couples if a coefficient depends on other rows"
        )


def check_analysis(objective: Objective) -> None:
    """The variance analyzer must be able to measure the noise of the gradient."""
    if is_composite(type(objective)):
        return  # its components are analysed
    policy = load_policy("embedded", "float64")
    rows = rows_of(policy, objective)
    experts = [replace(row, source="demonstration") for row in rows]
    if selector_of(objective.learns_from).is_sampled:  # a view may put demonstrations beside the samples
        experts = [*rows, *experts[SAMPLES - 1 :: SAMPLES]]
    buffer = OfflineBuffer.from_trajectories(experts)
    found = analyze_variance(policy, [objective], buffer, rows=len(rows), draws=0)
    if found["objectives"][objective.name]["data_noise"]["trace_cov"] is None:
        raise AssertionError(f"objective {objective.name!r} has no gradient whose noise could be measured")


class SameRows:
    """A source that returns the same rows for every draw."""

    def __init__(self, rows: Sequence[Trajectory], units: Sequence[tuple[int, ...]]) -> None:
        self.rows, self.units = list(rows), list(units)

    def draw(self) -> tuple[list[Trajectory], list[tuple[int, ...]]]:
        """The rows, and which of them belong together."""
        return self.rows, self.units

    def lacks(self, one: Input, at_sampling_temperature: bool) -> bool:
        """Whether any row lacks a stored input; all are at temperature 1."""
        return any(one.stored(row) is None for row in self.rows)


def _trained(objective: Objective, token_budget: int) -> Tensor:
    """The weights after training with micro-batches of at most so many tokens."""
    torch.manual_seed(0)  # for modules with random initialisation
    policy = load_policy("embedded", "float64")
    rows = rows_of(policy, objective)
    sources = [SameRows(rows, units_of(component.objective)) for component in objective.components]
    try:
        settings = SETTINGS.model_copy(update={"token_budget": token_budget})
        record = Trainer(policy, objective, sources, settings).run()
    except UserError as error:
        raise AssertionError(f"objective {objective.name!r} does not train: {error}") from error
    if not any(step["gradient_norm"] for step in record.steps):
        raise AssertionError(f"objective {objective.name!r} does not train: its gradient is 0 in every step")
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def units_of(objective: Objective) -> list[tuple[int, ...]]:
    """The units of `rows_of` that the objective learns from."""
    rows = range(0, PROMPTS * SAMPLES, SAMPLES)
    if selector_of(objective.learns_from).unit is not Unit.ROW:
        return [(row + 1, row) for row in rows]  # the better completion of a pair comes first
    return [(row,) for row in range(PROMPTS * SAMPLES)]


def rows_of(policy: Policy, objective: Objective) -> list[Trajectory]:
    """A wrong and a correct sample per prompt, with all stored inputs."""
    texts = [
        (f"{i // SAMPLES + 1}+{i // SAMPLES + 2}=?\n", f"#### {i + 3}" * (1 + i % 3)) for i in range(PROMPTS * SAMPLES)
    ]
    ids = [tuple(policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair) for pair in texts]
    draw, rows = torch.Generator().manual_seed(0), []
    for i, ((prompt, completion), logp) in enumerate(zip(ids, log_probs(policy, ids), strict=True)):
        held = {}
        for one in inputs_of(objective):
            if one.stage is Stage.STORED:
                held[one.column] = one.example(torch.tensor([logp], dtype=torch.float64), draw)[0].tolist()
        rows.append(
            Trajectory(
                *texts[i],
                prompt,
                completion,
                str(i // SAMPLES),
                source="policy",
                reward=float(i % SAMPLES),
                behaviour_logp=held.get("behaviour_logp", logp),
                reference_logp=held.get("reference_logp"),
                columns={"answer": str(i + 3), **held},
                inputs={name: value for name, value in held.items() if isinstance(value, list)},
            )
        )
    return rows
