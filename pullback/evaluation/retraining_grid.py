"""The grid of retrainings behind DiffROAR and ROAR: every attribution at every level, side and seed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from pullback.core import noise
from pullback.core.errors import InputError, MethodError
from pullback.evaluation.ensembles import Member, Vectorize
from pullback.evaluation.grid_sweep import GridTraining, RetrainingPlan, Running
from pullback.evaluation.orders import (
    CONTROLS,
    Data,
    Source,
    attributed,
    checked,
    control_source,
    mean_fill,
    orders,
)
from pullback.evaluation.ranking import Granularity, Ranking
from pullback.evaluation.retraining import Trained, TrainSpec
from pullback.evaluation.retraining_results import RetrainingResult, RetrainingRun
from pullback.evaluation.task_cache import keeping
from pullback.evaluation.views import Examples, Side, View

__all__ = ["RetrainingSettings", "Sources", "measured", "plan", "require_valid"]

Sources = Mapping[str, "Source | list[Source]"]


class RetrainingSettings(Protocol):
    """What DiffROAR and ROAR have in common."""

    @property
    def levels(self) -> tuple[float, ...]: ...
    @property
    def seeds(self) -> int: ...
    @property
    def training(self) -> TrainSpec: ...
    @property
    def mask(self) -> str | float: ...
    @property
    def granularity(self) -> Granularity: ...
    @property
    def ranking(self) -> Ranking: ...
    @property
    def targets(self) -> Literal["predicted", "true"]: ...
    @property
    def controls(self) -> tuple[str, ...]: ...
    @property
    def validation(self) -> float: ...
    @property
    def vectorize(self) -> Vectorize: ...
    @property
    def chunk(self) -> int | None: ...


@dataclass(frozen=True)
class _Order:
    """One attribution among those compared, and the retraining seeds it is scored with."""

    method: str
    control: bool
    base: int
    source: Callable[[], Source]
    seeds: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"{self.method}/{self.base}"


def measured(
    settings: RetrainingSettings,
    metric: Literal["diffroar", "roar"],
    views: Sequence[tuple[float, Side]],
    train: Data,
    test: Data,
    attributions: Sources,
    architecture: Callable[[], nn.Module],
    model: nn.Module | None,
    controls: Sources | None,
    running: Running,
) -> RetrainingResult:
    """Rank every attribution, retrain every arm, and tabulate."""
    checked({"training": train, "test": test})
    data = (train, test)
    true_labels = settings.targets == "true"
    if true_labels:
        warnings.warn(
            'targets="true" puts the label into the test masks: accuracies are optimistic. Use "predicted".',
            UserWarning,
            stacklevel=3,
        )
    compared = _compared(settings, attributions, controls or {}, architecture, data)
    ranks: list[dict[str, Tensor]] = [{}, {}]
    with keeping(None if running.out is None else Path(running.out)):
        for order in compared:
            for place, values in enumerate(
                attributed(order.source(), model, data, true_labels, order.method)
            ):
                ranks[place][order.key] = orders(
                    values, data[place][0], settings.granularity, settings.ranking, settings.training.seed
                )
    training = _training(settings, architecture, train, test, ranks)
    planned = _planned(settings, metric, views, compared, next(iter(ranks[0].values())).shape[1])
    # arms that see the same, as at level 1, are one run
    found = training.trained(list(dict.fromkeys(member for *_, member in planned)), running)
    runs = [
        _row(order, level, side, member, metric, *found[member], settings.training.seed)
        for order, level, side, member in planned
    ]
    return RetrainingResult(
        metric,
        tuple(runs),
        torch.stack([found[member][1] for *_, member in planned]),
        asdict(settings),  # type: ignore[call-overload]
    )


def plan(
    settings: RetrainingSettings,
    metric: Literal["diffroar", "roar"],
    views: Sequence[tuple[float, Side]],
    train: Data,
    test: Data,
    attributions: Sources,
    architecture: Callable[[], nn.Module],
    controls: Sources | None,
    running: Running,
) -> RetrainingPlan:
    """What ``measured`` would train, and how long that takes; orders are random, since no attribution is made yet."""
    checked({"training": train, "test": test})
    compared = _compared(settings, attributions, controls or {}, architecture, (train, test))
    x = train[0]
    together = settings.granularity == "pixel" and x.ndim > 2
    parts = x[0, 0].numel() if together else x[0].numel()
    generator = noise.generator(settings.training.seed, 0, "plan")
    # one order stands for all: what a mask shows changes no time
    order = torch.randperm(parts, generator=generator).to(x.device)
    ranks = [{each.key: order.expand(len(part), parts) for each in compared} for part, _ in (train, test)]
    training = _training(settings, architecture, train, test, ranks)
    members = [member for *_, member in _planned(settings, metric, views, compared, parts)]
    return training.plan(list(dict.fromkeys(members)), running)


def _training(
    settings: RetrainingSettings,
    architecture: Callable[[], nn.Module],
    train: Data,
    test: Data,
    ranks: Sequence[dict[str, Tensor]],
) -> GridTraining:
    fill = mean_fill(train[0], settings.mask)
    fitted, held_out = _split(Examples(*train, ranks[0], fill), settings)
    tested = Examples(*test, ranks[1], fill)
    return GridTraining(
        architecture, fitted, held_out, tested, settings.training, settings.vectorize, settings.chunk
    )


def _planned(
    settings: RetrainingSettings,
    metric: str,
    views: Sequence[tuple[float, Side]],
    compared: Sequence[_Order],
    parts: int,
) -> list[tuple[_Order | None, float, Side, Member]]:
    planned: list[tuple[_Order | None, float, Side, Member]] = []
    for order in compared:
        for level, side in views:
            # what is left after removal from the top is the bottom
            kept = parts - round(level * parts) if metric == "roar" else round(level * parts)
            view = _view(order.key, kept, parts, side)
            planned += [
                (order, level, side, Member(settings.training.seed + seed, view)) for seed in order.seeds
            ]
    if metric == "roar":
        whole = [Member(settings.training.seed + seed) for seed in range(settings.seeds)]
        planned += [(None, 0.0, "bottom", member) for member in whole]
    return planned


def _compared(
    settings: RetrainingSettings,
    attributions: Sources,
    controls: Sources,
    architecture: Callable[[], nn.Module],
    data: Sequence[Data],
) -> list[_Order]:
    names = [*attributions, *controls, *settings.controls]
    if not names or len(set(names)) < len(names) or "none" in names:
        raise InputError(
            f"Attributions and controls named {names} were given. Expected at least one, with different names, and "
            'none called "none".'
        )
    seeds = tuple(range(settings.seeds))
    compared = []
    for control, sources in ((False, attributions), (True, controls)):
        for name, given in sources.items():
            each = list(given) if isinstance(given, list) else [given]
            compared += [
                _Order(name, control, base, partial(_given, source), seeds)
                for base, source in enumerate(each)
            ]
    for name in settings.controls:
        # where the control is random, it is drawn anew for every retraining: that is part of its spread
        drawn = seeds if name in ("random", "untrained") else (0,)
        for base in drawn:
            source = partial(control_source, name, architecture, data, settings.training.seed + base)
            compared.append(_Order(name, True, base, source, (base,) if len(drawn) > 1 else seeds))
    return compared


def _given(source: Source) -> Source:
    return source


def _view(key: str, kept: int, parts: int, side: Side) -> View:
    if kept < 1:
        raise InputError(
            f"A level that keeps {kept} of {parts} parts was given. Expected levels that leave at least one."
        )
    return View() if kept == parts else View(key, kept, side)


def _split(examples: Examples, settings: RetrainingSettings) -> tuple[Examples, Examples | None]:
    held = round(settings.validation * len(examples))
    if not held:
        return examples, None
    generator = noise.generator(settings.training.seed, 0, "validation split")
    order = torch.randperm(len(examples), generator=generator).to(examples.x.device)
    return examples.part(order[held:]), examples.part(order[:held])


def _row(
    order: _Order | None,
    level: float,
    side: Side,
    member: Member,
    metric: str,
    run: Trained,
    right: Tensor,
    first_seed: int,
) -> RetrainingRun:
    diverged = not all(math.isfinite(loss) for loss in run.losses)
    return RetrainingRun(
        method="none" if order is None else order.method,
        control=order is not None and order.control,
        metric=metric,
        level=level,
        side=side,
        base_seed=0 if order is None else order.base,
        retrain_seed=member.seed - first_seed,
        value=math.nan if diverged else float(right.double().mean()),
        train_accuracy=run.train_accuracy,
        validation_accuracy=math.nan if run.accuracy is None else run.accuracy,
        converged=run.converged,
        collapsed=run.collapsed,
        seconds=run.seconds,
    )


def require_valid(settings: RetrainingSettings) -> None:
    """Raise ``MethodError`` for settings out of range."""
    if not settings.levels or not all(0 < level <= 1 for level in settings.levels):
        raise MethodError(f"levels={settings.levels} was given. Expected fractions above 0, at most 1.")
    if settings.seeds < 1 or not 0 <= settings.validation < 1:
        raise MethodError(
            f"seeds={settings.seeds}, validation={settings.validation} was given. Expected at least 1 seed and a share "
            "from 0 to below 1."
        )
    unknown = [name for name in settings.controls if name not in CONTROLS]
    if unknown:
        raise MethodError(f"controls={unknown} was given. Expected some of {list(CONTROLS)}.")
    choices = {
        "targets": (settings.targets, ("predicted", "true")),
        "granularity": (settings.granularity, ("pixel", "element")),
        "ranking": (settings.ranking, ("absolute", "signed")),
    }
    for name, (given, expected) in choices.items():
        if given not in expected:
            raise MethodError(f"{name}={given!r} was given. Expected {' or '.join(map(repr, expected))}.")
