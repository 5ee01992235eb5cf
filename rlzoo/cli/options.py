"""Parameters shared by several commands: each is declared once, and has the same help everywhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, BadParameter, Option

from rlzoo.cli import completion

SPEC = "a name (see rlzoo list), package.module:Name, or path/to/file.py:Name"
LIST = f"Comma-separated objectives, each {SPEC}. Default: those of the experiment."


def whole(text: str) -> int:
    """A whole number on the command line. Raises BadParameter for anything else."""
    try:
        return int(text)
    except ValueError:
        raise BadParameter(f"{text!r} is not a whole number") from None


def count(text: str) -> int:
    """A whole number of at least 1 on the command line. Raises BadParameter for anything else."""
    if (number := whole(text)) < 1:
        raise BadParameter(f"{number} is too few: give a whole number of at least 1")
    return number


def seed(text: str) -> int:
    """A random seed on the command line. Raises BadParameter for anything but a whole number from 0 to 2³² - 1."""
    if not 0 <= (number := whole(text)) < 2**32:
        raise BadParameter(f"{number} is no seed: give a whole number from 0 to {2**32 - 1}")
    return number


def number(text: str) -> float:
    """A number on the command line. Raises BadParameter for anything else."""
    try:
        return float(text)
    except ValueError:
        raise BadParameter(f"{text!r} is not a number") from None


def under(panel: str) -> Any:
    """A constructor of options that help lists under a heading."""
    return partial(Option, rich_help_panel=panel)


training, data, sampling = under("Training"), under("Model and data"), under("Sampling and evaluation")
settings, running = under("Settings"), under("Run")

ExperimentName = Annotated[
    str,
    Argument(
        metavar="EXPERIMENT",
        help="Built-in experiment (see rlzoo list), or a .yaml file.",
        autocompletion=completion.experiments,
    ),
]

Steps = Annotated[int | None, training(metavar="N", parser=whole, help="Optimizer steps.")]
BatchSize = Annotated[int | None, training(metavar="N", parser=whole, help="Sequences per optimizer step.")]

Model = Annotated[str | None, data(metavar="MODEL", help="Base model: 'embedded', a folder, or a Hub ID.")]
Reward = Annotated[str | None, data(metavar="REWARD", help=f"Reward: {SPEC}.", autocompletion=completion.rewards)]
Data = Annotated[
    str | None,
    data(metavar="SOURCE", help="Training problems: a file, a folder of shards, a Hub ID, or world:NAME/SPLIT."),
]
TestData = Annotated[
    str | None,
    data(
        metavar="SOURCE",
        help="Test problems to use in place of every benchmark's. Benchmarks that are then equal become one.",
    ),
]
Column = Annotated[
    list[str] | None,
    data(
        metavar="NAME=COLUMN",
        help="Column of your data to read as NAME: prompt, solution, or what the reward needs, as in answer=label. "
        "Repeatable.",
    ),
]
BadRows = Annotated[
    Literal["reject", "drop"] | None,
    data(metavar="reject|drop", help="Stop at the first row that cannot be used, or drop and count such rows."),
]
Limit = Annotated[int | None, data(metavar="N", parser=whole, help="Use at most N problems from each set.")]
TrainLimit = Annotated[int | None, data(metavar="N", parser=whole, help="Use at most N training problems.")]
TestLimit = Annotated[
    int | None,
    data(metavar="N", parser=whole, help="Use at most N problems from each benchmark and from the validation set."),
]

RolloutSamples = Annotated[int | None, sampling(metavar="N", parser=whole, help="Samples per prompt to learn from.")]
Samples = Annotated[int | None, sampling(metavar="N", parser=whole, help="Samples per problem in evaluation.")]
K = Annotated[
    str | None,
    sampling(metavar="K,...", help="The k of pass@k and maj@k, at most --samples. If several, tables show the first."),
]

Set = Annotated[
    list[str] | None,
    settings(
        "--set",
        metavar="KEY=VALUE",
        help="Change any setting by its dotted name, as in training.weight_decay=0.1. The value is YAML. "
        "Repeatable; overrides other options.",
        autocompletion=completion.settings,
    ),
]

Twin = Annotated[
    bool,
    settings(
        "--twin",
        help="Run the small twin that the file describes, with the embedded model and built-in tasks for instance.",
    ),
]

Out = Annotated[
    Path | None,
    running(
        metavar="FOLDER",
        help="Output folder: a new one, or that of the same run, which then resumes. Default: a new one in runs/.",
    ),
]
BufferOut = Annotated[
    Path,
    running(
        metavar="PATH",
        help="Where the buffer is saved: a new folder, that of the same run, or a .parquet or .jsonl file. A folder "
        "has a card that says how it was made; a file is written alone.",
    ),
]
PushToHub = Annotated[
    str | None,
    running(
        metavar="NAMESPACE/NAME",
        help="Push the result, with its card, to this new repository on the Hugging Face Hub, which is private unless "
        "--public. Without it nothing leaves this machine.",
    ),
]
Public = Annotated[bool, running("--public", help="With --push-to-hub: let everybody see the repository.")]
Seed = Annotated[int, running(metavar="N", parser=seed, help="Random seed.")]
Workers = Annotated[int | None, running(metavar="N", parser=count, help="Worker processes. Default: one per core.")]
WorkerThreads = Annotated[int, running(metavar="N", parser=count, help="Threads per worker process.")]
Threads = Annotated[
    int | None, running(metavar="N", parser=count, help="Threads for computation. Default: PyTorch's choice.")
]
Trust = Annotated[bool, running("--trust-remote-code", help="Run the Python code that ships with the model.")]
