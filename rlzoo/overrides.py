"""Options of the command line that change an experiment."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from rlzoo.errors import UserError

if TYPE_CHECKING:
    from rlzoo.config import Experiment, ProblemSource, Table

_TRAINING_LIMITS = ("train.limit", "rollouts.prompts")
_OPTIONS: dict[str, tuple[type, str, tuple[str, ...]]] = {
    "model": (str, "'embedded', a folder, or a Hub id", ("model",)),
    "reward": (str, "a name, package.module:Name, or path/to/file.py:Name", ("reward",)),
    "data": (str, "training problems: a file, a folder of shards, a Hub id, or world:NAME/SPLIT", ("train.source",)),
    "test-data": (str, "benchmark problems, for every benchmark of the experiment", ()),
    "bad-rows": (
        str,
        "what to do with rows that cannot be used: reject (stop there), or drop (and count them)",
        ("train.bad_rows",),
    ),
    "limit": (int, "use at most this many problems of each set", _TRAINING_LIMITS),
    "train-limit": (int, "use at most this many training problems", _TRAINING_LIMITS),
    "test-limit": (int, "use at most this many problems of each benchmark, and of validation", ()),
    "steps": (int, "optimizer steps", ("training.steps",)),
    "batch-size": (int, "sequences per optimizer step", ("training.batch_size",)),
    "samples": (int, "samples per problem when evaluating", ("evaluation.samples",)),
    "rollout-samples": (int, "samples per prompt to learn from", ("rollouts.samples",)),
    "k": (int, "pass@k's k", ("evaluation.k",)),
}
"""Options that change an experiment: type, help, and the settings they stand for. Of two for one the later counts."""


def add_overrides(command: argparse.ArgumentParser, *options: str, default: str = "arithmetic") -> None:
    """The experiment, and those of `_OPTIONS` that matter to this command."""
    command.add_argument("experiment", nargs="?", default=default, help="a name (rlzoo list) or a .yaml file")
    for name in ("model", "reward", *options):
        kind, text, _ = _OPTIONS[name]
        command.add_argument(f"--{name}", type=kind, help=text)
    add_trust(command)
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="any other setting, by its dotted name; the value is YAML: --set rollouts.temperature=0.8",
    )  # fmt: skip


def add_trust(command: argparse.ArgumentParser) -> None:
    """The one way to let a model bring code of its own: no file can ask for it."""
    command.add_argument("--trust-remote-code", action="store_true", help="run the code that the model's folder brings")


def add_table(command: argparse.ArgumentParser) -> None:
    """What is trained on: a saved buffer or a table, and how the table is read."""
    command.add_argument("--buffer", required=True, help="a saved buffer (see rollout), or a table in a TRL format")
    command.add_argument("--split", help="of a table: which split of a Hub data set or folder")
    command.add_argument(
        "--column", action="append", default=[], metavar="NAME=COLUMN",
        help="of a table: the column that stands for one of the format, as in completion=response",
    )  # fmt: skip
    command.add_argument(
        "--bad-rows", choices=("reject", "drop"), default="reject",
        help="of a table: stop at a row that cannot be used, or drop such rows and count them",
    )  # fmt: skip


def table_of(arguments: argparse.Namespace) -> Table:
    """The table that the options of `add_table` name."""
    from rlzoo.config import Table, validated

    given = {"source": arguments.buffer, "split": arguments.split, "bad_rows": arguments.bad_rows}
    return validated(Table, {**given, "columns": pairs(arguments.column, "--column")}, "buffer")


def add_processes(command: argparse.ArgumentParser) -> None:
    """How many processes the work is spread over, and how many threads each of them has."""
    command.add_argument("--workers", type=int, help="processes; default: one per core")
    command.add_argument("--threads", type=int, default=1, help="threads per process; default 1")


def check_processes(arguments: argparse.Namespace) -> None:
    """Raises UserError for numbers of workers or threads that cannot be."""
    for option in ("workers", "threads"):
        if (number := getattr(arguments, option, None)) is not None and number < 1:
            raise UserError(f"--{option} {number}: give a whole number of at least 1")


def add_threads(command: argparse.ArgumentParser) -> None:
    """How many threads a command has that does its work in this process."""
    command.add_argument("--threads", type=int, help="threads of this process; default: PyTorch's own choice")


def use_threads(arguments: argparse.Namespace) -> None:
    """Compute with as many threads as `add_threads` was told, here and in processes that are started. Imports torch."""
    check_processes(arguments)
    if arguments.threads is not None:
        import torch

        from rlzoo.comparison.pool import THREAD_VARIABLES

        os.environ.update({name: str(arguments.threads) for name in THREAD_VARIABLES})
        torch.set_num_threads(arguments.threads)


def experiment_of(arguments: argparse.Namespace) -> Experiment:
    """The experiment with the command's options laid over it."""
    from rlzoo.config import load_experiment

    given = {name: getattr(arguments, name.replace("-", "_"), None) for name in _OPTIONS}
    changes = {key: given[name] for name in _OPTIONS if given[name] is not None for key in _OPTIONS[name][2]}
    other = pairs(arguments.set, "--set")
    plain = load_experiment(arguments.experiment, {**changes, **other})
    return load_experiment(
        arguments.experiment, {**changes, **other, **_tests(given, plain, other), **_grid(arguments, plain)}
    )


def _tests(given: Mapping[str, Any], plain: Experiment, other: Mapping[str, Any]) -> dict[str, Any]:
    """The benchmarks and the validation set as options change them; what ``other`` (--set) says of one counts more."""
    limit = given["limit"] if given["test-limit"] is None else given["test-limit"]

    def changed(place: str, problems: ProblemSource, **over: Any) -> dict[str, Any]:
        asked = {key: value for key, value in over.items() if value is not None and f"{place}.{key}" not in other}
        return problems.model_dump() | asked

    benchmarks = {
        name: changed(f"benchmarks.{name}", problems, source=given["test-data"], limit=limit)
        for name, problems in plain.benchmarks.items()
    }
    validation = plain.validation and changed("validation", plain.validation, limit=limit)
    return {"benchmarks": benchmarks, "validation": validation}


def _grid(arguments: argparse.Namespace, plain: Experiment) -> dict[str, Any]:
    """What --algorithms, --learning-rates and --seeds of compare change in an experiment."""
    algorithms, rates, seeds = (getattr(arguments, name, None) for name in ("algorithms", "learning_rates", "seeds"))
    changes: dict[str, Any] = {}
    rows = {name: row.model_dump() for name, row in plain.algorithms.items()}
    if algorithms is not None:
        rows = rows_of(algorithms.split(","), rows)
        if plain.baseline in plain.algorithms and plain.baseline not in rows:
            changes["baseline"] = next(iter(rows))
    asked = {key for key in ("steps", "batch_size") if getattr(arguments, key, None) is not None}
    for name, row in rows.items():  # what is asked for here counts for rows with settings of their own too
        own = {key: value for key, value in row.get("training", {}).items() if key not in asked}
        rows[name] = {**row, "training": own}
    if rates is not None:
        numbers = _numbers(rates, float, "--learning-rates")
        rows = {name: {**row, "learning_rates": numbers} for name, row in rows.items()}
    if seeds is not None:
        changes["seeds"] = _numbers(seeds, int, "--seeds")
    return {**changes, "algorithms": rows}


def rows_of(specs: Sequence[str], present: Mapping[str, Any]) -> dict[str, Any]:
    """Rows for --algorithms: those of the experiment keep their settings, others get the experiment's defaults."""
    from rlzoo.objective import objective_class
    from rlzoo.registry import canonical

    rows: dict[str, Any] = {}
    for spec in specs:
        same = canonical(spec)
        row = same if same in present else objective_class(spec.strip()).name
        if row in rows:
            raise UserError(f"the list of algorithms names {row!r} twice: name each once")
        rows[row] = present[row] if same in present else {"objective": spec.strip()}
    return rows


def _numbers(text: str, kind: Callable[[str], float], option: str) -> list[float]:
    numbers = []
    for part in text.split(","):
        try:
            numbers.append(kind(part))
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"{option}: {part!r} is not {what}; separate numbers by commas") from None
    return numbers


def pairs(texts: Sequence[str], option: str) -> dict[str, Any]:
    """KEY=VALUE texts of an option, the values read as YAML."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{option} {text!r}: write KEY=VALUE")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{option} {text!r}: the value is not valid YAML") from None
    return found
