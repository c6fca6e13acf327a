"""What all pictures share: real arrays, one zero-safe scale, one pair of colour maps, Axes without pyplot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pullback.core.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

__all__ = ["NEGATIVE", "POSITIVE", "as_array", "colour_map", "new_axes", "symmetric_scale"]

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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()
