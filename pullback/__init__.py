"""pullback: gradient attribution for any PyTorch model.

>>> import torch
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 3))
>>> explain(net, torch.ones(1, 4), target=1).values.shape
torch.Size([1, 4])
"""

from .api import compare, explain, explain_generation, explain_targets
from .attribution import (
    METHODS,
    Blur,
    Captum,
    Constant,
    Dataset,
    EdgeDetector,
    ExpectedGradients,
    Given,
    GradCAM,
    Gradient,
    InDomain,
    InputXGradient,
    IntegratedGradients,
    LayerCAM,
    Mean,
    MeanEmbedding,
    RandomAttribution,
    SmoothGrad,
    TokenEmbedding,
    Uniform,
    VarGrad,
    Zeros,
    as_captum,
)
from .core.errors import (
    CoverageError,
    FormatError,
    InputError,
    MethodError,
    ModelError,
    SiteError,
    TargetError,
)
from .core.inputs import Shared
from .core.pose import pose
from .core.problem import Domain, Problem
from .core.sites import Site, sites
from .result import Attribution, load
from .version import __version__
