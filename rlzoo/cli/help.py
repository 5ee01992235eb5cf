"""The layout of help, and usage errors in one line.

Help fits into 80 columns and groups options under headings; only a terminal gets colours. A usage error becomes a
UserError, which suggests the nearest name for a misspelt one.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from rlzoo.errors import UserError

Row = tuple[str, str, str]
"""The heading, the option or command, and its explanation."""


def is_rich() -> bool:
    """Whether standard output is a terminal that should get colours and box-drawing characters."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Command(TyperCommand):
    """One command, whose epilog holds its examples, one per line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _usage_errors(ctx):
            return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write(formatter, _parameters(self, ctx))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_examples(formatter, self.epilog)


class Group(TyperGroup):
    """``rlzoo`` itself, which shows its help when called without arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _usage_errors(ctx):
            return super().parse_args(ctx, args or ["--help"])

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args[0] not in self.commands and not ctx.resilient_parsing:
            _refuse(ctx, f"unknown command {args[0]!r}", args[0], self.commands)
        return super().resolve_command(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        found = [(name, command) for name, command in self.commands.items() if isinstance(command, TyperCommand)]
        commands = [(command.rich_help_panel or "Commands", name, command.help or "") for name, command in found]
        _write(formatter, [*commands, *_parameters(self, ctx)])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_examples(formatter, self.epilog)


def _parameters(command: TyperCommand | TyperGroup, ctx: Any) -> Iterator[Row]:
    for parameter in command.get_params(ctx):
        if (record := parameter.get_help_record(ctx)) is not None:
            panel = getattr(parameter, "rich_help_panel", None)
            if parameter.param_type_name == "argument":
                yield panel or "Arguments", parameter.metavar or parameter.name, record[1]
            else:
                yield panel or "Options", *record


def _write(formatter: Any, rows: Iterable[Row]) -> None:
    panels: dict[str, list[tuple[str, str]]] = {}
    for panel, name, text in rows:
        panels.setdefault(panel, []).append((_styled(name, fg="cyan"), text))
    for panel, lines in panels.items():
        with formatter.section(_styled(panel, bold=True)):
            formatter.write_dl(lines)


def _write_examples(formatter: Any, examples: str | None) -> None:
    with formatter.section(_styled("Examples", bold=True)):
        for line in (examples or "").splitlines():  # never wrapped, so that they can be copied
            formatter.write(f"  {line.strip()}\n")


def _styled(text: str, **style: Any) -> str:
    return typer.style(text, **style) if is_rich() else text


@contextmanager
def _usage_errors(ctx: Any) -> Iterator[None]:
    """Turns typer's usage errors into UserErrors."""
    try:
        yield
    except TyperException as error:
        name, parameter = getattr(error, "option_name", ""), getattr(error, "param", None)
        if hasattr(error, "possibilities"):
            known = [option for parameter in ctx.command.get_params(ctx) for option in parameter.opts]
            _refuse(ctx, f"unknown option {name}", name, known)
        if parameter is None:
            message = error.format_message().rstrip(".")
            _refuse(ctx, message[:1].lower() + message[1:])
        label = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar or parameter.name
        message = error.message.removeprefix("Value error, ").rstrip(".")
        _refuse(ctx, f"{label}: {message}" if message else f"missing {label}")


def _refuse(ctx: Any, message: str, name: str = "", known: Iterable[str] = ()) -> NoReturn:
    names = {one.lstrip("-"): one for one in known}
    near = difflib.get_close_matches(name.lstrip("-"), names, n=1)
    hint = f": did you mean {names[near[0]]}?" if near else ";"
    raise UserError(f"{message}{hint} see {ctx.command_path} --help") from None
