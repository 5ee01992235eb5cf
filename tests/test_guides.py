"""The README, tutorials and how-tos: every block of code is run, from top to bottom, in a folder of its own.

Blocks that begin with the name of a file are written to it. Others run: Python in one namespace per page, commands as
they are but for a few more options, so that they take less time. YAML without a name is part of an experiment, on all
pages of the documentation.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from comparisons import forked, inline_pool

import rlzoo
from rlzoo.cli import main
from rlzoo.cli.app import group, parsed
from rlzoo.config import load_experiment

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted(ROOT.glob("docs/tutorials/*.md"))
PAGES = [
    str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *TUTORIALS, *sorted(ROOT.glob("docs/howto/*.md")))
]
FENCED = re.compile(r"^```(python|yaml|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# (\S+\.(?:py|yaml))\n")
SMALLER = {
    "compare": "--set training.steps=2 --limit 4 --seeds 0 --batch-size 8 --samples 2 --set rollouts.prompts=4 "
    "--set rollouts.samples=2 --set evaluation.max_new_tokens=4 --set retention={} --set evaluation.curve_points=1",
    "plan": "--gpu h100",
    "rollout": "--limit 4",
    "variance": "--rows 4 --draws 256 --every 0",
}
"""What is added to a command, after the page's own options, which it overrides."""


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a block, in words."""
    for line in code.replace("\\\n", " ").splitlines():
        yield shlex.split(line, comments=True)


def run(command: list[str]) -> None:
    """Run a command of a page in this process, or in a copy of it."""
    if command[:3] == ["python", "-m", "pytest"]:
        tested = forked(lambda: pytest.main(["-p", "no:cacheprovider", *command[3:]]))
        assert tested.status == 0, tested.out
    elif command[0] == "python":
        runpy.run_path(command[1])
    else:
        assert command[0] == "rlzoo", f"a page may run python and rlzoo, not {command[0]}"
        more = SMALLER.get(command[1], "") if "--dry-run" not in command else ""
        own = ["--model", "embedded"] if "mine.yaml" in command and command[1] == "compare" else []
        assert main([*command[1:], *shlex.split(more), *own]) == 0, shlex.join(command)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sketched: None, undrawn: None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr("rlzoo.variance.run.pool", inline_pool)
    for name in ("train", "test"):
        rows = [{"question": f"{n}+1=?", "solution": f"={n + 1}\n#### {n + 1}", "answer": f"{n + 1}"} for n in range(8)]
        rows = [{**row, "gold": row["answer"], "response": row["solution"]} for row in rows]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names: dict[str, Any] = {}
    for language, code in FENCED.findall((ROOT / page).read_text(encoding="utf-8")):
        if named := FILE.match(code):
            Path(named[1]).write_text(code)
        elif language == "python":
            exec(code, names)
        elif language == "bash":
            for command in commands(code):
                run(command)
    for written in tmp_path.glob("*.py"):
        if written.name.startswith("test_"):
            tested = forked(partial(pytest.main, ["-q", "-p", "no:cacheprovider", written.name]))
            assert tested.status == 0, tested.out
    for experiment in tmp_path.glob("*.yaml"):
        assert load_experiment(str(experiment)).algorithms


def test_the_seven_of_the_readme_are_those_of_the_objectives_page() -> None:
    readme, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/objectives.md"))
    (count,) = re.findall(r"The (\d+) objectives that come with rlzoo", page)
    assert f"| {count}, each a coefficient in a file |" in readme and f"[{int(count) - 7} others]" in readme
    per = dict(re.findall(r"^\| \[\w.*?\]\(algorithms/(\w+)\.py\) \|.*\| (\w+) \|$", readme, re.MULTILINE))
    table = dict(re.findall(r"^\| \[([\w-]+)\]\(#.*?\) \| .+? \| [\w ]+ \| per (\w+) \|", page, re.MULTILINE))
    assert len(per) == 7 and per == {name: table[name.replace("_", "-")] for name in per}


def test_notebooks_have_the_code_of_their_pages() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "notebooks.py"))["notebook"]
    for page in TUTORIALS:
        written, text = page.with_suffix(".ipynb").read_text(encoding="utf-8"), page.read_text(encoding="utf-8")
        assert written == made(text), "python docs/notebooks.py"
        code = ["".join(cell["source"]) for cell in json.loads(written)["cells"] if cell["cell_type"] == "code"]
        assert len(code) == 1 + len(FENCED.findall(text)), "that of the page, after the cell that makes a folder"


def test_the_python_reference_names_all_that_is_public() -> None:
    page = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    assert set(rlzoo.__all__) <= set(re.findall(r"`([\w.]+)`", page))


DOCUMENTS = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
BEFORE = re.compile(r"^(?:\$ |\w+=\S+ |accelerate launch .*? -m |\.venv/bin/)+")


def shown(text: str) -> Iterator[tuple[str, bool]]:
    """The commands of a page, and whether they stand in a sentence, where they may lack arguments."""
    text = text.replace("\\\n", " ")
    blocks = [code for language, code in BLOCK.findall(text) if language in ("", "bash", "console")]
    rest = BLOCK.sub("", text)
    blocks += re.findall(r"^    (.+)$", rest, re.MULTILINE)
    sentences = re.findall(r"`([^`]+)`", " ".join(rest.split()))
    for lines, is_in_sentence in ((blocks, False), (sentences, True)):
        for line in "\n".join(lines).splitlines():
            command = BEFORE.sub("", line).partition(" > ")[0]
            if re.match(r"(rlzoo|python|make) ", command):
                yield command, is_in_sentence


@pytest.mark.parametrize("page", DOCUMENTS)
def test_settings_that_are_shown_are_those_of_an_experiment(page: str, tmp_path: Path) -> None:
    """Whole files, parts of one, and rows of its algorithms, which are indented."""
    for language, code in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        if language == "yaml":
            part = f"algorithms:\n{code}" if code.startswith(" ") else code
            is_whole = re.search(r"^(model|extends):", part, re.MULTILINE)
            (tmp_path / "part.yaml").write_text(part if is_whole else f"extends: arithmetic\n{part}")
            load_experiment(str(tmp_path / "part.yaml"))


def options_of(command: str) -> set[str]:
    """The options that a command of rlzoo has."""
    found = group().commands.get(command, group())
    return {name for parameter in found.params for name in parameter.opts}


@pytest.mark.parametrize("page", DOCUMENTS)
def test_commands_that_are_shown_are_understood(page: str) -> None:
    """They have options that there are, scripts are where they say, and Make has the targets."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for command, is_in_sentence in shown((ROOT / page).read_text(encoding="utf-8")):
        program, *words = shlex.split(command, comments=True)
        options = {word for word in words if word.startswith("--")}
        if program == "make":
            assert {word for word in words if "=" not in word} <= set(targets), command
        elif program == "python" and words[:2] != ["-m", "pytest"] and Path(words[0]).name != "make_data.py":
            file = ROOT / (f"{words[1].replace('.', '/')}.py" if words[0] == "-m" else words[0])
            code = file.read_text(encoding="utf-8")
            assert all(f'"{option}"' in code for option in options), command
        elif program == "rlzoo" and is_in_sentence:
            assert words[0].startswith("-") or words[0] in group().commands, command
            assert options <= options_of(words[0]), command
        elif program == "rlzoo":
            assert parsed(words) is not None, command
