"""What others may see of settings and messages: no path of this machine, and no secret."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from rlzoo.jobs.sources import is_pattern, kind_of_file, path_of

CARD = "README.md"
"""The file of a folder's card."""
FOLDER = "FOLDER"
"""What stands for the folder in the commands that its card shows; on the Hub, the repository's name does."""
HIDDEN = "(hidden)"
COMMAND: ContextVar[str | None] = ContextVar("command", default=None)
"""The ``rlzoo`` command that this process runs, for others to see; None: there is none, as in a user's own program."""
_NAMES = r"(?:api|access|auth|hf)_?(?:key|token)|secret|password|passwd|credentials?|authorization"
_SECRET = re.compile(rf"(?:.*[._-])?(?:{_NAMES}|url)|token", re.I)
"""Settings whose value is hidden. The address of a server is one: it may name a machine of a private network."""
_WITHIN = (
    (re.compile(rf"((?:{_NAMES})[\"']?\s*[:=]\s*)[^\s,}}\]&]+", re.I), rf"\g<1>{HIDDEN}"),
    (re.compile(r"\b(?:hf|sk|ghp|github_pat|xox[abp])[_-][\w-]{16,}"), HIDDEN),
    (re.compile(r"(\w://)[^/\s@]+@"), r"\1"),
)
"""Secrets within a text: the value of a setting, a token by its form, and the user of an address."""
_FOLDERS = re.compile(r"(?<![\w.~/-])(?:~[\w.-]*|\.\.)?(?:/[^\s/'\"`,;:()\[\]{}<>|]+)+/(?=[^\s/])")
"""The folders of a path within a text that is absolute, under a home folder or beside the current folder."""


def public(value: Any, name: str = "") -> Any:
    """Plain data for others to see, given the name of its setting: paths as base names, and secrets hidden."""
    if isinstance(value, Mapping):
        return {_text(str(key)): public(one, str(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [public(one, name) for one in value]
    if value in (None, "") or isinstance(value, bool) or not _SECRET.fullmatch(name):
        return _text(value) if isinstance(value, str) else value
    return HIDDEN


def public_command(arguments: Sequence[str]) -> str:
    """The command line of ``rlzoo`` with these arguments, as a shell reads it, for others to see."""
    words = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        words.append(f"{name}={public(value, name)}" if equals else _text(argument))
    return shlex.join(["rlzoo", *words])


def hub_id(source: str) -> str | None:
    """The Hub id of a model or a data set, without a configuration; None for anything else, such as a local file."""
    local = path_of(source).exists() or is_pattern(source) or kind_of_file(Path(source))
    found = None if local else re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?::.*)?|\w[\w.-]*", source, re.ASCII)
    return None if found is None else found[1] or found[0]  # world:NAME has a prefix in place of a namespace


def _text(text: str) -> str:
    """Text with the paths in it as base names, and without secrets."""
    for secret, instead in _WITHIN:
        text = secret.sub(instead, text)
    if text.startswith(("/", "~", "../")) and (len(text.split()) == 1 or _exists(text)):
        return Path(text).name if Path(text) not in (Path.home(), Path("~")) else "~"
    home = str(Path.home())
    return _FOLDERS.sub("", text if home == "/" else text.replace(home, "~"))


def _exists(text: str) -> bool:
    try:
        return path_of(text).exists()
    except (OSError, ValueError):  # too long for a path
        return False
