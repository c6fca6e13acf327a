"""Gradient and input times gradient (Simonyan et al. 2013; Shrikumar et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.points import Point, contract, map_leaves
from ..core.problem import Problem

__all__ = ["Gradient", "InputXGradient"]


@dataclass(frozen=True)
class Gradient:
    """The derivative of the score with respect to the value at the site, signed.

    ``∂f/∂x``. It says where a small change matters, not how much the present value contributes.

    Call:
        problem -> (B, *S), score units per unit of the value.

    Cost: one forward and one backward pass. Deterministic.

    Source: Simonyan et al. 2013, eq. 4, without the absolute value.

    Example:
        >>> import torch, pullback as pb
        >>> pb.explain(torch.nn.Linear(2, 1), torch.ones(1, 2), method=Gradient()).values.shape
        torch.Size([1, 2])
    """

    def __call__(self, problem: Problem) -> Point:
        return problem.grad()


@dataclass(frozen=True)
class InputXGradient:
    """The value times its derivative: a first-order account of each entry's contribution.

    ``x ⊙ ∂f/∂x``; for complex values Re(x · conj(gradient)). Sums to the score where the model is homogeneous of
    degree one around x, for example a ReLU net without biases.

    Call:
        problem -> (B, *S), score units.

    Cost: one forward and one backward pass. Deterministic.

    Source: Shrikumar et al. 2016, section 2.

    Example:
        >>> import torch, pullback as pb
        >>> pb.explain(torch.nn.Linear(2, 1), torch.ones(1, 2), method="inputxgradient").values.shape
        torch.Size([1, 2])
    """

    def __call__(self, problem: Problem) -> Point:
        return map_leaves(contract, problem.grad(), problem.point)
