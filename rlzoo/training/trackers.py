"""Experiment trackers, through Accelerate: each training is a run of its own, which goes on where it was interrupted.

A folder ``RUN/logs/NAME`` is the run NAME of the group RUN, so that all cells of a comparison are one group.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from rlzoo.config import Training
from rlzoo.errors import UserError
from rlzoo.jobs.outputs import write_atomically
from rlzoo.jobs.ranks import agreed, is_main

PROJECT = "rlzoo"
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}
LOGS = "logs"
"""The folder of a run in which trackers write, each training in a folder of its own."""
_RUN = "tracked-as.json"
"""The file with the identity of a run, by which wandb and trackio find it again, and its configuration."""
Log = Callable[[Mapping[str, float], int], None]
"""Sends metrics of a step to all trackers."""


def untracked(metrics: Mapping[str, float], step: int) -> None:
    """Sends metrics nowhere."""


def check_trackers(settings: Training) -> None:
    """Raise UserError for a tracker whose package is missing, which Accelerate would ignore."""
    for name in settings.trackers:
        if not any(find_spec(package) for package in PACKAGES[name]):
            raise UserError(f"training.trackers: {name} is not installed: pip install {PACKAGES[name][0]}")


def accelerator_for(device: torch.device, settings: Training, folder: Path | None) -> Accelerator:
    """The Accelerator of the settings' trackers, for a policy on a device.

    Raises UserError for a tracker whose package is missing, and for one that writes files without a ``folder``.
    """
    check_trackers(settings)
    if folder is None and "tensorboard" in settings.trackers:
        raise UserError("training.trackers: tensorboard writes files: give the training a folder, or leave it out")
    return Accelerator(
        # everything stays on the policy's device, whichever device an earlier Accelerator of this process uses
        cpu=device.type == "cpu" and "device" not in PartialState._shared_state,
        device_placement=False,
        log_with=list(settings.trackers) or None,
        project_dir=folder,
    )


@contextmanager
def tracked(
    accelerator: Accelerator, settings: Training, folder: Path | None, about: Mapping[str, Any] | None = None
) -> Iterator[Log]:
    """A function that sends the metrics of a step to all trackers; their runs end with this context.

    A run that ``folder`` has begun is continued. ``about`` is recorded with the settings when it begins. All processes
    must call this.
    """
    if not settings.trackers:
        yield untracked
        return
    new = {"id": secrets.token_hex(4), "configuration": _flat({**(about or {}), **settings.model_dump(mode="json")})}
    run, is_new = agreed(_begun(folder, new) if is_main() else (new, True))
    with redirect_stdout(sys.stderr):  # trackio prints, and standard output is for results
        accelerator.init_trackers(PROJECT, run["configuration"] if is_new else None, _named(folder, run))
    try:
        yield lambda metrics, step: accelerator.log(dict(metrics), step)
    finally:
        with redirect_stdout(sys.stderr):
            for tracker in accelerator.trackers:
                tracker.finish()


def log_results(device: torch.device, settings: Training, folder: Path, steps: int, results: Mapping[str, Any]) -> None:
    """Add results that were measured after training, in ``steps``, to its run. All processes must call this.

    ``results`` may be nested; what is no number is left out. They are one step after the last, because wandb takes
    nothing more for a step once its run has ended.
    """
    if settings.trackers:
        with tracked(accelerator_for(device, settings, folder), settings, folder) as log:
            log(dict(_numbers(results)), steps + 1)


def _begun(folder: Path | None, new: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """The run that a folder has begun, else the ``new`` one, and whether it begins now."""
    file = None if folder is None else folder / _RUN
    if file is not None and file.is_file():
        return json.loads(file.read_text(encoding="utf-8")), False
    if file is not None:
        write_atomically(file, json.dumps(new))
    return new, True


def _named(folder: Path | None, run: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arguments of each tracker's constructor.

    trackio knows a run by its name alone, wandb by an id; and trackio forgets the configuration of a run that goes on,
    unless it is given again.
    """
    if folder is None:
        return {}
    group = {"group": folder.parent.parent.name} if folder.parent.name == LOGS else {}
    return {
        "wandb": {"name": folder.name, **group, "id": run["id"], "resume": "allow", "dir": str(folder)},
        "trackio": {
            "name": f"{folder.name} {run['id']}",
            **group,
            "config": dict(run["configuration"]),
            "resume": "allow",
        },
    }


def _numbers(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, value


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Settings as trackers take them: plain values under dotted names."""
    found: dict[str, bool | int | float | str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, bool | int | float) else str(value)
    return found
