"""Which classes of tokens carry an objective's gradient and its noise: the end of a sequence, digits, operators, ….

A prompt's gradient is the sum over classes k of those of its tokens, g_p = Σ_k g_p^k, so

    tr Σ = Σ_k tr Cov(g^k, g),    ‖G‖² = Σ_k ⟨G^k, G⟩

and the shares tr Cov(g^k, g)/tr Σ and ⟨G^k, G⟩/‖G‖² sum to 1: the covariance of two classes counts half for each. A
share is negative where a class's gradient opposes the others'. tr Σ^k, the noise of a class alone, leaves covariances
out and does not add up to tr Σ. Traces and inner products are estimated without bias, as in `rlzoo.variance.noise`, of
exact sums, except that tr Cov(g^k, g)/tr Σ is taken from random projections of the gradients about their mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int

from rlzoo.errors import UserError
from rlzoo.jobs.memory import on_device, release_memory
from rlzoo.policy import MicroBatches
from rlzoo.policy.chat import turn_of
from rlzoo.policy.sequences import learned
from rlzoo.registry import Registry, one_line
from rlzoo.types import Trajectory, over
from rlzoo.variance.gradients import GradientMeter
from rlzoo.variance.intervals import Estimate, estimated, nothing, student
from rlzoo.variance.noise import FEWEST, HIDDEN, TOO_FEW, Units, data_noise, is_hidden
from rlzoo.variance.over_data import Comparison, default_held, portions
from rlzoo.variance.scoring import Scored
from rlzoo.variance.subjects import Subject, SubjectWeights, token_weights
from rlzoo.variance.tasks import Task, UnitGradients

Classify = Callable[[str], str]
"""The class of a token, from its text."""
END = "end of sequence"
"""The class of tokens at which sampling stops, whatever their text."""
WHOLE = "(all)"
OPERATORS = frozenset("+-*/=<>^%×÷·−±≤≥≠≈√∑∏∫")
CONNECTIVES = frozenset({
    "and", "or", "but", "so", "if", "then", "thus", "hence", "therefore", "because", "since", "as", "while", "when",
    "which", "that", "where", "however", "also", "now", "next", "first", "second", "third", "finally", "let", "given",
    "wait", "instead",
})  # fmt: skip
_MARKUP = re.compile(r"</?[^<>\s]+>|\\[A-Za-z]+|(\W)\1+")
"""A tag, a LaTeX command, or a repeated sign such as ``####``, ``**`` or ``---``."""

_classifiers: Registry[Classify] = Registry("classes of tokens", "rlzoo.variance.classes", "rlzoo.token_classes")
_Function = TypeVar("_Function", bound=Classify)


def register_token_classes(name: str) -> Callable[[_Function], _Function]:
    """Decorator: register a function from a token's text to its class. Raises UserError if the name is taken."""

    def register(function: _Function) -> _Function:
        _classifiers.add(name, function)
        return function

    return register


@register_token_classes("default")
def default_classes(text: str) -> str:
    """``digits``, ``operators``, ``connectives``, other ``words``, or ``format``: spaces, punctuation and markup."""
    said = text.strip()
    if not said or _MARKUP.fullmatch(said):
        return "format"
    if all(sign in OPERATORS for sign in said):
        return "operators"
    if said.lower() in CONNECTIVES:
        return "connectives"
    if any(sign.isalpha() for sign in said):
        return "words"
    return "digits" if any(sign.isdigit() for sign in said) else "format"


def classifier(classes: str | Classify) -> Classify:
    """The function of a registered name, ``module:name`` or ``file.py:name``; a function is returned as it is.

    Raises UserError for an unknown name.
    """
    return _classifiers.get(classes) if isinstance(classes, str) else classes


@dataclass(frozen=True)
class TokenClasses:
    """The classes of the learned tokens of some rows."""

    names: list[str]
    codes: list[Int[np.ndarray, " n"]]
    """For each row, the index of each learned token's class in ``names``."""

    @classmethod
    def of(cls, tokenizer: Any, rows: Sequence[Trajectory], classes: str | Classify) -> TokenClasses:
        """The classes by a function, or by the name of one (see `classifier`).

        Raises UserError for an unknown name, and for a function that fails or gives anything but text.
        """
        classify = classifier(classes)
        ends = {tokenizer.eos_token_id, turn_of(tokenizer).stop}
        class_of: dict[int, int] = {}
        names: dict[str, int] = {}
        codes = []
        for row in rows:
            ids = [row.completion_ids[place] for place in learned(row)]
            for token in ids:
                if token not in class_of:
                    name = END if token in ends else _named(classify, tokenizer.decode([token]))
                    class_of[token] = names.setdefault(name, len(names))
            codes.append(np.array([class_of[token] for token in ids], np.int64))
        return cls(list(names), codes)

    def flat(self, subject: Subject) -> Int[np.ndarray, " N"]:
        """The classes of all learned tokens of a subject's rows."""
        return np.concatenate([self.codes[row] for row in subject.rows])

    def shares(self, subject: Subject, weighted: SubjectWeights, scored: Scored) -> dict[str, dict[str, Any]]:
        """Each class's share of the learned tokens, and of Σ a²S, the logit-space proxy of the squared norms.

        a is a token's weight in the loss and S the squared norm of ∇ log π in the logits. The largest class is first.
        """
        codes, table = self.flat(subject), scored.table(subject.rows)
        kept = np.concatenate(
            [
                mask[: len(self.codes[row])]
                for row, mask in zip(subject.rows, weighted.batch.mask.cpu().numpy(), strict=True)
            ]
        )
        power = token_weights(subject, weighted, scored) ** 2 * table.score_norm
        tokens, powers = (
            np.bincount(codes, values, minlength=len(self.names)) for values in (kept.astype(float), power)
        )
        whole = powers.sum()
        return {
            self.names[k]: {
                "tokens": float(tokens[k] / tokens.sum()),
                "proxy": float(powers[k] / whole) if whole else None,
            }
            for k in np.argsort(-tokens, kind="stable")
            if tokens[k]
        }

    def masks(self, subject: Subject, like: Float[torch.Tensor, "R T"]) -> Iterator[tuple[str, torch.Tensor]]:
        """Each class that a subject's rows have, and 1 at its tokens [R, T]."""
        present = np.unique(self.flat(subject))
        for k in present:
            mask = torch.zeros(like.shape, dtype=torch.bool)
            for row in subject.rows:
                own = torch.from_numpy(self.codes[row] == k)
                mask[row, : len(own)] = own
            yield self.names[k], on_device(mask, like.device)


def _named(classify: Classify, text: str) -> str:
    try:
        found: Any = classify(text)
    except Exception as error:  # of a plug-in
        raise UserError(f"the function of token classes failed on the token {text!r}: {one_line(error)}") from error
    if not isinstance(found, str) or not found.strip():
        raise UserError(
            f"the function of token classes gives {found!r:.40} for the token {text!r}: give a name as text"
        )
    return found


def class_noise(
    meter: GradientMeter,
    scored: Scored,
    subject: Subject,
    task: Task,
    classes: TokenClasses,
    held: int | None,
    micro: MicroBatches,
    count: Callable[[float], None],
) -> dict[str, dict[str, Estimate]]:
    """What each class of tokens contributes to an objective's noise and gradient, with one backward pass per class.

    ``variance_share`` = tr Cov(g^k, g)/tr Σ, ``gradient_share`` = ⟨G^k, G⟩/‖G‖², ``trace_cov`` = tr Σ^k and
    ``grad_norm_sq`` = ‖G^k‖². ``held`` is the number of mean gradients in memory; None: as in `default_held`.
    """
    tasks = {WHOLE: task, **{name: _part(task, mask) for name, mask in classes.masks(subject, task.weight)}}
    passes = portions(list(tasks), WHOLE, held or default_held(meter.modules.trainable.values(), len(tasks)))
    found: dict[str, dict[str, Estimate]] = {}
    kept: dict[str, UnitGradients] = {}
    for names in passes:
        own = {name: tasks[name] for name in names}
        measured = kept | meter.measure(scored.rows, own, micro, lambda more: count(more / len(passes)))
        kept = {WHOLE: measured[WHOLE]}
        prompts = {name: list(subject.prompts) for name in measured}
        compared = Comparison(measured, prompts, meter.modules.layer_of, meter.modules.layers, None)
        whole = compared.units(WHOLE)
        for name in [name for name in names if name != WHOLE]:
            part = compared.units(name)
            noise = data_noise(part)
            variance, gradient = shares(part, whole, compared.of_means(name, WHOLE))
            found[name] = {
                "variance_share": variance,
                "gradient_share": gradient,
                "trace_cov": noise["trace_cov"],
                "grad_norm_sq": noise["grad_norm_sq"],
            }
        del measured, compared  # before the next pass allocates its own
        release_memory()
    return found


def _part(task: Task, mask: torch.Tensor) -> Task:
    """The part of an objective's gradient that comes from some tokens."""
    return replace(
        task,
        weight=task.weight * mask,
        input_weights={key: own * over(mask, own) for key, own in task.input_weights.items()},
        term_weight=None if task.term_weight is None else task.term_weight * mask,
    )


def shares(part: Units, whole: Units, of_means: float) -> tuple[Estimate, Estimate]:
    """tr Cov(g^k, g)/tr Σ and ⟨G^k, G⟩/‖G‖² of a class; ``of_means`` is ⟨ḡ^k, ḡ⟩, exact.

    With 95 % intervals by a jackknife over prompts, which is wide rather than narrow where noise dominates (Efron and
    Stein 1981). Where noise hides the whole gradient, there is no share of it.
    """
    prompts = len(whole)
    if prompts < FEWEST:
        return nothing(TOO_FEW), nothing(TOO_FEW)
    sketches = [units.sketch.astype(float) for units in (part, whole)]
    own, whole_own = (np.einsum("pd,pd->p", _centred(side), _centred(sketches[1])) for side in sketches)
    if whole.trace_cov <= 0 or whole_own.sum() <= 0:
        return nothing("its noise is 0"), nothing("its noise is 0")
    variance = float(own.sum() / whole_own.sum())
    more = prompts / (prompts - 1)  # a sum of squares about the mean without each prompt in turn
    found = _jackknifed(variance, (own.sum() - more * own) / (whole_own.sum() - more * whole_own))
    if is_hidden(whole.side):
        return found, nothing(HIDDEN)
    inner, whole_inner = (_between_others(side, sketches[1]) for side in sketches)
    gradient = (of_means - variance * whole.trace_cov / prompts) / whole.grad_norm_sq
    return found, _jackknifed(gradient, inner / whole_inner)


def _centred(sketch: Float[np.ndarray, "P D"]) -> Float[np.ndarray, "P D"]:
    found: Float[np.ndarray, "P D"] = sketch - sketch.mean(0)
    return found


def _between_others(one: Float[np.ndarray, "P D"], other: Float[np.ndarray, "P D"]) -> Float[np.ndarray, " P"]:
    """The mean of ⟨g_q, g'_r⟩ over q ≠ r, without each prompt in turn."""
    products = one @ other.T
    np.fill_diagonal(products, 0.0)
    pairs = (len(products) - 1) * (len(products) - 2)
    found: Float[np.ndarray, " P"] = (products.sum() - products.sum(0) - products.sum(1)) / pairs
    return found


def _jackknifed(value: float, without: Float[np.ndarray, " P"]) -> Estimate:
    prompts = len(without)
    error = float(np.sqrt((prompts - 1) / prompts * np.square(without - without.mean()).sum()))
    reach = student(prompts - 1) * error
    return estimated(value, value - reach, value + reach)
