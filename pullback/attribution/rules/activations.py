"""The identity rule: an activation passes relevance on unchanged, as the line through zero and its value."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.overrides import PASS, Operation
from .surrogate import carries_signal, constant, names, operation_behind, through_ratio, unhooked

__all__ = ["IdentityRule", "OpaqueActivation", "ShiftedIdentityRule", "TanhGate", "secant"]

SAMPLES = 64


def secant(x: Tensor, value: Tensor, slope: float, at_zero: float = 0.0) -> Tensor:
    """``value = g(x)`` with the derivative (g(x) - g(0)) / x, and ``slope`` = g'(0) where x is too small to divide by.

    The ratio is taken in float32 for half precision.

    >>> x = torch.tensor([0.0, 2.0], requires_grad=True)
    >>> torch.autograd.grad(secant(x, torch.nn.functional.relu(x), 0.0).sum(), x)
    (tensor([0., 1.]),)
    """
    with torch.no_grad():
        ratio = _ratio(x.detach(), value.detach(), slope, at_zero)
    return through_ratio(x, value, ratio.to(x.dtype))


def _ratio(x: Tensor, value: Tensor, slope: float | Tensor, at_zero: float = 0.0) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    below, above = x.to(wide), value.to(wide)
    above = above - at_zero if at_zero else above
    return torch.where(below.abs() < torch.finfo(wide).tiny ** 0.5, slope, above / below)


@functools.lru_cache(maxsize=256)
def _at_zero(function: Any, dtype: torch.dtype, args: tuple[Any, ...], kwargs: Any) -> tuple[float, float]:
    with torch.enable_grad(), unhooked():
        zero = torch.zeros(1, dtype=dtype, requires_grad=True)
        value = function(zero, *args, **dict(kwargs))
        (slope,) = torch.autograd.grad(value.sum(), zero)
    return float(value.detach()), float(slope)


@dataclass(frozen=True)
class IdentityRule:
    """``R_in = R_out`` at an activation with g(0) = 0: the coefficient is multiplied by g(x) / x, at zero by g'(0).

    Piecewise linear ones are left to the gradient, which is the same. Activations with g(0) ≠ 0 are passed on; where
    arguments are tensors (the bounds of a clamp), entries with g(0) ≠ 0 keep the gradient. Bounds that carry signal
    themselves make a maximum, whose gradient conserves.

    Source: Ali et al. 2022, section 3; Jafari et al. 2024 (MambaLRP), eq. 7. The limit at zero is what patching needs:
    RelP multiplies coefficients with differences of activations, not with the activation, which would hide it.
    """

    operations: ClassVar[frozenset[str]] = names(
        """
        gelu silu mish hardswish elu selu celu  relu6 hardtanh tanh softshrink hardshrink threshold
        clamp clamp_min clamp_max tan asin atan sinh asinh atanh expm1 log1p
        """
    )
    family: ClassVar[str] = "activation"
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        x = operation.args[0]
        others = (*operation.args[1:], *operation.kwargs.values())
        if not carries_signal(x) or x.is_complex() or any(map(carries_signal, others)):
            return PASS
        if any(isinstance(each, Tensor) for each in others):
            return _entry_by_entry(operation)
        dtype = torch.promote_types(x.dtype, torch.float32)
        keywords = tuple(sorted(operation.kwargs.items()))
        at_zero, slope = _at_zero(operation.function, dtype, operation.args[1:], keywords)
        if at_zero != 0:
            return PASS
        with torch.no_grad():
            value = operation.value()
        return secant(x, value, slope)


def _entry_by_entry(operation: Operation) -> Tensor:
    """The identity rule where arguments are tensors, so that every entry has a function g of its own."""
    with torch.no_grad():
        value: Tensor = operation.value()
    x = operation.args[0].expand(value.shape)
    with torch.enable_grad(), unhooked():
        here, zero = x.detach().clone().requires_grad_(), torch.zeros_like(x, requires_grad=True)
        at_zero = replace(operation, args=(zero, *operation.args[1:])).value()
        again = replace(operation, args=(here, *operation.args[1:])).value()
        own, slope = torch.autograd.grad([again.sum(), at_zero.sum()], [here, zero])
    with torch.no_grad():
        ratio = torch.where(at_zero == 0, _ratio(x, value, slope).to(own.dtype), own)
    return through_ratio(x, value, ratio)


@dataclass(frozen=True)
class ShiftedIdentityRule:
    """For a sigmoid or softplus that carries the signal, as a hidden activation: ``g(x) = g(0) + x · ratio``.

    The presets take them for gates, which is what they are in most architectures, and hold them constant. Put this rule
    before a preset to let relevance through: ``Relevance((ShiftedIdentityRule(("sigmoid",)), *PRESETS["relp"]))``. The
    constant g(0) absorbs its share, as a bias does.

    Args:
        operations: names of elementwise operations.
        within: pattern of a module's path or class.
    """

    operations: tuple[str, ...]
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        x = operation.args[0]
        dtype = torch.promote_types(x.dtype, torch.float32)
        keywords = tuple(sorted(operation.kwargs.items()))
        at_zero, slope = _at_zero(operation.function, dtype, operation.args[1:], keywords)
        with torch.no_grad():
            value = operation.value()
        return secant(x, value, slope, at_zero)


@dataclass(frozen=True)
class TanhGate:
    """``c + tanh(u)``, c a number other than zero, is a gate: constant. So hand-written GELUs obey the identity rule.

    ``x · ½ (1 + tanh(...))`` then has the coefficient g(x) / x.
    """

    operations: ClassVar[frozenset[str]] = frozenset({"add", "sub"})
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        if len(operation.args) < 2:
            return PASS
        left, right = operation.args[:2]
        tensor, number = (left, right) if carries_signal(left) else (right, left)
        if not carries_signal(tensor) or operation_behind(tensor) != "tanh":
            return PASS
        if isinstance(number, Tensor) and (number.dim() or carries_signal(number)):
            return PASS
        if not number:
            return PASS
        with torch.no_grad():
            return operation.value()


@dataclass(frozen=True)
class OpaqueActivation:
    """The identity rule for an activation module whose inside cannot be seen: a script, a custom Function, a kernel.

    Such a module has no parameters and no children, maps one tensor to one of its shape, and is called an activation.
    That it works entry by entry is verified on shuffled entries, and g(0) = 0 is too; otherwise it is left alone, and
    the audit names it.
    """

    operations: ClassVar[frozenset[str]] = frozenset({"opaque_module"})
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        x = operation.args[0]
        if not carries_signal(x) or not x.is_floating_point():
            return PASS
        slope = _elementwise_slope(operation.function, x)
        return PASS if slope is None else secant(x, constant(operation.value()), slope)


def _elementwise_slope(function: Any, x: Tensor) -> float | None:
    """g'(0) of an elementwise function with g(0) = 0, else None."""
    sample = x.detach().flatten()[:SAMPLES].clone()
    order = torch.arange(len(sample) - 1, -1, -1, device=x.device)
    with torch.enable_grad(), unhooked():
        zero = torch.zeros(1, dtype=x.dtype, device=x.device, requires_grad=True)
        at_zero = function(zero)
        (slope,) = torch.autograd.grad(at_zero.sum(), zero)
        forwards, backwards = function(sample).detach(), function(sample[order]).detach()
    alone = function(sample[:1]).detach()
    elementwise = torch.allclose(forwards[order], backwards) and torch.allclose(forwards[:1], alone)
    return float(slope) if elementwise and not at_zero.detach().any() else None
