"""The cosine transform as a domain: real frequencies, orthonormal."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...core.errors import MethodError
from .coordinates import (
    Dimensions,
    dimensions,
    require_dimensions,
    require_length,
    require_sample_rate,
    transformable,
)

__all__ = ["DCT"]


@dataclass(frozen=True)
class DCT:
    """The orthonormal cosine transform (DCT-II): ``c_k = s_k Σ_t x_t cos(π k (2t + 1) / 2N)``.

    s_0 = √(1/N), all others √(2/N).
    Real, and without a jump between the two ends of the signal. Its transpose is its inverse (DCT-III).

    Args:
        dim: along which dimension, or dimensions: (-2, -1) for images.
        sample_rate: samples per second, for frequencies in Hz; None for cycles per sample.

    Coefficients:
        (B, ..., N) -> (B, ..., N), in the value's unit.

    Raises:
        MethodError: a parameter is out of range. InputError: complex values, or another length than fitted to.

    Source: Ahmed et al. 1974; computed through a Fourier transform of N samples (Makhoul 1980).

    Example:
        >>> DCT().analysis(torch.ones(1, 4, dtype=torch.float64)).round(decimals=12).tolist()
        [[2.0, 0.0, 0.0, 0.0]]
    """

    dim: Dimensions = -1
    sample_rate: float | None = None
    length: tuple[int, ...] | None = field(default=None, repr=False, compare=False)
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_dimensions(self.dim)
        require_sample_rate(self.sample_rate)

    def analysis(self, x: Tensor) -> Tensor:
        x = transformable(x, self)
        self._require_lengths(x)
        for dim in dimensions(self.dim):
            x = _cosine(x.movedim(dim, -1)).movedim(-1, dim)
        return x

    def synthesis(self, coefficients: Tensor) -> Tensor:
        self._require_lengths(coefficients)
        for dim in dimensions(self.dim):
            coefficients = _inverse_cosine(coefficients.movedim(dim, -1)).movedim(-1, dim)
        return coefficients

    def fitted(self, x: Tensor) -> DCT:
        """The domain for values of this length, which frequencies depend on."""
        x = transformable(x, self)
        return replace(self, length=tuple(x.shape[dim] for dim in dimensions(self.dim)))

    def frequencies(self, length: Dimensions) -> Tensor:
        """The frequency of each coefficient, k / 2N, in Hz, or in cycles per sample without a sample rate.

        For several dimensions the distance from zero frequency, in the coefficients' shape.
        """
        lengths, rate = dimensions(length), self.sample_rate or 1.0
        if len(lengths) != len(dimensions(self.dim)):
            raise MethodError(f"{self!r} needs one length for each dimension, got {length!r}.")
        along = [torch.arange(each, dtype=torch.float64) * (rate / (2 * each)) for each in lengths]
        if len(along) == 1:
            return along[0]
        return torch.stack(torch.meshgrid(*along, indexing="ij")).square().sum(0).sqrt()

    def _require_lengths(self, values: Tensor) -> None:
        found = tuple(values.shape[dim] for dim in dimensions(self.dim))
        require_length(self, self.length, found, "length")


def _turn(length: int, like: Tensor) -> Tensor:
    """exp(iπk/2N) for k < N."""
    angle = torch.arange(length, device=like.device, dtype=like.dtype) * (torch.pi / (2 * length))
    return torch.polar(torch.ones_like(angle), angle)


def _norm(length: int, like: Tensor) -> Tensor:
    """What an unscaled coefficient 2 Σ x cos(...) is multiplied by to be orthonormal."""
    scale = torch.full((length,), (1 / (2 * length)) ** 0.5, device=like.device, dtype=like.dtype)
    scale[0] = (1 / (4 * length)) ** 0.5
    return scale


def _cosine(x: Tensor) -> Tensor:
    length = x.shape[-1]
    # even samples forwards, odd ones backwards: half of the signal mirrored at its end
    folded = torch.cat([x[..., 0::2], x[..., 1::2].flip(-1)], -1)
    turned: Tensor = (torch.fft.fft(folded) * _turn(length, x).conj()).real
    return 2 * turned * _norm(length, x)


def _inverse_cosine(coefficients: Tensor) -> Tensor:
    length = coefficients.shape[-1]
    plain = coefficients / _norm(length, coefficients)
    mirrored = torch.cat([torch.zeros_like(plain[..., :1]), plain[..., 1:].flip(-1)], -1)
    folded = torch.fft.ifft(0.5 * torch.complex(plain, -mirrored) * _turn(length, coefficients)).real
    half = (length + 1) // 2
    order = torch.empty(length, dtype=torch.long, device=coefficients.device)
    order[0::2] = torch.arange(half, device=coefficients.device)
    order[1::2] = torch.arange(length - 1, half - 1, -1, device=coefficients.device)
    found: Tensor = folded.index_select(-1, order)
    return found
