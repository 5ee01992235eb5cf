"""Wrong input, made at random: python tests/fuzz.py --cases 12000 --report docs/fuzzing.md

Each case must either be accepted and read correctly, or be refused with a one-line UserError. Any other exception, a
case that takes more than ten seconds, and input that is accepted but read wrongly are failures, and end the run.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlzoo.buffers import OfflineBuffer, read_buffer
from rlzoo.buffers.problems import Problem, demonstrations, load_problems
from rlzoo.cli.settings import pairs
from rlzoo.config import EXPERIMENTS, Experiment, ProblemSource, load_experiment, read_yaml
from rlzoo.errors import UserError
from rlzoo.jobs.cached_results import CachedResults
from rlzoo.objective import get_objective
from rlzoo.policy import load_policy
from rlzoo.policy.microbatches import log_probs
from rlzoo.reward import get_reward
from rlzoo.training.checkpoints import Checkpoints
from rlzoo.types import Trajectory
from rlzoo.worlds import EMBEDDED_BASE
from rlzoo.worlds.tokenizer import build_tokenizer

CACHE = tempfile.mkdtemp(prefix="rlzoo-fuzz-cache-")
datasets.config.HF_DATASETS_CACHE = Path(CACHE)
datasets.config.HF_HUB_OFFLINE = True
SECONDS = 10
ACCEPTED, REFUSED = "accepted", "refused"
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20),
    st.sampled_from(["", "nan", "1e999", "\0", "../../etc/passwd", "{", "{}", "{a.__class__}", "world:", "sft"]),
    st.just("a" * 5000),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TOKENIZER = build_tokenizer()


class HangError(BaseException):
    pass


@contextmanager
def bounded() -> Iterator[None]:
    """Raise HangError after `SECONDS`."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(work: Callable[[], Any], right: Callable[[Any], bool] = lambda found: True, told: str = "") -> str:
    """What became of a case. Fails for a traceback, a hang, a wrong result, an error that does not name ``told``."""
    try:
        with bounded():
            found = work()
    except UserError as error:
        assert str(error).strip() and told in str(error), f"{str(error)!r} does not name {told!r}"
        return REFUSED
    assert right(found), f"accepted, and wrong: {found!r:.300}"
    return ACCEPTED


def damaged(draw: Callable[..., Any], content: bytes) -> bytes:
    """The content with bytes flipped, cut off, or put in."""
    changed = bytearray(content)
    kind = draw(st.sampled_from(["flip", "cut", "insert", "zero"]))
    place = draw(st.integers(0, max(0, len(changed) - 1)))
    if kind == "flip" and changed:
        changed[place] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        del changed[place:]
    elif kind == "insert":
        changed[place:place] = draw(st.binary(min_size=1, max_size=8))
    else:
        changed[place : place + 16] = bytes(len(changed[place : place + 16]))
    return bytes(changed)


# What is fuzzed: a strategy that draws a case and gives its outcome

EXPERIMENT = read_yaml(EXPERIMENTS / "arithmetic.yaml") | {"name": "arithmetic"}
KEYS = sorted({
    *(f"training.{name}" for name in ("steps", "batch_size", "learning_rate", "betas", "lora", "trackers", "dtype")),
    *(f"rollouts.{name}" for name in ("samples", "top_p", "engine", "url", "engine_options", "prompts")),
    *(f"evaluation.{name}" for name in ("k", "samples", "curve_points", "correct_at")),
    *(f"train.{name}" for name in ("source", "prompt", "columns", "limit", "solution")),
    *EXPERIMENT, "algorithms.sft", "algorithms.sft.options", "algorithms.x.learning_rates", "benchmarks", "seeds",
    "scoring.seconds", "training.nonsense", "nonsense",
})  # fmt: skip


@st.composite
def configuration(draw: Callable[..., Any], folder: Path) -> str:
    """An experiment with some settings replaced by anything."""
    changes = draw(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))

    def work() -> Experiment:
        experiment = load_experiment("arithmetic", changes)
        for name, row in experiment.algorithms.items():
            experiment.training_of(name)
            get_objective(row.objective or name, **row.options)
        get_reward(experiment.reward)
        return experiment

    return outcome(work)


@st.composite
def experiment_file(draw: Callable[..., Any], folder: Path) -> str:
    """An experiment's file, damaged."""
    file = folder / "x.yaml"
    file.write_bytes(damaged(draw, yaml.safe_dump(EXPERIMENT).encode()))
    return outcome(lambda: load_experiment(str(file)), told="x.yaml")


@st.composite
def options(draw: Callable[..., Any], folder: Path) -> str:
    """KEY=VALUE options as the command line takes them, given to an objective."""
    given_options = draw(
        st.lists(st.text(max_size=30) | st.sampled_from(["clip=2", "beta=", "=1", "clip=[", "beta=inf"]))
    )
    name = draw(st.sampled_from(["sft", "dpo", "ppo", "grpo"]) | st.text(max_size=30))
    return outcome(lambda: get_objective(name, **pairs(given_options, "--option")))


LINES = [
    {"id": "1", "prompt": "1+2=?", "completion": "#### 3", "answer": "3"},
    {
        "id": "2",
        "prompt": [{"role": "user", "content": "2+2=?"}],
        "completion": [{"role": "assistant", "content": "4"}],
    },
    {"prompt": "3+4=?", "chosen": "7", "rejected": "8"},
    {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]},
    {"prompt": "p", "completion": "c", "label": True},
]
HUGE = [
    "[" * 100_000,
    '{"a":' * 5_000,
    '{"prompt": ' + "9" * 5_000 + "}",
    '{"prompt": "' + "a" * 2_000_000 + '", "completion": "b"}',
    '{"prompt": -1e400, "completion": NaN}',
    '{"prompt": "p", "completion": "c", "completion": 3}',
    "\ufeff{}",
    "\x85{}",
    "\r\r",
]


@st.composite
def table(draw: Callable[..., Any], folder: Path) -> str:
    """A table of rows of one or of mixed formats with values of any type, as JSONL, JSON or CSV, maybe damaged."""
    rows = [dict(row) for row in draw(st.lists(st.sampled_from(LINES), max_size=4))]
    for row in rows:
        for name, value in draw(
            st.dictionaries(st.sampled_from(sorted({*row, "id", "answer", "x"})), VALUES, max_size=2)
        ).items():
            row[name] = value
    suffix = draw(st.sampled_from([".jsonl", ".jsonl", ".json", ".csv"]))
    if suffix == ".json":
        text = json.dumps(rows)
    elif suffix == ".csv":
        text = "id,prompt,answer\n" + "".join(f"{r.get('id')},{r.get('prompt')},{r.get('answer')}\n" for r in rows)
    else:
        text = "".join(json.dumps(row, ensure_ascii=draw(st.booleans())) + "\n" for row in rows)
    text += draw(st.just("") | st.sampled_from(HUGE))
    content = text.encode("utf-8", "surrogatepass")
    file = folder / f"x{suffix}"
    file.write_bytes(damaged(draw, content) if draw(st.booleans()) else content)
    if draw(st.booleans()):
        return outcome(
            lambda: read_buffer(str(file), TOKENIZER), lambda found: len(list(found)) == len(found), file.name
        )
    column = draw(st.sampled_from(["prompt", "{prompt}?", "{id}", "nothing"]))
    source = ProblemSource(
        source=str(file), prompt=column, solution=draw(st.sampled_from([None, "answer", "completion"]))
    )
    found: list[Problem] = []
    if outcome(lambda: found.extend(load_problems(source)), told=file.name) == REFUSED:
        return REFUSED
    return outcome(lambda: demonstrations(TOKENIZER, found), told="problem ")


ROWS = [
    Trajectory(
        f"prompt {i}", "answer é", [1, 2, i], [3, 4], str(i // 2), source="policy", reward=i / 3,
        reward_components={"exact": i / 3}, behaviour_logp=[-0.5, -1.25], columns={"answer": str(i)},
    )
    for i in range(40)
]  # fmt: skip
SAVED = Path(tempfile.mkdtemp(prefix="rlzoo-fuzz-"))
OfflineBuffer.from_trajectories(ROWS).save(SAVED / "folder")
OfflineBuffer.from_trajectories(ROWS).to_parquet(SAVED / "rows.parquet")
OfflineBuffer.from_trajectories(ROWS).to_jsonl(SAVED / "rows.jsonl")
KEPT = list(OfflineBuffer.load(SAVED / "folder"))


def is_kept(buffer: OfflineBuffer) -> bool:
    return list(buffer) == KEPT


@st.composite
def buffer_folder(draw: Callable[..., Any], folder: Path) -> str:
    """A saved buffer's folder with one file damaged, missing, or too much. Read right, or refused."""
    copy = folder / "buffer"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(SAVED / "folder", copy)
    file = draw(st.sampled_from(sorted(copy.iterdir())))
    kind = draw(st.sampled_from(["damage"] * 8 + ["remove", "add"]))
    if kind == "remove":
        file.unlink()
    elif kind == "add":
        (copy / "more.arrow").write_bytes(b"x")
    else:
        file.write_bytes(damaged(draw, file.read_bytes()))
    return outcome(lambda: OfflineBuffer.load(copy), is_kept, told="buffer")


@st.composite
def parquet(draw: Callable[..., Any], folder: Path) -> str:
    """A buffer's Parquet file, damaged. Read right, or refused."""
    file = folder / "rows.parquet"
    file.write_bytes(damaged(draw, (SAVED / "rows.parquet").read_bytes()))
    return outcome(lambda: OfflineBuffer.load(file), is_kept, told="rows.parquet")


@st.composite
def jsonl(draw: Callable[..., Any], folder: Path) -> str:
    """A buffer's JSONL file, damaged: it is text for people to edit and has no checksum."""
    file = folder / "rows.jsonl"
    file.write_bytes(damaged(draw, (SAVED / "rows.jsonl").read_bytes()))
    return outcome(lambda: list(OfflineBuffer.load(file)), told="rows.jsonl")


STATES = {step: {"w": torch.full((50,), float(step))} for step in (1, 2)}


@st.composite
def checkpoint(draw: Callable[..., Any], folder: Path) -> str:
    """The newest of two checkpoints, damaged: the one before is taken."""
    kept = folder / "checkpoints"
    shutil.rmtree(kept, ignore_errors=True)
    made = Checkpoints(kept, 0)
    for step, tensors in STATES.items():
        made.save(step, tensors, {"note": "x" * 50})
    file = draw(st.sampled_from(sorted(kept.glob("step-00000002.*"))))
    before = file.read_bytes()
    file.write_bytes(damaged(draw, before))
    expected = 2 if file.read_bytes() == before else 1

    def right(found: Any) -> bool:
        return found is not None and found[1]["step"] == expected and bool((found[0]["w"] == expected).all())

    return outcome(lambda: Checkpoints(kept, 0).newest(), right)


@st.composite
def cached_result(draw: Callable[..., Any], folder: Path) -> str:
    """A cached result, damaged: it is not trusted."""
    cached, value = CachedResults(folder / "cached"), draw(VALUES)
    value = cached.write("one", value)
    (file,) = (folder / "cached").iterdir()
    before = file.read_bytes()
    file.write_bytes(damaged(draw, before))
    same = file.read_bytes() == before
    return outcome(lambda: cached.read("one"), lambda found: same or found is None)


@st.composite
def model(draw: Callable[..., Any], folder: Path) -> str:
    """A model's folder with a file damaged, or weights cut short (weights carry no checksum): the same, or refused."""
    copy = folder / "model"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(EMBEDDED_BASE, copy)
    file = draw(st.sampled_from(sorted(p for p in copy.iterdir() if p.suffix in (".json", ".safetensors"))))
    content = file.read_bytes()
    place = draw(st.integers(0, len(content) - 1))
    file.write_bytes(content[:place] if file.suffix == ".safetensors" else damaged(draw, content))

    def runs(policy: Any) -> bool:
        return all(math.isfinite(value) for row in log_probs(policy, [([3, 4, 5], [6, 7])]) for value in row)

    return outcome(lambda: load_policy(str(copy)), runs, told="model")


TARGETS: dict[str, tuple[Callable[[Path], Any], float]] = {
    "settings of an experiment": (configuration, 0.23),
    "an experiment's file, damaged": (experiment_file, 0.1),
    "options of an objective": (options, 0.1),
    "tables in TRL's formats and problem sets": (table, 0.25),
    "a saved buffer, damaged": (buffer_folder, 0.08),
    "a buffer's Parquet file, damaged": (parquet, 0.05),
    "a buffer's JSONL file, damaged": (jsonl, 0.07),
    "a checkpoint, damaged": (checkpoint, 0.05),
    "a cached result, damaged": (cached_result, 0.05),
    "a model's folder, damaged": (model, 0.02),
}
"""What is fuzzed, and its share of the cases."""


def fuzz(name: str, cases: int, folder: Path) -> Counter[str]:
    """Run so many cases of a target; how many were accepted and refused. Raises AssertionError for a failure."""
    make, _ = TARGETS[name]
    counts: Counter[str] = Counter()

    @settings(
        max_examples=cases, database=None, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(make(folder))
    def run(found: str) -> None:
        counts[found] += 1

    run()
    return counts


def main() -> None:
    """Fuzz all targets and write what was counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=12_000)
    parser.add_argument("--only", help="one target")
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    lines, total = [], 0
    for name, (_, share) in TARGETS.items():
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                counts = fuzz(name, round(arguments.cases * share), Path(folder))
            cases, total = sum(counts.values()), total + sum(counts.values())
            lines.append(f"| {name} | {cases:,} | {counts[ACCEPTED]:,} | {counts[REFUSED]:,} |")
            print(lines[-1], flush=True)
    if arguments.report:
        head = "# Random invalid input\n\n" + "\n".join((__doc__ or "").splitlines()[2:])
        head += f"\nMade by `python tests/fuzz.py --cases {arguments.cases}`: {total:,} cases, no failure.\n\n"
        columns = "| input | cases | read correctly | rejected in one line |\n|---|---|---|---|\n"
        arguments.report.write_text(head + columns + "\n".join(lines) + "\n", encoding="utf-8")
    for place in (CACHE, SAVED):
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
