"""Class activation maps at a convolutional site: GradCAM and LayerCAM."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..core.errors import MethodError
from ..core.points import Point
from ..core.problem import Problem

__all__ = ["GradCAM", "LayerCAM"]


@dataclass(frozen=True)
class GradCAM:
    """Channels of a layer, weighted by their mean gradient, summed and rectified.

    ``relu(Σ_c mean_space(∂f/∂A_c) A_c)``. Needs a layer site, for example ``site="layer4"``.

    Args:
        rectify: keep only what speaks for the target (the paper); False keeps the sign.
        channel_dim: which dimension holds channels: 1 for (B, C, ...), -1 for tokens (B, T, D).

    Call:
        problem -> (B, 1, ...), the layer's resolution; ``Attribution.upsample(size)`` brings it to the image's.

    Raises:
        MethodError: the site is the input, or has no dimension beside channels.

    Cost: one forward and one backward pass. Deterministic.

    Source: Selvaraju et al. 2017, eq. 1 and 2.

    Example:
        >>> import torch, pullback as pb
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> pb.explain(net, torch.ones(1, 1, 4, 4), site="0", method=GradCAM()).values.shape
        torch.Size([1, 1, 2, 2])
    """

    rectify: bool = True
    channel_dim: int = 1

    def __call__(self, problem: Problem) -> Point:
        activation, gradient = layer(problem, "GradCAM")
        channel = self.channel_dim % activation.dim()
        space = [dim for dim in range(1, activation.dim()) if dim != channel]
        weight = gradient.mean(space, keepdim=True)
        free = problem.free if channel != 1 else None
        if free is not None:
            # padding is no place: it counts neither in the mean nor in the map
            real = free.to(activation.device).reshape(*free.shape, *[1] * (activation.dim() - 2))
            weight = weight * free.shape[1] / real.sum(1, keepdim=True)
            activation = activation * real
        cam = (weight * activation).sum(channel, keepdim=True)
        return cam.relu() if self.rectify else cam


@dataclass(frozen=True)
class LayerCAM:
    """Activations of a layer times their own positive gradients, summed over channels and rectified.

    ``relu(Σ_c relu(∂f/∂A_c) A_c)``: sharper than GradCAM at early layers, since each place has its own weight.

    Args: as GradCAM.

    Source: Jiang et al. 2021, eq. 4 to 6.

    Example:
        >>> import torch, pullback as pb
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> pb.explain(net, torch.ones(1, 1, 4, 4), site="0", method=LayerCAM()).values.shape
        torch.Size([1, 1, 2, 2])
    """

    rectify: bool = True
    channel_dim: int = 1

    def __call__(self, problem: Problem) -> Point:
        activation, gradient = layer(problem, "LayerCAM")
        cam = (gradient.relu() * activation).sum(self.channel_dim, keepdim=True)
        return cam.relu() if self.rectify else cam


def layer(problem: Problem, name: str) -> tuple[Tensor, Tensor]:
    """Activation and gradient at a layer site. Raises MethodError at the input, naming a convolution to use."""
    point = problem.point
    if (
        not isinstance(point, Tensor)
        or problem.posed.site.kind == "input"
        or point.dim() < 3
        or problem.domains
    ):
        shape = tuple(point.shape) if isinstance(point, Tensor) else "several inputs"
        raise MethodError(
            f"{name} needs a layer's activations (B, C, ...), but the site {problem.site!r} is {shape}. "
            f"{suggested_site(problem.posed.module)}"
        )
    gradient = problem.grad()
    assert isinstance(gradient, Tensor)
    return point, gradient


def suggested_site(model: object) -> str:
    """Which site to type: the last convolution."""
    names = (
        [path for path, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)]
        if isinstance(model, nn.Module)
        else []
    )
    return (
        f'Try site="{names[-1]}".'
        if names
        else "Choose a layer with spatial dimensions (pullback.sites lists them)."
    )
