"""Experiment trackers, through Accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from accelerate import Accelerator

from rlzoo.config import Training
from rlzoo.errors import UserError

PROJECT = "rlzoo"
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}


def installed(trackers: Sequence[str]) -> Sequence[str]:
    """The trackers themselves. Raises UserError for one whose package is missing, which Accelerate would ignore."""
    for name in trackers:
        if not any(find_spec(package) for package in PACKAGES[name]):
            raise UserError(f"training.trackers: {name} is not installed: pip install {PACKAGES[name][0]}")
    return trackers


@contextmanager
def tracked(
    accelerator: Accelerator, settings: Training, folder: Path | None
) -> Iterator[Callable[[dict[str, float], int], None]]:
    """A function that sends the metrics of a step to all trackers; their runs end with this context."""
    if not settings.trackers:
        yield lambda metrics, step: None
        return
    flat = {name: value if isinstance(value, (int, float)) else str(value) for name, value in settings}
    name = {} if folder is None else {"name": folder.name}
    accelerator.init_trackers(PROJECT, flat, {"wandb": name, "trackio": name})
    try:
        yield lambda metrics, step: accelerator.log(metrics, step)
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
