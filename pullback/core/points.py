"""A point is the value at a site: one tensor, or a dict of tensors where several input leaves are explained at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Point", "contract", "expand_like", "leaves", "map_leaves", "take", "total", "widest"]

Point: TypeAlias = "Tensor | dict[str, Tensor]"


def map_leaves(function: Callable[..., Tensor], *points: Point) -> Point:
    """Apply a function of tensors leaf by leaf, to one point or to several of the same structure."""
    first = points[0]
    if isinstance(first, Tensor):
        return function(*points)
    return {name: function(*(point[name] for point in points)) for name in first}  # type: ignore[index]


def leaves(point: Point) -> list[Tensor]:
    """The tensors of a point, in order."""
    return [point] if isinstance(point, Tensor) else list(point.values())


def take(point: Point, rows: Tensor) -> Point:
    """Rows of a point by index; a single example is expanded without a copy."""

    def select(leaf: Tensor) -> Tensor:
        if leaf.shape[0] == 1:
            return leaf.expand(len(rows), *leaf.shape[1:])
        return leaf.index_select(0, rows.to(leaf.device))

    return map_leaves(select, point)


def or_zeros(found: Sequence[Tensor | None], point: Point) -> Point:
    """Gradients in the structure of a point, zero where autograd found no path."""
    parts = iter(found)

    def filled(leaf: Tensor) -> Tensor:
        part = next(parts)
        return torch.zeros_like(leaf) if part is None else part

    return map_leaves(filled, point)


def expand_like(per_row: Tensor, leaf: Tensor) -> Tensor:
    """A (R,) tensor shaped to broadcast against a (R, *S) leaf, on its device."""
    return per_row.to(leaf.device).reshape(-1, *[1] * (leaf.dim() - 1))


def contract(gradient: Tensor, delta: Tensor) -> Tensor:
    """Re(delta · conj(gradient)): the one product behind every "gradient times difference" method.

    For real tensors it is the plain product. For complex coefficients PyTorch's gradient of a real score is
    ∂_a f + i ∂_b f, so conjugating it gives the exact first-order change of the score per coefficient.

    >>> contract(torch.tensor([2.0]), torch.tensor([3.0]))
    tensor([6.])
    """
    product = gradient.conj() * delta
    return product.real if product.is_complex() else product


def total(point: Point) -> Tensor:
    """Sum over everything but the batch, over all leaves, in float64 where the device has it: (B,)."""
    sums = [widest(leaf).unsqueeze(1).flatten(1).sum(1) for leaf in leaves(point)]
    return torch.stack([part.to(sums[0].device) for part in sums]).sum(0)


def widest(tensor: Tensor) -> Tensor:
    """The tensor in the widest precision its device has, for accumulation."""
    if tensor.device.type == "mps":
        return tensor.float() if not tensor.is_complex() else tensor
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
