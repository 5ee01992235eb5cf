"""Experiment files: those that ship with rlzoo, and a user's own, with changes applied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlzoo.config.settings import Experiment
from rlzoo.config.validation import validated
from rlzoo.errors import UserError, unknown

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
"""The folder of the experiments that ship with rlzoo."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a mapping may have each key only once; PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag.endswith(":merge") or not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                problem = f"it has the key {key.value!r} more than once"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def list_experiments() -> dict[str, str]:
    """The experiments that ship with rlzoo: name → description."""
    found = {}
    for path in sorted(EXPERIMENTS.glob("*.yaml")):
        found[path.stem] = str(read_yaml(path).get("description", "")).strip()
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError, with the line, if the file is missing, invalid or anything else."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        raise UserError(f"experiment file {str(path)!r} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path}:{line} not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: an experiment is a mapping of settings, not {type(data).__name__}")
    return data


def load_experiment(name: str, changes: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment of a name or a file path, with ``changes`` (dotted keys → values) applied.

    Raises UserError for an unknown name, an unreadable file, and a wrong setting, which it names.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else EXPERIMENTS / f"{name}.yaml"
    if not name.endswith((".yaml", ".yml")) and not path.is_file():
        raise unknown("experiment", name, [p.stem for p in EXPERIMENTS.glob("*.yaml")])
    data = {"name": path.stem, **read_yaml(path)}
    for key, value in (changes or {}).items():
        lay(data, key, value)
    return validated(Experiment, data, str(path.name))


def lay(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings. Mappings on its path are copied, or created if they are missing."""
    *parents, last = key.split(".")
    for parent in parents:
        child = data.get(parent)
        data[parent] = child = dict(child) if isinstance(child, Mapping) else {}
        data = child
    data[last] = value
