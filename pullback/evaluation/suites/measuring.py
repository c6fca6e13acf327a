"""The tasks of a suite: one method's maps of one model, by all metrics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.core import errors
from pullback.core.pose import pose
from pullback.evaluation.results import MetricResult
from pullback.evaluation.suites.cases import Case, Net, content_of, trained_net
from pullback.evaluation.suites.compared import made
from pullback.evaluation.suites.metrics import NEED_A_SIGNAL, Maps, measures, names_of
from pullback.evaluation.task_cache import cached

__all__ = ["COLLAPSED", "TYPED", "mapped", "maps_of_data", "measured", "rows_of"]

TYPED: tuple[type[Exception], ...] = tuple(
    getattr(errors, name) for name in errors.__all__ if name.endswith("Error")
)
COLLAPSED = "the model has collapsed: it answers alike for every image, so its maps mean nothing"
_BATCH = 128


def measured(
    case: Mapping[str, Any], method: str, metrics: Sequence[str], images: int, masks: Sequence[str]
) -> list[dict[str, Any]]:
    """A row per metric, with a value for each of the first ``images`` test images."""
    known = Case(**case)
    net = trained_net(known)
    data = known.loaded()
    x, signal = data.test_x[:images], None if data.signal is None else data.signal[:images]
    asked = [name for name in metrics if data.signal is not None or name not in NEED_A_SIGNAL]
    facts = {
        "data": data.name, "model": known.name, "seed": known.seed, "accuracy": _short(net.accuracy),
        "converged": net.converged,
    }  # fmt: skip
    return rows_of(net, x, signal, method, asked, tuple(masks), known.seed, facts)


def rows_of(
    net: Net,
    x: Tensor,
    signal: Tensor | None,
    method: str,
    metrics: Sequence[str],
    masks: tuple[str, ...],
    seed: int,
    facts: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """``facts`` and the values of each metric; where there are none, why."""
    parts = x[0].numel()
    ask = made(method, net.model, net.untrained, seed)
    known = {**facts, "method": method, "control": ask[2]}

    def nothing(name: str, why: str) -> list[dict[str, Any]]:
        return [
            {**known, "metric": label, "direction": direction, "values": [], "flag": why}
            for label, direction in names_of(name, masks, parts)
        ]

    if net.collapsed:
        return [row for name in metrics for row in nothing(name, COLLAPSED)]
    rows: list[dict[str, Any]] = []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # what is undefined is counted in the rows
        warnings.simplefilter("ignore", UserWarning)
        try:
            maps = _maps(net, x, signal, ask, masks, seed)
        except TYPED as error:
            return [row for name in metrics for row in nothing(name, _reason(error))]
        for name in metrics:
            try:
                found = list(measures(name, maps))
            except TYPED as error:
                rows += nothing(name, _reason(error))
                continue
            rows += [_row(known, label, result, net) for label, result in found]
    return rows


def _maps(
    net: Net,
    x: Tensor,
    signal: Tensor | None,
    method: tuple[Any, Any, bool],
    masks: tuple[str, ...],
    seed: int,
) -> Maps:
    ask, kind, _ = method
    with torch.no_grad():
        target = net.model(x).argmax(1)
    values = ask(pose(net.model, x, target=target))
    if not bool(torch.isfinite(values).all()):
        rows = int((~torch.isfinite(values)).flatten(1).any(1).sum())
        raise errors.InputError(f"{rows} of its {len(values)} maps have NaN or infinite values")
    return Maps(net.model, x, target, values.detach(), ask, kind, signal, masks, seed)


def maps_of_data(case: Mapping[str, Any], method: str) -> dict[str, Tensor]:
    """A method's maps of all training and test images, for retraining: "train" and "test", kept by the sweep."""
    known = Case(**case)
    data = known.loaded()

    def compute() -> dict[str, Tensor]:
        net = trained_net(known)
        ask, *_ = made(method, net.model, net.untrained, known.seed)

        def values(x: Tensor) -> Tensor:
            parts = []
            for part in x.split(_BATCH):
                with torch.no_grad():
                    target = net.model(part).argmax(1)
                parts.append(ask(pose(net.model, part, target=target)).detach())
            return torch.cat(parts)

        return {"train": values(data.x), "test": values(data.test_x[:1000])}

    return cached({"maps": known.content(), "method": method, **content_of(known)}, compute)


def mapped(case: Mapping[str, Any], method: str) -> dict[str, Any]:
    """A row that says whether a method's maps of the data could be made; the maps are in the cache."""
    try:
        found = maps_of_data(case, method)
    except TYPED as error:
        return {"method": method, "flag": _reason(error)}
    broken = sum(int((~torch.isfinite(each)).flatten(1).any(1).sum()) for each in found.values())
    return {"method": method, "flag": f"{broken} of its maps have NaN or infinite values" * bool(broken)}


def _row(facts: Mapping[str, Any], name: str, result: MetricResult, net: Net) -> dict[str, Any]:
    values = [_short(value) for value in result.values.detach().cpu().tolist()]
    undefined = sum(map(math.isnan, values))
    notes = [f"undefined for {undefined} of {len(values)} images"] * bool(undefined)
    notes += ["training had not converged"] * (not net.converged)
    return {
        **facts, "metric": name, "direction": result.direction, "values": values, "flag": "; ".join(notes),
    }  # fmt: skip


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _short(value: float) -> float:
    """Four digits, which is far below the spread over images, and a quarter of the file."""
    return float(f"{value:.4g}")
