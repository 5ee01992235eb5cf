"""The grid of a comparison: its cells, its buffers, and the choice of learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any
from urllib.parse import quote

from rlzoo.config import Experiment
from rlzoo.errors import UserError


@dataclass(frozen=True)
class Cell:
    """One training run of a comparison: an algorithm, a seed and a learning rate."""

    algorithm: str
    seed: int
    learning_rate: float

    @property
    def id(self) -> str:
        """A unique name that is safe for a folder."""
        return f"{quote(self.algorithm, safe='')}-lr{self.learning_rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class FirstStages:
    """What rows with the same first stages have in common for a seed: the training of these stages."""

    names: tuple[str, ...]
    """The rows of the stages."""
    seed: int

    @property
    def id(self) -> str:
        """A unique name that is safe for a folder."""
        return f"stage {'+'.join(quote(name, safe='') for name in self.names)}-seed{self.seed}"

    def is_of(self, experiment: Experiment, cell: Cell) -> bool:
        """Whether a cell continues from these stages, or reports them."""
        names = experiment.stages_of(cell.algorithm)
        if cell.seed != self.seed or names[: len(self.names)] != self.names:
            return False
        return len(names) > len(self.names) or is_reported(experiment, cell)


def first_stages(experiment: Experiment) -> list[FirstStages]:
    """The stages that some row continues from, once per seed: the first stages before the second."""
    rows = [row.stages for row in experiment.algorithms.values()]
    found = dict.fromkeys(stages[:number] for stages in rows for number in range(1, len(stages)))
    return [FirstStages(names, seed) for names in sorted(found, key=len) for seed in experiment.seeds]


def is_reported(experiment: Experiment, cell: Cell) -> bool:
    """Whether a cell ends where other rows go on: then it is trained once for all of them.

    Not with adapters, which the weights that others continue from have merged, nor at a learning rate of its own.
    """
    names = experiment.stages_of(cell.algorithm)
    goes_on = any(row.stages[: len(names)] == names != row.stages for row in experiment.algorithms.values())
    own = experiment.learning_rates_of(names[-1])[0] == cell.learning_rate
    return goes_on and own and experiment.training_of(names[-1]).lora is None


def cells(experiment: Experiment) -> list[Cell]:
    """All cells of the grid. Seeds vary slowest, so that every algorithm has a result early."""
    return [
        Cell(name, seed, rate)
        for seed in experiment.seeds
        for name in experiment.algorithms
        for rate in experiment.learning_rates_of(name)
    ]


def sampling_seeds(experiment: Experiment) -> dict[str, int]:
    """The buffers with samples of the base policy: name → the seed of its samples."""
    if experiment.rollouts.per_seed:
        return {buffer_of(experiment, seed): seed for seed in experiment.seeds}
    return {"buffer": 0}


def buffer_of(experiment: Experiment, seed: int) -> str:
    """The name of the buffer that the cells of a seed learn from."""
    return f"buffer-seed{seed}" if experiment.rollouts.per_seed else "buffer"


def workers_at(experiment: Experiment, workers: int | None, executor: str) -> int | None:
    """How many cells may run at a time: one if cells would share a vLLM server, else ``workers``.

    A server holds the weights of one policy at a time. Raises UserError if more workers were requested.
    """
    online = any(row.mode == "online" for row in experiment.algorithms.values())
    url = experiment.evaluation.url or (experiment.rollouts.url if online else None)
    if url is None:
        return workers
    if executor == "ray" or (workers or 1) > 1:
        where = url if isinstance(url, str) else " and ".join(url)
        raise UserError(
            f"the vLLM server at {where} holds one policy's weights at a time, so cells cannot share it: "
            "use --workers 1 and no --executor, or leave the url out for an engine in each process"
        )
    return 1


def has_choice(experiment: Experiment, algorithm: str) -> bool:
    """Whether the algorithm's learning rate is chosen on validation."""
    return len(experiment.learning_rates_of(algorithm)) > 1


def chosen_cells(
    experiment: Experiment, results: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Cell], dict[str, dict[str, float]]]:
    """The cells to report, and the mean results on validation: algorithm → learning rate → avg@k.

    ``results`` are those of the cells that succeeded, by id. Each algorithm is reported at the learning rate with the
    best mean on validation.
    """
    grid = [cell for cell in cells(experiment) if cell.id in results]
    chosen: list[Cell] = []
    tried: dict[str, dict[str, float]] = {}
    for name in experiment.algorithms:
        by_rate: dict[float, list[Cell]] = {}
        for cell in grid:
            if cell.algorithm == name:
                by_rate.setdefault(cell.learning_rate, []).append(cell)
        if not by_rate:
            continue
        best = next(iter(by_rate))
        if has_choice(experiment, name):
            means = {rate: mean(results[cell.id]["validation"] for cell in some) for rate, some in by_rate.items()}
            tried[name] = {f"{rate:g}": value for rate, value in means.items()}
            whole = max(map(len, by_rate.values()))  # a rate that failed on some seeds must not win on the others
            best = max((rate for rate in means if len(by_rate[rate]) == whole), key=means.__getitem__)
        chosen += by_rate[best]
    return chosen, tried


def tuning_of(
    experiment: Experiment, results: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The cost of choosing learning rates: algorithm → learning rate → seed, validation result and costs of each cell.

    ``results`` are those of the cells that succeeded, by id; algorithms with a single learning rate are left out.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for cell in cells(experiment):
        if has_choice(experiment, cell.algorithm) and cell.id in results:
            own = {"seed": cell.seed, **{key: results[cell.id][key] for key in ("validation", "costs")}}
            found.setdefault(cell.algorithm, {}).setdefault(f"{cell.learning_rate:g}", []).append(own)
    return found


def lost_cells(experiment: Experiment, results: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    """The cells whose weights will not be read again: another learning rate is reported, whatever else happens.

    As long as a cell of the algorithm has no result, it may yet decide; one that failed is tried again when the run
    resumes.
    """
    chosen, _ = chosen_cells(experiment, results)
    grid = cells(experiment)
    decided = {c.algorithm for c in chosen} - {cell.algorithm for cell in grid if cell.id not in results}
    return [cell for cell in grid if cell.algorithm in decided and cell not in chosen]
