"""Domains: other coordinates of the value at a site, in which any method explains.

A domain is a frozen dataclass with ``analysis`` and ``synthesis``; ``pullback.core.domain.Domain`` says what else it
may have.
"""

from __future__ import annotations

from .bands import Bands
from .cosine import DCT
from .fourier import Fourier
from .ica import ICA
from .in_domain import InDomain
from .linear import PCA, Chain, Linear
from .polar import Polar
from .seasonal_trend import SeasonalTrend
from .stft import STFT
from .wavelet import Wavelet

__all__ = [
    "DCT",
    "ICA",
    "PCA",
    "STFT",
    "Bands",
    "Chain",
    "Fourier",
    "InDomain",
    "Linear",
    "Polar",
    "SeasonalTrend",
    "Wavelet",
]
