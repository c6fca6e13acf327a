"""Sweeps: every task once, in the order of the tasks, across failures, torn files and other writers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pullback.core.errors import FormatError, InputError, TaskError
from pullback.evaluation import Sweep, Task
from tests.evaluation import sweep_tasks

HERE = "tests.evaluation.sweep_tasks"


def squares(count: int = 4, **more: Any) -> list[Task]:
    return [Task(f"{HERE}:square", {"value": value, **more}) for value in range(count)]


def test_rows_are_the_functions_own_in_the_order_of_the_tasks(tmp_path: Path) -> None:
    tasks = [*reversed(squares(3)), Task(f"{HERE}:powers", {"value": 3})]
    for out in (None, tmp_path / "sweep"):
        rows = Sweep(tasks, out).run()
        assert [row["value"] for row in rows] == [2, 1, 0, 3, 3]
        assert rows[0] == sweep_tasks.square(2)
        assert rows[4]["result"] == 9
        assert math.isnan(rows[4]["log"])


def test_a_finished_task_is_not_done_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = Sweep(squares(3, log=str(log)), tmp_path / "sweep").run()
    longer = Sweep(squares(5, log=str(log)), tmp_path / "sweep")
    assert [task.arguments["value"] for task in longer.missing] == [3, 4]
    assert longer.run()[:3] == first
    assert log.read_text().split() == ["0", "1", "2", "3", "4"]
    with pytest.raises(FormatError, match="5 results of this sweep and resume=False"):
        longer.run(resume=False)


def test_equal_tasks_are_done_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    (task,) = squares(1, log=str(log))
    assert len(Sweep([task, task]).run()) == 2
    assert log.read_text().split() == ["0"]


def test_results_are_read_back_from_the_folder_alone(tmp_path: Path) -> None:
    rows = Sweep(squares(), tmp_path).run()
    loaded = Sweep.load(tmp_path)
    assert loaded.rows() == rows
    assert loaded.tasks == tuple(squares())
    assert set(loaded.seconds) == {task.key for task in loaded.tasks}
    assert "seconds" not in (tmp_path / "results.jsonl").read_text()
    table = (tmp_path / "table.csv").read_text().splitlines()
    assert table[0] == "value,square,root"
    assert table[3] == "2,4,1.4142135623730951"


def test_keys_follow_from_everything_that_decides_a_result() -> None:
    task = Task(f"{HERE}:square", {"value": 1, "levels": (0.1, 0.2)}, {"data": "a"})
    assert task.arguments["levels"] == [0.1, 0.2]
    same = Task(f"{HERE}:square", {"levels": [0.1, 0.2], "value": 1}, {"data": "a"})
    others = [
        Task(f"{HERE}:powers", task.arguments, {"data": "a"}),
        Task(task.function, {**task.arguments, "value": 1.0}, {"data": "a"}),
        Task(task.function, {**task.arguments, "value": True}, {"data": "a"}),
        Task(task.function, task.arguments, {"data": "b"}),
        Task(task.function, task.arguments, {"data": "a"}, version="0"),
    ]
    assert task.key == same.key
    assert len({each.key for each in (task, *others)}) == 6


def test_what_the_caller_changes_later_does_not_change_a_task() -> None:
    levels = [0.1]
    task = Task(f"{HERE}:square", {"levels": levels})
    key = task.key
    levels.append(0.2)
    assert Task(task.function, task.arguments).key == key


def test_a_failing_task_is_recorded_and_the_others_are_done(tmp_path: Path) -> None:
    tasks = [Task(f"{HERE}:inverse", {"value": value}) for value in (0, 1, 2)]
    sweep = Sweep(tasks, tmp_path)
    with pytest.raises(TaskError) as caught:
        sweep.run()
    assert str(caught.value) == (
        "1 of 3 tasks failed; the results of the other 2 are kept. The first: tests.evaluation.sweep_tasks:inverse "
        '{"value":0} raised ZeroDivisionError: division by zero. Run again to try them again; traces are in '
        f'{tmp_path}/failures.jsonl. on_failure="warn" gives the rows of the others.'
    )
    assert "return" in sweep.failures[0].trace
    (line,) = (tmp_path / "failures.jsonl").read_text().splitlines()
    assert json.loads(line)["message"] == "division by zero"
    with pytest.warns(UserWarning, match="1 of 3 tasks failed"):
        assert [row["value"] for row in sweep.run(on_failure="warn")] == [1, 2]
    assert len((tmp_path / "failures.jsonl").read_text().splitlines()) == 2
    with pytest.raises(ZeroDivisionError):
        sweep.run(on_failure="stop")


def test_a_failed_task_is_tried_again(tmp_path: Path) -> None:
    tasks = [Task(f"{HERE}:mended", {"value": 1, "flag": str(tmp_path / "flag")})]
    sweep = Sweep(tasks, tmp_path / "sweep")
    with pytest.raises(TaskError, match="OSError: not yet"):
        sweep.run()
    (tmp_path / "flag").touch()
    assert sweep.run() == [{"value": 1}]


def test_what_is_no_row_is_a_failure() -> None:
    with pytest.raises(TaskError, match=r"gave a Tensor. Expected a row \(a dict of JSON values\)"):
        Sweep([Task(f"{HERE}:no_row", {"value": 1})]).run()


def test_an_interrupt_leaves_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(value: int) -> dict[str, Any]:
        calls.append(value)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"value": value}

    monkeypatch.setattr(sweep_tasks, "square", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Sweep(squares(), tmp_path).run()
    assert len(Sweep(squares(), tmp_path).run()) == 4
    assert calls == [0, 1, 2, 2, 3]


def test_the_file_torn_at_any_byte_is_survived(tmp_path: Path) -> None:
    rows = Sweep(squares(2), tmp_path).run()
    file, table = tmp_path / "results.jsonl", (tmp_path / "table.csv").read_bytes()
    whole = file.read_bytes()
    ends = [whole.index(b"\n"), len(whole) - 1]
    for length in sorted({*range(0, len(whole), 13), *ends, *(end + 1 for end in ends)}):
        file.write_bytes(whole[:length])
        assert Sweep(squares(2), tmp_path).run() == rows
        lines = [line for line in file.read_bytes().splitlines(keepends=True) if line in whole]
        # a cut between two lines tears nothing
        assert b"".join(lines) == whole
    assert (tmp_path / "table.csv").read_bytes() == table


def test_plan_predicts_from_a_probe_that_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    sweep = Sweep(squares(5, log=str(log), sleep=0.05), tmp_path / "sweep")
    assert str(sweep.plan(probe=False)) == "5 tasks: 0 finished, 5 missing"
    plan = sweep.plan()
    assert (plan.tasks, plan.finished, plan.workers) == (5, 1, 1)
    assert plan.seconds is not None
    assert plan.memory is not None
    assert plan.seconds >= 4 * 0.05  # the machine may be busy
    assert 2**26 < plan.memory < 2**36
    assert str(plan).startswith("5 tasks: 1 finished, 4 missing; about ")
    assert str(plan).endswith("GiB (from a probe, which is kept)")
    sweep.run()
    assert log.read_text().split() == ["0", "1", "2", "3", "4"]
    assert str(sweep.plan("process", 3)) == "5 tasks: 5 finished, 0 missing (from 5 finished)"


def test_progress_counts_what_is_there_already(tmp_path: Path) -> None:
    Sweep(squares(2), tmp_path).run()
    seen: list[tuple[int, int]] = []
    Sweep(squares(4), tmp_path).run(advance=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 4), (4, 4)]


def test_several_tasks_at_once() -> None:
    packs = []

    def work(arguments: Any) -> list[dict[str, Any]]:
        packs.append(len(arguments))
        return [{"value": each["value"]} for each in arguments]

    assert [row["value"] for row in Sweep(squares(5), work=work, pack=2).run()] == list(range(5))
    assert packs == [2, 2, 1]


def test_cached_tensors_are_computed_once_and_a_damaged_file_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tasks = [
        Task(f"{HERE}:total_of_cached", {"value": value, "metric": metric, "log": str(log)})
        for metric in ("sum", "mean", "amax")
        for value in (1, 2)
    ]
    rows = Sweep(tasks[:4], tmp_path / "sweep").run()
    assert rows == [
        {"value": 1, "sum": 3.0},
        {"value": 2, "sum": 6.0},
        {"value": 1, "mean": 1.0},
        {"value": 2, "mean": 2.0},
    ]
    assert log.read_text().split() == ["1", "2"]
    for file in (tmp_path / "sweep" / "attributions").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-5])
    assert Sweep(tasks, tmp_path / "sweep").run()[4:] == [
        {"value": 1, "amax": 1.0},
        {"value": 2, "amax": 2.0},
    ]
    assert log.read_text().split() == ["1", "2", "1", "2"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Task("square", {}), 'The function \'square\' was given. Expected "package.module:name"'),
        (lambda: Task("a:b", [1]), "Arguments of type list were given"),  # type: ignore[arg-type]
        (lambda: Task("a:b", {"x": torch.ones(1)}), r"arguments\['x'\] is a Tensor. Expected what JSON holds"),
        (lambda: Task("a:b", {"x": [1, {2: 3}]}), r"arguments\['x'\]\[1\] is a dict"),
        (lambda: Task("a:b", {"x": math.inf}), r"arguments\['x'\] is inf"),
        (lambda: Sweep([]), "0 tasks, pack=1 were given"),
        (lambda: Sweep(squares(), pack=2), "work= for more"),
        (lambda: Sweep([Task("no.such.module:f")]).run(), "'no.such.module:f' cannot be imported: No module named 'no'"),
        (lambda: Sweep([Task(f"{HERE}:nothing")]).run(), "has no attribute 'nothing'"),
        (lambda: Sweep([Task(f"{HERE}:HERE"), *squares()]).run(), "has no attribute"),
        (lambda: Sweep([Task("math:pi")]).run(), "'math:pi' is a float. Expected a function"),
        (lambda: Sweep(squares()).run("threads"), 'backend=\'threads\' was given. Expected "serial", "process" or "ray"'),  # type: ignore[arg-type]
        (lambda: Sweep(squares()).run("process", 0), "workers=0 was given"),
        (lambda: Sweep(squares()).run(threads=0), "threads=0 was given"),
        (lambda: Sweep(squares()).run(on_failure="ignore"), "on_failure='ignore' was given"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_equal_keys_of_other_content_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Task, "key", "same")
    with pytest.raises(InputError, match=r"Two tasks have the key same\.\.\. and differ"):
        Sweep(squares(2))


def test_a_folder_of_another_sweep_is_refused(tmp_path: Path) -> None:
    Sweep(squares(1), tmp_path).run()
    with pytest.raises(
        FormatError, match=r"holds a sweep of \['tests.*:square'\]; these tasks are of \['.*:powers'\]"
    ):
        Sweep([Task(f"{HERE}:powers", {"value": 1})], tmp_path)
    document = tmp_path / "sweep.json"
    document.write_text("{")
    with pytest.raises(FormatError, match="damaged, or of another version"):
        Sweep.load(tmp_path)
    document.unlink()
    with pytest.raises(FormatError, match=r"a results\.jsonl without a sweep\.json"):
        Sweep(squares(1), tmp_path)
    with pytest.raises(FormatError, match="is no sweep"):
        Sweep.load(tmp_path)


def test_results_changed_by_hand_are_refused(tmp_path: Path) -> None:
    Sweep(squares(1), tmp_path).run()
    file = tmp_path / "results.jsonl"
    file.write_text(file.read_text().replace('"value": 0}', '"value": 5}', 1))
    with pytest.raises(FormatError, match="it was changed by hand"):
        Sweep(squares(1), tmp_path).run()
    file.write_text('{"value": 1}\n')
    with pytest.raises(FormatError, match='a line 1 without a "key"'):
        Sweep(squares(1), tmp_path).run()
