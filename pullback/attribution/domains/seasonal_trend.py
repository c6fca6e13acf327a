"""Trend, seasonal part and residual of a time series (Cleveland et al. 1990), as a domain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.errors import InputError, MethodError
from ...core.problem import Domain
from .fixed_parts import FixedParts

__all__ = ["SeasonalTrend"]

_NAMES = ("trend", "seasonal", "residual")


@dataclass(frozen=True)
class SeasonalTrend:
    """A series as the sum of its trend, its seasonal part and the residual, by STL along the last axis.

    ``parts="gates"``: one number in front of each part, all 1 at the example and 0 at zeros,
    ``x = g₁ trend + g₂ seasonal + g₃ residual`` with the example's parts held fixed; the integrated gradient of a gate
    is Σ_t part(t) · ḡ(t). A baseline must then be zeros or a mixture of those parts, such as the trend alone.
    ``parts="full"``: the three signals themselves, so that any baseline is honoured (it is decomposed too).

    Args:
        period: samples per season, at least 2; the series holds at least two seasons.
        seasonal: length of the smoother across seasons, odd, at least 3.
        parts: "gates" or "full".
        trend: length of the trend's smoother, odd and larger than ``period``; None lets STL choose.
        robust: weigh outliers down.

    Coefficients:
        (B, ..., T) -> gates (B, ..., 3), or signals (B, ..., 3, T): trend, seasonal, residual.

    Raises:
        MethodError: a parameter is out of range, statsmodels is missing, or gates are asked for without an example.
        InputError: fewer than two seasons, complex values, or a baseline that gates cannot express.

    Source: Cleveland et al. 1990 (STL); gates as coefficients in Kechris et al. 2025.

    Example:
        >>> t = torch.arange(48.0, dtype=torch.float64)
        >>> signals = SeasonalTrend(12, parts="full").analysis((t / 10 + torch.sin(t * torch.pi / 6))[None])
        >>> signals.shape
        torch.Size([1, 3, 48])
    """

    period: int
    seasonal: int = 7
    parts: str = "gates"
    trend: int | None = None
    robust: bool = False
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not _is_count(self.period) or self.period < 2:
            raise MethodError(f"period is a number of samples, at least 2, got {self.period!r}.")
        if not _is_count(self.seasonal) or self.seasonal < 3 or self.seasonal % 2 == 0:
            raise MethodError(f"seasonal is an odd number of seasons, at least 3, got {self.seasonal!r}.")
        if self.trend is not None and (
            not _is_count(self.trend) or self.trend <= self.period or self.trend % 2 == 0
        ):
            raise MethodError(
                f"trend is an odd number of samples larger than the period {self.period}, got {self.trend!r}."
            )
        if self.parts not in ("gates", "full"):
            raise MethodError(f'parts is "gates" or "full", got {self.parts!r}.')

    def analysis(self, x: Tensor) -> Tensor:
        self._require_full("coefficients")
        return self.decomposition(x)

    def synthesis(self, coefficients: Tensor) -> Tensor:
        self._require_full("a signal")
        return coefficients.sum(-2)

    def fitted(self, x: Tensor) -> Domain:
        """The domain for these examples: with gates, their parts held fixed."""
        if self.parts == "full":
            return self
        signals = self.decomposition(x)
        return FixedParts(repr(self), signals, x.detach(), torch.ones_like(signals[..., 0]), _NAMES)

    def decomposition(self, x: Tensor) -> Tensor:
        """Trend, seasonal part and residual of each series: (B, ..., T) -> (B, ..., 3, T)."""
        if x.is_complex() or not x.is_floating_point():
            raise InputError(f"SeasonalTrend decomposes real series, got {x.dtype}.")
        if x.dim() < 2 or x.shape[-1] < 2 * self.period:
            raise InputError(
                f"SeasonalTrend(period={self.period}) needs series of at least two seasons, {2 * self.period} samples "
                f"along the last axis, got {tuple(x.shape)}. Give a shorter period or a longer series."
            )
        try:
            from statsmodels.tsa.seasonal import STL
        except ImportError:
            raise MethodError("SeasonalTrend needs statsmodels: pip install 'pullback[series]'.") from None
        found = []
        for series in x.detach().double().cpu().reshape(-1, x.shape[-1]).numpy():
            fit = STL(series, self.period, self.seasonal, trend=self.trend, robust=self.robust).fit()
            found.append(torch.stack([torch.as_tensor(fit.trend), torch.as_tensor(fit.seasonal)]))
        two = torch.stack(found).reshape(*x.shape[:-1], 2, x.shape[-1]).to(x)
        residual = x.detach()[..., None, :] - two.sum(-2, keepdim=True)
        return torch.cat([two, residual], dim=-2)

    def labels(self, shape: torch.Size) -> list[str]:
        return list(_NAMES)

    def _require_full(self, asked: str) -> None:
        if self.parts == "gates":
            raise MethodError(
                f"{self!r} gives {asked} only together with the example whose parts the gates multiply. Use "
                'InDomain(...) or problem.in_domain(...), call .fitted(x) first, or take parts="full".'
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
