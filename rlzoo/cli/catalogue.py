"""``rlzoo list``: everything that has a name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from rlzoo.errors import UserError


def list_(
    as_json: Annotated[
        bool, Option("--json", help="Print everything as JSON, with the types and defaults of options.")
    ] = False,
    markdown: Annotated[
        bool, Option("--markdown", help="Print the reference of the built-in objectives, in Markdown.")
    ] = False,
    curves: Annotated[
        bool, Option("--curves", help="Show how objectives for demonstrations weight a token, given its probability.")
    ] = False,
    out: Annotated[
        Path | None, Option("--out", metavar="FOLDER", help="With --curves: write the figure and its numbers here.")
    ] = None,
) -> int:
    """List objectives with their hyper-parameters, rewards, metrics, views, samplers, suites, experiments, and more.

    Examples:
      rlzoo list
      rlzoo list --json
      rlzoo list --markdown > docs/objectives.md
      rlzoo list --curves --out curves
    """
    given = [name for name, on in (("--json", as_json), ("--markdown", markdown), ("--curves", curves)) if on]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: give one of them")
    if out is not None and not curves:
        raise UserError("--out is the folder of the figure: give --curves with it")
    from rlzoo.jobs.progress import loading

    with loading():
        if curves:
            from rlzoo.cli.curves import show_curves
        elif markdown:
            from rlzoo.cli.objectives_page import objectives_page
        else:
            found = catalogue()
    if curves:
        show_curves(out)
    elif markdown:
        print(objectives_page())
    elif as_json:
        print(json.dumps(found, indent=1, default=str))  # an option's default may be of any type
    else:
        print(catalogue_text(found))
    return 0


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """Everything that has a name, by kind, with what a user needs to know about it."""
    from rlzoo.buffers import list_importers
    from rlzoo.config import list_experiments, list_suites
    from rlzoo.evaluation import list_metrics
    from rlzoo.objective import is_composite, list_objectives, objective_class, options_of
    from rlzoo.registry import broken_plugins
    from rlzoo.reward import list_rewards
    from rlzoo.rollout import list_samplers
    from rlzoo.types import list_views, name_of_view

    objectives = [
        {
            "name": name,
            "summary": (found.__doc__ or "").partition("\n")[0],
            "source": found.source,
            "learns_from": "its components' views" if is_composite(found) else name_of_view(found.learns_from),
            "options": options_of(found),
        }
        for name, found in ((name, objective_class(name)) for name in list_objectives())
    ]
    found: dict[str, list[dict[str, Any]]] = {
        "objectives": objectives,
        "rewards": [{"name": name} for name in list_rewards()],
        "views": [{"name": name} for name in list_views()],
        "samplers": [{"name": name} for name in list_samplers()],
        "log_formats": [_log_format(name) for name in list_importers()],
        "metrics": [{"name": name} for name in list_metrics()],
        "suites": [{"name": name, **suite.model_dump(mode="json")} for name, suite in list_suites().items()],
        "experiments": [{"name": name, "description": text} for name, text in list_experiments().items()],
    }
    return {**found, "broken": [{"reason": line} for line in broken_plugins()]}


def _log_format(name: str) -> dict[str, Any]:
    from rlzoo.buffers import get_importer
    from rlzoo.objective import type_name

    found = type(get_importer(name))
    fields = found.model_fields.items()
    options = {key: {"type": type_name(field.annotation), "default": field.default} for key, field in fields}
    return {"name": name, "summary": (found.__doc__ or "").partition("\n")[0], "options": options}


def catalogue_text(found: dict[str, list[dict[str, Any]]]) -> str:
    """The catalogue for a terminal."""
    from rlzoo.objective import objective_class, own_options_of

    lines = ["objectives (all have the option truncated=keep too)"]
    width = max(len(row["name"]) for row in found["objectives"])
    for row in found["objectives"]:
        own = own_options_of(objective_class(row["name"]))
        options = ", ".join(f"{k}={_in_one_line(v['default'])}" for k, v in own.items())
        lines.append(f"  {row['name']:{width}} {row['summary']}" + (f" [{options}]" if options else ""))
    for kind in ("rewards", "metrics", "views", "samplers", "log_formats"):
        lines += [kind.replace("_", " "), "  " + ", ".join(row["name"] for row in found[kind])]
    for kind in ("suites", "experiments"):
        lines.append({"suites": "suites of problems to evaluate on"}.get(kind, kind))
        width = max(len(row["name"]) for row in found[kind])
        lines += [f"  {row['name']:{width}} {_first_sentence(row['description'])}" for row in found[kind]]
    if found["broken"]:
        lines += ["broken plug-ins, which cannot be used", *(f"  {row['reason']}" for row in found["broken"])]
    return "\n".join(lines)


def _in_one_line(default: Any) -> str:
    return repr(default) if len(str(default).split()) > 1 else str(default)


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.])\s", text, maxsplit=1)[0].rstrip(".:") + "."
