"""Small derivative replacements that the rules share: a scaled gradient, and a gradient through a given ratio."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ...core.audit import MARK, Mark

__all__ = [
    "carries_signal",
    "constant",
    "names",
    "operation_behind",
    "scaled_gradient",
    "through_ratio",
    "unhooked",
]


def unhooked() -> AbstractContextManager[None]:
    """For a rule's own small backward: what it saves is no concern of a checkpoint around it."""
    hooks: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(_itself, _itself)
    return hooks


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class _Scaled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, factor: float) -> Tensor:
        return value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0] * ctx.factor


class _ThroughRatio(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor, ratio: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (ratio,) = ctx.saved_tensors
        return (grads[0] * ratio).to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (ratio,) = ctx.saved_tensors
        return tangents[0] * ratio


def scaled_gradient(value: Tensor, factor: float) -> Tensor:
    """``value``, whose gradient is multiplied by ``factor`` on the way back.

    >>> x = torch.ones(1, requires_grad=True)
    >>> torch.autograd.grad(scaled_gradient(x * 3, 0.5), x)
    (tensor([1.5000]),)
    """
    result: Tensor = _Scaled.apply(value, factor)  # type: ignore[no-untyped-call]
    return result


def through_ratio(x: Tensor, value: Tensor, ratio: Tensor) -> Tensor:
    """``value``, with the derivative of ``x * ratio`` for a constant ratio of x's shape."""
    result: Tensor = _ThroughRatio.apply(x, value.detach(), ratio)  # type: ignore[no-untyped-call]
    return result


def names(text: str) -> frozenset[str]:
    """The operations that a text names."""
    return frozenset(text.split())


def carries_signal(value: object) -> bool:
    """Whether relevance can flow through it: a tensor that something differentiates."""
    return isinstance(value, Tensor) and value.requires_grad


def operation_behind(value: Tensor) -> str | None:
    """The name of the operation that made the tensor, if a mode saw it."""
    node: Any = value.grad_fn
    mark = None if node is None else node.metadata.get(MARK)
    return mark.operation if isinstance(mark, Mark) else None


def constant(value: Any) -> Any:
    """The value, or each tensor of a nest, cut from what it was computed from."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(constant, value))
    if isinstance(value, (list, tuple)):
        # results such as torch.return_types.var_mean take one sequence
        return type(value)(map(constant, value))
    return value
