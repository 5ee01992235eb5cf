"""``rlzoo compare``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from rlzoo.cli import completion, options
from rlzoo.errors import UserError

if TYPE_CHECKING:
    from rlzoo.config import Experiment


def compare(
    experiment: options.ExperimentName = "arithmetic",
    *,
    algorithms: Annotated[
        str | None,
        options.training(metavar="LIST", help=options.LIST, autocompletion=completion.several_objectives),
    ] = None,
    seeds: Annotated[str | None, options.training(metavar="LIST", help="Comma-separated seeds, as in 0,1,2.")] = None,
    learning_rates: Annotated[
        str | None,
        options.training(
            metavar="LIST",
            help="Comma-separated learning rates; each algorithm is reported at the one that is best on validation.",
        ),
    ] = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    model: options.Model = None,
    reward: options.Reward = None,
    data: options.Data = None,
    test_data: options.TestData = None,
    column: options.Column = None,
    bad_rows: options.BadRows = None,
    limit: options.Limit = None,
    train_limit: options.TrainLimit = None,
    test_limit: options.TestLimit = None,
    rollout_samples: options.RolloutSamples = None,
    samples: options.Samples = None,
    k: options.K = None,
    sets: options.Set = None,
    twin: options.Twin = False,
    out: options.Out = None,
    reuse: Annotated[
        str | None,
        options.running(
            metavar="RUN",
            help="Finished comparison, or study, with the same settings but other rows or seeds: its cells are not "
            "trained again.",
        ),
    ] = None,
    push_to_hub: options.PushToHub = None,
    public: options.Public = False,
    workers: options.Workers = None,
    threads: options.WorkerThreads = 1,
    executor: Annotated[
        Literal["local", "ray"],
        options.running(metavar="local|ray", help="Run cells in processes on this machine, or as Ray tasks."),
    ] = "local",
    address: Annotated[
        str | None,
        options.running(metavar="HOST:PORT", help="Ray cluster to use. Default: a new one on this machine."),
    ] = None,
    dry_run: Annotated[
        bool,
        options.running(
            "--dry-run",
            help="Check everything that can be checked without weights and without a connection, and show what would "
            "run and what it would cost.",
        ),
    ] = False,
    trust_remote_code: options.Trust = False,
) -> int:
    """Train every algorithm on every seed from one base model and one buffer, evaluate, and report.

    Examples:
      rlzoo compare arithmetic
      rlzoo compare arithmetic --algorithms sft,dft,my.py:Mine --seeds 0,1,2
      rlzoo compare arithmetic --set training.steps=40 --set evaluation.samples=8
      rlzoo compare my.yaml --learning-rates 1e-5,5e-5 --executor ray
      rlzoo compare arithmetic --seeds 0,1,2,3,4,5,6,7 --reuse arithmetic
      rlzoo compare paper/offline-rl --dry-run
      rlzoo compare paper/offline-rl --twin
      rlzoo compare arithmetic --push-to-hub alice/arithmetic
    """
    from rlzoo.cli.settings import allow_remote_code, check_public, check_validation, experiment_of

    if address is not None and executor != "ray":
        raise UserError("--address names a Ray cluster: add --executor ray")
    check_public(public, push_to_hub)
    allow_remote_code(trust_remote_code)
    chosen = experiment_of(
        experiment, sets,
        algorithms=algorithms, seeds=seeds, learning_rates=learning_rates, steps=steps, batch_size=batch_size,
        model=model, reward=reward, data=data, test_data=test_data, columns=column, bad_rows=bad_rows,
        limit=limit, train_limit=train_limit, test_limit=test_limit,
        rollout_samples=rollout_samples, samples=samples, k=k, twin=twin,
    )  # fmt: skip
    check_validation(chosen, data)
    if dry_run:
        return _show_dry_run(chosen, reuse)
    from rich.console import Console

    from rlzoo.cli.pushing import files_of_comparison
    from rlzoo.cli.tables import show
    from rlzoo.jobs.hub import pushed
    from rlzoo.jobs.pool import counted
    from rlzoo.jobs.progress import loading
    from rlzoo.jobs.ranks import is_main

    with loading():
        from rlzoo.comparison.report import report_table
        from rlzoo.comparison.runner import compare, where

    folder, console = out or where(chosen, threads), Console(quiet=not is_main(), highlight=False, markup=False)
    with pushed(push_to_hub, "dataset", not public, folder, files_of_comparison) as push:
        results = compare(chosen, folder, workers, threads, executor=executor, address=address, reuse=reuse)
        show(console, report_table(results))
        console.print(f"{results['wall_seconds']:.0f} s; report: {folder / 'report.html'}", soft_wrap=True)
        if failed := len(results["failed"]):
            told = ", and then pushes the comparison" if push_to_hub else ""
            console.print(
                f"{counted(failed, 'cell')} failed: the report says why; the same command retries them{told}",
                soft_wrap=True,
            )
            push.is_complete = False
    return 1 if failed else 0


def _show_dry_run(experiment: Experiment, reuse: str | None) -> int:
    from rich.console import Console

    from rlzoo.cli.tables import show
    from rlzoo.jobs.pool import silence
    from rlzoo.jobs.progress import loading

    with loading():
        from rlzoo.comparison.dry_run import dry_run, tables_of
        from rlzoo.comparison.reuse import reusable

        there = {} if reuse is None else reusable(experiment, reuse)

    silence()
    console = Console(highlight=False, markup=False)
    tables, lines = tables_of(dry_run(experiment))
    show(console, tables)
    for line in lines:
        console.print(line, soft_wrap=True)
    if there:
        console.print(f"Cells that would not be trained again: the {len(there)} that are in {reuse}.", soft_wrap=True)
    return 0
