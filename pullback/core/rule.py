"""A rule: what replaces the derivative of an operation, and the operation as a rule sees it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from pullback.core.errors import MethodError

__all__ = ["PASS", "Operation", "Rule", "are_paused", "rules_paused", "rules_resumed", "with_gradient_of"]


class _Pass:
    def __repr__(self) -> str:
        return "PASS"


PASS: Final = _Pass()
"""What a rule returns to leave this call to the next rule, or to plain autograd."""


@dataclass(frozen=True)
class Operation:
    """One call of an operation in canonical form: out of place, not reflected, first arguments by position.

    ``function`` is the native out-of-place callable, ``module_path`` the dotted path of the innermost module
    that is running ("" at the root), ``module_class`` its class name.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module_path: str = ""
    module_class: str = ""

    def value(self) -> Any:
        """The operation's native result with the ordinary derivative."""
        return self.function(*self.args, **self.kwargs)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given either by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


class Rule(Protocol):
    """Replaces the derivative of ``operations``: returns their native value, bit for bit, or :data:`PASS`.

    ``within`` is an fnmatch pattern on the path or class name of any enclosing module; None matches anywhere.
    A rule with a true attribute ``preserves_gradient`` (a leaner kernel, say) covers nothing: it counts as
    gradient.
    """

    @property
    def operations(self) -> frozenset[str] | tuple[str, ...]: ...
    @property
    def within(self) -> str | None: ...
    def __call__(self, operation: Operation, /) -> Any: ...


class _GradientOf(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, surrogate: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.dtypes = inputs[0].dtype, inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, grads[0].to(ctx.dtypes[1])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[1].to(ctx.dtypes[0], copy=True)


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """``value`` forward, bit for bit, with the derivative of ``surrogate`` (same shape).

    Works under vmap, forward-mode AD and in double backward where ``surrogate`` does. Raises MethodError for
    unequal shapes.

    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> torch.autograd.grad(with_gradient_of(x.exp(), 3 * x), x)
    (tensor(3.),)
    """
    if value.shape != surrogate.shape:
        raise MethodError(
            f"a value of shape {tuple(value.shape)} cannot take the gradient of a surrogate of shape "
            f"{tuple(surrogate.shape)}; expand or sum the surrogate to the value's shape"
        )
    result: Tensor = _GradientOf.apply(value, surrogate)  # type: ignore[no-untyped-call]
    return result


_thread = threading.local()


@contextmanager
def rules_paused(paused: bool = True) -> Iterator[None]:
    """No rule applies in this thread while open: for the backward of a rule's own autograd.Function."""
    before = getattr(_thread, "paused", False)
    _thread.paused = paused
    try:
        yield
    finally:
        _thread.paused = before


def rules_resumed() -> AbstractContextManager[None]:
    """Rules apply again while open: for the model itself, between a domain and a target that no rule concerns."""
    return rules_paused(False)


def are_paused() -> bool:
    """Whether rules are paused in this thread."""
    return bool(getattr(_thread, "paused", False))
