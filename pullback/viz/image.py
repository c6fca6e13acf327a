"""Attributions to pixels as heat maps, alone or over the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pullback.core.errors import InputError
from pullback.viz.drawing import as_array, colour_map, new_axes, symmetric_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["displayable", "heat_colours", "heat_map", "overlay"]


def heat_map(
    values: Tensor | ArrayLike, ax: Axes | None = None, percentile: float = 99.0, signed: bool | None = None
) -> Axes:
    """Σ over channels of ``values`` (C, H, W) or (H, W), in colours with 0 in the middle.

    The colours end at ± the ``percentile`` of |a| of the summed map. ``signed=None`` looks for negative
    values: without any, colours run from 0. Not-a-number is grey.
    """
    array, ax = _summed(values), ax or new_axes(4.0, 4.0)
    signed = bool((array < 0).any()) if signed is None else signed
    scale = symmetric_scale(array, percentile)
    ax.imshow(
        array, cmap=colour_map(signed), vmin=-scale if signed else 0.0, vmax=scale, interpolation="nearest"
    )
    ax.set_axis_off()
    return ax


def overlay(
    values: Tensor | ArrayLike,
    image: Tensor | ArrayLike,
    ax: Axes | None = None,
    alpha: float = 0.85,
    percentile: float = 99.0,
) -> Axes:
    """The heat map over the image in grey: the larger |a|, the more opaque, up to ``alpha``.

    ``image`` (C, H, W) or (H, W), in any range; a map of another size is stretched over it.
    """
    array, shown, ax = _summed(values), displayable(image), ax or new_axes(4.0, 4.0)
    grey = shown @ np.array([0.299, 0.587, 0.114])
    height, width = grey.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    ax.imshow(0.25 + 0.75 * grey, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest", extent=extent)
    colours = heat_colours(array, percentile)
    strength = np.abs(np.nan_to_num(array)) / symmetric_scale(array, percentile)
    colours[..., 3] = alpha * np.where(np.isfinite(array), np.sqrt(np.clip(strength, 0.0, 1.0)), 1.0)
    ax.imshow(colours, interpolation="nearest", extent=extent)
    ax.set_axis_off()
    return ax


def heat_colours(values: Tensor | ArrayLike, percentile: float = 99.0) -> NDArray[np.float64]:
    """RGBA (H, W, 4) in [0, 1] of the signed heat map: the pixels that ``heat_map`` draws."""
    from matplotlib.colors import Normalize

    array = _summed(values)
    scale = symmetric_scale(array, percentile)
    masked = np.ma.masked_invalid(array)
    return np.array(colour_map(signed=True)(Normalize(-scale, scale)(masked)), dtype=np.float64)


def displayable(image: Tensor | ArrayLike) -> NDArray[np.float64]:
    """RGB (H, W, 3) in [0, 1] of an image (C, H, W) or (H, W) in any range.

    Values in [0, 1] are kept and bytes divided by 255; anything else (normalised by mean and deviation, say)
    is stretched between its 0.5th and 99.5th percentile, or shown as middle grey if constant.
    """
    array = as_array(image)
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[0] not in (1, 3):
        raise InputError(f"Expected an image (C, H, W) with 1 or 3 channels, or (H, W); got {array.shape}.")
    finite = array[np.isfinite(array)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if low < 0 or high > 1:
        if low >= 0 and high <= 255 and (finite == np.round(finite)).all():
            low, high = 0.0, 255.0
        else:
            low, high = np.percentile(finite, 0.5), np.percentile(finite, 99.5)
        array = (array - low) / (high - low) if high > low else np.full_like(array, 0.5)
    array = np.clip(np.nan_to_num(array, nan=0.5, posinf=1.0, neginf=0.0), 0.0, 1.0)
    return np.ascontiguousarray(np.broadcast_to(array, (3, *array.shape[1:])).transpose(1, 2, 0))


def _summed(values: Tensor | ArrayLike) -> NDArray[np.float64]:
    array = as_array(values)
    if array.ndim not in (2, 3):
        raise InputError(f"Expected values (C, H, W) or (H, W) of one example; got {array.shape}.")
    return np.asarray(array.sum(0)) if array.ndim == 3 else array
