"""The typer app: all commands, and the parsing of a command line. `rlzoo.cli.main` runs the result."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rlzoo.cli.buffers import buffer, import_, rescore
from rlzoo.cli.catalogue import list_
from rlzoo.cli.compare import compare
from rlzoo.cli.doctor import doctor
from rlzoo.cli.evaluate import evaluate
from rlzoo.cli.help import Command, Group
from rlzoo.cli.plan import plan
from rlzoo.cli.report import report
from rlzoo.cli.results import results
from rlzoo.cli.rollout import rollout
from rlzoo.cli.scaffold import new
from rlzoo.cli.serve import serve
from rlzoo.cli.train import train
from rlzoo.cli.variance import variance
from rlzoo.jobs.sources import path_of

Handler = Callable[..., int]
PANELS: dict[str, Sequence[Handler]] = {
    "Experiments": (plan, compare, variance, report, serve),
    "One step at a time": (rollout, train, evaluate),
    "Buffers": (import_, rescore, buffer),
    "Look up and extend": (list_, results, new, doctor),
}


def parsed(arguments: Sequence[str] | None = None) -> functools.partial[int] | None:
    """The command that the arguments name, bound to its parameters; None if typer has handled them (--help, --version).

    Raises UserError for wrong usage.
    """
    found = group().main(arguments, prog_name="rlzoo", standalone_mode=False)
    return found if isinstance(found, functools.partial) else None


def group() -> Group:
    """The typer group with all commands."""
    app = typer.Typer(cls=Group, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})
    app.callback(**_help(_rlzoo))(_rlzoo)
    for panel, handlers in PANELS.items():
        for handler in handlers:
            name = handler.__name__.rstrip("_")
            app.command(name, cls=Command, rich_help_panel=panel, **_help(handler))(_bound(handler))
    made = typer.main.get_command(app)
    assert isinstance(made, Group)
    return made


def _help(handler: Callable[..., object]) -> dict[str, Any]:
    """The docstring of a handler in typer's terms: the text as help, and the examples as the epilog."""
    text, _, examples = (inspect.getdoc(handler) or "").partition("\n\nExamples:\n")
    return {"help": text, "epilog": examples}


def _bound(handler: Handler) -> Callable[..., functools.partial[int]]:
    """A function with the handler's signature that returns the call instead of making it.

    Otherwise typer would catch what a running command raises; `rlzoo.cli.main` handles signals and broken pipes.
    """

    @functools.wraps(handler)
    def bind(**parameters: object) -> functools.partial[int]:
        return functools.partial(handler, **{name: _expanded(value) for name, value in parameters.items()})

    return bind


def _expanded(value: object) -> object:
    """A parameter; a path with ``~`` replaced, which a shell does not do in ``--out=~/runs/rft``."""
    return path_of(value) if isinstance(value, Path) else value


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"rlzoo {version('rlzoo')}")
        raise typer.Exit


def _rlzoo(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compare fine-tuning objectives of language models: one interface, one buffer, one budget.

    Exit status: 0 done, 1 some cells failed, 2 wrong input, 130 or 143 interrupted.

    Examples:
      rlzoo compare arithmetic
      rlzoo train --help
    """
