"""The retraining metrics of a suite: DiffROAR, ROAR, and what the shape of the masks alone gives away."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pullback.evaluation.diffroar import ROAR, DiffROAR
from pullback.evaluation.grid_sweep import RetrainingPlan, Running
from pullback.evaluation.measurements import Measurement, Measurements
from pullback.evaluation.orders import Data, Source
from pullback.evaluation.retraining import TrainSpec, multilayer_perceptron
from pullback.evaluation.retraining_grid import Sources
from pullback.evaluation.retraining_results import RetrainingResult
from pullback.evaluation.suites.cases import Case, Loaded, trained_net
from pullback.evaluation.suites.compared import CONTROLS, VARIANTS
from pullback.evaluation.suites.measuring import COLLAPSED, maps_of_data
from pullback.evaluation.task_cache import keeping

__all__ = ["Retraining", "plans", "retrained"]


@dataclass(frozen=True)
class Retraining:
    """How models are trained anew on what the maps keep: perceptrons, ``seeds`` for each map, level and side."""

    levels: tuple[float, ...] = (0.05, 0.2)
    seeds: int = 3
    epochs: int = 6
    batch: int = 128
    learning_rate: float = 2e-3
    hidden: tuple[int, ...] = (32, 32)

    @property
    def training(self) -> TrainSpec:
        return TrainSpec(epochs=self.epochs, batch=self.batch, learning_rate=self.learning_rate)


def retrained(
    cases: Sequence[Case],
    methods: Sequence[str],
    metrics: Sequence[str],
    masks: Sequence[str],
    how: Retraining,
    flags: Mapping[tuple[str, str, int], str],
    running: Running,
    maps_folder: Path | None,
) -> Measurements:
    """The rows of one model, trained from the seeds of ``cases``; methods with a flag have no maps.

    Several base models count as the units that are resampled; see ``RetrainingResult.score``.
    """
    first = cases[0]
    data = first.loaded()
    whole = Measurements([])
    sound = [case for case in cases if not trained_net(case).collapsed]
    usable = [
        name for name in methods if all(not flags.get((name, case.training, case.seed)) for case in sound)
    ]
    labels = [label for metric in metrics for label in _labels(metric, masks, how)]
    for name in methods:
        if name in usable and sound:
            continue
        why = (
            COLLAPSED
            if not sound
            else next(filter(None, (flags.get((name, c.training, c.seed)) for c in sound)))
        )
        whole += Measurements(
            [
                Measurement(data.name, first.name, name, name in CONTROLS, label, "higher", 0, (), why)
                for label in labels
            ]
        )
    if not sound or not usable:
        return whole
    with keeping(maps_folder):
        maps: dict[str, list[Source]] = {name: [] for name in usable}
        for case in sound:
            for name in usable:
                found = maps_of_data(case.content(), name)
                maps[name].append((found["train"].to(data.x.device), found["test"].to(data.x.device)))
    for metric in metrics:
        for mask in masks:
            if metric == "mask_shape" and mask != masks[0]:
                continue
            found_rows = _measured(metric, mask, data, first.name, maps, how, running)
            whole += found_rows
    return whole


def _labels(metric: str, masks: Sequence[str], how: Retraining) -> list[str]:
    each = masks if metric != "mask_shape" else masks[:1]
    return [_label(metric, level, mask) for mask in each for level in how.levels]


def _label(metric: str, level: float, mask: str) -> str:
    if metric == "mask_shape":
        return f"mask shape@{level:g}"
    return f"{'DiffROAR' if metric == 'diffroar' else 'ROAR'}@{level:g}, {mask}"


def plans(
    cases: Sequence[Case],
    methods: Sequence[str],
    metrics: Sequence[str],
    masks: Sequence[str],
    how: Retraining,
    running: Running,
) -> dict[str, RetrainingPlan]:
    """What ``retrained`` would train, by metric and mask; no map is made for it."""
    data = cases[0].loaded()
    # how many maps there are is all that counts here
    maps: dict[str, list[Source]] = {name: [(data.x, data.test_x)] * len(cases) for name in methods}
    found = {}
    for metric in metrics:
        for mask in masks if metric != "mask_shape" else masks[:1]:
            asked = _asked(metric, mask, data, maps, how)
            label = metric if metric == "mask_shape" else f"{metric}, {mask}"
            found[f"{data.name}, {cases[0].name}, {label}"] = asked.measure.plan(
                asked.train, asked.test, asked.own, asked.factory, controls=asked.controls, backend=running.backend,
                workers=running.workers,
            )  # fmt: skip
    return found


@dataclass(frozen=True, eq=False)
class _Asked:
    """A benchmark and what it is run with."""

    measure: DiffROAR | ROAR
    train: Data
    test: Data
    own: Sources
    controls: Sources
    factory: Callable[[], nn.Module]


def _asked(metric: str, mask: str, data: Loaded, maps: Mapping[str, list[Source]], how: Retraining) -> _Asked:
    x, test_x = data.x, data.test_x[:1000]
    if metric == "mask_shape":
        # the mask itself is the input: 1 where the map keeps, 0 elsewhere
        x, test_x, mask = torch.ones_like(x), torch.ones_like(test_x), "zeros"
    kind = ROAR if metric == "roar" else DiffROAR
    # a random map is drawn anew for every retraining, which one seed of the method would not be
    drawn = ("random",) if "random" in maps else ()
    return _Asked(
        kind(levels=how.levels, seeds=how.seeds, training=how.training, mask=mask, controls=drawn),
        (x, data.y),
        (test_x, data.test_y[:1000]),
        {name: each for name, each in maps.items() if name not in CONTROLS},
        {name: each for name, each in maps.items() if name in CONTROLS and name != "random"},
        partial(multilayer_perceptron, data.x[0].numel(), data.classes, how.hidden),
    )


def _measured(
    metric: str,
    mask: str,
    data: Loaded,
    model: str,
    maps: Mapping[str, list[Source]],
    how: Retraining,
    running: Running,
) -> Measurements:
    asked = _asked(metric, mask, data, maps, how)
    with warnings.catch_warnings():
        # constant maps are ordered at random, which the tables show
        warnings.simplefilter("ignore", UserWarning)
        found = asked.measure.run(
            asked.train, asked.test, asked.own, asked.factory, controls=asked.controls, out=running.out, resume=True,
            backend=running.backend, workers=running.workers, threads=running.threads, progress=running.progress,
        )  # fmt: skip
    if metric == "mask_shape":
        return _shape_rows(found, data.name, model)
    named = found.to_measurements(data.name, model)
    levels = {f"{metric}@{level:g}": _label(metric, level, mask) for level in how.levels}
    return Measurements(
        [replace(row, metric=levels[row.metric], variant=row.method in VARIANTS) for row in named.rows]
    )


def _shape_rows(found: RetrainingResult, data: str, model: str) -> Measurements:
    """How well the class is predicted from which pixels were kept alone: what the mask gives away. Lower is better."""
    rows: list[Measurement] = []
    for number, run in enumerate(found.runs):
        if run.side != "top" or run.method == "none":
            continue
        label = _label("mask_shape", run.level, "")
        seed = sum((row.method, row.metric) == (run.method, label) for row in rows)
        values = tuple(found.correct[number].double().tolist())
        flag = "" if run.converged else "some of its retrainings had not converged"
        rows.append(
            Measurement(
                data,
                model,
                run.method,
                run.control,
                label,
                "lower",
                seed,
                values,
                flag,
                run.method in VARIANTS,
            )
        )
    return Measurements(rows)
