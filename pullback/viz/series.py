"""Attributions to the samples of a time series."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pullback.core.errors import InputError
from pullback.viz.drawing import as_array, colour_map, edges, filled, new_axes, symmetric_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["series"]


def series(
    values: Tensor | ArrayLike,
    signal: Tensor | ArrayLike | None = None,
    ax: Axes | None = None,
    time: Tensor | ArrayLike | None = None,
    percentile: float = 99.0,
) -> Axes:
    """The signal (T,) or (C, T) as lines on a band coloured by the signed values, summed over channels.

    ``values`` (T,) or (C, T); without a signal they are the curve. ``time`` (T,) increases, in any unit;
    sample numbers if None.
    """
    array, ax = _rows(values, "values").sum(0), ax or new_axes(6.5, 1.9)
    lines = None if signal is None else _rows(signal, "signal")
    times = np.arange(len(array), dtype=np.float64) if time is None else as_array(time)
    if times.shape != array.shape or (lines is not None and lines.shape[1] != len(array)):
        raise InputError(
            f"Expected the same number of samples; got values {array.shape}, signal "
            f"{None if lines is None else lines.shape} and time {times.shape}."
        )
    if (np.diff(times) <= 0).any():
        raise InputError("Expected time to increase from sample to sample.")
    if lines is None:
        filled(ax, times, array)
    else:
        around = edges(times)
        scale = symmetric_scale(array, percentile)
        ax.pcolormesh(
            around,
            [0.0, 1.0],
            np.ma.masked_invalid(array)[None],
            cmap=colour_map(signed=True),
            vmin=-scale,
            vmax=scale,
            alpha=0.75,
            linewidth=0,
            rasterized=True,
            transform=ax.get_xaxis_transform(),
        )
        for line in lines:
            ax.plot(times, line, color="0.1", linewidth=1.1, marker="." if len(times) == 1 else None)
        ax.set_xlim(around[0], around[-1])
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    return ax


def _rows(samples: Tensor | ArrayLike, what: str) -> NDArray[np.float64]:
    array = as_array(samples)
    if array.ndim not in (1, 2) or not array.size:
        raise InputError(f"Expected {what} (T,) or (C, T) of one example, not empty; got {array.shape}.")
    return np.atleast_2d(array)
