"""Attention: three ways to send relevance back through a softmax of scores and the values it weighs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.overrides import Operation, with_gradient_of
from .surrogate import carries_signal, constant, scaled_gradient

__all__ = ["ATTENTION", "AttnLRPAttention", "ConstantAttention", "GradientAttention"]

SCALED_DOT_PRODUCT = "scaled_dot_product_attention"
MATRIX_PRODUCTS = frozenset({"matmul", "bmm", "mm", "baddbmm", "einsum"})


@dataclass(frozen=True)
class ConstantAttention:
    """The attention rule: the weights are constant, so that all relevance goes to the values they weigh.

    ``o_i = Σ_j p_ij v_j`` sends ``Σ_i p_ij c_i`` to v_j and nothing to queries and keys. Every softmax is held
    constant, a router's too. The only setting that conserves relevance.

    Source: Ali et al. 2022, eq. 8 (AH rule).
    """

    operations: ClassVar[frozenset[str]] = frozenset({"softmax", SCALED_DOT_PRODUCT})
    family: ClassVar[str] = "attention"
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        if operation.name == "softmax":
            with torch.no_grad():
                return operation.value()
        query, key, *others = operation.args
        value, mask = (*others, None)[0], operation.argument(3, "attn_mask")
        rest = tuple(map(constant, others[1:]))
        named = {name: constant(each) for name, each in operation.kwargs.items()}
        if not carries_signal(value):
            with torch.no_grad():
                return operation.value()
        held = operation.function(query.detach(), key.detach(), value, *rest, **named)
        if not carries_signal(mask):
            return held
        # another kernel runs for a mask that requires grad, with other rounding: keep its value
        with torch.no_grad():
            native = _with_live_mask(operation)
        return with_gradient_of(native, held)


def _with_live_mask(operation: Operation) -> Tensor:
    with torch.enable_grad():
        native: Tensor = operation.value()
    return native.detach()


@dataclass(frozen=True)
class GradientAttention:
    """Attention keeps its ordinary gradient: softmax, the fused kernel, and the matrix products on both sides.

    Relevance is not conserved. This is what RelP's published code does by default.
    """

    operations: ClassVar[frozenset[str]] = frozenset({"softmax", SCALED_DOT_PRODUCT}) | MATRIX_PRODUCTS
    family: ClassVar[str] = "attention"
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        return operation.value()


@dataclass(frozen=True)
class AttnLRPAttention:
    """AttnLRP: the softmax keeps its gradient, both matrix products follow the half rule.

    For the fused kernel that is ¼ of the gradient to query and key and ½ to the value. Relevance is not conserved: the
    softmax keeps what its Taylor expansion calls a bias.

    Source: Achtibat et al. 2024, eqs. 13 and 14.
    """

    operations: ClassVar[frozenset[str]] = frozenset({"softmax", SCALED_DOT_PRODUCT})
    family: ClassVar[str] = "attention"
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        if operation.name == "softmax":
            return operation.value()
        shares = (0.25, 0.25, 0.5)
        args = tuple(
            scaled_gradient(each, shares[position]) if position < 3 and carries_signal(each) else each
            for position, each in enumerate(operation.args)
        )
        mask = operation.argument(3, "attn_mask")
        if carries_signal(mask):
            # the mask is added to the scores: it receives what the softmax's half of the output product brings
            halved = scaled_gradient(mask, 0.5)
            if len(args) > 3:
                args = (*args[:3], halved, *args[4:])
            else:
                return operation.function(*args, **{**operation.kwargs, "attn_mask": halved})
        return operation.function(*args, **operation.kwargs)


ATTENTION: dict[str, Any] = {
    "detach": ConstantAttention(),
    "gradient": GradientAttention(),
    "attnlrp": AttnLRPAttention(),
}
