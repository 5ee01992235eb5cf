r"""Mathematics: 1 if the final answer equals the expected one as mathematics, 0 if not.

The final answer is what the last ``\boxed{...}``, ``<answer>...</answer>`` or ``####`` holds (`_marks`), else what "the
answer is" announces, in any of many languages (`_phrases`, `_languages`), else the last number or formula of the text
(`_values`); one that is denied, or one of several, is none (`_hedges`). Texts are compared before numbers, and those
before formulas (`_equality`), which are left to math-verify (`_symbols`, `_guards`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar

from rlzoo.reward import register_reward
from rlzoo.rewards._equality import all_equal
from rlzoo.rewards._hedges import UNDECIDED
from rlzoo.rewards._marks import marked
from rlzoo.rewards._numbers import number
from rlzoo.rewards._phrases import announced, opening, states
from rlzoo.rewards._text import column_of, completion_text, gold_text, is_missing
from rlzoo.rewards._times import clock
from rlzoo.rewards._values import first_value, last_lines, last_value, only_value, without_denial
from rlzoo.rewards._writing import clean, compact, is_prose, words

_LONG = 100
"""Characters from which a gold answer in words is taken for a worked solution."""
_ENDING = 20_000
"""Characters from the end of a text without marks in which its answer is searched for."""
_BLANKS = re.compile(r"[^\S\n]{3,}|\n{3,}")
_DISPLAY = re.compile(r"\\\[(?:(?!\\\]|\n\s*\n).){,500}\\\]|\$\$(?:(?!\n\s*\n)[^$]){,500}\$\$", re.DOTALL)
"""Displayed formulas, which may stand on lines of their own."""
_ALIGNED = re.compile(r"\\begin\{((?:align|gather)(?:ed)?|equation|split)(\*?)\}(.{,2000}?)\\end\{\1\2\}", re.DOTALL)
_OVER_LINES = re.compile(r"[^\S\n]?\n{1,2}(or|and)\b[^\S\n]?\n{,2}|[^\S\n](or|and)[^\S\n]?\n{1,2}")
"""An "or" that joins the lines above and below."""
_REASON = re.compile(r",?\s+(?:(?:because|since|namely|as (?:the|it|they|all))\b|i\.e\.).*", re.DOTALL)


@register_reward
@dataclass(frozen=True)
class MathAnswer:
    """1[answer = gold] up to the form of writing; None for rows without a gold answer, which a warning counts.

    A gold answer is a number, LaTeX, words, a list of them, all of which are asked for, or a worked solution that
    ends as completions do. p % equals p/100 and, from 1 % on, p.
    """

    name: ClassVar[str] = "math-answer"

    column: str = "answer"
    marked: bool = False
    """True: an answer must be in a box, a tag or after ``####``; the last number of rambling text does not count."""

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value for each completion. Raises UserError if the data lacks ``column``."""
        golds = column_of(columns, self.column, self.name)
        values = [_score(completion_text(c), gold, self.marked) for c, gold in zip(completions, golds, strict=True)]
        if None in values:
            first = values.index(None)
            told = f"{values.count(None)} of {len(values)} rows have no gold answer in column {self.column!r}"
            example = f"the first is row {first}, {golds[first]!r:.60}"
            warnings.warn(f"reward {self.name!r}: {told} and are worth None; {example}", UserWarning, stacklevel=2)
        return values

    def answer_of(self, completion: Any) -> str:
        """The final answer in one writing, for a vote among samples: 0.5 and 1/2 are one answer; empty without one."""
        text = _concluded(completion_text(completion))
        answers = marked(text) or ([] if self.marked else [*_readings(text, [])][-1])
        return "; ".join(sorted(_in_one_writing(clean(answer)) for answer in answers if answer != UNDECIDED))


def _score(completion: str, gold: Any, must_be_marked: bool) -> float | None:
    expected = _gold_answers(gold)
    if not expected:
        return None
    text = _concluded(completion)
    answers = marked(text)
    if answers:
        in_sentences = [only_value(answer) or opening(answer) or answer for answer in answers]
        same = all_equal(answers, expected) or (in_sentences != answers and all_equal(in_sentences, expected))
        return float(same and all(map(clean, answers)))
    return float(
        not must_be_marked
        and "<think>" not in text
        and any(all_equal(answers, expected) for answers in _readings(text, expected))
    )


def _concluded(completion: str) -> str:
    """A completion without the reasoning before its conclusion, if it has one."""
    completion = _BLANKS.sub(lambda run: run[0][:2], completion)
    concluded = completion.rpartition("</think>")[2]
    return concluded if concluded.strip() else completion


def _gold_answers(gold: Any) -> list[str]:
    """The answers that a row asks for, all of them; [] if it has none. Raises TypeError for a mapping or bytes."""
    if hasattr(gold, "tolist"):  # numpy's arrays and numbers
        gold = gold.tolist()
    if isinstance(gold, Sequence | Set) and not isinstance(gold, str | bytes):
        each = [_gold_answers(one) for one in gold]
        return [answer for answers in each for answer in answers] if all(each) else []
    if is_missing(gold):
        return []
    text = gold_text(gold).strip()
    found = marked(text)
    if not found and (len(text) > _LONG or "\n" in text) and is_prose(clean(text)):  # a worked solution
        found = (announced(text[-_ENDING:]) or [[last_value(text) or text]])[0]
    return [answer for answer in found or [text] if clean(answer)]


def _last_row(aligned: re.Match[str]) -> str:
    """The last row of an aligned formula that continues from row to row; else all rows, which stand for themselves."""
    rows = [" ".join(row.split()) for row in aligned[3].split(r"\\") if row.strip()] or [""]
    return (rows[-1] if rows[-1].startswith(("&", "=")) else ", ".join(rows)).replace("&", "")


def _is_wording(gold: str) -> bool:
    return is_prose(gold) and number(gold) is None and clock(gold) is None


def _read(clause: str, words_wanted: bool) -> str | None:
    """What a clause that announces an answer gives for it; None if it only speaks of it."""
    clause = _REASON.sub("", clause)
    if words_wanted or number(clean(clause)) or not is_prose(clean(clause)):
        return opening(clause) or clause
    return first_value(clause)


def _prepared(text: str) -> str:
    """The end of a text without marks, each formula on one line."""
    text = _ALIGNED.sub(_last_row, text[-_ENDING:])
    text = _DISPLAY.sub(lambda display: " ".join(display[0].split()), text)
    return _OVER_LINES.sub(lambda word: f" {word[1] or word[2]} ", text)


def _readings(text: str, golds: list[str]) -> Iterator[list[str]]:
    """What a text without marks answers: what it announces last, else what it begins or ends with; the closest last."""
    text = _prepared(text)
    words_wanted = bool(golds) and all(_is_wording(clean(gold)) for gold in golds)
    for said in announced(text):
        yield (clauses := [without_denial(clause) for clause in said])
        values = [value for clause in clauses if (value := _read(clause, words_wanted)) is not None]
        if values:
            yield values if len(values) == len(clauses) else [UNDECIDED]
            return
    yield [opening(text) or UNDECIDED]
    yield golds if golds and states(text, golds) else [UNDECIDED]
    yield (ending := last_lines(text))
    value = last_value(text) if len(ending) == 1 and is_prose(clean(ending[0])) else None
    if value is not None and (is_prose(clean(value)) or not words_wanted):
        yield [value]


def _in_one_writing(answer: str) -> str:
    """A clean answer as a vote counts it: a number by its value, words by themselves, a formula without blanks."""
    read = number(answer) if len(answer) < _LONG else None
    if read is not None:
        return f"{read.value}{'%' if read.percent else ''}"
    return words(answer) if is_prose(answer) else compact(answer)
