"""What an autoencoder finds in activations: sparse latents, and the terms of the training loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["SparseAutoencoderLoss", "SparseLatents"]


@dataclass(frozen=True, eq=False)
class SparseLatents:
    """The selected latents of each token.

    Attributes:
        indices: (..., k), by descending score.
        values: (..., k), ReLU(z): some are 0 where fewer than k pre-activations are positive.
        count: how many latents there are.
        mean, deviation: (..., 1) of each token under row normalisation, to undo it; None otherwise.
    """

    indices: Tensor
    values: Tensor
    count: int
    mean: Tensor | None = None
    deviation: Tensor | None = None

    def dense(self) -> Tensor:
        """The values of all latents, (..., count), zero where not selected."""
        zeros = self.values.new_zeros(*self.values.shape[:-1], self.count)
        return zeros.scatter(-1, self.indices, self.values)


class SparseAutoencoderLoss(NamedTuple):
    """The training loss, its two terms, what was reconstructed (in the units of the input) and the latents."""

    total: Tensor
    reconstruction: Tensor
    auxiliary: Tensor
    output: Tensor
    latents: SparseLatents
