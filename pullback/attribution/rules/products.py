"""The half rule: where m signals are multiplied, each receives one m-th of the relevance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.audit import flattened
from ...core.operations import PRODUCTS
from ...core.overrides import PASS, Operation
from .activations import IdentityRule
from .surrogate import carries_signal, constant, operation_behind, scaled_gradient

__all__ = ["HalfRule", "PowerRule", "SignalTakesAll"]

ACTIVATIONS = IdentityRule.operations | {"relu", "leaky_relu", "opaque_module"}
# products with a part that is added, and its position
ADDED = {
    **dict.fromkeys(["addmm", "baddbmm", "addbmm", "addmv", "addr", "addcmul"], 0),
    **dict.fromkeys(["linear", "conv1d", "conv2d", "conv3d", "convolution", "conv_tbc"], 2),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], 2),
    "bilinear": 3,
}


@dataclass(frozen=True)
class HalfRule:
    """``y = a ⊙ b``, both carrying signal: ½ of the relevance to each; 1/m with m factors. What is added keeps its own.

    Products with a constant are linear and left to the gradient. Covers elementwise and matrix products, einsum,
    convolutions with a computed weight, ``prod``.

    Source: Arras et al. 2019; Jafari et al. 2024 (MambaLRP), eq. 9.
    """

    operations: ClassVar[frozenset[str]] = frozenset({*PRODUCTS, "einsum", "prod"})
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        name = operation.name
        if name == "prod":
            dim = operation.argument(1, "dim")
            x = operation.args[0]
            factors = x.numel() if dim is None or isinstance(dim, torch.dtype) else x.shape[dim]
            return scaled_gradient(operation.value(), 1 / factors) if factors else PASS
        live = sum(map(carries_signal, _factors(operation)))
        if live < 2:
            return PASS
        share = 1 / live
        added = ADDED.get(name)
        if added is None or not carries_signal(operation.argument(added, "bias")):
            value = operation.value()
            if isinstance(value, tuple):  # torch.embedding_bag also tells how it counted
                return (scaled_gradient(value[0], share), *value[1:])
            return scaled_gradient(value, share)
        positions = PRODUCTS[name]
        args = tuple(
            scaled_gradient(value, share) if position in positions and carries_signal(value) else value
            for position, value in enumerate(operation.args)
        )
        kwargs = {
            key: scaled_gradient(value, share) if key != "bias" and carries_signal(value) else value
            for key, value in operation.kwargs.items()
        }
        return operation.function(*args, **kwargs)


def _factors(operation: Operation) -> list[Any]:
    """What is multiplied: arguments at the positions of factors, and those given by name."""
    if operation.name == "einsum":
        return flattened([*operation.args, *operation.kwargs.values()])
    positions = PRODUCTS[operation.name]
    named = [value for key, value in operation.kwargs.items() if key not in ("bias", "out")]
    return [operation.args[position] for position in positions if position < len(operation.args)] + named


@dataclass(frozen=True)
class SignalTakesAll:
    """``y = act(a) ⊙ b``: the activated factor is a gate and constant, the other takes all relevance.

    Where neither or both factors come out of an activation, the call is passed on.

    Source: Arras et al. 2017; the gated MLP of conservative propagation (Ali et al. 2022).
    """

    operations: ClassVar[frozenset[str]] = frozenset({"mul"})
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        if len(operation.args) < 2 or not all(map(carries_signal, operation.args[:2])):
            return PASS
        gates = [_is_activated(value) for value in operation.args[:2]]
        if sum(gates) != 1:
            return PASS
        args = [
            constant(value) if gate else value for value, gate in zip(operation.args[:2], gates, strict=True)
        ]
        return operation.function(*args, *operation.args[2:], **operation.kwargs)


def _is_activated(value: Tensor) -> bool:
    return operation_behind(value) in ACTIVATIONS


@dataclass(frozen=True)
class PowerRule:
    """``x^n``, n >= 1, is a product of n equal factors: the gradient divided by n. Below one, and n^x, it is a gate."""

    operations: ClassVar[frozenset[str]] = frozenset({"square", "pow", "float_power"})
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        base = operation.args[0]
        exponent = 2 if operation.name == "square" else operation.argument(1, "exponent")
        if carries_signal(exponent) or not isinstance(base, Tensor):
            with torch.no_grad():
                return operation.value()
        if isinstance(exponent, Tensor):
            if exponent.numel() != 1 and exponent.unique().numel() != 1:
                return PASS
            exponent = exponent.flatten()[0].item()
        if exponent < 1:
            with torch.no_grad():
                return operation.value()
        return scaled_gradient(operation.value(), 1 / exponent)
