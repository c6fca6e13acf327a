"""pullback: gradient attribution for any PyTorch model.

>>> import torch
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 3))
>>> explain(net, torch.ones(1, 4), target=1).values.shape
torch.Size([1, 4])
"""

from importlib import import_module
from types import ModuleType

from .api import compare, explain, explain_generation, explain_targets
from .attribution import (
    CPLRP,
    DCT,
    ICA,
    LRP,
    METHODS,
    PCA,
    STFT,
    AttnLRP,
    Bands,
    Blur,
    Captum,
    Chain,
    ChannelMean,
    Constant,
    Dataset,
    EdgeDetector,
    ExcitationPullback,
    ExpectedGradients,
    Fourier,
    FullGrad,
    Given,
    GradCAM,
    Gradient,
    InDomain,
    InputXGradient,
    IntegratedGradients,
    LayerCAM,
    Linear,
    MambaLRP,
    MeanEmbedding,
    Polar,
    PullbackAscent,
    RandomAttribution,
    Relevance,
    RelP,
    SeasonalTrend,
    SemanticPullback,
    SmoothGrad,
    TokenEmbedding,
    Uniform,
    VarGrad,
    Wavelet,
    Zeros,
    as_captum,
)
from .core.checkpointing import checkpointed
from .core.errors import (
    CoverageError,
    FormatError,
    InputError,
    MethodError,
    ModelError,
    SiteError,
    TargetError,
    TaskError,
)
from .core.inputs import Shared
from .core.pose import pose
from .core.problem import Domain, Problem
from .core.sites import Site, sites
from .core.targets import (
    Contrast,
    Detection,
    Logit,
    LogProb,
    Loss,
    Margin,
    MaskSum,
    Mean,
    Norm,
    Probability,
    Similarity,
    TokenAt,
)
from .dataset_attribution import explain_dataset
from .dataset_result import DatasetAttribution
from .result import Attribution, load
from .version import __version__


def __getattr__(name: str) -> ModuleType:
    """Load ``pullback.datasets``, ``evaluation``, ``steering``, ``testing`` and ``viz`` on first use."""
    if name in ("datasets", "evaluation", "steering", "testing", "viz"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CPLRP",
    "DCT",
    "ICA",
    "LRP",
    "METHODS",
    "PCA",
    "STFT",
    "AttnLRP",
    "Attribution",
    "Bands",
    "Blur",
    "Captum",
    "Chain",
    "ChannelMean",
    "Constant",
    "Contrast",
    "CoverageError",
    "Dataset",
    "DatasetAttribution",
    "Detection",
    "Domain",
    "EdgeDetector",
    "ExcitationPullback",
    "ExpectedGradients",
    "FormatError",
    "Fourier",
    "FullGrad",
    "Given",
    "GradCAM",
    "Gradient",
    "InDomain",
    "InputError",
    "InputXGradient",
    "IntegratedGradients",
    "LayerCAM",
    "Linear",
    "LogProb",
    "Logit",
    "Loss",
    "MambaLRP",
    "Margin",
    "MaskSum",
    "Mean",
    "MeanEmbedding",
    "MethodError",
    "ModelError",
    "Norm",
    "Polar",
    "Probability",
    "Problem",
    "PullbackAscent",
    "RandomAttribution",
    "RelP",
    "Relevance",
    "SeasonalTrend",
    "SemanticPullback",
    "Shared",
    "Similarity",
    "Site",
    "SiteError",
    "SmoothGrad",
    "TargetError",
    "TaskError",
    "TokenAt",
    "TokenEmbedding",
    "Uniform",
    "VarGrad",
    "Wavelet",
    "Zeros",
    "__version__",
    "as_captum",
    "checkpointed",
    "compare",
    "explain",
    "explain_dataset",
    "explain_generation",
    "explain_targets",
    "load",
    "pose",
    "sites",
]
