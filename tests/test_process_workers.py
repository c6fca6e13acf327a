"""Items given to spawned processes: the same outcomes as in this process, and nothing lost where one is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import pullback as pb
from pullback.core.errors import InputError, TaskError
from pullback.evaluation import Sweep, Task
from pullback.workers import each_outcome
from tests.test_dataset_attribution import METHOD, contents, data, network

HERE = "tests.evaluation.sweep_tasks"
pytestmark = pytest.mark.slow  # every worker imports torch anew


def grid(folder: Path) -> list[Task]:
    """Rows, several rows with NaN, tensors that tasks share, and one that kills its worker the first time."""
    return [
        Task(f"{HERE}:deadly", {"value": 1, "once": str(folder / "once")}),
        *(Task(f"{HERE}:square", {"value": value}) for value in range(6)),
        *(Task(f"{HERE}:powers", {"value": value}) for value in range(1, 4)),
        *(
            Task(f"{HERE}:total_of_cached", {"value": 7, "metric": name, "log": str(folder / "log")})
            for name in ("sum", "mean")
        ),
    ]


def test_two_processes_give_the_rows_of_one_and_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    tasks = grid(tmp_path)
    rows = Sweep(tasks, tmp_path / "process").run("process", 2, threads=1)
    assert (tmp_path / "once").exists()  # the worker did die
    assert repr(rows) == repr(Sweep(tasks, tmp_path / "serial").run(threads=1))
    for name in ("table.csv",):
        assert (tmp_path / "process" / name).read_bytes() == (tmp_path / "serial" / name).read_bytes()
    lines = [(tmp_path / each / "results.jsonl").read_text().splitlines() for each in ("process", "serial")]
    assert sorted(lines[0]) == sorted(lines[1])


def test_two_processes_write_the_files_of_one(tmp_path: Path) -> None:
    net, batches = network(), data(20).split(4)
    for backend in ("serial", "process"):
        pb.explain_dataset(
            net, batches, METHOD, out=tmp_path / backend, backend=backend, workers=2, threads=1  # type: ignore[arg-type]
        )  # fmt: skip
    assert contents(tmp_path / "process") == contents(tmp_path / "serial")
    assert len(contents(tmp_path / "serial")) == 5


def test_a_task_that_always_kills_its_worker_fails_and_the_others_are_done(tmp_path: Path) -> None:
    tasks = [Task(f"{HERE}:deadly", {"value": value}) for value in range(3)]
    sweep = Sweep(tasks, tmp_path)
    with pytest.raises(
        TaskError, match=r"its worker process was killed by signal 9, 3 times; out of memory is"
    ):
        sweep.run("process", 2)
    assert [row["value"] for row in Sweep(tasks, tmp_path).rows()] == [0, 2]
    assert [failure.task.arguments["value"] for failure in sweep.failures] == [1]


def test_what_cannot_be_sent_is_named() -> None:
    class Local(nn.Module):
        pass

    with pytest.raises(
        InputError, match=r"This cannot be sent to another process.*Define it there, or use backend"
    ):
        list(each_outcome(print, Local(), [1], backend="process", workers=1))
    with pytest.raises(InputError, match=r"Item 0 cannot be sent to another process"):
        list(each_outcome(_first, None, [Local()], backend="process", workers=1))


def test_closing_ends_the_workers() -> None:
    outcomes = each_outcome(_process_id, None, range(100), backend="process", workers=1)
    pid = next(outcomes).value
    outcomes.close()
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]


def test_an_item_goes_without_the_storage_it_is_a_view_of() -> None:
    from pullback.workers import packed

    whole = torch.zeros(10_000)
    assert len(packed(whole[:2])) < 2000


def _first(shared: object, item: object) -> object:
    return item


def _process_id(shared: object, item: object) -> int:
    import os

    return os.getpid()
