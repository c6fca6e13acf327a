"""The short-time Fourier transform as a domain: frequencies of overlapping windows of a signal."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.errors import InputError, MethodError
from .coordinates import (
    came_from,
    remembering,
    require_dimensions,
    require_length,
    require_sample_rate,
    transformable,
)

__all__ = ["STFT"]

_WINDOWS = MappingProxyType(
    {
        "hann": torch.hann_window,
        "hamming": torch.hamming_window,
        "blackman": torch.blackman_window,
        "rectangular": torch.ones,
    }
)


@dataclass(frozen=True)
class STFT:
    """The spectrum of each window of a signal: ``c[k, m] = Σ_t w_t x[t + m·hop] exp(-2πi k t / L)``, one-sided.

    The windows overlap, so there are more coefficients than samples (a frame); synthesis is the least-squares inverse,
    overlap-add of windowed inverse transforms over Σ w². Completeness holds; how it is split among overlapping
    windows depends on the window and the hop. The signal is padded with zeros so that all samples count alike.

    Args:
        size: samples per window, L.
        hop: samples from one window to the next; None for a quarter of the window.
        window: "hann", "hamming", "blackman" or "rectangular".
        sample_rate: samples per second, for frequencies in Hz and times in seconds.
        dim: the time dimension.

    Coefficients:
        (B, ..., N) -> complex (B, ..., L // 2 + 1, M), frequencies and windows, in the value's unit times samples.

    Raises:
        MethodError: a parameter is out of range, or the windows leave gaps. InputError: complex values, or another
        length than fitted to.

    Source: Griffin & Lim 1984, eq. 6 (least-squares synthesis).

    Example:
        >>> STFT(size=8).analysis(torch.ones(1, 16)).shape
        torch.Size([1, 5, 11])
    """

    size: int = 64
    hop: int | None = None
    window: str = "hann"
    sample_rate: float | None = None
    dim: int = -1
    length: int | None = field(default=None, repr=False, compare=False)
    linear: ClassVar[bool] = True
    frequency_dim: ClassVar[int] = -2

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("hop", self.hop)):
            if value is None and name == "hop":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MethodError(f"{name} is a number of samples, at least 1; got {value!r}.")
        if self.window not in _WINDOWS:
            raise MethodError(f"window {self.window!r} is unknown. Choose one of {', '.join(_WINDOWS)}.")
        require_sample_rate(self.sample_rate)
        require_dimensions(self.dim, most=1)
        if isinstance(self.dim, tuple):
            raise MethodError(f"dim is one dimension, for example -1; got {self.dim!r}.")
        if self.hop_samples > self.size or float(self._covered(8 * self.size).min()) < 1e-6:
            raise MethodError(
                f"a {self.window} window of {self.size} samples every {self.hop_samples} leaves samples that no "
                f"window sees, so that nothing can be put together again. Give a shorter hop: {max(1, self.size // 4)}."
            )

    @property
    def hop_samples(self) -> int:
        """Samples from one window to the next."""
        return max(1, self.size // 4) if self.hop is None else self.hop

    def analysis(self, x: Tensor) -> Tensor:
        x = transformable(x, self).movedim(self.dim, -1)
        length = x.shape[-1]
        require_length(self, self.length, length, "length")
        lead, frames = self._lead(), self._frames(length)
        padded = torch.nn.functional.pad(
            x, (lead, (frames - 1) * self.hop_samples + self.size - lead - length)
        )
        windows = padded.unfold(-1, self.size, self.hop_samples) * self._window(x)
        return remembering(torch.fft.rfft(windows).transpose(-1, -2), length)

    def synthesis(self, coefficients: Tensor) -> Tensor:
        frames = coefficients.shape[-1]
        length = self.length or came_from(coefficients)
        if length is None:
            length = max(1, (frames - 1) * self.hop_samples + 1 - self._lead())
        if coefficients.shape[-2:] != (self.size // 2 + 1, self._frames(length)):
            raise InputError(
                f"{self!r} has {(self.size // 2 + 1, self._frames(length))} coefficients for length {length}, "
                f"got {tuple(coefficients.shape[-2:])}."
            )
        windows = torch.fft.irfft(coefficients.transpose(-1, -2), n=self.size)
        windows = windows * self._window(windows)
        total = (frames - 1) * self.hop_samples + self.size
        added = _overlap_add(windows, self.hop_samples, total)
        kept = slice(self._lead(), self._lead() + length)
        covered = self._covered(length).to(added)
        return (added[..., kept] / covered).movedim(-1, self.dim)

    def fitted(self, x: Tensor) -> STFT:
        """The domain for signals of this length, which the number of windows does not tell."""
        return replace(self, length=transformable(x, self).shape[self.dim])

    def frequencies(self, length: int) -> Tensor:
        """The frequency of each row of coefficients, in Hz, or in cycles per sample without a sample rate."""
        found: Tensor = torch.fft.rfftfreq(self.size, 1.0 / (self.sample_rate or 1.0), dtype=torch.float64)
        return found

    def times(self, length: int) -> Tensor:
        """The middle of each window, in seconds, or in samples without a sample rate."""
        number = torch.arange(self._frames(length), dtype=torch.float64)
        middle: Tensor = number * self.hop_samples - self._lead() + self.size / 2
        return middle / (self.sample_rate or 1.0)

    def _lead(self) -> int:
        """Zeros before the signal, so that the first sample is in as many windows as the others."""
        return self.size - min(self.hop_samples, self.size)

    def _frames(self, length: int) -> int:
        return int((self._lead() + length - 1) // self.hop_samples + 1)

    def _window(self, like: Tensor) -> Tensor:
        return _shape_of(self.window, self.size).to(like.real)

    def _covered(self, length: int) -> Tensor:
        """Σ w² over the windows that see each sample."""
        frames = self._frames(length)
        squares = _shape_of(self.window, self.size).square().expand(frames, -1)
        total = (frames - 1) * self.hop_samples + self.size
        return _overlap_add(squares, self.hop_samples, total)[self._lead() : self._lead() + length]


def _shape_of(window: str, size: int) -> Tensor:
    made: Any = _WINDOWS[window]
    found: Tensor = made(size, dtype=torch.float64)
    return found


def _overlap_add(windows: Tensor, hop: int, total: int) -> Tensor:
    """Σ of windows (..., M, L), each ``hop`` samples after the one before: (..., total)."""
    frames, size = windows.shape[-2:]
    flat = windows.reshape(-1, frames, size).transpose(1, 2)
    added = torch.nn.functional.fold(flat, (1, total), (1, size), stride=(1, hop))
    return added.reshape(*windows.shape[:-2], total)
