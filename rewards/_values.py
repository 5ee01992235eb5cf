"""Values in running text: numbers, formulas, and lists of them."""

from __future__ import annotations

import re

from rlzoo.rewards import _units
from rlzoo.rewards._hedges import (
    HEDGED,
    HEDGED_AFTER,
    HEDGED_NEXT,
    IGNORANT,
    UNDECIDED,
    is_candidate,
    taken_back,
)
from rlzoo.rewards._languages import EITHER, JOINED_NUMBERS, MAYBE
from rlzoo.rewards._numbers import number
from rlzoo.rewards._times import clock
from rlzoo.rewards._writing import clean, is_prose

CLAUSE = 500
"""Characters after a phrase in which the answer is searched for."""

_LATEX = (
    r"\$\$[^$]+\$\$|(?<!\\)\$(?!\s)(?:\\\$|[^$\n])*?(?<![\s\\])\$(?!\d)"  # as Pandoc tells mathematics from currency
    r"|\\\((?:[^\\]|\\(?!\)))*\\\)|\\\[(?:[^\\]|\\(?!\]))*\\\]|-?\\frac\{[^{}]*\}\{[^{}]*\}"
    r"|(?<![\w.,])-?(?:\d[\d.,]*)?(?:π|\\pi\b|(?:√|\\sqrt)(?:\d+|\{[^{}]*\}|\([^()]*\)))(?:/\d+)?(?! ?[A-Za-z]\b)"
)
_SIGN = r"(?:\\?[$€£¥₹]\s?)?"
_DIGITS = r"\.?\d(?:[\d.,]*\d)?(?![\d.,]*(?:[π√]|\\(?:pi|sqrt|frac)))(?:\s?\\?%)?\)*"
_RATIO = r"(?<![A-Za-z\d_.,:])\d+(?:\s?:\s?\d+)+(?!\d)(?:\s?[ap]\.?m\b\.?)?"  # or a time of the day
_TERM = rf"[-−(]*{_SIGN}[-−]?{_DIGITS}"
_ARITHMETIC = rf"(?<![A-Za-z\d_.,])(?:negative )?{_TERM}(?:\s*[-+*/^=×÷·−–x]\s*{_SIGN}{_TERM})*"
_SPACED = rf"(?<![\w.,/])-?{_SIGN}(?:\d{{1,3}}(?: \d{{3}})+(?:\.\d+)?|\d+ \d{{1,3}}/\d{{1,3}})(?![\d/])"  # 1 000, 5 1/2
_PRICE = re.compile(rf"-?\\?[$€£¥₹]\s?{_DIGITS} for {_DIGITS}")
"""A price and for how many it is."""
_MIXED = r"(?<![\w.,/])-?\d*\s?[¼-¾⅐-⅞]"
ITEM = rf"(?:{_LATEX}|{_MIXED}|{_RATIO}|{_SPACED}|{_ARITHMETIC})"
_UNIT = r"(?:\s+[^\W\d_]+){0,2}?"
_JOIN = (
    rf"(?:[,;]?\s*(?:{JOINED_NUMBERS}|{MAYBE}|\botherwise\b|\bto\b)(?:\s+(?:else|it|is|bien|{MAYBE})\b)*|[,;、|&~]"
    r"|[\u3400-\u9fff]?[，,]?[也或者还]*可能[是有])"
)
VALUES = re.compile(rf"{ITEM}(?:{_UNIT}\s*{_JOIN}\s*{ITEM})*", re.IGNORECASE)
"""A number, arithmetic or a formula, or a list of them: 3 apples and 4."""
_SUM = re.compile(rf"(?>[-+*/×÷·()\s]*{_TERM}(?: [^\W\d_]+){{0,2}}\s*)++=\s*(?={ITEM})")
"""A computation in words and numbers, up to its result: 2 apples + 3 apples =."""
_WORD = re.compile(
    r"(?<![\\\w{])(?!(?:and|or)\b)[^\W\d_]{2,}(?=[,:]?\s)|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af][，：:]?"
)
_TEX = re.compile(r"[^$]*(?:\\[A-Za-z!]|[\^=_<>≤≥≠]|\d[a-z]\b)[^$]*$")
"""LaTeX without dollars to the end of a line."""
_OR_ELSE = re.compile(
    rf"(?:{EITHER}|{MAYBE})[^.]*?\d|\d\W*otherwise\b"
    r"|\b(?:if|when|unless)\b[^.]*?(?:[,;]|\b(?:and|else|then|not|but)\b)[^.\d]{0,12}?\$?-?\d"
    r"|\b(?:for|in|another)\b[^.]*?(?:[,;]|\band\b|\belse\b|\banother\b[^.]*?)\s*(?:it )?(?:is\s+)?\$?-?\d",
    re.IGNORECASE,
)
_OR_FIRST = re.compile(rf"\W*{EITHER}", re.IGNORECASE)
_OR_NEXT = re.compile(rf"{EITHER}\W*\Z", re.IGNORECASE)
_WITHIN = (
    "in|for|at|by|per|on|with|from|after|before|within|during|out|as|is|are|was|were|each|dans|pour|par|von|für|por|para"
    "|con|per|di|da|de|del|des|du|za|за|на|по|из|do|för|på|med|dari|untuk|trong"
)
_SECOND = re.compile(rf"\s+(?!(?:{_WITHIN})\b)[^\W\d_]{{1,8}}\s+{ITEM}", re.IGNORECASE)
"""A second value after one word that is no preposition: and, or in a language that has no row."""
_DENIAL = re.compile(r"(?:(?:,| and| but) |\s*\()not\s[^,;]*$")
_NOT_BUT = re.compile(r"\bnot\s[^,;]{,20}?,? but (?:rather |instead )?", re.IGNORECASE)
"""What the answer is not: 5, not 6; not 6 but 5."""
_LABELLED = re.compile(
    r"\b(?:step|question|problem|part|case|equation|eq|theorem|lemma|section|figure|table|page|line|chapter|example|"
    r"exercise|mod|modulo)\.?\s*[(#]?\Z|(?:\\boxed\s*\{|<answer>)\W*\Z",
    re.IGNORECASE,
)
"""What a number follows that is no value: Theorem 5; or a mark that is denied."""
_VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|had|gets?|got|makes?|made|needs?|costs?|takes?|took|earns?|equals?|sold|spent)\b"
)
"""What makes a sentence of the words before a value."""
_BOLD = re.compile(r"((?:(?!\*\*).)*)\*\*((?:(?!\*\*).)+)\*\*((?:(?!\*\*).)*)")
"""A line with one part in bold."""
_CASE = re.compile(r"\b(?:if|when|for (?:odd|even|positive|negative|other))\b", re.IGNORECASE)
"""What makes candidates of several values where it stands before two of them."""
_BROKEN_OFF = re.compile(
    r"[^.!?]*[.!?]\s+(?!Let me know|I hope|Feel free|If you)[A-Z](?:[^.!?]*\s){2}[^.!?]*\w\s*\Z"
    r"|[^\n.!?]{0,20}\b[Ww]ait\b"
)
"""What follows a value where a text was cut in its next sentence, or goes back on it: but wait."""
_NEAR, _TAIL, _MOST_LINES = 40, 1000, 50
"""Characters before the value of a clause; characters and lines from the end of a text with its last value."""


def first_value(clause: str) -> str | None:
    """The number, formula, or list of them near the start of a clause of prose; `UNDECIDED` if it is hedged."""
    match = VALUES.search(clause)
    if match is None or match.start() > _NEAR:
        return None
    if (computed := _SUM.match(clause, match.start())) and (result := VALUES.match(clause, computed.end())):
        match = result
    before = clause[: match.start()]
    hedged = HEDGED.search(before) or _OR_NEXT.search(before) or HEDGED_AFTER.match(clause, match.end())
    if hedged or (_SECOND.match(clause, match.end()) and not number(clean(clause))):
        return UNDECIDED
    if again := taken_back(clause, match.end()):
        return f"{match[0]} or {first_value(clause[again.end() :]) or UNDECIDED}"  # 1/2, or equivalently 0.5
    return UNDECIDED if _OR_ELSE.search(clause, match.end()) else _with_unit(match)


def only_value(text: str) -> str | None:
    """The one value in a sentence: There are 5 apples; None for a text of another kind."""
    found = list(VALUES.finditer(text)) if len(text) < CLAUSE else []
    if len(found) != 1 or re.search(r"[\n?]", text) or not _VERB.search(text[: found[0].start()]):
        return None
    return _committed(text, found)


def last_value(text: str) -> str | None:
    """The last number, formula, or list of them in a text."""
    for line in map(without_denial, reversed(text[-_TAIL:].splitlines())):
        after = max((word.end() for word in _WORD.finditer(line)), default=0)
        if _TEX.match(line, after) and not HEDGED.search(line[:after]):
            return line[after:]
        before, emphasised, rest = bold.groups() if (bold := _BOLD.fullmatch(line)) else (line, "", "")
        line = f"{before}{emphasised}{rest}"
        found = [m for m in VALUES.finditer(line) if not _LABELLED.search(line[: m.start()])]
        until = [m for m in found if m.start() < len(before) + len(emphasised)]
        if until and until[-1].start() >= len(before):
            found = until
        if found:
            return _committed(line, found)
    return None


def _committed(line: str, found: list[re.Match[str]]) -> str | None:
    """The last of the values in a line; None if it is denied, a bound, asked, or one of several candidates."""
    last = found[-1]
    before = line[: last.start()]
    if HEDGED_NEXT.search(before) or _OR_NEXT.search(before) or HEDGED_AFTER.match(line, last.end()):
        return None
    between = line[found[-2].end() : last.start()] if len(found) > 1 else ""
    if re.fullmatch(r"\s*\?\s*", between):  # 5? 6?
        return None
    if len(found) > 1 and (is_candidate(between) or len(_CASE.findall(line)) > 1):
        return None
    if len(found) > 1 and _PRICE.fullmatch(f"{found[-2][0]}{line[found[-2].end() : last.end()]}"):
        return found[-2][0]
    asked = re.search(r"\w[^.!?]*\Z", before) and re.match(r"[^.!?]*\?\W*\Z", line[last.end() :])
    if IGNORANT.search(before) or asked or taken_back(line, last.end()) or _BROKEN_OFF.match(line, last.end()):
        return None
    return _with_unit(last)


def without_denial(clause: str) -> str:
    """A clause without what the answer is said not to be; `UNDECIDED` if that is the answer: 5 but not 5."""
    clause = _NOT_BUT.sub("", clause)
    denial = _DENIAL.search(clause)
    if denial is None:
        return clause
    given, denied = ([m[0] for m in VALUES.finditer(text)] for text in (clause[: denial.start()], denial[0]))
    return UNDECIDED if set(given[-1:]) & set(denied) else clause[: denial.start()]


_EMPTY = re.compile(r"[\s`*_#=~.-]*")
_BULLET = re.compile(r"\A\s*(?:[-*•+]|\(?[\da-z]{1,2}[.)])\s+")
_WORD_ALONE = re.compile(r"\s*[^\W\d_]{2,}[.!]?\s*")
_NAMED = re.compile(r"[A-Za-z]\w? ?= ?(.*)")
_RELATION = re.compile(r"[<>=]|\\(?:le|ge|ne|in|to|approx|equiv|[Rr]ightarrow|implies)(?![A-Za-z])")


def last_lines(text: str) -> list[str]:
    """The last line, alone or with those above it that are answers of their own: 3, and 4 below; x = 3, and y = 4."""
    lines = [line for line in text.splitlines() if not _EMPTY.fullmatch(line)][-_MOST_LINES:]
    if IGNORANT.search(" ".join(lines[-2:-1])) or _OR_FIRST.match(lines[-1] if lines else ""):
        return [UNDECIDED]
    bare = [_BULLET.sub("", line) if len(lines) > 1 else line for line in lines]
    is_answer = _WORD_ALONE.fullmatch if bare and _WORD_ALONE.fullmatch(bare[-1]) else _is_value
    first = next((at for at in range(len(bare), 0, -1) if not is_answer(bare[at - 1])), 0)
    together = [clean(line) for line in bare[first:]]
    return together if len(together) > 1 else [without_denial(lines[-1]) if lines else text]


def _is_value(line: str) -> bool:
    """Whether a line is a number, formula or letter, alone or with a name, that does not continue the line above."""
    value = clean(line)
    if named := _NAMED.fullmatch(value):
        return number(named[1]) is not None
    if re.match(r"\s*(?:\$|\\[\[(])?\s*=", line) or not re.search(r"\w", value) or _RELATION.search(value):
        return False
    return number(value) is not None or re.fullmatch(r"\(?[A-J]\)?", value) is not None or not is_prose(value)


_FOLLOWING = re.compile(
    r"[ \-~]?(?:[ap]\.?m\b\.?|(?:(?!(?:and|or|in|of|for|to|on|at|from|with|by|is|was|are|were|has|as|if|than|this|thus"
    r"|plus|minus|times|does|always)\b)[A-Za-z]+(?:/[A-Za-z]+)?(?:[²³]|\^\{?[23]\}?)?(?: |\b|(?<=[²³}]))){1,3})"
)
"""Words that may say of what a value is so many."""


def _with_unit(found: re.Match[str]) -> str:
    """A value in a text, with its unit where that follows: 9 oranges, 5 pm."""
    value, following = _result(found[0]), _FOLLOWING.match(found.string, found.end())
    if following is None:
        return value
    whole = clean(f"{value}{following[0]}")
    return whole if clock(whole) or (number(whole) and _units.names_unit(following[0])) else value


def _result(value: str) -> str:
    """What arithmetic that is written out comes to: 18 of 9 * 2 = 18."""
    if re.fullmatch(r"(?:[\s\d.+\-*/^=×÷·−–x()$€£¥₹%\\]|,(?=\d))+", value):
        return value.rpartition("=")[2]
    return value
