"""Windows of a few seconds cut out of a longer trace, at its own sampling rate or another."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.core.errors import InputError

__all__ = ["cut_windows"]

# resample_poly designs a filter whose length grows with these integers
_LARGEST_FACTOR = 1000


def cut_windows(
    trace: Any,
    sample_rate: float,
    seconds: float,
    *,
    step: float | None = None,
    begin: float = 0.0,
    end: float | None = None,
    resample: float | None = None,
    center: bool = True,
) -> tuple[Tensor, Tensor]:
    """Windows (n, 1, T) float32 with T = round(seconds · rate), and where each begins: (n,) float64 seconds.

    ``trace`` (samples,): a tensor or array at ``sample_rate`` Hz. Only the section from ``begin`` to ``end`` seconds
    is read, and it is resampled on its own, so two sections that do not overlap share no sample in any way.
    ``step``: seconds between the starts of windows, by default ``seconds`` (no overlap). ``resample``: the rate of the
    windows in Hz, at most ``sample_rate`` (anti-aliased, polyphase). ``center`` subtracts each window's mean.

    Raises ``InputError`` for a trace, a rate, lengths or a section that do not fit.

    >>> x, start = cut_windows(torch.arange(10.0), sample_rate=2, seconds=2, begin=1)
    >>> x.shape, x[0, 0].tolist(), start.tolist()
    (torch.Size([2, 1, 4]), [-1.5, -0.5, 0.5, 1.5], [1.0, 3.0])
    """
    samples = np.asarray(trace, dtype=np.float64)
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise InputError(
            f"A trace of shape {samples.shape} was given{'' if samples.ndim != 1 else ' with NaN or infinity'}. "
            "Expected one dimension of finite samples; call cut_windows once for each channel."
        )
    step = seconds if step is None else step
    rate = sample_rate if resample is None else resample
    for name, value in (
        ("sample_rate", sample_rate),
        ("seconds", seconds),
        ("step", step),
        ("resample", rate),
    ):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name}={value} was given. Expected a positive number.")
    if rate > sample_rate * (1 + 1e-9):
        raise InputError(
            f"A rate of {rate:g} Hz was asked for, but the trace has {sample_rate:g} Hz and nothing above half of it. "
            f"Expected at most {sample_rate:g}."
        )
    whole = len(samples) / sample_rate
    end = whole if end is None else end
    if not 0 <= begin < end <= whole + 0.5 / sample_rate:
        raise InputError(
            f"The section from {begin:g} s to {end:g} s was asked for. Expected one inside the trace, which ends at "
            f"{whole:g} s ({len(samples):,} samples at {sample_rate:g} Hz)."
        )
    section = samples[round(begin * sample_rate) : round(end * sample_rate)]
    if resample is not None and resample != sample_rate:
        section = _resampled(section, resample / sample_rate)
    length, hop = round(seconds * rate), max(1, round(step * rate))
    if not 1 <= length <= len(section):
        raise InputError(
            f"Windows of {seconds:g} s were asked for in a section of {end - begin:g} s at {rate:g} Hz. Expected "
            "windows of at least one sample that fit into it; pass another seconds=."
        )
    first = torch.arange(0, len(section) - length + 1, hop)
    x = torch.from_numpy(section.copy()).unfold(0, length, hop)[:, None]
    if center:
        x = x - x.mean(-1, keepdim=True)
    return x.to(torch.float32, copy=True), begin + first.double() / rate


def _resampled(section: np.ndarray[Any, Any], ratio: float) -> np.ndarray[Any, Any]:
    from scipy.signal import resample_poly

    factor = Fraction(ratio).limit_denominator(_LARGEST_FACTOR)
    if factor == 0 or abs(float(factor) / ratio - 1) > 1e-5:
        raise InputError(
            f"Resampling by the factor {ratio:g} was asked for. Expected nearly a ratio of integers up to "
            f"{_LARGEST_FACTOR:,}; choose a rate closer to a simple fraction of the trace's own."
        )
    # Beyond its ends the section is taken to go on along a line: zeros would ring there, by as much as its mean.
    resampled: np.ndarray[Any, Any] = resample_poly(
        section, factor.numerator, factor.denominator, padtype="line"
    )
    return resampled
