"""Kill runs with SIGKILL at random moments, start them again, and hold what they end with against undisturbed runs.

    python experiments/benchmarks/crash.py --kills 24

``rlzoo train``, ``rollout``, ``variance`` and ``compare`` are killed in turn: every second time as soon as something
is half written, else after a random time; every third time the command's process alone, else it and its workers. A
killed command is started again as it was, until it ends by itself or is killed again. Reported are:

- ``kills``: how many runs were killed;
- ``lost``: how many results that were complete on disk at a kill were made a second time;
- ``steps_again``: optimizer steps of ``train`` that were done a second time;
- ``identical``: whether all runs ended with the results of the undisturbed ones, bit for bit: weights, buffers,
  metrics of every step, outcomes of every sample, costs but for seconds and bytes of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RLZOO = [sys.executable, "-W", "ignore", "-m", "rlzoo"]
COMMANDS = {
    "train": [
        "train", "ppo", "--buffer", "rows.jsonl", "--steps", "24", "--set", "batch_size=16",
        "--set", "checkpoint_seconds=0",
    ],
    "rollout": ["rollout", "arithmetic", "--limit", "60", "--set", "rollouts.batch_size=16"],
    "variance": [
        "variance", "arithmetic", "--objectives", "sft,grpo", "--rows", "24", "--draws", "256", "--steps", "8",
        "--every", "4", "--probe-rows", "8", "--workers", "2", "--set", "training.checkpoint_seconds=0",
    ],
    "compare": [
        "compare", "arithmetic", "--algorithms", "sft,dft,grpo", "--seeds", "0", "--steps", "8", "--limit", "12",
        "--workers", "2", "--set", "training.checkpoint_seconds=0",
    ],
}  # fmt: skip
UNEQUAL = {"wall_seconds", "peak_memory_bytes", "created", "finished"}
"""What two runs of the same cannot have in common."""


def start(command: str, out: str, folder: Path) -> subprocess.Popen[str]:
    """A command in a session of its own, whose output goes to a file."""
    log = (folder / f"{command}.log").open("a", encoding="utf-8")
    return subprocess.Popen(
        [*RLZOO, *COMMANDS[command], "--out", out],
        cwd=folder,
        stdout=log,
        stderr=log,
        start_new_session=True,
        text=True,
    )


def finish(command: str, out: str, folder: Path) -> float:
    """Run a command to its end; the seconds it took."""
    started = time.monotonic()
    if start(command, out, folder).wait():
        raise SystemExit(f"{command} failed: {(folder / f'{command}.log').read_text().splitlines()[-1]}")
    return time.monotonic() - started


def kill(run: subprocess.Popen[str], alone: bool) -> None:
    """End a run with SIGKILL: its own process alone, whose workers then end themselves, or all of them."""
    if alone:
        run.kill()
    else:
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    while True:  # what is reported as kept must be read when nobody writes any more
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)


def half_written(out: Path) -> bool:
    """Whether something is being written."""
    places = [out, out.parent / f".{out.name}.state"]
    return any(next(place.rglob(".*.partial"), None) is not None for place in places if place.is_dir())


def made(out: Path) -> dict[str, tuple[int, int]]:
    """The results that are complete on disk: a file that is made again is another one."""
    found = {}
    for place in (out, out.parent / f".{out.name}.state"):
        for path in place.rglob("*") if place.is_dir() else []:
            if path.suffix in (".result", ".safetensors") and ".partial" not in str(path):
                try:
                    status = path.stat()
                except OSError:
                    continue
                found[str(path)] = (status.st_ino, status.st_mtime_ns)
    return found


def results(out: Path) -> dict[str, Any]:
    """What a run ended with, in a form that can be compared: bytes of weights and rows, contents of the rest."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")) if out.is_dir() else [out]:
        name = str(path.relative_to(out.parent)).replace(out.name, "out", 1)
        if path.suffix in (".safetensors", ".arrow", ".parquet", ".jsonl"):
            found[name] = path.read_bytes()
        elif path.name in ("results.json", "training.json", "variance.json"):
            found[name] = comparable(json.loads(path.read_text()))
    return found


def comparable(value: Any) -> Any:
    """Plain data without what two runs cannot have in common."""
    if isinstance(value, dict):
        return {key: comparable(inner) for key, inner in value.items() if key not in UNEQUAL}
    return [comparable(inner) for inner in value] if isinstance(value, list) else value


def steps_told(log: Path) -> list[int]:
    """The steps that ``train`` says it has done."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return [int(line.split()[1].partition("/")[0]) for line in lines if line.startswith("step ") and "  loss" in line]


def main() -> None:
    """Kill and start again, and tell what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--commands", default=",".join(COMMANDS), help="comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    tell: Callable[..., None] = (lambda *_, **__: None) if arguments.json else print
    commands = arguments.commands.split(",")
    outs = {name: "rows.parquet" if name == "rollout" else name for name in commands}
    killed, lost, identical, steps_again = 0, 0, True, 0
    with tempfile.TemporaryDirectory() as scratch:
        whole, broken = Path(scratch, "whole"), Path(scratch, "broken")
        for folder in (whole, broken):
            folder.mkdir()
            subprocess.run(
                [*RLZOO, "rollout", "arithmetic", "--limit", "30", "--out", "rows.jsonl"],
                cwd=folder, check=True, capture_output=True,
            )  # fmt: skip
        seconds = {name: finish(name, outs[name], whole) for name in commands}
        tell("undisturbed:", {name: f"{took:.0f} s" for name, took in seconds.items()}, flush=True)
        shares = {name: arguments.kills * (i + 1) // len(commands) for i, name in enumerate(commands)}
        for name in commands:
            out, before = broken / outs[name], dict[str, tuple[int, int]]()
            while killed < shares[name]:
                run = start(name, outs[name], broken)
                writing, alone = killed % 2 == 0, killed % 3 == 0
                until = time.monotonic() + chance.uniform(2.0, 0.9 * seconds[name])
                if writing:  # a moment that differs from kill to kill
                    skipped = chance.randrange(1, 12)
                    until = time.monotonic() + seconds[name]
                    while run.poll() is None and time.monotonic() < until and skipped:
                        skipped -= half_written(out)
                        time.sleep(0.001)
                else:
                    while run.poll() is None and time.monotonic() < until:
                        time.sleep(0.01)
                if run.poll() is not None:  # it came to its end first: begin anew
                    if run.returncode:
                        raise SystemExit(f"{name} failed: {(broken / f'{name}.log').read_text().splitlines()[-1]}")
                    same = results(out) == results(whole / outs[name])
                    identical &= same
                    tell(f"{name}: ended before its kill, {'identical' if same else 'DIFFERENT'}; begun anew")
                    if out.is_dir():
                        shutil.rmtree(out)
                    else:
                        out.unlink()
                    before = {}
                    continue
                kill(run, alone)
                killed += 1
                if out.is_file() and not (out.parent / f".{out.name}.state").exists():  # it had just ended
                    out.unlink()
                now = made(out)
                again = [path for path, mark in before.items() if path in now and now[path] != mark]
                lost += len(again)
                before = before | now
                where = "in a write" if writing else "at random"
                tell(
                    f"{name}: kill {killed} {where}, {len(now)} results on the disk, {len(again)} made again",
                    flush=True,
                )
            finish(name, outs[name], broken)
            same = results(out) == results(whole / outs[name])
            identical &= same
            tell(f"{name}: ended, {'identical' if same else 'DIFFERENT'}", flush=True)
        if "train" in commands:
            told = steps_told(broken / "train.log")
            steps_again = len(told) - len(set(told))
    print(json.dumps({"kills": killed, "lost": lost, "steps_again": steps_again, "identical": identical}))


if __name__ == "__main__":
    main()
