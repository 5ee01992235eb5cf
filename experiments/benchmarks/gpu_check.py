"""Whether this GPU computes what it should, and how fast: one command, no network, some eight minutes.

    python experiments/benchmarks/gpu_check.py --json result.json
    python experiments/benchmarks/gpu_check.py --tiny          # a miniature of all of it on the CPU

Parts, in this order:

- ``gradients``: of every objective on the embedded model, in float32 and bfloat16-mixed, against float64 on the CPU;
- ``budgets``: the same of DFT, DPO and GRPO on a Qwen2, whatever the micro-batches, with layers recomputed too;
- ``determinism``: a second run in another process, and a run that was stopped and resumes, end with the same bits;
- ``sampler``: drawn tokens, greedy tokens and log-probs against transformers' forward pass of each row alone;
- ``compare``: a small comparison with two workers on this one device;
- ``decoding``: the sampler against transformers' `generate`, on random weights in Qwen2's shapes, for each size;
- ``steps``: DFT, DPO and GRPO on them against a bare loop and TRL's trainers: real tokens per second, the fraction of a
  bfloat16 matrix product's speed, peak memory, the cosine of the gradients.

Models are made at random here, so that nothing is downloaded. Parts run in a process beside this one, a fresh one
after a failure. What is found is printed, and written with ``--json``, as soon as it is known; what ``--limit`` leaves
no time for is reported as skipped. The exit status is 1 where a part failed or was skipped, and 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlzoo.experiments.benchmarks.findings import Setup, shown

CORRECT = ("gradients", "budgets", "determinism", "sampler", "compare")
FAST = ("decoding", "steps")
SIZES = ("0.5b", "1.5b")
WORKER = (sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--worker")
LAST = "steps"
"""Ends its process: TRL's trainers leave Accelerate in a precision of theirs."""


def main() -> None:
    """Run the parts, and say what came of them."""
    arguments = parsed()
    if arguments.worker:
        work(arguments)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = Check(arguments).run()
    sys.exit(0 if results["passed"] else 1)


def parsed() -> argparse.Namespace:
    """The arguments. Ends with status 2 for wrong ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"comma-separated parts: {', '.join(CORRECT + FAST)}")
    parser.add_argument("--sizes", default=",".join(SIZES), help="comma-separated, of steps and decoding")
    parser.add_argument("--tiny", action="store_true", help="a miniature of every part on the CPU")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds after which everything is stopped")
    parser.add_argument("--part-limit", type=float, default=240.0, help="seconds for one part")
    dtypes = ("float32", "bfloat16", "bfloat16-mixed")
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16-mixed", help="of the policies that train")
    parser.add_argument(
        "--token-budgets", type=integers, default=(0, 16384), help="comma-separated, of steps; 0: training's default"
    )
    parser.add_argument("--repeats", type=int, default=3, help="steps that are timed, after one that is not")
    parser.add_argument("--seed", type=int, default=0, help="of weights, rows and samples")
    parser.add_argument("--json", metavar="FILE", help="write what is found there as well; -: print JSON alone")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    known = CORRECT + FAST
    arguments.only = arguments.only.split(",") if arguments.only else list(known)
    if unknown := [part for part in arguments.only if part not in known]:
        parser.error(f"there is no part {unknown[0]!r}: {', '.join(known)}")
    arguments.sizes = ["tiny"] if arguments.tiny else arguments.sizes.split(",")
    if unknown := [size for size in arguments.sizes if size not in (*SIZES, "tiny")]:
        parser.error(f"there is no size {unknown[0]!r}: {', '.join(SIZES)}")
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        parser.error(f"the folder of --json {arguments.json} does not exist")
    if arguments.tiny:
        arguments.token_budgets, arguments.repeats = (0,), 1
    return arguments


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    return tuple(int(number) for number in text.split(","))


class Check:
    """Runs parts in a worker process, and keeps, prints and writes what it says."""

    def __init__(self, arguments: argparse.Namespace, worker: Sequence[str] = WORKER) -> None:
        """``worker`` is the command whose lines say what is found; it gets the parts as JSON."""
        self.arguments, self.worker = arguments, worker
        self.waiting = [
            *(part for part in CORRECT if part in arguments.only),
            *(f"{part} {size}" for size in arguments.sizes for part in FAST if part in arguments.only),
        ]
        self.end = time.monotonic() + arguments.limit
        self.results: dict[str, Any] = {"passed": False, "machine": None, "arguments": sys.argv[1:], "parts": {}}
        self.quiet = arguments.json == "-"

    def run(self) -> dict[str, Any]:
        """All parts."""
        self._write()
        with tempfile.TemporaryDirectory() as folder:
            while self.waiting and time.monotonic() < self.end:
                self._in_worker(Path(folder))
        for label in self.waiting:
            self._close(label, "skipped", "the time was up")
        parts = self.results["parts"].values()
        self.results["passed"] = bool(parts) and all(part["status"] == "passed" for part in parts)
        self._write()
        self._say("passed" if self.results["passed"] else "NOT PASSED")
        if self.quiet:
            print(json.dumps(self.results))
        return self.results

    def _in_worker(self, folder: Path) -> None:
        """Run what waits in a new process, until it is done, something fails, or time is up."""
        command = [*self.worker, json.dumps({"parts": self.waiting, "folder": str(folder)})]
        # tested on machines with a GPU, too; and a miniature has no work for a second thread
        hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if self.arguments.tiny else {}
        with (folder / "worker.log").open("w", encoding="utf-8") as log:
            worker = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **hidden},
            )  # fmt: skip
            lines: queue.Queue[str | None] = queue.Queue()
            threading.Thread(target=read, args=(worker, lines), daemon=True).start()
            try:
                stopped = self._listen(lines)
                if stopped is None:  # it has said all that it will
                    with suppress(subprocess.TimeoutExpired):
                        worker.wait(timeout=10)
            finally:
                if worker.poll() is None:
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        if stopped:
            self._close(self.waiting.pop(0), "failed" if time.monotonic() < self.end else "skipped", stopped)
        elif self.waiting and self._failed_to_say():
            tail = (folder / "worker.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            status = f"its process ended with status {worker.returncode}"
            self._close(self.waiting.pop(0), "failed", f"{status}: {tail[-1] if tail else ''}", tail[-30:])

    def _listen(self, lines: queue.Queue[str | None]) -> str | None:
        """Take in what the worker says until it ends; why it has to be stopped, if it has."""
        self.spoke, began = "", time.monotonic()
        while True:
            end = min(self.end, began + self.arguments.part_limit)
            try:
                line = lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return f"stopped after {time.monotonic() - began:.0f} s"
            if line is None:
                return None
            said = json.loads(line)
            self.spoke = said["event"]
            if said["event"] == "refused":
                print(f"gpu_check.py: {said['reason']}", file=sys.stderr)
                sys.exit(2)
            if said["event"] == "machine":
                if self.results["machine"] is None:
                    self._say("  ".join(f"{key} {shown(value)}" for key, value in said["machine"].items()))
                self.results["machine"] = said["machine"]
            elif said["event"] == "begin":
                began = time.monotonic()
                self._part(said["part"])
            elif said["event"] == "finding":
                self._part(said["part"])["findings"].append(said["finding"])
                self._say(line_of(said["part"], said["finding"]))
            else:
                self.waiting.remove(said["part"])
                self._close(said["part"], said["event"], said["reason"], said["traceback"], said["seconds"])
                began = time.monotonic()
            self._write()

    def _failed_to_say(self) -> bool:
        """Whether the worker ended in the middle of something."""
        return self.spoke not in ("passed", "failed")

    def _part(self, label: str) -> dict[str, Any]:
        part: dict[str, Any] = self.results["parts"].setdefault(
            label, {"status": "running", "reason": None, "seconds": None, "findings": []}
        )
        return part

    def _close(
        self, label: str, status: str, reason: str | None, trace: list[str] | None = None, seconds: float | None = None
    ) -> None:
        self._part(label).update(status=status, reason=reason, seconds=seconds)
        if trace:
            self._part(label)["traceback"] = trace
        took = f" in {seconds:.0f} s" if seconds is not None else ""
        self._say(f"{label}: {status}{took}{f': {reason}' if reason else ''}")
        self._write()

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)

    def _write(self) -> None:
        if self.arguments.json and not self.quiet:
            file = Path(self.arguments.json)
            beside = file.with_name(f".{file.name}.partial")
            beside.write_text(json.dumps(self.results, indent=1), encoding="utf-8")
            beside.replace(file)


def read(worker: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    """Put a worker's lines into a queue, and None at their end."""
    assert worker.stdout is not None
    for line in worker.stdout:
        lines.put(line)
    lines.put(None)


def line_of(part: str, finding: dict[str, Any]) -> str:
    """A row of the table."""
    bounds = {**{k: f" (≤ {shown(v)})" for k, v in finding["at_most"].items()}}
    bounds |= {k: f" (≥ {shown(v)})" for k, v in finding["at_least"].items()}
    values = "  ".join(
        f"{key} {shown(value)}{bounds.get(key, '')}" for key, value in finding["values"].items() if value is not None
    )
    wrong = f"  WRONG: {'; '.join(finding['wrong'])}" if finding["wrong"] else ""
    return f"  {part:<14} {finding['name']:<26} {values}{wrong}"


def work(arguments: argparse.Namespace) -> None:
    """What the worker does: parts, one after the other; it ends where one raises, which may leave a GPU unusable."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print goes to the log

    def say(event: str, **what: Any) -> None:
        print(json.dumps({"event": event, **what}), file=out, flush=True)

    import torch

    device = "cpu" if arguments.tiny else "cuda"
    asked = json.loads(arguments.worker)
    if device == "cuda" and not torch.cuda.is_available():
        say("refused", reason="there is no GPU that PyTorch can use: --tiny runs a miniature on the CPU")
        return
    from rlzoo.experiments.benchmarks import gpu_correct, gpu_speed

    say("machine", machine=machine(device))
    folder = Path(tempfile.mkdtemp(dir=asked["folder"]))
    setup = Setup(
        device, arguments.tiny, folder, arguments.dtype, arguments.token_budgets, arguments.repeats, arguments.seed
    )
    for label in asked["parts"]:
        started = time.perf_counter()
        say("begin", part=label)
        part, _, size = label.partition(" ")
        found = gpu_speed.PARTS[part](setup, size) if size else gpu_correct.PARTS[part](setup)
        wrong, trace = list[str](), None
        try:
            for finding in found:
                say("finding", part=label, finding=finding.as_dict())
                wrong += [f"{finding.name}: {told}" for told in finding.wrong]
        except Exception as error:
            wrong.insert(0, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
            trace = traceback.format_exc().splitlines()[-30:]
        reason, seconds = (wrong[0] if wrong else None), time.perf_counter() - started
        say("failed" if wrong else "passed", part=label, reason=reason, traceback=trace, seconds=seconds)
        if trace or part == LAST:
            break


def machine(device: str) -> dict[str, Any]:
    """What this ran on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else platform.machine()}
    if device == "cuda":
        found["memory GB"] = torch.cuda.get_device_properties(0).total_memory / 1e9
        found["CUDA"] = torch.version.cuda
    for package in ("torch", "transformers", "trl"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


if __name__ == "__main__":
    main()
