"""DiffROAR and ROAR: can a model be retrained on what an attribution keeps, or without it?"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from pullback.evaluation.ensembles import Vectorize
from pullback.evaluation.grid_sweep import RetrainingPlan, Running
from pullback.evaluation.orders import CONTROLS, Data
from pullback.evaluation.ranking import Granularity, Ranking
from pullback.evaluation.retraining import TrainSpec
from pullback.evaluation.retraining_grid import Sources, measured, plan, require_valid
from pullback.evaluation.retraining_results import RetrainingResult
from pullback.evaluation.views import Side
from pullback.workers import Backend

__all__ = ["ROAR", "DiffROAR"]

_RECIPE = TrainSpec(epochs=8, batch=128, learning_rate=2e-3)


@dataclass(frozen=True)
class DiffROAR:
    """DiffROAR: retrain on the most relevant parts alone, and on the least relevant alone, and compare.

    DiffROAR(A, k) = accuracy(keep the first k of A) - accuracy(keep the last k of A), training and test data masked
    alike, by models retrained from scratch; k = round(level · parts), in [-1, 1]. Above 0: what A marks is
    discriminative. About 0: no better than a random order.

    A value above 0 alone proves little: compare it with the controls, which are on by default, and with another mask.

    Args:
        levels: fractions of the parts that are kept.
        seeds: retrainings per attribution and arm; both arms share weights at the start and order of the data.
        training: how to retrain; ``seed`` is that of the first retraining, the others follow.
        mask: what a masked part becomes: "mean" (of the training data at its place), "channel_mean", "zeros", a number.
        granularity: "pixel" masks channels together, ranked by the sum of |a|; "element" each by itself.
        ranking: "absolute" or "signed".
        targets: the class explained, "predicted" by the model, or "true", which leaks the label into the mask (warns).
        controls: of "random" (drawn anew for each seed), "untrained" (likewise) and "input" (its intensity).
        validation: the share of the training data held out, for early stopping where ``training.patience`` is set.
        vectorize, chunk: as in ``train_ensemble``; the result does not depend on them. ``chunk`` is also what is done
            at once when runs are kept in a folder; None is all runs of an attribution.

    Source: H. Shah, P. Jain, P. Netrapalli, Do input gradients highlight discriminative features?, NeurIPS 2021.

    >>> DiffROAR(levels=(0.5,), seeds=2, training=TrainSpec(epochs=3)).levels
    (0.5,)
    """

    levels: tuple[float, ...] = (0.05, 0.1, 0.3)
    seeds: int = 5
    training: TrainSpec = _RECIPE
    mask: str | float = "mean"
    granularity: Granularity = "pixel"
    ranking: Ranking = "absolute"
    targets: Literal["predicted", "true"] = "predicted"
    controls: tuple[str, ...] = CONTROLS
    validation: float = 0.1
    vectorize: Vectorize = "auto"
    chunk: int | None = None

    def __post_init__(self) -> None:
        require_valid(self)

    def run(
        self,
        train: Data,
        test: Data,
        attributions: Sources,
        architecture: Callable[[], nn.Module],
        *,
        model: nn.Module | None = None,
        controls: Sources | None = None,
        out: str | os.PathLike[str] | None = None,
        resume: bool = True,
        backend: Backend = "serial",
        workers: int | None = None,
        threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> RetrainingResult:
        """Retrain ``architecture()`` on every view and score it on test data masked alike.

        Args:
            train, test: (x (n, ...), y (n,)).
            attributions: by name, a method's text such as "integrated_gradients", which explains ``model``; a function
                (x, target) -> attribution of the batch, called with the class that ``model`` predicts; or a tuple
                (training, test) of attributions. A list holds several, one per base model.
            controls: further attributions that are marked as controls.
            out: a folder that keeps every attribution's runs when they are finished, and the maps of methods given by
                text; running again does what is missing, and gives the same numbers.
            resume: False expects an empty folder.
            backend, workers, threads: as in ``Sweep.run``; a task is one attribution's runs, or ``chunk`` of them.
            progress: called with the number of finished runs and of all.

        Raises:
            InputError, MethodError: data, attributions or settings that do not fit. FormatError: the folder is of
            something else.
        """
        running = Running(out, resume, backend, workers, threads, progress)
        return measured(
            self, "diffroar", self._views(), train, test, attributions, architecture, model, controls, running
        )

    def plan(
        self,
        train: Data,
        test: Data,
        attributions: Sources,
        architecture: Callable[[], nn.Module],
        *,
        controls: Sources | None = None,
        backend: Backend = "serial",
        workers: int | None = None,
    ) -> RetrainingPlan:
        """How many models ``run`` would train, in what time and memory, from a few steps of training; prints in a line.

        Arguments as in ``run``. No attribution is made, and none is counted.

        >>> import torch
        >>> x, y = torch.rand(64, 6), torch.arange(64) % 2
        >>> net = lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> DiffROAR(levels=(0.5,)).plan((x, y), (x, y), {"a": (x, x)}, net).members
        40
        """
        running = Running(backend=backend, workers=workers)
        return plan(
            self, "diffroar", self._views(), train, test, attributions, architecture, controls, running
        )

    def _views(self) -> list[tuple[float, Side]]:
        sides: tuple[Side, ...] = ("top", "bottom")
        return [(level, side) for level in self.levels for side in sides]


@dataclass(frozen=True)
class ROAR:
    """ROAR: remove the most relevant parts, retrain, and see how much accuracy is lost. More is better.

    ROAR(A, t) = accuracy(everything) - accuracy(without the first t of A), training and test data masked alike, by
    models retrained from scratch; t = round(level · parts). Settings are as in ``DiffROAR``; a removed part becomes its
    channel's mean.

    Source: S. Hooker et al., A Benchmark for Interpretability Methods in Deep Neural Networks, NeurIPS 2019.

    >>> ROAR(levels=(0.5,)).mask
    'channel_mean'
    """

    levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    seeds: int = 5
    training: TrainSpec = _RECIPE
    mask: str | float = "channel_mean"
    granularity: Granularity = "pixel"
    ranking: Ranking = "absolute"
    targets: Literal["predicted", "true"] = "predicted"
    controls: tuple[str, ...] = CONTROLS
    validation: float = 0.1
    vectorize: Vectorize = "auto"
    chunk: int | None = None

    def __post_init__(self) -> None:
        require_valid(self)

    def run(
        self,
        train: Data,
        test: Data,
        attributions: Sources,
        architecture: Callable[[], nn.Module],
        *,
        model: nn.Module | None = None,
        controls: Sources | None = None,
        out: str | os.PathLike[str] | None = None,
        resume: bool = True,
        backend: Backend = "serial",
        workers: int | None = None,
        threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> RetrainingResult:
        """As ``DiffROAR.run``; one more run per seed sees everything, under the method name "none"."""
        running = Running(out, resume, backend, workers, threads, progress)
        return measured(
            self, "roar", self._views(), train, test, attributions, architecture, model, controls, running
        )

    def plan(
        self,
        train: Data,
        test: Data,
        attributions: Sources,
        architecture: Callable[[], nn.Module],
        *,
        controls: Sources | None = None,
        backend: Backend = "serial",
        workers: int | None = None,
    ) -> RetrainingPlan:
        """As ``DiffROAR.plan``."""
        running = Running(backend=backend, workers=workers)
        return plan(self, "roar", self._views(), train, test, attributions, architecture, controls, running)

    def _views(self) -> list[tuple[float, Side]]:
        return [(level, "bottom") for level in self.levels]
