"""Path integrals to a tolerance: nested rules that reuse every node, and a stop for each example by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.points import Point, contract, leaves, map_leaves, take, total, widest
from ..core.problem import Problem
from .paths import gradient_on_path
from .site_path import SitePath

__all__ = ["MIDPOINT", "TRAPEZOID", "Levels", "NestedRule", "refine"]

# Measured in benchmarks/convergence.py on nets with kinks: where tripling shrinks the change to less than this, the
# error falls as 1/n² or faster and the next change predicts it; elsewhere it falls as 1/n, and the error of a level
# is 0.4 of its change on average.
SMOOTH_RATIO = 0.18
KINKED_SHARE = 0.4
SINGULAR = 100  # times the mean of the path: a gradient at an end that says nothing about the path
SLOWEST = 0.75  # a change that shrinks less than this says nothing about where the changes go


@dataclass(frozen=True)
class NestedRule:
    """Levels of equal intervals, each of which keeps the nodes of the level before.

    Attributes:
        first: intervals of the first level.
        growth: how many times as many the next level has.
        ends: whether both ends of the path are nodes too, with half the weight.
        new_nodes: intervals -> the nodes inside the path that a level adds.
        estimate: (last change, change before or None) -> the error of the level, per example.
    """

    first: int
    growth: int
    ends: bool
    new_nodes: Callable[[int], Tensor]
    estimate: Callable[[Tensor, Tensor | None], Tensor]


class Levels:
    """Gradients summed over the nodes that each level of a path adds, per example.

    Methods that walk the same path to different tolerances, or in different linear domains, share them: an example's
    level is evaluated when the first of them asks for it.
    """

    def __init__(self, path: SitePath, rule: NestedRule, baseline: str) -> None:
        self.path = path
        self.rule = rule
        self.held: dict[int, tuple[Point, Tensor]] | None = None
        if path.problem.memo is not None:
            self.held = path.problem.shared(("levels", rule.first, rule.growth, baseline), dict)

    def ends(self) -> Point | None:
        """Half of the gradients at both ends of each path; None where the rule has no nodes there."""
        if not self.rule.ends:
            return None
        return self._sums(0, torch.tensor([0.0, 1.0]).double(), 0.5, torch.arange(self.path.problem.batch))

    def added_by(self, steps: int, active: Tensor) -> Point:
        """Σ ∇f over the new nodes of the level of so many intervals, for these examples."""
        return self._sums(steps, self.rule.new_nodes(steps), 1.0, active)

    def _sums(self, level: int, alpha: Tensor, weight: float, active: Tensor) -> Point:
        problem, start = self.path.problem, self.path.start

        def evaluated(rows: Tensor) -> Point:
            weights = torch.full_like(alpha, weight)
            return gradient_on_path(problem.rows(rows), take(start, rows), alpha, weights)

        if self.held is None:
            return evaluated(active)
        if level not in self.held:
            empty = map_leaves(lambda leaf: torch.zeros_like(widest(leaf)), problem.point)
            self.held[level] = empty, torch.zeros(problem.batch, dtype=torch.bool)
        sums, known = self.held[level]
        if len(missing := active[~known[active]]):
            _put(sums, evaluated(missing), missing)
            known[missing] = True
        return map_leaves(lambda leaf: leaf.index_select(0, active.to(leaf.device)), sums)


def refine(
    problem: Problem, levels: Levels, delta: Point, change_of_score: Tensor, tol: float, max_steps: int
) -> Point:
    """Integrated gradients by the levels of a nested rule, each example until its own error is within ``tol``.

    An example leaves the batch when its estimated error (relative to the norm of the map) and its completeness gap
    (relative to the change of the score) are within ``tol``. One that never does has ends of the path left out whose
    gradient is beyond all others.

    Records ``error`` (B,) the estimate, relative to the norm of the map, and ``converged`` (B,).
    """
    batch, rule, path = problem.batch, levels.rule, levels.path
    result = map_leaves(
        lambda leaf: torch.zeros(leaf.shape, dtype=widest(leaf.real).dtype, device=leaf.device), delta
    )
    error = torch.full((batch,), torch.inf, dtype=change_of_score.dtype)
    converged = torch.zeros(batch, dtype=torch.bool)
    active = torch.arange(batch)
    sums: Point | None = None
    ends = levels.ends()
    change: Tensor | None = None
    steps = rule.first
    while len(active) and steps + rule.ends <= max_steps:
        fresh = levels.added_by(steps, active)
        sums = fresh if sums is None else map_leaves(torch.add, sums, fresh)
        every = sums if ends is None else map_leaves(torch.add, sums, take(ends, active))
        weighted = path.pulled_back(map_leaves(lambda g: g / steps, every), active)  # noqa: B023
        values = map_leaves(lambda g, d: contract(g, widest(d)), weighted, take(delta, active))
        size = norm(values).cpu()
        if steps > rule.first:
            before, change = (
                change,
                relative(norm(map_leaves(torch.sub, values, take(result, active))).cpu(), size),
            )
            error[active] = rule.estimate(change, before)
        _put(result, values, active)
        gap = (total(values).cpu() - change_of_score[active].cpu()).abs()
        # where attributions cancel to almost nothing, a hundredth of what cancels is the yardstick
        floor = 0.01 * total(map_leaves(torch.abs, values)).cpu()
        scale = torch.maximum(change_of_score[active].abs().cpu(), floor)
        converged[active] = (error[active] <= tol) & (relative(gap, scale) <= tol)
        left = ~converged[active]
        if problem.posed.whole and left.any():
            # draws or batch statistics depend on the batch, so that nobody may leave it before the others
            left = torch.ones_like(left)
        active = active[left]
        sums = map_leaves(lambda leaf: leaf[left.to(leaf.device)], sums)  # noqa: B023
        change = None if change is None else change[left]
        steps *= rule.growth
    if not converged.all():
        if ends is not None and sums is not None:
            inner = map_leaves(lambda leaf: leaf / (steps // rule.growth - 1), sums)
            parts = [
                map_leaves(
                    lambda g, d: contract(g, widest(d)), path.pulled_back(part, active), take(delta, active)
                )
                for part in (inner, take(ends, active))
            ]
            _leave_out_singular_ends(result, parts[0], parts[1], active)
        problem.note(
            f"{int((~converged).sum())} of {batch} examples did not reach tol={tol} within {max_steps} steps; "
            "raise max_steps, or read their estimated error"
        )
    problem.record(error=error, converged=converged)
    return result


def new_midpoints(steps: int) -> Tensor:
    """The midpoints that the level of a third as many intervals does not have: of every three, the outer two."""
    number = torch.arange(steps)
    fresh = number if steps == MIDPOINT.first else number[number % 3 != 1]
    return (fresh.double() + 0.5) / steps


def new_edges(steps: int) -> Tensor:
    """The inner edges that the level of half as many intervals does not have: every other one."""
    return torch.arange(1, steps, 2).double() / steps


def error_with_kinks(change: Tensor, before: Tensor | None) -> Tensor:
    """The error of a midpoint level of a net that may have kinks, where changes fall irregularly."""
    if before is None:
        return KINKED_SHARE * change
    ratio = relative(change, before)
    # averaged over two levels on a log scale, since single changes of small ReLU nets scatter by a factor of two
    kinked = KINKED_SHARE * (change * before / 3).sqrt()
    return torch.where(ratio < SMOOTH_RATIO, change * ratio.clamp_min(1 / 9), kinked)


def smooth_error(change: Tensor, before: Tensor | None) -> Tensor:
    """The error of a trapezoidal level of a smooth net: what is left of a geometric series of changes, q / (1 - q).

    The changes of an error that falls as 1/n² have q = 1/4, and leave a third. Less is not believed: pre-norm
    transformers converge geometrically at first, until the ends of the path bring back 1/n².
    """
    if before is None:
        return change
    ratio = relative(change, before).clamp(0.25, SLOWEST)
    return change * ratio / (1 - ratio)


MIDPOINT = NestedRule(3, 3, False, new_midpoints, error_with_kinks)
TRAPEZOID = NestedRule(2, 2, True, new_edges, smooth_error)


def _leave_out_singular_ends(result: Point, inner: Point, ends: Point, active: Tensor) -> None:
    """The mean of the inner nodes, where the ends' is another order of magnitude: zeros before a norm, for example."""
    singular = ~(norm(ends) <= SINGULAR * norm(inner)).cpu()  # also where an end is not finite
    _put(result, take(inner, singular.nonzero()[:, 0]), active[singular])


def _put(result: Point, values: Point, active: Tensor) -> None:
    for whole, rows in zip(leaves(result), leaves(values), strict=True):
        whole[active.to(whole.device)] = rows.to(whole.dtype)


def relative(amount: Tensor, scale: Tensor) -> Tensor:
    """amount / scale, 0 where the amount is 0."""
    return torch.where(
        amount > 0, amount / scale.clamp_min(torch.finfo(scale.dtype).tiny), torch.zeros_like(amount)
    )


def norm(values: Point) -> Tensor:
    """Euclidean norm over everything but the batch: (B,)."""
    return total(map_leaves(lambda leaf: leaf.abs().square(), values)).sqrt()
