"""What all pictures share: real arrays, one zero-safe scale, one pair of colour maps, Axes without pyplot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pullback.core.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

__all__ = [
    "NEGATIVE",
    "POSITIVE",
    "as_array",
    "colour_map",
    "edges",
    "filled",
    "new_axes",
    "new_panels",
    "symmetric_scale",
]

POSITIVE, NEGATIVE = (
    (178, 24, 43),
    (33, 102, 172),
)  # the ends of ColorBrewer's RdBu, safe for the colour-blind


def as_array(values: Tensor | ArrayLike) -> NDArray[np.float64]:
    """A float64 numpy array of real values, wherever and in whatever real type they were."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().resolve_neg()
        if not values.is_complex():
            values = values.to(torch.float64).numpy()
    array = np.asarray(values)
    if np.iscomplexobj(array):
        raise InputError("Cannot draw complex values: pass their real part or .abs().")
    return array.astype(np.float64)


def symmetric_scale(values: Tensor | ArrayLike, percentile: float = 99.0) -> float:
    """The ``percentile`` of |a| over finite elements; the maximum where that is 0, and 1 where all are 0.

    >>> symmetric_scale([0.0, 0.0, -3.0], percentile=50)
    3.0
    """
    array = np.abs(as_array(values))
    array = array[np.isfinite(array)]
    if not array.size:
        return 1.0
    return float(np.percentile(array, percentile)) or float(array.max()) or 1.0


def colour_map(signed: bool) -> Colormap:
    """Blue through white at 0 to red, or white to red; not-a-number is grey."""
    from matplotlib import colormaps

    return colormaps["RdBu_r" if signed else "Reds"].with_extremes(bad="0.6")


def new_axes(width: float, height: float) -> Axes:
    """Axes in a figure of ``width`` × ``height`` inches that no global state knows of."""
    return new_panels(width, [height])[0]


def new_panels(width: float, heights: Sequence[float]) -> list[Axes]:
    """Axes one below the other, of these ``heights`` in inches, in a figure that no global state knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    made: NDArray[Any] = figure.subplots(len(heights), squeeze=False, height_ratios=list(heights))
    return list(made[:, 0])


def edges(centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the cells around increasing centres (N,) begin and end: (N + 1,).

    >>> edges(np.array([0.0, 1.0, 4.0])).tolist()
    [-0.5, 0.5, 2.5, 5.5]
    """
    half = np.diff(centres) / 2 if len(centres) > 1 else np.array([0.5])
    first, last = [centres[0] - half[0]], [centres[-1] + half[-1]]
    return np.concatenate([first, centres[:-1] + half[: len(centres) - 1], last])


def filled(ax: Axes, at: NDArray[np.float64], values: NDArray[np.float64]) -> None:
    """Values (N,) over ``at`` (N,) as a curve, red above 0 and blue below."""
    shown = np.where(np.isfinite(values), values, 0.0)
    for bound, colour in ((np.maximum(shown, 0), POSITIVE), (np.minimum(shown, 0), NEGATIVE)):
        ax.fill_between(at, 0, bound, color=np.array(colour) / 255, linewidth=0, alpha=0.75)
    ax.plot(at, values, color="0.1", linewidth=0.8)
    ax.axhline(0, color="0.5", linewidth=0.6)
    ax.margins(x=0)
