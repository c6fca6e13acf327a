"""The adversary of adversarial training: projected gradient ascent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.errors import MethodError

__all__ = ["PGD", "Bounds"]

Bounds: TypeAlias = tuple[float, float] | None


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent of the cross-entropy within a ball of ``radius`` around each example.

    ``norm``: "l2" (steps along the unit gradient) or "linf" (along its sign). ``step_size`` defaults to
    2.5 · radius / steps. Source: A. Madry et al., ICLR 2018.

    >>> x, y = torch.full((3, 2), 0.5), torch.tensor([0, 1, 0])
    >>> (PGD("linf", radius=0.1).perturb(nn.Linear(2, 2), x, y) - x).abs().amax() <= 0.1 + 1e-6
    tensor(True)
    """

    norm: Literal["l2", "linf"]
    radius: float
    steps: int = 7
    step_size: float | None = None

    def __post_init__(self) -> None:
        if self.norm not in ("l2", "linf"):
            raise MethodError(f'norm={self.norm!r} was given. Expected "l2" or "linf".')
        if self.radius < 0 or self.steps < 1:
            raise MethodError(
                f"radius={self.radius}, steps={self.steps} was given. Expected a radius of at least 0 and 1 "
                "or more steps."
            )

    def perturb(
        self,
        model: nn.Module | Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        bounds: Bounds = (0.0, 1.0),
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """The perturbed batch, detached, within ``radius`` of ``x`` (n, ...) and within ``bounds`` (or None).

        Starts at ``x``, or, given a ``generator``, at a random point of the ball; several generators each draw for
        an equal part of the batch. The model stays in its mode and its parameters get no gradient.
        """

        def gradient(point: Tensor) -> Tensor:
            point = point.detach().requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(model(point), y, reduction="sum")
            return torch.autograd.grad(loss, point)[0]

        return self.ascend(gradient, x, bounds, generator)

    def ascend(
        self,
        gradient: Callable[[Tensor], Tensor],
        x: Tensor,
        bounds: Bounds = (0.0, 1.0),
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """``perturb`` for a loss whose gradient at a batch of points is known."""
        step = 2.5 * self.radius / self.steps if self.step_size is None else self.step_size
        x = x.detach().contiguous()
        delta = torch.zeros_like(x) if generator is None else self._start(x, generator)
        point = _move(x, delta, bounds, torch.empty_like(x))
        for _ in range(self.steps):
            found = gradient(point).flatten(1)
            # in place: with many members these passes over memory take longer than the gradient
            if self.norm == "l2":
                delta.flatten(1).addcmul_(found, step / found.norm(dim=1, keepdim=True).clamp_min_(1e-12))
                length = delta.flatten(1).norm(dim=1, keepdim=True)
                delta.flatten(1).mul_((self.radius / length.clamp_min_(1e-12)).clamp_max_(1.0))
            else:
                delta.flatten(1).add_(found.sign(), alpha=step)
                delta.clamp_(-self.radius, self.radius)
            point = _move(x, delta, bounds, point)
        return point

    def _start(self, x: Tensor, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
        if not isinstance(generator, torch.Generator):
            parts = x.split(len(x) // len(generator))
            return torch.cat([self._start(part, own) for part, own in zip(parts, generator, strict=True)])
        if self.norm == "linf":
            return (2 * torch.rand(x.shape, generator=generator).to(x) - 1) * self.radius
        direction = _unit(torch.randn(x.shape, generator=generator).to(x))
        return direction * _per_row(torch.rand(len(x), generator=generator).to(x), x) * self.radius


def _move(x: Tensor, delta: Tensor, bounds: Bounds, out: Tensor) -> Tensor:
    """x + delta within the bounds, into ``out``; delta becomes what is left of it."""
    torch.add(x, delta, out=out)
    if bounds is not None:
        out.clamp_(*bounds)
        torch.sub(out, x, out=delta)
    return out


def _per_row(scale: Tensor, x: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (x.ndim - 1))


def _unit(x: Tensor) -> Tensor:
    return x / _per_row(x.flatten(1).norm(dim=1).clamp_min(1e-12), x)
