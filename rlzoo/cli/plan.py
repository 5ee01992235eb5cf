"""``rlzoo plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from rlzoo.cli import completion, options


def plan(
    experiment: options.ExperimentName = "arithmetic",
    *,
    algorithms: Annotated[
        str | None,
        options.training(metavar="LIST", help=options.LIST, autocompletion=completion.several_objectives),
    ] = None,
    seeds: Annotated[str | None, options.training(metavar="LIST", help="Comma-separated seeds, as in 0,1,2.")] = None,
    learning_rates: Annotated[
        str | None, options.training(metavar="LIST", help="Comma-separated learning rates; each adds a cell per seed.")
    ] = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    model: options.Model = None,
    data: options.Data = None,
    test_data: options.TestData = None,
    column: options.Column = None,
    limit: options.Limit = None,
    rollout_samples: options.RolloutSamples = None,
    samples: options.Samples = None,
    sets: options.Set = None,
    twin: options.Twin = False,
    gpu: Annotated[
        str | None,
        options.running(metavar="NAME", help="Estimate the time on this GPU, as in h100, from its data sheet."),
    ] = None,
    pilot: Annotated[
        Path | None,
        options.running(
            metavar="RUN",
            help="Folder of a finished comparison, for variances and lengths (default: the included study, if any).",
        ),
    ] = None,
    workers: options.Workers = None,
    threads: options.WorkerThreads = 1,
    as_json: Annotated[bool, options.running("--json", help="Print the plan as JSON.")] = False,
    trust_remote_code: options.Trust = False,
) -> int:
    """Estimate a comparison's tokens, FLOPs, memory and time before it runs, and the difference that it can detect.

    The speed of this machine is measured for a few seconds with the model itself; that of a GPU is estimated from its
    data sheet.

    Examples:
      rlzoo plan arithmetic
      rlzoo plan arithmetic --seeds 0,1,2,3 --pilot runs/arithmetic-20260101-120000
      rlzoo plan smollm2-gsm8k --gpu h100 --json
    """
    from rlzoo.cli.settings import check_validation, experiment_of, prepare

    chosen = experiment_of(
        experiment, sets,
        algorithms=algorithms, seeds=seeds, learning_rates=learning_rates, steps=steps, batch_size=batch_size,
        model=model, data=data, test_data=test_data, columns=column, limit=limit, rollout_samples=rollout_samples,
        samples=samples, twin=twin,
    )  # fmt: skip
    check_validation(chosen, data)
    from rich.console import Console

    from rlzoo.cli.tables import show
    from rlzoo.jobs.pool import silence
    from rlzoo.jobs.progress import loading, reporting

    with loading():
        from rlzoo.comparison.dry_run import unchecked
        from rlzoo.comparison.planning import planned, tables_of

    prepare(threads, trust_remote_code)
    missing = unchecked(chosen)
    silence()
    with reporting(Console(stderr=True), "measuring the speed of this machine" if gpu is None else "reading the data"):
        found = planned(chosen, gpu, pilot, workers)
    if as_json:
        print(json.dumps(found, indent=1))
        return 0
    console = Console(highlight=False, markup=False)
    tables, lines = tables_of(found)
    show(console, tables)
    for line in [*lines, *([f"not on this machine, and so not checked: {', '.join(missing)}"] if missing else [])]:
        console.print(line, soft_wrap=True)
    return 0
