"""The discrete Fourier transform as a domain: frequencies of a signal, or of an image along several dimensions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...core.errors import InputError, MethodError
from .coordinates import (
    Dimensions,
    came_from,
    dimensions,
    remembering,
    require_dimensions,
    require_length,
    require_sample_rate,
    transformable,
)

__all__ = ["Fourier"]


@dataclass(frozen=True)
class Fourier:
    """Frequencies: ``c_k = Σ_t x_t exp(-2πi k t / N)`` and ``x = Re((1/N) Σ_k c_k exp(2πi k t / N))``.

    With both sides a real signal's attributions are the same at k and N - k. With one side each of the N // 2 + 1
    coefficients stands for itself and its mirror image: twice the two-sided value, but for DC and, where N is even,
    the Nyquist frequency, which have none.

    Args:
        sides: "two", all N coefficients; "one", the N // 2 + 1 that are not mirror images.
        sample_rate: samples per second, for frequencies in Hz; None for cycles per sample.
        dim: along which dimension, or dimensions: (-2, -1) for the frequencies of images.

    Coefficients:
        (B, ..., N) -> complex (B, ..., N) or (B, ..., N // 2 + 1), in the value's unit times samples.

    Raises:
        MethodError: a parameter is out of range. InputError: complex values, or another length than fitted to.

    Source: Kechris et al. 2025, who take the two-sided transform.

    Example:
        >>> Fourier("one", sample_rate=100.0).frequencies(5)
        tensor([ 0., 20., 40.], dtype=torch.float64)
    """

    sides: str = "two"
    sample_rate: float | None = None
    dim: Dimensions = -1
    length: tuple[int, ...] | None = field(default=None, repr=False, compare=False)
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sides not in ("two", "one"):
            raise MethodError(f'sides is "two" or "one", got {self.sides!r}.')
        require_sample_rate(self.sample_rate)
        require_dimensions(self.dim)

    def analysis(self, x: Tensor) -> Tensor:
        x = transformable(x, self)
        lengths = self._lengths(x)
        require_length(self, self.length, lengths, "length")
        transform = torch.fft.fftn if self.sides == "two" else torch.fft.rfftn
        return remembering(transform(x, dim=dimensions(self.dim)), lengths)

    def synthesis(self, coefficients: Tensor) -> Tensor:
        dim = dimensions(self.dim)
        if self.sides == "two":
            require_length(self, self.length, self._lengths(coefficients), "length")
            complete: Tensor = torch.fft.ifftn(coefficients, dim=dim).real
            return complete
        lengths = self.length or came_from(coefficients)
        given = self._lengths(coefficients)
        if lengths is None:
            # as torch.fft.irfft: of the two lengths with as many frequencies the even one
            lengths = (*given[:-1], max(1, 2 * (given[-1] - 1)))
        elif (*lengths[:-1], lengths[-1] // 2 + 1) != given:
            raise InputError(
                f"{self!r} has {(*lengths[:-1], lengths[-1] // 2 + 1)} coefficients for length {lengths}, got {given}."
            )
        halved: Tensor = torch.fft.irfftn(coefficients, s=lengths, dim=dim)
        return halved

    def fitted(self, x: Tensor) -> Fourier:
        """The domain for values of this length, which one-sided coefficients alone do not tell."""
        return replace(self, length=self._lengths(transformable(x, self)))

    def frequencies(self, length: Dimensions) -> Tensor:
        """The frequency of each coefficient in Hz, or in cycles per sample without a sample rate.

        Signed for two sides. For several dimensions the distance from zero frequency, in the coefficients' shape.
        """
        lengths, spacing = dimensions(length), 1.0 / (self.sample_rate or 1.0)
        if len(lengths) != len(dimensions(self.dim)):
            raise MethodError(f"{self!r} needs one length for each dimension, got {length!r}.")
        along = [torch.fft.fftfreq(each, spacing, dtype=torch.float64) for each in lengths]
        if self.sides == "one":
            along[-1] = torch.fft.rfftfreq(lengths[-1], spacing, dtype=torch.float64)
        if len(along) == 1:
            only: Tensor = along[0]
            return only
        grid: Tensor = torch.stack(torch.meshgrid(*along, indexing="ij"))
        return grid.square().sum(0).sqrt()

    def _lengths(self, values: Tensor) -> tuple[int, ...]:
        return tuple(values.shape[dim] for dim in dimensions(self.dim))
