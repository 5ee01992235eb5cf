"""gpu_check.py: its miniature on the CPU, and what it does with parts that fail, hang or wait."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import forked

from rlzoo import Policy, list_objectives, load_policy
from rlzoo.experiments.benchmarks import gpu_check, gpu_correct
from rlzoo.experiments.benchmarks.activations import per_layer
from rlzoo.experiments.benchmarks.findings import Finding, Setup
from rlzoo.experiments.benchmarks.gpu_speed import in_memory
from rlzoo.experiments.benchmarks.random_models import SHAPES, random_rows
from rlzoo.experiments.benchmarks.steps import Watch
from rlzoo.types import Trajectory


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    command = [sys.executable, gpu_check.__file__, "--tiny", "--limit", "1500", "--part-limit", "600", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == 0 and found["passed"], (found, done.stderr[-2000:])
    return found


def findings(found: dict[str, Any], part: str) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding["values"] for finding in found["parts"][part]["findings"]}


@pytest.mark.slow
def test_every_part_passes_on_the_cpu(tiny: dict[str, Any]) -> None:
    parts = [*gpu_check.CORRECT, *(f"{part} tiny" for part in gpu_check.FAST)]
    assert {part: tiny["parts"][part]["status"] for part in parts} == dict.fromkeys(parts, "passed")


@pytest.mark.slow
def test_gradients_of_objectives_are_those_of_float64(tiny: dict[str, Any]) -> None:
    gaps = findings(tiny, "gradients")
    assert list(gaps) == list_objectives()[::4]
    assert all(0 < gap["float32"] < 1e-4 < gap["bfloat16-mixed"] < 1 for gap in gaps.values()), gaps
    whatever = findings(tiny, "budgets")
    for objective in ("dft", "dpo", "grpo"):
        for dtype, limit in (("float32", 1e-5), ("bfloat16-mixed", 0.1)):
            own = whatever[f"{objective} {dtype}"]
            assert set(own) == {"one row at a time", "some rows", "all rows", "recomputed"}
            assert all(0 < gap < limit for gap in own.values()), own


@pytest.mark.slow
def test_runs_repeat_and_resume_bit_for_bit_and_samples_are_those_of_the_model(tiny: dict[str, Any]) -> None:
    runs = findings(tiny, "determinism")
    assert len(runs) == 2
    for own in runs.values():
        assert own == {"second run equal": 1, "resumed run equal": 1, "steps done again": 0}
    drawn = findings(tiny, "sampler")
    assert drawn["float32"]["drawn"] < 1e-5 and drawn["float32"]["log-probs"] < 1e-4
    assert drawn["bfloat16-mixed"]["drawn"] < 0.05 and drawn["bfloat16-mixed"]["log-probs"] < 0.3
    assert findings(tiny, "compare")["workers"]["failed"] == 0


@pytest.mark.slow
def test_all_engines_are_timed_and_have_one_gradient(tiny: dict[str, Any]) -> None:
    steps = findings(tiny, "steps tiny")
    for objective in ("dft", "dpo", "grpo"):
        for engine in ("rlzoo", "bare loop", "TRL by length"):
            own = steps[f"{objective}: {engine}"]
            assert own["tokens/s"] > 0 and own["of GEMM"] > 0 and own["peak GB"] > 0
            assert engine == "rlzoo" or abs(own["1 - cosine"]) < 1e-4, own
    assert steps["dft: TRL packed"]["tokens/s"] > 0
    decoded = findings(tiny, "decoding tiny")
    assert decoded["rlzoo bfloat16"]["tokens"] == decoded["generate bfloat16"]["tokens"] > 0
    assert decoded["rlzoo bfloat16"]["CUDA graphs"] == 0 < decoded["rlzoo, no graphs bfloat16"]["tokens/s"]


def check(tmp_path: Path, worker: str, **changes: Any) -> dict[str, Any]:
    """What the check makes of a worker, given as the source of a script that gets parts as JSON."""
    script = tmp_path / "worker.py"
    script.write_text(f"import json, sys, time, os\nparts = json.loads(sys.argv[1])['parts']\n{SAY}{worker}")
    given = {"only": ["gradients", "budgets"], "sizes": [], "tiny": True, "limit": 60.0, "part_limit": 60.0}
    arguments = Namespace(**{**given, "json": str(tmp_path / "found.json"), **changes})
    found = gpu_check.Check(arguments, [sys.executable, str(script)]).run()
    assert json.loads((tmp_path / "found.json").read_text()) == found
    return found


SAY = """
def say(event, **what):
    print(json.dumps({"event": event, **what}), flush=True)
def done(part, event="passed", reason=None):
    say(event, part=part, reason=reason, traceback=None, seconds=1.0)
"""


def test_a_part_whose_process_dies_has_failed_and_the_next_one_runs(tmp_path: Path) -> None:
    found = check(
        tmp_path,
        """
say("begin", part=parts[0])
if parts[0] == "gradients":
    finding = {"name": "sft", "values": {"float32": 1e-6}, "at_most": {}, "at_least": {}, "wrong": []}
    say("finding", part="gradients", finding=finding)
    sys.exit("CUDA error: an illegal memory access was encountered")
done(parts[0])
""",
    )
    assert not found["passed"] and found["parts"]["budgets"]["status"] == "passed"
    failed = found["parts"]["gradients"]
    assert failed["status"] == "failed" and [one["name"] for one in failed["findings"]] == ["sft"]
    assert failed["reason"] == "its process ended with status 1: CUDA error: an illegal memory access was encountered"


def test_what_is_found_is_on_disk_while_the_part_goes_on(tmp_path: Path) -> None:
    found = check(
        tmp_path,
        f"""
say("begin", part=parts[0])
finding = {{"name": "sft", "values": {{}}, "at_most": {{}}, "at_least": {{}}, "wrong": []}}
say("finding", part=parts[0], finding=finding)
until = time.monotonic() + 30
while time.monotonic() < until:
    written = json.load(open({str(tmp_path / "found.json")!r}))["parts"].get(parts[0], {{}})
    if written.get("findings") and written["status"] == "running":
        done(parts[0])
        sys.exit()
    time.sleep(0.01)
""",
        only=["gradients"],
    )
    assert found["passed"]


def worked(parts: list[str], folder: Path) -> str:
    """What the check's own worker says, in a copy of this process: of one part that raises and one that does not."""

    def broken(setup: Setup) -> Iterator[Finding]:
        yield Finding("sft", {"gap": 1.0}, at_most={"gap": 0.1})
        raise RuntimeError("CUDA error: device-side assert triggered\nCompile with more")

    def work() -> None:
        gpu_correct.PARTS["gradients"] = broken
        gpu_correct.PARTS["budgets"] = lambda setup: iter([Finding("dft", {"here": setup.device})])
        asked = json.dumps({"parts": parts, "folder": str(folder)})
        given = {"tiny": True, "token_budgets": (0,), "dtype": "float32", "repeats": 1, "seed": 0}
        gpu_check.work(Namespace(worker=asked, **given))

    ended = forked(work)
    assert ended.status == 0, ended.errors
    return ended.out


@pytest.mark.slow
def test_a_part_that_raises_keeps_what_it_found_and_the_next_one_runs(tmp_path: Path) -> None:
    first, second = worked(["gradients", "budgets"], tmp_path), worked(["budgets"], tmp_path)
    assert '"part": "budgets"' not in first, "which may find the GPU unusable"
    found = check(tmp_path, f"print({{2: {first!r}, 1: {second!r}}}[len(parts)], end='')\n")
    failed, passed = (found["parts"][part] for part in ("gradients", "budgets"))
    assert failed["status"] == "failed" and failed["reason"] == "RuntimeError: CUDA error: device-side assert triggered"
    assert failed["findings"][0]["wrong"] == ["gap is 1, above 0.1"] and "in broken" in "".join(failed["traceback"])
    assert passed["status"] == "passed" and findings(found, "budgets")["dft"]["here"] == "cpu"
    assert found["machine"]["torch"] == version("torch") and not found["passed"]


def test_an_engine_gets_half_the_rows_until_they_fit_into_memory(tmp_path: Path) -> None:
    policy, tried = load_policy("embedded"), list[int]()
    setup = Setup("cpu", True, tmp_path, "float32", (0,), 1, 0)

    def run(policy: Policy, rows: list[Trajectory], batch: int, watch: Watch) -> None:
        tried.append(batch)
        if batch > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        for _ in range(2):
            watch.begin()
            watch.end()

    def speed(most: int, least: int) -> dict[str, Any]:
        return in_memory(setup, lambda: policy, random_rows("tiny", 8), None, run, most, least)

    assert speed(16, 4)["setting"] == "micro-batches of 4 rows" and tried == [16, 8, 4]
    assert speed(16, 8) == {"setting": "out of memory with micro-batches of 8 rows"}


@pytest.mark.slow
def test_what_there_is_no_time_for_is_skipped_and_what_hangs_has_failed(tmp_path: Path) -> None:
    hang = "say('begin', part=parts[0])\nif parts[0] == 'gradients':\n    time.sleep(600)\ndone(parts[0])\n"
    found = check(tmp_path, hang, part_limit=3.0)  # time enough for a process to start on a busy machine
    assert [part["status"] for part in found["parts"].values()] == ["failed", "passed"]
    assert found["parts"]["gradients"]["reason"] == "stopped after 3 s"
    found = check(tmp_path, hang, limit=1.0)
    assert [part["status"] for part in found["parts"].values()] == ["skipped", "skipped"]
    assert found["parts"]["budgets"]["reason"] == "the time was up" and not found["passed"]


def test_wrong_arguments_and_a_missing_gpu_have_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="2"):
        check(tmp_path, "say('refused', reason='there is no GPU that PyTorch can use')\n")
    assert "there is no GPU that PyTorch can use" in capsys.readouterr().err
    for wrong, told in (
        (["--only", "gradient"], "there is no part 'gradient': gradients, "),
        (["--sizes", "7b"], "there is no size '7b'"),
        (["--json", str(tmp_path / "none" / "found.json")], "does not exist"),
        (["--token-budgets", "many"], "--token-budgets"),
    ):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *wrong])
        with pytest.raises(SystemExit, match="2"):
            gpu_check.parsed()
        assert told in capsys.readouterr().err


def test_a_value_that_is_no_number_or_beyond_its_bound_is_wrong() -> None:
    good = Finding("sft", {"gap": 0.1, "equal": 1}, at_most={"gap": 0.1}, at_least={"equal": 1})
    assert good.wrong == []
    for bad in (
        Finding("sft", {"gap": float("nan")}, at_most={"gap": 0.1}),
        Finding("sft", {"gap": 0.2}, at_most={"gap": 0.1}),
        Finding("sft", {}, at_most={"gap": 0.1}),
        Finding("sft", {"equal": 0}, at_least={"equal": 1}),
        Finding("sft", {"equal": None}, at_least={"equal": 1}),
    ):
        assert len(bad.wrong) == 1 and json.dumps(bad.as_dict(), allow_nan=False)


def test_a_recomputed_layer_keeps_its_input_and_another_one_far_more() -> None:
    """What docs/speed.md says of activations: a number of 4 or 2 bytes per entry of the hidden states."""
    hidden = SHAPES["tiny"]["hidden_size"]
    assert per_layer("tiny", "bfloat16-mixed, recomputed", 16) == 4 * hidden
    assert per_layer("tiny", "bfloat16, recomputed", 16) == 2 * hidden
    assert 40 * hidden < per_layer("tiny", "bfloat16-mixed", 16) < 80 * hidden  # 72 in transformers 5.0, else 48.5
