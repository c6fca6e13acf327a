"""Quadrature on the straight path from a baseline to the point: nodes and weights on [0, 1], Σ weights = 1."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..core.errors import MethodError
from ..core.estimator import mean_gradient
from ..core.points import Point, expand_like, map_leaves, take
from ..core.problem import Problem

__all__ = ["QUADRATURES", "gradient_on_path", "nodes_and_weights", "require_count", "straight_line"]

QUADRATURES = ("midpoint", "gausslegendre", "left", "right")


@lru_cache(maxsize=64)
def nodes_and_weights(quadrature: str, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes α and weights of a rule with ``steps`` points, float64. Raises MethodError for an unknown rule.

    >>> nodes_and_weights("midpoint", 2)
    (tensor([0.2500, 0.7500], dtype=torch.float64), tensor([0.5000, 0.5000], dtype=torch.float64))
    """
    count = torch.arange(steps, dtype=torch.float64)
    even = torch.full((steps,), 1.0 / steps, dtype=torch.float64)
    if quadrature == "midpoint":
        return (count + 0.5) / steps, even
    if quadrature == "left":
        return count / steps, even
    if quadrature == "right":
        return (count + 1) / steps, even
    if quadrature == "gausslegendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return torch.from_numpy(0.5 * (nodes + 1)), torch.from_numpy(0.5 * weights)
    raise MethodError(f"quadrature {quadrature!r} is unknown. Choose one of {', '.join(QUADRATURES)}.")


def straight_line(start: Point, stop: Point, alpha: Tensor, index: Tensor) -> Point:
    """Rows start + α (stop - start), row r on the path of example ``index[r]``."""

    def along(first: Tensor, last: Tensor) -> Tensor:
        return first + expand_like(alpha, first).to(last.real.dtype if last.is_complex() else last.dtype) * (
            last - first
        )

    return map_leaves(along, take(start, index), take(stop, index))


def gradient_on_path(problem: Problem, start: Point, alpha: Tensor, weights: Tensor) -> Point:
    """Σ_k w_k ∇f at the nodes α_k of the straight path from start to the point: (B, *S), accumulation dtype."""

    def place(nodes: Tensor, index: Tensor) -> Point:
        return straight_line(start, problem.point, alpha[nodes], index)

    return mean_gradient(problem, weights, place, progress="integrated gradients")


def require_count(name: str, value: object) -> None:
    """Check that a parameter is a whole number, at least 1. Raises MethodError.

    >>> require_count("steps", 8)
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MethodError(f"{name} is a whole number, at least 1; got {value!r}.")
