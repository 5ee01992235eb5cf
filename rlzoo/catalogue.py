"""What there is to choose from: objectives, rewards, experiments."""

from __future__ import annotations

from typing import Any

from rlzoo.config import list_experiments
from rlzoo.objective import is_composite, list_objectives, objective_class, options_of, own_options_of
from rlzoo.reward import list_rewards


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """Everything that has a name, by kind, with what a user has to know of it."""
    objectives = [
        {
            "name": name,
            "summary": (found.__doc__ or "").partition("\n")[0],
            "source": found.source,
            "learns_from": "its parts' views" if is_composite(found) else found.learns_from.value,
            "options": options_of(found),
        }
        for name, found in ((name, objective_class(name)) for name in list_objectives())
    ]
    return {
        "objectives": objectives,
        "rewards": [{"name": name} for name in list_rewards()],
        "experiments": [{"name": name, "description": text} for name, text in list_experiments().items()],
    }


def catalogue_text() -> str:
    """The catalogue for a terminal."""
    found = catalogue()
    lines = ["objectives (options of all: truncated=keep)"]
    for row in found["objectives"]:
        own = own_options_of(objective_class(row["name"]))
        options = ", ".join(f"{k}={v['default']}" for k, v in own.items())
        lines.append(f"  {row['name']:11} {row['summary']}" + (f" [{options}]" if options else ""))
    lines += ["rewards", "  " + ", ".join(row["name"] for row in found["rewards"]), "experiments"]
    for row in found["experiments"]:
        lines.append(f"  {row['name']:18} {row['description'].split('. ')[0].rstrip('.')}.")
    return "\n".join(lines)
