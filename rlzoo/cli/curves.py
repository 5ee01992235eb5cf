"""The map of losses for demonstrations: the weight of a token as a function of its probability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import torch
from jaxtyping import Float
from torch import Tensor

from rlzoo.document.drawing import GREY, PALETTE, STYLE, Drawing, axes_row, log_scale, standalone
from rlzoo.document.estimates import number
from rlzoo.errors import UserError
from rlzoo.inputs import Context, Input, Stage
from rlzoo.jobs.outputs import write_atomically
from rlzoo.objective import Objective, get_objective, is_composite, list_objectives, objective_class, surrogate
from rlzoo.testing.logits import is_random
from rlzoo.types import TokenBatch, Trajectory, selector_of

COMMAND = "rlzoo list --curves --out docs/figures"
ALTERNATIVES = (1, 1000)
"""The rest of the policy's probability is spread evenly over so many other tokens."""
AT = (0.001, 0.01, 0.05, 0.2, 0.6, 0.9, 0.99)
"""The probabilities in the table; these and those of the figure avoid the thresholds of objectives."""
GRID = (*(10 ** ((step + 0.5) / 20 - 3) for step in range(60)), 0.97, 0.99)
"""The probabilities in the figure."""
NAME = "loss-curves"
NOTE = """\
At the start of training, where the policy is its own reference. The rest of its probability is spread evenly over the
other tokens; "any": their number does not matter. A loss that divides by the tokens that it keeps has one token."""


@dataclass(frozen=True)
class Curve:
    """The weights that objectives give a token, at each probability, by the number of alternatives."""

    names: tuple[str, ...]
    """Objectives that have the same weights."""
    weights: Mapping[int, tuple[float, ...]]

    @property
    def needs_entropy(self) -> bool:
        """Whether the weight depends on more than the token's probability."""
        first, *others = self.weights.values()
        return any(not _is_close(first, other) for other in others)

    @property
    def label(self) -> str:
        return ", ".join(self.names)


def show_curves(out: Path | None) -> None:
    """Print the table and, with a folder, write the figure and its numbers there."""
    found, skipped = curves(AT)
    print(f"the weight c of a token of probability p, relative to SFT\n\n{text_of(found)}\n\n{NOTE}")
    for name, reason in skipped.items():
        print(f"{name} is not shown: {reason}")
    if out is None:
        return
    shown, _ = curves(GRID)
    for name, text in files_of(shown).items():
        write_atomically(out / name, text.encode())
        print(f"wrote {out / name}")


def files_of(found: Sequence[Curve]) -> dict[str, str]:
    """The figure of curves over `GRID` and its numbers, by file name."""
    return {f"{NAME}.csv": csv_of(found, GRID), f"{NAME}.svg": standalone(figure_of(found, GRID).svg)}


def curves(probabilities: Sequence[float]) -> tuple[list[Curve], dict[str, str]]:
    """The curve of every objective that imitates single rows, and the objectives without one, with the reason.

    Objectives with the same weights share a curve. The weight is that of `weight_of`.
    """
    found: list[Curve] = []
    skipped: dict[str, str] = {}
    for name in list_objectives():
        kind = objective_class(name)
        if is_composite(kind) or not selector_of(kind.learns_from).is_imitated:
            continue
        for options in ({}, *kind.shown_too):
            label = " ".join([name, *(f"{key}={value:g}" for key, value in options.items())])
            try:
                objective = get_objective(name, **options)
                if is_random(objective):
                    raise UserError("it draws tokens")
                values = {
                    others: tuple(weight_of(objective, probabilities, others).tolist()) for others in ALTERNATIVES
                }
            except (UserError, NotImplementedError) as error:
                skipped[label] = str(error)
                continue
            same = next((i for i, one in enumerate(found) if _are_close(one.weights, values)), None)
            if same is None:
                found.append(Curve((label,), values))
            else:
                found[same] = Curve((*found[same].names, label), found[same].weights)
    return found, skipped


def weight_of(objective: Objective, probabilities: Sequence[float], others: int) -> Float[Tensor, " P"]:
    """The weight of a demonstration's token at each of its probabilities p, relative to SFT: -∂L/∂z_y / (1 - p).

    z_y is the token's logit in the loss L of that token alone; where L is -sg(c) log p, the weight is c. The rest of
    the policy's probability is spread evenly over ``others`` tokens. Training has just started: the policy is its own
    reference and snapshot, and the demonstrator. Raises UserError for an input that is not known then, and for an
    objective whose weights are not the same, up to a factor, for a token alone and among others.
    """
    p = torch.tensor(probabilities, dtype=torch.float64)
    logits = torch.full((len(p), 1 + max(ALTERNATIVES)), -1e4, dtype=torch.float64)
    logits[:, 0] = p.log()
    logits[:, 1 : 1 + others] = torch.log((1 - p) / others)[:, None]
    logits.requires_grad_()
    target = torch.zeros(len(p), dtype=torch.long)
    logp = logits.log_softmax(1)[:, :1]
    batch = _batch(objective, logits.detach(), logp, target)
    term = objective.logit_term(logits, logits.detach(), target) if objective.has_logit_term else None
    terms = [None] * len(p) if term is None else list(term.view(-1, 1, 1))
    loss = surrogate(objective, batch, 1.0, term=None if term is None else term[:, None])
    if objective.is_coupled:
        rows = [batch.rows(torch.tensor([place]), 1) for place in range(len(p))]
        alone = [surrogate(objective, row, 1.0, term=own) for row, own in zip(rows, terms, strict=True)]
        (together,) = torch.autograd.grad(loss, logp, retain_graph=True)
        loss = torch.stack(alone).sum()
        (single,) = torch.autograd.grad(loss, logp, retain_graph=True)
        if not torch.allclose(together * single.norm(), single * together.norm()):
            raise UserError("its weight depends on the other tokens of the batch")
    (slope,) = torch.autograd.grad(loss, logits)
    return -slope[:, 0] / (1 - p) + 0.0  # not -0


def _batch(objective: Objective, logits: Tensor, logp: Tensor, target: Tensor) -> TokenBatch:
    """A batch of one token per row, with all inputs as they are when training starts."""
    rows = [
        Trajectory("", "", [0], [0], str(place), reward=1.0, behaviour_logp=[value])
        for place, value in enumerate(logp.detach()[:, 0].tolist())
    ]
    mask = torch.ones(logp.shape, dtype=torch.bool)
    context = cast(Context, _Start(rows, mask, logp.detach()))
    inputs = {}
    for one in objective.requires:
        if one.is_statistic:
            inputs[one.key] = one.of_logits(logits, target)[:, None]
        elif not one.gives_logits:
            inputs[one.key] = _value(one, context)
    groups = torch.arange(len(rows))
    return TokenBatch(logp, mask, reward=torch.ones(len(rows), dtype=torch.float64), group=groups, inputs=inputs)


def _value(one: Input, context: Context) -> Tensor:
    if one.stage is Stage.FORWARD:
        raise UserError(f"it needs the input {one.key!r}, which a module computes")
    held = [one.stored(row) for row in context.rows] if one.stage is Stage.STORED else [None]
    if any(value is None for value in held):
        return one.compute(context)
    return torch.tensor(held)


@dataclass(frozen=True)
class _Start:
    """A `Context` in which every model is the policy, with these log-probs."""

    rows: Sequence[Trajectory]
    mask: Tensor
    logp: Tensor
    policy: Any = None
    own: Any = None

    @property
    def units(self) -> Sequence[tuple[int, ...]]:
        return [(place,) for place in range(len(self.rows))]

    def model(self, name: str | None) -> Any:
        return self.policy

    def log_probs(self, model: Any, rows: Sequence[Trajectory] | None = None) -> Tensor:
        return self.logp

    def now(self, key: str = "logp") -> Tensor:
        if key != "logp":
            raise UserError(f"it needs the input {key!r}, which a module computes")
        return self.logp

    def encode(self, prompt: Any, columns: Any = None) -> list[int]:
        raise UserError("it needs another prompt")


def _are_close(left: Mapping[int, Sequence[float]], right: Mapping[int, Sequence[float]]) -> bool:
    return all(_is_close(left[others], right[others]) for others in left)


def _is_close(left: Sequence[float], right: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-9) for a, b in zip(left, right, strict=True))


def rows_of(found: Sequence[Curve]) -> list[tuple[str, str, tuple[float, ...]]]:
    """What a table shows: the objectives, the other tokens, and the weights. Those of p alone come first."""
    rows = [(one.label, "any", one.weights[ALTERNATIVES[0]]) for one in found if not one.needs_entropy]
    both = [(one.label, f"{n:,}", one.weights[n]) for one in found if one.needs_entropy for n in ALTERNATIVES]
    return [*sorted(rows, key=lambda row: _order(row[2])), *both]


def _order(weights: Sequence[float]) -> list[float]:
    return [-round(weight, 3) for weight in weights]


def text_of(found: Sequence[Curve]) -> str:
    """The weights at `AT` for a terminal, the objectives last, as several may share a line."""
    lines = [["other tokens", *(f"p={p:g}" for p in AT), "objective"]]
    lines += [[others, *map(entry, weights), label] for label, others, weights in rows_of(found)]
    return "\n".join(f"{first:>12} {' '.join(f'{x:>7}' for x in rest)}  {last}" for first, *rest, last in lines)


def markdown_of(found: Sequence[Curve]) -> str:
    """The same table in Markdown."""
    head = ["objective", "other tokens", *(f"p = {p:g}" for p in AT)]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    lines += [[label, others, *map(entry, weights)] for label, others, weights in rows_of(found)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def entry(weight: float) -> str:
    """A weight to two digits."""
    return "<1e-4" if 0 < weight < 1e-4 else number(weight, 2)


def csv_of(found: Sequence[Curve], probabilities: Sequence[float]) -> str:
    """One line per objective, number of other tokens and probability: the numbers of the figure."""
    lines = ["objective,other_tokens,p,weight"]
    for one in found:
        for name in one.names:
            for others, weights in one.weights.items():
                lines += [f"{name},{others},{p:.5g},{w:.5g}" for p, w in zip(probabilities, weights, strict=True)]
    return "\n".join(lines) + "\n"


def figure_of(found: Sequence[Curve], probabilities: Sequence[float]) -> Drawing:
    """The weights against p, and where they lead: the probability p + c (1 - p) that the loss pulls a token towards."""
    first = ALTERNATIVES[0]
    plain = sorted((one for one in found if not one.needs_entropy), key=lambda one: _order(one.weights[first]))
    with mpl.rc_context(STYLE):
        figure, (left, middle, right) = axes_row(3, 5.2, sharey=True)
        for i, one in enumerate(plain):
            look = {"color": PALETTE[i % len(PALETTE)], "linestyle": ("-", "--", ":")[i // len(PALETTE) % 3]}
            weights = one.weights[first]
            left.plot(probabilities, weights, label=_wrapped(one.label), **look)
            right.plot(probabilities, [p + c * (1 - p) for p, c in zip(probabilities, weights, strict=True)], **look)
        for i, one in enumerate(one for one in found if one.needs_entropy):
            for others, style in zip(ALTERNATIVES, ("-", "--"), strict=True):
                label = f"{one.label}, {others:,} other token{'s' if others > 1 else ''}"
                middle.plot(probabilities, one.weights[others], color=PALETTE[-1 - i], linestyle=style, label=label)
        right.plot(probabilities, probabilities, color=GREY, linewidth=1)
        left.set(title="weight c, of p alone")
        middle.set(title="weight c, of the distribution")
        right.set(title="target q = p + c(1 − p)")
        for axes in (left, middle, right):
            log_scale(axes, "x")
            axes.set_xlabel("probability p of the token")
            axes.grid(True)
        shown = [axes.get_legend_handles_labels() for axes in (left, middle)]
        figure.legend(*(a + b for a, b in zip(*shown, strict=True)), loc="outside lower center", ncols=3, fontsize=8)
        return Drawing(figure)


def _wrapped(label: str, width: int = 42) -> str:
    lines = [""]
    for word in label.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if len(longer) <= width else [*lines, word]
    return "\n".join(lines)
