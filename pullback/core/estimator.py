"""The streaming estimator: many points per example, evaluated in chunks, reduced as they come.

Rows are (node, example) pairs, node-major, packed into chunks whatever the batch size. Nothing of size nodes × input
is ever held. Sums run in float64 where the device has it and in node order for each example, so results do not depend
on the chunk beyond the rounding of the model itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .points import Point, expand_like, widest
from .problem import Problem
from .progress import track

__all__ = ["Moments", "Place", "WeightedSum", "mean_gradient", "stream"]


class Place(Protocol):
    """Where to evaluate: node numbers (R,) and example numbers (R,) in, points of R rows out."""

    def __call__(self, nodes: Tensor, index: Tensor, /) -> Point: ...


class WeightedSum:
    """Running Σ weight × value of one leaf, per example: ``sum`` (B, *S)."""

    def __init__(self, batch: int, like: Tensor) -> None:
        self.sum = _zeros(batch, like)

    def add(self, values: Tensor, index: Tensor, weights: Tensor) -> None:
        """Take in R rows of values, row r belonging to example ``index[r]`` with weight ``weights[r]``."""
        values = widest(values)
        weights = expand_like(weights.to(self.sum.real.dtype), values)
        self.sum.index_add_(0, index.to(values.device), values * weights.to(values.dtype))


class Moments:
    """Running weighted mean and centred second moment of one leaf, per example (Chan et al. 1979, eq. 2.1).

    Stable: variances of nearly equal values never come out negative, which the difference of squares gives in float32.
    """

    def __init__(self, batch: int, like: Tensor) -> None:
        self.weight = torch.zeros(batch, dtype=torch.float64 if like.device.type != "mps" else torch.float32)
        self.mean = _zeros(batch, like)
        self.squares = torch.zeros_like(self.mean, dtype=self.mean.real.dtype)

    def add(self, values: Tensor, index: Tensor, weights: Tensor) -> None:
        """Take in R rows of values, row r belonging to example ``index[r]`` with weight ``weights[r]``."""
        values = widest(values)
        weights = weights.to(self.weight)
        where = index.to(values.device)
        new = torch.zeros_like(self.weight).index_add_(0, index, weights)
        rows = index.unique()
        fresh = torch.zeros_like(self.mean)
        fresh.index_add_(0, where, values * expand_like(weights, values).to(values.dtype))
        fresh /= expand_like(new.clamp_min(torch.finfo(new.dtype).tiny), fresh)
        apart = (values - fresh.index_select(0, where)).abs().square() * expand_like(weights, values)
        both = self.weight + new
        share = torch.where(both > 0, new / both.clamp_min(torch.finfo(new.dtype).tiny), new)
        step = fresh - self.mean
        touched = torch.zeros_like(self.weight, dtype=torch.bool)
        touched[rows] = True
        step = step * expand_like(touched.to(step.device), step)
        self.squares.index_add_(0, where, apart.to(self.squares.dtype))
        self.squares += step.abs().square() * expand_like(self.weight * share, step)
        self.mean += step * expand_like(share, step)
        self.weight = both

    def variance(self) -> Tensor:
        """The population variance, (B, *S), never negative."""
        return self.squares / expand_like(
            self.weight.clamp_min(torch.finfo(self.weight.dtype).tiny), self.squares
        )


def _zeros(batch: int, like: Tensor) -> Tensor:
    """One row per example in the shape of a leaf, in the accumulation dtype."""
    wide = widest(torch.empty(0, dtype=like.dtype, device=like.device))
    return torch.zeros(batch, *like.shape[1:], dtype=wide.dtype, device=like.device)


Evaluate = Callable[[Point, Tensor, Tensor], Point]


def stream(
    problem: Problem,
    weights: Tensor,
    place: Place,
    evaluate: Evaluate | None = None,
    *,
    second: bool = False,
    progress: str | None = None,
) -> Any:
    """Weighted sums, or moments, over nodes of what ``evaluate`` gives at the points ``place`` names.

    Args:
        weights: (K,) one weight per node.
        place: the points of (node, example) rows.
        evaluate: (z, nodes, index) -> values of R rows; None for the gradient of the score.
        second: keep the mean and the centred second moment, weights taken as counts, instead of the sum.

    Returns:
        a WeightedSum, with ``second`` a Moments, for a tensor point; a dict of them for a dict point.
    """
    batch = problem.batch
    rows = len(weights) * batch
    kind = Moments if second else WeightedSum
    found: dict[str, Moments | WeightedSum] = {}
    start = 0
    with track(rows, progress) as advance:
        while start < rows:
            stop = start + even_share(rows - start, problem.chunk_rows())
            numbers = torch.arange(start, stop)
            nodes, index = numbers // batch, numbers % batch
            z = place(nodes, index)
            values = problem.grad_rows(z, index) if evaluate is None else evaluate(z, nodes, index)
            by_name = values if isinstance(values, dict) else {"": values}
            for name, leaf in by_name.items():
                if name not in found:
                    found[name] = kind(batch, leaf)
                found[name].add(leaf, index, weights[nodes])
            advance(stop - start)
            start = stop
    return found if isinstance(values, dict) else found[""]


def even_share(rows: int, chunk: int) -> int:
    """The next chunk of the rows left, so that no last chunk is much smaller than the others.

    >>> even_share(50, 23)
    17
    """
    return -(-rows // -(-rows // chunk))


def mean_gradient(problem: Problem, weights: Tensor, place: Place, progress: str | None = None) -> Point:
    """Σ_k weight_k ∇score(place(k)), per example, in the accumulation dtype."""
    sums = stream(problem, weights, place, progress=progress)
    return {name: each.sum for name, each in sums.items()} if isinstance(sums, dict) else sums.sum
