"""Discrete wavelet transforms as a domain: orthogonal and biorthogonal, of signals and of images."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

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

__all__ = ["Wavelet"]


@dataclass(frozen=True)
class Wavelet:
    """Wavelet coefficients: the approximation at the coarsest level, then details from coarse to fine.

    ``x = S c`` with the synthesis filters of the wavelet; attributions take the adjoint of S, which for biorthogonal
    wavelets is not the analysis. The coefficients are those of PyWavelets' ``wavedec`` and ``wavedec2``, laid out in
    one tensor. Modes other than "periodization" have more coefficients than samples (a frame), as do odd lengths.

    Args:
        name: "haar", "db4", "sym8", "bior4.4", ...: any discrete wavelet that PyWavelets knows.
        level: number of levels; None for as many as the filter's length allows.
        mode: how the signal goes on at its ends, in PyWavelets' words.
        dim: along which dimension, or a pair of dimensions for images.
        sample_rate: samples per second, for frequencies in Hz.

    Coefficients:
        (B, ..., N) -> (B, ..., M): approximation, coarsest detail, ..., finest detail. For images (B, ..., M, M'): the
        approximation in the first corner, around it the details of each level.

    Raises:
        MethodError: a parameter is out of range, or PyWavelets is missing. InputError: complex values, or another
        length than fitted to.

    Source: Mallat 1989; Cohen, Daubechies & Feauveau 1992 (biorthogonal).

    Example:
        >>> Wavelet("haar").analysis(torch.ones(1, 4, dtype=torch.float64)).round(decimals=12).tolist()
        [[2.0, 0.0, 0.0, 0.0]]
    """

    name: str = "db4"
    level: int | None = None
    mode: str = "periodization"
    dim: Dimensions = -1
    sample_rate: float | None = None
    length: tuple[int, ...] | None = field(default=None, repr=False, compare=False)
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.level is not None and (
            isinstance(self.level, bool) or not isinstance(self.level, int) or self.level < 1
        ):
            raise MethodError(f"level is a whole number, at least 1, or None; got {self.level!r}.")
        if not isinstance(self.name, str) or not isinstance(self.mode, str):
            raise MethodError(
                f'name and mode are texts such as "db4" and "periodization"; got {self.name!r}, {self.mode!r}.'
            )
        require_dimensions(self.dim, most=2)
        require_sample_rate(self.sample_rate)
        _filters(self.name)
        if self.mode not in _pywt().Modes.modes:
            raise MethodError(
                f"mode {self.mode!r} is unknown. Choose one of {', '.join(_pywt().Modes.modes)}."
            )

    def analysis(self, x: Tensor) -> Tensor:
        x = transformable(x, self)
        dim, lengths = dimensions(self.dim), self._lengths(x)
        require_length(self, self.length, lengths, "length")
        array = x.detach().cpu().numpy()
        approximation, details = array, []
        for _ in range(self._levels(lengths)):
            parts = _pywt().dwtn(approximation, self.name, mode=self.mode, axes=dim)
            details.append({key: torch.as_tensor(each) for key, each in parts.items() if "d" in key})
            approximation = parts["a" * len(dim)]
        layout = _layout(self.name, self.mode, lengths, self._levels(lengths))
        shape = list(x.shape)
        for each, axis in enumerate(dim):
            shape[axis] = sum(layout[each])
        found = torch.zeros(shape, dtype=x.dtype)
        found[_box(x.dim(), dim, [slice(0, sizes[0]) for sizes in layout])] = torch.as_tensor(approximation)
        for number, parts in enumerate(reversed(details), start=1):
            for key, part in parts.items():
                found[_box(x.dim(), dim, _places(layout, number, key))] = part
        return remembering(found.to(x.device), lengths)

    def synthesis(self, coefficients: Tensor) -> Tensor:
        dim, given = dimensions(self.dim), self._lengths(coefficients)
        lengths = (
            self.length or came_from(coefficients) or tuple(self._longest(each, given) for each in given)
        )
        levels = self._levels(lengths)
        layout = _layout(self.name, self.mode, lengths, levels)
        if tuple(sum(sizes) for sizes in layout) != given:
            expected = tuple(sum(sizes) for sizes in layout)
            raise InputError(f"{self!r} has {expected} coefficients for length {lengths}, got {given}.")
        low, high = (each.to(coefficients) for each in _filters(self.name))
        boxes = (coefficients.dim(), dim)
        value = coefficients[_box(*boxes, [slice(0, sizes[0]) for sizes in layout])]
        for number in range(1, levels + 1):
            sizes = [along[number] for along in layout]
            # an odd length has one approximation coefficient more than its half
            value = value[_box(*boxes, [slice(0, size) for size in sizes])]
            parts = {
                "".join(key): value
                if set(key) == {"a"}
                else coefficients[_box(*boxes, _places(layout, number, "".join(key)))]
                for key in itertools.product("ad", repeat=len(dim))
            }
            for axis in reversed(dim):
                keys = sorted({key[:-1] for key in parts})
                parts = {key: self._up(parts[key + "a"], parts[key + "d"], low, high, axis) for key in keys}
            value = parts[""]
        return value[_box(*boxes, [slice(0, length) for length in lengths])]

    def fitted(self, x: Tensor) -> Wavelet:
        """The domain for signals of this length, which the number of coefficients does not tell."""
        return replace(self, length=self._lengths(transformable(x, self)))

    def frequencies(self, length: Dimensions) -> Tensor:
        """The middle of each coefficient's octave in Hz, or in cycles per sample without a sample rate.

        Details of level j pass 1/2^(j+1) to 1/2^j cycles per sample, ideally, the approximation what is below.
        """
        lengths = dimensions(length)
        if len(lengths) != 1 or len(dimensions(self.dim)) != 1:
            raise MethodError(f"{self!r} has frequencies along one dimension only.")
        levels = self._levels(lengths)
        (sizes,) = _layout(self.name, self.mode, lengths, levels)
        middles = [0.25 / 2**levels] + [0.75 / 2**level for level in range(levels, 0, -1)]
        rate = self.sample_rate or 1.0
        parts = [
            torch.full((size,), rate * m, dtype=torch.float64) for size, m in zip(sizes, middles, strict=True)
        ]
        return torch.cat(parts)

    def level_sizes(self, length: int) -> dict[str, int]:
        """How many coefficients each level has, in their order: "approximation", "detail 3", ..., "detail 1"."""
        levels = self._levels((length,))
        (sizes,) = _layout(self.name, self.mode, (length,), levels)
        names = ["approximation"] + [f"detail {level}" for level in range(levels, 0, -1)]
        return dict(zip(names, sizes, strict=True))

    def _lengths(self, values: Tensor) -> tuple[int, ...]:
        return tuple(values.shape[dim] for dim in dimensions(self.dim))

    def _levels(self, lengths: tuple[int, ...]) -> int:
        if self.level is not None:
            return self.level
        taps = len(_filters(self.name)[0])
        return min(max(0, (length // (taps - 1)).bit_length() - 1) for length in lengths)

    def _longest(self, count: int, counts: tuple[int, ...]) -> int:
        """The longest signal with so many coefficients, as PyWavelets' ``waverec`` gives it."""
        for length in range(count, 0, -1):
            levels = self._levels((length,) * len(counts))
            if sum(_layout(self.name, self.mode, (length,), levels)[0]) == count:
                return length
        raise InputError(f"no signal has {count} coefficients in {self!r}.")

    def _up(self, approximation: Tensor, detail: Tensor, low: Tensor, high: Tensor, axis: int) -> Tensor:
        """One level of synthesis along an axis: both halves upsampled, filtered and added."""
        two = torch.stack([approximation.movedim(axis, -1), detail.movedim(axis, -1)], -2)
        count, taps = two.shape[-1], len(low)
        flat = two.reshape(-1, 2, count)
        full = functional.conv_transpose1d(flat, torch.stack([low, high])[:, None], stride=2)[:, 0]
        if self.mode == "periodization":
            # what runs over the end comes in again at the beginning
            rounds = -(-full.shape[-1] // (2 * count))
            full = functional.pad(full, (0, rounds * 2 * count - full.shape[-1]))
            value = full.reshape(-1, rounds, 2 * count).sum(1).roll(1 - taps // 2, -1)
        else:
            value = full[:, taps - 2 : full.shape[-1] - taps + 2]
        return value.reshape(*two.shape[:-2], value.shape[-1]).movedim(-1, axis)


def _pywt() -> Any:
    try:
        import pywt
    except ImportError:
        raise MethodError("Wavelet needs PyWavelets: pip install 'pullback[series]'.") from None
    return pywt


@lru_cache(maxsize=64)
def _filters(name: str) -> tuple[Tensor, Tensor]:
    """The synthesis filters of a wavelet, low and high pass, float64. Raises MethodError for an unknown name."""
    from difflib import get_close_matches

    known = _pywt().wavelist(kind="discrete")
    if name not in known:
        close = get_close_matches(name, known, 3) or ["haar", "db4", "sym8"]
        raise MethodError(f'wavelet "{name}" is unknown. Nearest: {", ".join(close)}.')
    wavelet = _pywt().Wavelet(name)
    return torch.tensor(wavelet.rec_lo, dtype=torch.float64), torch.tensor(
        wavelet.rec_hi, dtype=torch.float64
    )


@lru_cache(maxsize=256)
def _layout(name: str, mode: str, lengths: tuple[int, ...], levels: int) -> tuple[tuple[int, ...], ...]:
    """For each dimension, how many coefficients the approximation has, and the details from coarse to fine."""
    taps, found = len(_filters(name)[0]), []
    for length in lengths:
        sizes = []
        for _ in range(levels):
            length = (length + 1) // 2 if mode == "periodization" else (length + taps - 1) // 2
            sizes.append(length)
        found.append((length, *reversed(sizes)))
    return tuple(found)


def _places(layout: tuple[tuple[int, ...], ...], number: int, key: str) -> list[slice]:
    """Where the details of a level lie along each dimension: after what is coarser, or at the beginning."""
    places = []
    for sizes, kind in zip(layout, key, strict=True):
        start = sum(sizes[:number]) if kind == "d" else 0
        places.append(slice(start, start + sizes[number]))
    return places


def _box(count: int, dim: tuple[int, ...], places: list[slice]) -> tuple[slice, ...]:
    """An index with these slices along some dimensions, everything along the others."""
    index = [slice(None)] * count
    for axis, place in zip(dim, places, strict=True):
        index[axis] = place
    return tuple(index)
