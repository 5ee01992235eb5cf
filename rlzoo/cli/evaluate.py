"""``rlzoo evaluate``."""

from __future__ import annotations

import json
import sys
from typing import Annotated

from rlzoo.cli import options


def evaluate(
    experiment: options.ExperimentName = "arithmetic",
    *,
    model: options.Model = None,
    reward: options.Reward = None,
    test_data: options.TestData = None,
    column: options.Column = None,
    limit: options.Limit = None,
    samples: options.Samples = None,
    k: options.K = None,
    sets: options.Set = None,
    as_json: Annotated[bool, options.running("--json", help="Print the results as JSON.")] = False,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    trust_remote_code: options.Trust = False,
) -> int:
    """Evaluate a policy on an experiment's benchmarks and retention sets: avg@k, greedy and pass@k.

    The policy is the experiment's base model, after its warm-up if it has one, or the --model that is given, as it is.

    Examples:
      rlzoo evaluate arithmetic --model runs/rft --samples 16 --k 1,4,16
      rlzoo evaluate smollm2-gsm8k --test-data test.jsonl --limit 200 --json
    """
    from rlzoo.cli.settings import experiment_of_model, prepare

    chosen = experiment_of_model(
        experiment, sets, model, reward=reward, test_data=test_data, columns=column, limit=limit, samples=samples, k=k
    )
    from rich.console import Console

    from rlzoo.jobs.pool import silence
    from rlzoo.jobs.progress import counting, loading, reporting
    from rlzoo.jobs.ranks import is_main

    with loading():
        from rlzoo.buffers.bad_rows import BadRows
        from rlzoo.buffers.problems import load_problems
        from rlzoo.comparison.resolve import metrics_of, reward_of
        from rlzoo.comparison.warm_up import base_policy
        from rlzoo.evaluation import evaluate
        from rlzoo.rollout import sampler_class, unscored

    prepare(threads, trust_remote_code)
    sampler_class(chosen.evaluation).check_installed()
    scored_sets = chosen.scored_sets
    scored_by = {name: reward_of(chosen, benchmark=name) for name in scored_sets}
    table = metrics_of(chosen)
    bad = {name: BadRows(source.bad_rows) for name, source in scored_sets.items()}
    problems = {name: load_problems(source, bad[name]) for name, source in scored_sets.items()}
    silence()
    console = Console(stderr=True, quiet=not is_main())
    sequences = sum(map(len, problems.values())) * (chosen.evaluation.samples + 1)  # one of them greedy
    with reporting(console, "loading the model") as report, base_policy(chosen, report) as policy:
        report(0.0, "sampling")
        sampled = counting(sequences, "sampling", report)
        found = {
            name: evaluate(
                policy,
                some,
                scored_by[name],
                chosen.evaluation_on(scored_sets[name]),
                seed,
                progress=sampled,
                bad=bad[name],
                token_budget=chosen.training.token_budget,
            )
            for name, some in problems.items()
        }
    results = {name: one.metrics for name, one in found.items()}
    for name, one in found.items():
        for line in bad[name].lines():
            print(f"{name}: {line}", file=sys.stderr)
        if without := unscored((row["reward"], row["prompt"]) for row in one.outcomes):
            print(f"{name}: {without}; they count as wrong", file=sys.stderr)
    if as_json:
        print(json.dumps(results, indent=1))
        return 0
    for name, m in results.items():
        kind = "retention, " if name in chosen.retention else ""
        print(
            f"{kind}{name}: avg@{m['samples']} {m['avg_at_k']:.1%}  greedy {m['greedy']:.1%}  "
            f"pass@{m['k']} {m['pass_at_k']:.1%}"
            + "".join(f"  {n.removeprefix('reward/')} {v:.4g}" for n, v in m.items() if n.startswith("reward/"))
        )
        others = [
            metric for key, metric in table.items() if key in m and key not in ("avg_at_k", "greedy", "pass_at_k")
        ]
        print("  " + "  ".join(f"{one.label} {one.shown(m[one.name])}" for one in others))
    return 0
