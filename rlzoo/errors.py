"""Errors in a user's input. The command line prints one as a single line and exits with status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input: the message says in one line what is wrong, where, and how to fix it."""


class TryAgainError(UserError):
    """The same command resumes from the work that was done, which is kept."""


class EmptyViewError(UserError):
    """A view selects nothing of a buffer: another sample of the same prompts, or other prompts, may be in it."""


class UnscoredError(EmptyViewError):
    """A view selects nothing, because no row of the buffer has a reward."""


class UnreachableError(UserError):
    """A data set or model of the Hub that is not on this machine, while the Hub cannot be reached."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for an unknown name, with the nearest name and all known ones."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {name!r}:{hint} known: {', '.join(names) or 'none'}")


def kind_of(value: object) -> str:
    """The type of a value, in a word for error messages."""
    if value is None or value != value:
        return "null" if value is None else "NaN"
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
