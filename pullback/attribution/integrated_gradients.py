"""Integrated gradients (Sundararajan et al. 2017), at a fixed number of steps or to a tolerance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import MethodError
from ..core.points import Point, contract, map_leaves, total, widest
from ..core.problem import Problem
from ..core.smoothness import has_smooth_score
from .baselines import baseline_point, memo_text
from .paths import QUADRATURES, gradient_on_path, nodes_and_weights, require_count
from .refinement import MIDPOINT, TRAPEZOID, Levels, refine
from .site_path import site_path

__all__ = ["IntegratedGradients", "change_of_score", "path_gradient"]


@dataclass(frozen=True)
class IntegratedGradients:
    """The gradient averaged along the straight path from a baseline, times the difference.

    ``IG = (x - x') ⊙ ∫₀¹ ∇f(x' + α (x - x')) dα``; it sums to f(x) - f(x') (completeness). The completeness gap is in
    the diagnostics: a good alarm, not a measure of the map's error.

    Args:
        steps: points on the path. The error falls as 1/steps² for smooth models, 1/steps for ReLU nets. Ignored when
            ``tol`` is given.
        quadrature: "midpoint", "gausslegendre", "left" or "right".
        baseline: where the path starts; None is zeros, or at token embeddings the mask token, else the mean embedding.
        tol: relative error of the map to reach, per example; evaluations grow until the estimated error and the
            completeness gap are within it, or ``max_steps`` is reached. ``converged`` and ``error`` (the estimate) are
            in the diagnostics. The trapezoidal rule, its intervals doubling, where every operation is smooth; the
            midpoint rule, tripling, where one has a kink or cannot be looked into.
        max_steps: the most points on the path with ``tol``.

    Call:
        problem -> (B, *S), score units.

    Raises:
        MethodError: a parameter is out of range.

    Cost: ``steps`` forward and backward passes, in chunks, and two forwards for the gap; with ``tol`` one more forward
    of one row, whose graph says which rule. Deterministic.

    Source: Sundararajan et al. 2017, eq. 1. No difference; the quadrature's weights sum to one.

    Example:
        >>> import torch, pullback as pb
        >>> pb.explain(torch.nn.Linear(2, 1), torch.ones(1, 2), method=IntegratedGradients(steps=8)).values.shape
        torch.Size([1, 2])
    """

    steps: int = 64
    quadrature: str = "midpoint"
    baseline: Any = None
    tol: float | None = None
    max_steps: int = 729

    def __post_init__(self) -> None:
        require_count("steps", self.steps)
        require_count("max_steps", self.max_steps)
        if self.quadrature not in QUADRATURES:
            raise MethodError(
                f"quadrature {self.quadrature!r} is unknown. Choose one of {', '.join(QUADRATURES)}."
            )
        if self.tol is not None and self.max_steps < 3:
            raise MethodError(
                f"max_steps is at least 3, the first level of refinement; got {self.max_steps!r}."
            )
        if self.tol is not None and not (isinstance(self.tol, float) and 0 < self.tol < 1):
            raise MethodError(f"tol is a relative error between 0 and 1, got {self.tol!r}.")

    def __call__(self, problem: Problem) -> Point:
        start = baseline_point(self.baseline, problem)
        delta = map_leaves(torch.sub, problem.point, start)
        change = change_of_score(problem, start)
        if self.tol is None:
            weighted = path_gradient(problem, start, self.quadrature, self.steps, self.baseline)
            values = map_leaves(lambda g, d: contract(g, widest(d)), weighted, delta)
        else:
            path = site_path(problem, start, self.baseline)
            rule = TRAPEZOID if has_smooth_score(path.problem) else MIDPOINT
            levels = Levels(path, rule, memo_text(self.baseline))
            values = refine(problem, levels, delta, change, self.tol, self.max_steps)
        problem.record(gap=total(values) - change)
        return map_leaves(lambda value, leaf: value.to(leaf.real.dtype), values, problem.point)


def path_gradient(problem: Problem, start: Point, quadrature: str, steps: int, baseline: Any) -> Point:
    """Σ_k w_k ∇f on the path: (B, *S) in the accumulation dtype; shared between methods that walk the same path."""
    path = site_path(problem, start, baseline)
    weighted = path.problem.shared(
        ("path", quadrature, steps, memo_text(baseline)),
        lambda: gradient_on_path(path.problem, path.start, *nodes_and_weights(quadrature, steps)),
    )
    return path.pulled_back(weighted)


def change_of_score(problem: Problem, start: Point) -> Tensor:
    """f(x) - f(x'), (B,), in the accumulation dtype, on the point's device. Cost: one forward at the baseline."""
    # a dispatched model may give its output elsewhere than the site's value is
    return (problem.score() - problem.score(start)).to(problem.device)
