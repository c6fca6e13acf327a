"""Closed forms of the implicit bias of products, quotients, powers and sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from ...core.overrides import Operation
from ..rules.surrogate import carries_signal, names
from .parts import NOT_CLOSED, ZERO, ClosedForm, ImplicitBias, finite, kept, signal_operands

__all__ = ["PRODUCTS"]


def _products(operation: Operation, y: Tensor) -> ImplicitBias:
    """m factors with signal: ``(1 - m) y``."""
    m = len(signal_operands(operation.args, operation.kwargs))
    return ZERO if m == 1 else ImplicitBias(curvature=y * (1 - m))


def _affine_product(operation: Operation, y: Tensor, additive: Tensor | None) -> ImplicitBias:
    """``y = product + additive``: a constant additive part counts whole."""
    m = len(signal_operands(operation.args, operation.kwargs)) - carries_signal(additive)
    constant = None if additive is None or carries_signal(additive) else kept(additive)
    if m == 1:
        return ImplicitBias(constant)
    product = y if additive is None else y - additive
    return ImplicitBias(constant, product * (1 - m))


def _linear(operation: Operation, y: Tensor) -> ImplicitBias:
    return _affine_product(operation, y, operation.argument(2, "bias"))


def _convolution(operation: Operation, y: Tensor) -> ImplicitBias | None:
    bias, weight = operation.argument(2, "bias"), operation.argument(1, "weight")
    if carries_signal(bias):
        return NOT_CLOSED
    return _affine_product(
        operation, y, None if bias is None else bias.reshape(-1, *[1] * (weight.dim() - 2))
    )


def _bilinear(operation: Operation, y: Tensor) -> ImplicitBias:
    return _affine_product(operation, y, operation.argument(3, "bias"))


def _added_product(operation: Operation, y: Tensor) -> ImplicitBias:
    """addmm and its relatives: ``β input + α product``."""
    given = operation.args[0]
    m = len(signal_operands(operation.args, operation.kwargs)) - carries_signal(given)
    additive = given.detach() * operation.kwargs.get("beta", 1)
    constant = None if carries_signal(given) else additive
    return ImplicitBias(constant, None if m == 1 else (y - additive) * (1 - m))


def _quotient(operation: Operation, y: Tensor) -> ImplicitBias:
    if operation.kwargs.get("rounding_mode") is not None:
        return ImplicitBias(curvature=y.clone())
    above, below = map(carries_signal, operation.args[:2])
    degree = int(above) - int(below)
    return ZERO if degree == 1 else ImplicitBias(curvature=y * (1 - degree))


def _full(value: Any, y: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=y.dtype, device=y.device)


def _sum(operation: Operation, y: Tensor, sign: int = 1) -> ImplicitBias:
    left, right = operation.args[0], operation.argument(1, "other")
    if carries_signal(left) and carries_signal(right):
        return ZERO
    alpha = sign * operation.kwargs.get("alpha", 1)
    signal, constant, scale = (left, right, alpha) if carries_signal(left) else (right, left, 1)
    if isinstance(constant, (int, float)):
        return ImplicitBias(_full(constant * scale, y)) if constant else ZERO
    constant = _full(constant, y)
    constant = kept(constant) if scale == 1 else constant.detach() * scale
    if y.is_floating_point():
        removed = constant.abs() >= torch.finfo(y.dtype).max / 4
        if bool(removed.any()):
            # such a mask swallows the signal it is added to; where a whole row is removed, that still counts
            swallowed = -(signal.detach() if signal is left else signal.detach() * alpha)
            constant = torch.where(removed, swallowed.to(y.dtype), constant)
            return ImplicitBias(finite(constant))
    return ImplicitBias(constant)


def _difference(operation: Operation, y: Tensor) -> ImplicitBias:
    return _sum(operation, y, -1)


def _degree(degree: float) -> ClosedForm:
    def form(operation: Operation, y: Tensor) -> ImplicitBias:
        return ImplicitBias(curvature=y * (1 - degree))

    return form


def _power(operation: Operation, y: Tensor) -> ImplicitBias | None:
    base, exponent = operation.args[0], operation.argument(1, "exponent")
    if not carries_signal(base) or carries_signal(exponent):
        return NOT_CLOSED
    return (
        ZERO
        if isinstance(exponent, (int, float)) and exponent == 1
        else ImplicitBias(curvature=y * (1 - exponent))
    )


PRODUCTS: Final[Mapping[str, ClosedForm]] = {
    **dict.fromkeys(
        names(
            """
            mul matmul mm bmm mv dot vdot inner outer ger kron cross linalg_cross tensordot linalg_vecdot
            chain_matmul linalg_multi_dot einsum _grouped_mm _trilinear embedding_bag
            """
        ),
        _products,
    ),
    **dict.fromkeys(names("linear conv_tbc"), _linear),
    **dict.fromkeys(
        names("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution"),
        _convolution,
    ),
    "bilinear": _bilinear,
    **dict.fromkeys(names("addmm baddbmm addbmm addmv addr addcmul"), _added_product),
    "div": _quotient,
    "add": _sum,
    "sub": _difference,
    "square": _degree(2),
    "sqrt": _degree(0.5),
    "rsqrt": _degree(-0.5),
    "reciprocal": _degree(-1),
    "var": _degree(2),
    "pow": _power,
}
