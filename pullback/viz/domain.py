"""Attributions to the coefficients of a domain, side by side with the signal that they are coefficients of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pullback.core.errors import InputError
from pullback.viz.components import components, levels
from pullback.viz.drawing import as_array, new_axes, new_panels
from pullback.viz.spectrum import spectrum, time_frequency

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pullback.result import Attribution

__all__ = ["DomainKind", "domain_kind", "draw_in_domain"]

DomainKind = Literal["spectrum", "time-frequency", "levels", "components"]
_MOST_ROWS = 12


def domain_kind(attribution: Attribution, leaf: Tensor) -> DomainKind | None:
    """Which picture the coordinates recorded with an attribution call for, if values (B, ...) still have them."""
    known = attribution.meta.get("coordinates")
    if not isinstance(known, Mapping) or not isinstance(attribution.values, Tensor):
        return None
    count, times, names = (len(known.get(each) or ()) for each in ("frequencies", "times", "names"))
    shape, at = leaf.shape[1:], leaf.ndim + known.get("dim", -1)
    if sizes := known.get("levels"):
        return "levels" if 1 <= at < leaf.ndim and leaf.shape[at] == sum(sizes.values()) else None
    if count:
        if times:
            return "time-frequency" if shape[-2:] == (count, times) and len(shape) in (2, 3) else None
        # named rows, such as amplitude and phase, stand right before the frequencies
        named = not names or (at > 1 and leaf.shape[at - 1] == names)
        return "spectrum" if 1 <= at < leaf.ndim and leaf.shape[at] == count and named else None
    if not names or known.get("named", -2) != -2:
        return None
    return "components" if _parts(attribution, leaf, names) is not None else None


def draw_in_domain(
    attribution: Attribution,
    kind: DomainKind,
    example: int,
    ax: Axes | None,
    bands: Mapping[str, tuple[float, float]] | None = None,
) -> Axes:
    """One example; without Axes of its own, below the signal. The Axes returned are those of the attribution."""
    assert isinstance(attribution.values, Tensor)
    known: Mapping[str, Any] = attribution.meta["coordinates"]
    values, rate = attribution.values[example], known.get("sample_rate")
    signal = attribution.diagnostics.get("signal")
    lines = None if not isinstance(signal, Tensor) else _channels(signal[example], known.get("dim", -1))
    if kind == "components":
        parts = _parts(attribution, attribution.values, len(known["names"]))
        assert parts is not None
        scores, signals, names = _rows(as_array(values), parts[example], list(known["names"]))
        above, ax = _panels(lines, ax, 0.7 + 0.55 * len(names))
        time = np.arange(signals.shape[1]) / rate if rate else None
        ax = components(scores, names, signals, ax, time, unit="s" if rate else "samples")
    elif kind == "levels":
        above, ax = _panels(lines, ax, 0.7 + 0.4 * len(known["levels"]))
        row = values.movedim(known.get("dim", -1), -1).reshape(-1, sum(known["levels"].values())).sum(0)
        duration = None if lines is None else lines.shape[1] / (rate or 1.0)
        parts, unit = row.split(list(known["levels"].values())), "s" if rate else "samples"
        levels(parts, list(known["levels"]), ax, duration, unit=unit)
    else:
        if bands and not rate:
            raise InputError(
                f"Bands are in Hz, but {attribution.domain} has no sample rate. Explain with it, for example "
                "Fourier(sample_rate=256.0)."
            )
        units = ("Hz", "s") if rate else ("cycles per sample", "samples")
        above, ax = _panels(lines, ax, 2.3)
        if kind == "time-frequency":
            time_frequency(values, known["frequencies"], known["times"], ax, bands, units=units)
        else:
            _spectrum(attribution, known, example, ax, bands, units[0])
    if above is not None and lines is not None:
        if kind != "spectrum":
            above.sharex(ax)
        _draw_signal(above, lines, rate)
    return ax


def _spectrum(
    attribution: Attribution,
    known: Mapping[str, Any],
    example: int,
    ax: Axes,
    bands: Mapping[str, tuple[float, float]] | None,
    unit: str,
) -> None:
    names, dim = known.get("names"), known.get("dim", -1)
    values, point = attribution.values[example], attribution.point  # type: ignore[index]
    rows = as_array(values.movedim(dim, -1))
    amplitude = None
    if isinstance(point, Tensor) and point.shape == attribution.values.shape:  # type: ignore[union-attr]
        amplitude = as_array(point[example].abs().movedim(dim, -1))
    if names:
        rows = rows.reshape(-1, *rows.shape[-2:]).sum(0)
        amplitude = None if amplitude is None else amplitude[..., 0, :]
    else:
        rows = rows.reshape(-1, rows.shape[-1]).sum(0)
    if amplitude is not None:
        amplitude = amplitude.reshape(-1, amplitude.shape[-1]).mean(0)
    spectrum(rows, known["frequencies"], ax, bands, names, unit, amplitude)


def _parts(attribution: Attribution, leaf: Tensor, count: int) -> Tensor | None:
    """The signal of each component (B, ..., K, T): parts held fixed, or coefficients that are signals."""
    shape = leaf.shape[1:]
    for signals in (attribution.diagnostics.get("parts"), attribution.point):
        if not isinstance(signals, Tensor) or signals.is_complex() or signals.ndim < 3:
            continue
        if signals.shape[-2] == count and (shape[-1:] == (count,) or shape == signals.shape[1:]):
            return signals
    return None


def _rows(
    values: NDArray[np.float64], parts: Tensor, names: list[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str]]:
    """Values (R,) or (R, T), signals (R, T) and a name for each row: every channel's components, or their sums."""
    signals = as_array(parts)
    values = values[..., None] if values.shape[-1] == len(names) and values.shape != signals.shape else values
    signals = signals.reshape(-1, *signals.shape[-2:])
    values = values.reshape(-1, *values.shape[-2:])
    channels = len(signals)
    if channels == 1 or channels != len(values) or channels * len(names) > _MOST_ROWS:
        return values.sum(0), signals.mean(0), names
    named = [f"{name}, channel {channel}" for channel in range(channels) for name in names]
    return values.reshape(-1, values.shape[-1]), signals.reshape(-1, signals.shape[-1]), named


def _channels(signal: Tensor, dim: int) -> NDArray[np.float64] | None:
    """A signal's channels (C, T), time last; None where it is none."""
    if not 1 <= signal.ndim <= 2 or not -signal.ndim <= dim < signal.ndim:
        return None
    return np.atleast_2d(as_array(signal.movedim(dim, -1)))


def _panels(lines: object, ax: Axes | None, height: float) -> tuple[Axes | None, Axes]:
    """Axes for the signal, where there is one and room for it, and those for the attribution."""
    if ax is not None:
        return None, ax
    if lines is None:
        return None, new_axes(6.5, height)
    above, main = new_panels(6.5, [1.3, height])
    return above, main


def _draw_signal(ax: Axes, lines: NDArray[np.float64], rate: float | None) -> None:
    times = np.arange(lines.shape[1]) / (rate or 1.0)
    for number, line in enumerate(lines):
        ax.plot(times, line, color=str(0.1 + 0.6 * number / len(lines)), linewidth=0.9)
    ax.set_xlim(0, lines.shape[1] / (rate or 1.0))
    ax.set_xlabel("time (s)" if rate else "time (samples)", fontsize=8)
    ax.set_ylabel("signal", fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
