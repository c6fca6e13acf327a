"""What a removed part of the input becomes: a fixed baseline, or what its neighbours say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from pullback.attribution.baselines import Baseline, Given, baseline_point
from pullback.attribution.spelling import parse_baseline
from pullback.core import noise
from pullback.core.errors import InputError, MethodError
from pullback.core.points import Point, map_leaves, widest
from pullback.core.problem import Problem

__all__ = ["Mask", "NoisyLinear", "filling", "parsed_mask"]

Mask: TypeAlias = "str | Tensor | float | Baseline | NoisyLinear | None"

_TOLERANCE = 1e-8


@dataclass(frozen=True)
class NoisyLinear:
    """Noisy linear imputation: each removed pixel is the weighted mean of its neighbours, plus a little noise.

    u_i = Σ_j w_ij u_j / Σ_j w_ij over the up to 8 neighbours j in the image, w = 1/6 beside and 1/12 across, solved
    for all removed pixels together; then + N(0, noise²). Each channel is solved by itself. Where a whole channel is
    removed, nothing is left to say what it was: it becomes its own mean.

    Args:
        noise: standard deviation of what is added, in units of the input.
        seed: names the noise, which the rows of a batch and all levels share.

    Source: Y. Rong et al., A Consistent and Efficient Evaluation Strategy for Attribution Methods (ROAD), ICML 2022.

    >>> removed = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    >>> removed[..., 1, 1] = True
    >>> NoisyLinear(noise=0.0).fill(torch.ones(1, 1, 3, 3), removed)[0, 0, 1]
    tensor([1., 1., 1.])
    """

    noise: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.noise >= 0:
            raise InputError(f"noise={self.noise} was given. Expected a standard deviation, 0 or more.")

    def fill(self, x: Tensor, removed: Tensor) -> Tensor:
        """x (B, C, T) or (B, C, H, W) with the True elements of ``removed`` (same shape) imputed."""
        if x.ndim not in (3, 4):
            raise InputError(
                f'"noisy_linear" was given for values of shape {tuple(x.shape)}. Expected images (B, C, H, W) or '
                'series (B, C, T), which have neighbours; use mask="mean" or mask="zeros".'
            )
        size = (-1, 1, *x.shape[-2:]) if x.ndim == 4 else (-1, 1, 1, x.shape[-1])
        planes, gone = widest(x.detach()).reshape(size), removed.reshape(size)
        filled = _solved(planes, gone).to(x.dtype).reshape(x.shape)
        added = self.noise * noise.normal(x.shape[1:], self.seed, 0, "noisy_linear").to(x)
        return torch.where(removed, filled + added, x)


def parsed_mask(mask: Mask) -> Baseline | NoisyLinear | None:
    """A mask from its name, a tensor or an object; None stays None. Raises InputError or MethodError."""
    if isinstance(mask, str):
        if mask.strip().lower() == "noisy_linear":
            return NoisyLinear()
        try:
            return parse_baseline(mask)  # type: ignore[no-any-return]
        except MethodError as error:
            raise MethodError(f'{error} Or "noisy_linear".') from None
    if isinstance(mask, (Tensor, int, float)):
        return Given(torch.as_tensor(mask))
    if mask is None or isinstance(mask, NoisyLinear) or (callable(mask) and not isinstance(mask, type)):
        return mask
    raise InputError(
        f'A mask of type {type(mask).__name__} was given. Expected "zeros", "mean", "blur", "noisy_linear", a tensor, '
        "or a baseline object such as Blur(5.0)."
    )


def filling(mask: Baseline | NoisyLinear, problem: Problem) -> Callable[[Point], Point]:
    """What gives the point with the removed elements, True in its argument, replaced."""
    if isinstance(mask, NoisyLinear):
        return lambda removed: map_leaves(mask.fill, problem.point, removed)
    reference = baseline_point(mask, problem)
    return lambda removed: map_leaves(torch.where, removed, reference, problem.point)


def _neighbour_sum(planes: Tensor) -> Tensor:
    """Σ_j w_ij u_j: (1, 2, 1) along rows and columns is 4 at the centre, 2 beside and 1 across; less the centre."""
    padded = F.pad(planes, (1, 1, 1, 1))
    rows = padded[..., :-2] + padded[..., 2:] + 2 * padded[..., 1:-1]
    return (rows[..., :-2, :] + rows[..., 2:, :] + 2 * rows[..., 1:-1, :] - 4 * planes) / 12


def _solved(planes: Tensor, gone: Tensor) -> Tensor:
    """Planes (N, 1, H, W) with each removed pixel the weighted mean of its neighbours.

    Multiplied by the sum of its weights, each equation is a row of a symmetric positive definite system, which
    conjugate gradients with the diagonal as preconditioner solve for all planes together. A plane that is done stands
    still, so that its result does not depend on batch mates.
    """
    total = _neighbour_sum(torch.ones_like(planes[:1]))
    known = torch.where(gone, 0.0, planes)
    mean = planes.mean((1, 2, 3), keepdim=True)
    empty = gone.flatten(1).all(1).reshape(-1, 1, 1, 1)
    free = gone & ~empty & (total > 0)
    u = torch.where(gone, mean, 0.0)

    def applied(v: Tensor) -> Tensor:
        return torch.where(free, total * v - _neighbour_sum(v), 0.0)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((1, 2, 3), keepdim=True)

    residual = torch.where(free, _neighbour_sum(known) - applied(u), 0.0)
    preconditioned = residual / total.clamp_min(1e-12)
    direction = preconditioned
    power = dot(residual, preconditioned)
    accuracy = _TOLERANCE if planes.dtype == torch.float64 else 1e-5
    goal = accuracy**2 * dot(planes, planes).clamp_min(1e-30)
    for _ in range(planes[0].numel()):
        active = power > goal
        if not bool(active.any()):
            break
        image = applied(direction)
        step = torch.where(active, power / dot(direction, image).clamp_min(1e-300), 0.0)
        u = u + step * direction
        residual = residual - step * image
        preconditioned = residual / total.clamp_min(1e-12)
        after = torch.where(active, dot(residual, preconditioned), power)
        direction = torch.where(
            active, preconditioned + after / power.clamp_min(1e-300) * direction, direction
        )
        power = after
    return torch.where(gone, u, planes)
