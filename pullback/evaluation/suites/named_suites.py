"""Named benchmarks: which models, methods, controls and metrics, run as one sweep into one table."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from pullback.core.errors import InputError, MethodError, nearest
from pullback.evaluation.grid_sweep import RetrainingPlan, Running
from pullback.evaluation.measurements import Measurement, Measurements
from pullback.evaluation.suites.cases import Case, content_of, net_of
from pullback.evaluation.suites.compared import CONTROLS, METHODS, VARIANTS, made
from pullback.evaluation.suites.measuring import rows_of
from pullback.evaluation.suites.metrics import NEED_A_SIGNAL, RETRAINING, require_known
from pullback.evaluation.suites.retrainings import Retraining, plans, retrained
from pullback.evaluation.sweep import Sweep, SweepPlan, Task
from pullback.workers import Backend

__all__ = ["SUITES", "Suite", "run_suites", "suite"]

_MEASURE = "pullback.evaluation.suites.measuring:measured"
_MAP = "pullback.evaluation.suites.measuring:mapped"


@dataclass(frozen=True)
class Suite:
    """A benchmark as a protocol: everything that decides its numbers, in JSON's types.

    Args:
        models: (data, training) pairs. Data: "mnist" and "block_mnist" (embedded digits, or all from ``root``),
            "block_mnist_top", "block_signal", "fashion-mnist" and "cifar10" (from ``root``), or a .npz file with
            x_train, y_train, x_test, y_test and, where it is known, signal_mask of the test images. Training:
            "standard", "robust" (against an attack of ``radius`` in ``norm``), or "given": ``architecture`` is trained.
        metrics: names of ``pullback.evaluation.suites.metrics``; those that need a known signal are left out elsewhere.
        methods: readable names, or a method's text such as "smoothgrad(samples=8)".
        controls: maps that know nothing of the model, on by default.
        masks: what removed parts become; more than one, because a mask can decide the order by itself.
        architecture: "convolutional", "perceptron", or "module:factory".
        images, training_images: how many are explained, and trained on (None: all that there are).
        epochs, radius, norm, pool, device: as in ``Case``. ``seeds``: models trained, from ``seed`` on.
        retraining: of the metrics "diffroar", "roar" and "mask_shape".

    Raises:
        InputError, MethodError: unknown names, or numbers out of range.

    >>> Suite("mine", (("mnist", "standard"),), ("deletion",), methods=("gradient",), images=10).masks
    ('mean', 'zeros')
    """

    name: str
    models: tuple[tuple[str, str], ...]
    metrics: tuple[str, ...]
    methods: tuple[str, ...] = tuple(METHODS)
    controls: tuple[str, ...] = tuple(CONTROLS)
    masks: tuple[str, ...] = ("mean", "zeros")
    architecture: str = "convolutional"
    root: str | None = None
    images: int = 100
    training_images: int | None = None
    epochs: int = 6
    radius: float = 2.0
    norm: Literal["l2", "linf"] = "l2"
    pool: int = 1
    seeds: int = 3
    seed: int = 0
    device: str = "cpu"
    retraining: Retraining = field(default_factory=Retraining)

    def __post_init__(self) -> None:
        require_known(self.metrics)
        if (
            min(self.images, self.epochs, self.seeds, self.pool, self.training_images or 1) < 1
            or not self.models
        ):
            raise InputError(
                f"images={self.images}, training_images={self.training_images}, epochs={self.epochs}, "
                f"seeds={self.seeds}, pool={self.pool} and {len(self.models)} models were given. Expected at least 1 "
                "of each."
            )
        unknown = [name for name in self.controls if name not in CONTROLS]
        if unknown:
            raise MethodError(f"controls={unknown} was given. Expected some of {list(CONTROLS)}.")
        for case in self.cases():
            if (
                case.seed == self.seed
                and set(self.metrics) <= {*NEED_A_SIGNAL}
                and case.data in ("mnist", "cifar10")
            ):
                raise InputError(
                    f"The metrics {list(self.metrics)} were given for {case.data!r}, whose signal is not known. "
                    'Expected data such as "block_mnist", or other metrics.'
                )
        for name in self.methods:
            made(name, nn.Identity(), nn.Identity, self.seed)

    def cases(self) -> list[Case]:
        """Every model of every seed."""
        return [
            Case(
                data, training, seed, self.root, self.architecture, self.training_images, self.epochs, self.radius,
                self.norm, self.pool, self.device,
            )
            for data, training in self.models
            for seed in range(self.seed, self.seed + self.seeds)
        ]  # fmt: skip

    def run(
        self,
        *,
        out: str | os.PathLike[str] | None = None,
        resume: bool = True,
        backend: Backend = "serial",
        workers: int | None = None,
        threads: int | None = None,
        progress: bool = True,
        advance: Callable[[int, int], None] | None = None,
    ) -> Measurements:
        """Train, explain and measure; what is in the folder ``out`` already is not done again.

        A method that a model cannot have, a collapsed model, a map that is not finite: such rows hold no number and say
        why. ``backend``, ``workers``, ``threads``, ``resume`` and ``advance`` are as in ``Sweep.run``.

        Raises:
            InputError, FormatError: data that is not there, a folder of something else. TaskError: a task failed.
        """
        folder = None if out is None else Path(out)
        sweep = self._sweep(folder)
        rows: list[dict[str, Any]] = []
        if sweep is not None:
            rows = sweep.run(
                backend, workers, threads=threads, progress=progress, resume=resume, advance=advance
            )
        models = {
            f"{row['data']}, {row['model']}, seed {row['seed']}": {
                "accuracy": row["accuracy"],
                "converged": row["converged"],
            }
            for row in rows
        }
        whole = Measurements(
            _measurements(rows), {**self.settings(), "models": models} if models else self.settings()
        )
        retraining = [name for name in self.metrics if name in RETRAINING]
        if retraining:
            whole += self._retrained(retraining, folder, Running(None, resume, backend, workers, threads))
        return whole

    def on(self, model: nn.Module, x: Tensor, signal: Tensor | None = None) -> Measurements:
        """The suite's metrics of one model and images in memory, without training, files or other processes.

        Args:
            model: a classifier of single tensors, in eval mode: x (n, ...) -> logits (n, classes).
            x: what is explained, all of it.
            signal: bool, of x's shape or 1 where it is shared: which parts carry the label, where that is known.

        Raises InputError for inputs and masks that do not fit, and where no metric is left.

        >>> import torch
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> few = suite("faithfulness", metrics=("gini",), methods=("gradient",), controls=("random",))
        >>> few.on(net.eval(), torch.rand(4, 1, 4, 4)).methods
        ('gradient', 'random')
        """
        if not isinstance(model, nn.Module) or model.training or not len(x):
            raise InputError(
                f"A {type(model).__name__}{' in train mode' * getattr(model, 'training', False)} and {len(x)} inputs "
                "were given. Expected an nn.Module in eval mode, and at least one input."
            )
        metrics = [name for name in self.metrics if name not in RETRAINING]
        metrics = [name for name in metrics if signal is not None or name not in NEED_A_SIGNAL]
        if not metrics:
            raise InputError(
                f"None of the metrics {list(self.metrics)} can be measured here. Expected signal= for those that need "
                "it; retraining needs training data: Suite.run."
            )
        net = net_of(model, x)
        facts = {"data": "x", "model": type(model).__name__, "seed": self.seed}
        mask = None if signal is None else signal.expand_as(x)
        rows = [
            row
            for name in (*self.methods, *self.controls)
            for row in rows_of(net, x, mask, name, metrics, self.masks, self.seed, facts)
        ]
        return Measurements(_measurements(rows), self.settings())

    def plan(
        self,
        *,
        out: str | os.PathLike[str] | None = None,
        backend: Backend = "serial",
        workers: int | None = None,
    ) -> dict[str, SweepPlan | RetrainingPlan]:
        """What ``run`` has to do, and how long that should take: "maps", and each retraining benchmark by its name.

        A first map is made and measured, and kept in ``out``; a few steps of retraining are timed.
        """
        found: dict[str, SweepPlan | RetrainingPlan] = {}
        sweep = self._sweep(None if out is None else Path(out))
        if sweep is not None:
            found["maps"] = sweep.plan(backend, workers)
        metrics = [name for name in self.metrics if name in RETRAINING]
        running = Running(backend=backend, workers=workers)
        for pair in self.models if metrics else ():
            cases = [case for case in self.cases() if (case.data, case.training) == pair]
            names = [*self.methods, *self.controls]
            found |= plans(cases, names, metrics, self.masks, self.retraining, running)
        return found

    def settings(self) -> dict[str, Any]:
        """All of it as JSON, which ``from_settings`` reads."""
        return {"suite": asdict(self)}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Suite:
        """The suite whose settings a table carries. Raises InputError for other settings."""
        try:
            given = dict(settings["suite"])
            known = {each.name for each in fields(cls)}
            if unknown := set(given) - known:
                raise KeyError(f"unknown {sorted(unknown)}")
            retraining: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in given.pop("retraining", {}).items()
            }
            lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
            if "models" in lists:
                lists["models"] = tuple(tuple(pair) for pair in lists["models"])
            return cls(**{**given, **lists}, retraining=Retraining(**retraining))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"The settings are of no suite ({error}). Expected those of a result that a suite saved."
            ) from error

    def _sweep(self, folder: Path | None) -> Sweep | None:
        metrics = [name for name in self.metrics if name not in RETRAINING]
        if not metrics:
            return None
        tasks = []
        for case in self.cases():
            content = content_of(case)
            tasks += [
                Task(
                    _MEASURE,
                    {
                        "case": case.content(),
                        "method": name,
                        "metrics": metrics,
                        "images": self.images,
                        "masks": self.masks,
                    },
                    content,
                )
                for name in (*self.methods, *self.controls)
            ]
        return Sweep(tasks, None if folder is None else folder / "maps")

    def _retrained(self, metrics: list[str], folder: Path | None, running: Running) -> Measurements:
        whole = Measurements([])
        # the random control is drawn by the benchmark itself
        names = [*self.methods, *self.controls]
        for data, training in self.models:
            cases = [case for case in self.cases() if (case.data, case.training) == (data, training)]
            content = content_of(cases[0])
            place = None if folder is None else folder / f"retraining-{Path(data).stem}-{training}"
            tasks = [
                Task(_MAP, {"case": case.content(), "method": name}, content)
                for case in cases
                for name in names
            ]
            made_maps = Sweep(tasks, None if place is None else place / "maps").run(
                running.backend, running.workers, threads=running.threads
            )
            flags = {
                (
                    task.arguments["method"],
                    task.arguments["case"]["training"],
                    task.arguments["case"]["seed"],
                ): row["flag"]
                for task, row in zip(tasks, made_maps, strict=True)
            }
            with_place = replace(running, out=None if place is None else place / "trained")
            maps_folder = None if place is None else place / "maps"
            whole += retrained(
                cases, names, metrics, self.masks, self.retraining, flags, with_place, maps_folder
            )
        return whole


def _measurements(rows: Sequence[Mapping[str, Any]]) -> list[Measurement]:
    return [
        Measurement(
            row["data"], row["model"], row["method"], row["control"], row["metric"], row["direction"], row["seed"],
            tuple(row["values"]), row["flag"], row["method"] in VARIANTS,
        )
        for row in rows
    ]  # fmt: skip


SUITES: Mapping[str, Suite] = {
    "blockmnist": Suite(
        "blockmnist",
        (("block_mnist", "standard"), ("block_mnist", "robust"), ("block_mnist_top", "standard")),
        ("leakage", "relevance_mass", "relevance_rank", "pointing_game"),
        architecture="perceptron",
        epochs=5,
    ),
    "diffroar": Suite(
        "diffroar",
        (("block_mnist", "standard"), ("block_mnist", "robust")),
        ("diffroar", "mask_shape"),
        methods=("gradient", "SmoothGrad", "input × gradient", "integrated gradients", "LRP"),
        architecture="perceptron",
        pool=2,
        radius=1.0,
        training_images=3000,
        epochs=6,
    ),
    "faithfulness": Suite(
        "faithfulness",
        (("mnist", "standard"),),
        (
            "deletion",
            "insertion",
            "road",
            "faithfulness_correlation",
            "infidelity",
            "sensitivity_max",
            "gini",
        ),
        images=50,
    ),
    "sanity": Suite(
        "sanity",
        (("mnist", "standard"),),
        ("parameter_randomization", "random_logit"),
        images=50,
    ),
}


def suite(name: str, **options: Any) -> Suite:
    """A named suite with some of its settings replaced.

    Raises InputError for an unknown suite or setting, and what ``Suite`` raises.

    >>> suite("sanity", images=10).images
    10
    """
    if name not in SUITES:
        raise InputError(
            f"The suite {name!r} was given. Expected one of {[*SUITES, 'all']}; nearest: "
            f"{nearest(name, [*SUITES, 'all'])}."
        )
    known = [each.name for each in fields(Suite)]
    for option in options:
        if option not in known:
            raise InputError(
                f"The setting {option!r} was given. Expected one of {known}; nearest: {nearest(option, known)}."
            )
    return replace(SUITES[name], **options)


def run_suites(
    name: str,
    *,
    out: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    **running: Any,
) -> Measurements:
    """A named suite, or for "all" every one, each in a folder of its own; ``running`` as in ``Suite.run``.

    Raises as ``suite`` and ``Suite.run`` do.
    """
    chosen = [suite(each, **(options or {})) for each in (SUITES if name == "all" else (name,))]
    whole = Measurements([])
    for each in chosen:
        folder = None if out is None else Path(out) / each.name
        found = each.run(out=folder, **running)
        settings = {each.name: found.settings} if len(chosen) > 1 else found.settings
        whole += Measurements(found.rows, settings)
    return whole
