"""Comparisons on a Ray cluster: the results of one machine, also when a node dies half way."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comparisons import small
from rich.console import Console

from rlzoo.cli import main
from rlzoo.comparison.runner import compare
from rlzoo.errors import UserError
from rlzoo.jobs.on_ray import ray_tasks

ray = pytest.importorskip("ray")
ALGORITHMS: dict[str, dict[str, object]] = {"sft": {}, "rft": {}, "dpo": {}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """One node of one CPU, as processes of this machine."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_health_check_period_ms", "500")
        patched.setenv("RAY_health_check_failure_threshold", "2")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_node_that_dies_half_way_costs_nothing_but_time(cluster: Any, tmp_path: Path) -> None:
    """In a comparison whose cells share a first stage too."""
    others = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    experiment = small(ALGORITHMS, training__steps=6, warm_up={"objective": "sft", "training": {"steps": 2}})
    lines: list[str] = []
    dead = threading.Event()

    class Listener:
        """Ends a node when the first cell is done, but not that of this process, which may be any with Ray 2.50."""

        def write(self, text: str) -> int:
            lines.append(text)
            if "[1/" in text and not dead.is_set():
                dead.set()
                own = ray._private.worker.global_worker.node._raylet_socket_name
                ended = next(node for node in others if node._raylet_socket_name != own)
                cluster.remove_node(ended, allow_graceful=False)
            return len(text)

        def flush(self) -> None:
            pass

    console = Console(file=Listener(), width=200)  # type: ignore[arg-type]
    found = compare(experiment, tmp_path / "ray", console=console, executor="ray", address=cluster.address)
    assert dead.is_set()
    assert any("on the Ray cluster" in line for line in lines)

    expected = compare(experiment, tmp_path / "local", console=Console(quiet=True))
    assert found["failed"] == expected["failed"] == []
    assert found["warm_up"]["steps"] == 2
    assert [{**step, "seconds": 0.0} for step in found["warm_up"]["training"]] == [
        {**step, "seconds": 0.0} for step in expected["warm_up"]["training"]
    ]
    for ours, theirs in zip(found["cells"], expected["cells"], strict=True):
        assert ours["metrics"] == theirs["metrics"]
        assert ours["training"] == theirs["training"]
        timeless = [[{**point, "seconds": 0.0} for point in one["curve"]] for one in (ours, theirs)]
        assert timeless[0] == timeless[1]
    assert (tmp_path / "ray" / "outcomes.parquet").read_bytes() == (
        tmp_path / "local" / "outcomes.parquet"
    ).read_bytes()


@pytest.mark.slow
def test_what_goes_wrong_in_a_task_is_told_in_one_line(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what goes right finds files and modules where the driver does, and runs with as many threads."""
    monkeypatch.setattr("rlzoo.jobs.on_ray.RETRIES", 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))

    def works(report: Any) -> tuple[str, bool, list[str]]:
        variables = [os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")]
        return str(Path.cwd()), str(tmp_path / "modules") in sys.path, variables

    def wrong(report: Any) -> None:
        raise UserError("this is wrong")

    def ends(report: Any) -> None:
        os._exit(1)

    with ray_tasks(cluster.address, 1) as tasks:
        futures = {tasks.submit(function.__name__, function): function.__name__ for function in (works, wrong, ends)}
        found = dict(tasks.gather(futures))
    assert found["works"].result() == (str(tmp_path), True, ["1"] * 3)
    assert type(found["wrong"].exception()) is UserError and str(found["wrong"].exception()) == "this is wrong"
    told = str(found["ends"].exception())
    assert told.startswith("Ray could not run this task") and "\n" not in told


@pytest.mark.slow
def test_there_is_no_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "facts", "--executor", "ray", "--address", "127.0.0.1:9", "--out", "out"]) == 2
    assert capsys.readouterr().err.startswith("rlzoo: no Ray cluster at 127.0.0.1:9")
    assert not (tmp_path / "out").exists()
    assert main(["compare", "facts", "--address", "127.0.0.1:9", "--out", "out"]) == 2
    assert "add --executor ray" in capsys.readouterr().err
