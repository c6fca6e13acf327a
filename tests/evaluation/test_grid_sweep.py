"""Retraining benchmarks in a folder: killed, resumed, extended and spread over processes, they give the same runs."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import pullback as pb
from pullback.core.errors import FormatError, InputError, MethodError
from pullback.datasets.theory import block_signal
from pullback.evaluation import (
    ROAR,
    DiffROAR,
    RetrainingResult,
    Sweep,
    TrainSpec,
    multilayer_perceptron,
    train,
)
from pullback.evaluation.orders import attributed
from pullback.evaluation.task_cache import keeping
from tests.killing import kill_after, needs_fork

DATA = block_signal(160, blocks=6, block_size=2, noise=0.05, seed=0)
TRAIN, TEST = (DATA.x[:100], DATA.y[:100]), (DATA.x[100:], DATA.y[100:])
TRUE = (DATA.signal_mask[:100].float() + DATA.x[:100].abs(), DATA.signal_mask[100:].float())
# importable, as other processes need it
NET = partial(multilayer_perceptron, 12, 2, (8,))
MEASURE = DiffROAR(
    levels=(0.2, 1.0), seeds=2, training=TrainSpec(epochs=4, batch=32, learning_rate=1e-2), vectorize="stack"
)


def told(result: RetrainingResult) -> list[Any]:
    """Everything but the times."""
    return [[replace(run, seconds=0.0) for run in result.runs], result.correct.tolist(), result.settings]


def measured(measure: DiffROAR | ROAR = MEASURE, **more: Any) -> RetrainingResult:
    sources = {"signal": TRUE, "x": (TRAIN[0], TEST[0])}
    return measure.run(TRAIN, TEST, more.pop("attributions", sources), NET, **more)


def test_a_folder_changes_nothing_and_is_read_the_second_time(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    alone = measured(progress=lambda done, total: seen.append((done, total)))
    # five attributions with two sides at the level below 1, and two seeds; one run of everything per seed
    assert seen[-1] == (22, 22)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    kept = measured(out=tmp_path)
    assert told(kept) == told(alone)
    size = (tmp_path / "results.jsonl").stat().st_size
    again = measured(out=tmp_path)
    assert told(again) == told(alone)
    assert [run.seconds for run in again.runs] == [run.seconds for run in kept.runs]
    assert (tmp_path / "results.jsonl").stat().st_size == size
    assert all(run.seconds > 0 for run in again.runs)
    with pytest.raises(FormatError, match="6 results of this sweep and resume=False"):
        measured(out=tmp_path, resume=False)


def test_only_what_is_new_is_trained(tmp_path: Path) -> None:
    measured(out=tmp_path)
    assert len(Sweep.load(tmp_path).seconds) == 6
    third = {"signal": TRUE, "x": (TRAIN[0], TEST[0]), "third": (-TRUE[0], -TRUE[1])}
    measured(out=tmp_path, attributions=third)
    assert len(Sweep.load(tmp_path).seconds) == 7
    # what masks show, how it is trained and what the data are is in the key
    changed: list[dict[str, Any]] = [
        {"measure": replace(MEASURE, mask=0.5)},
        {"measure": replace(MEASURE, mask=0.25)},
        {"measure": replace(MEASURE, training=replace(MEASURE.training, epochs=5))},
        {"measure": replace(MEASURE, training=replace(MEASURE.training, seed=1))},
    ]
    for number, more in enumerate(changed):
        assert told(measured(out=tmp_path, **more)) == told(measured(**more))
        assert len(Sweep.load(tmp_path).seconds) == 7 + 6 * (number + 1)


@needs_fork
def test_killed_and_resumed_the_runs_are_the_same(tmp_path: Path) -> None:
    """A task is three runs here, so that kills find some of them done."""
    measure = replace(MEASURE, chunk=3, training=replace(MEASURE.training, epochs=8))
    whole = measured(measure, out=tmp_path / "whole")
    moments = random.Random(0)

    def lines() -> int:
        file = tmp_path / "killed" / "results.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    for number in range(4):
        begun = lambda number=number: lines() > number  # noqa: E731
        work = lambda: measured(measure, out=tmp_path / "killed")  # noqa: E731
        kill_after(moments.uniform(0, 0.02), work, begun)
    assert told(measured(measure, out=tmp_path / "killed")) == told(whole)
    tables = [(tmp_path / each / "table.csv").read_bytes() for each in ("killed", "whole")]
    assert tables[0] == tables[1]


def test_the_runs_do_not_depend_on_the_chunk() -> None:
    """Members are stacked with others, and still are right about the same examples."""
    alone = measured()
    for chunk in (1, 4):
        other = measured(replace(MEASURE, chunk=chunk))
        assert torch.equal(other.correct, alone.correct)
        assert [run.value for run in other.runs] == [run.value for run in alone.runs]


@pytest.mark.slow
def test_two_processes_train_the_same_runs(tmp_path: Path) -> None:
    serial = measured(threads=1)
    assert told(measured(backend="process", workers=2, threads=1, out=tmp_path)) == told(serial)
    with pytest.raises(InputError, match="cannot be sent to another process"):
        MEASURE.run(TRAIN, TEST, {"signal": TRUE}, lambda: NET(), backend="process")


def test_maps_of_a_method_by_its_text_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = train(NET, *TRAIN, MEASURE.training).model
    values = [pb.explain(model, x, method="integrated_gradients").values for x in (TRAIN[0], TEST[0])]
    given = measured(attributions={"ig": tuple(values)}, model=model)
    by_text = measured(attributions={"ig": "integrated_gradients"}, model=model, out=tmp_path)
    assert told(by_text) == told(given)
    files = sorted((tmp_path / "attributions").glob("*.safetensors"))
    assert len(files) == 2  # training and test data
    with monkeypatch.context() as patch:
        patch.setattr("pullback.evaluation.orders.pose", None)  # no map can be made
        with keeping(tmp_path):
            found = attributed("integrated_gradients", model, (TRAIN, TEST), False, "ig")
    assert all(torch.equal(one, other) for one, other in zip(found, values, strict=True))
    with pytest.raises(InputError, match=r"method 'gradient' was given without a model. Expected model="):
        measured(attributions={"g": "gradient"})
    with pytest.raises(InputError, match="A list was given for 'g'"):
        attributed([1], model, (TRAIN, TEST), False, "g")  # type: ignore[arg-type]


def test_the_plan_counts_runs_and_predicts_their_time() -> None:
    plan = MEASURE.plan(TRAIN, TEST, {"signal": TRUE, "x": (TRAIN[0], TEST[0])}, NET)
    assert (plan.members, plan.tasks, plan.workers) == (22, 6, 1)
    # 90 of 100 examples in batches of 32, four epochs
    assert plan.steps == 12
    assert 2**26 < plan.memory < 2**36
    assert str(plan).startswith("22 retrainings of 12 steps in 6 tasks: about ")
    assert str(plan).endswith("GiB (from 4 steps; attributions not counted)")
    roar = ROAR(levels=(0.5,), seeds=3, training=MEASURE.training, controls=("random",))
    # one side, and one run of everything per seed
    assert roar.plan(TRAIN, TEST, {"a": TRUE}, NET, backend="process", workers=2).members == 9
    long = replace(MEASURE, training=replace(MEASURE.training, epochs=400))
    longer = long.plan(TRAIN, TEST, {"signal": TRUE}, NET)
    assert longer.seconds > 10 * plan.seconds  # a hundred times the steps
    result = measured()
    took = sum({(run.method, run.side, run.base_seed, run.retrain_seed, run.level): run.seconds for run in result.runs}.values())  # fmt: skip
    assert 0.02 < plan.seconds / took < 50  # the machine may be busy


def test_a_way_that_was_timed_is_kept_for_the_folder(tmp_path: Path) -> None:
    auto = replace(MEASURE, vectorize="auto")
    measured(auto, out=tmp_path)
    file = tmp_path / "vectorize.jsonl"
    (line,) = file.read_text().splitlines()
    assert '"way": "' in line
    # what the folder says is followed, whatever is faster today
    file.write_text(re.sub('"way": ".*"', '"way": "none"', line) + "\n")
    with pytest.raises(MethodError, match="vectorize='none' was given"):
        measured(replace(auto, seeds=3), out=tmp_path)
