"""``rlzoo doctor``: what works gets a tick, what does not gets its reason and a remedy, and never a traceback."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import forked

from rlzoo.cli import doctor, main, self_test
from rlzoo.cli.doctor import Diagnosis
from rlzoo.training.trackers import PACKAGES

ROOT = Path(__file__).parents[1]
WELL = [Diagnosis("Backends", "CPU", True, "torch")]


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs in a process of its own."""
    monkeypatch.setattr(doctor, "tested_apart", lambda options: iter(WELL))


@pytest.mark.slow
def test_all_is_well_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The whole self-test, in a copy of this process, which has imported everything already."""
    monkeypatch.setattr(self_test, "import_module", lambda name: None)
    apart = forked(lambda: self_test.main(quick=False))
    lines = [json.loads(line) for line in apart.out.splitlines()]
    monkeypatch.setattr(
        doctor, "tested_apart", lambda options: (Diagnosis(**one) for one in lines if "doing" not in one)
    )
    assert main(["doctor", "--json"]) == 0
    out, errors = capfd.readouterr()
    told = json.loads(out)
    assert (told["ok"], errors, apart.errors) == (True, "", "")
    checks = {(check["section"], check["name"]): check for check in told["checks"]}
    assert {"torch", "transformers", "python"} <= {name for section, name in checks if section == "Packages"}
    tested = [name for section, name in checks if section == "Self-test"]
    assert tested == ["model", "training", "checkpoint", "sampling", "reward"]
    assert all(checks["Self-test", name]["ok"] for name in tested)
    assert checks["Backends", "CPU"]["found"].startswith(f"torch {torch.__version__}")


@pytest.mark.usefixtures("apart")
def test_a_missing_package_and_an_old_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["numpy<1", "no-such-package>=3", "torch>=2.8", 'nothing; extra == "lora"']
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    assert main(["doctor", "--quick"]) == 1
    lines, wanted_names = capsys.readouterr().out.splitlines(), ("numpy", "no-such-package")
    numpy, missing = (next(i for i, line in enumerate(lines) if f"✗ {name} " in line) for name in wanted_names)
    assert "rlzoo is tested with <1" in lines[numpy] and lines[numpy + 1].endswith("install 'numpy<1'")
    assert "not installed" in lines[missing] and lines[missing + 1].endswith("install 'no-such-package>=3'")
    assert any("✓ torch " in line for line in lines) and not any("nothing" in line for line in lines)
    assert lines[-1] == "✗ rlzoo needs what failed: numpy, no-such-package"


@pytest.mark.usefixtures("apart")
def test_what_only_hinders_is_shown_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        doctor, "_all", lambda quick: iter([Diagnosis("Backends", "GPU", False, "no", "do", needed=False)])
    )
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "✗ GPU" in told and told.endswith("✓ rlzoo works here\n")


DEATHS = [
    (f"os.kill(os.getpid(), {signal.SIGSEGV.value})", "its process was killed by SIGSEGV"),
    ("raise ImportError('libtorch.so: no such file')", "ended with status 1: ImportError: libtorch.so: no such"),
    ("time.sleep(60)", "did not end within 0 s"),
]


@pytest.fixture
def dies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, bool], None]:
    """Let the process that tests run some code, in the middle of what is needed or not."""

    def with_code(code: str, needed: bool) -> None:
        begun = {"doing": {"section": "Backends", "name": "torch", "needed": needed}}
        script = tmp_path / "python"
        script.write_text(f"#!{sys.executable}\nimport os, time\nprint({json.dumps(begun)!r}, flush=True)\n{code}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        monkeypatch.setattr(doctor, "SECONDS", 0.3 if "sleep" in code else 60)

    return with_code


@pytest.mark.parametrize(("code", "told"), DEATHS)
def test_a_process_that_dies_is_told_in_one_line(code: str, told: str, dies: Callable[[str, bool], None]) -> None:
    dies(code, True)
    (check,) = doctor.tested_apart(["--quick"])
    assert check.ok is False and check.needed
    assert check.name == "torch" or "sleep" in code  # it may have had no time to begin
    assert told in check.found and "\n" not in check.found and "doctor --json" in check.remedy
    assert ("less busy" in check.remedy) is ("sleep" in code)


def test_an_optional_package_that_ends_the_process_hides_nothing_that_is_needed(
    dies: Callable[[str, bool], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(self_test.SelfTest, "checks", lambda test, say: iter(WELL))
    monkeypatch.setattr(self_test, "backends", lambda say: iter(WELL))
    monkeypatch.setattr(self_test, "import_module", lambda name: None)
    said: list[dict[str, Any]] = []
    checks = self_test.checks(lambda name, **how: said.append({"name": name, **how}), quick=False)
    sections = [check.section for check in checks]
    assert set(sections[3:]) == {self_test.OPTIONAL} and sections[:3] == ["Backends", "Backends", self_test.PLUG_INS]
    assert {"name": "peft", "section": self_test.OPTIONAL, "needed": False} in said
    dies(DEATHS[0][0], False)
    (check,) = doctor.tested_apart([])
    assert check.ok is False and not check.needed, "the exit status stays 0"


def test_the_process_runs_the_self_test() -> None:
    assert find_spec(doctor.MODULE) is not None and self_test.__name__ == doctor.MODULE


def test_each_step_that_fails_says_why_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(test: self_test.SelfTest) -> str:
        raise OSError(28, "No space left on device")

    nothing: Callable[[self_test.SelfTest], str] = lambda test: "well"  # noqa: E731
    for name in ("train", "sample", "score"):
        monkeypatch.setattr(self_test.SelfTest, name, nothing)
    monkeypatch.setattr(self_test.SelfTest, "resume", fails)
    said: list[str] = []
    checks = list(self_test.SelfTest(tmp_path).checks(said.append))
    assert said == [check.name for check in checks] == ["model", "training", "checkpoint", "sampling", "reward"]
    assert [check.ok for check in checks] == [True, True, False, True, True]
    assert "No space left on device" in checks[2].found and "TMPDIR" in checks[2].remedy


@pytest.mark.slow
def test_weights_that_are_not_those_that_were_written_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A checkpoint that is not read: the second model is the one before training."""
    test = self_test.SelfTest(tmp_path)
    test.load()
    test.train()
    monkeypatch.setattr(test, "_trained", lambda policy: None)
    with pytest.raises(RuntimeError, match="not those that were written"):
        test.resume()


def test_an_optional_package_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: str) -> Any:
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(self_test, "import_module", broken)
    checks = {check.name: check for check in self_test.optional(lambda name: None)}
    peft = checks["peft"]
    assert (peft.ok, peft.needed) == (False, False)
    assert "libcudart.so.12" in peft.found and "--force-reinstall peft" in peft.remedy


def test_every_extra_has_a_purpose_and_a_command() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(self_test.EXTRAS) == set(project["optional-dependencies"]) - {"dev", "docs", "test"}
    assert set(self_test.TRACKERS) == set(PACKAGES)


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    (check,) = self_test.gpus(lambda name: None)
    assert check.ok is False and not check.needed and "sees no GPU" in check.found and "pytorch.org" in check.remedy
