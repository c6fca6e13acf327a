"""The implicit bias of any operation: what is left of its result when ``Σ J_i x_i`` is taken away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ...core.audit import flattened
from ...core.overrides import Operation
from ..rules.surrogate import carries_signal
from .activations import ACTIVATIONS
from .norms import NORMALISATIONS
from .operations import AFFINE, ELEMENTWISE, NORMS
from .parts import ClosedForm, ImplicitBias, finite, signal_operands, with_operands
from .products import PRODUCTS

__all__ = ["CLOSED_FORMS", "ImplicitBias", "differentiable", "implicit_bias"]

CLOSED_FORMS: Final[dict[str, ClosedForm]] = {**PRODUCTS, **NORMALISATIONS, **ACTIVATIONS}


def differentiable(result: Any) -> list[Tensor]:
    """The tensors of a result through which something is differentiated."""
    return [each for each in flattened(result) if carries_signal(each)]


def implicit_bias(operation: Operation, result: Any) -> tuple[ImplicitBias, ...] | None:
    """``b = y - Σ J_i x_i`` for each differentiable tensor y of an operation's result, or None if unknown.

    The sum runs over the operands that carry signal (require grad); everything else is a constant. Closed
    forms first, then slopes or Jacobian-vector products from autograd itself.

    Args:
        operation: the call, in canonical form.
        result: its native result, before any in-place operation changes it.

    Returns:
        one :class:`ImplicitBias` for each differentiable tensor of the result, in order; its parts broadcast
        to that tensor.

    Example:
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> square = Operation("square", torch.square, (x,), {})
        >>> implicit_bias(square, square.value())[0].total()
        tensor([-9.])
    """
    values = differentiable(result)
    with torch.no_grad():
        if len(values) == 1 and (form := CLOSED_FORMS.get(operation.name)) is not None:
            found = form(operation, values[0].detach())
            if found is not None:
                return (found,)
        if operation.name in ("max", "min") and not isinstance(operation.argument(1, "other"), Tensor):
            return (ImplicitBias(),) * len(values)
        if operation.name in AFFINE:
            return _affine(operation, values)
        if operation.name in NORMS and _is_norm(operation):
            return (ImplicitBias(),) * len(values)
    if operation.name == "scaled_dot_product_attention" and operation.argument(4, "dropout_p", 0.0):
        return None  # its draws cannot be repeated
    every = [*signal_operands(operation.args, operation.kwargs), *values]
    if operation.name in ELEMENTWISE and not any(each.is_complex() for each in every):
        return (_elementwise(operation, values[0]),)
    return _by_product(operation, result, values)


def _is_norm(operation: Operation) -> bool:
    return bool(operation.argument(1, "p" if operation.name == "norm" else "ord", 2) != 0)


def _affine(operation: Operation, values: Sequence[Tensor]) -> tuple[ImplicitBias, ...] | None:
    """The result where every operand with signal is zero."""
    operands = signal_operands(operation.args, operation.kwargs)
    if operation.name in ("pad", "constant_pad_nd"):
        if not operation.argument(3 if operation.name == "pad" else 2, "value", 0):
            return (ImplicitBias(),)
    elif operation.name == "where":
        if len(operands) == 2:
            return (ImplicitBias(),)
    elif operation.name in ("cat", "stack", "hstack", "vstack", "dstack", "column_stack", "block_diag"):
        tensors = operation.argument(0, "tensors")
        tensors = operation.args if isinstance(tensors, Tensor) else tensors
        # a cache of keys and values begins as an empty tensor
        if all(carries_signal(each) or not each.numel() for each in tensors):
            return (ImplicitBias(),)
    (y,) = values
    constant = with_operands(operation, [torch.zeros_like(each) for each in operands]).value()
    if constant.is_floating_point():
        # entries as large as a dtype's least number stand for "removed", as -∞ does
        constant = constant.masked_fill(constant.abs() >= torch.finfo(constant.dtype).max / 4, 0)
        constant = finite(constant)
    return (ImplicitBias(constant.to(y.dtype)),)


def _elementwise(operation: Operation, y: Tensor) -> ImplicitBias:
    operands = signal_operands(operation.args, operation.kwargs)
    with torch.enable_grad():
        points = [each.detach().expand(y.shape).requires_grad_() for each in operands]
        value = with_operands(operation, points).value()
        slopes = torch.autograd.grad(value, points, torch.ones_like(value), allow_unused=True)
    with torch.no_grad():
        bias = y.detach().clone()
        for point, slope in zip(points, slopes, strict=True):
            if slope is not None:
                bias -= finite(slope * point)
        bias = finite(bias)
    return ImplicitBias(curvature=bias)


def _by_product(
    operation: Operation, result: Any, values: Sequence[Tensor]
) -> tuple[ImplicitBias, ...] | None:
    """From Jacobian-vector products: forward mode, or the derivative of the vector-Jacobian product."""
    operands = [each.detach() for each in signal_operands(operation.args, operation.kwargs)]
    places = [place for place, each in enumerate(flattened(result)) if carries_signal(each)]

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        found = flattened(with_operands(operation, given).value())
        return tuple(found[place] for place in places)

    for products in (_forward, _double_backward, _forward_decomposed):
        try:
            again, moved = products(call, operands)
        except (RuntimeError, NotImplementedError):
            continue
        if all(
            torch.allclose(a, y, rtol=1e-3, atol=1e-3 * float(y.abs().max()) if y.numel() else 0.0)
            for a, y in zip(again, (each.detach() for each in values), strict=True)
        ):
            return tuple(
                ImplicitBias(curvature=finite(y.detach() - move))
                for y, move in zip(values, moved, strict=True)
            )
    return None


def _forward(call: Callable[..., Any], operands: list[Tensor]) -> tuple[Any, Any]:
    with torch.no_grad():
        found: tuple[Any, Any] = torch.func.jvp(call, tuple(operands), tuple(operands))  # type: ignore[assignment]
    return found


def _forward_decomposed(call: Callable[..., Any], operands: list[Tensor]) -> tuple[Any, Any]:
    """oneDNN's fused recurrent kernels have no such derivatives; what they are made of has."""
    (enabled, *_) = torch.backends.mkldnn.set_flags(False)
    try:
        return _forward(call, operands)
    finally:
        torch.backends.mkldnn.set_flags(enabled)


def _double_backward(call: Callable[..., Any], operands: list[Tensor]) -> tuple[Any, Any]:
    with torch.enable_grad():
        points = [each.clone().requires_grad_() for each in operands]
        values = call(*points)
        covectors = [torch.zeros_like(each, requires_grad=True) for each in values]
        pulled = torch.autograd.grad(values, points, covectors, create_graph=True, allow_unused=True)
        pairs = [(found, point) for found, point in zip(pulled, operands, strict=True) if found is not None]
        moved = torch.autograd.grad([found for found, _ in pairs], covectors, [point for _, point in pairs])
    return [each.detach() for each in values], moved
