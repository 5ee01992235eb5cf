"""Restarting all processes of a distributed run, with fewer rows at a time, after one of them ran out of memory.

Where processes work in step, as those of a sharded model do, the others wait inside a collective operation that the
failed one never joins. They cannot be called back from there, but replaced: a thread in each process watches the
launcher's key-value store, and a message in it makes every process execute its command anew, under the same process id,
so that the launcher notices nothing. The run then resumes, as after `kill -9`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

VARIABLE = "RLZOO_RESTARTED"
"""The environment variable with the number of restarts and the limits, as JSON."""
SECONDS = 1.0
"""The time between two looks at the store."""
_KEY = "limits"
_possible = False


class Restart(BaseException):
    """Raised in a process that ran out of memory; `restarting` catches it, and restarts all processes."""


def restart_with(what: Literal["tokens", "sequences"], most: int) -> None:
    """Restart all processes with at most so many tokens or sequences at a time; return if that is not possible."""
    if _possible:
        print(
            f"rlzoo: process {os.environ['RANK']} ran out of memory; all processes start again, with at most {most:,} "
            f"{what} at a time",
            file=sys.stderr,
        )
        raise Restart(json.dumps({**_limits(), what: most, "restarts": _restarts() + 1}))


def can_restart() -> bool:
    """Whether `restart_with` restarts the processes."""
    return _possible


def within_limit(what: Literal["tokens", "sequences"], asked: int) -> int:
    """``asked``, or the number that remained after a restart, if that is smaller."""
    return min(asked, _limits().get(what, asked))


def group_options() -> dict[str, Any]:
    """Arguments for the process group: after a restart, a store in which earlier processes have left no addresses."""
    if not _restarts():
        return {}
    return {"store": _store(), "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}


@contextmanager
def restarting() -> Iterator[None]:
    """In this context, a command can restart all processes, if its launcher has a store (torchrun, accelerate)."""
    global _possible
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        yield
        return
    store, over = _store(), threading.Event()
    threading.Thread(target=_watch, args=(store, over), daemon=True).start()
    _possible = True
    try:
        yield
    except Restart as wanted:
        # the others find the message before they find this process gone; of several failures the first one counts
        _execute(store.compare_set(_KEY, "", str(wanted)))
    except Exception:
        with suppress(RuntimeError):  # the launcher is gone
            if store.check([_KEY]):  # the error is only a consequence
                _execute(store.get(_KEY))
        raise
    finally:
        _possible = False
        over.set()


def _watch(store: Store, over: threading.Event) -> None:
    with suppress(RuntimeError):  # the launcher is gone
        while not over.wait(SECONDS):
            if store.check([_KEY]):
                _execute(store.get(_KEY))


def _execute(limits: bytes) -> None:
    """Replace this process by a new one with the same command line."""
    os.environ[VARIABLE] = limits.decode()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _store() -> Store:
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    of_launcher = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # its own restarts may share the store too
    return PrefixStore(f"rlzoo-{of_launcher}-{_restarts()}", store)


def _limits() -> dict[str, int]:
    found: dict[str, int] = json.loads(os.environ.get(VARIABLE, "{}"))
    return found


def _restarts() -> int:
    return _limits().get("restarts", 0)
