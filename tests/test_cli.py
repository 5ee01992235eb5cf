"""The command line as a user meets it: help, wrong input in one line, and the commands one after the other."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import RLZOO, SMALL_OPTIONS, Copy, forked, inline_pool
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, dynamic_module_utils

from rlzoo.cli import completion, main, tables
from rlzoo.cli.app import parsed
from rlzoo.cli.settings import rows_of
from rlzoo.comparison import runner
from rlzoo.jobs.progress import loading
from rlzoo.objective import list_objectives, objective_class
from rlzoo.reward import list_rewards
from rlzoo.worlds import EMBEDDED_BASE

pytestmark = pytest.mark.usefixtures("sketched")

COMMANDS = (
    "plan", "compare", "variance", "train", "rollout", "evaluate", "report", "results", "list", "new", "doctor",
    "import", "rescore", "buffer", "serve",
)  # fmt: skip
HEAVY = ("torch", "transformers", "datasets", "pyarrow", "matplotlib")
BEAT = re.compile(r"  \d+:\d\d:\d\d ")
"""What a log shows of long work now and then."""
Fails = Callable[..., str]


@pytest.fixture(autouse=True)
def leave_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """``main`` changes sys.path and a signal handler, which is right for a command and not for a test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fails:
    """Run a command that must fail: status 2, one line on standard error, nothing written. Gives the line."""
    monkeypatch.setattr(runner, "pool", inline_pool)

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        capfd.readouterr()
        status = main(arguments)
        _, errors = capfd.readouterr()
        assert status == 2
        assert errors.startswith("rlzoo: ") and errors.count("\n") == 1, errors
        assert sorted(tmp_path.rglob("*")) == before
        return errors

    return run


# Help


def test_an_objective_that_the_experiment_does_not_name_gets_its_defaults() -> None:
    rows = rows_of(["SFT", "dft-control"], {"sft": {"learning_rates": [1.0]}})
    assert rows == {"sft": {"learning_rates": [1.0]}, "dft-control": {"objective": "dft-control"}}


WRONG = ["compare nowhere.yaml", "plan --set stepz=1", "variance --set training.steps=x", "evaluate --k 1,x",
         "variance --draws 128", "variance --rows 0", "evaluate --seed -1",
         "rollout --set rollouts.stepz=1 --out x", "train sft --buffer x --set training.steps=-1 --out x"]  # fmt: skip


def test_help_and_wrong_settings_import_nothing_heavy() -> None:
    code = (
        "import sys\nfrom rlzoo.cli import main\n"
        "assert main(['compare', '--help']) == main(['--version']) == main([]) == 0\n"
        f"assert [main(words.split()) for words in {WRONG}] == [2] * {len(WRONG)}\n"
        f"assert not set({HEAVY}) & set(sys.modules), sorted(set({HEAVY}) & set(sys.modules))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert all(f"  {command} " in run.stdout for command in COMMANDS)
    assert max(map(len, run.stdout.splitlines())) <= 80


def test_results_are_read_without_torch() -> None:
    code = (
        "import sys\nfrom rlzoo.cli import main\n"
        "assert main(['results', 'list']) == 0\n"
        "assert main(['report', 'nowhere']) == main(['serve', 'nowhere']) == 2\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_notebook_gets_lines_in_place_of_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.delenv("TTY_COMPATIBLE")  # what `main` sets is unset again after the test
    terminal = StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    assert Console(file=terminal).is_terminal
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert main(["--version"]) == 0
    assert not Console(file=terminal).is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_is_told_that_libraries_are_being_loaded(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    with loading():
        told = capsys.readouterr().err
    erased = f"\r{' ' * len(told)}\r"
    assert (told, capsys.readouterr().err) == (
        ("loading PyTorch and transformers", erased) if is_terminal else ("", "")
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_and_ends_with_examples_that_parse(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "-h"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text and not set(text) & set("╭─│╰")
    _, examples = text.split("\nExamples:\n")
    for example in examples.splitlines():
        _, *words = example.partition(" > ")[0].split()
        assert words[0] == command and parsed(words) is not None


def test_a_tilde_that_the_shell_leaves_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    command = parsed(["compare", "--out=~/runs/mine"])
    assert command is not None and command.keywords["out"] == tmp_path / "runs" / "mine"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlzoo {version('rlzoo')}\n"


@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colours_are_for_terminals(environment: dict[str, str], coloured: bool) -> None:
    """Help on a pseudo-terminal, and a table."""
    code = "from rlzoo.cli import main; from rlzoo.cli.help import is_rich; main([]); print(f'rich: {is_rich()}')"
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.pop("NO_COLOR", None)
        os.environ.update({"TERM": "xterm-256color", **environment})
        os.execv(sys.executable, [sys.executable, "-c", code])
    shown = b""
    with suppress(OSError):  # the end of the other side
        while part := os.read(terminal, 1 << 16):
            shown += part
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (b"\x1b[" in shown) is coloured and b"Options" in shown and f"rich: {coloured}".encode() in shown


@pytest.mark.parametrize("rich", [True, False])
def test_tables_have_lines_on_terminals(rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "is_rich", lambda: rich)
    table = Table("algorithm", "seeds", box=SIMPLE_HEAD)
    table.add_row("sft", "3")
    out = StringIO()
    tables.show(Console(file=out), [table])
    assert ("─" in out.getvalue()) is rich and "sft" in out.getvalue() and ("--" in out.getvalue()) is not rich


@pytest.mark.parametrize("is_terminal", [True, False])
def test_tables_are_cut_at_the_width_of_a_terminal_only(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table, names = Table("study", "model"), ("s" * 60, "m" * 60)
    table.add_row(*names)
    out = StringIO()
    tables.show(Console(file=out, force_terminal=is_terminal), [table])
    assert all(name in out.getvalue() for name in names) is not is_terminal


def test_a_reader_that_has_gone_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)

    def listed() -> int:
        os.dup2(write, 1)
        return main(["list"])

    done = forked(listed)
    os.close(write)
    assert (done.status, done.errors) == (141, "")


# Completion


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("rlzoo co", {"compare"}),
        ("rlzoo compare ari", {"arithmetic"}),
        ("rlzoo compare --algorithms sft,iw", {"sft,iw-sft"}),
        ("rlzoo compare --algorithms sft,sf", {"sft,sft-q"}),
        ("rlzoo variance --objectives gr", {"grpo"}),
        ("rlzoo evaluate --reward exa", {"exact-match"}),
        ("rlzoo train gr", {"grpo"}),
        ("rlzoo train sft --bad-rows ", {"reject", "drop"}),
        ("rlzoo compare --set rollouts.temp", {"rollouts.temperature="}),
        ("rlzoo train sft --set training.warm", {"training.warmup_ratio="}),
        ("rlzoo rollout --rollout-s", {"--rollout-samples"}),
    ],
)
def test_completion(
    line: str, offered: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "_RLZOO_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(line.count(" ")),
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0
    assert set(capsys.readouterr().out.split()) == offered


def test_all_names_are_completed() -> None:
    """They are read from the names of files."""
    built_in = {name for name in list_objectives() if objective_class(name).__module__.startswith("rlzoo.algorithms.")}
    assert built_in <= set(completion.objectives("")) and "grpo" in built_in
    assert {"exact-match", "weighted"} <= set(completion.rewards("")) <= set(list_rewards())


@pytest.mark.slow
def test_completion_is_installed_for_the_shell(tmp_path: Path) -> None:
    if (bash := shutil.which("bash")) is None:
        pytest.skip("needs bash")
    (tmp_path / "rlzoo").write_text(f'#!{bash}\nexec {shlex.join(RLZOO)} "$@"\n')
    (tmp_path / "rlzoo").chmod(0o755)
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(code: str) -> str:
        done = subprocess.run([bash, "-c", f"{code}; exit $?"], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "complete_bash" in run("rlzoo --show-completion")
    run("rlzoo --install-completion")
    assert "bash_completions" in (tmp_path / ".bashrc").read_text()
    ask = "COMP_WORDS=(rlzoo compare ari); COMP_CWORD=2; $(complete -p rlzoo | sed 's/.*-F \\([^ ]*\\).*/\\1/') rlzoo"
    assert (
        run(f'. .bashrc; {ask}; echo "${{COMPREPLY[@]}}"'.replace(". .bashrc", f". {tmp_path}/.bashrc"))
        == "arithmetic\n"
    )


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        "objectives",
        "rewards",
        "metrics",
        "views",
        "samplers",
        "log_formats",
        "suites",
        "experiments",
        "broken",
    }
    objectives = {row["name"]: row for row in found["objectives"]}
    assert {"sft", "dft", "iw-sft", "rft", "dpo", "ppo", "grpo"} <= set(objectives)
    assert objectives["grpo"]["options"]["clip"] == {"type": "float", "default": 0.2}
    assert {"exact-match", "math-answer"} <= {row["name"] for row in found["rewards"]}
    assert objectives["grpo"]["options"]["kl_estimator"]["type"] == "Literal['k1', 'k2', 'k3']"
    assert {"avg_at_k", "maj_at_k"} <= {row["name"] for row in found["metrics"]}
    assert {"arithmetic", "facts", "paper/lora"} <= {row["name"] for row in found["experiments"]}
    suites = {row["name"]: row for row in found["suites"]}
    assert suites["math500"]["settings"]["source"] == "HuggingFaceH4/MATH-500" and suites["svamp"]["licence"] == "MIT"


def test_list_as_text_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("iw-sft", "kl_coefficient=0.04", "exact-match", "maj_at_k", "arithmetic"))


# Wrong input


BEFORE_THE_MODEL: list[tuple[str, tuple[str, ...]]] = [
    ("missing.jsonl does not exist", ("train", "sft", "--buffer", "missing.jsonl", "--out", "out")),
    (
        "needs per_prompt of at least 1",
        ("train", "rft", "--option", "samples_per_prompt=0", "--buffer", "x", "--out", "out"),
    ),
    ("missing.jsonl does not exist", ("variance", "facts", "--buffer", "missing.jsonl")),
    ("missing.jsonl does not exist", ("compare", "facts", "--set", "demonstrations.source=missing.jsonl")),
    ("unknown classes of tokens 'defalt': did you mean", ("variance", "facts", "--token-classes", "defalt")),
    ("engine vllm is not installed", ("rollout", "facts", "--set", "rollouts.engine=vllm", "--out", "out")),
    ("engine vllm is not installed", ("evaluate", "facts", "--set", "evaluation.engine=vllm")),
]
"""What is told before a model is loaded: the model of these commands cannot be."""
SPECS: Sequence[tuple[str, tuple[str, ...]]] = [
    ("unknown command 'comprae': did you mean compare?", ("comprae",)),
    ("unknown command 'frob'; see rlzoo --help", ("frob",)),
    ("unknown option --stpes: did you mean --steps? see rlzoo compare --help", ("compare", "--stpes", "3")),
    ("unknown option --nothing; see rlzoo --help", ("--nothing",)),
    ("missing OBJECTIVE; see rlzoo train --help", ("train",)),
    ("missing --buffer", ("train", "sft", "--out", "out")),
    ("--executor: 'rya' is not one of 'local', 'ray'", ("compare", "--executor", "rya")),
    ("--address names a Ray cluster", ("compare", "--address", "host:1")),
    ("unknown experiment 'facs': did you mean 'facts'?", ("compare", "facs")),
    ("'missing.yaml' cannot be read", ("compare", "missing.yaml")),
    ("unknown objective 'sfft': did you mean 'sft'?", ("compare", "facts", "--algorithms", "sfft")),
    ("unknown objective ''", ("compare", "facts", "--algorithms", "")),
    ("names 'sft' twice", ("compare", "facts", "--algorithms", "sft,SFT")),
    ("objective file", ("compare", "facts", "--algorithms", "missing.py:Mine")),
    ("'no_such_module' cannot be imported", ("compare", "facts", "--algorithms", "no_such_module:Mine")),
    ("unknown reward 'exact-mach'", ("compare", "facts", "--reward", "exact-mach")),
    ("option of objective 'grpo' 'clipp'", ("compare", "facts", "--set", "algorithms.grpo.options.clipp=1")),
    ("setting of training in facts.yaml 'stepz'", ("compare", "facts", "--set", "training.stepz=3")),
    ("'stepz': did you mean 'steps'?", ("compare", "facts", "--set", "algorithms.sft.training={stepz: 3}")),
    ("--set 'training.steps'", ("compare", "facts", "--set", "training.steps")),
    ("not valid YAML", ("compare", "facts", "--set", "seeds=[1")),
    ("training.steps = 0", ("compare", "facts", "--steps", "0")),
    ("--steps: 'abc' is not a whole number; see rlzoo compare --help", ("compare", "facts", "--steps", "abc")),
    (
        "--set lerning_rate: unknown setting: did you mean training.learning_rate?",
        ("compare", "--set", "lerning_rate=1"),
    ),
    ("--set traning.steps: unknown setting: did you mean training.steps?", ("compare", "--set", "traning.steps=1")),
    ("--set samples could mean rollouts.samples or evaluation.samples", ("compare", "--set", "samples=1")),
    ("train.limit = 0", ("compare", "facts", "--limit", "0")),
    ("k = 9 needs at least 9 samples", ("compare", "facts", "--samples", "4", "--k", "9")),
    ("k = 9 needs at least 9 samples", ("compare", "facts", "--samples", "4", "--k", "1,9")),
    ("--k: 'two' is not a whole number", ("compare", "facts", "--k", "1,two")),
    ("evaluation.k: [2, 2] is neither", ("evaluate", "facts", "--k", "2,2")),
    ("seeds repeat: [1, 1]", ("compare", "facts", "--seeds", "1,1")),
    ("--seeds: 'one' is not a whole number", ("compare", "facts", "--seeds", "one")),
    ("--seeds: '1.5' is not a whole number", ("compare", "facts", "--seeds", "1.5")),
    ("--seeds: '' is not a whole number", ("compare", "facts", "--seeds", "")),
    ("seeds.0 = -1", ("compare", "facts", "--seeds=-1")),
    ("--learning-rates: 'fast' is not a number", ("compare", "facts", "--learning-rates", "fast")),
    ("learning rates of 'sft' repeat", ("compare", "facts", "--learning-rates", "1e-4,0.0001")),
    ("needs a validation", ("compare", "facts", "--learning-rates", "1e-4,1e-3", "--set", "validation=null")),
    ("--workers: 0 is too few", ("compare", "facts", "--workers", "0")),
    ("unknown baseline 'dtf'", ("compare", "facts", "--set", "baseline=dtf")),
    ("mode must be offline", ("compare", "facts", "--set", "algorithms.sft.mode=online")),
    ("algorithms.base", ("compare", "facts", "--set", "algorithms.base.objective=sft")),
    ("missing.jsonl does not exist", ("compare", "facts", "--data", "missing.jsonl")),
    ("unknown world 'facts/tset'", ("compare", "facts", "--test-data", "world:facts/tset")),
    ("--out 'taken' exists already", ("compare", "facts", "--out", "taken")),
    ("--out 'file/out' cannot be written", ("compare", "facts", "--out", "file/out")),
    ("model './missing' cannot be loaded", ("compare", "facts", "--model", "./missing")),
    ("model 'damaged' cannot be loaded", ("compare", "facts", "--model", "damaged")),
    ("model 'bare' cannot be loaded", ("evaluate", "facts", "--limit", "2", "--model", "bare")),
    ("unknown experiment 'facs'", ("evaluate", "facs")),
    ("--json and --markdown: give one of them", ("list", "--json", "--markdown")),
    ("--json is for list, show and compare", ("results", "export", "arithmetic", "--json")),
    ("KIND: 'optimizer' is not one of 'objective'", ("new", "optimizer", "mine")),
    ("unknown objective 'sfft'", ("train", "sfft", "--buffer", "missing", "--out", "out")),
    ("option of objective 'grpo' 'clipp'", ("train", "grpo", "--option", "clipp=1", "--buffer", "x", "--out", "out")),
    ("unknown option of objective 'sft' 'name'", ("train", "sft", "--option", "name=x", "--buffer", "x", "--out", "o")),
    ("missing does not exist", ("train", "sft", "--buffer", "./missing", "--out", "out")),
    ("training.learning_rate = 0.0", ("train", "sft", "--learning-rate", "0", "--buffer", "x", "--out", "out")),
    ("--learning-rate: 'fast' is not a number", ("train", "sft", "--learning-rate", "fast", "--buffer", "x")),
    ("did you mean options.clip?", ("train", "grpo", "--set", "clip=1", "--buffer", "x", "--out", "out")),
    ("--column says what the columns of --data", ("compare", "facts", "--column", "prompt=question")),
    (
        "learning rates would be chosen on world:facts/validation and not on problems of yours: give some, with --set",
        ("compare", "facts", "--data", "x.jsonl", "--learning-rates", "1e-4,1e-3"),
    ),
    ("--column 'prompt': write NAME=COLUMN", ("compare", "facts", "--data", "x.jsonl", "--column", "prompt")),
    ("--out 'taken' exists already", ("rollout", "facts", "--limit", "2", "--out", "taken")),
    ("--out 'file/out' cannot be written", ("rollout", "facts", "--limit", "2", "--out", "file/out")),
    ("--seed: -1 is no seed: give a whole number from 0 to 4294967295", ("evaluate", "facts", "--seed", "-1")),
    ("seed = -1: Input should be greater", ("train", "sft", "--buffer", "x", "--set", "seed=-1", "--out", "out")),
    ("draws: 128 are too few for a variance and its error: give 0 or at least 256", ("variance", "--draws", "128")),
    *((told, (*arguments, "--model", "damaged")) for told, arguments in BEFORE_THE_MODEL),
    ("run directory 'missing' does not exist", ("report", "missing")),
    ("'taken' has no results.json", ("report", "taken")),
]


@pytest.fixture
def things(tmp_path: Path) -> None:
    """What the wrong input refers to."""
    for folder in ("taken", "bare", "damaged"):
        (tmp_path / folder).mkdir()
    (tmp_path / "taken" / "something").write_text("mine")
    (tmp_path / "file").write_text("a file")
    for file in EMBEDDED_BASE.iterdir():
        shutil.copy(file, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


@pytest.mark.usefixtures("things")
@pytest.mark.parametrize(("told", "arguments"), SPECS, ids=[" ".join(arguments) for _, arguments in SPECS])
def test_wrong_input_is_told_in_one_line(told: str, arguments: tuple[str, ...], fails: Fails) -> None:
    assert told in fails(*arguments)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: embedded\ntrain: {source: [\n", "bad.yaml: line 3: not valid YAML"),
        ("- a list\n", "an experiment is a mapping of settings, not list"),
        ("model: embedded\n", "bad.yaml: train is missing: give it"),
        ("model: embedded\nalgorithm: {}\n", "unknown setting in bad.yaml 'algorithm': did you mean 'algorithms'?"),
        ("", "an experiment is a mapping of settings, not NoneType"),
    ],
)
def test_a_wrong_experiment_file(text: str, told: str, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert told in fails("compare", "bad.yaml")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "data.jsonl has no rows: it is empty"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": \n', "data.jsonl line 2 is not JSON"),
        (
            '{"question": "a", "answer": "b"}\n',
            "data.jsonl line 1: no column 'prompt'; it has: question, answer; say which is the prompt, with --column ",
        ),
        ('{"prompt": "a"}\n', "needs the column 'answer'"),
    ],
)
def test_wrong_data(text: str, told: str, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    assert told in fails("compare", "facts", "--data", "data.jsonl", "--out", "out")


PLUGINS = [
    ("def f(:\n", "mine.py' cannot be loaded: SyntaxError"),
    ("raise RuntimeError('two\\nlines')\n", "mine.py' cannot be loaded: RuntimeError: two lines"),
    ("import sys; sys.exit()\n", "mine.py' cannot be loaded: SystemExit"),
    ("Other = 1\n", "mine.py has no 'Mine'; it has: Other"),
    ("import rlzoo\nfrom dataclasses import dataclass\nclass Other: pass\n", "has no 'Mine'; it has: Other\n"),
    ("class Mine: pass\n", "is not a subclass of rlzoo.Objective"),
    ("import rlzoo\nclass Mine(rlzoo.Objective): name = 'mine'\n", "does not define coefficients"),
    ("import rlzoo\nclass Mine(rlzoo.Objective):\n    def coefficients(self, batch): ...\n", "has no name"),
]


@pytest.mark.parametrize("option", ["--algorithms", "--reward"])
def test_a_file_without_the_name_of_what_it_has(option: str, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def mine(completions): ...\n")
    assert "'mine.py': write mine.py:Name; it has: mine\n" in fails("compare", "facts", option, "mine.py")


@pytest.mark.parametrize(("text", "told"), PLUGINS)
def test_a_broken_objective(text: str, told: str, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text)
    assert told in fails("compare", "facts", "--algorithms", "mine.py:Mine", "--out", "out")


REWARDS = [
    ("return [1.0]", "returned 1 values for 2 completions"),
    ("return ['good' for _ in completions]", "returned 'good' on row 0"),
    ("raise KeyError('oh')", "raised on row 0, an empty completion: KeyError: 'oh' (mine.py line 2)"),
    ("return 1.0", "returned float for 2 completions"),
]


@pytest.mark.parametrize(("body", "told"), REWARDS)
def test_a_broken_reward(body: str, told: str, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"def mine(completions, **columns):\n    {body}\n")
    assert told in fails("compare", "facts", "--reward", "mine.py:mine", "--out", "deep/out")


@pytest.mark.slow
@pytest.mark.usefixtures("copied")
def test_a_reward_that_breaks_in_a_worker(tmp_path: Path) -> None:
    """Its message comes from another process, alone, and says whether the output folder is still there."""
    (tmp_path / "mine.py").write_text(
        "def mine(completions, **columns):\n    return [1.0] * len([c for c in completions if not c])\n"
    )
    command = ["compare", "facts", *SMALL_OPTIONS, "--algorithms", "sft", "--reward", "mine.py:mine"]
    run = forked(lambda: main([*command, "--workers", "1", "--out", "deep/out"]))
    assert run.status == 2
    last = run.errors.splitlines()[-1]
    assert last.startswith("rlzoo: reward 'mine' returned") and "Traceback" not in run.errors
    kept = "finished work is kept: the same command with --out deep/out resumes there" in last
    assert (tmp_path / "deep").exists() is kept, "the buffer may have been ready"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_saves_what_was_done_and_says_so_once(
    tmp_path: Path, number: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compare", "facts", "--algorithms", "sft", *SMALL_OPTIONS, "--steps", "100000", "--out", "out"]
    command += ["--workers", "1", "--set", "training.checkpoint_seconds=0.5"]
    if number == signal.SIGTERM:  # which comes to one process alone, however the others have started
        monkeypatch.setattr("rlzoo.jobs.pool.START", "fork")

    def compared() -> int:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have told the tests to ignore it
        return main(command)

    run = Copy(compared)
    waits_for(lambda: any("base model: " in line and not BEAT.match(line) for line in run.errors().splitlines()))
    waits_for(lambda: any(tmp_path.rglob("step-*.result")))  # after the plan: the shared work is done
    if number == signal.SIGINT:
        os.killpg(run.pid, number)  # a terminal sends it to the whole group
    else:
        os.kill(run.pid, number)
    ended = run.ended()
    assert ended.status == status, ended.errors
    kept = "finished work is kept: the same command with --out out resumes there"
    lines = [line for line in ended.errors.splitlines() if not BEAT.match(line)]
    *waiting, last = lines[1 + next(n for n, line in enumerate(lines) if "base model: " in line) :]
    assert last == f"rlzoo: interrupted; {kept}"
    assert [line for line in waiting if not line.startswith("stopping ")] == []
    assert any(tmp_path.rglob("step-*.result"))
    waits_for(lambda: _group_is_gone(run.pid))


def waits_for(holds: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait until something holds, for so long at most."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def _group_is_gone(group: int) -> bool:
    """Whether no process of the group lives."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_nothing_that_was_done(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file system of some megabytes, full in the middle of a training's checkpoints; with room the run goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        main(["rollout", "facts", "--limit", "6", "--set", "rollouts.samples=4", "--out", str(tmp_path / "buffer")])
        train = ["train", "rft", "--buffer", str(tmp_path / "buffer"), "--steps", "4", "--set", "batch_size=6"]
        train += ["--set", "checkpoint_seconds=0", "--out"]
        assert main([*train, str(tmp_path / "whole")]) == 0
        capfd.readouterr()
        assert main([*train, str(disk / "out")]) == 2
        told = capfd.readouterr().err
        assert told.count("\n") == 1
        assert "cannot be written (No space left on device)" in told and "resumes there" in told
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert main([*train, str(disk / "out")]) == 0 and "step 1/" not in capfd.readouterr().out
        one, two = ((place / "model.safetensors").read_bytes() for place in (tmp_path / "whole", disk / "out"))
        assert one == two
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# The commands one after the other


@pytest.mark.slow
def test_rollout_train_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["facts", "--limit", "8", "--set", "rollouts.samples=4"]
    assert main(["rollout", *small, "--out", "buffer"]) == 0
    assert "32 samples of 8 prompts" in capsys.readouterr().out
    assert main(["rollout", *small, "--out", "rows.jsonl"]) == 0
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 32

    train = ["--steps", "2", "--set", "batch_size=8", "--learning-rate", "0.01"]
    assert main(["train", "grpo", "--buffer", "buffer", *train, "--option", "clip=0.3", "--out", "trained"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "saved to trained"
    summary = json.loads((tmp_path / "trained" / "training.json").read_text())
    assert [row["step"] for row in summary["steps"]] == [1, 2]
    before = AutoModelForCausalLM.from_pretrained(EMBEDDED_BASE).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before)

    evaluation = ["evaluate", "facts", "--model", "trained", "--limit", "4", "--samples", "2", "--k", "1,2"]
    capsys.readouterr()
    assert main([*evaluation, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert list(scores) == ["facts", "unseen-facts", "chain-sums"] and scores["facts"]["k"] == 1
    assert main(evaluation) == 0
    shown = f"facts: avg@2 {scores['facts']['avg_at_k']:.1%}  greedy {scores['facts']['greedy']:.1%}"
    told = capsys.readouterr().out
    assert told.startswith(shown)
    facts = scores["facts"]
    assert f"pass@1 {facts['pass_at_k']:.1%}" in told and f"pass@2 {facts['pass_at_2']:.1%}" in told
    assert f"maj@2 {facts['maj_at_k']:.1%}  maj@1 {facts['maj_at_1']:.1%}" in told
    assert f"  mean length {facts['mean_length']:.4g} tokens" in told
    assert f"held-out log-likelihood {scores['facts']['log_likelihood']:.4g} nats per token" in told
    assert f"\nretention, chain-sums: avg@2 {scores['chain-sums']['avg_at_k']:.1%}" in told


def test_a_tracker_that_is_not_installed_is_told_before_the_model_is_loaded(
    fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlzoo.training.trackers.find_spec", lambda name: None)
    command = ["train", "sft", "--buffer", "x", "--out", "out", "--model", "./missing"]
    told = fails(*command, "--set", "training.trackers=[wandb]")
    assert "training.trackers: wandb is not installed: pip install wandb" in told


def test_train_that_fails_leaves_nothing(fails: Fails, tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert "the buffer has no" in fails("train", "grpo", "--buffer", "rows.jsonl", "--out", "new/trained")


REMOTE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).with_name("ran").touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.slow
def test_the_code_of_a_model_is_run_by_its_flag_alone(tmp_path: Path, fails: Fails) -> None:
    folder, cache = tmp_path / "own", tmp_path / "cache"
    shutil.copytree(EMBEDDED_BASE, folder)
    cache.mkdir()
    (folder / "own.py").write_text(REMOTE.replace("Path(__file__).with_name", f"Path({str(folder)!r}).joinpath"))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    command = ["evaluate", "arithmetic", "--model", str(folder), "--limit", "2", "--samples", "1"]
    told = fails(*command)
    assert "trust" in told and not (folder / "ran").exists()
    assert "--trust-remote-code" in fails(*command, "--set", "evaluation.engine=vllm",
                                          "--set", "evaluation.engine_options={trust_remote_code: true}")  # fmt: skip

    def trusting() -> int:
        dynamic_module_utils.HF_MODULES_CACHE = str(cache)  # where transformers keeps the code that it copies
        return main([*command, "--trust-remote-code"])

    done = forked(trusting)
    assert done.status == 0, done.errors
    assert (folder / "ran").exists()
