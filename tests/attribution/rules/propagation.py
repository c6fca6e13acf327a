"""What the tests of rules share: the coefficient of an expression under rules, and its relevance sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.audit import audit
from pullback.core.overrides import overrides
from pullback.core.rule import Rule


class Expression(nn.Module):
    """A module around a function, since rules need a module tree."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def coefficients(
    function: Callable[..., Tensor],
    rules: Sequence[Rule],
    *args: Tensor,
    weight: Tensor | None = None,
    strict: bool = True,
) -> tuple[Tensor, ...]:
    """Coefficients of Σ weight · function(args) under rules, per argument; checks that the value is untouched."""
    leaves = [arg.detach().clone().requires_grad_() for arg in args]
    module = function if isinstance(function, nn.Module) else Expression(function)
    expected = module(*[arg.detach().clone().requires_grad_() for arg in args])
    with overrides(module, rules) as coverage:
        value = module(*leaves)
        assert torch.equal(value, expected), "a rule changed the value"
        if strict:
            assert audit(value, coverage) == ()
        total = value.sum() if weight is None else (value * weight).sum()
        found = torch.autograd.grad(total, leaves, allow_unused=True)
    return tuple(
        torch.zeros_like(leaf) if part is None else part for part, leaf in zip(found, leaves, strict=True)
    )


def relevance(function: Any, rules: Sequence[Rule], *args: Tensor, weight: Tensor | None = None) -> Tensor:
    """Σ over all arguments of value times coefficient."""
    found = coefficients(function, rules, *args, weight=weight)
    return torch.stack([(arg * part).sum() for arg, part in zip(args, found, strict=True)]).sum()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
