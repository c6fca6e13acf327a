"""Named frequency bands: sums of attributions over the coefficients of each band, and the bands cut out of signals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...core.domain import Domain
from ...core.errors import MethodError
from .coordinates import dimensions

__all__ = ["Bands"]


@dataclass(frozen=True, eq=False)
class Bands:
    """Frequency bands by name: ``score(band) = Σ a_k over low <= |f_k| < high``, in Hz.

    Attributions of a linear domain add up, so the score of a band is the integrated gradient of switching it on as a
    whole. Mirror images count with their frequency, so one- and two-sided spectra give the same scores.

    Args:
        bands: name -> (low, high), in Hz.

    Raises:
        MethodError: a band is no pair of frequencies, or a domain has no sample rate.

    Example:
        >>> import torch
        >>> from pullback.attribution import Fourier
        >>> bands = Bands({"slow": (0, 20), "fast": (20, 50)})
        >>> found = bands.sums(torch.tensor([[1.0, 2.0, 3.0]]), Fourier("one", sample_rate=100.0), length=4)
        >>> {name: total.tolist() for name, total in found.items()}
        {'slow': [1.0], 'fast': [2.0]}
    """

    bands: Mapping[str, tuple[float, float]]

    def __post_init__(self) -> None:
        if not isinstance(self.bands, Mapping) or not self.bands:
            raise MethodError(f'bands are given by name: Bands({{"alpha": (8, 13)}}); got {self.bands!r}.')
        for name, edges in self.bands.items():
            right = isinstance(edges, (tuple, list)) and len(edges) == 2
            if not right or not 0 <= float(edges[0]) < float(edges[1]):
                raise MethodError(f"band {name!r} is (low, high) in Hz with 0 <= low < high, got {edges!r}.")

    def masks(self, domain: Domain, length: int | tuple[int, ...]) -> dict[str, Tensor]:
        """Which frequencies of a domain each band has, bool in the shape of ``domain.frequencies(length)``."""
        frequencies = getattr(domain, "frequencies", None)
        if frequencies is None:
            raise MethodError(f"{domain!r} has no frequencies; bands need Fourier, STFT, DCT or Wavelet.")
        if getattr(domain, "sample_rate", None) is None:
            raise MethodError(
                f"bands are in Hz, but {domain!r} has no sample rate. Give it: "
                f"{type(domain).__name__}(..., sample_rate=256.0)."
            )
        found = frequencies(length).abs()
        return {name: (found >= low) & (found < high) for name, (low, high) in self.bands.items()}

    def sums(self, values: Tensor, domain: Domain, length: int | tuple[int, ...]) -> dict[str, Tensor]:
        """The sum of attributions over each band: (B, ...) without the frequency dimension.

        Args:
            values: attributions in the domain, as ``Attribution.values``.
            domain: the domain they are in, with a sample rate.
            length: samples of the signal along the domain's dimension (several for several dimensions).
        """
        found = {}
        for name, mask in self.masks(domain, length).items():
            along = _frequency_dimensions(domain, mask)
            shape = [1] * values.dim()
            for axis, size in zip(along, mask.shape, strict=True):
                if values.shape[axis] != size:
                    raise MethodError(
                        f"{domain!r} has {size} frequencies for length {length}, but the values have shape "
                        f"{tuple(values.shape)}. Give the length of the signal that was explained."
                    )
                shape[axis] = size
            found[name] = (values * mask.reshape(shape).to(values)).sum(along)
        return found

    def without(self, x: Tensor, domain: Domain, name: str) -> Tensor:
        """The signal with one band taken out: its coefficients set to zero and put together again."""
        if name not in self.bands:
            raise MethodError(f"no band {name!r}. There are: {', '.join(self.bands)}.")
        fitted: Any = domain.fitted(x) if hasattr(domain, "fitted") else domain
        coefficients = fitted.analysis(x)
        dim = dimensions(getattr(domain, "dim", -1))
        lengths = tuple(x.shape[each] for each in dim)
        mask = self.masks(fitted, lengths if len(lengths) > 1 else lengths[0])[name]
        shape = [1] * coefficients.dim()
        for axis, size in zip(_frequency_dimensions(domain, mask), mask.shape, strict=True):
            shape[axis] = size
        kept = coefficients.masked_fill(mask.reshape(shape).to(coefficients.device), 0)
        result: Tensor = fitted.synthesis(kept)
        return result.to(x.dtype)


def _frequency_dimensions(domain: Domain, frequencies: Tensor) -> tuple[int, ...]:
    """The dimensions of the coefficients that frequencies run along."""
    own = getattr(domain, "frequency_dim", None)
    along = dimensions(getattr(domain, "dim", -1) if own is None else own)
    if len(along) != frequencies.dim():
        raise MethodError(
            f"{domain!r} has frequencies of shape {tuple(frequencies.shape)} along dimensions {along}."
        )
    return along
