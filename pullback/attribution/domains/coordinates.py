"""What transforms share: which dimensions they act on, the precision they need, and the length they came from."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core.errors import InputError, MethodError

__all__ = [
    "came_from",
    "dimensions",
    "remembering",
    "require_dimensions",
    "require_length",
    "require_sample_rate",
    "transformable",
]

Dimensions = int | tuple[int, ...]


def dimensions(dim: Dimensions) -> tuple[int, ...]:
    """One dimension or several, as a tuple.

    >>> dimensions(-1)
    (-1,)
    """
    return (dim,) if isinstance(dim, int) else tuple(dim)


def require_dimensions(dim: object, most: int = 3) -> None:
    """Check a domain's ``dim``: an int, or a tuple of at most ``most``. Raises MethodError."""
    given = dim if isinstance(dim, tuple) else (dim,)
    right = all(isinstance(each, int) and not isinstance(each, bool) for each in given)
    if not right or not 1 <= len(given) <= most or len(set(given)) < len(given):
        asked = f"one dimension, or a tuple of at most {most}" if most > 1 else "one dimension"
        raise MethodError(f"dim is {asked}, for example -1; got {dim!r}.")


def require_sample_rate(rate: object) -> None:
    """Check a domain's ``sample_rate``: samples per second, or None. Raises MethodError."""
    if rate is None:
        return
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
        raise MethodError(f"sample_rate is in samples per second, above 0; got {rate!r}.")


def transformable(x: Tensor, domain: Any) -> Tensor:
    """A real value in a precision that transforms exist for, its dimensions checked. Raises InputError."""
    if x.is_complex() or not x.is_floating_point():
        raise InputError(
            f"{domain!r} takes real values, got {x.dtype}. Explain the real and imaginary parts as two channels, or "
            "write a domain for complex values."
        )
    for dim in dimensions(domain.dim):
        if not -x.dim() <= dim < x.dim() or dim % x.dim() == 0:
            raise InputError(
                f"{domain!r} acts on dimension {dim}, but values have shape {tuple(x.shape)}, of which the first "
                "dimension counts examples."
            )
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def require_length(domain: Any, expected: Any, found: Any, what: str) -> None:
    """Check a length that a domain was fitted to. Raises InputError."""
    if expected is not None and expected != found:
        raise InputError(
            f"{domain!r} was fitted to {what} {expected}, got {found}. Fit it to this value: domain.fitted(x)."
        )


def remembering(coefficients: Tensor, length: Any) -> Tensor:
    """The coefficients, knowing the length they came from, so that ``synthesis(analysis(x))`` gives every length back.

    Only this tensor object knows: nothing computed from it does. In a problem, ``fitted`` says the length.
    """
    coefficients.came_from = length  # type: ignore[attr-defined]
    return coefficients


def came_from(coefficients: Tensor) -> Any:
    """The length that ``remembering`` noted, or None."""
    return getattr(coefficients, "came_from", None)
