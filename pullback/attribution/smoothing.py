"""SmoothGrad and VarGrad of any method: averages over noisy points (Smilkov et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.errors import MethodError
from ..core.estimator import Moments, stream
from ..core.points import Point, leaves, map_leaves
from ..core.problem import Problem
from .baselines import Baseline, memo_text
from .gradient import Gradient
from .noisy_points import NoisyPoints, require_noise
from .paths import require_count

__all__ = ["SmoothGrad", "VarGrad", "as_points", "like_point", "standard_error"]

Method = Callable[[Problem], Point]


@dataclass(frozen=True)
class SmoothGrad:
    """The average of a method over noisy copies of the point.

    ``(1/n) Σ m(x + ε_i)``, ε_i ~ N(0, σ²), σ = noise · (max x - min x) of each example. With ``Gradient`` it estimates
    the gradient of the score convolved with the noise, so kinks and ripples smaller than σ disappear.

    Args:
        method: what to average; any callable that takes a problem.
        samples: number of noisy copies. The standard error of the mean falls as 1/√samples; it is in the diagnostics.
        noise: standard deviation as a fraction of each example's range at the site (dimensionless).
        seed: names the draws. Rows of a batch share them; batch mates, order, chunk and device never change them.
        moment: "mean", "square" (mean of squares, SmoothGrad-squared) or "variance" (population variance, VarGrad).
        antithetic: draw noise in pairs ±ε, which cancels all odd-order error (even ``samples``).
        independent: give each example of a batch its own draws, by its position.

    Call:
        problem -> (B, *S), in the method's units ("square", "variance": squared).

    Cost: ``samples`` times the method.

    Source: Smilkov et al. 2017, eq. 1; the square and variance forms: Hooker et al. 2019, Adebayo et al. 2018.

    Example:
        >>> import torch, pullback as pb
        >>> pb.explain(torch.nn.Linear(2, 1), torch.ones(1, 2), method=SmoothGrad(samples=4)).values.shape
        torch.Size([1, 2])
    """

    method: Any = field(default_factory=Gradient)
    samples: int = 50
    noise: float = 0.15
    seed: int = 0
    moment: str = "mean"
    antithetic: bool = False
    independent: bool = False

    def __post_init__(self) -> None:
        require_smoothing(self.method, self.samples, self.noise)
        if self.moment not in ("mean", "square", "variance"):
            raise MethodError(f'moment is "mean", "square" or "variance", got {self.moment!r}.')
        if self.antithetic and self.samples % 2:
            raise MethodError(f"antithetic noise comes in pairs: samples must be even, got {self.samples}.")

    def __call__(self, problem: Problem) -> Point:
        mean, variance = noisy_moments(problem, self)
        if self.moment == "mean":
            return mean
        if self.moment == "variance":
            return variance
        return map_leaves(lambda m, v: m.abs().square() + v, mean, variance)


@dataclass(frozen=True)
class VarGrad:
    """The variance of a method over noisy copies of the point: SmoothGrad with ``moment="variance"``.

    Large where the explanation itself is unstable. Never negative.

    Args: as SmoothGrad.

    Source: Adebayo et al. 2018; population variance (1/n).

    Example:
        >>> import torch, pullback as pb
        >>> float(pb.explain(torch.nn.Linear(2, 1), torch.ones(1, 2), method=VarGrad(samples=4)).values.abs().max())
        0.0
    """

    method: Any = field(default_factory=Gradient)
    samples: int = 50
    noise: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        require_smoothing(self.method, self.samples, self.noise)

    def __call__(self, problem: Problem) -> Point:
        return SmoothGrad(self.method, self.samples, self.noise, self.seed, "variance")(problem)


def noisy_moments(problem: Problem, smooth: SmoothGrad) -> tuple[Point, Point]:
    """Mean and population variance of a method over noisy points, from one sweep that methods may share."""
    sweep = (smooth.method, smooth.samples, smooth.noise, smooth.seed, smooth.antithetic, smooth.independent)
    facts: dict[str, Any]
    mean, variance, facts = problem.shared(
        ("noise", memo_text(sweep)), lambda: _noisy_moments(problem, smooth)
    )
    for text in facts["notes"]:
        problem.note(text)
    if "coverage" in facts:
        problem.record(coverage=facts["coverage"])
    if smooth.moment == "mean":
        problem.record(standard_error=standard_error(variance, smooth.samples))
    return mean, variance


def _noisy_moments(problem: Problem, smooth: SmoothGrad) -> tuple[Point, Point, dict[str, Any]]:
    facts: dict[str, Any] = {"notes": []}
    place = NoisyPoints(
        problem,
        smooth.noise,
        smooth.seed,
        antithetic=smooth.antithetic,
        independent=smooth.independent,
        stream=str(nesting(smooth.method)),
    )
    if place.constant:
        facts["notes"].append(
            "an example is constant at the site: its noise is zero, so its result is the plain method"
        )

    evaluate = None
    if not isinstance(smooth.method, Gradient):

        def evaluate(z: Point, nodes: Tensor, index: Tensor) -> Point:
            moved = problem.rows(index, z)
            result: Point = smooth.method(moved)
            found = moved.diagnostics
            facts.update({name: found[name] for name in ("coverage",) if name in found})
            if found.get("converged") is not None and not found["converged"].all():
                unreached = f"{smooth.method!r} did not reach its tolerance at some of the noisy points"
                facts["notes"] = [*(text for text in facts["notes"] if text != unreached), unreached]
            return result

    moments = stream(problem, torch.ones(smooth.samples), place, evaluate, second=True, progress="smoothgrad")
    mean, variance = as_points(moments)
    return like_point(mean, problem), like_point(variance, problem, real=True), facts


def nesting(method: Any) -> int:
    """How many smoothings are nested inside a method, so that nested draws differ."""
    inner = getattr(method, "method", None)
    return 0 if inner is None else nesting(inner) + isinstance(method, (SmoothGrad, VarGrad))


def standard_error(variance: Point, samples: int) -> Point:
    """Monte-Carlo standard error of a mean per entry, from the population variance of its draws."""
    return map_leaves(lambda v: (v / max(1, samples - 1)).sqrt(), variance)


def as_points(moments: Any) -> tuple[Point, Point]:
    """Means and variances of one Moments or a dict of them."""
    if isinstance(moments, Moments):
        return moments.mean, moments.variance()
    return {n: m.mean for n, m in moments.items()}, {n: m.variance() for n, m in moments.items()}


def like_point(values: Point, problem: Problem, real: bool = False) -> Point:
    """Accumulated values back in the dtype of the point (its real part for real results)."""
    point = problem.point

    def cast(leaf: Tensor, like: Tensor) -> Tensor:
        return leaf.to(like.dtype if leaf.is_complex() and not real else like.real.dtype)

    if isinstance(values, dict) and isinstance(point, dict) and values.keys() == point.keys():
        # the leaves of one point may differ in dtype
        return {name: cast(leaf, point[name]) for name, leaf in values.items()}
    return map_leaves(lambda leaf: cast(leaf, leaves(point)[0]), values)


def require_smoothing(method: Any, samples: int, noise: float) -> None:
    """Check the parameters that SmoothGrad and VarGrad share. Raises MethodError."""
    if not callable(method):
        raise MethodError(f"method is a method object such as Gradient(), got {method!r}.")
    if isinstance(method, type):
        raise MethodError(f"method is a class; give an object: {method.__name__}().")
    if type(method).__module__ == Baseline.__module__:
        raise MethodError(
            f"{method!r} is a baseline, not a method; write for example SmoothGrad(Gradient())."
        )
    require_count("samples", samples)
    require_noise(noise)
