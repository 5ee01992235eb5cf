"""Answers that are none, or not the only one: denied, no more than a bound, listed with others, taken back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from rlzoo.rewards._languages import BOUNDED, BOUNDED_AFTER, DENIED, DENIED_AFTER, EITHER, JOINED, MAYBE
from rlzoo.rewards._text import Mark

UNDECIDED = "?"
"""The answer of a text that gives none or several: it is equal to no gold answer."""

# Denied and bounded: not 5, more than 5

_NEXT = r"(?:\s+(?:than|or|equal|to|be|exactly|answer|the|a|an))*[^\w.,;!?。，；]*\Z"
"""Up to the answer, in the same clause: 6 does not. 5"""
DENIED_WORD = re.compile(DENIED, re.IGNORECASE)
DENIED_NEXT = re.compile(rf"{DENIED}{_NEXT}", re.IGNORECASE)
HEDGED = re.compile(f"{DENIED}|{BOUNDED}", re.IGNORECASE)
HEDGED_NEXT = re.compile(rf"(?:{DENIED}|{BOUNDED}){_NEXT}", re.IGNORECASE)
HEDGED_AFTER = re.compile(
    rf"[^\n.。!?]{{0,3}}(?:{DENIED_AFTER})|[^\w\n.。!?]{{0,3}}(?:{BOUNDED_AFTER}|is (?:not|wrong|incorrect)\b)"
    r"|(?:[^\S\n]|\$)*(?:[<>≤≥](?![/A-Za-z])|\\[lg]e(?![a-z]))",
    re.IGNORECASE,
)
IGNORANT = re.compile(
    r"(?:\b(?:(?:don't|do not|cannot|can't) (?:know|tell|say)|not (?:sure|certain)|no idea|unsure)"
    r"|\bno s[eé]|je ne sais pas|\bweiß (?:es )?nicht|keine Ahnung|non (?:lo )?so|não sei|не знаю"
    r"|不知道|不确定|わかりません|分かりません|모르겠)(?=\s*(?:[^\w\s]|\Z))|\b(?:whether|impossible)\b",
    re.IGNORECASE,
)
"""What makes a guess of the number after it, unless it says what is not known."""
CONDITION = re.compile(
    rf"\b(?:if|when|unless|whether|where|at|for|given|let|suppose|assum\w+|guess|say)\b|{MAYBE}|{DENIED}|{BOUNDED}",
    re.IGNORECASE,
)
"""What is no name of a value: if x = 5."""

# Listed: 3 and 5; maybe 3, maybe 5

_AND = re.compile(rf"{MAYBE}|\bas well as\b|[,;&、]|{JOINED}", re.IGNORECASE)
_BETWEEN = re.compile(
    rf"(?:[\s,.;:&$~|/*\-•、，；。]|\\[\[\](),;:! \\]|\\q?quad|{JOINED}"
    r"|\\text\{\s*,?\s*(?:and|or)\s*\}|[A-Za-z](?:_\{?\w\}?)?\$? ?=|(?<!\w)\(?[\da-z]{1,2}[.)]"
    r"|[^\W\d_]{3,}(?: \(?[A-Za-z]\)?| ?\d):"
    r"|(?<!\w)(?i:the|my|first|second|third|next|other|another|possible|answers? (?:is|are))\b)*"
)
r"""All that may stand between two answers next to one another: signs, "and", what the second is called: y =, (b)."""
_INSTEAD = (
    r"=|\b(?:no|not|wait|actually|instead|rather|correct(?:ion|ed|ing)?|sorry|mistake|error|oops|(?:re|double.)?check\w*|"
    r"recount\w*|recalculat\w*|which|so|thus|hence|therefore|then|equals|finally)\b"
)
_REVISED = re.compile(rf"[.!?]\s|\n\s*\n|\bbut\b|{_INSTEAD}", re.IGNORECASE)
"""What makes the second of two answers take the place of the first."""
_REPLACED = re.compile(_INSTEAD, re.IGNORECASE)
"""The same, where a sentence on another candidate is announced as such, or both answers are marked as final."""
_CANDIDATE = re.compile(
    rf"{MAYBE}|\b(?:either|guess(?:es)?|says?|claims?)\b|(?:^|[^\w\s]) *\bor\b"
    r"|\b(?:options?|alternatives?|candidates?|attempts?|possibility)\b(?! (?:is|are) correct)",
    re.IGNORECASE,
)
"""What announces the second of several candidates, even in a sentence of its own."""


def last_together(text: str, marks: Sequence[Mark]) -> list[Mark]:
    """The last of the marks, and those before it that are listed with it."""
    together = list(marks[-1:])
    for earlier, later in reversed(list(pairwise(marks))):
        between = text[earlier.end : later.start]
        contradicted = earlier.final and later.final and not _REPLACED.search(between)
        if not (contradicted or _listed(between)):
            break
        together.insert(0, earlier)
    return together


def _listed(between: str) -> bool:
    if len(between) < 100 and _BETWEEN.fullmatch(between):
        return True
    return len(between) < 70 and (
        (_AND.search(between) is not None and _REVISED.search(between) is None) or is_candidate(between)
    )


def is_candidate(between: str) -> bool:
    """Whether what stands between two answers makes candidates of them: maybe, or."""
    return _CANDIDATE.search(between) is not None and _REPLACED.search(between) is None


# Taken back: 5, or not; 5. 6 is also correct

VALUE = r"\$?-?\d[\d.,]*(?:/\d+)?\$?"
"""A number as it stands in a text, roughly."""
_OFFERED = (
    rf"(?:\W+\w+){{0,3}}?\W*{VALUE}(?:[^\w\n]*[^\W\d_]+)?[^\w\n.!?]*(?:[.!?\n]|\Z)"  # the answer is 6 apples.
    r"|\W*\w+\W*(?:[.!?]|\Z)"
)
"""A sentence that gives a value or a word, and says no more of it."""
_FURTHER = re.compile(
    "|".join(
        (
            rf"\W{{0,6}}{EITHER}(?!\W*(?:so|rather|in words)\b)",  # or, perhaps on the next line
            rf"(?:[^\W\d_]+ ){{1,2}}{EITHER}(?!\W*(?:so|rather|in words)\b)",  # apples or
            rf"[^\w\n.!?]{{0,6}}(?:[^\W\d_]+[^\w.!?]{{1,3}}|[也又])?{MAYBE}",  # apples, maybe
            rf"[^\w\n]{{0,6}}(?:[^\W\d_]+[^\w\n]{{1,3}})?(?:(?:but|and|or) )?(?:(?:it|this|that|the answer) )?{MAYBE}"
            rf"(?={_OFFERED})",  # . Maybe 6; . It could be 6
            r"[^\w\n]{0,6}(?:some (?:would |might )?(?:say|argue)|(?:the |an)?other (?:one|answer|option)s?)\b",
            rf"\W{{0,6}}(?:(?:but|and|however|though|while)\W+)?(?:options? |choices? )?(?:{VALUE}|\(?[A-J]\)?) "
            r"(?:(?:is|are) (?:also|equally)|would also|(?:also )?(?:works|fits)|(?:may|might|could)(?: also)? be)\b",
            rf"\W{{0,6}}(?:{JOINED}\s*)?{VALUE}\W*\Z",  # 5? 6?
            r"\W{0,4}[.?!\n]\W{0,4}(?-i:[A-J])\W*\Z",  # A? B?
            r"\? ?[A-J]\b",
        )
    ),
    re.IGNORECASE,
)
"""What follows an answer in its sentence or begins the next one, and makes it one of several."""


def taken_back(text: str, end: int) -> re.Match[str] | None:
    """What announces another answer after one that ends there, or says that it may be another."""
    return _FURTHER.match(text, end)
