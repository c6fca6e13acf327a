"""Expected gradients: integrated gradients averaged over a distribution of baselines (Erion et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core import noise as draws
from ..core.estimator import stream
from ..core.points import Point, contract, map_leaves, take
from ..core.problem import Problem
from .baselines import Baseline, Uniform, baseline_point
from .paths import require_count, straight_line
from .smoothing import as_points, like_point, standard_error

__all__ = ["ExpectedGradients"]


@dataclass(frozen=True)
class ExpectedGradients:
    """Integrated gradients averaged over many baselines, one random point of one random path at a time.

    ``E[(x - x') ⊙ ∇f(x' + α (x - x'))]``, x' from the baseline distribution, α uniform on [0, 1]. In expectation it
    sums to f(x) - E f(x'); the standard error of the estimate is in the diagnostics.

    Args:
        baseline: a random baseline: ``Uniform()`` or ``Dataset(values)``.
        samples: number of draws.
        seed: names the draws of α; the baseline has its own.

    Call:
        problem -> (B, *S), score units.

    Cost: ``samples`` forward and backward passes.

    Source: Erion et al. 2021, eq. 4.

    Example:
        >>> import torch, pullback as pb
        >>> pb.explain(torch.nn.Linear(2, 1), torch.ones(1, 2), method=ExpectedGradients(samples=4)).values.shape
        torch.Size([1, 2])
    """

    baseline: Baseline = field(default_factory=Uniform)
    samples: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        require_count("samples", self.samples)

    def __call__(self, problem: Problem) -> Point:
        alphas = torch.cat(
            [draws.uniform((1,), self.seed, draw, "path") for draw in range(self.samples)]
        ).double()

        def start(nodes: Tensor, index: Tensor) -> Point:
            found = {int(node): baseline_point(self.baseline, problem, int(node)) for node in nodes.unique()}
            rows = [take(found[int(node)], each[None]) for node, each in zip(nodes, index, strict=True)]
            return map_leaves(lambda *parts: torch.cat(parts), *rows)

        held: dict[str, Point] = {}

        def place(nodes: Tensor, index: Tensor) -> Point:
            held["start"] = start(nodes, index)
            rows = torch.arange(len(index))
            return straight_line(held["start"], take(problem.point, index), alphas[nodes], rows)

        def evaluate(z: Point, nodes: Tensor, index: Tensor) -> Point:
            delta = map_leaves(lambda p, s: p - s, take(problem.point, index), held["start"])
            return map_leaves(contract, problem.grad_rows(z, index), delta)

        moments = stream(
            problem, torch.ones(self.samples), place, evaluate, second=True, progress="expected gradients"
        )
        mean, variance = as_points(moments)
        problem.record(standard_error=standard_error(variance, self.samples))
        return like_point(mean, problem)
