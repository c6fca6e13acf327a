"""Rules and the gradient under them, shared by the tests of overrides and of the audit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.overrides import Operation, overrides, with_gradient_of

__all__ = ["Detach", "DetachQueries", "Scaled", "points", "ruled_gradient"]


@dataclass(frozen=True)
class Scaled:
    """The derivative of the operations is replaced by ``slope`` times the input's."""

    operations: tuple[str, ...] = ("relu",)
    slope: float = 0.5
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        return with_gradient_of(operation.value(), self.slope * operation.args[0])


@dataclass(frozen=True)
class Detach:
    operations: tuple[str, ...] = ("softmax",)
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        return operation.value().detach()


@dataclass(frozen=True)
class DetachQueries:
    operations: tuple[str, ...] = ("scaled_dot_product_attention",)
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        query, key, *rest = operation.args
        return operation.function(query.detach(), key.detach(), *rest, **operation.kwargs)


def points(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal draws that require a gradient, the same in every dtype."""
    draw = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draw.to(dtype).requires_grad_()


def ruled_gradient(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    weight: Tensor,
    rules: list[Any],
    module: nn.Module | None = None,
) -> Tensor:
    """The gradient of Σ weight · run(x) under the rules."""
    with overrides(module or nn.Identity(), rules):
        return torch.autograd.grad((run(x) * weight).sum(), x)[0]
