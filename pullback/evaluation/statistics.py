"""Intervals and tests for metric values, with own generators: the same seed gives the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pullback.core.errors import InputError

__all__ = [
    "Interval",
    "PairedDifference",
    "bootstrap_interval",
    "hierarchical_bootstrap",
    "paired_difference",
    "student_interval",
]

Floats: TypeAlias = npt.NDArray[np.float64]
Values: TypeAlias = Tensor | npt.NDArray[np.floating] | Sequence[float]

_STATISTICS: dict[str, Callable[[Floats], Floats]] = {
    "mean": lambda rows: rows.mean(axis=-1),
    "median": lambda rows: np.median(rows, axis=-1),
}
# Resamples are drawn in blocks of about this many elements (32 MiB of float64).
_BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence bounds; ``undefined`` counts the NaNs, which ``count`` leaves out."""

    low: float
    estimate: float
    high: float
    level: float = 0.95
    count: int = 0
    undefined: int = 0

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class PairedDifference:
    """The mean of a - b with its interval, and the p-value of "a and b could be exchanged"."""

    interval: Interval
    p_value: float


def bootstrap_interval(
    values: Values,
    statistic: Literal["mean", "median"] = "mean",
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap interval of the mean or median of ``values`` (n,).

    Resamples the n values with replacement ``samples`` times and takes the (1 ± level)/2 quantiles. NaNs are
    left out and counted in ``undefined``. With fewer than two values the bounds are NaN. Below about ten
    values (training seeds, say) it is too narrow: use ``student_interval``.

    Raises ``InputError`` for no values, or a statistic, level or number of samples out of range.
    Source: B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    >>> interval = bootstrap_interval([0.0, 1.0] * 50)
    >>> interval.estimate, 0.5 in interval, interval.count
    (0.5, True, 100)
    """
    if statistic not in _STATISTICS:
        raise InputError(f'statistic={statistic!r} was given. Expected "mean" or "median".')
    _check(level, samples)
    defined, undefined = _defined(_array(values, 1))
    count = defined.size
    if not count:
        return Interval(math.nan, math.nan, math.nan, level, 0, undefined)
    summarise = _STATISTICS[statistic]
    estimate = float(summarise(defined))
    if count < 2:
        return Interval(math.nan, estimate, math.nan, level, count, undefined)
    generator = np.random.default_rng(seed)
    draws = [
        summarise(defined[generator.integers(count, size=(rows, count))]) for rows in _blocks(samples, count)
    ]
    low, high = _quantiles(np.concatenate(draws), level)
    return Interval(low, estimate, high, level, count, undefined)


def student_interval(values: Values, level: float = 0.95) -> Interval:
    """Student's t interval of the mean of a few independent ``values`` (n,), such as one per training seed.

    mean ± t(level, n - 1) · sd / √n. NaNs are left out and counted; with fewer than two values the bounds are
    NaN.

    Raises ``InputError`` for no values or a level outside (0, 1).

    >>> interval = student_interval([1.0, 2.0, 3.0])
    >>> round(interval.low, 3), interval.estimate, round(interval.high, 3)
    (-0.484, 2.0, 4.484)
    """
    from scipy.stats import t

    _check(level, 1)
    defined, undefined = _defined(_array(values, 1))
    count = defined.size
    estimate = float(defined.mean()) if count else math.nan
    if count < 2:
        return Interval(math.nan, estimate, math.nan, level, count, undefined)
    half = float(t.ppf((1 + level) / 2, count - 1)) * float(defined.std(ddof=1)) / math.sqrt(count)
    return Interval(estimate - half, estimate, estimate + half, level, count, undefined)


def paired_difference(
    a: Values, b: Values, *, level: float = 0.95, samples: int = 2000, seed: int = 0
) -> PairedDifference:
    """The mean of ``a - b`` over the same n examples: bootstrap interval and two-sided permutation p-value.

    The test flips the sign of each difference: exactly, over all 2^n sign patterns, where ``samples`` allows;
    otherwise over ``samples`` random ones with p = (1 + hits) / (1 + samples), which is never zero. Pairs
    with a NaN on either side are left out and counted.

    Raises ``InputError`` when a and b differ in length.
    Source: P. Good, Permutation Tests, 2000, section 3.2 (one sample, sign changes).

    >>> paired_difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]).p_value
    0.25
    """
    left, right = _array(a, 1), _array(b, 1)
    if left.shape != right.shape:
        raise InputError(
            f"{left.size} and {right.size} values were given. Expected pairs: the same examples in the same "
            "order."
        )
    interval = bootstrap_interval(left - right, level=level, samples=samples, seed=seed)
    differences, _ = _defined(left - right)
    count = differences.size
    if not count:
        return PairedDifference(interval, math.nan)
    # Sums that are equal in exact arithmetic may differ in the last bits; they count as ties.
    threshold = abs(differences.sum()) - 1e-12 * np.abs(differences).sum()
    if count < 63 and 2**count <= samples:
        patterns = np.arange(2**count)[:, None] >> np.arange(count)[None, :] & 1
        return PairedDifference(
            interval, float(np.mean(np.abs((2 * patterns - 1) @ differences) >= threshold))
        )
    generator = np.random.default_rng(seed)
    hits = 0
    for rows in _blocks(samples, count):
        signs = 2 * generator.integers(2, size=(rows, count), dtype=np.int8) - 1
        hits += int(np.sum(np.abs(signs @ differences) >= threshold))
    return PairedDifference(interval, (1 + hits) / (1 + samples))


def hierarchical_bootstrap(
    values: Values,
    *,
    images: Literal["shared", "independent"] = "shared",
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The interval of the mean of ``values`` (seeds, images) that resamples the seeds and the images.

    ``values`` (bases, seeds, images) resamples three levels: the base models, the seeds (of retraining, say) within
    each base model drawn, and the images.

    ``images="shared"``: column i is the same image for every seed, so one resample of images serves all seeds
    (the two-way, "pigeonhole" bootstrap). ``"independent"``: every seed has its own images, resampled within
    it. Resampling images alone, or seeds alone, gives intervals that are too narrow. NaNs are left out and
    counted.

    Raises ``InputError`` unless values is a non-empty (seeds, images) or (bases, seeds, images) array.
    Source: A. Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1, 2007.

    >>> hierarchical_bootstrap(np.full((3, 20), 0.5)).high
    0.5
    """
    if images not in ("shared", "independent"):
        raise InputError(f'images={images!r} was given. Expected "shared" or "independent".')
    _check(level, samples)
    table = _array(values, 2, 3)
    bases, within = (1, len(table)) if table.ndim == 2 else table.shape[:2]
    table = table.reshape(-1, table.shape[-1])
    known = ~np.isnan(table)
    count = int(known.sum())
    if not count:
        return Interval(math.nan, math.nan, math.nan, level, 0, table.size)
    filled, weight = np.where(known, table, 0.0), known.astype(np.float64)
    seeds, columns = table.shape
    generator = np.random.default_rng(seed)
    draws = []
    for rows in _blocks(samples, seeds * columns):
        base = generator.integers(bases, size=(rows, bases, 1)) if bases > 1 else 0
        seed_in_base = generator.integers(within, size=(rows, bases, within))
        chosen = (within * base + seed_in_base).reshape(rows, seeds, 1)
        width = (rows, 1, columns) if images == "shared" else (rows, seeds, columns)
        picked = generator.integers(columns, size=width)
        total, defined = filled[chosen, picked].sum((1, 2)), weight[chosen, picked].sum((1, 2))
        draws.append(total[defined > 0] / defined[defined > 0])
    low, high = _quantiles(np.concatenate(draws), level)
    return Interval(low, float(filled.sum() / count), high, level, count, table.size - count)


def _array(values: Values, *ranks: int) -> Floats:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in ranks or not array.size:
        expected = (
            "at least one value in one dimension"
            if ranks == (1,)
            else "a non-empty (seeds, images) or (bases, seeds, images) array"
        )
        raise InputError(f"Values of shape {array.shape} were given. Expected {expected}.")
    return array


def _defined(array: Floats) -> tuple[Floats, int]:
    missing = np.isnan(array)
    return array[~missing], int(missing.sum())


def _check(level: float, samples: int) -> None:
    if not 0 < level < 1:
        raise InputError(f"level={level} was given. Expected a number between 0 and 1, such as 0.95.")
    if samples < 1:
        raise InputError(f"samples={samples} was given. Expected at least 1; 2000 is usual.")


def _blocks(samples: int, elements: int) -> Iterator[int]:
    rows = max(1, _BLOCK_ELEMENTS // elements)
    for start in range(0, samples, rows):
        yield min(rows, samples - start)


def _quantiles(draws: Floats, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
