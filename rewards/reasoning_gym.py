"""Reasoning Gym: the scorer of the data set that a problem comes from.

Some scorers evaluate a model's answer as code; they never get an answer that is more than arithmetic.
Source: github.com/open-thought/reasoning-gym.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from rlzoo.errors import UserError
from rlzoo.reward import register_reward
from rlzoo.rewards._text import after_last, column_of, completion_text, last_boxed, tags

PYTHON_SCORERS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Data sets whose scorers pass an answer to ``eval`` unless it is verbatim the expected one."""
SYMPY_SCORERS = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
"""Data sets whose scorers pass answers to sympy's ``parse_expr``, which rewrites them and calls ``eval``."""

_LITERAL = (ast.Expression, ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple, ast.UnaryOp, ast.USub)
_ARITHMETIC = (ast.Expression, ast.Name, ast.Load, ast.UnaryOp, ast.USub, ast.UAdd)
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)
_FUNCTIONS = {
    "sin",
    "cos",
    "tan",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "tanh",
    "exp",
    "log",
    "ln",
    "sqrt",
    "Abs",
}
_GREATEST_EXPONENT = 100


@register_reward
@dataclass(frozen=True)
class ReasoningGym:
    r"""The data set's own score, in [0, 1], of the final answer.

    The final answer is the last ``<answer>...</answer>``, else the last ``\boxed{}``, else what follows the last
    ``####``, else the whole text. Columns: ``metadata`` (a mapping or its JSON, with ``source_dataset``), ``answer``,
    and ``question`` if there is one. An answer that the scorer would run as code is scored as an empty one. Raises
    UserError without the package reasoning-gym, for a missing column, and for metadata that name no data set.
    """

    name: ClassVar[str] = "reasoning-gym"

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value per completion."""
        metadata = column_of(columns, "metadata", self.name)
        answers = column_of(columns, "answer", self.name)
        questions = columns.get("question", [None] * len(completions))
        return [
            _score(_final(completion_text(c)), {"question": q, "answer": a, "metadata": self._read(m, row)})
            for row, (c, q, a, m) in enumerate(zip(completions, questions, answers, metadata, strict=True))
        ]

    def answer_of(self, completion: Any) -> str:
        """The answer in a completion that the scorer gets."""
        return _final(completion_text(completion))

    def _read(self, metadata: Any, row: int) -> Mapping[str, Any]:
        try:
            read = json.loads(metadata) if isinstance(metadata, str) else metadata
        except json.JSONDecodeError as error:
            raise UserError(f"reward {self.name!r}: metadata of row {row} is not JSON: {error}") from None
        if not isinstance(read, Mapping) or not isinstance(read.get("source_dataset"), str):
            raise UserError(f"reward {self.name!r}: metadata of row {row} has no 'source_dataset'")
        return read


def _final(text: str) -> str:
    tagged = tags(text)
    if tagged:
        return tagged[-1].answer
    for answer in (last_boxed(text), after_last(text, "####")):
        if answer is not None:
            return answer
    return text.strip()


def _score(answer: str, entry: dict[str, Any]) -> float:
    source = entry["metadata"]["source_dataset"]
    scorer = _scorer(source)
    if not _may_be_scored(answer, source):
        answer = ""
    try:
        return float(scorer(answer, entry))
    except Exception:
        scorer(entry["answer"], entry)  # raises too if the row is at fault and not the answer
        return 0.0


@lru_cache
def _scorer(source: str) -> Callable[[str, dict[str, Any]], float]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(f"reward 'reasoning-gym': {error}: pip install rlzoo[reasoning-gym]") from None
    try:
        scorer: Callable[[str, dict[str, Any]], float] = reasoning_gym.get_score_answer_fn(source)
    except ValueError:
        raise UserError(f"reward 'reasoning-gym': reasoning_gym has no data set {source!r}") from None
    return scorer


def _may_be_scored(answer: str, source: str) -> bool:
    """Whether the scorer of ``source`` can be given a model's answer: model output is never run as code."""
    if source not in PYTHON_SCORERS | SYMPY_SCORERS:
        return True
    try:
        nodes = list(ast.walk(ast.parse(answer, mode="eval")))
    except SyntaxError:
        return source in PYTHON_SCORERS  # eval refuses it as well, but sympy rewrites it first
    except (ValueError, RecursionError, MemoryError):
        return False
    if source in PYTHON_SCORERS:
        return all(isinstance(node, _LITERAL) for node in nodes)
    return all(_is_arithmetic(node) for node in nodes)


def _is_arithmetic(node: ast.AST) -> bool:
    """Numbers, names, elementary functions, small powers; no strings, which sympy would run."""
    match node:
        case ast.Constant(value):
            return type(value) in (int, float)
        case ast.Call(ast.Name(function), _, keywords):
            return function in _FUNCTIONS and not keywords
        case ast.BinOp(base, ast.Pow(), exponent):
            return _is_small(exponent) and not any(isinstance(n, ast.Pow) for n in ast.walk(base))
    return isinstance(node, (*_ARITHMETIC, *_OPERATORS, ast.BinOp))


def _is_small(exponent: ast.expr) -> bool:
    """Whether an exponent has at most two numbers, none of them great, and neither product nor power."""
    nodes = list(ast.walk(exponent))
    numbers = [node.value for node in nodes if isinstance(node, ast.Constant)]
    plain = all(isinstance(value, int | float) and value <= _GREATEST_EXPONENT for value in numbers)
    return plain and len(numbers) <= 2 and not any(isinstance(n, ast.Mult | ast.Pow | ast.Call) for n in nodes)
