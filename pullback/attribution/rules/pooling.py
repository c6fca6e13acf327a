"""Maxima, sorting and other piecewise linear operations: the gradient already conserves relevance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...core.overrides import PASS, Operation
from .surrogate import names

__all__ = ["WinnerTakesAll"]


@dataclass(frozen=True)
class WinnerTakesAll:
    """Max-pooling, maxima, sorting, ReLU: whoever is passed on takes all relevance, which is the gradient.

    They are homogeneous of degree one where they are linear; a bound that is hit (``clamp``) is a constant of its own.
    """

    operations: ClassVar[frozenset[str]] = names(
        """
        relu leaky_relu prelu rrelu abs max min amax amin aminmax maximum minimum fmax fmin clamp clamp_min
        clamp_max threshold hardshrink max_pool1d max_pool2d max_pool3d max_pool1d_with_indices
        max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d
        adaptive_max_pool3d adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices
        adaptive_max_pool3d_with_indices fractional_max_pool2d fractional_max_pool3d topk sort msort kthvalue
        median nanmedian mode cummax cummin fmod remainder scatter_reduce index_reduce
        segment_reduce
        """
    )
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        if operation.name in ("scatter_reduce", "index_reduce", "segment_reduce"):
            named = (*operation.args, *operation.kwargs.values())
            if any(isinstance(each, str) and each == "prod" for each in named):
                return PASS
        return operation.value()
