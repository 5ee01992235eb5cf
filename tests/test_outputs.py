"""Where commands write: whole files or none, one runner at a time, and runs that go on where they were stopped."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from rlzoo.errors import TryAgainError, UserError
from rlzoo.jobs import runs
from rlzoo.jobs.cached_results import CachedResults
from rlzoo.jobs.outputs import remove, remove_partial, replacing, write_atomically
from rlzoo.jobs.places import RECORD
from rlzoo.jobs.runs import place, run_in, unfinished

ASKED = {"steps": 10, "model": "embedded"}


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def stopped(path: Path, settings: dict[str, Any] | None = None, what: type[BaseException] = KeyboardInterrupt) -> str:
    """A run that caches a result and then ends with an exception; the text of the exception."""
    with pytest.raises(what) as caught, run_in(path, "train", settings or ASKED) as run:
        CachedResults(run.state).write("half", 1)
        raise what
    return "; ".join(getattr(caught.value, "__notes__", []))


# Files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    write_atomically(file, "before")
    with pytest.raises(RuntimeError), replacing(file) as beside:
        beside.write_text("half")
        raise RuntimeError("out of luck")
    assert file.read_text() == "before" and names(tmp_path) == ["rows.txt"]


def test_any_text_is_written_and_folders_for_it_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's output may hold half a character, which no file can, and some file systems cannot sync."""

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    write_atomically(tmp_path / "new" / "deep" / "rows.txt", "é\ud800b")
    assert (tmp_path / "new" / "deep" / "rows.txt").read_text(encoding="utf-8") == "é?b"


def test_a_folder_takes_the_place_of_one_that_holds_files(tmp_path: Path) -> None:
    for name in ("before", "after"):
        with replacing(tmp_path / "buffer") as beside:
            beside.mkdir()
            (beside / name).touch()
    assert names(tmp_path) == ["buffer", "buffer/after"]


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    write_atomically(file, "before")
    with file.open() as reader:
        write_atomically(file, "after")
        assert reader.read() == "before" and file.read_text() == "after"


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system which file a descriptor is of")
def test_what_is_written_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a crash of the machine could leave an empty file under the new name."""
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(f"{path.name}: {path.read_text() if path.is_file() else 'names'}")
        sync(descriptor)

    def replaced(self: Path, target: Path) -> Path:
        events.append(f"replace {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replaced)
    write_atomically(tmp_path / "rows.txt", "whole")
    opened = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert not [path for path in opened if path.startswith(os.path.realpath(tmp_path))]
    assert events == ["rows.txt: whole", "replace rows.txt", f"{tmp_path.name}: names"]
    events.clear()
    with replacing(tmp_path / "folder") as beside:
        (beside / "deep").mkdir(parents=True)
        (beside / "one.txt").write_text("1")
        (beside / "deep" / "two.txt").write_text("2")
    before, after = events[:-2], events[-2:]
    assert sorted(before) == ["deep: names", "folder: names", "one.txt: 1", "two.txt: 2"]
    assert after == ["replace folder", f"{tmp_path.name}: names"]


def test_what_a_killed_process_had_half_written_is_removed(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from rlzoo.jobs.outputs import replacing\n"
        "with replacing(Path(sys.argv[1])) as beside:\n"
        "    beside.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "results.json")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "results.json").exists() and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "mine.partial").touch()
    remove_partial(tmp_path)
    assert names(tmp_path) == ["mine.partial"]


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows.txt").touch()
    (tmp_path / "link").symlink_to(tmp_path / "mine", target_is_directory=True)
    remove(tmp_path / "link")
    assert names(tmp_path) == ["mine", "mine/rows.txt"]


def test_a_piece_is_made_once_and_comes_back_as_it_was(tmp_path: Path) -> None:
    cached, made = CachedResults(tmp_path), list[int]()

    def work() -> dict[str, Any]:
        made.append(1)
        return {"a": [0.1 + 0.2, float("inf"), None], "b": ("é", 2**70)}

    first, second = cached.once("grpo-lr1e-05/seed 0", work), cached.once("grpo-lr1e-05/seed 0", work)
    assert first == second == {"a": [0.1 + 0.2, float("inf"), None], "b": ["é", 2**70]}
    assert len(made) == 1 and len(list(tmp_path.iterdir())) == 1

    def nothing() -> list[int]:
        made.append(2)
        return []

    assert cached.once("nothing", nothing) == cached.once("nothing", nothing) == [] and made == [1, 2]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_piece_is_made_again(tmp_path: Path, damage: str) -> None:
    cached = CachedResults(tmp_path)
    cached.write("score", {"mean": 0.25})
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-3], "flip": whole.replace(b"0.25", b"0.75"), "empty": b""}[damage])
    assert cached.read("score") is None
    assert cached.once("score", lambda: {"mean": 0.25}) == {"mean": 0.25}


# What failed


def test_a_failed_run_takes_nothing_of_others_with_it(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "a" / "deep"
    with pytest.raises(RuntimeError), run_in(out, "train", ASKED):
        (out / "half.json").write_text("{")
        (tmp_path / "runs" / "b").mkdir()  # another command, meanwhile
        (tmp_path / "runs" / "b" / "results.json").write_text("{}")
        raise RuntimeError("out of luck")
    assert names(tmp_path) == ["runs", "runs/b", "runs/b/results.json"]


@pytest.mark.parametrize("what", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_ends_before_it_did_anything_removes_the_folders_it_made(
    tmp_path: Path, what: type[BaseException]
) -> None:
    with pytest.raises(what), run_in(tmp_path / "runs" / "deep" / "a", "train", ASKED):
        raise what("out of luck")
    assert names(tmp_path) == []


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for kind in ("folder", "whole"):
        with pytest.raises(UserError, match="exists already"), run_in(tmp_path, "train", ASKED, kind):
            pytest.fail("must not come here")
    assert names(tmp_path) == ["notes.txt"]


def test_an_empty_folder_of_the_user_stays(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), run_in(tmp_path, "train", ASKED):
        (tmp_path / "half.json").write_text("{")
        raise RuntimeError("out of luck")
    assert tmp_path.is_dir() and names(tmp_path) == []


def test_a_failed_file_is_removed_and_a_present_one_kept(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with pytest.raises(RuntimeError), run_in(file, "rollout", ASKED, "whole"):
        file.write_text("half")
        raise RuntimeError("out of luck")
    assert names(tmp_path) == []
    file.write_text("mine")
    with pytest.raises(UserError, match="exists already"), run_in(file, "rollout", ASKED, "whole"):
        pytest.fail("must not come here")
    assert file.read_text() == "mine" and names(tmp_path) == ["rows.jsonl"]


def test_a_folder_that_is_written_whole_is_known_as_finished_and_a_file_is_not(tmp_path: Path) -> None:
    for name in ("rows", "rows.jsonl"):
        with run_in(tmp_path / name, "rollout", ASKED, "whole") as run:
            assert not run.finished
            run.folder.touch() if run.folder.suffix else run.folder.mkdir()
    assert names(tmp_path) == ["rows", "rows.jsonl", f"rows/{RECORD}"]
    with run_in(tmp_path / "rows", "rollout", ASKED, "whole") as run:
        assert run.finished
    with pytest.raises(UserError, match="holds another run"), run_in(tmp_path / "rows", "import", ASKED, "whole"):
        pytest.fail("must not come here")
    with pytest.raises(UserError, match="exists already"), run_in(tmp_path / "rows.jsonl", "rollout", ASKED, "whole"):
        pytest.fail("must not come here")


FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, FULL), FULL),
        (RuntimeError(f"Error while serializing: I/O error: {FULL} (os error {errno.ENOSPC})"), FULL),  # safetensors'
    ],
)
def test_a_full_disk_is_one_line_and_keeps_what_was_done(error: Exception, told: str, tmp_path: Path) -> None:
    told = rf"--out '.*out' cannot be written \({told}\).*finished work is kept"
    with pytest.raises(UserError, match=told), run_in(tmp_path / "out", "train", ASKED) as run:
        CachedResults(run.state).write("half", 1)
        raise error
    with run_in(tmp_path / "out", "train", ASKED) as run:
        assert run.resumed and CachedResults(run.state).read("half") == 1


@pytest.mark.parametrize("kind", ["folder", "whole"])
def test_only_an_error_of_the_output_blames_it(kind: Literal["folder", "whole"], tmp_path: Path) -> None:
    """A server that is gone and a file that a plug-in misses say so themselves, and cost no finished work either."""
    gone = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(tmp_path / "words.txt"))
    for error, told in ((gone, "^ConnectionRefusedError: .*Connection refused .*; finished"), (missing, "words.txt")):
        with pytest.raises(UserError, match=told) as caught, run_in(tmp_path / "out", "train", ASKED, kind) as run:
            CachedResults(run.state).write("half", 1)
            raise error
        assert "cannot be written" not in str(caught.value) and "finished work is kept" in str(caught.value)
    with pytest.raises(UserError, match="cannot be written"), run_in(tmp_path / "out", "train", ASKED, kind) as run:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(run.state / "half"))


def test_a_place_that_cannot_be_written_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\): give another place"):  # noqa: SIM117
        with run_in(tmp_path / "file" / "out", "train", ASKED):
            pytest.fail("must not come here")
    stopped(tmp_path / "out")

    def refuse(self: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UserError, match="Read-only"), run_in(tmp_path / "out", "train", ASKED):
        pytest.fail("must not come here")


# What was stopped


def test_a_stopped_run_goes_on_and_then_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert f"the same command with --out {out} resumes there" in stopped(out)
    with run_in(out, "train", ASKED) as run:
        assert run.resumed and not run.finished
        assert CachedResults(run.state).read("half") == 1
        (out / "results.json").write_text("{}")
    assert names(out) == ["results.json", "run.json"]
    with run_in(out, "train", ASKED) as run:
        assert run.finished
    assert names(out) == ["results.json", "run.json"]


def test_a_run_with_failures_is_to_be_continued(tmp_path: Path) -> None:
    with run_in(tmp_path / "out", "compare", ASKED) as run:
        CachedResults(run.state).write("half", 1)
        run.to_be_continued = True
    with run_in(tmp_path / "out", "compare", ASKED) as run:
        assert run.resumed and not run.finished


def test_an_output_may_have_the_name_of_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run writes is not among the files that it reads, by which it is recognised."""
    monkeypatch.chdir(tmp_path)
    out = Path("model-0")
    asked = {"model-0": {"source": "model-0"}, **ASKED}
    with pytest.raises(KeyboardInterrupt), run_in(out, "train", asked) as run:
        CachedResults(run.state).write("half", 1)
        (out / "rows.jsonl").write_text("{}")
        raise KeyboardInterrupt
    assert unfinished(Path(), "model", "train", asked) == out
    with run_in(out, "train", asked) as run:
        assert run.resumed and CachedResults(run.state).read("half") == 1


def test_another_run_is_told_apart_by_what_differs(tmp_path: Path) -> None:
    out, data = tmp_path / "out", tmp_path / "rows.jsonl"
    data.write_text("{}")
    asked = {**ASKED, "source": str(data), "sampling": {"top_p": 1.0}}
    stopped(out, asked)
    for settings, told in (
        ({**asked, "steps": 20}, r"unfinished \(steps: 10 there, 20 here"),
        ({**asked, "sampling": {"top_p": 0.9}}, r"\(sampling\.top_p: 1.0 there, 0.9 here"),
        (ASKED, "source"),
    ):
        with pytest.raises(UserError, match=told), run_in(out, "train", settings):
            pytest.fail("must not come here")
    with pytest.raises(UserError, match="'train' there, 'compare' here"), run_in(out, "compare", asked):
        pytest.fail("must not come here")
    data.write_text("{}\n{}")
    with pytest.raises(UserError, match=r"rows.jsonl: \[2, "), run_in(out, "train", asked):
        pytest.fail("must not come here")
    assert CachedResults(out / ".state").read("half") == 1


@pytest.mark.parametrize("kind", ["table", "shards", "module", "model", "buffer", "experiment", "key", "home"])
def test_a_file_of_the_same_size_that_changed_is_told(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever settings name: a table or a folder of them, a module (also as a key), a model's or buffer's folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder, mark in (("model", "config.json"), ("buffer", "state.json"), ("shards", "1.jsonl")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / mark).write_text("{}")
    files = {"table": "rows.csv", "model": "model/weights.safetensors", "buffer": "buffer/data.arrow"}
    files["shards"] = "shards/2.jsonl"
    file = tmp_path / {**files, "experiment": "mine.yaml"}.get(kind, "mine.py")
    named: dict[str, Any] = {name: str(tmp_path / name) for name in ("model", "buffer", "shards")}
    named |= {"table": str(file), "experiment": str(file), "module": f"{file}:Mine", "home": "~/mine.py:Mine"}
    asked = {**ASKED, "named": [{f"{file}:Mine": {}}] if kind == "key" else [named[kind]]}
    file.write_text("a")
    os.utime(file, ns=(1, 1))
    stopped(tmp_path / "out", asked)
    file.write_text("b")
    os.utime(file, ns=(2, 2))
    told = rf"{file.name}: \[1, 1\] there, \[1, 2\] here"
    with pytest.raises(UserError, match=told), run_in(tmp_path / "out", "train", asked):
        pytest.fail("must not come here")


def test_what_a_killed_run_had_half_written_or_half_removed_is_gone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(out)
    (out / ".report.md.x.partial").mkdir()
    (out / ".state" / ".half.result.x.partial").mkdir()
    with run_in(out, "train", ASKED):
        assert names(out) == [".state", ".state/half.result", ".state/journal", ".state/lock", ".state/run.json"]
    (out / ".state").mkdir()
    (out / ".state" / "half.result").touch()
    with run_in(out, "train", ASKED) as run:
        assert run.finished
    assert names(out) == ["run.json"]


def test_a_run_that_was_killed_before_it_kept_anything_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "out" / ".state").mkdir(parents=True)
    (tmp_path / "out" / ".state" / "run.json").write_text('{"command": "compare", "settings": {}}')
    with run_in(tmp_path / "out", "train", ASKED) as run:
        assert not run.resumed


def test_any_text_may_be_a_setting(tmp_path: Path) -> None:
    """A system prompt, say, which is no name of a file."""
    with run_in(tmp_path / "out", "train", {"system": "a\0b", "prompt": "x" * 5000}) as run:
        assert not run.finished


def test_work_of_which_nothing_says_what_it_is_is_done_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(out)
    (out / ".state" / "run.json").write_text('{"command": "tra')
    with run_in(out, "train", ASKED) as run:
        assert not run.resumed and CachedResults(run.state).read("half") is None
        with pytest.raises(UserError, match="in use by process"), run_in(out, "train", ASKED):
            pytest.fail("must not come here")


def test_a_file_that_was_whole_when_its_run_was_killed_is_finished(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt), run_in(file, "rollout", ASKED, "whole") as run:
        CachedResults(run.state).write("half", 1)
        file.write_text("whole")
        raise KeyboardInterrupt
    with run_in(file, "rollout", ASKED, "whole") as run:
        assert run.finished
    assert names(tmp_path) == ["rows.jsonl"] and file.read_text() == "whole"


def test_what_a_killed_run_had_half_written_beside_its_file_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for name in (".rows.jsonl.a1b2.partial", ".rows.jsonl.gz.a1b2.partial"):
        (tmp_path / name).mkdir()
    with run_in(file, "rollout", ASKED, "whole"):
        write_atomically(file, "whole")
    assert names(tmp_path) == [".rows.jsonl.gz.a1b2.partial", "rows.jsonl"], "another's is not touched"


def test_stopped_files_of_one_folder_go_on_by_themselves(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with pytest.raises(KeyboardInterrupt), run_in(tmp_path / name, "rollout", {"limit": name}, "whole") as run:
            CachedResults(run.state).write("half", name)
            raise KeyboardInterrupt
    for name in ("a", "b"):
        with run_in(tmp_path / name, "rollout", {"limit": name}, "whole") as run:
            assert run.resumed and CachedResults(run.state).read("half") == name


def test_other_versions_of_packages_do_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"python", "torch", "transformers"} <= runs.versions().keys()
    stopped(tmp_path / "out")
    monkeypatch.setattr(runs, "versions", lambda: {"torch": "1"})
    with pytest.raises(UserError, match=r"torch: .* there, '1' here"), run_in(tmp_path / "out", "train", ASKED):
        pytest.fail("must not come here")


def test_a_mistake_keeps_long_work_and_removes_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stopped(tmp_path / "out", what=UserError) == "" and names(tmp_path) == []
    monkeypatch.setattr(runs, "WORTH_KEEPING", 0.0)
    assert "finished work is kept" in stopped(tmp_path / "out", what=UserError)


def test_what_the_same_command_can_go_on_from_is_kept_however_short(tmp_path: Path) -> None:
    assert "finished work is kept" in stopped(tmp_path / "out", what=TryAgainError)


def test_a_command_without_a_place_goes_on_in_the_one_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = place("grpo-facts", "train", ASKED)
    assert re.fullmatch(r"runs/grpo-facts-\d{8}-\d{6}", str(first))
    stopped(first)
    assert place("grpo-facts", "train", ASKED) == first
    others = [place("grpo-facts", "train", {**ASKED, "steps": 5})]
    for _ in range(3):  # all within a second, maybe
        others[-1].mkdir(parents=True)
        others.append(place("grpo-facts", "train", {**ASKED, "steps": 5}))
    assert len({first, *others}) == 5 and place("other", "train", ASKED).name.startswith("other-")


def test_the_newest_unfinished_run_of_the_same_is_found(tmp_path: Path) -> None:
    for name, settings in (("a-1", ASKED), ("a-2", ASKED), ("a-3", {**ASKED, "steps": 5}), ("b-9", ASKED)):
        stopped(tmp_path / name, settings)
    assert unfinished(tmp_path, "a", "train", ASKED) == tmp_path / "a-2"
    assert unfinished(tmp_path, "a", "compare", ASKED) is None
    with run_in(tmp_path / "a-2", "train", ASKED):
        assert unfinished(tmp_path, "a", "train", ASKED) == tmp_path / "a-1"
    assert unfinished(tmp_path, "a", "train", ASKED) == tmp_path / "a-1"


# Two at a time


def hold(path: Path, told: Any, go: Any) -> None:
    with run_in(path, "train", ASKED) as run:
        CachedResults(run.state).write("half", 1)
        told.send(os.getpid())
        go.recv()


@pytest.mark.slow
def test_a_second_runner_is_refused_and_a_dead_ones_lock_is_not_in_the_way(tmp_path: Path) -> None:
    context, out = multiprocessing.get_context("spawn"), tmp_path / "out"
    (heard, told), (go, _keep) = context.Pipe(False), context.Pipe(False)
    process = context.Process(target=hold, args=(out, told, go))
    process.start()
    holder = heard.recv()
    before = names(out)
    with pytest.raises(UserError, match=f"in use by process {holder} on "), run_in(out, "train", ASKED):
        pytest.fail("must not come here")
    assert names(out) == before, "the refused one took something with it"
    process.kill()
    process.join()
    (out / ".state" / "lock").write_text("process 1 on a machine with a long name, since last year" * 2)
    with run_in(out, "train", ASKED) as run:
        assert run.resumed
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on \S+, since [-\d]+ [:\d]+: wait"):  # noqa: SIM117
            with run_in(out, "train", ASKED):
                pytest.fail("must not come here")
    assert json.loads((out / "run.json").read_text())["settings"] == ASKED


def test_a_lock_that_was_removed_while_it_was_taken_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that held it ended between the two: a lock on a file that is gone would keep nobody out."""
    stopped(tmp_path / "out")
    lock, flock, taken = tmp_path / "out" / ".state" / "lock", fcntl.flock, list[int]()

    def late(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        taken.append(descriptor)
        if len(taken) == 1:
            lock.unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    with run_in(tmp_path / "out", "train", ASKED):
        assert len(taken) == 2 and lock.read_text().startswith(f"process {os.getpid()} ")
        with pytest.raises(UserError, match="in use"), run_in(tmp_path / "out", "train", ASKED):
            pytest.fail("must not come here")


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_in(tmp_path / "out", "train", ASKED) as run:
        assert not run.resumed
