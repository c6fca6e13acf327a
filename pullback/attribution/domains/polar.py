"""Amplitude and phase of the spectrum, as a domain. The only one here whose synthesis is not linear."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...core.errors import InputError, MethodError
from .coordinates import came_from, remembering, require_sample_rate, transformable

__all__ = ["Polar"]

_NAMES = ("amplitude", "phase")
_ROUNDING = 64.0  # a Fourier transform's rounding, in units of eps times its largest coefficient


@dataclass(frozen=True)
class Polar:
    """Amplitude and phase of each frequency along the last axis: ``x = irfft(amplitude · exp(i phase))``.

    Not linear: between two signals a method takes a straight line in amplitude and phase, which is no straight line
    in time. Completeness holds all the same. Where a baseline has amplitude 0 (everywhere, for zeros) it has no
    phase; there the phase stays the input's, so that nothing is attributed to it, or is ``phase_baseline``. Where
    a baseline has an amplitude its own phase is taken, by the turn of at most half a circle from the input's.

    Args:
        phase_baseline: phase in radians where the baseline has none; None keeps the input's phase.
        sample_rate: samples per second, for frequencies in Hz.

    Coefficients:
        (B, ..., T) -> (B, ..., 2, T // 2 + 1): amplitudes, in units of the signal times samples; phases, in radians.

    Raises:
        MethodError: a parameter is out of range, or synthesis is asked for before the length is known.
        InputError: complex values, or another shape than fitted to.

    Source: Kechris et al. 2025 for gradients along a path of coefficients; the treatment of phases is ours.

    Example:
        >>> x = torch.tensor([[1.0, -1.0, 1.0, -1.0, 0.0]])
        >>> polar = Polar().fitted(x)
        >>> bool(torch.allclose(polar.synthesis(polar.analysis(x)), x, atol=1e-6))
        True
    """

    phase_baseline: float | None = None
    sample_rate: float | None = None
    length: int | None = field(default=None, repr=False, compare=False)
    example: Tensor | None = field(default=None, repr=False, compare=False)
    linear: ClassVar[bool] = False
    dim: ClassVar[int] = -1

    def __post_init__(self) -> None:
        require_sample_rate(self.sample_rate)
        phase = self.phase_baseline
        if phase is None:
            return
        if isinstance(phase, bool) or not isinstance(phase, (int, float)) or not abs(phase) < torch.inf:
            raise MethodError(
                f"phase_baseline is an angle in radians, or None for the input's phase; got {phase!r}."
            )

    def analysis(self, x: Tensor) -> Tensor:
        amplitude, phase = self._spectrum(x)
        if self.example is None:
            return remembering(torch.stack([amplitude, phase], -2), x.shape[-1])
        if self.length != x.shape[-1] or self.example.shape[:-2] != x.shape[:-1]:
            shape = (*self.example.shape[:-2], self.length)
            raise InputError(f"Polar was fitted to values of shape {shape}, got {tuple(x.shape)}.")
        kept_amplitude, kept = self.example.unbind(-2)
        largest = torch.maximum(amplitude.amax(-1, keepdim=True), kept_amplitude.amax(-1, keepdim=True))
        without = amplitude <= _ROUNDING * torch.finfo(amplitude.dtype).eps * largest
        turn = torch.remainder(phase - kept + torch.pi, 2 * torch.pi) - torch.pi
        undefined = kept if self.phase_baseline is None else torch.full_like(kept, self.phase_baseline)
        # the example itself keeps its phases bit for bit
        chosen = torch.where(without, undefined, torch.where(phase == kept, kept, kept + turn))
        return torch.stack([amplitude, chosen], -2)

    def synthesis(self, coefficients: Tensor) -> Tensor:
        length = came_from(coefficients) if self.length is None else self.length
        if length is None:
            raise MethodError(
                "Polar does not know how many samples to synthesise: an odd and an even length have as many "
                "frequencies. Use InDomain(...) or problem.in_domain(...), or call .fitted(x) first."
            )
        amplitude, phase = coefficients.unbind(-2)
        spectrum = torch.complex(amplitude * phase.cos(), amplitude * phase.sin())
        value: Tensor = torch.fft.irfft(spectrum, n=length)
        return value

    def fitted(self, x: Tensor) -> Polar:
        """The domain for these examples: with their length, and their phases for baselines that have none."""
        amplitude, phase = self._spectrum(x)
        largest = amplitude.amax(-1, keepdim=True)
        defined = amplitude > _ROUNDING * torch.finfo(amplitude.dtype).eps * largest
        start = 0.0 if self.phase_baseline is None else self.phase_baseline
        phase = torch.where(defined, phase, torch.full_like(phase, start))
        return replace(self, length=x.shape[-1], example=torch.stack([amplitude, phase], -2).detach())

    def rows(self, index: Tensor) -> Polar:
        """The same for these rows of the examples, repeated or left out."""
        if self.example is None:
            return self
        return replace(self, example=self.example[index.to(self.example.device)])

    def frequencies(self, length: int) -> Tensor:
        """The frequency of each amplitude, (length // 2 + 1,), in Hz, or per sample without a sample rate."""
        found: Tensor = torch.fft.rfftfreq(length, 1.0 / (self.sample_rate or 1.0), dtype=torch.float64)
        return found

    def _spectrum(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spectrum = torch.fft.rfft(transformable(x, self))
        return spectrum.abs(), spectrum.angle()

    def labels(self, shape: torch.Size) -> list[str]:
        return list(_NAMES)
