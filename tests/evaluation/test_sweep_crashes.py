"""Sweeps killed at random moments, at work and while they write, and written by several processes at once."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from pullback.evaluation import Sweep, Task
from tests.killing import kill_after, needs_fork, started

HERE = "tests.evaluation.sweep_tasks"
pytestmark = needs_fork


def tasks(count: int, sleep: float = 0.0) -> list[Task]:
    """A row each, and from every third task several rows with a NaN."""
    return [
        Task(f"{HERE}:powers", {"value": value})
        if value % 3 == 0
        else Task(f"{HERE}:square", {"value": value, "sleep": sleep})
        for value in range(1, count + 1)
    ]


def whole_lines(folder: Path) -> list[bytes]:
    """The lines of the results that are records; what a crash tore is none."""
    lines = (folder / "results.jsonl").read_bytes().splitlines()
    return [line for line in lines if line.startswith(b'{"key"') and line.endswith(b"}")]


def finished(folder: Path) -> int:
    return len(whole_lines(folder)) if (folder / "results.jsonl").exists() else 0


@pytest.mark.parametrize(("count", "sleep"), [(400, 0.0), (120, 0.005)], ids=["while writing", "at work"])
def test_killed_at_twenty_random_moments_the_rows_are_byte_for_byte_the_same(
    count: int, sleep: float, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    Sweep(tasks(count, sleep), whole).run()
    moments, kills = random.Random(0), 0
    while kills < 20 and finished(killed) < count:
        # a few tasks more each time, then anywhere in the next one
        enough = finished(killed) + moments.randrange(count // 40)
        begun = lambda enough=enough: finished(killed) >= enough  # noqa: E731
        kills += kill_after(
            moments.uniform(0, 0.004), lambda: Sweep(tasks(count, sleep), killed).run(), begun
        )
    assert kills >= 10  # twenty, unless the machine is so busy that the work runs ahead of who kills it
    rows = Sweep(tasks(count, sleep), killed).run()
    assert repr(rows) == repr(Sweep.load(whole).rows())  # NaN is not equal to itself
    assert whole_lines(killed) == whole_lines(whole)
    assert (killed / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()
    assert set(Sweep.load(killed).seconds) <= {task.key for task in tasks(count, sleep)}


def test_processes_that_write_one_sweep_leave_every_task_once(tmp_path: Path) -> None:
    both, alone = tmp_path / "both", tmp_path / "alone"
    expected = Sweep(tasks(200), alone).run()
    # each with its own part, overlapping in the middle, and in another order
    parts = (tasks(200)[:150], tasks(200)[50:][::-1], tasks(200))
    pids = [started(lambda part=part: Sweep(part, both).run()) for part in parts]  # type: ignore[misc]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    sweep = Sweep(tasks(200), both)
    assert sweep.missing == ()
    assert repr(sweep.run()) == repr(expected)
    assert sorted(whole_lines(both)) == sorted(whole_lines(alone))
    assert (both / "results.jsonl").read_bytes().count(b"\n") == 200
    assert (both / "table.csv").read_bytes() == (alone / "table.csv").read_bytes()
    assert len(Sweep.load(both).tasks) == 200


def test_a_writer_killed_in_the_middle_does_not_stop_the_other(tmp_path: Path) -> None:
    """The lock of a process that dies is free, and its torn line is ended by the next writer."""
    for number in range(5):
        pid = started(lambda: Sweep(tasks(200), tmp_path).run())
        kill_after(0.01 * (number + 1), lambda: Sweep(tasks(200)[::-1], tmp_path).run())
        assert os.waitpid(pid, 0)[1] == 0
        assert Sweep(tasks(200), tmp_path).missing == ()
        torn = (tmp_path / "results.jsonl").read_bytes()[:-20]
        (tmp_path / "results.jsonl").write_bytes(torn)
        assert len(Sweep(tasks(200), tmp_path).missing) == 1
    assert [row["value"] for row in Sweep(tasks(3), tmp_path).run()] == [1, 2, 3, 3]


def test_cached_tensors_survive_kills(tmp_path: Path) -> None:
    """A file that a crash left behind is whole, or it is made again."""

    def measured(folder: Path) -> Any:
        grid = [
            Task(f"{HERE}:total_of_cached", {"value": value, "metric": metric, "log": str(tmp_path / "log")})
            for value in range(40)
            for metric in ("sum", "mean")
        ]
        return Sweep(grid, folder).run()

    measured(tmp_path / "whole")
    moments = random.Random(1)
    for number in range(8):
        begun = lambda number=number: finished(tmp_path / "killed") >= 8 * number  # noqa: E731
        kill_after(moments.uniform(0, 0.004), lambda: measured(tmp_path / "killed"), begun)
    assert measured(tmp_path / "killed") == measured(tmp_path / "whole")


def test_the_task_that_kills_its_process_is_the_one_that_is_missing(tmp_path: Path) -> None:
    grid = [Task(f"{HERE}:deadly", {"value": value, "once": str(tmp_path / "once")}) for value in range(3)]
    assert kill_after(60.0, lambda: Sweep(grid, tmp_path / "sweep").run(), begun=lambda: False)
    assert [task.arguments["value"] for task in Sweep(grid, tmp_path / "sweep").missing] == [1, 2]
    assert [row["value"] for row in Sweep(grid, tmp_path / "sweep").run()] == [0, 1, 2]
