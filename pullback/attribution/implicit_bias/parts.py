"""The parts of an implicit bias, and what every way of computing one needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from ...core.overrides import Operation
from ..rules.surrogate import carries_signal

__all__ = [
    "NOT_CLOSED",
    "ZERO",
    "ClosedForm",
    "ImplicitBias",
    "finite",
    "kept",
    "only_first",
    "signal_operands",
    "with_operands",
    "with_tensors",
]


@dataclass(frozen=True, eq=False)
class ImplicitBias:
    """The part of one result that its derivative does not explain; None stands for zero.

    Both parts broadcast to the result: ``constant`` comes from additive constants (biases, position tables,
    literals), ``curvature`` from nonlinearity. ``whole`` is their sum, where it is had at once.
    """

    constant: Tensor | None = None
    curvature: Tensor | None = None
    whole: Tensor | None = None

    @property
    def is_zero(self) -> bool:
        """Whether there is nothing to record."""
        return self.constant is None and self.curvature is None and self.whole is None

    def bent(self) -> Tensor | None:
        """What comes from nonlinearity."""
        if self.whole is None:
            return self.curvature
        return self.whole if self.constant is None else self.whole - self.constant

    def total(self) -> Tensor | None:
        """Both parts together."""
        if self.whole is not None:
            return self.whole
        if self.constant is None or self.curvature is None:
            return self.curvature if self.constant is None else self.constant
        return self.constant + self.curvature


ZERO: Final = ImplicitBias()
NOT_CLOSED: Final = None
"""What a closed form returns for arguments it does not cover."""

ClosedForm = Callable[[Operation, Any], "ImplicitBias | None"]


def signal_operands(*values: Any) -> list[Tensor]:
    """The tensors that carry signal, in order, also those inside lists, tuples and dicts."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            if value.requires_grad:
                found.append(value)
        elif isinstance(value, (list, tuple)):
            found += signal_operands(*value)
        elif isinstance(value, dict):
            found += signal_operands(*value.values())
    return found


def with_operands(operation: Operation, operands: Any) -> Operation:
    """The operation with its signal-carrying operands replaced, in the order of :func:`signal_operands`."""
    given = iter(operands)
    return replace(
        operation, args=with_tensors(operation.args, given), kwargs=with_tensors(operation.kwargs, given)
    )


def with_tensors(value: Any, given: Iterator[Any]) -> Any:
    """A nest with its signal-carrying tensors replaced, in the order of :func:`signal_operands`."""
    if carries_signal(value):
        return next(given)
    if isinstance(value, dict):
        return {key: with_tensors(entry, given) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        entries = [with_tensors(entry, given) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value


def finite(bias: Tensor) -> Tensor:
    """Infinite entries stand for removed ones, through which nothing flows: 0 instead of ∞ · 0."""
    return torch.nan_to_num(bias, 0.0, 0.0, 0.0)


def kept(constant: Tensor) -> Tensor:
    """A constant as it is now: it may be overwritten before the backward pass."""
    return constant.detach() if isinstance(constant, nn.Parameter) else constant.detach().clone()


def only_first(operation: Operation) -> bool:
    """Whether the first argument carries all the signal."""
    signals = signal_operands(operation.args, operation.kwargs)
    return len(signals) == 1 and signals[0] is operation.args[0]
