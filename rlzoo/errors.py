"""What can be wrong with a user's input. The command line prints such an error as one line and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input: the message names the thing and how to fix it, in one line."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not there, with the nearest one and all that are."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {name!r}:{hint} known: {', '.join(names) or 'none'}")


def kind_of(value: object) -> str:
    """What a value is, in a word for an error."""
    if value is None or value != value:
        return "null" if value is None else "NaN"
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
