"""Two cases so small that every expectation is a finite sum: a softmax bandit and a sequence of two tokens.

    python -m rlzoo.experiments.tabular

The estimators are those of arXiv 2508.05629: sample from the policy, and weight the expert's outcome by c/p. Nothing
here knows the closed forms that `rlzoo.variance.moments` uses: gradients come from autograd, moments from enumeration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

Weight = Callable[[float], float]
"""The coefficient c of an expert's token from its probability."""
OBJECTIVES: dict[str, Weight] = {"SFT": lambda p: 1.0, "DFT": lambda p: p}


@dataclass(frozen=True)
class Moments:
    """The moments of a random vector with finitely many values."""

    mean: Tensor
    second_moment: float
    """E‖X‖²."""

    @property
    def trace_cov(self) -> float:
        return self.second_moment - float(self.mean.square().sum())

    @property
    def relative_noise(self) -> float:
        """tr Cov / ‖mean‖²."""
        return self.trace_cov / float(self.mean.square().sum())


def moments(outcomes: Sequence[tuple[float, Tensor]]) -> Moments:
    """Moments by enumeration of (probability, value)."""
    mean = torch.stack([chance * value for chance, value in outcomes]).sum(0)
    return Moments(mean, sum(chance * float(value.square().sum()) for chance, value in outcomes))


def score(logits: Tensor, token: int) -> Tensor:
    """∇_logits log π(token), by autograd."""
    leaf = logits.detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(leaf.log_softmax(0)[token], leaf)
    return gradient


def bandit(logits: Tensor, expert: int, weight: Weight) -> Moments:
    """One token: y ~ π, X = 1[y = y*] (c/p) ∇ log π(y*)."""
    policy = logits.softmax(0).tolist()
    p = policy[expert]
    return moments(
        [(q, (y == expert) * weight(p) / p * score(logits, y)) for y, q in enumerate(policy)],
    )


def sequence_as_one_action(first: Tensor, second: Tensor, expert: tuple[int, int], weight: Weight) -> Moments:
    """Two tokens sampled from the policy: X = 1[y = y*] (c/P) ∇ log P(y*), P the product, over all pairs.

    ``first`` [V] are the logits of the first token, ``second`` [V, V] those of the second after each first one.
    """
    outcomes = []
    chance = float(first.softmax(0)[expert[0]] * second[expert[0]].softmax(0)[expert[1]])
    for y, z in product(range(len(first)), repeat=2):
        q = float(first.softmax(0)[y] * second[y].softmax(0)[z])
        gradient = torch.zeros(first.numel() + second.numel(), dtype=first.dtype)
        if (y, z) == expert:
            rows = torch.zeros_like(second)
            rows[y] = score(second[y], z)
            gradient = weight(chance) / chance * torch.cat([score(first, y), rows.flatten()])
        outcomes.append((q, gradient))
    return moments(outcomes)


def sequence_by_token(first: Tensor, second: Tensor, expert: tuple[int, int], weight: Weight) -> Moments:
    """Two tokens, each drawn at the expert's prefix: X = Σ_t 1[y_t = y*_t] (c_t/p_t) ∇ log p_t, over all pairs."""
    outcomes = []
    prefix = second[expert[0]]
    for y, z in product(range(len(first)), repeat=2):
        parts = []
        for logits, drawn, token in ((first, y, expert[0]), (prefix, z, expert[1])):
            p = float(logits.softmax(0)[token])
            parts.append((drawn == token) * weight(p) / p * score(logits, token))
        outcomes.append((float(first.softmax(0)[y] * prefix.softmax(0)[z]), torch.cat(parts)))
    return moments(outcomes)


def over_data(logits: Tensor, experts: Sequence[tuple[float, int]], weight: Weight) -> Moments:
    """What training sees: the expert's token is drawn from the data, and given it the gradient c ∇ log π is fixed."""
    policy = logits.softmax(0).tolist()
    return moments([(share, weight(policy[y]) * score(logits, y)) for share, y in experts])


def main() -> None:
    """Print both cases."""
    logits = torch.tensor([3.0, 1.0, 0.0, -2.0], dtype=torch.float64)
    print("A softmax bandit with logits 3, 1, 0, -2; every action once as the expert's")
    print("|      p |      S | tr Cov SFT | S(1-p)/p | tr Cov DFT | p(1-p)S | noise/mean² SFT |  DFT |")
    print("|---|---|---|---|---|---|---|---|")
    for expert in range(4):
        p = float(logits.softmax(0)[expert])
        norm = float(score(logits, expert).square().sum())
        sft, dft = (bandit(logits, expert, weight) for weight in OBJECTIVES.values())
        print(
            f"| {p:.4f} | {norm:.4f} | {sft.trace_cov:.4f} | {norm * (1 - p) / p:.4f} | {dft.trace_cov:.6f} | "
            f"{p * (1 - p) * norm:.6f} | {sft.relative_noise:.4f} | {dft.relative_noise:.4f} |"
        )
    first, second = logits, torch.stack([logits.roll(i) for i in range(4)])
    print("\nTwo tokens over the same four, the expert's being the second and then the third")
    print("| | tr Cov SFT | tr Cov DFT |")
    print("|---|---|---|")
    for title, case in (("sequence as one action", sequence_as_one_action), ("token by token", sequence_by_token)):
        values = [case(first, second, (1, 2), weight).trace_cov for weight in OBJECTIVES.values()]
        print(f"| {title} | {values[0]:.4f} | {values[1]:.6f} |")
    experts = [(0.5, 0), (0.3, 1), (0.2, 3)]
    print("\nWhat training sees: the bandit's expert is action 0, 1 or 3 with chances 0.5, 0.3, 0.2")
    print("| | ‖mean‖² | tr Cov | tr Cov / ‖mean‖² |")
    print("|---|---|---|---|")
    for name, weight in OBJECTIVES.items():
        data = over_data(logits, experts, weight)
        print(f"| {name} | {float(data.mean.square().sum()):.4f} | {data.trace_cov:.4f} | {data.relative_noise:.4f} |")


if __name__ == "__main__":
    main()
