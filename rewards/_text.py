"""What several rewards need: the text of a completion, the answers in it, and a column of the data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

from rlzoo.reward import missing_column

_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_OPEN_TAG = re.compile(r"<answer>([^<]*)\Z", re.IGNORECASE)
"""A tag at which sampling stopped: a stop string is not part of the completion."""

_SPECIAL = re.compile(
    r"(?:<[|｜][^\s<>|｜]{1,40}[|｜]>|</?s>|<(?:eos|pad|bos|end_of_turn|turn\|)>|\[(?:EOS|PAD|SEP|/INST)\])\Z"
)
"""An end-of-sequence, end-of-turn or padding token of the usual tokenizers."""
_LONGEST = 50

_BOX = r"\\(?:boxed|fbox)\s*"
_BRACE = re.compile(rf"{_BOX}\{{|\\.|[{{}}]", re.DOTALL)
_UNBRACED = re.compile(rf"{_BOX}([^\s{{}}$\\.,;]+)")
r"""``\boxed 5``: TeX takes the next token, people mean the next word."""


class Mark(NamedTuple):
    """A marked answer in a text: where the mark starts and ends, and what it holds."""

    start: int
    end: int
    answer: str
    final: bool = False
    """Whether such marks stand around final answers only, and not around intermediate results."""


def completion_text(completion: Any) -> str:
    """A completion's text: itself, or what the assistant says in its messages, one message a line.

    Special tokens that sampling left in the text at its end are no part of it.
    """
    if isinstance(completion, str):
        text = completion
    else:
        said = (m.get("content") for m in completion if m.get("role", "assistant") == "assistant")
        text = "\n".join(map(_content, said))
    ending = text.rstrip()
    while token := _SPECIAL.search(ending, max(0, len(ending) - _LONGEST)):
        text = ending = ending[: token.start()].rstrip()
    return text


def _content(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text", "") for part in content)


def boxes(text: str) -> list[Mark]:
    r"""The complete ``\boxed{...}`` of a text, in order of their ends; braces balanced, ``\{`` and ``\}`` text."""
    found, opened = list[Mark](), list[re.Match[str]]()
    for brace in _BRACE.finditer(text):
        if brace.group().endswith("{") and brace.group() != r"\{":
            opened.append(brace)
        elif brace.group() == "}" and opened:
            start = opened.pop()
            if len(start.group()) > 1:
                found.append(Mark(start.start(), brace.end(), text[start.end() : brace.start()].strip()))
    found += [Mark(m.start(), m.end(), m[1]) for m in _UNBRACED.finditer(text)]
    return sorted(found, key=lambda mark: mark.end)


def tags(text: str) -> list[Mark]:
    """The ``<answer>...</answer>`` of a text, in order; one that the end of the text cuts off if there is no other."""
    found = list(_TAG.finditer(text)) or list(_OPEN_TAG.finditer(text))
    return [Mark(match.start(), match.end(), match[1].strip(), final=True) for match in found]


def last_boxed(text: str) -> str | None:
    r"""What the complete ``\boxed{...}`` that starts last holds; None if there is none."""
    found = boxes(text)
    return max(found, key=lambda mark: mark.start).answer if found else None


def after_last(text: str, marker: str) -> str | None:
    """What follows the last ``marker``, stripped; None if the text has none."""
    _, found, rest = text.rpartition(marker)
    return rest.strip() if found else None


def is_missing(gold: Any) -> bool:
    """Whether a row has no gold answer: None, or NaN as tables have it in empty cells."""
    return gold is None or (isinstance(gold, float) and not math.isfinite(gold))


def gold_text(gold: Any) -> str:
    """A gold answer as text. Raises TypeError for one that is a mapping, a list or bytes."""
    if isinstance(gold, Mapping | Sequence | Set | bytes) and not isinstance(gold, str):
        hint = "name a field of it, as in columns: {answer: reward_model.ground_truth}"
        raise TypeError(f"the gold answer is {type(gold).__name__}, {gold!r:.60}, not text: {hint}")
    return str(gold)


def column_of(columns: Mapping[str, Any], column: str, reward: str) -> Sequence[Any]:
    """The values of a column. Raises UserError naming it if the data has none of that name."""
    if column not in columns:
        raise missing_column(reward, column, columns)
    values: Sequence[Any] = columns[column]
    return values
