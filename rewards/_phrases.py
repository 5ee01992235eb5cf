"""Answers that a text announces: the answer is 5; 5 is the answer."""

from __future__ import annotations

import re

from rlzoo.rewards._equality import choice
from rlzoo.rewards._hedges import DENIED_WORD, HEDGED_NEXT, IGNORANT, UNDECIDED, VALUE, last_together, taken_back
from rlzoo.rewards._languages import DENIED, DENIED_AFTER, EITHER, MAYBE, NOW, PHRASE
from rlzoo.rewards._text import Mark
from rlzoo.rewards._values import CLAUSE, VALUES
from rlzoo.rewards._writing import clean, is_prose, words

_PHRASE = re.compile(PHRASE, re.IGNORECASE)
_PHRASE_OR_A = re.compile(rf"{PHRASE}|(?:^|\n)\s*A\s*:", re.IGNORECASE)
_IS_RIGHT = re.compile(
    r"\*{0,2} (?:is|are|must be)(?: (?:the|my|our|both))?(?: (?:only|final|correct|right|best))? "
    r"(?:correct|right|answers?|option|choice)\b(?! (?:to|of|for|in|if|when|only)\b)"
)
"""What follows an answer: option A is correct, 5 is the answer."""
_CHOSEN = re.compile(r"(?:\b(?:option|choice|answer)s? )?((?<![\w'])\(?[A-J]\)?(?:(?:,? (?:and|or)|,) \(?[A-J]\)?)*)\Z")
_BEFORE_PHRASE = re.compile(
    r"(?:\W|\\text\b|(?:so|thus|therefore|hence|the|my|our|final|correct|la|el|die|der|das)\b|最终|正确)*",
    re.IGNORECASE,
)
_VERB_AT_END = re.compile(r"\s*(?:です|である|だ|となります|になります|입니다|이다|이에요|예요|है|हैं|হয়|'?d[ıiuü]r)\W*$")
"""Where the verb stands after the answer."""
_ADVERB = re.compile(
    rf"\s*(?:(?:(?:{NOW})\b|也?就?是),?\s*:?\s*)*"
    r"(?:(?:the|la|l'|el) ?(?:letter|option|opción|letra|lettre)? ?(?=\(?[A-J]\b)|选项(?=[A-J]))?",
    re.IGNORECASE,
)
_NO_ANSWER = re.compile(r"(?:correct|right|wrong|as follows|below|above|unknown to|clear\b)", re.IGNORECASE)
"""What follows "the answer is" where no answer does."""
_ABBREVIATED = re.compile(
    r"\b(?:mrs?|ms|dr|st|prof|mt|jr|sr|vs|no|a\.m|p\.m|e\.g|i\.e|approx|jan|feb|mar|apr|aug|sept?|oct|nov|dec)\.$",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<!\\)[.!?](?:\*\*|[*_])?(?=\s|$)|。")
_LAST_PHRASES, _NEAR = 5, 80
"""How many phrases are read; characters before "is correct" in which the answer is searched for."""


def after_phrase(text: str) -> str:
    """What a text says after a phrase that it begins with, such as "Answer:"; all of it if it does not."""
    match = _PHRASE.search(text, 0, CLAUSE)
    if match is None or not _BEFORE_PHRASE.fullmatch(text[: match.start()]):
        return _without_adverb(text.strip())
    rest = text[match.end() :]
    if rest.count("}") > rest.count("{"):  # the phrase was in \text
        rest = rest.replace("}", "", 1)
    return _VERB_AT_END.sub("", rest).strip()


def announced(text: str) -> list[list[str]]:
    """What phrases announce as the answer, the last first: each the sentence that it begins.

    Announcements that are listed together, as marks are, come together.
    """
    phrases = list(_PHRASE_OR_A.finditer(text))[-_LAST_PHRASES:]
    ends = [*(phrase.start() for phrase in phrases), len(text)][1:]
    found = [_announcement(text[:end], phrase) for phrase, end in zip(phrases, ends, strict=True)]
    found += [one for one in _reversed(text) if not any(said.start <= one.start < said.end for said in found)]
    marks = [mark for mark in sorted(found) if mark.answer and not _NO_ANSWER.match(mark.answer)]
    groups = list[list[str]]()
    while marks:
        together = last_together(text, marks)
        marks = marks[: -len(together)]
        groups.append([mark.answer for mark in together])
    return groups


def _announcement(text: str, phrase: re.Match[str]) -> Mark:
    """The sentence after a phrase, as far as the text goes; empty if the phrase denies it."""
    text = text[: phrase.end() + CLAUSE]
    if DENIED_WORD.search(phrase[0]) or HEDGED_NEXT.search(phrase[0]):
        return Mark(phrase.start(), phrase.end(), "")
    line = re.compile(r"\s*(?:\$\$|\\\[)(.*?)(?:\$\$|\\\])", re.DOTALL).match(text, phrase.end())
    line = line or re.compile(r"[\s*_]*([^\n]*)").match(text, phrase.end())
    assert line is not None  # it may be empty
    sentence = _sentence(line[1].rstrip(" *_"))
    end = line.start(1) + len(sentence)
    sentence = sentence.rstrip(" *_")
    clause = _without_adverb(_VERB_AT_END.sub("", sentence))
    if _BEFORE_PHRASE.fullmatch(clause) or re.search(DENIED_AFTER, clause):
        clause = ""
    hedged = IGNORANT.search(phrase[0]) or taken_back(text, end)
    return Mark(phrase.start(), end, UNDECIDED if clause and hedged else clause)


def _without_adverb(clause: str) -> str:
    adverb = _ADVERB.match(clause)
    return (clause[adverb.end() :].strip() if adverb else "") or clause


def _reversed(text: str) -> list[Mark]:
    """The answers that stand before what announces them."""
    found = list[Mark]()
    for match in _IS_RIGHT.finditer(text):
        before = text[max(0, match.start() - _NEAR) : match.start()]
        values = [value for value in VALUES.finditer(before) if value.end() == len(before)]
        answer = _CHOSEN.search(before) or (values[0] if values else None)
        if answer and not HEDGED_NEXT.search(before[: answer.start()]):
            start, said = match.start() - len(answer[0]), answer[answer.lastindex or 0]
            found.append(Mark(start, match.end(), UNDECIDED if taken_back(text, match.end()) else said))
    return found


def _sentence(line: str) -> str:
    """The first sentence; the full stop of a title does not end it, nor that between a letter and its value, A. 5."""
    for end in _SENTENCE_END.finditer(line):
        before, rest = line[: end.end()].rstrip("*_"), line[end.end() :]
        with_value = re.fullmatch(r"\W*[A-J]\.", before) and re.fullmatch(rf"\W*{VALUE}\W*", rest)
        if end[0] == "。" or not (with_value or _ABBREVIATED.search(before)):
            return line[: end.start()]
    return line


# Answers that a text explains, or states in words

_DOUBT = rf"{EITHER}|{MAYBE}|\b(?:if|when|unless|whether|suppos\w+|assum\w+|guess|doubt|wrong|incorrect)\b"
_VERDICT = re.compile(
    r"((?:yes|true)\b(?!.*(?:\b(?:no|false)\b|(?:\bnot|n't)\W*\Z))|(?:no|false)\b(?!.*\b(?:yes|true)\b))[,.;:!](?=\s|\Z)"
    rf"(?!.*(?:{_DOUBT}))",
    re.IGNORECASE | re.DOTALL,
)
_RETRACTED = re.compile(rf"{MAYBE}|\b(?:wait|actually|instead|sorry|mistake|oops|correction|hmm)\b", re.IGNORECASE)
_OTHER_LETTER = re.compile(r"(?<![\w'])(?:[B-HJ]|A(?=[.):,]|\W*$))(?![\w'])", re.MULTILINE)


def opening(text: str) -> str | None:
    """What a text begins with and then explains: "Yes, it is."; the letter B on a line above its reasons."""
    if verdict := _VERDICT.match(f"{clean(text)},"):
        return verdict[1]
    first, _, rest = text.strip().partition("\n")
    letter = choice(clean(first)) if rest.strip() else None
    return first if letter and not _RETRACTED.search(rest) and {*_OTHER_LETTER.findall(rest)} <= {letter[0]} else None


_COPULA = re.compile(r"\b(?:is|are|was|were|be|becomes|has|have|in|on|describes|represents) \Z")
_VERB_FIRST = re.compile(r"(?:do(?:es)?|is|are|has|have|converges?|diverges?|exists?)\b")
_NOT_STATED = re.compile(rf"{DENIED}|{_DOUBT}|\b(?:false|then)\b", re.IGNORECASE)


def states(text: str, golds: list[str]) -> bool:
    """Whether the last sentence of a text says in words of something that it is the gold answer: The winner is Tom."""
    gold, last = clean(golds[0]), re.split(r"[.!?;]\s|\n", text.strip())[-1]
    subject = words(clean(last)).removesuffix(wanted := f" {words(gold)}") + " "
    if len(golds) > 1 or not is_prose(gold) or last.endswith("?") or not words(clean(last)).endswith(wanted):
        return False
    if _NOT_STATED.search(subject) or words(clean(text)).count(subject) > 1:  # The winner is Tom. The winner is Bob.
        return False
    return _COPULA.search(subject) is not None or (subject.count(" ") < 4 and _VERB_FIRST.match(wanted, 1) is not None)
