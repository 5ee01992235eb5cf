"""``rlzoo train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from typer import Argument

from rlzoo.cli import completion, options


def train(
    objective: Annotated[
        str,
        Argument(metavar="OBJECTIVE", help=f"Objective: {options.SPEC}.", autocompletion=completion.objectives),
    ],
    *,
    option: Annotated[
        list[str] | None,
        options.training(
            metavar="KEY=VALUE", help="Hyper-parameter of the objective: short for --set options.KEY=VALUE. Repeatable."
        ),
    ] = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    learning_rate: Annotated[
        float | None, options.training(metavar="RATE", parser=options.number, help="Peak learning rate.")
    ] = None,
    buffer: Annotated[
        str,
        options.data(
            metavar="BUFFER",
            help="Saved buffer (see rlzoo rollout), or a table in one of TRL's formats: a file, a folder, or "
            "NAMESPACE/NAME on the Hugging Face Hub.",
        ),
    ],
    model: options.Model = "embedded",
    split: Annotated[str | None, options.data(metavar="NAME", help="Split of the table, if it has several.")] = None,
    column: Annotated[
        list[str] | None,
        options.data(
            metavar="NAME=COLUMN",
            help="Column of the table to read as NAME, as in completion=response. Repeatable.",
        ),
    ] = None,
    bad_rows: options.BadRows = None,
    sets: options.Set = None,
    out: Annotated[
        Path,
        options.running(
            metavar="FOLDER",
            help="Where the model is saved: a new folder, or that of the same run, which then resumes.",
        ),
    ],
    push_to_hub: options.PushToHub = None,
    public: options.Public = False,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    trust_remote_code: options.Trust = False,
) -> int:
    """Train a policy with one objective on a saved buffer or a table.

    Examples:
      rlzoo train rft --buffer runs/buffer --steps 50 --out runs/rft
      rlzoo train dpo --buffer pairs.jsonl --option beta=0.2 --out runs/dpo
      rlzoo train rft --buffer alice/samples --out runs/rft
      rlzoo train sft --buffer pairs.jsonl --set training.lora={} --out runs/sft
      rlzoo train dft --buffer pairs.jsonl --out runs/dft --push-to-hub alice/dft
    """
    from rlzoo.cli.settings import check_public, prepare, train_settings

    given = {
        "objective": objective,
        "model": model,
        "buffer.source": buffer,
        "buffer.split": split,
        "buffer.bad_rows": bad_rows,
        "training.steps": steps,
        "training.batch_size": batch_size,
        "training.learning_rate": learning_rate,
        "seed": seed,
    }
    settings = train_settings(given, option, column, sets)
    from rich.console import Console

    from rlzoo.cli.pushing import files_of_model
    from rlzoo.jobs.heartbeat import Heartbeat
    from rlzoo.jobs.hub import pushed
    from rlzoo.jobs.journal import Journal
    from rlzoo.jobs.outputs import write_atomically
    from rlzoo.jobs.pool import silence
    from rlzoo.jobs.progress import Remaining, loading
    from rlzoo.jobs.ranks import is_main
    from rlzoo.jobs.runs import run_in
    from rlzoo.jobs.sharing import CARD

    with loading():
        from rlzoo.buffers import read_buffer, require_table
        from rlzoo.buffers.bad_rows import BadRows, dropped_line
        from rlzoo.objective import get_objective
        from rlzoo.policy.defaults import resolved
        from rlzoo.policy.loading import ADAPTER, load_for, save_policy
        from rlzoo.training import train
        from rlzoo.training.batches import views_of
        from rlzoo.training.card import Trained, adapter_card, model_card
        from rlzoo.training.trackers import LOGS, check_trackers

    check_public(public, push_to_hub)
    prepare(threads, trust_remote_code)
    training, table = settings.training, settings.buffer
    what = get_objective(settings.objective, **settings.options)
    views_of(what)  # raises for wrong options of its view
    check_trackers(training)
    silence()
    remaining = Remaining()

    def show(trainer: Any, step: int) -> None:
        row = trainer.record.steps[-1]
        if is_main():
            line = f"{trainer.progress}  loss {row['loss']:.4f}  gradient norm {row['gradient_norm']:.3f}"
            print(line + remaining.after(trainer.progress.fraction), flush=True)  # so that a log shows the progress

    asked = {**settings.model_dump(mode="json"), "threads": threads}
    with pushed(push_to_hub, "model", not public, out, files_of_model), run_in(out, "train", asked) as run:
        if run.finished:
            print(f"already finished: {out}")
            return 0
        require_table(table.source, table.split)
        journal = Journal(run.state, "train")
        journal.begin()

        def log(trainer: Any, step: int) -> None:
            journal.step(trainer.record.steps[-1], share=trainer.progress.fraction)

        bad, longest, logs = BadRows(table.bad_rows), training.max_completion_tokens, out / LOGS / out.absolute().name
        with Heartbeat(Console(stderr=True, quiet=not is_main()), "reading the model and the buffer"):
            policy = load_for(settings.model, training)
            rows = read_buffer(
                table.source, policy.tokenizer, longest, table.split, table.columns, bad, training.special_tokens,
                policy.row_check(), training.max_length, training.turns,
            )  # fmt: skip
        if is_main():
            for line in bad.lines():
                print(line, flush=True)
        folders = logs, run.state / "checkpoints"
        record = train(policy, what, rows, training, settings.seed, [show, log], *folders)
        save_policy(policy, out)
        if is_main():
            how = resolved(policy, training)
            summary = {
                "steps": record.plain_steps(),
                "costs": record.costs.as_dict(),
                "ended": record.ended,
                "events": [*bad.events(), *record.events],
                "dropped_rows": bad.summary(),
                "resolved": how,
            }
            write_atomically(out / "training.json", json.dumps(summary, indent=1))
            left_out = dropped_line(bad.summary())
            made = Trained(logs.name, what, settings.model, table.source, rows, record, asked, how, left_out)
            if training.lora is not None:
                write_atomically(out / ADAPTER / CARD, adapter_card(made))
            write_atomically(out / CARD, model_card(made))
            for event in record.events:
                print(event)
            print(f"saved to {out}")
    return 0
