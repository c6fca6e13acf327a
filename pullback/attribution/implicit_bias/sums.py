"""Inner products of gradients and biases, one for each example."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["UnknownLayout", "inner", "per_example", "real_product"]


class UnknownLayout(Exception):
    """The first dimension of a tensor does not tell which example its entries belong to."""


def per_example(product: Tensor, rows: int) -> Tensor:
    """Entries summed for each example, (B,), where the first dimension holds the examples one after another.

    Raises UnknownLayout where it cannot.
    """
    if rows == 1:
        return product.sum().reshape(1)
    if product.dim() == 0 or len(product) % rows:
        raise UnknownLayout
    return product.reshape(rows, -1).sum(1)


def inner(delta: Tensor, bias: Tensor, rows: int) -> Tensor:
    """``<δ, b>`` for each example, without a product of δ's size where b is smaller."""
    if delta.is_complex() or delta.dim() == 0:
        return per_example(real_product(delta, bias), rows)
    if len(delta) % rows:
        raise UnknownLayout
    if bias.shape == delta.shape:
        found: Tensor = torch.linalg.vecdot(delta.reshape(rows, -1), bias.reshape(rows, -1).to(delta.dtype))
        return found
    shape = (1,) * (delta.dim() - bias.dim()) + tuple(bias.shape)
    summed = [dim for dim in range(1, delta.dim()) if shape[dim] == 1]
    return per_example((delta.sum(summed, keepdim=True) if summed else delta) * bias, rows)


def real_product(delta: Tensor, value: Tensor) -> Tensor:
    """``δ ⊙ b``, real also for complex tensors, whose gradient is ∂f/∂Re + i ∂f/∂Im."""
    product: Tensor = (delta.conj() * value).real if delta.is_complex() else delta * value
    return product
