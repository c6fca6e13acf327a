"""Path integrals to a tolerance: nested rules that reuse every node, and a stop for each example by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.points import Point, contract, leaves, map_leaves, take, total, widest
from ..core.problem import Problem
from .paths import gradient_on_path

__all__ = ["refine"]

FIRST_LEVEL = 3
# Measured in benchmarks/convergence.py: where tripling shrinks the change to less than this, the error falls as 1/n²
# or faster (smooth nets) and the next change predicts it; elsewhere it falls as 1/n (ReLU nets), and the error of a
# level is 0.4 of its change on average.
SMOOTH_RATIO = 0.18
KINKED_SHARE = 0.4


def refine(
    problem: Problem, start: Point, delta: Point, change_of_score: Tensor, tol: float, max_steps: int
) -> Point:
    """Integrated gradients by midpoint levels 3, 9, 27, ..., each example until its own error is within ``tol``.

    Tripling keeps every node of the level before. An example leaves the batch when its estimated error (relative to
    the norm of the map) and its completeness gap (relative to the change of the score) are within ``tol``.

    Records ``error`` (B,) the estimate, relative to the norm of the map, and ``converged`` (B,).
    """
    batch = problem.batch
    result = map_leaves(
        lambda leaf: torch.zeros(leaf.shape, dtype=widest(leaf.real).dtype, device=leaf.device), delta
    )
    error = torch.full((batch,), torch.inf, dtype=change_of_score.dtype)
    converged = torch.zeros(batch, dtype=torch.bool)
    active = torch.arange(batch)
    sums: Point | None = None
    change: Tensor | None = None
    steps = FIRST_LEVEL
    while len(active) and steps <= max_steps:
        sums = _added(sums, _new_gradients(problem.rows(active), take(start, active), steps))
        values = map_leaves(lambda g, d: contract(g / steps, widest(d)), sums, take(delta, active))  # noqa: B023
        size = norm(values).cpu()
        if steps > FIRST_LEVEL:
            before, change = (
                change,
                relative(norm(map_leaves(torch.sub, values, take(result, active))).cpu(), size),
            )
            error[active] = estimated_error(change, before)
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
        steps *= 3
    if not converged.all():
        problem.note(
            f"{int((~converged).sum())} of {batch} examples did not reach tol={tol} within {max_steps} steps; "
            "raise max_steps, or read their estimated error"
        )
    problem.record(error=error, converged=converged)
    return result


def estimated_error(change: Tensor, before: Tensor | None) -> Tensor:
    """The error of a level from its change and the change before it, per example."""
    if before is None:
        return KINKED_SHARE * change
    ratio = relative(change, before)
    # averaged over two levels on a log scale, since single changes of small ReLU nets scatter by a factor of two
    kinked = KINKED_SHARE * (change * before / 3).sqrt()
    return torch.where(ratio < SMOOTH_RATIO, change * ratio.clamp_min(1 / 9), kinked)


def _new_gradients(problem: Problem, start: Point, steps: int) -> Point:
    """The sum of gradients at the midpoints of a level that the level of a third as many steps does not have."""
    number = torch.arange(steps)
    fresh = number if steps == FIRST_LEVEL else number[number % 3 != 1]
    alpha = (fresh.double() + 0.5) / steps
    return gradient_on_path(problem, start, alpha, torch.ones_like(alpha))


def _added(sums: Point | None, fresh: Point) -> Point:
    return fresh if sums is None else map_leaves(torch.add, sums, fresh)


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
