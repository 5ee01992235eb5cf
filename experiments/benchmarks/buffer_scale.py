"""A buffer on disk at several sizes: memory and time of selecting, shuffling and batching.

    python experiments/benchmarks/buffer_scale.py --rows 10000,100000,1000000
    python experiments/benchmarks/buffer_scale.py --rows 10000,100000 --tokenizer models/SmolLM2-135M-Instruct

A buffer of made-up samples is written first: four per prompt, of GSM8K's size (a prompt of 60 tokens, completions of 20
to 180), with rewards and log-probs. Then a process of its own for each size and each task:

- ``open``: `OfflineBuffer.load`;
- ``correct``, ``pairs``, ``groups``: the view;
- ``epoch``: an epoch's shuffle, and the first ``--batches`` batches of 64 rows, as training draws them.

With ``--tokenizer`` (a model's folder, or ``embedded``) tables are read instead: made-up questions and worked solutions
of GSM8K's size in JSON lines, conversations if the tokenizer has a chat template. ``tokenise`` reads one for the first
time, and ``again`` for the second, from the cache. ``problems`` reads the questions as a problem set with solutions,
and tokenises the prompts.

Memory is what the work adds to the process at its peak, in two parts: its own (anonymous), and the pages of the file
that are mapped, which the system takes back whenever it needs them. Seconds are per task; ``growth`` is the
ratio of the largest size's seconds to the next smaller one's, over the ratio of their rows: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer

from rlzoo.buffers import OfflineBuffer, read_buffer
from rlzoo.buffers.problems import encode_problems, load_problems
from rlzoo.buffers.schema import SCHEMA, to_row
from rlzoo.config import ProblemSource
from rlzoo.experiments.benchmarks.parts import run_part
from rlzoo.training.batches import BufferSource
from rlzoo.types import Selection, Trajectory
from rlzoo.worlds.tokenizer import build_tokenizer

WORK = ("open", "correct", "pairs", "groups", "epoch")
TABLES = ("tokenise", "again", "problems")
SENTENCE = (
    "the boy has twelve apples and gives three of them to his friend each day so how many are left after a week we "
    "compute total cost per hour times number"
)


def trajectories(rows: int) -> Iterator[dict[str, Any]]:
    """Made-up samples, four of each prompt."""
    random = np.random.default_rng(0)
    for i in range(rows):
        tokens = int(random.integers(20, 180))
        ids = random.integers(0, 50_000, tokens).tolist()
        yield to_row(
            Trajectory(
                prompt=f"Problem {i // 4}: " + "what is it then " * 12,
                completion=f"{i}: " + "so it is " * (tokens // 3),
                prompt_ids=list(range(60)), completion_ids=ids, prompt_id=f"problem-{i // 4}", source="policy",
                reward=float(random.random() < 0.4), behaviour_logp=random.normal(-1, 1, tokens).tolist(),
            )
        )  # fmt: skip


def write(rows: int, folder: Path) -> None:
    """A saved buffer, written as a stream."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as cache:
        made = Dataset.from_generator(trajectories, features=SCHEMA, gen_kwargs={"rows": rows}, cache_dir=cache)
        OfflineBuffer(made).save(folder)


def tokenizer_of(name: str) -> Any:
    """The embedded tokenizer, or a model's."""
    return build_tokenizer() if name == "embedded" else AutoTokenizer.from_pretrained(name)


def write_table(rows: int, path: Path, chat: bool) -> None:
    """Made-up questions of 45 words, and solutions of 30 to 110 with a sum every ten words."""
    random = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            words = random.choice(SENTENCE.split(), 45 + int(random.integers(30, 110))).tolist()
            sums = [
                f"{word} {a}+{b}=<<{a}+{b}={a + b}>>"
                for word, (a, b) in zip(words[50::10], pairs(random), strict=False)
            ]
            question, solution = f"Problem {i}: {' '.join(words[:45])}?", " ".join([*words[45:], *sums]) + f"\n#### {i}"
            asked, said = {"role": "user", "content": question}, {"role": "assistant", "content": solution}
            row = {"messages": [asked, said]} if chat else {"prompt": question, "completion": solution}
            file.write(json.dumps(row) + "\n")


def pairs(random: np.random.Generator) -> list[list[int]]:
    """The numbers of a solution's sums."""
    found: list[list[int]] = random.integers(1, 999, (11, 2)).tolist()
    return found


def memory() -> tuple[int, int]:
    """Bytes of this process: its own, and mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, files = (int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return own, files


class Peak:
    """The largest memory while a task runs, looked at a hundred times per second."""

    def __init__(self) -> None:
        self.start = self.own, self.files = memory()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.01):
            own, files = memory()
            self.own, self.files = max(self.own, own), max(self.files, files)

    def end(self) -> tuple[int, int]:
        """What the work added."""
        self._over.set()
        self._thread.join()
        own, files = memory()
        self.own, self.files = max(self.own, own), max(self.files, files)
        return self.own - self.start[0], self.files - self.start[1]


def one(folder: Path, work: str, batches: int) -> dict[str, float]:
    """One task, in this process."""
    buffer = OfflineBuffer.load(folder) if work != "open" else None
    peak, started = Peak(), time.perf_counter()
    if buffer is None:
        buffer = OfflineBuffer.load(folder)
    elif work == "epoch":
        source = BufferSource(buffer, buffer.view(Selection.CORRECT), batch_size=64, seed=0)
        started = time.perf_counter()
        for _ in range(batches):
            source.draw()
    else:
        buffer.view(Selection(work))
    seconds = time.perf_counter() - started
    own, files = peak.end()
    return {"seconds": seconds, "own_bytes": own, "mapped_bytes": files}


def read_table(path: Path, tokenizer: str, as_problems: bool) -> dict[str, float]:
    """A table read in this process, by a tokenizer that was loaded and used."""
    loaded = tokenizer_of(tokenizer)
    loaded(["1 + 1"])
    peak, started, used = Peak(), time.perf_counter(), time.process_time()
    if as_problems:
        source = ProblemSource(
            source=str(path), prompt="prompt", solution="completion", chat=bool(loaded.chat_template)
        )
        problems = load_problems(source)
        encoded = encode_problems(loaded, problems)
        rows = len(encoded)
    else:
        rows = len(read_buffer(str(path), loaded))
    seconds, processor = time.perf_counter() - started, time.process_time() - used
    own, files = peak.end()
    return {
        "rows_per_second": rows / seconds, "rows_per_cpu_second": rows / processor, "own_bytes": own,
        "mapped_bytes": files,
    }  # fmt: skip


def read_tables(sizes: list[int], tokenizer: str) -> dict[str, Any]:
    """Tables of these sizes, each read twice, in processes of their own."""
    found: dict[str, Any] = {}
    chat = bool(tokenizer_of(tokenizer).chat_template)
    with tempfile.TemporaryDirectory() as temporary:
        for size in sizes:
            environment = {**os.environ, "HF_DATASETS_CACHE": f"{temporary}/cache"}
            for work in TABLES:
                path = Path(temporary) / f"{'problems' if work == 'problems' else 'table'}-{size}.jsonl"
                if not path.exists():
                    write_table(size, path, chat and work != "problems")
                options = ["--folder", str(path), "--tokenizer", tokenizer]
                found.setdefault(str(size), {})[work] = run_part(__file__, work, *options, environment=environment)
    return found


def main() -> None:
    """Every task at every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10000,100000", help="comma-separated sizes")
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="keep the buffers here; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--tokenizer", help="read tables instead, with a model's tokenizer, or the embedded one")
    parser.add_argument("--part", choices=(*WORK, *TABLES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part in TABLES:
        as_problems = arguments.part == "problems"
        print(json.dumps(read_table(arguments.folder, arguments.tokenizer, as_problems)))
        return
    if arguments.part:
        print(json.dumps(one(arguments.folder, arguments.part, arguments.batches)))
        return
    sizes = [int(size) for size in arguments.rows.split(",")]
    if arguments.tokenizer:
        print(json.dumps(read_tables(sizes, arguments.tokenizer), indent=None if arguments.json else 1))
        return
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for size in sizes:
            folder = (arguments.folder or Path(temporary)) / f"buffer-{size}"
            if not folder.exists():
                write(size, folder)
            found[str(size)] = {"file_bytes": sum(f.stat().st_size for f in folder.glob("*.arrow"))}
            for work in WORK:
                options = ["--folder", str(folder), "--batches", str(arguments.batches)]
                found[str(size)][work] = run_part(__file__, work, *options)
                if not arguments.json:
                    print(size, work, found[str(size)][work], flush=True)
    if len(sizes) > 1:
        small, large = (found[str(size)] for size in sizes[-2:])
        ratio = sizes[-1] / sizes[-2]
        found["growth"] = {work: large[work]["seconds"] / small[work]["seconds"] / ratio for work in WORK[1:4]}
        found["growth"]["epoch"] = large["epoch"]["seconds"] / small["epoch"]["seconds"]
    print(json.dumps(found, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
