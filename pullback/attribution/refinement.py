"""Path integrals to a tolerance: nested rules that reuse every node, and a stop for each example by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.estimator import mean_gradient
from ..core.points import Point, contract, leaves, map_leaves, total, widest
from ..core.problem import Problem
from .paths import straight_line

__all__ = ["refine"]


def refine(problem: Problem, start: Point, delta: Point, tol: float, max_steps: int) -> Point:
    """Integrated gradients by midpoint levels 3, 9, 27, ... until each example's estimated error is within ``tol``.

    Tripling keeps every node of the level before. The change between two levels bounds the error of the coarser one.
    """
    batch = problem.batch
    active = torch.arange(batch)
    sums: Point | None = None
    steps = 3
    result: Point | None = None
    error = torch.full((batch,), torch.inf, dtype=torch.float64)
    df = problem.score() - problem.score(start)
    while True:
        alpha = new_midpoints(steps)
        part = problem.rows(active)
        s = map_leaves(lambda leaf: leaf[active.to(leaf.device)], start)
        d = map_leaves(lambda leaf: leaf[active.to(leaf.device)], delta)

        def place(nodes: Tensor, index: Tensor) -> Point:
            return straight_line(s, part.point, alpha[nodes], index)  # noqa: B023

        fresh = mean_gradient(part, torch.ones(len(alpha), dtype=torch.float64), place)
        sums = fresh if sums is None else map_leaves(torch.add, sums, fresh)
        values = map_leaves(lambda g, dd: contract(g / steps, widest(dd)), sums, d)  # noqa: B023
        if result is None:
            result = values
        else:
            before = map_leaves(lambda leaf: leaf[active.to(leaf.device)], result)
            change = norm(map_leaves(torch.sub, values, before)) / norm(values).clamp_min(1e-300)
            error[active] = change.cpu()
            for full, new in zip(leaves(result), leaves(values), strict=True):
                full[active.to(full.device)] = new
            gap = (total(values) - df[active]).abs() / df[active].abs().clamp_min(1e-300)
            keep = (change > tol) | (gap > tol)
            if steps * 3 > max_steps or not keep.any():
                break
            keep = keep.cpu()
            sums = map_leaves(lambda leaf: leaf[keep.to(leaf.device)], sums)  # noqa: B023
            active = active[keep]
        steps *= 3
    problem.record(error=error)
    return result


def new_midpoints(steps: int) -> Tensor:
    """The nodes of a midpoint level that the level of a third as many steps does not have."""
    number = torch.arange(steps)
    fresh = number if steps == 3 else number[number % 3 != 1]
    return (fresh + 0.5) / steps


def norm(values: Point) -> Tensor:
    """Euclidean norm over everything but the batch: (B,)."""
    return total(map_leaves(lambda leaf: leaf.abs().square(), values)).sqrt()
