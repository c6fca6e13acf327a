"""Attribution engines. ``METHODS`` is the registry: the class of each method by its name.

A line added there adds a method to the command line, the doctor, the demo and the conformance suite.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .as_captum import as_captum
from .baselines import (
    Blur,
    ChannelMean,
    Constant,
    Dataset,
    Given,
    MeanEmbedding,
    TokenEmbedding,
    Uniform,
    Zeros,
)
from .cam import GradCAM, LayerCAM
from .captum_adapter import Captum
from .conservation import conservation_report
from .controls import EdgeDetector, RandomAttribution
from .domains import (
    DCT,
    ICA,
    PCA,
    STFT,
    Bands,
    Chain,
    Fourier,
    InDomain,
    Linear,
    Polar,
    SeasonalTrend,
    Wavelet,
)
from .expected_gradients import ExpectedGradients
from .fullgrad import FullGrad, FullGradTerms, fullgrad_terms
from .gradient import Gradient, InputXGradient
from .integrated_gradients import IntegratedGradients
from .patching import patching_scores
from .pullback_ascent import PullbackAscent
from .pullbacks import ExcitationPullback, SemanticPullback
from .relevance import CPLRP, LRP, AttnLRP, MambaLRP, Relevance, RelP
from .rules import register_rule
from .smoothing import SmoothGrad, VarGrad

__all__ = [
    "ALIASES",
    "BASELINES",
    "CPLRP",
    "DCT",
    "DOMAINS",
    "ICA",
    "LRP",
    "METHODS",
    "PCA",
    "STFT",
    "AttnLRP",
    "Bands",
    "Blur",
    "Captum",
    "Chain",
    "ChannelMean",
    "Constant",
    "Dataset",
    "EdgeDetector",
    "ExcitationPullback",
    "ExpectedGradients",
    "Fourier",
    "FullGrad",
    "FullGradTerms",
    "Given",
    "GradCAM",
    "Gradient",
    "InDomain",
    "InputXGradient",
    "IntegratedGradients",
    "LayerCAM",
    "Linear",
    "MambaLRP",
    "MeanEmbedding",
    "Polar",
    "PullbackAscent",
    "RandomAttribution",
    "RelP",
    "Relevance",
    "SeasonalTrend",
    "SemanticPullback",
    "SmoothGrad",
    "TokenEmbedding",
    "Uniform",
    "VarGrad",
    "Wavelet",
    "Zeros",
    "as_captum",
    "conservation_report",
    "fullgrad_terms",
    "patching_scores",
    "register_rule",
]

METHODS: Mapping[str, type[Any]] = MappingProxyType(
    {
        cls.__name__: cls
        for cls in (
            Gradient,
            InputXGradient,
            IntegratedGradients,
            SmoothGrad,
            VarGrad,
            ExpectedGradients,
            GradCAM,
            LayerCAM,
            FullGrad,
            Relevance,
            LRP,
            RelP,
            CPLRP,
            AttnLRP,
            MambaLRP,
            ExcitationPullback,
            SemanticPullback,
            PullbackAscent,
            InDomain,
            Captum,
            RandomAttribution,
            EdgeDetector,
        )
    }
)

BASELINES: Mapping[str, type[Any]] = MappingProxyType(
    {
        cls.__name__: cls
        for cls in (
            Zeros,
            Constant,
            ChannelMean,
            Blur,
            Given,
            Uniform,
            Dataset,
            MeanEmbedding,
            TokenEmbedding,
        )
    }
)

DOMAINS: Mapping[str, type[Any]] = MappingProxyType(
    {
        cls.__name__: cls
        for cls in (Fourier, STFT, DCT, Wavelet, ICA, PCA, SeasonalTrend, Polar, Linear, Chain)
    }
)

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "saliency": "Gradient",
        "ixg": "InputXGradient",
        "ig": "IntegratedGradients",
        "mean": "ChannelMean",
        "random": "RandomAttribution",
        "edges": "EdgeDetector",
        "mask": 'TokenEmbedding("mask")',
        "pad": 'TokenEmbedding("pad")',
    }
)
"""Short spellings that parsing also knows, beside every name without regard to case and underscores."""
