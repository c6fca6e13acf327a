"""Linear and convolution calls as bias-free maps y = W x with one live operand, and a derivative by any rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import torch
from torch import Tensor

from ...core.errors import MethodError
from ...core.overrides import PASS, Operation, rules_paused, with_gradient_of

__all__ = [
    "OPERATIONS",
    "AppliesTo",
    "LinearCall",
    "LinearMap",
    "Propagation",
    "known_call",
    "propagate",
    "require_scope",
    "ruled",
]

AppliesTo = Literal["all", "convolution", "dense"]

_CONVOLUTIONS: Final = frozenset(
    ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"]
)
_DENSE: Final = frozenset(["linear", "addmm", "matmul", "mm", "bmm"])
OPERATIONS: Final[dict[str, frozenset[str]]] = {
    "all": _CONVOLUTIONS | _DENSE,
    "convolution": _CONVOLUTIONS,
    "dense": _DENSE,
}
_KNOWN: Final = "_pullback_linear_call"


@dataclass(frozen=True, eq=False)
class LinearMap:
    """The map (x, weight) -> y of one call, without its bias.

    ``weight_first`` is true where the live operand is the right one (``W @ x``).
    """

    name: str
    function: Callable[..., Any]
    rest: tuple[Any, ...] = ()
    named: tuple[tuple[str, Any], ...] = ()
    weight_first: bool = False

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.name in ("matmul", "mm", "bmm"):
            product: Tensor = self.function(weight, x) if self.weight_first else self.function(x, weight)
        elif self.name == "addmm":
            product = torch.mm(weight, x) if self.weight_first else torch.mm(x, weight)
        else:
            product = self.function(x, weight, None, *self.rest, **dict(self.named))
        return product

    def scaled(self, weight: Tensor, scale: Tensor, y: Tensor) -> Tensor | None:
        """The weight with output channel k (dimension 1 of y) multiplied by scale_k; None where y has no such."""
        if self.name in _CONVOLUTIONS:
            if y.dim() != weight.dim():
                return None  # no batch dimension, so dimension 1 is a place
            groups = self._transposed_groups()
            if groups is None:
                return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
            inputs, outputs, *kernel = weight.shape
            blocks = weight.reshape(groups, inputs // groups, outputs, *kernel)
            return (blocks * scale.reshape(groups, 1, outputs, *[1] * len(kernel))).reshape(weight.shape)
        if y.dim() != 2 or self.weight_first:
            return None
        return weight * (scale[:, None] if self.name == "linear" else scale)

    def _transposed_groups(self) -> int | None:
        named = dict(self.named)
        if self.name == "convolution":
            given = dict(enumerate(self.rest))
            groups = given.get(5, named.get("groups", 1))
            return int(groups) if given.get(3, named.get("transposed", False)) else None
        if self.name.startswith("conv_transpose"):
            return int(self.rest[3] if len(self.rest) > 3 else named.get("groups", 1))
        return None


@dataclass(frozen=True, eq=False)
class LinearCall:
    """One call y = W x + b: its map, the live x, the constant weight, and the bias as it broadcasts to y."""

    linear: LinearMap
    x: Tensor
    weight: Tensor
    bias: Tensor | None


class Propagation(Protocol):
    """How a linear rule sends a coefficient back through y = W x + b."""

    def coefficient(
        self, linear: LinearMap, x: Tensor, weight: Tensor, bias: Tensor | None, outgoing: Tensor
    ) -> Tensor:
        """The coefficient of x, of its shape, for the coefficient ``outgoing`` of y."""
        ...


def _bind(operation: Operation) -> LinearCall | None:
    name, argument = operation.name, operation.argument
    bias: Any = None
    rest: tuple[Any, ...] = ()
    named: dict[str, Any] = {}
    scale: Any = 1
    if name in ("matmul", "mm", "bmm"):
        left, right = argument(0, "input"), argument(1, "other" if name == "matmul" else "mat2")
    elif name == "addmm":
        if len(operation.args) > 3:
            return None
        bias, left, right = argument(0, "input"), argument(1, "mat1"), argument(2, "mat2")
        scale = operation.kwargs.get("alpha", 1)
        beta = operation.kwargs.get("beta", 1)
        bias = None if beta == 0 else bias * beta if beta != 1 else bias
    else:
        left, right, bias = argument(0, "input"), argument(1, "weight"), argument(2, "bias")
        named = {k: v for k, v in operation.kwargs.items() if k not in ("input", "weight", "bias")}
        rest = operation.args[3:]
    operands = left, right
    if not all(isinstance(value, Tensor) and value.is_floating_point() for value in operands):
        return None
    live = [value.requires_grad for value in operands]
    if not any(live):  # inside vmap nothing says so, and what is batched is taken for the signal
        live = [torch._C._functorch.is_functorch_wrapped_tensor(value) for value in operands]
    swapped = name in ("matmul", "mm", "bmm", "addmm") and live == [False, True]
    if live != [not swapped, swapped]:
        return None
    x, weight = (right, left) if swapped else (left, right)
    if bias is not None and name in _CONVOLUTIONS:
        bias = bias.reshape(-1, *[1] * (weight.dim() - 2))
    weight = weight * scale if scale != 1 else weight
    return LinearCall(
        LinearMap(name, operation.function, rest, tuple(named.items()), swapped), x, weight, bias
    )


class _Propagated(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        value: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, linear: LinearMap, rule: Propagation
    ) -> Tensor:
        return value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, weight, bias, ctx.linear, ctx.rule = inputs
        # y is computed anew: to keep it would fail where an activation overwrites it
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias = ctx.saved_tensors
        common = torch.promote_types(x.dtype, weight.dtype)  # they differ under autocast
        with rules_paused(), torch.autocast(x.device.type, enabled=False):
            constants = (None if value is None else value.to(common) for value in (weight, bias))
            coefficient = ctx.rule.coefficient(ctx.linear, x.to(common), *constants, grads[0])
        return None, coefficient.to(x.dtype), None, None, None, None


def propagate(value: Tensor, call: LinearCall, rule: Propagation) -> Tensor:
    """``value``, bit for bit, as the result of ``call`` with the derivative of ``rule``.

    The result remembers the call (:func:`known_call`), so that what follows may be merged into it.
    """
    result: Tensor = _Propagated.apply(  # type: ignore[no-untyped-call]
        value, call.x, call.weight, call.bias, call.linear, rule
    )
    setattr(result, _KNOWN, (call, rule, result._version))
    return result


def known_call(y: Tensor) -> tuple[LinearCall, Propagation] | None:
    """The call and the rule that y is the untouched result of, or None."""
    known = getattr(y, _KNOWN, None)
    if known is None or known[2] != y._version:
        return None  # written to since: no longer that call's result
    return known[:2]  # type: ignore[no-any-return]


def ruled(operation: Operation, rule: Propagation) -> Any:
    """The operation with the derivative of ``rule``; PASS unless exactly one operand carries signal."""
    call = _bind(operation)
    if call is None:
        return PASS
    with torch.no_grad():
        value: Tensor = operation.value()
    if call.bias is None or not call.bias.requires_grad:
        return propagate(value, call, rule)
    # a bias that carries signal is a sum, as if written W x + b in two steps
    product = LinearCall(call.linear, call.x, call.weight, None)
    with torch.no_grad():
        alone = call.linear(call.x, call.weight)
    return with_gradient_of(value, propagate(alone, product, rule) + call.bias)


def require_scope(rule: str, applies_to: str) -> None:
    """Raise MethodError unless ``applies_to`` names a kind of linear operation."""
    if applies_to not in OPERATIONS:
        raise MethodError(
            f'{rule}(applies_to={applies_to!r}): expected "all", "convolution" or "dense". '
            f'Try {rule}(applies_to="convolution").'
        )
