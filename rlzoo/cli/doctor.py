"""``rlzoo doctor``: what is installed, what works here, and what to do about the rest.

Whatever needs torch runs in a process of its own (`rlzoo.cli.self_test`), so that a broken installation cannot take
the report down with it.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from rlzoo.cli.help import is_rich

MODULE = "rlzoo.cli.self_test"
SECONDS = 300.0
"""The time limit of the process that tests: many times what a slow disk or an engine's first import takes."""
GB = 1e9
LEAST_DISK = 1.0
"""Gigabytes of free disk below which a run is likely to fail."""
REPORT = "if this remains, report it with the output of rlzoo doctor --json"


@dataclass(frozen=True)
class Diagnosis:
    """One thing that was checked."""

    section: str
    name: str
    ok: bool | None
    """Whether it works; None: it is not there, and nothing is wrong with that."""
    found: str
    remedy: str = ""
    needed: bool = True
    """Whether rlzoo cannot work without it."""


def doctor(
    quick: Annotated[bool, Option("--quick", help="Skip the self-test, which takes about ten seconds.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print everything as JSON.")] = False,
) -> int:
    """Diagnose what is installed and what works on this machine, and train, sample and score for a few seconds.

    The exit status is 1 if something fails that rlzoo needs.

    Examples:
      rlzoo doctor
      rlzoo doctor --quick
      rlzoo doctor --json > doctor.json
    """
    checks: list[Diagnosis] = []
    for check in _all(quick):
        if not as_json:
            _show(check, starts_section=not checks or checks[-1].section != check.section)
        checks.append(check)
    failed = [check.name for check in checks if check.ok is False and check.needed]
    if as_json:
        found = {"ok": not failed, "python": platform.python_version(), "platform": platform.platform()}
        print(json.dumps({**found, "checks": [asdict(check) for check in checks]}, indent=1))
    elif failed:
        print(f"\n{_mark(False)} rlzoo needs what failed: {', '.join(failed)}")
    else:
        print(f"\n{_mark(True)} rlzoo {'has what it needs' if quick else 'works'} here")
    return 1 if failed else 0


def _all(quick: bool) -> Iterator[Diagnosis]:
    for name, some in (("packages", packages), ("machine", machine), ("Hugging Face", hub)):
        try:
            yield from some()
        except Exception as error:
            yield Diagnosis("Packages", name, False, f"{type(error).__name__}: {' '.join(str(error).split())}", REPORT)
    yield from tested_apart(["--quick"] if quick else [])


# What can be found out without importing anything heavy


def packages() -> Iterator[Diagnosis]:
    """Python, and every package that rlzoo needs, against the versions that it is tested with."""
    from packaging.requirements import Requirement

    where = f"{platform.python_implementation()} in {sys.prefix}"
    yield Diagnosis("Packages", "python", True, f"{platform.python_version()} ({where})")
    folder = Path(__file__).parents[2]
    try:
        yield Diagnosis("Packages", "rlzoo", True, f"{version('rlzoo')} in {folder}")
    except PackageNotFoundError:
        told = f"runs from {folder} without being installed: what it needs cannot be checked"
        yield Diagnosis("Packages", "rlzoo", False, told, f"{pip()} install --editable {shlex.quote(str(folder))}")
        return
    for requirement in map(Requirement, requires("rlzoo") or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield in_range("Packages", requirement.name, str(requirement.specifier))


def in_range(section: str, name: str, range_: str, needed: bool = True, purpose: str = "") -> Diagnosis:
    """Whether a package is installed in a version of the range, such as ``>=5.0,<6``."""
    from packaging.specifiers import SpecifierSet

    remedy = f"{pip()} install {shlex.quote(name + range_)}"
    try:
        there = version(name)
    except PackageNotFoundError:
        return Diagnosis(section, name, False, f"not installed{purpose and f': {purpose}'}", remedy, needed)
    if not SpecifierSet(range_).contains(there, prereleases=True):
        return Diagnosis(section, name, False, f"{there}, and rlzoo is tested with {range_}", remedy, needed)
    return Diagnosis(section, name, True, f"{there}{purpose and f': {purpose}'}", needed=needed)


def pip() -> str:
    """The command for the pip of this environment."""
    found = shutil.which("pip")
    beside = found is not None and Path(found).parent.resolve() == Path(sys.executable).parent.resolve()
    return "pip" if beside else f"{shlex.quote(sys.executable)} -m pip"


def machine() -> Iterator[Diagnosis]:
    """Cores, memory, and room for runs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Diagnosis("Machine", "cores", True, f"{cores} of {os.cpu_count()}, {platform.machine()}, {platform.system()}")
    whole, left = _memory()
    told = f"{whole / GB:.1f} GB" + ("" if left is None else f", {left / GB:.1f} GB available")
    yield Diagnosis("Machine", "memory", True, told, needed=False)
    yield _disk("Machine", Path.cwd(), "run rlzoo in a folder with more room")
    can_write = os.access(Path.cwd(), os.W_OK)
    yield Diagnosis(
        "Machine", "runs/", can_write, f"{Path.cwd()} {'can' if can_write else 'cannot'} be written to",
        "" if can_write else "run rlzoo in another folder, or give --out", needed=False,
    )  # fmt: skip


def _disk(section: str, folder: Path, remedy: str, needed: bool = True) -> Diagnosis:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free / GB
    enough = free >= LEAST_DISK
    return Diagnosis(section, "disk", enough, f"{free:.1f} GB free for {folder}", "" if enough else remedy, needed)


def _memory() -> tuple[float, float | None]:
    """Bytes of memory, and of those available if the system says so; a container's limit counts."""
    whole, left = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), None
    table, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if table.exists():
        rows = dict(line.split(":", 1) for line in table.read_text(encoding="utf-8").splitlines())
        left = 1024.0 * int(rows["MemAvailable"].split()[0])
    if limit.exists() and (most := limit.read_text(encoding="utf-8").strip()).isdigit() and int(most) < whole:
        used = int(limit.with_name("memory.current").read_text(encoding="utf-8"))
        whole = float(most)
        left = min(whole - used, whole if left is None else left)
    return whole, left


def hub() -> Iterator[Diagnosis]:
    """The caches of Hugging Face's libraries, and whether they may use the network."""
    from huggingface_hub import constants

    section, cache = "Hugging Face", Path(constants.HF_HUB_CACHE)
    there = {kind: len(list(cache.glob(f"{kind}--*"))) for kind in ("models", "datasets")}
    told = f"{cache}: {there['models']} models, {there['datasets']} data sets"
    yield Diagnosis(section, "cache", True, told, needed=False)
    yield _disk(section, cache, "set HF_HOME to a folder with more room", needed=False)
    if constants.HF_HUB_OFFLINE:
        told = "only what the cache holds can be used; unset HF_HUB_OFFLINE to download more"
    else:
        told = f"models and data are downloaded from {constants.ENDPOINT}"
    yield Diagnosis(section, "offline" if constants.HF_HUB_OFFLINE else "online", None, told, needed=False)


# What needs torch


def tested_apart(options: Sequence[str]) -> Iterator[Diagnosis]:
    """The checks of `rlzoo.cli.self_test` from a process of its own, as they come, and how it ended if it failed."""
    command = [sys.executable, "-P", "-W", "ignore", "-m", MODULE, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=lambda pipe: errors.extend(pipe), args=(process.stderr,), daemon=True)
    late = threading.Timer(SECONDS, process.kill)
    reader.start()
    late.start()
    doing: dict[str, Any] = {"section": "Self-test", "name": "start"}
    try:
        for line in process.stdout:
            message = json.loads(line)
            doing = message.pop("doing", doing)
            if message:
                yield Diagnosis(**message)
        status = process.wait()
    finally:
        in_time = late.is_alive()
        late.cancel()
        process.kill()
        process.wait()
        reader.join()
    if status:
        told = [line.strip() for line in errors if line.strip()]
        remedy = REPORT if in_time else f"try again when the machine is less busy; {REPORT}"
        yield Diagnosis(**doing, ok=False, found=_end(status, in_time, told), remedy=remedy)


def _end(status: int, in_time: bool, errors: Sequence[str]) -> str:
    if not in_time:
        return f"did not end within {SECONDS:.0f} s"
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"its process {how}" + (f": {errors[-1]}" if errors else "")


# What is shown


def _show(check: Diagnosis, starts_section: bool) -> None:
    if starts_section:
        print(_styled(check.section, bold=True))
    print(f"  {_mark(check.ok)} {check.name:20} {check.found}", flush=True)
    if check.remedy:
        print(f"    {'':20} {_styled(check.remedy, fg='yellow')}", flush=True)


def _mark(ok: bool | None) -> str:
    signs = {True: ("✓", "+", "green"), False: ("✗", "x", "red"), None: ("·", "-", "blue")}
    sign, plain, colour = signs[ok]
    try:
        sign.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return plain
    return _styled(sign, fg=colour)


def _styled(text: str, **style: str | bool) -> str:
    return typer.style(text, **style) if is_rich() else text  # type: ignore[arg-type]
