"""Benchmark results: curves with bands, and bars with interval whiskers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from pullback.core.errors import InputError
from pullback.viz.drawing import as_array, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["bars", "curve"]


def curve(
    x: Tensor | ArrayLike,
    mean: Tensor | ArrayLike,
    low: Tensor | ArrayLike | None = None,
    high: Tensor | ArrayLike | None = None,
    ax: Axes | None = None,
    label: str | None = None,
) -> Axes:
    """``mean`` over ``x`` with the band from ``low`` to ``high``, all (N,), in the Axes' next colour."""
    ax = ax or new_axes(5.0, 3.2)
    at, middle = as_array(x), as_array(mean)
    ends = None if low is None or high is None else (as_array(low), as_array(high))
    if at.ndim != 1 or any(array.shape != at.shape for array in (middle, *(ends or ()))):
        raise InputError(f"Expected x, mean, low and high of one length; got {at.shape} and {middle.shape}.")
    (line,) = ax.plot(at, middle, marker=".", markersize=4, linewidth=1.4)
    if ends is not None:
        ax.fill_between(at, *ends, color=line.get_color(), alpha=0.2, linewidth=0)
    if label is not None:
        line.set_label(label.replace("$", r"\$"))
        ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    return ax


def bars(
    names: Sequence[str],
    estimates: Tensor | ArrayLike,
    lows: Tensor | ArrayLike | None = None,
    highs: Tensor | ArrayLike | None = None,
    ax: Axes | None = None,
) -> Axes:
    """One horizontal bar a name, first on top, with a whisker from ``lows`` to ``highs``, all (N,)."""
    ax = ax or new_axes(5.0, 0.6 + 0.28 * max(len(names), 1))
    middle = as_array(estimates)
    ends = None if lows is None or highs is None else (as_array(lows), as_array(highs))
    if any(array.shape != (len(names),) for array in (middle, *(ends or ()))):
        raise InputError(
            f"Expected an estimate, low and high for each of {len(names)} names; got {middle.shape}."
        )
    rows = np.arange(len(names))
    ax.barh(
        rows,
        np.nan_to_num(middle),
        height=0.62,
        color=["#b2182b" if value > 0 else "#2166ac" for value in middle],
    )
    if ends is not None:
        ax.hlines(rows, *ends, color="0.15", linewidth=1.2)
        for end in ends:
            ax.vlines(end, rows - 0.14, rows + 0.14, color="0.15", linewidth=1.2)
    ax.axvline(0, color="0.5", linewidth=0.6)
    ax.set_yticks(rows, names, fontsize=8, parse_math=False)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelsize=8)
    return ax
