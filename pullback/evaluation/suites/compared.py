"""What the suites compare: methods and controls by readable names, and what kind of number each gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pullback.attribution.cam import GradCAM
from pullback.attribution.controls import EdgeDetector, RandomAttribution
from pullback.attribution.gradient import Gradient
from pullback.attribution.spelling import parse_method, with_settings
from pullback.core.errors import MethodError, nearest
from pullback.core.pose import pose
from pullback.core.problem import Problem

__all__ = [
    "CONTROLS",
    "METHODS",
    "Blurred",
    "Intensity",
    "Kind",
    "OfModel",
    "TimesInput",
    "Upsampled",
    "made",
]

# Contributions are in units of the score and are ranked by their sign; rates, per unit of the input, by their size.
Kind = Literal["contribution", "rate"]

METHODS: Mapping[str, tuple[str, Kind]] = {
    "gradient": ("gradient", "rate"),
    "SmoothGrad": ("smoothgrad(samples=16)", "rate"),
    "input × gradient": ("input_x_gradient", "contribution"),
    "integrated gradients": ("integrated_gradients(steps=16)", "contribution"),
    "FullGrad": ("fullgrad", "contribution"),
    "RelP": ("relp", "contribution"),
    "LRP": ("lrp", "contribution"),
    "excitation pullback": ("excitation_pullback", "rate"),
    "semantic pullback": ("semantic_pullback", "rate"),
    "GradCAM": ("gradcam", "contribution"),
    "DeepLift (captum)": ("captum('DeepLift')", "contribution"),
    "GuidedBackprop (captum)": ("captum('GuidedBackprop')", "rate"),
}

CONTROLS: Mapping[str, Kind] = {
    "random": "rate",
    "random × input": "contribution",
    "input intensity": "contribution",
    "edges": "rate",
    "blurred gradient": "rate",
    "untrained gradient": "rate",
}

# Of the controls, those that do know the model: they test the metric, and nobody has to beat them.
VARIANTS = ("blurred gradient",)


@dataclass(frozen=True)
class TimesInput:
    """A method's values times the value at the site: zero on black pixels, as all such methods are."""

    method: Any

    def __call__(self, problem: Problem) -> Tensor:
        return _tensor(self.method(problem), self) * _tensor(problem.point, self)


@dataclass(frozen=True)
class Intensity:
    """The size of the input itself, |x|: a map without any model."""

    def __call__(self, problem: Problem) -> Tensor:
        return _tensor(problem.point, self).detach().abs()


@dataclass(frozen=True)
class Blurred:
    """A method's |values| under a Gaussian blur of ``sigma`` pixels.

    Smoothing that knows nothing of the model often improves scores of removal, which says that they are no proof.
    Source: arXiv 2304.13836.
    """

    method: Any
    sigma: float = 1.5

    def __call__(self, problem: Problem) -> Tensor:
        from scipy.ndimage import gaussian_filter

        values = _tensor(self.method(problem), self)
        if values.ndim < 3:
            raise MethodError(
                f"Blurred needs an image (B, C, H, W) or a series; the site is {tuple(values.shape)}."
            )
        width = (0.0, 0.0, *[self.sigma] * (values.ndim - 2))
        blurred = gaussian_filter(values.detach().abs().double().cpu().numpy(), width)
        return torch.as_tensor(blurred).to(values)


@dataclass(frozen=True, eq=False)
class OfModel:
    """A method's values of another model, at the same inputs and classes: an untrained copy, for example."""

    method: Any
    model: nn.Module

    def __call__(self, problem: Problem) -> Tensor:
        point = _tensor(problem.point, self).detach()
        return _tensor(self.method(pose(self.model, point, target=_classes(problem))), self)


@dataclass(frozen=True)
class Upsampled:
    """A method at the model's last convolution, bilinearly enlarged to the size of the input: (B, 1, H, W)."""

    method: Any = field(default_factory=GradCAM)

    def __call__(self, problem: Problem) -> Tensor:
        point = _tensor(problem.point, self).detach()
        module = problem.posed.module
        layers = (
            [name for name, part in module.named_modules() if isinstance(part, nn.Conv2d)]
            if isinstance(module, nn.Module)
            else []
        )
        if not layers or point.ndim != 4:
            raise MethodError(
                f"{self.method!r} needs a convolution and images (B, C, H, W); this model has none."
            )
        there = pose(module, point, target=_classes(problem), site=layers[-1])
        values = _tensor(self.method(there), self)
        return F.interpolate(values, size=point.shape[2:], mode="bilinear", align_corners=False)


def made(
    name: str, model: nn.Module, untrained: Callable[[], nn.Module], seed: int
) -> tuple[Any, Kind, bool]:
    """The method of a name, what kind of numbers it gives, and whether it is a control.

    Args:
        name: of ``METHODS`` or ``CONTROLS``, or a method's text, taken as a contribution.
        untrained: makes the model anew, for the control.
        seed: replaces that of methods that draw.

    Raises MethodError for an unknown name.
    """
    if name in CONTROLS:
        controls: dict[str, Callable[[], Any]] = {
            "random": lambda: RandomAttribution(seed),
            "random × input": lambda: TimesInput(RandomAttribution(seed)),
            "input intensity": Intensity,
            "edges": EdgeDetector,
            "blurred gradient": lambda: Blurred(Gradient()),
            "untrained gradient": lambda: OfModel(Gradient(), untrained()),
        }
        return controls[name](), CONTROLS[name], True
    text, kind = METHODS.get(name, (name, "contribution"))
    try:
        method = parse_method(text)
    except MethodError as error:
        if "(" in name:
            raise
        raise MethodError(
            f"The method {name!r} was given. Expected a method's text, or one of {list(METHODS)}; nearest: "
            f"{nearest(name, METHODS)}."
        ) from error
    if isinstance(method, GradCAM):
        return Upsampled(method), kind, False
    try:
        return with_settings(method, seed=seed), kind, False
    except MethodError:  # it draws nothing
        return method, kind, False


def _classes(problem: Problem) -> Tensor:
    index = problem.posed.targets[0].index
    if index is None:
        raise MethodError("A class index is needed here; the target is a score of its own.")
    return index.to(problem.examples.device)[problem.examples]


def _tensor(values: Any, method: object) -> Tensor:
    if not isinstance(values, Tensor):
        raise MethodError(f"{method!r} needs one input tensor; there are several.")
    return values
