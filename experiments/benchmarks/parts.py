"""Parts of a benchmark that run in processes of their own, so that none is measured in what another left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any


def run_part(script: str, part: str, *options: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What ``script --part PART`` prints last, as JSON. Raises SystemExit, with its last line, if it fails."""
    command = [sys.executable, "-W", "ignore", script, *options, "--part", part]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"its process ended with status {done.returncode}"]
        raise SystemExit(f"{part} failed: {lines[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each number over the runs, which all have the same."""
    return {name: median(run[name] for run in runs) for name in runs[0]}
