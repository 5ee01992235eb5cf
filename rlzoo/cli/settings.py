"""From the options of a command to settings: those of an experiment, or those of a single training run.

``--set KEY=VALUE`` is the same in all commands: the key is the dotted name of a setting. Other options are shorthands
for settings that are often changed; ``--set`` overrides a shorthand for the same setting.
"""

from __future__ import annotations

import difflib
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, TypeVar, Union, get_args, get_origin

import pydantic
import yaml

from rlzoo.config import (
    WARM_UP,
    Experiment,
    OnBadRow,
    ProblemSource,
    Scoring,
    Seed,
    Strict,
    TableSource,
    Training,
    lay,
    load_experiment,
    validated,
)
from rlzoo.errors import UserError

_Settings = TypeVar("_Settings", bound=pydantic.BaseModel)
TRAINING_LIMITS = ("train.limit", "rollouts.prompts")
SHORTHANDS: dict[str, tuple[str, ...]] = {
    "model": ("model",),
    "reward": ("reward",),
    "data": ("train.source",),
    "bad_rows": ("train.bad_rows",),
    "limit": TRAINING_LIMITS,
    "train_limit": TRAINING_LIMITS,
    "steps": ("training.steps",),
    "batch_size": ("training.batch_size",),
    "samples": ("evaluation.samples",),
    "rollout_samples": ("rollouts.samples",),
    "k": ("evaluation.k",),
}
"""Options → the settings of an experiment. If two set the same one, the later in this table counts."""


class TrainSettings(Strict):
    """The settings of ``rlzoo train``: an objective, a buffer and a model."""

    objective: str
    options: Mapping[str, Any] = {}
    training: Training = Training()
    model: str = "embedded"
    buffer: TableSource
    seed: Seed = 0


class RescoreSettings(Strict):
    """The settings of ``rlzoo rescore``: a buffer and a reward."""

    buffer: str
    reward: Any
    columns: Mapping[str, str] = {}
    scoring: Scoring = Scoring()
    bad_rows: OnBadRow = "reject"


def train_settings(
    given: Mapping[str, Any],
    options: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    sets: Sequence[str] | None = None,
) -> TrainSettings:
    """The settings of ``rlzoo train`` from its options. Raises UserError naming a wrong one.

    ``given`` are the options that take one value, by the dotted name of their setting; None keeps the default.
    """
    named = {"options": pairs(options or (), "--option"), "buffer.columns": pairs(columns or (), "--column")}
    return _laid(TrainSettings, "rlzoo train", given, named, sets)


def rescore_settings(
    given: Mapping[str, Any], columns: Sequence[str] | None = None, sets: Sequence[str] | None = None
) -> RescoreSettings:
    """The settings of ``rlzoo rescore``, as those of `train_settings`."""
    return _laid(RescoreSettings, "rlzoo rescore", given, {"columns": pairs(columns or (), "--column")}, sets)


def _laid(
    model: type[_Settings], command: str, given: Mapping[str, Any], named: Mapping[str, Any], sets: Sequence[str] | None
) -> _Settings:
    """Settings from options, where later ones override earlier ones; those that are None are left out."""
    single = {key: value for key, value in given.items() if value is not None}
    data: dict[str, Any] = {}
    for changes in (single, named, changes_of(sets, model)):
        for key, value in changes.items():
            lay(data, key, value)
    return validated(model, data, command)


def experiment_of(
    name: str,
    sets: Sequence[str] | None = None,
    *,
    columns: Sequence[str] | None = None,
    test_data: str | None = None,
    test_limit: int | None = None,
    algorithms: str | None = None,
    learning_rates: str | None = None,
    seeds: str | None = None,
    twin: bool = False,
    **shorthands: str | int | None,
) -> Experiment:
    """The experiment of that name or file, changed by the options of a command. Raises UserError naming a wrong one."""
    given: dict[str, Any] = {option: value for option in SHORTHANDS if (value := shorthands.get(option)) is not None}
    if "k" in given:
        several = _numbers(str(given["k"]), int, "--k")
        given["k"] = several if len(several) > 1 else several[0]
    changes = {key: value for option, value in given.items() for key in SHORTHANDS[option]}
    other = changes_of(sets, Experiment)
    plain = load_experiment(name, {**changes, **other}, twin)
    if columns and test_data is None and given.get("data") is None:
        raise UserError("--column says what the columns of --data and --test-data are: give one of these with it")
    if columns and given.get("data") is not None:
        changes |= {f"train.{key}": value for key, value in _renamed(columns, plain.train).items()}
    tests = _tests(plain, other, test_data, given.get("limit") if test_limit is None else test_limit, columns)
    grid = _grid(plain, other, algorithms, learning_rates, seeds, {"steps", "batch_size"} & set(given))
    return load_experiment(name, {**changes, **other, **tests, **grid}, twin)


def experiment_of_model(name: str, sets: Sequence[str] | None, model: str | None, **options: Any) -> Experiment:
    """`experiment_of` for commands that run one model: one that ``--model`` or ``--set`` names is not warmed up."""
    found = experiment_of(name, sets, model=model, **options)
    named = model is not None or any(text.partition("=")[0] == "model" for text in sets or ())
    return found.model_copy(update={"warm_up": None}) if named else found


def changes_of(sets: Sequence[str] | None, model: type[pydantic.BaseModel]) -> dict[str, Any]:
    """The changes that ``--set`` requests: dotted names of settings → values."""
    return {dotted(key, model): value for key, value in pairs(sets or (), "--set").items()}


def dotted(key: str, model: type[pydantic.BaseModel]) -> str:
    """The full name of a setting. Its section may be left out if only one section has such a setting.

    Raises UserError for a key that names no setting, or settings of several sections.
    """
    first = key.partition(".")[0]
    if first in model.model_fields:
        return key
    names = [name for name in names_of(model) if not name.startswith(f"{WARM_UP}.")]  # it would appear unasked
    homes = [name for name in names if name.rpartition(".")[2] == first]
    if len(homes) == 1:
        return homes[0] + key[len(first) :]
    if homes:
        raise UserError(f"--set {key} could mean {' or '.join(homes)}: write one of them in full")
    known = {name.rpartition(".")[2]: name for name in names} | {name: name for name in names}
    near = difflib.get_close_matches(key, known, n=1)
    meant = [known[name] for name in near] + [f"options.{key}"] * ("options" in model.model_fields)
    hint = f"did you mean {' or '.join(meant)}?" if meant else f"known: {', '.join(model.model_fields)}"
    raise UserError(f"--set {key}: unknown setting: {hint}")


def names_of(model: type[pydantic.BaseModel]) -> list[str]:
    """The dotted names of all settings, except those under a name that the user chooses (of a benchmark or a row)."""
    inner = [f"{section}.{field}" for section, part in _sections(model) for field in part.model_fields]
    return [*model.model_fields, *inner]


def _sections(model: type[pydantic.BaseModel]) -> Iterator[tuple[str, type[pydantic.BaseModel]]]:
    """The settings that contain settings themselves, except those under a name that the user chooses."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        yield from ((name, part) for part in parts if isinstance(part, type) and issubclass(part, pydantic.BaseModel))


def _tests(
    plain: Experiment, other: Mapping[str, Any], source: str | None, limit: Any, columns: Sequence[str] | None
) -> dict[str, Any]:
    """The benchmarks, retention and validation sets as options change them; ``other`` (--set) takes precedence.

    ``columns`` are those of the data that options name: ``source``, and a source of validation problems in ``other``.
    """

    def changed(place: str, problems: ProblemSource, **over: Any) -> dict[str, Any]:
        asked = {key: value for key, value in over.items() if value is not None and f"{place}.{key}" not in other}
        return problems.model_dump() | asked

    def renamed(given: str | None, problems: ProblemSource) -> dict[str, Any]:
        return {} if given is None else _renamed(columns, problems)

    benchmarks = {
        name: changed(f"benchmarks.{name}", problems, source=source, limit=limit, **renamed(source, problems))
        for name, problems in plain.benchmarks.items()
    }
    retention = {
        name: changed(f"retention.{name}", problems, limit=limit) for name, problems in plain.retention.items()
    }
    own = other.get("validation.source")
    validation = plain.validation and changed(
        "validation", plain.validation, limit=limit, **renamed(own, plain.validation)
    )
    return {"benchmarks": _distinct(benchmarks), "retention": retention, "validation": validation}


def _distinct(sets: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Problem sets less those that equal an earlier one, having differed from it in what --test-data replaces."""
    found: dict[str, dict[str, Any]] = {}
    for name, one in sets.items():
        if one not in found.values():
            found[name] = one
    return found


def _renamed(columns: Sequence[str] | None, problems: ProblemSource) -> dict[str, Any]:
    """The settings of a problem set that --column changes; a value may be a template, and so is no YAML."""
    given = {}
    for text in columns or ():
        name, equals, column = text.partition("=")
        if not (name and equals and column):
            raise UserError(f"--column {text!r}: write NAME=COLUMN")
        given[name] = column
    own = {name: given.pop(name) for name in ("prompt", "solution", "quality") if name in given}
    return own | ({"columns": {**problems.columns, **given}} if given else {})


def _grid(
    plain: Experiment,
    other: Mapping[str, Any],
    algorithms: str | None,
    rates: str | None,
    seeds: str | None,
    asked: Set[str],
) -> dict[str, Any]:
    """The rows, seeds and baseline as --algorithms, --learning-rates and --seeds change them.

    ``asked`` are the training settings that were given as options: they also apply to rows with settings of their own.
    ``other`` (--set) takes precedence.
    """
    changes: dict[str, Any] = {}
    rows = {name: row.model_dump() for name, row in plain.algorithms.items()}
    if algorithms is not None:
        rows = rows_of(algorithms.split(","), rows)
        if plain.baseline in plain.algorithms and plain.baseline not in rows and "baseline" not in other:
            changes["baseline"] = next(iter(rows))
    numbers = None if rates is None else _numbers(rates, float, "--learning-rates")
    for name, row in rows.items():
        lost = {key for key in asked if f"algorithms.{name}.training.{key}" not in other}
        lost |= {"epochs"} if "steps" in lost else set()
        rows[name] = {**row, "training": {k: v for k, v in row.get("training", {}).items() if k not in lost}}
        if numbers is not None and f"algorithms.{name}.learning_rates" not in other:
            rows[name]["learning_rates"] = numbers
    if seeds is not None and "seeds" not in other:
        changes["seeds"] = _numbers(seeds, int, "--seeds")
    return {**changes, "algorithms": rows}


def rows_of(specs: Sequence[str], present: Mapping[str, Any]) -> dict[str, Any]:
    """The rows that --algorithms names: those of the experiment keep their settings, others get its defaults.

    Raises UserError for an unknown objective, and for one that is named twice.
    """
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
    """The KEY=VALUE texts of an option, with values read as YAML. Raises UserError for anything else."""
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


def check_validation(experiment: Experiment, data: str | None) -> None:
    """Raise UserError if learning rates would be chosen on a built-in task, while --data has replaced its problems."""
    from rlzoo.worlds import WORLD_PREFIX

    chosen_on = experiment.validation.source if experiment.validation is not None else ""
    is_chosen = any(len(row.learning_rates) > 1 for row in experiment.algorithms.values())
    if data is not None and is_chosen and not data.startswith(WORLD_PREFIX) and chosen_on.startswith(WORLD_PREFIX):
        raise UserError(
            f"learning rates would be chosen on {chosen_on} and not on problems of yours: give some, with --set "
            "validation.source=FILE"
        )


def check_public(public: bool, push_to_hub: str | None) -> None:
    """Raise UserError for --public without --push-to-hub."""
    if public and push_to_hub is None:
        raise UserError("--public says who may see what is pushed: add --push-to-hub NAMESPACE/NAME")


def prepare(threads: int | None, trust_remote_code: bool) -> None:
    """Set the number of threads and whether a model's own code may run, here and in processes started from here."""
    allow_remote_code(trust_remote_code)
    if threads is not None:
        import torch

        from rlzoo.jobs.pool import THREAD_VARIABLES

        os.environ.update({name: str(threads) for name in THREAD_VARIABLES})
        torch.set_num_threads(threads)


def allow_remote_code(allowed: bool) -> None:
    """Allow a model's own code to run. This is the only way: no file can request it."""
    if allowed:
        os.environ["RLZOO_TRUST_REMOTE_CODE"] = "1"  # an environment variable, so that worker processes have it too
