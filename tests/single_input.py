"""Results of models with one input, whose values are a tensor and no dict of tensors."""

from __future__ import annotations

from torch import Tensor

import pullback as pb

__all__ = ["only"]


def only(attribution: pb.Attribution) -> Tensor:
    """The values of the only input."""
    assert isinstance(attribution.values, Tensor)
    return attribution.values
