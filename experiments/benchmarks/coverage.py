"""Bias of the reported numbers, and how often their 95 % intervals cover the true value, by simulation.

    python experiments/benchmarks/coverage.py

Of a comparison: scores are drawn as μ + seed + problem + noise with effects of known size, for numbers of seeds and for
shares of the mean's variance that are due to seeds and to problems (the rest is noise), and as counts of correct
samples of problems whose difficulty varies, on one benchmark and as the mean over two of different sizes. Of the
variance analyzer: one gradient per prompt and objective is drawn around known means, with the noise of most directions
small and of a few large. The estimators are those that `rlzoo compare` and `rlzoo variance` use.

The bias is that of the mean over the draws that show a number, relative to the true value, or absolute where that is 0,
and null where fewer than half of the draws show one. The coverage is that of the intervals shown, those without an end
included, and null where fewer than a tenth of the draws show one; ``shown`` is the share of draws with a number,
``misleading`` the share of all draws with an interval that misses the true value. ``width`` is the median width,
relative like the bias, and null where the median interval has no end. The estimates of ‖G‖² and of its ratio to tr Σ
vary by several times the true value where noise dominates; from their bias the deviation of ‖ḡ‖² from its known mean,
‖G‖² + tr Σ/P, is taken out (a control variate).

The coverage is 93 to 97 % but for what no interval can do:

- Where the noise hides a gradient, there is no cosine and no norm ratio. At a noise scale of 10 × the prompts a few
  draws show one all the same, those in which chance made the gradient long: their intervals miss more often than not,
  which misleads in up to 2 % of all draws. No interval can be both valid over all draws and right among so few of them.
- Where noise is as large as the gradient, the gradient's direction is only half known, and the noise along an average
  direction stands in for the rest. If the gradient lies along the noisiest direction alone, ‖G‖² has 92 %, and along
  the least noisy one 98 %.
- The trace of noise with very heavy tails over few prompts. No interval for a mean holds its level whatever the tails
  (Bahadur and Savage, Annals of Mathematical Statistics 27, 1956): a sample that lacks the rare large values does not
  tell of them. With a lognormal factor of σ = 0.7 it is 92 % over 40 prompts, 94 % over 256.
- Counts are skewed where nearly all of a few problems are always solved: 93 % for 30 problems and log-odds around 3.
- Two or three seeds and fewer than six problems at once: with so few degrees of freedom on both sides up to 98 %.
- The bootstrap of an interquartile mean over few seeds: 49 % with 2, 75 % with 3, 85 to 92 % with 5, 89 to 94 % with 8.
  Reports show it from 10 seeds on, with 93 % and more.
- The probability of improvement, from 3 seeds on: 92 to 98 % on one benchmark, up to 99 % as the mean over several.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from rlzoo.comparison.robust import interquartile_mean, iqm_interval, probability_of_improvement
from rlzoo.comparison.statistics import crossed_interval, result_interval
from rlzoo.variance.intervals import rank_correlation
from rlzoo.variance.noise import Units, against, data_noise

Numbers = dict[str, Any]
"""bias and coverage (None where too few draws show a value or an interval), shown, misleading, width (None: no end)."""
Table = dict[str, dict[str, Numbers]]
"""By quantity and case."""
SHARES = (
    (0.0, 0.8),
    (0.0, 0.0),
    (0.2, 0.65),
    (0.35, 0.5),
    (0.3, 0.0),
    (0.2, 0.8),
    (0.6, 0.3),
    (0.9, 0.0),
    (0.95, 0.05),
    (1.0, 0.0),
)
"""Of the variance of a mean score: the seeds' and the problems' share."""
SCORE, DIFFERENCE = 0.5, 0.1
"""The true mean score and difference."""
FEW_PROBLEMS = 12
SIZES = (200, 40)
"""Problems of each benchmark in a mean over benchmarks."""
COUNTS = (
    (1, (100,), 1, 2.5),
    (1, (100, 30), 1, 2.5),
    (2, (30,), 4, 0.0),
    (2, (200,), 1, 1.5),
    (3, (30,), 1, 0.0),
    (3, (200,), 4, -3.0),
    (3, (200, 30), 4, 1.5),
    (5, (30,), 4, 2.5),
    (10, (30,), 4, 3.0),
)
"""Seeds, problems of each benchmark, samples per problem and mean log-odds of a correct one; problems vary by 1.5 in
log-odds, seeds by 0.2 (if there are several), and each problem's odds under the second algorithm by 0.5."""
ROBUST = ((1, 0.0, 1.0), (1, 0.1, 3.0), (3, 0.0, 1.0))
"""Benchmarks, the share of runs that collapse, and how much more the second algorithm's runs vary."""
IMPROVEMENT = 0.75
"""The true probability that a run of the first algorithm is better than one of the second."""
FEWEST_VALUES, FEWEST_INTERVALS = 0.5, 0.1
"""Shares of the draws that must show a value, for a bias, and an interval, for a coverage."""
DIRECTIONS = 64
SPECTRUM = np.arange(1, DIRECTIONS + 1) ** -0.4
SPECTRUM /= np.linalg.norm(SPECTRUM)
"""Standard deviation of the noise along each direction: 23 directions' worth, as measured on the embedded base."""


@dataclass(frozen=True)
class Case:
    """Two objectives' gradients: their means have length 1 and this cosine."""

    noise: float = 0.25
    """Noise scale of the first over its prompts: how far the noise of the mean gradient exceeds the gradient."""
    cosine: float = 0.0
    correlation: float = 0.9
    """Of the two objectives' noise on a prompt that both look at."""
    prompts: int = 128
    others: int = 128
    """Prompts of the second objective."""
    common: int = 128
    """Prompts that both look at."""
    tail: float = 0.0
    """σ of the lognormal factor on a prompt's noise: 0.5 gives ‖g‖² a coefficient of variation of 1.3."""
    rows: int = 1
    """Rows per prompt, whose noise has a correlation of 0.3."""
    axis: int | None = None
    """The one noise direction that the first gradient lies along, 0 the noisiest; None: all, in proportion to them."""

    def draw(self, rng: np.random.Generator) -> tuple[Units, Units]:
        """A sample of both objectives' gradients."""
        total = self.prompts + self.others - self.common
        shared = rng.standard_normal((total, self.rows, DIRECTIONS))
        own = rng.standard_normal((total, self.rows, DIRECTIONS))
        noise = np.stack([shared, self.correlation * shared + np.sqrt(1 - self.correlation**2) * own])
        if self.rows > 1:
            of_prompt = rng.standard_normal((2, total, 1, DIRECTIONS))
            of_prompt[1] = self.correlation * of_prompt[0] + np.sqrt(1 - self.correlation**2) * of_prompt[1]
            noise = np.sqrt(0.3) * of_prompt + np.sqrt(0.7) * noise
        factor = np.exp(self.tail * rng.standard_normal((total, 1)) - self.tail**2)
        by_prompt = noise.mean(2) * factor * SPECTRUM * np.sqrt(self.noise * self.prompts)
        one, two = (FIRST, SECOND) if self.axis is None else np.eye(DIRECTIONS)[[self.axis, self.axis - 1]]
        means = np.stack([one, self.cosine * one + np.sqrt(1 - self.cosine**2) * two])
        gradients = means[:, None] + by_prompt
        first, second = np.arange(self.prompts), np.arange(total - self.others, total)
        return units(gradients[0, first], first), units(gradients[1, second], second)

    def truth(self) -> dict[str, float]:
        """The true value of each quantity."""
        trace = self.noise * self.prompts * (0.3 + 0.7 / self.rows if self.rows > 1 else 1.0)
        return {
            "grad_norm_sq": 1.0, "trace_cov": trace, "noise_scale": trace, "snr": 1 / trace,
            "cosine": self.cosine, "norm_ratio": 1.0,
        }  # fmt: skip


def _directions() -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
    """Two orthogonal directions of length 1 that have more where the noise has more."""
    rng = np.random.default_rng(0)
    first, second = (np.where(rng.random(DIRECTIONS) < 0.5, -1, 1) * SPECTRUM for _ in range(2))
    second = second - first * (first @ second)
    return first, second / np.linalg.norm(second)


FIRST, SECOND = _directions()
CASES: Mapping[str, Case] = {
    "same prompts, correlated 0.9, orthogonal": Case(),
    "same prompts, correlated 0.9, cosine 0.7": Case(cosine=0.7),
    "same prompts, heavy tails": Case(cosine=0.7, tail=0.5, prompts=256, others=256, common=256),
    "same prompts, lighter tails, 64 prompts": Case(cosine=0.3, tail=0.3, prompts=64, others=64, common=64),
    "same prompts, correlated 0.5, cosine -0.5": Case(cosine=-0.5, correlation=0.5, prompts=96, others=96, common=96),
    "same prompts, noise scale 1 x the prompts": Case(noise=1, cosine=0.6, correlation=0.7),
    "same prompts, 4 rows each": Case(rows=4, prompts=64, others=64, common=64),
    "half of the prompts the same": Case(cosine=0.7, common=64),
    "other prompts": Case(cosine=0.6, others=64, common=0),
    "other prompts, noise scale 0.9 and 1.7 x the prompts": Case(cosine=0.6, noise=0.87, others=64, common=0),
    "same prompts, correlated 0.9, orthogonal, noise scale 10 x the prompts": Case(noise=10),
    "other prompts, noise scale 10 x the prompts": Case(cosine=0.6, noise=10, common=0),
    "noise scale 1 x the prompts, along the noisiest direction": Case(noise=1, cosine=0.6, correlation=0.7, axis=0),
    "noise scale 1 x the prompts, along the least noisy direction": Case(noise=1, cosine=0.6, correlation=0.7, axis=-1),
}


def units(gradients: Float[np.ndarray, "P D"], prompt: Int[np.ndarray, " P"]) -> Units:
    """Gradients with exact inner products, as no projection gives them."""
    return Units(np.square(gradients).sum(1), gradients, float(np.square(gradients.mean(0)).sum()), prompt)


class Tally:
    """Counts what a quantity's estimates say against its true value."""

    def __init__(self, truth: float) -> None:
        self.truth = truth
        self.draws = 0
        self.values: list[float] = []
        self.covered: list[bool] = []
        self.widths: list[float] = []

    def add(self, value: float | None, low: float | None, high: float | None, control: float = 0.0) -> None:
        """One estimate: an end of None is open, and without an end or a value there is no interval.

        ``control`` has the mean 0, and is what chance adds to the value.
        """
        self.draws += 1
        if value is not None:
            self.values.append(value - control)
        if value is None and low is None and high is None:
            return
        rounding = 1e-9 * max(abs(self.truth), 1e-3)
        above = low is None or low <= self.truth + rounding
        self.covered.append(above and (high is None or self.truth - rounding <= high))
        self.widths.append(np.inf if low is None or high is None else high - low)

    def found(self) -> Numbers:
        """What the draws come to."""
        scale = abs(self.truth) or 1.0
        shown, intervals = len(self.values) / self.draws, len(self.covered) / self.draws
        width = float(np.median(self.widths)) / scale if self.widths else np.inf
        return {
            "bias": (float(np.mean(self.values)) - self.truth) / scale if shown >= FEWEST_VALUES else None,
            "coverage": float(np.mean(self.covered)) if intervals >= FEWEST_INTERVALS else None,
            "shown": shown,
            "misleading": self.covered.count(False) / self.draws,
            "width": width if np.isfinite(width) else None,
        }


def gradients(case: Case, runs: int, seed: int = 0) -> dict[str, Numbers]:
    """What the analyzer says of a case, by quantity."""
    rng = np.random.default_rng(seed)
    truth = case.truth()
    tallies = {name: Tally(value) for name, value in truth.items()}
    for _ in range(runs):
        first, second = case.draw(rng)
        excess = first.mean_squared_norm - truth["grad_norm_sq"] - truth["trace_cov"] / len(first)
        controls = {"grad_norm_sq": excess, "snr": excess / truth["trace_cov"]}
        of_means = float(first.sketch.mean(0) @ second.sketch.mean(0))
        for name, estimate in {**data_noise(first), **against(first, second, of_means)}.items():
            tallies[name].add(estimate["value"], estimate["ci_low"], estimate["ci_high"], controls.get(name, 0.0))
    return {name: tally.found() for name, tally in tallies.items()}


def ranks(correlation: float, count: int, runs: int, seed: int = 0) -> Numbers:
    """What the analyzer says of Spearman's rank correlation of lognormal pairs."""
    rng = np.random.default_rng(seed)
    tally = Tally(float(6 / np.pi * np.arcsin(correlation / 2)))
    for _ in range(runs):
        pair = rng.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], count)
        estimate = rank_correlation(*np.exp(pair.T))
        tally.add(estimate["value"], estimate["ci_low"], estimate["ci_high"])
    return tally.found()


def scores(
    seeds: int, problems: Sequence[int], shares: tuple[float, float], runs: int, seed: int = 0
) -> dict[str, Numbers]:
    """What a comparison says where seeds and problems make these shares of the mean's variance.

    With several benchmarks, of so many problems each, half of the variance of a seed's effect is common to all.
    """
    rng = np.random.default_rng(seed)
    by_seed, by_problem = shares
    count, of = len(problems), np.repeat(np.arange(len(problems)), problems)
    size = count**2 / sum(1 / number for number in problems)  # problems of one benchmark that are worth as much
    parts = by_seed * seeds, by_problem * size, max(1 - by_seed - by_problem, 0.0) * seeds * size
    scale = 0.05 * np.sqrt(parts)

    def drawn() -> Float[np.ndarray, "S P"]:
        common, own = rng.normal(size=(seeds, 1)), rng.normal(size=(seeds, count))
        effect = (common + own) / np.sqrt(1 + 1 / count)
        noise = rng.normal(size=(seeds, len(of)))
        total: Float[np.ndarray, "S P"] = (
            scale[0] * effect[:, of] + scale[1] * rng.normal(size=len(of)) + scale[2] * noise
        )
        return total

    mean, difference = Tally(SCORE), Tally(DIFFERENCE)
    for _ in range(runs):
        mean.add(*result_interval(SCORE + drawn(), benchmarks=of))
        # what both algorithms have in common cancels
        difference.add(*crossed_interval(DIFFERENCE + drawn(), benchmarks=of))
    return {"mean score": mean.found(), "paired difference": difference.found()}


def counts(
    seeds: int, problems: Sequence[int], samples: int, centre: float, runs: int, seed: int = 0
) -> dict[str, Numbers]:
    """What a comparison says of counts of correct samples: see `COUNTS`."""
    rng = np.random.default_rng(seed)
    of = np.repeat(np.arange(len(problems)), problems)

    def chances(seeds: int, problems: int) -> list[Float[np.ndarray, "S P"]]:
        """Of a correct sample, by two algorithms, the second a little better."""
        first = centre + 1.5 * rng.normal(size=problems)
        second = first + 0.3 + 0.5 * rng.normal(size=problems)
        return [1 / (1 + np.exp(-odds - by_seed * rng.normal(size=(seeds, 1)))) for odds in (first, second)]

    by_seed = 0.2 if seeds > 1 else 0.0
    points, weights = np.polynomial.hermite_e.hermegauss(99)  # the true means by quadrature over normal log-odds
    odds = (centre + np.hypot(1.5, by_seed) * points, centre + 0.3 + np.sqrt(1.5**2 + 0.5**2 + by_seed**2) * points)
    truth = [float(weights @ (1 / (1 + np.exp(-each)))) / np.sqrt(2 * np.pi) for each in odds]
    mean, difference = Tally(truth[0]), Tally(truth[1] - truth[0])
    for _ in range(runs):
        first, second = (rng.binomial(samples, chance) / samples for chance in chances(seeds, len(of)))
        mean.add(*result_interval(first, benchmarks=of))
        difference.add(*crossed_interval(second - first, benchmarks=of))
    return {"mean score": mean.found(), "paired difference": difference.found()}


def robust(
    seeds: int, benchmarks: int, collapsed: float, spread: float, runs: int, seed: int = 0
) -> dict[str, Numbers]:
    """What a comparison says of the interquartile mean, and of the probability that one run is better than another.

    A run collapses with a given probability, on all benchmarks. The second algorithm's runs vary ``spread`` times as
    much as the first's, which are better in three pairs of four.
    """
    rng = np.random.default_rng(seed)

    def drawn(count: int) -> Float[np.ndarray, "S B"]:
        common, own = rng.normal(size=(count, 1)), rng.normal(size=(count, benchmarks))
        return SCORE + 0.02 * (common + own) - 0.3 * (rng.random((count, 1)) < collapsed)

    middle = Tally(float(interquartile_mean(np.ravel(drawn(200_000)))))
    better = Tally(IMPROVEMENT)
    ahead = float(special.ndtri(IMPROVEMENT)) * np.hypot(1, spread)
    for _ in range(runs):
        middle.add(*iqm_interval(drawn(seeds), fewest=2))
        common = rng.normal(size=(2, seeds, 1))
        own = (common + rng.normal(size=(2, seeds, benchmarks))) / np.sqrt(2)
        mean, low, high = probability_of_improvement(ahead + own[0], spread * own[1])
        better.add(mean, None if np.isnan(low) else low, None if np.isnan(high) else high)
    return {"interquartile mean": middle.found(), "probability of improvement": better.found()}


def table(runs: int, score_runs: int, problems: int, seeds: list[int], seed: int = 0) -> Table:
    """Every quantity of a comparison and of the analyzer, by case."""
    found: Table = {}
    for case, by_quantity in _cases(runs, score_runs, problems, seeds, seed):
        for quantity, numbers in by_quantity.items():
            found.setdefault(quantity, {})[case] = numbers
    return found


def _cases(
    runs: int, score_runs: int, problems: int, seeds: list[int], seed: int
) -> Iterator[tuple[str, dict[str, Numbers]]]:
    few = ((0.0, 0.8), (0.0, 0.0), (0.3, 0.4))
    for shares, sizes, on in (
        (SHARES, (problems,), ""),
        (few, (FEW_PROBLEMS,), f", {FEW_PROBLEMS} problems"),
        (few, SIZES, f", mean over benchmarks of {_listed(SIZES)} problems"),
    ):
        for a, b in shares:
            for count in seeds:
                if count > 1 or a == 0:
                    name = f"{count} seeds{on}, {a:.0%} seeds' share, {b:.0%} problems'"
                    yield name, scores(count, sizes, (a, b), score_runs, seed)
    for count, sizes, samples, centre in COUNTS:
        name = f"{count} seeds, {_listed(sizes)} problems, {samples} samples right or wrong, mean log-odds {centre:+g}"
        yield name, counts(count, sizes, samples, centre, score_runs, seed)
    for count in seeds:
        for benchmarks, collapsed, spread in ROBUST if count > 1 else ():
            name = (
                f"{count} seeds on {benchmarks} benchmarks, {collapsed:.0%} of runs collapse, spread {spread:g} times"
            )
            yield name, robust(count, benchmarks, collapsed, spread, score_runs, seed)
    for name, case in CASES.items():
        yield name, gradients(case, runs, seed)
    for correlation in (0.3, 0.9):
        for count in (32, 256):
            yield (
                f"{count} prompts, normal correlation {correlation}",
                {"rank correlation": ranks(correlation, count, runs, seed)},
            )


def _listed(sizes: Sequence[int]) -> str:
    return " and ".join(map(str, sizes))


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="simulated analyses per case")
    parser.add_argument("--score-runs", type=int, default=3000, help="simulated comparisons per case")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seeds", default="1,2,3,5,10", help="comma-separated")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation's random numbers")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    arguments = parser.parse_args()
    seeds = [int(number) for number in arguments.seeds.split(",")]
    found = table(arguments.runs, arguments.score_runs, arguments.problems, seeds, arguments.seed)
    if arguments.json:
        print(json.dumps(found))
        return
    print("| quantity | case | bias | coverage | shown | misleading | width |\n|---|---|---|---|---|---|---|")
    for quantity, cases in found.items():
        for case, row in cases.items():
            bias = "–" if row["bias"] is None else f"{row['bias']:+.1%}"
            coverage = "–" if row["coverage"] is None else f"{row['coverage']:.1%}"
            width = "∞" if row["width"] is None else f"{row['width']:.3g}"
            shares = f"{row['shown']:.0%} | {row['misleading']:.1%}"
            print(f"| {quantity} | {case} | {bias} | {coverage} | {shares} | {width} |")


if __name__ == "__main__":
    main()
