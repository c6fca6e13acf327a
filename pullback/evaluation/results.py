"""What every per-example metric returns."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pullback.evaluation.statistics import Interval, bootstrap_interval

__all__ = ["Direction", "MetricResult", "flagged"]

Direction = Literal["higher", "lower"]


@dataclass(frozen=True, eq=False)
class MetricResult:
    """One number per example, and which direction is better.

    ``values`` (n,): the metric; NaN where it is undefined, for instance for an all-zero attribution.
    ``direction``: "higher" or "lower", whichever is better. ``curve`` (n, steps) or None: what ``values``
    summarises, step by step. ``params``: the settings; ``details``: further tensors by name.

    >>> print(MetricResult("leakage", Tensor([0.2, 0.4]), "lower"))
    leakage 0.3 [0.2, 0.4] (95% bootstrap, n=2), lower is better
    """

    name: str
    values: Tensor
    direction: Direction
    curve: Tensor | None = None
    params: dict[str, object] = field(default_factory=dict)
    details: dict[str, Tensor] = field(default_factory=dict)

    def mean(self) -> float:
        """The mean over the examples where the metric is defined; NaN if there are none.

        >>> MetricResult("leakage", Tensor([0.25, float("nan"), 0.75]), "lower").mean()
        0.5
        """
        return float(self.values.double().nanmean())

    def interval(self, level: float = 0.95, seed: int = 0) -> Interval:
        """A bootstrap interval of the mean over examples, at the given level; see ``bootstrap_interval``.

        It covers the choice of examples only, not the training seed of the model or of the attribution.
        """
        return bootstrap_interval(self.values, level=level, seed=seed)

    def to_dict(self) -> dict[str, object]:
        """The result in types JSON knows: lists for tensors, None for values that are not finite."""
        return {
            "name": self.name,
            "direction": self.direction,
            "mean": _plain(self.mean()),
            "values": _plain(self.values),
            "curve": _plain(self.curve),
            "params": _plain(self.params),
            "details": _plain(self.details),
        }

    def __str__(self) -> str:
        interval = self.interval()
        undefined = f", {interval.undefined} undefined" if interval.undefined else ""
        return (
            f"{self.name} {interval.estimate:.3g} [{interval.low:.3g}, {interval.high:.3g}] "
            f"({interval.level:.0%} bootstrap, n={interval.count}{undefined}), {self.direction} is better"
        )


def flagged(name: str, values: Tensor, undefined: Tensor, why: str, stacklevel: int = 3) -> Tensor:
    """The values, NaN where they are undefined, and a warning that says in how many examples and why.

    Args:
        name: of the metric.
        values: (n,) or (n, steps).
        undefined: (n,) bool.
        why: what these examples have in common, for example "the attribution is zero everywhere".
        stacklevel: 3 where the caller is the metric itself, one more for each function in between.
    """
    if not bool(undefined.any()):
        return values
    warnings.warn(
        f"{name} is undefined (NaN) for {int(undefined.sum())} of {len(undefined)} examples: {why}"
        + ("" if why.endswith("?") else "."),
        UserWarning,
        stacklevel=stacklevel,
    )
    where = undefined.to(values.device).reshape(-1, *[1] * (values.ndim - 1))
    return values.masked_fill(where, torch.nan)


def _plain(value: object) -> object:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Tensor):
        return _plain(value.detach().cpu().tolist())
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)
