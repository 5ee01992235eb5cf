"""What several rewards need: the text of a completion, the answers in it, and a column of the data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlzoo.reward import missing_column

_BOXED = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def completion_text(completion: Any) -> str:
    """A completion's text: itself, or what the assistant says in its messages, one message a line."""
    if isinstance(completion, str):
        return completion
    return "\n".join(_content(m.get("content")) for m in completion if m.get("role", "assistant") == "assistant")


def _content(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text", "") for part in content)


def last_boxed(text: str) -> str | None:
    r"""What the last complete ``\boxed{...}`` holds, braces within it balanced; None if there is none."""
    for start in reversed([match.end() for match in _BOXED.finditer(text)]):
        depth = 1
        for brace in _BRACE.finditer(text, start):  # \{ and \} are text, not braces
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[start : brace.start()].strip()
    return None


def after_last(text: str, marker: str) -> str | None:
    """What follows the last ``marker``, stripped; None if the text has none."""
    _, found, rest = text.rpartition(marker)
    return rest.strip() if found else None


def column_of(columns: Mapping[str, Any], column: str, reward: str) -> Sequence[Any]:
    """The values of a column. Raises UserError naming it if the data has none of that name."""
    if column not in columns:
        raise missing_column(reward, column, columns)
    values: Sequence[Any] = columns[column]
    return values
