"""The part of ``rlzoo doctor`` that needs torch: `python -m rlzoo.cli.self_test` prints its checks, one JSON per line.

A line ``{"doing": {"section": …, "name": …, "needed": …}}`` comes before what may take long, or end the process.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from importlib import import_module
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from rlzoo.cli.doctor import GB, REPORT, Diagnosis, in_range, pip
from rlzoo.registry import one_line

Said = Callable[[str], None]
"""Called with the name of what comes next."""

OPTIONAL, PLUG_INS = "Optional packages", "Plug-ins"
EXTRAS = {
    "inspect": "tasks of inspect as benchmarks",
    "lora": "LoRA adapters (training.lora)",
    "qlora": "LoRA on weights in 4 bits (training.lora.load_in_4bit)",
    "ray": "cells on a Ray cluster (--executor ray)",
    "reasoning-gym": "problems and rewards of reasoning-gym",
    "serve": "the pages of a run in a browser (rlzoo serve)",
    "trl": "TRL's rewards",
    "vllm": "fast sampling on a GPU (rollouts.engine, evaluation.engine)",
}
"""The extras of pyproject.toml that users install, and what each is for."""
TRACKERS = ("tensorboard", "trackio", "wandb")
MODULES = {"inspect-ai": "inspect_ai", "reasoning-gym": "reasoning_gym"}
STEPS = 4


def main(quick: bool) -> None:
    """Print all checks; with ``quick``, only what can be told without training and without importing optional packages.

    Whatever else libraries write to standard output goes to standard error.
    """
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def say(name: str, section: str = "Backends", needed: bool = True) -> None:
        print(json.dumps({"doing": {"section": section, "name": name, "needed": needed}}), file=out)

    for check in checks(say, quick):
        print(json.dumps(asdict(check)), file=out)
    out.close()


def checks(say: Callable[..., None], quick: bool) -> Iterator[Diagnosis]:
    """What rlzoo needs, then the optional packages: one whose import hangs or crashes takes nothing else with it."""
    say("torch")
    yield from backends(say)
    if not quick:
        with tempfile.TemporaryDirectory() as folder:
            yield from SelfTest(Path(folder)).checks(partial(say, section="Self-test"))
    say("plug-ins", section=PLUG_INS, needed=False)
    yield from plug_ins()
    yield from optional(partial(say, section=OPTIONAL, needed=False), quick)


def backends(say: Said) -> Iterator[Diagnosis]:
    """What computes: the CPU and GPUs."""
    import torch

    features = torch.backends.cpu.get_cpu_capability()
    told = f"torch {torch.__version__}, {features}, threads: {torch.get_num_threads()}"
    yield Diagnosis("Backends", "CPU", True, told)
    yield from gpus(say)


def plug_ins() -> Iterator[Diagnosis]:
    """The plug-ins, of installed packages or in rlzoo's own folders, that cannot be used."""
    from rlzoo.cli.catalogue import catalogue

    broken = catalogue()["broken"]
    for row in broken:
        told, _, remedy = row["reason"].rpartition("; ")
        yield Diagnosis(PLUG_INS, "plug-in", False, told, remedy, needed=False)
    if not broken:
        yield Diagnosis(PLUG_INS, "plug-ins", True, "all can be loaded", needed=False)


def optional(say: Said, quick: bool = False) -> Iterator[Diagnosis]:
    """The optional packages, which are imported unless this is to be ``quick``."""
    for name, purpose, range_, how in _optional():
        check = in_range(OPTIONAL, name, range_, needed=False, purpose=purpose)
        if check.found.startswith("not installed"):
            yield Diagnosis(OPTIONAL, name, None, check.found, how, needed=False)
        elif check.ok and not quick:
            say(name)
            yield _imported(check, MODULES.get(name, name))
        else:
            yield check


def _optional() -> Iterator[tuple[str, str, str, str]]:
    """Optional packages: name, purpose, versions that rlzoo is tested with, and how to install it."""
    from packaging.requirements import Requirement

    all_ = [Requirement(text) for text in requires("rlzoo") or ()]
    needed = {one.name for one in all_ if one.marker is None}
    seen = set[str]()
    for extra, purpose in EXTRAS.items():
        for one in all_:
            if one.marker is not None and one.marker.evaluate({"extra": extra}) and one.name not in needed | seen:
                seen.add(one.name)
                yield one.name, purpose, str(one.specifier), f"{pip()} install 'rlzoo[{extra}]'"
    for name in TRACKERS:
        yield name, f"metrics of each step in {name} (training.trackers)", "", f"{pip()} install {name}"


def _imported(check: Diagnosis, module: str) -> Diagnosis:
    """The check of an installed package, after importing it."""
    try:
        import_module(module)
    except Exception as error:
        remedy = f"{pip()} install --force-reinstall {check.name}; without it the rest of rlzoo works"
        return Diagnosis(
            check.section, check.name, False, f"installed, but not usable: {one_line(error)}", remedy, False
        )
    return check


def gpus(say: Said) -> Iterator[Diagnosis]:
    """Each GPU that torch sees, after a matrix product on it; without any, whether there should be one."""
    import torch

    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = f"cuda:{number}"
        say(name)
        try:
            free, whole = torch.cuda.mem_get_info(number)
            ones = torch.ones(64, 64, device=name, dtype=torch.bfloat16)
            assert (ones @ ones).float().sum().item() == 64.0**3
        except Exception as error:
            remedy = "see whether nvidia-smi lists it as healthy; CUDA_VISIBLE_DEVICES chooses other GPUs, or none"
            yield Diagnosis("Backends", name, False, one_line(error), remedy)
            continue
        major, minor = torch.cuda.get_device_capability(number)
        told = f"{torch.cuda.get_device_name(number)}, {whole / GB:.0f} GB, {free / GB:.0f} GB free, sm_{major}{minor}"
        yield Diagnosis("Backends", name, True, told)
    if torch.cuda.is_available():
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        yield Diagnosis(
            "Backends", "GPU", None, "hidden by CUDA_VISIBLE_DEVICES: rlzoo computes on the CPU", needed=False
        )
    elif shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        remedy = "install a build of torch for this driver: https://pytorch.org/get-started/locally"
        told = f"there is an NVIDIA driver, but torch {torch.__version__} {built} and sees no GPU"
        yield Diagnosis("Backends", "GPU", False, told, remedy, needed=False)
    else:
        yield Diagnosis("Backends", "GPU", None, "none: rlzoo computes on the CPU", needed=False)


class SelfTest:
    """A few steps of what rlzoo does, with the embedded model, on the device that a run would use."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is for checkpoints."""
        self.folder = folder
        self.policy: Any = None

    def checks(self, say: Said) -> Iterator[Diagnosis]:
        """One check per step, each with its seconds. Without a model there is nothing else to test."""
        for name, step in self.steps().items():
            say(name)
            started = time.perf_counter()
            try:
                told = step()
            except Exception as error:
                yield Diagnosis("Self-test", name, False, one_line(error), self._remedy(error))
                if self.policy is None:
                    return
            else:
                yield Diagnosis("Self-test", name, True, f"{told} ({time.perf_counter() - started:.1f} s)")

    def steps(self) -> Mapping[str, Callable[[], str]]:
        """The steps by name; each returns what it found, and raises if that is not what it should be."""
        return {
            "model": self.load,
            "training": self.train,
            "checkpoint": self.resume,
            "sampling": self.sample,
            "reward": self.score,
        }

    def load(self) -> str:
        """Load the embedded model."""
        from rlzoo.jobs.pool import silence
        from rlzoo.policy import load_policy

        silence()
        self.policy = load_policy("embedded")
        return f"{sum(p.numel() for p in self.policy.parameters()):,} parameters on {self.policy.device}"

    def train(self) -> str:
        """Train for some steps on demonstrations."""
        losses = [row["loss"] for row in self._trained(self.policy).steps]
        return f"{STEPS} steps of {self._objective}, loss {losses[0]:.3f}, then {losses[-1]:.3f}"

    def resume(self) -> str:
        """Restore the checkpoint of the last step into a second model, which must then be the first."""
        import torch

        from rlzoo.policy import load_policy

        other = load_policy("embedded")
        self._trained(other)
        same = zip(self.policy.parameters(), other.parameters(), strict=True)
        if not all(torch.equal(mine, read) for mine, read in same):
            raise RuntimeError("the weights that were read are not those that were written")
        size = sum(file.stat().st_size for file in self.folder.rglob("*.safetensors"))
        return f"written and read, {size / 1e6:.0f} MB in {self.folder.parent}"

    def sample(self) -> str:
        """Sample two completions of some prompts."""
        from rlzoo.buffers.problems import encode_problems
        from rlzoo.config import Sampling
        from rlzoo.rollout import TransformersSampler

        prompts = [one.ids for one in encode_problems(self.policy.tokenizer, self._problems())]
        settings = Sampling(samples=2, max_new_tokens=16)
        found = TransformersSampler(self.policy).sample(prompts, settings, seed=0)
        return f"{sum(len(one.ids) for some in found for one in some)} tokens by transformers"

    def score(self) -> str:
        """Score a right and a wrong answer in a process with a time and a memory limit."""
        from rlzoo.reward.isolation import Limits, isolated

        reward = isolated("exact-match", Limits())
        found = reward(["1+1=", "1+1="], ["#### 2", "#### 3"], answer=["2", "2"])
        if found != [1.0, 0.0]:
            raise RuntimeError(f"a right and a wrong answer were scored {found}")
        return "a right and a wrong answer in a worker process"

    def _problems(self) -> Any:
        from rlzoo.buffers.problems import load_problems
        from rlzoo.config import ProblemSource

        return load_problems(ProblemSource(source="world:facts/train", limit=8))

    @property
    def _objective(self) -> str:
        """The first objective that learns from demonstrations."""
        from rlzoo.objective import list_objectives, objective_class
        from rlzoo.types import Selection

        return next(n for n in list_objectives() if objective_class(n).learns_from is Selection.DEMONSTRATIONS)

    def _trained(self, policy: Any) -> Any:
        """The record of a training that begins at the newest checkpoint, if there is one."""
        from rlzoo.buffers import OfflineBuffer
        from rlzoo.buffers.problems import demonstrations
        from rlzoo.config import Training
        from rlzoo.objective import get_objective
        from rlzoo.training import train

        rows = OfflineBuffer.from_trajectories(demonstrations(policy.tokenizer, self._problems()))
        settings = Training(steps=STEPS, batch_size=8, learning_rate=1e-3, checkpoint_seconds=0)
        return train(policy, get_objective(self._objective), rows, settings, checkpoints=self.folder)

    def _remedy(self, error: Exception) -> str:
        if isinstance(error, OSError):
            return "set TMPDIR to a folder with room that you may write to"
        if self.policy is None:
            return f"rlzoo's files may be damaged: {pip()} install --force-reinstall --no-deps rlzoo"
        if self.policy.device.type == "cuda":
            return f"CUDA_VISIBLE_DEVICES= rlzoo doctor tests the CPU alone; {REPORT}"
        return REPORT


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
