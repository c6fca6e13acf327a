"""Positions and heads of a value at a site, and the exchange of some of them for another run's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Exchange", "Layout"]


@dataclass(frozen=True)
class Layout:
    """How a value (B, *shape) divides into positions, heads and features.

    (T, D) has T positions, (D,) and () have one, a map (C, H, W) has H·W; the features divide into ``heads``.

    >>> Layout((2, 4, 5)).split(torch.zeros(3, 2, 4, 5)).shape
    torch.Size([3, 20, 1, 2])
    """

    shape: tuple[int, ...]
    heads: int = 1

    @property
    def positions(self) -> tuple[int, ...]:
        if len(self.shape) < 2:
            return (1,)
        return self.shape[:1] if len(self.shape) == 2 else self.shape[1:]

    def split(self, value: Tensor) -> Tensor:
        """(B, *shape) as (B, positions, heads, features of a head)."""
        last = value.movedim(1, -1) if len(self.shape) > 2 else value
        count = torch.Size(self.positions).numel()
        return last.reshape(len(value), count, self.heads, -1)

    def join(self, split: Tensor) -> Tensor:
        """The inverse of ``split``."""
        if len(self.shape) < 3:
            return split.reshape(len(split), *self.shape)
        return split.reshape(len(split), *self.positions, self.shape[0]).movedim(-1, 1)


@dataclass(frozen=True, eq=False)
class Exchange:
    """Which entries of rows at a site take another run's value: all index tensors have one entry per exchange."""

    layout: Layout
    source: Tensor
    row: Tensor
    position: Tensor
    head: Tensor
    example: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        device = value.device
        position, head = self.position.to(device), self.head.to(device)
        changed = self.layout.split(value).clone()
        given = self.layout.split(self.source)[self.example.to(device), position, head]
        changed[self.row.to(device), position, head] = given.to(changed.dtype)
        # copied into the old strides, so that the kernels downstream are the same as without a patch
        return value.clone().copy_(self.layout.join(changed))
