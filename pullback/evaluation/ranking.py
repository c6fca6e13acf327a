"""An attribution as an order of the parts of a point: pixels with their channels, tokens, or single elements."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pullback.attribution.controls import content
from pullback.core import noise
from pullback.core.errors import InputError
from pullback.core.points import Point, leaves, map_leaves, widest
from pullback.core.problem import Problem

__all__ = ["Granularity", "PartRanks", "Ranking", "content_of", "ranked_parts", "relevance_at"]

Granularity = Literal["pixel", "element"]
Ranking = Literal["signed", "absolute"]


@dataclass(frozen=True, eq=False)
class PartRanks:
    """The place of each part of a point, 0 the most relevant: (B, P), over all leaves together.

    ``relevance`` (B, P): what they are ranked by, 0 at padding. ``count`` (B,): how many parts are ranked; padding
    comes after them. ``sizes``: the parts of each leaf.
    """

    rank: Tensor
    relevance: Tensor
    count: Tensor
    sizes: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    problem: Problem

    def elements(
        self, fraction: float, order: Literal["descending", "ascending"], at_least: int = 0
    ) -> Point:
        """True at the first round(fraction · count) parts in that order; bool, of the point's structure."""
        chosen = (fraction * self.count).round().clamp_min(at_least)[:, None]
        if order == "descending":
            first = self.rank < chosen
        else:
            count = self.count[:, None]
            first = (self.rank >= count - chosen) & (self.rank < count)
        return self.spread(first)

    def ranked(self) -> Tensor:
        """True at the parts that are ranked, false at padding: bool (B, P)."""
        return self.rank < self.count[:, None]

    def spread(self, parts: Tensor) -> Point:
        """Values of parts (B, P) at each of their elements, in the point's structure."""
        split = iter(zip(parts.split(self.sizes, 1), self.shapes, strict=True))

        def whole(leaf: Tensor) -> Tensor:
            part, shape = next(split)
            values: Tensor = part.reshape(len(part), *shape).to(leaf.device).expand_as(leaf)
            return values

        return map_leaves(whole, self.problem.point)


def ranked_parts(
    relevance: Point, problem: Problem, granularity: Granularity, ranking: Ranking, seed: int
) -> PartRanks:
    """Order the parts of each example by falling relevance, ties at random.

    "pixel" takes channels together: dimension 1 of (B, C, ...), the last one of a text's (B, T, D). Their relevance
    is the sum over channels, of absolute values for ``ranking="absolute"``. The order of ties depends on the seed and
    the example's content alone.
    """
    # a text's values are (batch, token, channel) wherever its layers are cut
    text = problem.posed.token_site or problem.posed.inputs.token_leaf is not None or problem.free is not None
    found, shapes = [], []
    for leaf in leaves(relevance):
        size = widest(leaf.detach())
        size = size.abs() if ranking == "absolute" else size
        if granularity == "pixel" and leaf.ndim > 2:
            size = size.sum(-1 if text else 1, keepdim=True)
        shapes.append(tuple(size.shape[1:]))
        found.append(size.flatten(1))
    device = found[0].device
    score = torch.cat([part.to(device) for part in found], 1)
    constant = (score == score[:, :1]).all(1)
    if bool(constant.any()) and score.shape[1] > 1:
        warnings.warn(
            f"{int(constant.sum())} of {len(constant)} attributions are the same everywhere: their order is random. "
            "Has the model collapsed to a constant?",
            UserWarning,
            stacklevel=5,
        )
    count = torch.full((len(score),), score.shape[1], dtype=score.dtype, device=device)
    relevances = score
    if problem.free is not None:
        free = problem.free.to(device)
        free = free.reshape(*free.shape, *[1] * (len(shapes[0]) - 1)).expand(-1, *shapes[0]).flatten(1)
        relevances = torch.where(free, score, 0.0)
        score = torch.where(free, score, -torch.inf)
        count = free.sum(1).to(count)
    shuffle = _shuffles(problem, score.shape[1], seed).to(device)
    order = score.gather(1, shuffle).sort(dim=1, descending=True, stable=True).indices
    order = shuffle.gather(1, order)
    places = torch.arange(score.shape[1], device=device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return PartRanks(rank, relevances, count, tuple(part.shape[1] for part in found), tuple(shapes), problem)


def _shuffles(problem: Problem, parts: int, seed: int) -> Tensor:
    """(B, parts): an order for ties per example, whatever its batch mates, dtype and device."""
    rows = []
    for row in range(problem.batch):
        key = "/".join(content_of(leaf[row], problem, row) for leaf in leaves(problem.point))
        rows.append(torch.randperm(parts, generator=noise.generator(seed, 0, f"ties/{key}")))
    return torch.stack(rows)


def content_of(row: Tensor, problem: Problem, number: int) -> str:
    """A hash of one example's values, padding and dtype aside."""
    kept = row if problem.free is None else row[problem.free[number].to(row.device)]
    return content(torch.view_as_real(kept) if kept.is_complex() else kept.float())


def relevance_at(attribution: Any, x: Any, problem: Problem) -> Point:
    """The values of an attribution, checked to be finite and of the point's shape, or 1 where they are shared."""
    given = attribution
    if not _has_values(given) and callable(given):
        index = problem.posed.targets[0].index
        given = given(x, index)
    values = given if isinstance(given, (Tensor, Mapping)) else getattr(given, "values", None)
    if not isinstance(values, (Tensor, Mapping)):
        raise InputError(
            f"An attribution of type {type(given).__name__} was given. Expected a tensor (n, ...), a dict of tensors "
            "by input leaf, an object with .values, or a callable (x, target) giving one of these."
        )
    point = problem.point
    if isinstance(values, Mapping) and isinstance(point, Tensor) and len(values) == 1:
        values = next(iter(values.values()))
    if isinstance(point, Tensor) and isinstance(values, Tensor):
        return _fitting(values, point, problem.site)
    if not isinstance(point, Tensor) and isinstance(values, Mapping) and values.keys() == point.keys():
        return {name: _fitting(values[name], leaf, name) for name, leaf in point.items()}
    have = sorted(values) if isinstance(values, Mapping) else "one tensor"
    want = "one tensor" if isinstance(point, Tensor) else sorted(point)
    raise InputError(f"An attribution to {have} was given. Expected {want}, as explain gives it.")


def _has_values(given: Any) -> bool:
    return isinstance(given, (Tensor, Mapping)) or isinstance(
        getattr(given, "values", None), (Tensor, Mapping)
    )


def _fitting(values: Tensor, leaf: Tensor, name: str) -> Tensor:
    fits = values.ndim == leaf.ndim and len(values) == len(leaf)
    if not fits or any(have not in (1, want) for have, want in zip(values.shape, leaf.shape, strict=True)):
        raise InputError(
            f"An attribution of shape {tuple(values.shape)} was given for {name!r} of shape {tuple(leaf.shape)}. "
            "Expected the same shape, or 1 where it is shared, as (n, 1, H, W) by all channels."
        )
    if not bool(values.isfinite().all()):
        rows = (~values.isfinite()).flatten(1).any(1).nonzero().squeeze(1).tolist()
        raise InputError(
            f"{len(rows)} attributions have NaN or infinite values (first: example {rows[0]}). Expected finite "
            "values; leave those examples out or look into the model there."
        )
    return values.detach().to(leaf.device).expand_as(leaf)
