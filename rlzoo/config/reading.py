"""Settings as plain mappings: reading them from YAML files, and changing one by its dotted key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlzoo.errors import UserError

IN_PLACE_OF = {"training.steps": "epochs", "training.epochs": "steps"}
"""A setting → the one of its section that it replaces, because both say how long to train."""


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


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError, with the line, if the file is missing, invalid or anything else."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {str(path.with_name(near[0]))!r}?" if near and not path.exists() else ""
        raise UserError(f"experiment file {str(path)!r} cannot be read: {error.strerror}{hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path}:{line} not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: an experiment is a mapping of settings, not {type(data).__name__}")
    return data


def lay(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings. Mappings on its path are copied, or created if they are missing.

    A setting that replaces another (`IN_PLACE_OF`) removes that one.
    """
    *parents, last = key.split(".")
    for parent in parents:
        child = data.get(parent)
        data[parent] = child = dict(child) if isinstance(child, Mapping) else {}
        data = child
    data[last] = value
    if value is not None:
        data.pop(IN_PLACE_OF.get(".".join([*parents[-1:], last]), ""), None)
