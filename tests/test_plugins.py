"""Rewards and objectives of a user's own, used with no other change: by file, by module and by entry point."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from comparisons import SMALL_OPTIONS, forked

from rlzoo import objective as objective_module
from rlzoo import registry as registry_module
from rlzoo.buffers.problems import world_problems
from rlzoo.cli import main, self_test
from rlzoo.errors import UserError
from rlzoo.objective import get_objective, list_objectives, objective_class, options_of
from rlzoo.reward import get_reward
from rlzoo.types import TokenBatch

pytestmark = pytest.mark.usefixtures("sketched")

REWARD = """\
def starts_right(completions, answer, **columns):
    return [float(c.strip()[:1] == a[:1]) for c, a in zip(completions, answer)]
"""

OBJECTIVE = """\
from dataclasses import dataclass
import rlzoo

@rlzoo.register
@dataclass(frozen=True)
class Tempered(rlzoo.Objective):
    name = "tempered"
    power: float = 0.5
    def coefficients(self, batch):
        return rlzoo.Coefficients((self.power * batch.logp).exp())
"""


def test_plugins_fit_ten_lines() -> None:
    assert len(REWARD.splitlines()) <= 10 and len(OBJECTIVE.splitlines()) <= 10


@pytest.mark.slow
def test_files_and_a_package_beside_the_user(tmp_path: Path) -> None:
    """``rlzoo compare`` in the user's folder, with a worker process, which must find all of it too."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "reward.py").write_text(REWARD)
    (tmp_path / "objective.py").write_text(OBJECTIVE)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "objectives.py").write_text(OBJECTIVE.replace("tempered", "packaged"))
    algorithms = "sft,objective.py:Tempered,my_package.objectives:Tempered"
    options = ["--reward", "mine/reward.py:starts_right", "--algorithms", algorithms]
    option = ["--workers", "1", "--set", "algorithms.tempered.options.power=0.25"]
    command = ["compare", "facts", *SMALL_OPTIONS, *options, *option, "--out", "out"]

    def compared() -> int:
        os.chdir(tmp_path)
        return main(command)

    run = forked(compared)
    assert run.status == 0, run.errors
    assert "report: out/report.html" in run.out

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["failed"] == []
    assert [cell["algorithm"] for cell in results["cells"]] == ["sft", "tempered", "packaged"]
    assert results["config"]["reward"] == "mine/reward.py:starts_right"
    rows = pq.read_table(tmp_path / "out" / "outcomes.parquet").to_pylist()
    answers = {p.id: p.columns["answer"] for split in ("test", "unseen") for p in world_problems(f"facts/{split}")}
    assert len(rows) > 0
    for row in (row for row in rows if not row["retention"]):  # scored by the user's reward, in its own process
        assert row["reward"] == float(row["text"].strip()[:1] == answers[row["problem_id"]][:1])


# In this process


@pytest.fixture
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    list_objectives()
    entries = objective_module._objectives._entries
    monkeypatch.setattr(objective_module._objectives, "_entries", dict(entries))
    monkeypatch.setattr(objective_module._objectives, "_broken", {})


Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, fresh_registry: None) -> Write:
    """Write a file and name its ``Mine``."""

    def spec(text: str) -> str:
        (tmp_path / "mine.py").write_text(text)
        return f"{tmp_path / 'mine.py'}:Mine"

    return spec


def test_an_objective_without_a_decorator(write: Write) -> None:
    spec = write(
        "import rlzoo\nclass Mine(rlzoo.Objective):\n    name = 'mine'\n"
        "    def coefficients(self, batch):\n        return rlzoo.Coefficients(-batch.logp)\n"
    )
    batch = TokenBatch(torch.tensor([[-2.0, -1.0]]), torch.ones(1, 2, dtype=torch.bool))
    assert get_objective(spec).coefficients(batch).values.tolist() == [[2.0, 1.0]]
    assert "mine" not in list_objectives()  # it was asked for by its place, not registered


BODY = "    def coefficients(self, batch): ...\n"
HEAD = "from dataclasses import dataclass, field\nimport rlzoo\n@dataclass(frozen=True)\nclass Mine(rlzoo.Objective):\n"


@pytest.mark.parametrize(
    ("fields", "options", "told"),
    [
        ("    scale: float\n", {}, "needs the option 'scale', which has no default"),
        ("    scale: Unknown = 1\n", {"scale": 1}, "'mine' has an annotation that cannot be resolved: name 'Unknown'"),
        ("    scale: float = 1\n", {"scale": "x"}, "option 'scale' = 'x': Input should be a valid number"),
        (
            "    def __post_init__(self): raise ValueError('scale?')\n",
            {},
            "cannot be built from {}: ValueError: scale?",
        ),
        ("    scale: float = 1\n", {"name": "x"}, "'name': known: scale"),
    ],
)
def test_what_a_plugin_gets_wrong(fields: str, options: Mapping[str, Any], told: str, write: Write) -> None:
    future = "from __future__ import annotations\n"  # so that an annotation is read only when it is asked for
    spec = write(f"{future}{HEAD}    name = 'mine'\n{fields}{BODY}")
    with pytest.raises(UserError) as error:
        get_objective(spec, **options)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_options_of_any_kind_are_listed(write: Write) -> None:
    fields = "    name = 'mine'\n    count: int\n    many: list[int] = field(default_factory=lambda: [1, 2])\n"
    options = options_of(objective_class(write(f"{HEAD}{fields}{BODY}")))
    assert options["count"] == {"type": "int", "default": None}
    assert options["many"]["default"] == [1, 2]


@pytest.mark.parametrize("spec", [":Mine", "mine.py:", ":"])
def test_half_a_reference(spec: str) -> None:
    for get in (get_objective, get_reward):
        with pytest.raises(UserError, match=r"write package\.module:Name or path/to/file\.py:Name"):
            get(spec)


def test_a_module_that_raises_when_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rlzoo_raising.py").write_text("raise RuntimeError('two\\nlines')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be imported: RuntimeError: two lines \(rlzoo_raising\.py line 1\)$"):
        get_reward("rlzoo_raising:mine")


@pytest.mark.usefixtures("fresh_registry")
def test_an_entry_point_that_cannot_be_loaded_is_named_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("theirs", "no_such_package:Theirs", "rlzoo.objectives")
    monkeypatch.setattr(registry_module, "entry_points", lambda group: [point])
    monkeypatch.setattr(objective_module._objectives, "_filled", False)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"objective 'theirs' \(no_such_package:Theirs\) of .* cannot be loaded: Mod"
        ):
            get_objective("theirs")
    assert get_objective("sft").name == "sft"


class NoObjective:
    """Nothing that can train a policy."""


@pytest.mark.usefixtures("fresh_registry")
def test_a_broken_plug_in_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rlzoo_raising.py").write_text("raise RuntimeError('two\\nlines')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    places = {"lost": "no_such_package:Lost", "raising": "rlzoo_raising:Mine", "odd": f"{__name__}:NoObjective"}
    points = [EntryPoint(name, place, "rlzoo.objectives") for name, place in places.items()]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: points * (group == "rlzoo.objectives"))
    monkeypatch.setattr(objective_module._objectives, "_filled", False)
    assert not places.keys() & set(list_objectives()) and {"sft", "dft"} <= set(list_objectives())
    told = {
        "lost": "(no_such_package:Lost) of a package cannot be loaded: ModuleNotFoundError: No module named",
        "raising": "(rlzoo_raising:Mine) of a package cannot be loaded: RuntimeError: two lines (rlzoo_raising.py",
        "odd": "objective 'odd' is not a subclass of rlzoo.Objective; repair or uninstall",
    }
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, reason in told.items():
        (line,) = (line for line in lines if f"objective '{name}'" in line)
        assert reason in line
        with pytest.raises(UserError) as raised:
            get_objective(name)
        assert str(raised.value) == line.strip()
    checks = list(self_test.plug_ins())
    assert [check.ok for check in checks] == [False] * 3 and not any(check.needed for check in checks)
    assert {check.remedy for check in checks} == {"repair or uninstall that package"}


def test_a_broken_file_among_the_built_ins_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "rlzoo_things"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from rlzoo.registry import Registry\nthings = Registry('thing', 'rlzoo_things', 'no.such.group')\n"
    )
    module = "from rlzoo_things import things\n\ndef {0}():\n    pass\n\nthings.add('{1}', {0})\n"
    (package / "broken_one.py").write_text("def f(:\n")
    for name, taken in (("fine", "fine"), ("first", "same"), ("second", "same")):
        (package / f"{name}.py").write_text(module.format(name, taken))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry_module, "_REGISTRIES", [])
    registry = import_module("rlzoo_things").things
    assert registry.names() == ["fine"] and registry.get("fine").__name__ == "fine"
    with pytest.raises(UserError, match=r"thing 'same' is registered twice: by rlzoo_things.first:first and by rlz"):
        registry.get("same")
    with pytest.raises(UserError, match=r"thing module rlzoo_things.broken_one cannot be loaded: SyntaxError"):
        registry.get("broken-one")
    assert len(registry_module.broken_plugins()) == 2
