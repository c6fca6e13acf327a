"""Closed forms of the implicit bias ``g(x) - x g'(x)`` of elementwise activations, from x and y = g(x)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from ...core.overrides import Operation
from .parts import NOT_CLOSED, ClosedForm, ImplicitBias, only_first

__all__ = ["ACTIVATIONS"]

_ROOT: Final = math.sqrt(2 / math.pi)
_CUBIC: Final = 0.044715


def _gelu(operation: Operation, x: Tensor, y: Tensor) -> Tensor:
    square = x * x
    if operation.argument(1, "approximate", "none") == "tanh":
        u = torch.tanh(x * (square * _CUBIC).add_(1).mul_(_ROOT))
        return (1 - u * u).mul_(square).mul_((square * (3 * _CUBIC)).add_(1)).mul_(-_ROOT / 2)
    return (square * -0.5).exp_().mul_(square).mul_(-1 / math.sqrt(2 * math.pi))


def _silu(operation: Operation, x: Tensor, y: Tensor) -> Tensor:
    return (y - x).mul_(y)  # x² σ (1 - σ) = y (x - y)


def _sigmoid(operation: Operation, x: Tensor, y: Tensor) -> Tensor:
    return y - torch.nan_to_num(x * (y - y * y), 0.0)  # flat at ±∞


def _tanh(operation: Operation, x: Tensor, y: Tensor) -> Tensor:
    return y - torch.nan_to_num(x * (1 - y * y), 0.0)


def _softplus(operation: Operation, x: Tensor, y: Tensor) -> Tensor:
    beta, threshold = operation.argument(1, "beta", 1), operation.argument(2, "threshold", 20)
    bias: Tensor = y - x * torch.sigmoid(x * beta)
    return bias.masked_fill_(x * beta > threshold, 0)


def _elu(operation: Operation, x: Tensor, y: Tensor) -> Tensor:
    alpha = operation.argument(1, "alpha", 1.0)
    bias: Tensor = y - x * (y + alpha)
    return bias.masked_fill_(x > 0, 0)


def _hardswish(operation: Operation, x: Tensor, y: Tensor) -> Tensor:
    return (x * x).mul_(-1 / 6).masked_fill_(x.abs() >= 3, 0)


def _exp(operation: Operation, x: Tensor, y: Tensor) -> Tensor:
    # exp(-∞) = 0 is a removed entry
    return torch.nan_to_num(y - y * x, 0.0, 0.0, 0.0)


def _log(operation: Operation, x: Tensor, y: Tensor) -> Tensor:
    return torch.nan_to_num(y - 1, 0.0, 0.0, 0.0)


def _activation(form: Callable[[Operation, Tensor, Tensor], Tensor]) -> ClosedForm:
    def closed(operation: Operation, y: Tensor) -> ImplicitBias | None:
        if not only_first(operation) or y.is_complex() or y.dtype != operation.args[0].dtype:
            return NOT_CLOSED
        return ImplicitBias(curvature=form(operation, operation.args[0].detach(), y))

    return closed


ACTIVATIONS: Final[Mapping[str, ClosedForm]] = {
    "gelu": _activation(_gelu),
    "silu": _activation(_silu),
    "sigmoid": _activation(_sigmoid),
    "tanh": _activation(_tanh),
    "softplus": _activation(_softplus),
    "elu": _activation(_elu),
    "hardswish": _activation(_hardswish),
    "exp": _activation(_exp),
    "log": _activation(_log),
}
