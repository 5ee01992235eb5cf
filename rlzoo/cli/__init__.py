"""The ``rlzoo`` command. Heavy imports wait until a command runs, so that help and shell completion are instant."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rlzoo.errors import UserError
from rlzoo.jobs.interrupts import Terminated, raise_signal
from rlzoo.jobs.sharing import COMMAND, public_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0: done; 1: some cells failed; 2: wrong input (one line on standard error); 130 or 143: stopped by a signal; 141:
    standard output was closed.
    """
    from rlzoo.cli.app import parsed

    os.environ.pop("RLZOO_TRUST_REMOTE_CODE", None)
    if "JPY_PARENT_PID" in os.environ:  # a notebook's terminal keeps every redrawing of a bar
        os.environ.setdefault("TTY_COMPATIBLE", "0")
    sys.path.append(str(Path.cwd()))  # for a user's own package.module:Name; last, so that it hides nothing
    signal.signal(signal.SIGTERM, raise_signal)  # a job that the system stops ends like one stopped by Ctrl-C
    ours = COMMAND.set(public_command(sys.argv[1:] if arguments is None else arguments))
    try:
        status = _run(parsed(arguments))
        sys.stdout.flush()  # here, where an error can be reported
        return status
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return 141  # the status that a shell reports for SIGPIPE
    except UserError as error:
        print(f"rlzoo: {_told(error, str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        if os.environ.get("RANK", "0") == "0":  # once for all processes of a run
            print(f"rlzoo: {_told(error, 'interrupted')}", file=sys.stderr)
        return 143 if isinstance(error, Terminated) else 130
    finally:
        COMMAND.reset(ours)


def _run(command: Callable[[], int] | None) -> int:
    if command is None:
        return 0
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from rlzoo.jobs.ranks import joined
        from rlzoo.jobs.restarts import restarting

        with joined(), restarting():
            return command()
    return command()


def _reader_is_gone() -> bool:
    """Whether the reader of standard output has closed it, as in ``rlzoo list | head``."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _told(error: BaseException, message: str) -> str:
    """One line: the message, and the notes that the run added to the error."""
    return " ".join("; ".join([message, *getattr(error, "__notes__", [])]).split())
