"""How often a comparison's 95 % intervals hold the truth, by simulation.

    python experiments/benchmarks/coverage.py

Scores are drawn as μ + seed + problem + noise with effects of known size; the table gives the share of ``--runs``
comparisons whose interval holds μ, for numbers of seeds and for shares of the mean's variance that are due to seeds and
to problems (the rest is noise).
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from rlzoo.comparison.statistics import crossed_interval

SHARES = (
    (0.0, 0.8),
    (0.0, 0.0),
    (0.2, 0.65),
    (0.35, 0.5),
    (0.3, 0.0),
    (0.6, 0.3),
    (0.8, 0.1),
    (0.95, 0.05),
    (1.0, 0.0),
)


def coverage(seeds: int, problems: int, shares: tuple[float, float], runs: int) -> float:
    """The share of intervals that hold the truth, where seeds and problems make these shares of the mean's variance."""
    rng = np.random.default_rng(0)
    by_seed, by_problem = shares
    noise = max(1 - by_seed - by_problem, 0.0)
    scale = np.sqrt([by_seed * seeds, by_problem * problems, noise * seeds * problems])
    held = 0
    for _ in range(runs):
        parts = (rng.normal(size=(seeds, 1)), rng.normal(size=problems), rng.normal(size=(seeds, problems)))
        interval = crossed_interval(sum(size * part for size, part in zip(scale, parts, strict=True)))
        held += interval.low <= 0 <= interval.high
    return held / runs


def main() -> None:
    """Print one row a share, one column a number of seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4000)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seeds", default="1,2,3,5,10", help="comma-separated")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    arguments = parser.parse_args()
    seeds = [int(number) for number in arguments.seeds.split(",")]
    rows = [
        {"seed_share": a, "problem_share": b}
        | {str(s): coverage(s, arguments.problems, (a, b), arguments.runs) for s in seeds if s > 1 or a == 0}
        for a, b in SHARES
    ]
    if arguments.json:
        print(json.dumps(rows))
        return
    print("| seeds' share | problems' share | " + " | ".join(f"{s} seeds" for s in seeds) + " |")
    print("|---|---|" + "---|" * len(seeds))
    for row in rows:
        cells = [f"{100 * row[str(s)]:.1f}" if str(s) in row else "–" for s in seeds]
        print(f"| {row['seed_share']:.0%} | {row['problem_share']:.0%} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
