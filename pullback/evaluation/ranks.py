"""Which method is best, and which cannot be told from it: ranks and paired differences with hierarchical intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pullback.core.errors import InputError
from pullback.evaluation.results import Direction
from pullback.evaluation.statistics import Interval, hierarchical_bootstrap

__all__ = ["Standing", "standings"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Standing:
    """A method among others. ``interval``: of its mean. ``rank``: 1 is best, with its bootstrap interval.

    ``tied``: no difference from the best can be told. ``beats_controls``: it is better than every control; None where
    there is none, or it is one, or a variant.
    """

    interval: Interval
    rank: Interval
    tied: bool
    beats_controls: bool | None


def standings(
    values: Mapping[str, Tensor],
    direction: Direction,
    controls: frozenset[str] = frozenset(),
    variants: frozenset[str] = frozenset(),
    *,
    level: float = 0.95,
    samples: int = 500,
    seed: int = 0,
) -> dict[str, Standing]:
    """Methods compared on the same seeds and images, by name.

    Two methods differ where the interval of their paired difference, which resamples seeds and images together, leaves
    out 0. ``rank``: of the mean among the methods, controls and variants left out (theirs is their place among these);
    its interval is that of the rank over joint resamples of seeds and images. No correction is made for the number of
    comparisons.

    Args:
        values: (seeds, images) each, of one shape; NaN where undefined.
        direction: which is better, "higher" or "lower".
        controls: names of those that every method has to beat.
        variants: names of methods altered to test the metric, such as a blurred map; nobody has to beat them.

    Raises InputError for shapes that differ, or no methods.

    >>> import torch
    >>> found = standings({"a": torch.rand(3, 20) + 1, "b": torch.rand(3, 20)}, "higher")
    >>> found["a"].rank.estimate, found["b"].tied
    (1.0, False)
    """
    if not values or len({tuple(each.shape) for each in values.values()}) > 1:
        shapes = [tuple(each.shape) for each in values.values()]
        raise InputError(
            f"Values of shapes {shapes} were given. Expected (seeds, images), the same for every method."
        )
    tables = {name: each.detach().cpu().double().numpy() for name, each in values.items()}
    sign = 1.0 if direction == "higher" else -1.0
    means = {name: _mean(table) for name, table in tables.items()}
    own = [name for name in values if name not in controls | variants and not math.isnan(means[name])]
    best = max(own, key=lambda name: sign * means[name], default=None)
    resampled = _resampled_means(tables, samples, seed)
    found = {}
    for name, table in tables.items():
        others = [other for other in own if other != name]
        beaten = None
        if name in own and controls & values.keys():
            beaten = all(
                _better(table, tables[control], sign, level, samples, seed) is True
                for control in controls
                if control in tables and not math.isnan(means[control])
            )
        found[name] = Standing(
            interval=hierarchical_bootstrap(table, level=level, samples=samples, seed=seed),
            rank=_rank(name, others, means, resampled, sign, level),
            tied=name in own
            and (name == best or _better(tables[str(best)], table, sign, level, samples, seed) is None),
            beats_controls=beaten,
        )
    return found


def _mean(table: Floats) -> float:
    return float(np.nanmean(table)) if not np.isnan(table).all() else math.nan


def _better(first: Floats, second: Floats, sign: float, level: float, samples: int, seed: int) -> bool | None:
    """Whether the first is better or worse than the second; None where that cannot be told."""
    interval = hierarchical_bootstrap(sign * (first - second), level=level, samples=samples, seed=seed)
    if interval.low > 0:
        return True
    return False if interval.high < 0 else None


def _resampled_means(tables: Mapping[str, Floats], samples: int, seed: int) -> dict[str, Floats]:
    """The mean of each method in every resample, (samples,): the same seeds and images for all methods."""
    generator = np.random.default_rng(seed)
    seeds, images = next(iter(tables.values())).shape
    found: dict[str, list[float]] = {name: [] for name in tables}
    for _ in range(samples):
        # how often each seed and each image is drawn
        rows = np.bincount(generator.integers(seeds, size=seeds), minlength=seeds).astype(np.float64)
        columns = np.bincount(generator.integers(images, size=images), minlength=images).astype(np.float64)
        for name, table in tables.items():
            known = ~np.isnan(table)
            weight = float(rows @ known @ columns)
            total = float(rows @ np.where(known, table, 0.0) @ columns)
            found[name].append(total / weight if weight else math.nan)
    return {name: np.array(each) for name, each in found.items()}


def _rank(
    name: str,
    others: list[str],
    means: Mapping[str, float],
    resampled: Mapping[str, Floats],
    sign: float,
    level: float,
) -> Interval:
    if math.isnan(means[name]):
        return Interval(math.nan, math.nan, math.nan, level)

    def place(own: Floats, theirs: list[Floats]) -> Floats:
        # ties share the places they take
        ahead = [np.where(np.isclose(own, other), 0.5, sign * (other - own) > 0) for other in theirs]
        return 1.0 + (np.sum(ahead, axis=0) if ahead else np.zeros_like(own))

    now = place(np.array([means[name]]), [np.array([means[other]]) for other in others])
    drawn = place(resampled[name], [resampled[other] for other in others])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(now[0]), float(high), level, len(others) + 1)
