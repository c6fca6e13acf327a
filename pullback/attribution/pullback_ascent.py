"""Pullback ascent: a few normalised steps along a modified gradient (arXiv 2507.22832)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.errors import MethodError
from ..core.points import Point, expand_like, leaves, map_leaves, total, widest
from ..core.problem import Problem
from .paths import require_count
from .pullbacks import SemanticPullback
from .smoothing import like_point, require_smoothing

__all__ = ["PullbackAscent"]

Method = Callable[[Problem], Point]


@dataclass(frozen=True)
class PullbackAscent:
    """The way a point goes in a few steps along a pullback, each of fixed length: what to add for more of the target.

    ``x_{k+1} = x_k + α p(x_k)/‖p(x_k)‖₂``; the attribution is ``x_K - x_0``. The norm is over a whole example, all
    leaves together. Where the pullback is 0 the point stays. Ascent towards another class, a counterfactual, is
    another ``target``.

    Args:
        method: the direction p; any callable that takes a problem and gives values of the point's shape.
        steps: K.
        step_size: α, L2 norm of a step, in units of the value. The paper's 20 is for images of 224² × 3 in [-1, 1],
            whose norm is at most 388: scale it with yours.
        radius: after each step x is brought back to this L2 distance from x_0; None is no limit.
        clip: (low, high), to which each step's values are clipped, for example (-1.0, 1.0); None is no limit.

    Call:
        problem -> (B, *S), units of the value. ``path_scores`` (B, K + 1) in the diagnostics are the scores on the way.

    Raises:
        MethodError: a parameter is out of range, or the method's result has another shape than the point.

    Cost: ``steps`` times the method, and ``steps`` + 1 forward passes for the scores.

    Source: arXiv 2507.22832 (v1 to v4 figures: ExcitationPullback, radius=100.0, clip=(-1.0, 1.0)).

    Example:
        >>> import torch, pullback as pb
        >>> method = PullbackAscent(pb.Gradient(), steps=2, step_size=1.0)
        >>> round(float(pb.explain(torch.nn.Linear(2, 1), torch.ones(1, 2), method=method).values.norm()), 4)
        2.0
    """

    method: Any = field(default_factory=SemanticPullback)
    steps: int = 5
    step_size: float = 20.0
    radius: float | None = None
    clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        require_smoothing(self.method, 1, 0.0)
        require_count("steps", self.steps)
        require_length("step_size", self.step_size)
        if self.radius is not None:
            require_length("radius", self.radius)
        require_range(self.clip)

    def __call__(self, problem: Problem) -> Point:
        start = map_leaves(widest, problem.point)
        if self.clip is not None and any(leaf.is_complex() for leaf in leaves(start)):
            raise MethodError(f"clip={self.clip} needs real values; the point is complex. Use radius=.")
        z = start
        scores = [problem.score()]
        for _ in range(self.steps):
            z = self._step(problem, z, start)
            scores.append(problem.score(like_point(z, problem)))
        problem.record(path_scores=torch.stack(scores, 1))
        return like_point(map_leaves(torch.sub, z, start), problem)

    def _step(self, problem: Problem, z: Point, start: Point) -> Point:
        moved = problem.at(like_point(z, problem))
        direction: Point = self.method(moved)
        _require_shape(direction, problem, self.method)
        if "coverage" in moved.diagnostics:
            problem.record(coverage=moved.diagnostics["coverage"])
        for text in moved.diagnostics.get("notes", []):
            problem.note(text)
        z = _moved(z, map_leaves(widest, direction), _ratio(self.step_size, direction))
        if self.radius is not None:
            away = map_leaves(torch.sub, z, start)
            z = _moved(start, away, _ratio(self.radius, away).clamp(max=1.0))
        if self.clip is not None:
            low, high = self.clip
            z = map_leaves(lambda leaf: leaf.clamp(low, high), z)
        return z


def _ratio(length: float, point: Point) -> Tensor:
    """What to multiply each example by so that its L2 norm is this length; 0 where it is 0: (B,)."""
    # scaled by the largest entry, so that squares neither overflow nor vanish
    largest = torch.stack(
        [widest(leaf).abs().unsqueeze(1).flatten(1).amax(1).cpu() for leaf in leaves(point)]
    ).amax(0)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    squares = map_leaves(lambda leaf: (widest(leaf) / expand_like(scale, leaf)).abs().square(), point)
    norm = total(squares).cpu().sqrt()
    return torch.where(norm > 0, length / norm.clamp_min(1e-300) / scale, torch.zeros_like(norm))


def _moved(z: Point, direction: Point, ratio: Tensor) -> Point:
    return map_leaves(lambda leaf, way: leaf + expand_like(ratio, leaf).to(leaf.dtype) * way, z, direction)


def _require_shape(direction: Point, problem: Problem, method: Any) -> None:
    same = isinstance(direction, dict) == isinstance(problem.point, dict) and [
        leaf.shape for leaf in leaves(direction)
    ] == [leaf.shape for leaf in leaves(problem.point)]
    if not same:
        given = [tuple(leaf.shape) for leaf in leaves(direction)]
        raise MethodError(
            f"PullbackAscent needs a direction of the point's shape {[tuple(x.shape) for x in leaves(problem.point)]}; "
            f"{method!r} gave {given}. Use a method such as SemanticPullback() or Gradient()."
        )


def require_length(name: str, value: object) -> None:
    """Check that a parameter is a finite number above 0. Raises MethodError."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < float(value) < math.inf:  # type: ignore[arg-type]
        raise MethodError(f"{name} is a finite number above 0, in units of the value; got {value!r}.")


def require_range(clip: object) -> None:
    """Check that a clip is None or two numbers in order. Raises MethodError."""
    if clip is None:
        return
    pair = isinstance(clip, tuple) and len(clip) == 2 and all(isinstance(each, (int, float)) for each in clip)
    if not pair or not clip[0] < clip[1]:  # type: ignore[index]
        raise MethodError(f"clip is (low, high) with low < high, for example (-1.0, 1.0); got {clip!r}.")
