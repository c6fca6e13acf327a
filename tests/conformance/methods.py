"""One small instance of every registered method, and the smooth nets they are tried on.

A new method is tested by being listed in ``pullback.METHODS``; only what its defaults cannot say is said
here.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

import pullback as pb

# small enough for a suite that runs everything on everything
SMALL: dict[str, Any] = {"samples": 4, "steps": 6, "max_steps": 9, "iterations": 3}
# parameters without a usable default
GIVEN: dict[str, dict[str, Any]] = {
    "Captum": {"name": "Saliency"},
    "MambaLRP": {"constant": ()},
    "ExcitationPullback": {"absent": "gradient"},  # the nets here are smooth
    "PullbackAscent": {"step_size": 0.5},
}
# methods that live at a layer; all others are tried at the input
LAYER_ONLY = {"GradCAM": "2", "LayerCAM": "2"}
# methods that only exist at the input (or do not say where they are)
INPUT_ONLY = {"FullGrad"}
# its values are a hash of the content, so another dtype is another draw, and it is no function of the model
MODEL_FREE = {"RandomAttribution"}
# the small instance draws nothing, though the class can
SEED_UNUSED = {"Captum"}


@dataclass(frozen=True)
class Halved:
    """A linear change of variable for methods that need a domain: coefficients are twice the value."""

    def analysis(self, x: Tensor) -> Tensor:
        return 2 * x

    def synthesis(self, coefficients: Tensor) -> Tensor:
        return coefficients / 2


def instance(name: str) -> Any:
    """A method of the class registered under ``name``, with small costs."""
    cls = pb.METHODS[name]
    values = dict(GIVEN.get(name, {}))
    for field in fields(cls):
        if field.name in values or not field.init:
            continue
        if field.name in SMALL:
            values[field.name] = SMALL[field.name]
        elif field.name == "domain" and field.default is MISSING and field.default_factory is MISSING:
            values["domain"] = getattr(pb, "Fourier", Halved)()
        elif field.name == "method" and name == "InDomain":
            values["method"] = pb.IntegratedGradients(steps=6)
    return cls(**values)


INSTANCES: dict[str, Any] = {name: instance(name) for name in pb.METHODS}
NAMES = tuple(INSTANCES)


def site_of(name: str) -> str | None:
    return LAYER_ONLY.get(name)


def smooth_net() -> nn.Sequential:
    """A CNN without kinks, float64, in eval mode: image (B, 2, 6, 6) -> 4 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4),
        )  # fmt: skip
    return net.double().eval()


def images(batch: int = 4, seed: int = 1) -> Tensor:
    """Images with values that bfloat16 holds exactly, so that dtypes see the same input."""
    random = torch.randn(batch, 2, 6, 6, generator=torch.Generator().manual_seed(seed))
    return random.bfloat16().double()


def explain(model: Any, x: Tensor, name: str, **settings: Any) -> pb.Attribution:
    """Explain class 1 with the small instance of a method, where that method lives."""
    settings.setdefault("target", 1)
    settings.setdefault("site", site_of(name))
    return pb.explain(model, x, method=settings.pop("method", INSTANCES[name]), **settings)


def values(attribution: pb.Attribution) -> Tensor:
    """The one tensor of an attribution."""
    found = attribution.values
    assert isinstance(found, Tensor)
    return found


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference as a share of the largest entry."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))
