"""``rlzoo variance``."""

from __future__ import annotations

from typing import Annotated

from rlzoo.cli import completion, options

measurement = options.under("Measurement")


def variance(
    experiment: options.ExperimentName = "both-worlds",
    *,
    objectives: Annotated[
        str | None, measurement(metavar="LIST", help=options.LIST, autocompletion=completion.several_objectives)
    ] = None,
    rows: Annotated[
        int,
        measurement(metavar="N", parser=options.whole, help="Rows that each objective is measured on."),
    ] = 1000,
    draws: Annotated[
        int,
        measurement(metavar="N", parser=options.whole, help="Monte Carlo samples per token; 0 for none."),
    ] = 4096,
    every: Annotated[
        int,
        measurement(
            metavar="N",
            parser=options.whole,
            help="Training steps between measurements; 0 for the base model alone.",
        ),
    ] = 10,
    probe_rows: Annotated[
        int,
        measurement(metavar="N", parser=options.whole, help="Rows measured in the course of training."),
    ] = 64,
    token_classes: Annotated[
        str,
        measurement(
            metavar="NAME",
            help="Function from a token's text to its class: default, module:name or file.py:name.",
        ),
    ] = "default",
    class_gradients: Annotated[
        bool,
        measurement(
            "--class-gradients",
            help="Measure each class's share of the variance, with one backward pass per objective and class.",
        ),
    ] = False,
    steps: options.Steps = None,
    model: options.Model = None,
    reward: options.Reward = None,
    data: options.Data = None,
    column: options.Column = None,
    buffer: Annotated[
        str | None,
        options.data(
            metavar="BUFFER",
            help="Saved buffer (see rlzoo rollout) or table to measure on, in place of the experiment's data: a file, "
            "a folder, or NAMESPACE/NAME on the Hugging Face Hub.",
        ),
    ] = None,
    bad_rows: options.BadRows = None,
    limit: options.Limit = None,
    rollout_samples: options.RolloutSamples = None,
    sets: options.Set = None,
    twin: options.Twin = False,
    seed: Annotated[
        int,
        options.running(
            metavar="N",
            parser=options.seed,
            help="Random seed for the choice of rows, the Monte Carlo samples and training.",
        ),
    ] = 0,
    out: options.Out = None,
    workers: options.Workers = None,
    threads: options.WorkerThreads = 1,
    trust_remote_code: options.Trust = False,
) -> int:
    """Measure the variance of objectives' gradients: per token, over the data, and in the course of training.

    Examples:
      rlzoo variance
      rlzoo variance both-worlds --objectives sft,dft,my.py:Mine --rows 128
      rlzoo variance --objectives sft,dft --class-gradients --every 0
      rlzoo variance --buffer runs/buffer --objectives rft,dpo,grpo --every 0
    """
    from rlzoo.cli.settings import allow_remote_code, experiment_of
    from rlzoo.config import VarianceSettings, validated

    allow_remote_code(trust_remote_code)
    measured = {
        "rows": rows, "draws": draws, "every": every, "probe_rows": probe_rows, "seed": seed,
        "token_classes": token_classes, "class_gradients": class_gradients,
    }  # fmt: skip
    settings = validated(VarianceSettings, measured, "variance")
    chosen = experiment_of(
        experiment, sets,
        algorithms=objectives, steps=steps, model=model, reward=reward, data=data, columns=column, bad_rows=bad_rows,
        limit=limit, rollout_samples=rollout_samples, twin=twin,
    )  # fmt: skip
    from rich.console import Console

    from rlzoo.cli.tables import show
    from rlzoo.jobs.progress import loading

    with loading():
        from rlzoo.variance.report import report_tables, without_noise_scale
        from rlzoo.variance.run import run_variance, where

    folder = out or where(chosen, settings, buffer, threads)
    found = run_variance(chosen, folder, settings, buffer, workers, threads)
    console = Console(highlight=False, markup=False)
    show(console, report_tables(found))
    for reason, names in without_noise_scale(found).items():
        console.print(f"no noise scale for {', '.join(names)}: {reason}", soft_wrap=True)
    for name, reason in {**found["skipped"], **found["failed"]}.items():
        console.print(f"{name}: {reason}", soft_wrap=True)
    console.print(f"{found['wall_seconds']:.0f} s; report: {folder / 'report.html'}", soft_wrap=True)
    return 1 if found["failed"] else 0
