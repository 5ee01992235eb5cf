r"""Finding the final answer in a text: where it is marked, where it is announced, or else at the end."""

from __future__ import annotations

import re
from itertools import pairwise

from rlzoo.rewards._text import Mark, boxes, tags

# Marked: a box, a tag, ####

_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_HEADING = re.compile(r"(?:step|part|case|method|approach|problem|question)\b|[^:]*\b(?:answer|result|conclusion|solution|"
                      r"summary|verification|explanation|check|calculations?|reasoning)\W*$", re.IGNORECASE)  # fmt: skip
_AND = re.compile(r"\b(?:and|or|und|oder|et|ou|as well as)\b|[,;&和或与、]|и|или")
_BETWEEN = re.compile(
    r"(?:[\s,.;:&$~、，；]|\\[\[\](),;:! \\]|\\q?quad|and|or|und|oder|et|ou|и|или|[和或与及]"
    r"|\\text\{\s*,?\s*(?:and|or)\s*\}|[A-Za-z](?:_\{?\w\}?)?\$? ?=)*"
)
_REVISED = re.compile(
    r"[.!?]\s|\n\s*\n|\b(?:no|not|wait|actually|but|instead|rather|correct(?:ion|ed)?|sorry|mistake|which|so|thus|hence|"
    r"therefore|then|equals|finally)\b|=",
    re.IGNORECASE,
)  # fmt: skip


def marked(text: str, within: int = 4) -> list[str]:
    r"""What the last mark holds: ``\boxed{}``, ``<answer></answer>``, or the line after ``####``; [] without a mark.

    Boxes or tags that are listed together are all of them the answer: next to one another, or in one sentence
    with "and", "or" or a comma between. A mark may hold others, ``within`` deep.
    """
    if not within:
        return []
    found = _outermost([*boxes(text), *tags(text)])
    hashes = [m for m in _HASHES.finditer(text) if not (_HEADING.match(m[1]) and text[m.end() :].strip())]
    if hashes and (not found or hashes[-1].start() > found[-1].end):
        inner = _outermost(boxes(hashes[-1][1]))
        return [inner[-1].answer if inner else _announced(hashes[-1][1]).strip()]
    together = found[-1:]
    for earlier, later in reversed(list(pairwise(found))):
        if not _listed(text[earlier.end : later.start]):
            break
        together.insert(0, earlier)
    answers = list[str]()
    for mark in together:
        answers += marked(mark.answer, within - 1) or [_announced(mark.answer).strip()]
    return answers


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

_ANNOUNCED = (  # language, what an answer is called there, and the verbs that follow
    ("English", r"(?:\banswers?\b|\bans\b\.?)", r"is|are|was|be|would be|should be|must be|equals|becomes|comes (?:out )?to|of"),
    ("Chinese", r"(?:答案|答|最终结果|故选|应选)", r"应?该?[是为选]|等于"),
    ("Japanese", r"(?:答え|解答|正解|回答)", r"は"),
    ("Korean", r"(?:정답|답변?|최종 ?답)", r"[은는이]"),
    ("Spanish", r"\brespuestas?\b", r"es|son|sería"),
    ("French", r"\bréponses?\b", r"est|sont|serait"),
    ("German", r"\b(?:end)?antwort(?:en)?\b|\b(?:end)?ergebnis\b|\blösung\b", r"lautet|ist|sind|beträgt"),
    ("Italian", r"\brispost[ae]\b", r"è|e'|sono"),
    ("Portuguese", r"\brespostas?\b", r"é|são|seria"),
    ("Dutch", r"\b(?:eind)?antwoord\b", r"is|luidt"),
    ("Russian, Ukrainian", r"\b(?:ответ(?:ом)?|відповідь)\b", r"[-–—]|равен|равно|является|дорівнює|это|це"),
    ("Polish, Czech", r"\bodpowied[źz](?:ią)?\b|\bodpověď\b", r"to|jest|brzmi|wynosi|je|zní"),
    ("Scandinavian", r"\bsvaret\b|\bsvar\b", r"är|er|blir"),
    ("Finnish, Hungarian", r"\bvastaus\b|\bválasz\b", r"on|az?"),
    ("Turkish", r"\bcevap\b|\bcevabı\b|\byanıt\b", r"olarak"),
    ("Romanian", r"\brăspuns(?:ul)?\b", r"este|e"),
    ("Greek", r"\bαπάντηση\b", r"είναι"),
    ("Vietnamese", r"\b(?:đáp án|đáp số|câu trả lời)\b", r"là"),
    ("Indonesian, Malay", r"\bjawaban(?:nya)?\b|\bjawapan\b", r"adalah|ialah"),
    ("Swahili", r"\bjibu\b", r"ni"),
    ("Arabic, Persian", r"(?:الجواب|الإجابة|الاجابة|جواب|پاسخ)", r"هو|هي"),
    ("Hebrew", r"(?:התשובה|תשובה)", r"היא|הוא"),
    ("Hindi, Bengali", r"(?:उत्तर|जवाब|উত্তর)", r"है|हैं|हल|হল|হলো|হচ্ছে"),
    ("Telugu, Tamil", r"(?:సమాధానం|பதில்)", r"="),
    ("Thai", r"(?:คำตอบ)", r"คือ"),
)  # fmt: skip
_UNSPACED = ("Chinese", "Japanese", "Korean", "Thai")


def _phrase(language: str, noun: str, verbs: str) -> str:
    """The noun, a few words on it, and a verb or colon; or the noun a little before a number."""
    verb = rf"(?:{verbs})" if language in _UNSPACED else rf"(?<!\w)(?:{verbs})(?!\w)(?:\s*:)?"
    after = rf"\s*[:：=]|\s[-–—](?=\s)|{verb}"
    return rf"(?:{noun})(?:[^\n.!?。:：=]{{0,60}}?(?:{after})|[^\n.!?。:：=]{{0,20}}?(?=\s*(?:[$\d]|\\[(\[])))"


_PHRASE = re.compile(
    "|".join(_phrase(*announcement) for announcement in _ANNOUNCED) + r"|(?:^|\n)\s*A\s*:", re.IGNORECASE
)
_VERB_AT_END = re.compile(r"\s*(?:です|である|だ|となります|になります|입니다|이다|이에요|예요|है|हैं|হয়|'?d[ıiuü]r)\W*$")
"""Where the verb stands after the answer."""
_ANNOUNCED_WITHIN, _CLAUSE, _LAST_PHRASES = 20_000, 500, 5
"""Characters from the end of a text in which it is searched for phrases; after a phrase for the answer; how many."""
_ABBREVIATED = re.compile(r"\b(?:mrs?|ms|dr|st|prof|mt|jr|sr|vs|no|a\.m|p\.m|e\.g|i\.e|approx)\.$", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<!\\)[.!?](?:\*\*)?(?=\s|$)|。")
_NOTHING = re.compile(
    r"(?:therefore|thus|then|hence|now|simply|just|equal to|也?就?是|also|consequently|so)\b,?\s*:?\s*", re.IGNORECASE
)
_NO_ANSWER = re.compile(r"(?:correct|right|wrong|as follows|below|above|unknown to|clear\b)", re.IGNORECASE)


def _announced(text: str) -> str:
    """What a text says after a phrase that it begins with, such as "Answer:"; all of it if it does not."""
    match = _PHRASE.search(text)
    if match and re.fullmatch(
        r"\W*(?:\\text\{)?\W*(?:(?:so|thus|therefore|hence|the|my|our|final|correct|la|el|die|der|das|最终|正确)\W+)*(?:最终|正确)?",
        text[: match.start()],
        re.I,
    ):
        rest = text[match.end() :]
        return _VERB_AT_END.sub(
            "", rest[1:] if rest.startswith("}") else rest.replace("}", "", rest.count("}") > rest.count("{"))
        )
    return text


def announced(text: str) -> list[str]:
    """What follows the phrases that announce an answer, the last first: each the sentence that it begins."""
    found = list[str]()
    text = text[-_ANNOUNCED_WITHIN:]
    for match in list(_PHRASE.finditer(text))[: -_LAST_PHRASES - 1 : -1]:
        rest = text[match.end() : match.end() + _CLAUSE]
        shown = re.match(r"\s*(?:\$\$|\\\[)(.*?)(?:\$\$|\\\])", rest, re.DOTALL)
        line = shown[1] if shown else next((line for line in rest.split("\n") if line.strip()), "")
        clause = _NOTHING.sub("", _VERB_AT_END.sub("", _sentence(line.strip(" *_"))), count=1).strip()
        if clause and not _NO_ANSWER.match(clause):
            found.append(clause)
    return found


def _sentence(line: str) -> str:
    """The first sentence; a title's full stop does not end it."""
    for end in _SENTENCE_END.finditer(line):
        before = line[: end.end()].rstrip("*")
        if end[0] == "。" or not _ABBREVIATED.search(before):
            return line[: end.start()]
    return line


# Neither: values in running text

_LATEX = r"\$\$[^$]+\$\$|(?<!\\)\$(?!\s)(?:\\\$|[^$\n])*?(?<![\s\\])\$(?!\d)|\\\((?:[^\\]|\\(?!\)))*\\\)|\\\[(?:[^\\]|\\(?!\]))*\\\]|-?\\frac\{[^{}]*\}\{[^{}]*\}"
_FIGURE = r"(?<![\w.,])[-−(]*(?:\\?[$€£¥₹]\s?)?[-−]?\.?\d(?:[\d.,]*\d)?(?:\s?\\?%)?\)*"
_ARITHMETIC = (
    rf"{_FIGURE}(?:\s*[-+*/^=×÷·−x]\s*(?:\\?[$€£¥₹]\s?)?[-(]*(?:\\?[$€£¥₹]\s?)?(?:\.?\d(?:[\d.,]*\d)?)(?:\s?\\?%)?\)*)*"
)
_ITEM = rf"(?:{_LATEX}|{_ARITHMETIC})"
_VALUES = re.compile(
    rf"{_ITEM}(?:(?:\s+(?!and\b|or\b)[A-Za-z]+){{0,2}}\s*(?:,\s*(?:and|or)?|;|\band\b|\bor\b|\bto\b|和|或|、)\s*{_ITEM})*"
)
_HEDGED = re.compile(
    r"\b(?:not|less|more|greater|fewer|least|most|between|over|under|above|below|never|neither)\b", re.IGNORECASE
)
_TAIL = 1000


def first_value(clause: str) -> str | None:
    """The number, formula, or list of them near the start of a clause of prose; all of the clause if it is hedged."""
    match = _VALUES.search(clause)
    if match is None or match.start() > 40:
        return None
    return clause if _HEDGED.search(clause[: match.start()]) else _last_side(match[0])


def last_value(text: str) -> str | None:
    """The last number, formula, or list of them in a text."""
    lines = [line for line in text[-_TAIL:].splitlines() if re.search(r"\d|\$|\\[(\[]", line)]
    for line in reversed(lines):
        found = list(_VALUES.finditer(line))
        if found:
            return _last_side(found[-1][0])
    return None


def _last_side(value: str) -> str:
    """The result of arithmetic that is written out: 18 of 9 * 2 = 18."""
    return (
        value.rpartition("=")[2]
        if re.fullmatch(r"[\s\d.,+\-*/^=×÷·−x()$€£¥₹%\\]+", value) and "," not in re.sub(r",(?=\d)", "", value)
        else value
    )
