"""FullGrad's maps: which dimensions of a term are places, channels summed, one resolution brought to another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["area_weights", "channel_sum", "on_grid", "on_tokens", "resized"]

_PREFIX_TOKENS: Final = 5


def channel_sum(product: Tensor, psi: str, channel: int | None) -> Tensor:
    """``Σ_c ψ(product)``; "minmax" scales over all entries of one example."""
    product = product.real if product.is_complex() else product
    if psi != "identity":
        product = product.abs()
    if psi == "minmax":
        flat = product.flatten(1)
        flat = flat - flat.amin(1, keepdim=True)
        product = (flat / (flat.amax(1, keepdim=True) + 1e-6)).reshape(product.shape)
    return product if channel is None else product.sum(channel)


def on_grid(product: Tensor, grids: Sequence[tuple[int, ...]]) -> Tensor | None:
    """(B, C, *grid) if some dimensions are a known grid, also where it lies flat behind prefix tokens."""
    if tuple(product.shape[2:]) in grids:
        return product
    if tuple(product.shape[1:-1]) in grids:
        return product.movedim(-1, 1)
    for grid in reversed(grids):
        places = math.prod(grid)
        for prefix in range(_PREFIX_TOKENS + 1):
            flat = on_tokens(product, (places + prefix,))
            if flat is not None:
                placed: Tensor = flat[:, :, prefix:].unflatten(2, grid)
                return placed
    return None


def on_tokens(product: Tensor, size: tuple[int, ...]) -> Tensor | None:
    """(B, everything else, T), T being the dimension of that length; of heads before or after it, before."""
    (tokens,) = size
    order = (2, 1, 3) if product.dim() == 4 else range(1, product.dim())
    for dim in order:
        if product.shape[dim] == tokens:
            return product.movedim(dim, -1).flatten(1, -2)
    return None


def area_weights(before: int, after: int) -> Tensor:
    """(after, before): the share of each of ``before`` equal intervals that lies in each of ``after``.

    >>> area_weights(1, 2).tolist()
    [[0.5], [0.5]]
    """
    edges = torch.arange(after + 1, dtype=torch.float64) / after * before
    cells = torch.arange(before, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], cells + 1) - torch.maximum(edges[:-1, None], cells)
    return overlap.clamp_min(0)


def resized(image: Tensor, size: tuple[int, ...], upsample: str, align_corners: bool) -> Tensor:
    """Maps (B, *grid) at another resolution, (B, *size): interpolated, or with "area" keeping their sum."""
    if tuple(image.shape[1:]) == size:
        return image
    if upsample == "area":
        for dim, (before, after) in enumerate(zip(image.shape[1:], size, strict=True), 1):
            weights = area_weights(before, after).to(image)
            image = torch.tensordot(image, weights, ([dim], [1])).movedim(-1, dim)
        return image
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    return functional.interpolate(image[:, None], size, mode=mode, align_corners=align_corners)[:, 0]
