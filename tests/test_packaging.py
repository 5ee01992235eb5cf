"""What pip installs: one package with all that it needs, and nothing beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDERS = ("algorithms", "rewards", "experiments", "rlzoo")
FILES = ("pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, links as links: a build leaves things in its folder."""
    copy = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    (copy / "tests").mkdir()
    shutil.copy(__file__, copy / "tests")
    return copy


def built(source: Path, kind: str) -> Path:
    """The archive that setuptools, as it is installed here, makes of the source."""
    pytest.importorskip("setuptools", "77")
    code = f"from setuptools.build_meta import build_{kind} as build; print(build('dist'))"
    run = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return source / "dist" / run.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    return built(source, "wheel")


def expected() -> set[str]:
    """Every file of the package, by its path in it."""
    found = {f"rlzoo/{path.relative_to(ROOT / 'rlzoo')}" for path in (ROOT / "rlzoo").rglob("*.py")}
    found |= {f"rlzoo/{name}/{path.name}" for name in ("algorithms", "rewards") for path in (ROOT / name).glob("*.py")}
    found |= {f"rlzoo/{path.relative_to(ROOT)}" for path in (ROOT / "experiments").rglob("*.yaml")}
    data = [path for name in ("config", "policy") for path in (ROOT / "rlzoo" / name).glob("*.yaml")]
    found |= {str(path.relative_to(ROOT)) for path in data}
    studies = [path for path in (ROOT / "experiments" / "results").rglob("*") if path.is_file()]
    found |= {f"rlzoo/{path.relative_to(ROOT)}" for path in studies}
    found |= {f"rlzoo/worlds/base/{path.name}" for path in (ROOT / "rlzoo" / "worlds" / "base").iterdir()}
    found |= {f"rlzoo/cli/templates/{path.name}" for path in (ROOT / "rlzoo" / "cli" / "templates").iterdir()}
    return found | {"rlzoo/py.typed", "rlzoo/experiments/__init__.py"}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert expected() <= set(names)
    assert {name.split("/")[0] for name in names} == {"rlzoo", "rlzoo-0.1.0.dist-info"}
    assert {"rlzoo/algorithms/sft.py", "rlzoo/worlds/base/model.safetensors"} <= set(names)
    assert wheel.stat().st_size < 2e7, "the outcomes of every study are in it, and grow with each"


def test_the_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(built(source, "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    again = built(unpacked, "wheel")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())
    assert expected() <= {f"rlzoo/{path.relative_to(unpacked / 'rlzoo')}" for path in (unpacked / "rlzoo").rglob("*")}


ONE_PROCESS = """
import sys, rlzoo
from rlzoo.cli import main
print(rlzoo.__file__)
sys.exit(main(["list", "--json"]) or main(["evaluate", "facts", "--limit", "2", "--samples", "1"]))
"""
"""Torch and transformers are imported but once."""


def test_it_runs_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", symlinks=True)  # no pip in it, nothing to download
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(python), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--ignore-installed", str(wheel)], check=True, capture_output=True, text=True)
    # what it depends on, after itself; a path given so runs no .pth file, and so no editable rlzoo
    (site / "dependencies.pth").write_text(f"{next(p for p in sys.path if p.endswith('site-packages'))}\n")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0 and done.stderr == "", f"libraries are quiet: {done.stderr}"
        return done.stdout

    told = run(str(python), "-c", ONE_PROCESS)
    where, _, rest = told.partition("\n")
    assert Path(where).is_relative_to(site)
    listed, end = json.JSONDecoder().raw_decode(rest)
    assert rest[end:].strip().startswith("facts: avg@1")
    assert {row["name"] for row in listed["objectives"]} >= {path.stem.replace("_", "-") for path in algorithms()}
    assert {row["name"] for row in listed["experiments"]} == {
        path.relative_to(ROOT / "experiments").with_suffix("").as_posix()
        for path in (ROOT / "experiments").rglob("*.yaml")
    }
    for name in ("algorithms", "rewards", "experiments", "tests"):
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({name!r}) is not None)"
        run(str(python), "-c", code)
    assert run(str(tmp_path / "env" / "bin" / "rlzoo"), "new", "objective", "mine").startswith("wrote mine.py and ")


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert cited["message"] and len(cited["references"][0]["authors"]) == 10


def algorithms() -> list[Path]:
    return [path for path in (ROOT / "algorithms").glob("*.py") if not path.name.startswith("_")]
