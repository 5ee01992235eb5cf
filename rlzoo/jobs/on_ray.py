"""The work of a comparison as tasks on a Ray cluster; the task of a lost worker or node is retried elsewhere."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path
from typing import Any

from rlzoo.errors import UserError
from rlzoo.jobs.pool import THREAD_VARIABLES, WorkError, Workers, _run, silence
from rlzoo.jobs.progress import Together

RETRIES = 3
"""The number of retries of a task after its worker or node died."""


class RayTasks:
    """`Workers` that run functions as Ray tasks: ``threads`` CPUs each, and one GPU if the cluster has GPUs."""

    def __init__(self, ray: Any, threads: int) -> None:
        self._ray, self._refs = ray, dict[Future[Any], Any]()
        self._together = Together()
        variables = {name: str(threads) for name in THREAD_VARIABLES}
        variables |= {name: value for name, value in os.environ.items() if name.startswith("RLZOO_")}
        self._task = ray.remote(
            num_cpus=threads,
            num_gpus=1 if ray.cluster_resources().get("GPU", 0) else 0,
            max_retries=RETRIES,
            runtime_env={"env_vars": variables},
        )(_task)

    def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """See `Workers.submit`."""
        future: Future[Any] = Future()
        self._refs[future] = self._task.remote(str(Path.cwd()), sys.path, function, arguments)
        return future

    def doing(self) -> str:
        """See `Workers.doing`."""
        return str(self._together) or "starting"

    def gather(self, futures: Mapping[Future[Any], str]) -> Iterator[tuple[str, Future[Any]]]:
        """See `Workers.gather`."""
        waiting = {self._refs[future]: future for future in futures}
        self._together.begin(futures.values())
        while waiting:
            ready, _ = self._ray.wait(list(waiting), timeout=0.5)
            for ref in ready:
                future = waiting.pop(ref)
                self._settle(future, ref)
                self._together.report(futures[future], 1)
                yield futures[future], future

    def _settle(self, future: Future[Any], ref: Any) -> None:
        try:
            future.set_result(self._ray.get(ref))
        except self._ray.exceptions.RayTaskError as error:
            future.set_exception(error.cause)
        except self._ray.exceptions.RayError as error:
            first = str(error).strip().splitlines()[0]
            future.set_exception(WorkError(f"Ray could not run this task (after up to {RETRIES} retries): {first}"))


def _task(folder: str, path: list[str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """One task on a worker, with the working directory and import path of the driver."""
    if Path(folder).is_dir():
        os.chdir(folder)
    sys.path.extend(entry for entry in path if entry not in sys.path)
    silence()
    return _run(function, arguments, lambda share, detail: None)


def _reach(address: str) -> None:
    """Raise UserError if nothing listens at ``host:port``; Ray itself would keep trying for ten minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"no Ray cluster at {address}: {error.strerror or error}") from None


@contextmanager
def ray_tasks(address: str | None, threads: int) -> Iterator[Workers]:
    """`RayTasks` on the cluster at ``address``; None: on a local one, started for this context.

    The output folder must be on a file system that all nodes share. Raises UserError without Ray, for a cluster that
    cannot be reached, and for more ``threads`` than this machine has cores.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray needs Ray: pip install 'rlzoo[ray]'") from None
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's new default, set to avoid its warning
    if address is not None:
        _reach(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=ERROR,
            include_dashboard=False if address is None else None,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"no Ray cluster at {address or 'this machine'}: {first}") from None
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)  # Ray installs its own, which ends the process at once
    if ray.cluster_resources().get("CPU", 0) < threads and address is None:
        ray.shutdown()
        raise UserError(f"--threads {threads}: this machine has fewer cores")
    try:
        yield RayTasks(ray, threads)
    finally:
        ray.shutdown()
