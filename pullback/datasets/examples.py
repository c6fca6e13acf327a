"""What all data sets here do: count their examples, and choose some of them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol, TypeVar, overload

from torch import Tensor

__all__ = ["Examples", "chosen", "count"]


class Examples(Protocol):
    """A dataclass whose tensors all have one row per example, ``x`` and ``y`` among them."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def x(self) -> Tensor: ...
    @property
    def y(self) -> Tensor: ...


Data = TypeVar("Data", bound=Examples)


def count(data: Examples) -> int:
    """How many examples there are."""
    return data.x.shape[0]


@overload
def chosen(data: Examples, index: int) -> tuple[Tensor, Tensor]: ...
@overload
def chosen(data: Data, index: slice | Tensor | list[int]) -> Data: ...
def chosen(data: Examples, index: int | slice | Tensor | list[int]) -> tuple[Tensor, Tensor] | Examples:
    """The pair (x, y) of one example, as a PyTorch ``DataLoader`` wants it, or the same data with fewer rows."""
    if isinstance(index, int):
        return data.x[index], data.y[index]
    values = ((field.name, getattr(data, field.name)) for field in dataclasses.fields(data))
    return dataclasses.replace(
        data, **{name: value[index] for name, value in values if isinstance(value, Tensor)}
    )
