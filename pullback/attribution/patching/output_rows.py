"""Rows of a model's output of any nest: taken apart, and put among those of another output."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["completed", "mapped", "sliced"]


def mapped(structure: Any, change: Callable[..., Tensor], *others: Any) -> Any:
    """Every tensor of an output changed, together with those at the same place in other outputs."""
    if isinstance(structure, Tensor):
        return change(structure, *others)
    if hasattr(structure, "items"):
        result = copy.copy(structure)
        for key in list(structure.keys()):
            result[key] = mapped(structure[key], change, *(other[key] for other in others))
        return result
    if isinstance(structure, (list, tuple)):
        parts = [mapped(part, change, *more) for part, *more in zip(structure, *others, strict=True)]
        return type(structure)(*parts) if hasattr(structure, "_fields") else type(structure)(parts)
    if isinstance(structure, type) or not (
        dataclasses.is_dataclass(structure)
        or any(isinstance(part, Tensor) for part in getattr(structure, "__dict__", {}).values())
    ):
        return structure
    result = copy.copy(structure)
    for name in vars(structure):
        object.__setattr__(
            result, name, mapped(vars(structure)[name], change, *(vars(other)[name] for other in others))
        )
    return result


def sliced(output: Any, start: int, stop: int, rows: int) -> Any:
    """Some rows of an output; what has no row for each is left whole."""
    if stop - start == rows:
        return output
    return mapped(output, lambda part: part[start:stop] if part.dim() and len(part) == rows else part)


def completed(output: Any, reference: Any, rows: Tensor, batch: int) -> Any:
    """A whole batch's output: the given rows, differentiable, among those of the reference."""

    def put(known: Tensor, part: Tensor) -> Tensor:
        if not (known.dim() and len(known) == batch and len(part) == len(rows)):
            return part
        return known.detach().index_copy(0, rows.to(known.device), part.to(known))

    return mapped(reference, put, output)
