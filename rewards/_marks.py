r"""Answers that a text marks: in a box, in a tag, after ####."""

from __future__ import annotations

import re

from rlzoo.rewards._hedges import DENIED_NEXT, HEDGED_AFTER, UNDECIDED, last_together, taken_back
from rlzoo.rewards._numbers import number
from rlzoo.rewards._phrases import after_phrase
from rlzoo.rewards._text import Mark, boxes, tags
from rlzoo.rewards._values import first_value
from rlzoo.rewards._writing import clean, is_prose

_HASHES = re.compile(r"####[ \t]*([^\s#](?:(?!####)[^\n])*)")


def marked(text: str, within: int = 4) -> list[str]:
    r"""What the last mark holds: ``\boxed{}``, ``<answer></answer>``, or the line after ``####``; [] without a mark.

    Marks that are listed together are all of them the answer: next to one another, or in one sentence with "and",
    "or" or a comma between. Boxes are used for steps too, so that a box takes the place of the one before it; tags and
    ``####`` mark what is final, so that two of them are two answers unless the text between takes the first one back.
    A mark may hold others, ``within`` deep.
    """
    if not within:
        return []
    found = _outermost([*boxes(text), *tags(text), *_hashes(text)])
    together = last_together(text, [mark for mark in found if not _denied(text, mark)])
    each = [marked(mark.answer, within - 1) or [after_phrase(mark.answer)] for mark in together]
    answers = [answer for answers in each for answer in answers]
    if together and (another := taken_back(text, together[-1].end)):
        answers.append(first_value(text[another.end() : another.end() + 100]) or UNDECIDED)
    return answers


def _hashes(text: str) -> list[Mark]:
    found = [Mark(m.start(), m.end(), m[1].strip(), final=True) for m in _HASHES.finditer(text)]
    return [mark for mark in found if not (text[mark.end :].strip() and _is_heading(mark.answer))]


def _is_heading(line: str) -> bool:
    """Whether #### before a line that others follow is Markdown's heading of the fourth level: words, no value."""
    line = clean(after_phrase(line))
    return not line or (is_prose(line) and number(line) is None)


def _denied(text: str, mark: Mark) -> bool:
    r"""Whether a mark is no answer, or a bound: not \boxed{5}, \boxed{5} is wrong, \boxed{5} or more."""
    before = (
        None if text.startswith("#", mark.start) else DENIED_NEXT.search(text[max(0, mark.start - 30) : mark.start])
    )
    return before is not None or HEDGED_AFTER.match(text, mark.end) is not None


def _outermost(found: list[Mark]) -> list[Mark]:
    kept = list[Mark]()
    for mark in sorted(found, key=lambda mark: (mark.start, -mark.end)):
        if not kept or mark.start >= kept[-1].end:
            kept.append(mark)
    return kept
