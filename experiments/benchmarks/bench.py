"""Speed and memory against the committed figures: what ``make bench`` runs, some three minutes on an idle core.

    python experiments/benchmarks/bench.py
    python experiments/benchmarks/bench.py --save

Figures are ratios of two engines that are measured in turn in the same minutes, with one thread, in seconds of the CPU,
on the embedded model, so that they hold on another machine, and beside other work:

- ``speed of OBJECTIVE``: rlzoo's training step over TRL's on the same rows (train_step.py), in tokens per second;
- ``memory of OBJECTIVE``: rlzoo's peak memory over TRL's;
- ``speed of sampling``: rlzoo's decoding over `generate` of transformers (sampling.py).

A regression is a speed below `SLOWER` times, or a memory above `LARGER` times the committed figure in figures.json; the
exit status is then 1. Repeat it before you believe it. ``--save`` makes the measured figures the
committed ones: with a change that is meant to move them, and with the reason in the commit.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
FIGURES = HERE / "figures.json"
OBJECTIVES = ("sft", "dpo", "grpo")
SPEED = "tokens_per_cpu_second"
SLOWER, LARGER = 0.85, 1.15


def measured(repeats: int) -> dict[str, float]:
    """All figures, by name."""
    steps = _run("train_step.py", "--objectives", ",".join(OBJECTIVES), "--engines", "rlzoo,trl_padded",
                 "--warm-up", "16", "--no-gemm", "--repeats", str(repeats))  # fmt: skip
    sampling = _run("sampling.py", "--engines", "generate,rlzoo", "--prompts", "64", "--repeats", str(repeats))
    found = {}
    for objective in OBJECTIVES:
        ours, theirs = steps[objective]["rlzoo"], steps[objective]["trl_padded"]
        found[f"speed of {objective}"] = ours[SPEED] / theirs[SPEED]
        found[f"memory of {objective}"] = ours["peak_memory_bytes"] / theirs["peak_memory_bytes"]
    return found | {"speed of sampling": sampling["rlzoo"][SPEED] / sampling["generate"][SPEED]}


def _run(script: str, *options: str) -> Any:
    command = [sys.executable, "-W", "ignore", str(HERE / script), *options, "--threads", "1", "--json"]
    print(f"python {HERE.name}/{script} {' '.join(options)}", file=sys.stderr, flush=True)
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def is_regression(name: str, ratio: float) -> bool:
    """Whether a figure that is ``ratio`` times the committed one is worse than noise explains."""
    return ratio > LARGER if name.startswith("memory") else ratio < SLOWER


def table(found: Mapping[str, float], committed: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """The lines of a table, and the names of the regressions. A figure that is not committed is none."""
    lines, worse = [f"{'figure':20} {'measured':>9} {'committed':>9} {'ratio':>6}"], []
    for name, value in found.items():
        if name not in committed:
            lines.append(f"{name:20} {value:9.3g} {'-':>9} {'-':>6}")
            continue
        ratio = value / committed[name]
        if is_regression(name, ratio):
            worse.append(name)
        lines.append(
            f"{name:20} {value:9.3g} {committed[name]:9.3g} {ratio:6.2f}{'  regression' if name in worse else ''}"
        )
    return lines, worse


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and compare or save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="make the measured figures the committed ones")
    options = parser.parse_args(arguments)
    found = measured(options.repeats)
    committed = json.loads(FIGURES.read_text(encoding="utf-8"))["figures"] if FIGURES.exists() else {}
    lines, worse = table(found, committed)
    print("\n".join(lines))
    if options.save:
        where = {"torch": torch.__version__, "machine": f"{platform.machine()}, {platform.system()}"}
        rounded = {name: round(value, 3) for name, value in found.items()}
        FIGURES.write_text(json.dumps({"command": "make bench", **where, "figures": rounded}, indent=1) + "\n")
        print(f"saved {FIGURES.name}")
        return 0
    if not committed:
        print(f"{FIGURES.name} does not exist: --save makes these the figures to compare with")
    told = f"a speed below {SLOWER} or a memory above {LARGER} times the committed figure is a regression"
    print(f"{told}: {', '.join(worse) or 'none'}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
