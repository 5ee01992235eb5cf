r"""Finding the final answer in a text: where it is marked, where it is announced, or else at the end."""

from __future__ import annotations

import re
from itertools import pairwise

from rlzoo.rewards import _units
from rlzoo.rewards._numbers import clock, number
from rlzoo.rewards._text import Mark, boxes, tags
from rlzoo.rewards._writing import CONJUNCTION, clean

# Marked: a box, a tag, ####

_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_TITLES = "answer|result|conclusion|solution|summary|verification|explanation|check|calculations?|reasoning"
_HEADING = re.compile(rf"(?:step|part|case|method|approach|problem|question)\b|[^:]*\b(?:{_TITLES})\W*$", re.IGNORECASE)
"""What follows #### where that is Markdown's heading of the fourth level."""

_AND = re.compile(rf"\b(?:maybe|perhaps|possibly|alternatively|as well as)\b|[,;&、]|{CONJUNCTION}")
_BETWEEN = re.compile(
    rf"(?:[\s,.;:&$~|/*\-•、，；。]|\\[\[\](),;:! \\]|\\q?quad|{CONJUNCTION}"
    r"|\\text\{\s*,?\s*(?:and|or)\s*\}|[A-Za-z](?:_\{?\w\}?)?\$? ?=|(?<!\w)\(?[\da-z]{1,2}[.)]"
    r"|[^\W\d_]{3,}(?: \(?[A-Za-z]\)?| ?\d):"
    r"|(?<!\w)(?i:the|my|first|second|third|next|other|another|possible|answers? (?:is|are))\b)*"
)
r"""All that may stand between two answers next to one another: signs, "and", what the second is called: y =, (b)."""
_INSTEAD = (
    r"=|\b(?:no|not|wait|actually|instead|rather|correct(?:ion|ed)?|sorry|mistake|which|so|thus|hence|therefore|then|"
    r"equals|finally)\b"
)
_REVISED = re.compile(rf"[.!?]\s|\n\s*\n|\bbut\b|{_INSTEAD}", re.IGNORECASE)
"""What makes the second of two answers take the place of the first."""
_REPLACED = re.compile(_INSTEAD, re.IGNORECASE)
"""The same, where a sentence on another candidate is announced as such."""
_CANDIDATE = re.compile(
    r"\b(?:maybe|perhaps|possibly|alternatively|either|otherwise|guess(?:es)?|(?:might|may|could)(?: also| well)* be)\b"
    r"|可能|也许|(?:^|[.;,!?]) *\bor\b"
    r"|\b(?:options?|alternatives?|candidates?|attempts?|possibility)\b(?! (?:is|are) correct)",
    re.IGNORECASE,
)
"""What announces the second of several candidates, even in a sentence of its own."""


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
    together = _last_together(text, found)
    each = [marked(mark.answer, within - 1) or [_after_phrase(mark.answer)] for mark in together]
    return [answer for answers in each for answer in answers]


def _denied(text: str, mark: Mark) -> bool:
    r"""Whether a mark is no answer, or a bound: not \boxed{5}, \boxed{5} is wrong, \boxed{5} or more."""
    before = _DENIED_NEXT.search(text[max(0, mark.start - 30) : mark.start])
    return before is not None or _HEDGED_AFTER.match(text, mark.end) is not None


def _last_together(text: str, found: list[Mark]) -> list[Mark]:
    """The last of the marks, and those before it that are listed with it."""
    together = found[-1:]
    for earlier, later in reversed(list(pairwise(found))):
        if not _listed(text[earlier.end : later.start]):
            break
        together.insert(0, earlier)
    return together


def _outermost(found: list[Mark]) -> list[Mark]:
    kept = list[Mark]()
    for mark in sorted(found, key=lambda mark: (mark.start, -mark.end)):
        if not kept or mark.start >= kept[-1].end:
            kept.append(mark)
    return kept


def _listed(between: str) -> bool:
    if len(between) < 100 and _BETWEEN.fullmatch(between):
        return True
    return len(between) < 70 and (
        (_AND.search(between) is not None and _REVISED.search(between) is None) or _is_candidate(between)
    )


def _is_candidate(between: str) -> bool:
    return _CANDIDATE.search(between) is not None and _REPLACED.search(between) is None


# Denied and bounded: not 5, more than 5

_DENIED = (  # the language, and what says before an answer that it is none
    (
        "English",
        r"\b(?:not|never|neither|nor|cannot|such as|for example|anything but|other than|except|unlike)\b|n't\b",
    ),
    ("French", r"\b(?:pas|sauf)\b"),
    ("German, Dutch", r"\b(?:nicht|kein\w*|weder|niet|geen)\b"),
    ("Spanish, Portuguese, Italian", r"\b(?:no (?:es|son)|não (?:é|são)|non (?:è|sono))\b"),
    ("Russian, Ukrainian, Polish, Czech", r"\b(?:не|nie|není)\b"),
    ("Danish, Norwegian, Swedish", r"\b(?:inte|ikke)\b"),
    ("Chinese", "不[是为等]|[并绝]非"),
    ("Arabic, Hebrew", "ليست?|אינ[הו]"),
    ("Vietnamese, Indonesian, Thai", r"không phải|\bbukan\b|ไม่ใช่"),
)
_DENIED_AFTER = "では?(?:ありません|ない|なく)|じゃない|아니|아닙|아닌|değil|नहीं|নয়|نیست"
"""The same of Japanese, Korean, Turkish, Hindi, Bengali and Persian, where it follows the answer."""
_BOUNDED = (
    (
        "English",
        r"\b(?:less|more|greater|fewer|larger|smaller|higher|lower|least|most|between|over|under|above|below)\b",
    ),
    ("English", r"\b(?:exceed(?:s|ing)?|beyond|up to)\b"),
    ("French", r"\b(?:plus|moins) (?:de|grand|petit)|\bentre\b"),
    ("German", r"\b(?:mehr|weniger|größer|kleiner) als\b|\b(?:mindestens|höchstens|zwischen)\b"),
    ("Spanish, Portuguese", r"\b(?:más|mais|menos|mayor|maior|menor) (?:de|do|que)\b"),
    ("Russian", r"\b(?:больше|меньше|более|менее|между)\b"),
    ("Chinese", "大于|小于|超过|多于|少于|不足|至少|至多|最多|最少"),
)
_BOUNDED_AFTER = (
    r"(?:or|and) (?:any|more|less|fewer|greater|above|below|higher|lower|over|under)\b|at (?:most|least)\b|以上|以下"
)
_DENIAL = "|".join(words for _, words in _DENIED)
_NOT_THAT = rf"{_DENIAL}|{'|'.join(words for _, words in _BOUNDED)}"
_NEXT = r"(?:\s+(?:than|or|equal|to|be|exactly|answer|the|a|an))*\W*\Z"
_DENIED_WORD = re.compile(_DENIAL, re.IGNORECASE)
_DENIED_NEXT = re.compile(rf"(?:{_DENIAL}){_NEXT}", re.IGNORECASE)
_HEDGED = re.compile(_NOT_THAT, re.IGNORECASE)
_HEDGED_NEXT = re.compile(rf"(?:{_NOT_THAT}){_NEXT}", re.IGNORECASE)
_HEDGED_AFTER = re.compile(
    rf"[^\n.。!?]{{0,3}}(?:{_DENIED_AFTER})|\W{{0,3}}(?:{_BOUNDED_AFTER})|\W{{0,3}}is (?:not|wrong|incorrect)\b",
    re.IGNORECASE,
)
_LABELLED = re.compile(
    r"\b(?:step|question|problem|part|case|equation|eq|theorem|lemma|section|figure|table|page|line|chapter|example|"
    r"exercise|mod|modulo)\.?\s*[(#]?\Z|(?:\\boxed\s*\{|<answer>)\W*\Z",
    re.IGNORECASE,
)
"""What a number follows that is no value: Theorem 5; or a mark that is denied."""


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
    before_number = rf"(?:(?!\\[A-Za-z]){same_sentence}){{0,20}}?(?=\s*(?:[$\d]|\\[(\[]))"
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
    r"(?:therefore|thus|then|hence|now|simply|just|equal to|也?就?是|also|consequently|so)\b,?\s*:?\s*"
    r"|(?:the|la|l'|el) ?(?:letter|option|opción|letra|lettre)? ?(?=\(?[A-J]\b)",
    re.IGNORECASE,
)
_NO_ANSWER = re.compile(r"(?:correct|right|wrong|as follows|below|above|unknown to|clear\b)", re.IGNORECASE)
"""What follows "the answer is" where no answer does."""
_ABBREVIATED = re.compile(r"\b(?:mrs?|ms|dr|st|prof|mt|jr|sr|vs|no|a\.m|p\.m|e\.g|i\.e|approx)\.$", re.IGNORECASE)
_SENTENCE_END = re.compile(
    r"(?<!\\)[.!?](?:\*\*)?(?=\s|$)"
    r"(?!\s+(?:or|maybe|perhaps|possibly|alternatively|(?:it|this) (?:may|might|could))\b)"
    r"(?!\s+(?:\$?-?\d[\d.,]*|[A-J])[?.]?\$?$|\s+\S+ is also\b)|。",
    re.IGNORECASE,
)
"""The end of a sentence, unless the next takes it back, 5. Or 6, or is no more than a number, 5? 6?"""


ENDING, _CLAUSE, _LAST_PHRASES = 20_000, 500, 5
"""Characters from the end of a text in which phrases are searched for; after a phrase for the answer; how many."""


def _after_phrase(text: str) -> str:
    """What a text says after a phrase that it begins with, such as "Answer:"; all of it if it does not."""
    match = _PHRASE.search(text, 0, _CLAUSE)
    if match is None or not _BEFORE_PHRASE.fullmatch(text[: match.start()]):
        return re.sub(rf"^(?:{_ADVERB.pattern})", "", text.strip(), flags=re.IGNORECASE)
    rest = text[match.end() :]
    if rest.count("}") > rest.count("{"):  # the phrase was in \text
        rest = rest.replace("}", "", 1)
    return _VERB_AT_END.sub("", rest).strip()


def announced(text: str) -> list[list[str]]:
    """What follows the phrases that announce an answer, the last first: each the sentence that it begins.

    Announcements that are listed together, as marks are, come together.
    """
    phrases = list(_PHRASE_OR_A.finditer(text))[-_LAST_PHRASES:]
    ends = [*(phrase.start() for phrase in phrases), len(text)][1:]
    found = [_announcement(text[:end], phrase) for phrase, end in zip(phrases, ends, strict=True)]
    marks = [mark for mark in found if mark.answer and not _NO_ANSWER.match(mark.answer)]
    groups = list[list[str]]()
    while marks:
        together = _last_together(text, marks)
        marks = marks[: -len(together)]
        groups.append([mark.answer for mark in together])
    return groups


def _announcement(text: str, phrase: re.Match[str]) -> Mark:
    """The sentence after a phrase, as far as the text goes; empty if the phrase denies it."""
    text = text[: phrase.end() + _CLAUSE]
    if _DENIED_WORD.search(phrase[0]) or _HEDGED_NEXT.search(phrase[0]):
        return Mark(phrase.start(), phrase.end(), "")
    line = re.compile(r"\s*(?:\$\$|\\\[)(.*?)(?:\$\$|\\\])", re.DOTALL).match(text, phrase.end())
    line = line or re.compile(r"[\s*_]*([^\n]*)").match(text, phrase.end())
    assert line is not None  # it may be empty
    sentence = _sentence(line[1].rstrip(" *_"))
    clause = _ADVERB.sub("", _VERB_AT_END.sub("", sentence), count=1).strip()
    empty = _BEFORE_PHRASE.fullmatch(clause) or re.search(_DENIED_AFTER, clause)
    return Mark(phrase.start(), line.start(1) + len(sentence), "" if empty else clause)


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
    r"|(?<![\w.,])-?(?:\d[\d.,]*)?(?:π|\\pi\b|(?:√|\\sqrt)(?:\d+|\{[^{}]*\}|\([^()]*\)))(?:/\d+)?(?! ?[A-Za-z]\b)"
)
_SIGN = r"(?:\\?[$€£¥₹]\s?)?"
_DIGITS = r"\.?\d(?:[\d.,]*\d)?(?![\d.,]*(?:[π√]|\\(?:pi|sqrt|frac)))(?:\s?\\?%)?\)*"
_RATIO = r"(?<![A-Za-z\d_.,:])\d+(?:\s?:\s?\d+)+(?!\d)(?:\s?[ap]\.?m\b\.?)?"  # or a time of the day
_TERM = rf"[-−(]*{_SIGN}[-−]?{_DIGITS}"
_ARITHMETIC = rf"(?<![A-Za-z\d_.,])(?:negative )?{_TERM}(?:\s*[-+*/^=×÷·−x]\s*{_SIGN}{_TERM})*"
_SPACED = rf"(?<![\w.,/])-?{_SIGN}(?:\d{{1,3}}(?: \d{{3}})+(?:\.\d+)?|\d+ \d{{1,3}}/\d{{1,3}})(?![\d/])"  # 1 000, 5 1/2
_ITEM = rf"(?:{_LATEX}|{_RATIO}|{_SPACED}|{_ARITHMETIC})"
_UNIT = r"(?:\s+(?!and\b|or\b)[A-Za-z]+){0,2}"
_JOIN = (
    r"(?:[,;]?\s*(?:and|(?:or(?:\s+else)?|otherwise)(?:\s+it\s+is)?|maybe|perhaps|possibly)\b|\bto\b|[,;]|[和、]|或者?"
    r"|[个元]?[，,]?[也或者还]*可能[是有]"
    rf"|{CONJUNCTION})"
)
_VALUES = re.compile(rf"{_ITEM}(?:{_UNIT}\s*{_JOIN}\s*{_ITEM})*", re.IGNORECASE)
"""A number, arithmetic or a formula, or a list of them: 3 apples and 4."""
_WORD = re.compile(
    r"(?<![\\\w{])(?!(?:and|or)\b)[^\W\d_]{2,}(?=[,:]?\s)|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af][，：:]?"
)
_TEX = re.compile(r"[^$]*(?:\\[A-Za-z!]|[\^=_<>≤≥≠]|\d[a-z]\b)[^$]*$")
"""LaTeX without dollars to the end of a line."""
_OR_ELSE = re.compile(
    r"\b(?:or|maybe|perhaps|possibly|alternatively)\b[^.]*?\d|\b(?:may|might|could)(?: also| well)* be\W*\d"
    r"|\d\W*otherwise\b|\b(?:if|when|for|in|another)\b[^.]*?(?:[,;]|\band\b|\banother\b[^.]*?)\s*(?:is\s+)?\$?-?\d",
    re.IGNORECASE,
)
_VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|had|gets?|got|makes?|made|needs?|costs?|takes?|took|earns?|equals?|sold|spent)\b"
)
"""What makes a sentence of the words before a value."""
_NEAR, _TAIL = 40, 1000
"""Characters before the value of a clause; from the end of a text in which its last value is searched for."""


def first_value(clause: str) -> str | None:
    """The number, formula, or list of them near the start of a clause of prose; all of the clause if it is hedged."""
    match = _VALUES.search(clause)
    if match is None or match.start() > _NEAR:
        return None
    after = _OR_ELSE.search(clause, match.end()) or _HEDGED_AFTER.match(clause, match.end())
    return clause if _HEDGED.search(clause[: match.start()]) or after else _with_unit(match)


def only_value(text: str) -> str | None:
    """The one value in a sentence: There are 5 apples; None for a text of another kind."""
    found = list(_VALUES.finditer(text)) if len(text) < _CLAUSE else []
    if len(found) != 1 or re.search(r"[\n?]", text) or not _VERB.search(text[: found[0].start()]):
        return None
    return _committed(text, found)


def last_value(text: str) -> str | None:
    """The last number, formula, or list of them in a text."""
    for line in reversed(text[-_TAIL:].splitlines()):
        after = max((word.end() for word in _WORD.finditer(line)), default=0)
        if _TEX.match(line, after) and not _HEDGED.search(line[:after]):
            return line[after:]
        found = [m for m in _VALUES.finditer(line) if not _LABELLED.search(line[: m.start()])]
        if found:
            return _committed(line, found)
    return None


def _committed(line: str, found: list[re.Match[str]]) -> str | None:
    """The last of the values in a line; None if it is denied, no more than a bound, or one of several candidates."""
    last = found[-1]
    if _HEDGED_NEXT.search(line[: last.start()]) or _HEDGED_AFTER.match(line, last.end()):
        return None
    if len(found) > 1 and _is_candidate(line[found[-2].end() : last.start()]):
        return None
    return _with_unit(last)


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
    if re.fullmatch(r"(?:[\s\d.+\-*/^=×÷·−x()$€£¥₹%\\]|,(?=\d))+", value):
        return value.rpartition("=")[2]
    return value
