"""The same on a local Ray cluster of two CPUs; skipped by name where Ray is not installed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pullback as pb
from pullback.core.errors import TaskError
from pullback.evaluation import Sweep, Task
from pullback.workers import each_outcome
from tests.test_dataset_attribution import METHOD, contents, data, network
from tests.test_process_workers import grid

HERE = "tests.evaluation.sweep_tasks"
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install pullback[ray]")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One local cluster for all of these; the package joins it."""
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}},
    )  # fmt: skip
    yield
    ray.shutdown()


def test_a_cluster_gives_the_rows_of_one_process_and_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    tasks = grid(tmp_path)
    rows = Sweep(tasks, tmp_path / "ray").run("ray", 2, threads=1)
    assert (tmp_path / "once").exists()
    assert repr(rows) == repr(Sweep(tasks, tmp_path / "serial").run(threads=1))
    assert (tmp_path / "ray" / "table.csv").read_bytes() == (tmp_path / "serial" / "table.csv").read_bytes()
    lines = [(tmp_path / each / "results.jsonl").read_text().splitlines() for each in ("ray", "serial")]
    assert sorted(lines[0]) == sorted(lines[1])


def test_a_cluster_writes_the_files_of_one_process(tmp_path: Path) -> None:
    net, batches = network(), data(20).split(4)
    for backend in ("serial", "ray"):
        pb.explain_dataset(
            net, batches, METHOD, out=tmp_path / backend, backend=backend, workers=2, threads=1  # type: ignore[arg-type]
        )  # fmt: skip
    assert contents(tmp_path / "ray") == contents(tmp_path / "serial")


def test_workers_killed_from_outside_lose_nothing(tmp_path: Path) -> None:
    """Each item notes its process while it works, and the test kills the first that it sees."""
    killed: list[int] = []
    found: dict[int, Any] = {}
    for outcome in each_outcome(_noted, tmp_path, range(8), backend="ray", workers=2):
        found[outcome.number] = outcome.value
        at_work = [int(note.name) for note in tmp_path.glob("*")]
        if at_work and not killed:
            killed.append(at_work[0])
            os.kill(at_work[0], signal.SIGKILL)
    assert killed
    assert found == {number: number**2 for number in range(8)}


def test_a_task_that_always_kills_its_worker_fails_and_the_others_are_done(tmp_path: Path) -> None:
    tasks = [Task(f"{HERE}:deadly", {"value": value}) for value in range(3)]
    with pytest.raises(TaskError, match=r"WorkerCrashedError|OutOfMemory|died"):
        Sweep(tasks, tmp_path).run("ray", 2)
    assert [row["value"] for row in Sweep(tasks, tmp_path).rows()] == [0, 2]


def test_without_a_cluster_one_is_made_for_the_duration() -> None:
    ray.shutdown()
    found = list(each_outcome(_noted_nowhere, 3, range(2), backend="ray", workers=1))
    assert [outcome.value for outcome in found] == [3, 4]
    assert not ray.is_initialized()


def _noted_nowhere(shared: int, item: int) -> int:
    return shared + item


def _noted(folder: Path, item: int) -> int:
    note = folder / str(os.getpid())
    note.touch()
    time.sleep(0.3)
    note.unlink()
    return item**2
