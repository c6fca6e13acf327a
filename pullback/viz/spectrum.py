"""Attributions to frequencies: spectra, and maps over time and frequency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pullback.core.errors import InputError
from pullback.viz.drawing import as_array, colour_map, edges, filled, new_axes, symmetric_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["spectrum", "time_frequency"]

Bands = Mapping[str, tuple[float, float]]
_COLOURS = ("#b35806", "#542788", "#1b7837", "#01665e")  # of curves, apart from the red and blue of signs


def spectrum(
    values: Tensor | ArrayLike,
    frequencies: Tensor | ArrayLike,
    ax: Axes | None = None,
    bands: Bands | None = None,
    names: Sequence[str] | None = None,
    unit: str = "Hz",
    amplitude: Tensor | ArrayLike | None = None,
) -> Axes:
    """Signed values (F,) over ``frequencies`` (F,), with named bands (low, high) shaded.

    Negative frequencies are folded onto the positive ones, so that a peak shows all that belongs to it. Values
    (N, F) are one curve each with ``names`` (N); one row, or no names, is their sum, filled red and blue. The
    signal's ``amplitude`` (F,) is a grey curve with its own axis at the right.
    """
    array, at = np.atleast_2d(as_array(values)), as_array(frequencies)
    if array.ndim != 2 or not array.size or at.shape != array.shape[1:]:
        raise InputError(
            f"Expected values (F,) or (N, F) and frequencies (F,); got {array.shape} and {at.shape}."
        )
    if names is not None and len(names) != len(array):
        raise InputError(f"Expected a name for each of {len(array)} curves; got {len(names)}.")
    ax = ax or new_axes(6.5, 2.3)
    size = None if amplitude is None else as_array(amplitude)
    if size is not None and size.shape != at.shape:
        raise InputError(f"Expected an amplitude for each of {len(at)} frequencies; got {size.shape}.")
    signed, (at, array) = at, _folded(at, array)
    if names is None or len(array) == 1:
        filled(ax, at, array.sum(0))
    else:
        for row, name, colour in zip(array, names, _COLOURS * len(array), strict=False):
            (line,) = ax.plot(at, row, color=colour, linewidth=1.2)
            line.set_label(name.replace("$", r"\$"))
        ax.axhline(0, color="0.5", linewidth=0.6)
        ax.legend(frameon=False, fontsize=8)
    width = float(at[-1] - at[0]) or 1.0
    ax.set_xlim(at[0] - 0.015 * width, at[0] + width)  # a peak at 0 is seen too
    _shade(ax, bands or {}, vertical=True)
    ax.set_xlabel(f"frequency ({unit})", fontsize=8)
    ax.set_ylabel("attribution", fontsize=8)
    if size is not None:
        _behind(ax, at, _folded(signed, size[None])[1][0])
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    return ax


def time_frequency(
    values: Tensor | ArrayLike,
    frequencies: Tensor | ArrayLike,
    times: Tensor | ArrayLike,
    ax: Axes | None = None,
    bands: Bands | None = None,
    percentile: float = 99.0,
    units: tuple[str, str] = ("Hz", "s"),
) -> Axes:
    """Signed values (F, N) or (C, F, N), summed over channels, as a map over ``times`` (N,) and ``frequencies`` (F,).

    Negative frequencies are folded onto the positive ones; bands are named at the right.
    """
    array, up, along = as_array(values), as_array(frequencies), as_array(times)
    array = array.sum(0) if array.ndim == 3 else array
    if array.shape != (*up.shape, *along.shape) or array.ndim != 2 or not array.size:
        raise InputError(
            f"Expected values (F, N) or (C, F, N), frequencies (F,) and times (N,); got {array.shape}, {up.shape} "
            f"and {along.shape}."
        )
    if (np.diff(along) <= 0).any():
        raise InputError("Expected times to increase.")
    ax = ax or new_axes(6.5, 2.6)
    up, folded = _folded(up, array.T)
    scale = symmetric_scale(folded, percentile)
    ax.pcolormesh(
        edges(along),
        np.maximum(edges(up), 0.0 if up[0] >= 0 else -np.inf),
        np.ma.masked_invalid(folded.T),
        cmap=colour_map(signed=True),
        vmin=-scale,
        vmax=scale,
        linewidth=0,
        rasterized=True,
    )
    _shade(ax, bands or {}, vertical=False)
    ax.set_xlabel(f"time ({units[1]})", fontsize=8)
    ax.set_ylabel(f"frequency ({units[0]})", fontsize=8)
    ax.tick_params(labelsize=8)
    return ax


def _behind(ax: Axes, at: NDArray[np.float64], amplitude: NDArray[np.float64]) -> None:
    """The signal's amplitude spectrum behind the attributions, on an axis of its own."""
    behind = ax.twinx()
    behind.plot(at, amplitude, color="0.55", linewidth=0.9)
    behind.set_ylim(bottom=0)
    behind.set_ylabel("amplitude of the signal", fontsize=8, color="0.45")
    behind.tick_params(labelsize=8, colors="0.45")
    behind.spines[["top", "right"]].set_visible(False)
    ax.set_zorder(behind.get_zorder() + 1)
    ax.patch.set_visible(False)


def _folded(
    at: NDArray[np.float64], rows: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Frequencies in order, those of both signs at their size with their values summed: (F',) and (N, F')."""
    sizes = np.abs(at) if (at < 0).any() else at
    # both signs of a bin come from different roundings of the same number
    unique, inverse = np.unique(np.round(sizes, 12), return_inverse=True)
    folded = np.zeros((len(unique), len(rows)))
    np.add.at(folded, inverse.reshape(-1), rows.T)
    return unique, folded.T


def _shade(ax: Axes, bands: Bands, vertical: bool) -> None:
    """Bands as shades with their names above a spectrum, or as lines with names at the right of a map."""
    first, last = ax.get_xlim() if vertical else ax.get_ylim()
    for number, (name, (low, high)) in enumerate(bands.items()):
        if not low < high:
            raise InputError(f"Band {name!r} is (low, high) with low < high; got {(low, high)}.")
        if high <= first or low >= last:
            continue  # above half the sample rate, say
        middle, text = (max(low, first) + min(high, last)) / 2, name.replace("$", r"\$")
        if vertical:
            shade = 0.16 if number % 2 else 0.07  # see-through, since the amplitude lies behind
            ax.axvspan(max(low, first), min(high, last), color="0", alpha=shade, linewidth=0, zorder=0)
            across = ax.get_xaxis_transform()
            ax.text(middle, 1.02, text, transform=across, ha="center", va="bottom", fontsize=7)
        else:
            for edge in (low, high):
                if first < edge < last:
                    ax.axhline(edge, color="0.35", linewidth=0.6, linestyle=(0, (4, 3)))
            ax.text(1.01, middle, text, transform=ax.get_yaxis_transform(), va="center", fontsize=7)
