"""Normalisation: the spread is constant, the centring stays alive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...core.operations import is_nonlinear
from ...core.overrides import PASS, Operation, with_gradient_of
from .surrogate import carries_signal, names, scaled_gradient

__all__ = ["CosineRule", "NormRule"]


class _Normalised(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor, scale: Tensor, weight: Tensor, shape: Any, dims: Any) -> Tensor:
        return value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, _, scale, weight, ctx.shape, ctx.dims = inputs
        ctx.input_shape, ctx.dtype = x.shape, x.dtype
        ctx.save_for_backward(scale, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        scale, weight = ctx.saved_tensors
        coefficient = grads[0].reshape(ctx.shape) * weight
        if ctx.dims:
            coefficient = coefficient - coefficient.mean(ctx.dims, keepdim=True)
        return (coefficient * scale).reshape(ctx.input_shape).to(ctx.dtype), None, None, None, None, None


class _Layout(NamedTuple):
    """How the input is seen as groups: its shape, the dimensions of a group, the weight in that shape, epsilon."""

    shape: tuple[int, ...]
    dims: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    epsilon: float | None
    centred: bool = True


@dataclass(frozen=True)
class NormRule:
    """``y = (x - mean) / √(var + ε) · γ + β`` with the root constant: ``(I - 11ᵀ/N)(γ ⊙ c) / √(var + ε)`` flows back.

    RMS norm has no mean: ``γ ⊙ c / rms``. Holds for layer, RMS, group and instance norm, and for batch norm with batch
    statistics; hand-written ones follow from the rules for roots and variances. β takes its own share. A γ that is
    computed from the signal shares by the half rule.

    Source: Ali et al. 2022, eq. 11, the variant with a live mean, the only conserving one.
    """

    operations: ClassVar[frozenset[str]] = names(
        """
        layer_norm native_layer_norm rms_norm _fused_rms_norm group_norm native_group_norm instance_norm
        batch_norm
        """
    )
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        x = operation.args[0]
        if operation.name == "batch_norm" and not is_nonlinear(
            "batch_norm", operation.args, operation.kwargs
        ):
            return PASS
        layout = _LAYOUTS[operation.name](operation) if operation.name in _LAYOUTS else None
        if layout is None:
            return PASS
        with torch.no_grad():
            result = operation.value()
            wide = x.detach().reshape(layout.shape).to(torch.promote_types(x.dtype, torch.float32))
            square = (
                wide.var(layout.dims, unbiased=False, keepdim=True)
                if layout.centred
                else wide.square().mean(layout.dims, keepdim=True)
            )
            epsilon = torch.finfo(x.dtype).eps if layout.epsilon is None else layout.epsilon
            scale = (square + epsilon).rsqrt().to(x.dtype)
        value = result[0] if isinstance(result, tuple) else result
        dims = layout.dims if layout.centred else ()
        if carries_signal(layout.weight) or carries_signal(layout.bias):
            covered = with_gradient_of(value, _modulated(x, value, scale, layout, dims))
        else:
            weight = value.new_ones(()) if layout.weight is None else layout.weight
            covered = _Normalised.apply(x, value, scale, weight, layout.shape, dims)  # type: ignore[no-untyped-call]
        return (covered, *result[1:]) if isinstance(result, tuple) else covered


def _modulated(x: Tensor, value: Tensor, scale: Tensor, layout: _Layout, dims: tuple[int, ...]) -> Tensor:
    """Weight and bias computed from the signal, as in adaptive norms."""
    with torch.no_grad():
        seen = x.reshape(layout.shape)
        normalised = ((seen - seen.mean(dims, keepdim=True) if dims else seen) * scale).reshape(x.shape)
    one = value.new_ones(())
    result: Tensor = _Normalised.apply(x, normalised, scale, one, layout.shape, dims)  # type: ignore[no-untyped-call]
    result = result.reshape(layout.shape)
    if layout.weight is not None:
        both = carries_signal(x) and carries_signal(layout.weight)
        result = result * layout.weight
        result = scaled_gradient(result, 0.5) if both else result
    if layout.bias is not None:
        result = result + layout.bias
    return result.reshape(x.shape).to(value.dtype)


def _last(operation: Operation, place_of_epsilon: int, centred: bool = True) -> _Layout:
    x = operation.args[0]
    shape = operation.argument(1, "normalized_shape")
    count = 1 if isinstance(shape, int) else len(shape)
    weight, bias = operation.argument(2, "weight"), operation.argument(3, "bias") if centred else None
    epsilon = operation.argument(place_of_epsilon, "eps", 1e-5 if centred else None)
    return _Layout(tuple(x.shape), tuple(range(-count, 0)), weight, bias, epsilon, centred)


def _groups(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> _Layout:
    batch, channels = x.shape[:2]
    shape = (batch, groups, channels // groups, x[0, 0].numel())
    factor, added = (
        None if each is None else each.reshape(1, groups, channels // groups, 1) for each in (weight, bias)
    )
    return _Layout(shape, (2, 3), factor, added, epsilon)


def _group(operation: Operation) -> _Layout:
    x = operation.args[0]
    return _groups(
        x,
        operation.argument(1, "num_groups"),
        operation.argument(2, "weight"),
        operation.argument(3, "bias"),
        operation.argument(4, "eps", 1e-5),
    )


def _native_group(operation: Operation) -> _Layout:
    x, weight, bias = operation.args[0], operation.argument(1, "weight"), operation.argument(2, "bias")
    return _groups(x, operation.argument(6, "group"), weight, bias, operation.argument(7, "eps"))


def _instance(operation: Operation) -> _Layout | None:
    x = operation.args[0]
    if not operation.argument(5, "use_input_stats", True):
        return None
    weight, bias = operation.argument(3, "weight"), operation.argument(4, "bias")
    return _groups(x, x.shape[1], weight, bias, operation.argument(7, "eps", 1e-5))


def _batch(operation: Operation) -> _Layout:
    x, dims = operation.args[0], (0, *range(2, operation.args[0].dim()))
    factor, added = (
        None if each is None else each.reshape(1, -1, *[1] * (x.dim() - 2))
        for each in (operation.argument(3, "weight"), operation.argument(4, "bias"))
    )
    return _Layout(tuple(x.shape), dims, factor, added, operation.argument(7, "eps", 1e-5))


_LAYOUTS: dict[str, Callable[[Operation], _Layout | None]] = {
    "layer_norm": lambda operation: _last(operation, 4),
    "native_layer_norm": lambda operation: _last(operation, 4),
    "rms_norm": lambda operation: _last(operation, 3, centred=False),
    "_fused_rms_norm": lambda operation: _last(operation, 3, centred=False),
    "group_norm": _group,
    "native_group_norm": _native_group,
    "instance_norm": _instance,
    "batch_norm": _batch,
}


@dataclass(frozen=True)
class CosineRule:
    """``cos(a, b) = a·b / (‖a‖ ‖b‖)`` with both norms constant: a half-rule product of normalised signals."""

    operations: ClassVar[frozenset[str]] = frozenset({"cosine_similarity"})
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        left, right = operation.args[0], operation.argument(1, "x2")
        dim, epsilon = operation.argument(2, "dim", 1), operation.argument(3, "eps", 1e-8)
        with torch.no_grad():
            value = operation.value()
        lengths = [each.detach().norm(dim=dim, keepdim=True).clamp_min(epsilon) for each in (left, right)]
        surrogate = ((left / lengths[0]) * (right / lengths[1])).sum(dim)
        both = carries_signal(left) and carries_signal(right)
        return with_gradient_of(value, surrogate * 0.5 if both else surrogate)
