"""Attributions to components of a signal (sources; trend, seasonal part, residual) and to levels of detail, in rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from pullback.core.errors import InputError
from pullback.viz.drawing import as_array, colour_map, edges, new_axes, symmetric_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["components", "levels"]


def components(
    values: Tensor | ArrayLike,
    names: Sequence[str],
    signals: Tensor | ArrayLike,
    ax: Axes | None = None,
    time: Tensor | ArrayLike | None = None,
    percentile: float = 99.0,
    unit: str = "samples",
) -> Axes:
    """One row a component, first on top: its signal (K, T) on a band coloured by its signed values.

    ``values`` (K, T), or (K,) where a component has one number; beside each name stands the sum. Signals are
    centred and scaled each by its own range, values all by the same scale. ``time`` (T,) in ``unit``, sample
    numbers if None.
    """
    array, lines = as_array(values), as_array(signals)
    array = array[:, None] if array.ndim == 1 else array
    times = np.arange(float(lines.shape[-1] if lines.ndim else 0)) if time is None else as_array(time)
    count, right = len(names), lines.ndim == 2 and lines.size > 0
    if not right or lines.shape != (count, len(times)) or array.shape not in ((count, 1), lines.shape):
        raise InputError(
            f"Expected {count} signals (K, T) for as many names, values (K,) or (K, T) and time (T,); got signals "
            f"{lines.shape}, values {array.shape} and time {times.shape}."
        )
    ax = ax or new_axes(6.5, 0.7 + 0.55 * count)
    around = edges(times)
    scale = symmetric_scale(array, percentile if array.shape[1] > 1 else 100.0)
    ax.pcolormesh(
        around if array.shape[1] > 1 else around[[0, -1]],
        np.arange(count + 1) - 0.5,
        np.ma.masked_invalid(array),
        cmap=colour_map(signed=True),
        vmin=-scale,
        vmax=scale,
        alpha=0.6,
        linewidth=0,
        rasterized=True,
    )
    for row, line in enumerate(lines):
        finite = line[np.isfinite(line)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        shape = (line - (low + high) / 2) / (high - low) if high > low else np.zeros_like(line)
        ax.plot(times, row - 0.8 * shape, color="0.1", linewidth=1.0)  # rows grow downwards
    _name_rows(ax, names, [float(np.nansum(row)) for row in array])
    ax.set_xlim(around[0], around[-1])
    ax.set_xlabel(f"time ({unit})", fontsize=8)
    return ax


def levels(
    values: Sequence[Tensor | ArrayLike],
    names: Sequence[str],
    ax: Axes | None = None,
    duration: float | None = None,
    percentile: float = 99.0,
    unit: str = "samples",
) -> Axes:
    """One row a level, first on top: its signed values (N_k,), each as wide as the time it stands for.

    All levels last ``duration``, in ``unit``; None for the largest number of values. Beside each name stands the sum.
    """
    rows = [as_array(each) for each in values]
    if not rows or len(rows) != len(names) or any(row.ndim != 1 or not row.size for row in rows):
        shapes = [row.shape for row in rows]
        raise InputError(f"Expected values (N,) for each of {len(names)} levels; got {shapes}.")
    ax = ax or new_axes(6.5, 0.7 + 0.4 * len(rows))
    end = float(max(row.size for row in rows) if duration is None else duration)
    scale = symmetric_scale(np.concatenate(rows), percentile)
    for number, row in enumerate(rows):
        ax.pcolormesh(
            np.linspace(0.0, end, row.size + 1),
            [number - 0.5, number + 0.5],
            np.ma.masked_invalid(row)[None],
            cmap=colour_map(signed=True),
            vmin=-scale,
            vmax=scale,
            linewidth=0,
            rasterized=True,
        )
    _name_rows(ax, names, [float(np.nansum(row)) for row in rows])
    ax.set_xlim(0.0, end)
    ax.set_xlabel(f"time ({unit})", fontsize=8)
    return ax


def _name_rows(ax: Axes, names: Sequence[str], sums: Sequence[float]) -> None:
    """Rows from the top, apart by white lines, with names and sums for ticks."""
    for row in range(1, len(names)):
        ax.axhline(row - 0.5, color="white", linewidth=1.5)
    texts = [f"{name}\n{total:+.3g}" for name, total in zip(names, sums, strict=True)]
    ax.set_yticks(range(len(names)), texts, fontsize=8, parse_math=False)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelsize=8)
