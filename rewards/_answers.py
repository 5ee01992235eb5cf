r"""Finding the final answer in a text: where it is marked, where it is announced, or else at the end."""

from __future__ import annotations

import re
from itertools import pairwise

from rlzoo.rewards._text import Mark, boxes, tags

# Marked: a box, a tag, ####

_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_TITLES = "answer|result|conclusion|solution|summary|verification|explanation|check|calculations?|reasoning"
_HEADING = re.compile(rf"(?:step|part|case|method|approach|problem|question)\b|[^:]*\b(?:{_TITLES})\W*$", re.IGNORECASE)
"""What follows #### where that is Markdown's heading of the fourth level."""

_AND = re.compile(r"\b(?:and|or|maybe|perhaps|possibly|alternatively|und|oder|et|ou|as well as)\b|[,;&和或与、]|и|или")
_BETWEEN = re.compile(
    r"(?:[\s,.;:&$~、，；]|\\[\[\](),;:! \\]|\\q?quad|and|or|und|oder|et|ou|и|или|[和或与及]"
    r"|\\text\{\s*,?\s*(?:and|or)\s*\}|[A-Za-z](?:_\{?\w\}?)?\$? ?=)*"
)
r"""All that may stand between two answers next to one another: signs, "and", and what the second is called, y =."""
_REVISED = re.compile(
    r"[.!?]\s|\n\s*\n|=|\b(?:no|not|wait|actually|but|instead|rather|correct(?:ion|ed)?|sorry|mistake|which|so|thus|"
    r"hence|therefore|then|equals|finally)\b",
    re.IGNORECASE,
)
"""What makes the second of two answers take the place of the first."""
_DENIED = re.compile(r"\b(?:not|isn't|never)\s*(?:\$|\\[(\[]|\*\*)*\s*\Z", re.IGNORECASE)


def marked(text: str, within: int = 4) -> list[str]:
    r"""What the last mark holds: ``\boxed{}``, ``<answer></answer>``, or the line after ``####``; [] without a mark.

    Boxes or tags that are listed together are all of them the answer: next to one another, or in one sentence
    with "and", "or" or a comma between. A mark may hold others, ``within`` deep.
    """
    if not within:
        return []
    found = [mark for mark in _outermost([*boxes(text), *tags(text)]) if not _denied(text, mark)]
    hashes = [m for m in _HASHES.finditer(text) if not (_HEADING.match(m[1]) and text[m.end() :].strip())]
    if hashes and (not found or hashes[-1].start() > found[-1].end):
        return [_after_phrase(hashes[-1][1])]
    together = found[-1:]
    for earlier, later in reversed(list(pairwise(found))):
        if not _listed(text[earlier.end : later.start]):
            break
        together.insert(0, earlier)
    each = [marked(mark.answer, within - 1) or [_after_phrase(mark.answer)] for mark in together]
    return [answer for answers in each for answer in answers]


def _denied(text: str, mark: Mark) -> bool:
    r"""Whether a mark is no answer, for a "not" stands before it: not \boxed{5}."""
    return _DENIED.search(text[max(0, mark.start - 20) : mark.start]) is not None


def _outermost(found: list[Mark]) -> list[Mark]:
    kept = list[Mark]()
    for mark in sorted(found, key=lambda mark: (mark.start, -mark.end)):
        if not kept or mark.start >= kept[-1].end:
            kept.append(mark)
    return kept


def _listed(between: str) -> bool:
    if len(between) < 100 and _BETWEEN.fullmatch(between):
        return True
    return len(between) < 70 and _AND.search(between) is not None and _REVISED.search(between) is None


# Announced: "the answer is ..."

_ANNOUNCED = (  # the language, what it calls an answer, and the verbs that follow
    ("English", r"\banswers?\b|\bans\b\.?", "is|are|was|(?:would |must )?be|equals|becomes|comes (?:out )?to|of"),
    ("English", r"\b(?:correct|right) (?:option|choice)s?\b", "is|are|would be"),
    ("Chinese", "答案|答|最终结果|故选|应选|本题选|正确选项", "应?该?[是为选]|等于|(?=[A-J])"),
    ("Japanese", "答え|解答|正解|回答", "は"),
    ("Korean", "정답|답변?|최종 ?답", "[은는이]"),
    ("Spanish", r"\brespuestas?\b", "es|son|sería"),
    ("French", r"\bréponses?\b", "est|sont|serait"),
    ("German", r"\b(?:end)?(?:antwort(?:en)?|ergebnis)\b|\blösung\b", "lautet|ist|sind|beträgt"),
    ("Italian", r"\brispost[ae]\b", "è|e'|sono"),
    ("Portuguese", r"\brespostas?\b", "é|são|seria"),
    ("Dutch", r"\b(?:eind)?antwoord\b", "is|luidt"),
    ("Russian, Ukrainian", r"\b(?:ответ(?:ом)?|відповідь)\b", "[-–—]|равен|равно|является|дорівнює|это|це"),
    ("Polish, Czech", r"\bodpowied[źz](?:ią)?\b|\bodpověď\b", "to|jest|brzmi|wynosi|je|zní"),
    ("Danish, Norwegian, Swedish", r"\bsvar(?:et)?\b", "är|er|blir"),
    ("Finnish, Hungarian", r"\bvastaus\b|\bválasz\b", "on|az?"),
    ("Turkish", r"\bcevap\b|\bcevabı\b|\byanıt\b", "olarak"),
    ("Romanian", r"\brăspuns(?:ul)?\b", "este|e"),
    ("Greek", r"\bαπάντηση\b", "είναι"),
    ("Vietnamese", r"\b(?:đáp án|đáp số|câu trả lời)\b", "là"),
    ("Indonesian, Malay", r"\bjawaban(?:nya)?\b|\bjawapan\b", "adalah|ialah"),
    ("Swahili", r"\bjibu\b", "ni"),
    ("Arabic, Persian", "الجواب|الإجابة|الاجابة|جواب|پاسخ", "هو|هي"),
    ("Hebrew", "התשובה|תשובה", "היא|הוא"),
    ("Hindi, Bengali", "उत्तर|जवाब|উত্তর", "है|हैं|हल|হল|হলো|হচ্ছে"),
    ("Telugu, Tamil", "సమాధానం|பதில்", "="),
    ("Thai", "คำตอบ", "คือ"),
)  # fmt: skip
_UNSPACED = ("Chinese", "Japanese", "Korean", "Thai")


def _phrase(language: str, noun: str, verbs: str) -> str:
    """The noun, a few words on it, and a verb or colon; or the noun a little before a number."""
    verb = rf"(?:{verbs})" if language in _UNSPACED else rf"(?<!\w)(?:{verbs})(?!\w)(?:\s*:)?"
    same_sentence = r"[^\n.!?。:：=]"
    after = rf"{same_sentence}{{0,60}}?(?:\s*[:：=]|\s[-–—](?=\s)|{verb})"
    before_number = rf"{same_sentence}{{0,20}}?(?=\s*(?:[$\d]|\\[(\[]))"
    return rf"(?:{noun})(?:{after}|{before_number})"


_PHRASES = "|".join(_phrase(*one) for one in _ANNOUNCED)
_PHRASE = re.compile(_PHRASES, re.IGNORECASE)
_PHRASE_OR_A = re.compile(rf"{_PHRASES}|(?:^|\n)\s*A\s*:", re.IGNORECASE)
_BEFORE_PHRASE = re.compile(
    r"(?:\W|\\text\b|(?:so|thus|therefore|hence|the|my|our|final|correct|la|el|die|der|das)\b|最终|正确)*",
    re.IGNORECASE,
)
_VERB_AT_END = re.compile(r"\s*(?:です|である|だ|となります|になります|입니다|이다|이에요|예요|है|हैं|হয়|'?d[ıiuü]r)\W*$")
"""Where the verb stands after the answer."""
_ADVERB = re.compile(
    r"(?:therefore|thus|then|hence|now|simply|just|equal to|也?就?是|also|consequently|so)\b,?\s*:?\s*", re.IGNORECASE
)
_NO_ANSWER = re.compile(r"(?:correct|right|wrong|as follows|below|above|unknown to|clear\b)", re.IGNORECASE)
"""What follows "the answer is" where no answer does."""
_ABBREVIATED = re.compile(r"\b(?:mrs?|ms|dr|st|prof|mt|jr|sr|vs|no|a\.m|p\.m|e\.g|i\.e|approx)\.$", re.IGNORECASE)
_SENTENCE_END = re.compile(
    r"(?<!\\)[.!?](?:\*\*)?(?=\s|$)"
    r"(?!\s+(?:or|maybe|perhaps|possibly|alternatively|(?:it|this) (?:may|might|could))\b)"
    r"(?!\s+\$?-?\d[\d.,]*[?.]?\$?$)|。",
    re.IGNORECASE,
)
"""The end of a sentence, unless the next takes it back, 5. Or 6, or is no more than a number, 5? 6?"""

_NUMBERED = re.compile(r"[^\W\d]+\s*#?\d+\s*[:：=]")
"""A phrase that announces one answer of several: Answer 2:"""

_ANNOUNCED_WITHIN, _CLAUSE, _LAST_PHRASES = 20_000, 500, 5
"""Characters from the end of a text in which phrases are searched for; after a phrase for the answer; how many."""


def _after_phrase(text: str) -> str:
    """What a text says after a phrase that it begins with, such as "Answer:"; all of it if it does not."""
    match = _PHRASE.search(text)
    if match is None or not _BEFORE_PHRASE.fullmatch(text[: match.start()]):
        return text.strip()
    rest = text[match.end() :]
    if rest.count("}") > rest.count("{"):  # the phrase was in \text
        rest = rest.replace("}", "", 1)
    return _VERB_AT_END.sub("", rest).strip()


def announced(text: str) -> list[str]:
    """What follows the phrases that announce an answer, the last first: each the sentence that it begins."""
    found = list[str]()
    text = text[-_ANNOUNCED_WITHIN:]
    matches = list(_PHRASE_OR_A.finditer(text))[: -_LAST_PHRASES - 1 : -1]
    for match in matches:
        rest = text[match.end() : match.end() + _CLAUSE]
        display = re.match(r"\s*(?:\$\$|\\\[)(.*?)(?:\$\$|\\\])", rest, re.DOTALL)
        line = display[1] if display else next((line for line in rest.split("\n") if line.strip(" *_")), "")
        clause = _ADVERB.sub("", _VERB_AT_END.sub("", _sentence(line.strip(" *_"))), count=1).strip()
        if clause and not _NO_ANSWER.match(clause):
            found.append(clause)
    if len(found) > 1 and all(_NUMBERED.fullmatch(match[0].strip()) for match in matches[:2]):
        return [", ".join(reversed(found))]  # candidates
    return found


def _sentence(line: str) -> str:
    """The first sentence; a title's full stop does not end it."""
    for end in _SENTENCE_END.finditer(line):
        before = line[: end.end()].rstrip("*")
        if end[0] == "。" or not _ABBREVIATED.search(before):
            return line[: end.start()]
    return line


# Neither: values in running text

_LATEX = (
    r"\$\$[^$]+\$\$|(?<!\\)\$(?!\s)(?:\\\$|[^$\n])*?(?<![\s\\])\$(?!\d)"  # as Pandoc tells mathematics from currency
    r"|\\\((?:[^\\]|\\(?!\)))*\\\)|\\\[(?:[^\\]|\\(?!\]))*\\\]|-?\\frac\{[^{}]*\}\{[^{}]*\}"
)
_SIGN = r"(?:\\?[$€£¥₹]\s?)?"
_DIGITS = r"\.?\d(?:[\d.,]*\d)?(?:\s?\\?%)?\)*"
_RATIO = r"(?<![A-Za-z\d_.,:])\d+(?:\s?:\s?\d+)+(?!\d)(?:\s?[ap]\.?m\b\.?)?"  # or a time of the day
_ARITHMETIC = rf"(?<![A-Za-z\d_.,])[-−(]*{_SIGN}[-−]?{_DIGITS}(?:\s*[-+*/^=×÷·−x]\s*{_SIGN}[-(]*{_SIGN}{_DIGITS})*"
_ITEM = rf"(?:{_LATEX}|{_RATIO}|{_ARITHMETIC})"
_UNIT = r"(?:\s+(?!and\b|or\b)[A-Za-z]+){0,2}"
_JOIN = (
    r"(?:[,;]?\s*(?:and|(?:or(?:\s+else)?|otherwise)(?:\s+it\s+is)?|maybe|perhaps|possibly)\b|\bto\b|[,;]|[和、]|或者?"
    r"|[个元]?[，,]?[也或者还]*可能[是有])"
)
_VALUES = re.compile(rf"{_ITEM}(?:{_UNIT}\s*{_JOIN}\s*{_ITEM})*", re.IGNORECASE)
"""A number, arithmetic or a formula, or a list of them: 3 apples and 4."""
_WORD = re.compile(r"(?<![\\\w{])(?!(?:and|or)\b)[^\W\d_]{2,}(?=[,:]?\s)")
_TEX = re.compile(r"[^$]*(?:\\[A-Za-z!]|[\^=_]|\d[a-z]\b)[^$]*$")
"""LaTeX without dollars to the end of a line."""
_HEDGED = re.compile(
    r"\b(?:not|less|more|greater|fewer|least|most|between|over|under|above|below|never|neither)\b", re.IGNORECASE
)
_OR_ELSE = re.compile(
    r"\b(?:or|maybe|perhaps|possibly|alternatively)\b[^.]*?\d|\b(?:may|might|could)(?: also| well)* be\W*\d"
    r"|\d\W*otherwise\b",
    re.IGNORECASE,
)
_NEAR, _TAIL = 40, 1000
"""Characters before the value of a clause; from the end of a text in which its last value is searched for."""


def first_value(clause: str) -> str | None:
    """The number, formula, or list of them near the start of a clause of prose; all of the clause if it is hedged."""
    match = _VALUES.search(clause)
    if match is None or match.start() > _NEAR:
        return None
    hedged = _HEDGED.search(clause[: match.start()]) or _OR_ELSE.search(clause, match.end())
    return clause if hedged else _result(match[0])


def last_value(text: str) -> str | None:
    """The last number, formula, or list of them in a text."""
    for line in reversed(text[-_TAIL:].splitlines()):
        after = max((word.end() for word in _WORD.finditer(line)), default=0)
        if _TEX.match(line, after) and not _HEDGED.search(line[:after]):
            return line[after:]
        found = list(_VALUES.finditer(line))
        if found:
            return _result(found[-1][0])
    return None


def _result(value: str) -> str:
    """What arithmetic that is written out comes to: 18 of 9 * 2 = 18."""
    if re.fullmatch(r"(?:[\s\d.+\-*/^=×÷·−x()$€£¥₹%\\]|,(?=\d))+", value):
        return value.rpartition("=")[2]
    return value
