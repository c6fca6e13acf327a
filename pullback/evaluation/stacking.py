"""Many models of one architecture as one: their weights stacked along a first dimension, their logits in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from pullback.core.errors import MethodError

__all__ = ["Stack", "VmappedStack", "vmapped_stack", "why_not_vmap"]


class Stack(Protocol):
    """E models: ``state`` lists every tensor, first dimension E; ``parameters`` those that are trained.

    Inputs are (E, B, *S), each model its own batch, and logits (E, classes, B).
    """

    @property
    def parameters(self) -> list[Tensor]: ...

    @property
    def state(self) -> list[Tensor]: ...

    def logits(self, x: Tensor) -> Tensor:
        """Of the models in eval mode, without a graph."""

    def learn(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies (E,), means over each batch, and logits; each model's gradient is in ``grad``."""

    def input_gradient(self, x: Tensor, cotangent: Callable[[Tensor], Tensor]) -> Tensor:
        """Jᵀ cotangent(logits) for the Jacobian J of the logits by the input, in eval mode, like x."""

    def module(self, member: int) -> nn.Module:
        """One of the models handed in, with the present weights."""


@dataclass(frozen=True, eq=False)
class VmappedStack:
    """A stack of any functional module under ``torch.vmap``; convolutions become grouped ones."""

    models: Sequence[nn.Module]
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.weights.values())

    @property
    def state(self) -> list[Tensor]:
        return [*self.weights.values(), *self.buffers.values()]

    def logits(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._logits(x, training=False)

    def learn(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._logits(x, training=True)
        losses = F.cross_entropy(logits, labels, reduction="none").mean(1)
        for parameter in self.parameters:
            parameter.grad = None
        # the sum, not the mean, over members: each has the gradient it would have alone
        torch.autograd.backward(losses.sum())
        return losses.detach(), logits.detach()

    def input_gradient(self, x: Tensor, cotangent: Callable[[Tensor], Tensor]) -> Tensor:
        point = x.detach().requires_grad_()
        logits = self._logits(point, training=False)
        (gradient,) = torch.autograd.grad(logits, point, cotangent(logits.detach()))
        return gradient

    def module(self, member: int) -> nn.Module:
        values = {name: value[member] for name, value in {**self.weights, **self.buffers}.items()}
        self.models[member].load_state_dict(values, strict=False)
        return self.models[member]

    def _logits(self, x: Tensor, training: bool) -> Tensor:
        base = self.models[0].train(training)

        def one(weights: dict[str, Tensor], buffers: dict[str, Tensor], points: Tensor) -> Tensor:
            logits: Tensor = functional_call(base, (weights, buffers), (points,))
            return logits

        try:
            stacked: Tensor = torch.vmap(one)(self.weights, self.buffers, x)
        except RuntimeError as error:
            raise MethodError(
                f'vectorize="vmap" was given for a model that cannot be mapped: {str(error).splitlines()[0]} '
                'Expected a functional module; use vectorize="loop".'
            ) from error
        return stacked.mT


def vmapped_stack(models: Sequence[nn.Module]) -> VmappedStack:
    """Stack models of one architecture for ``torch.vmap``.

    Raises ``MethodError`` where members draw random numbers in the forward pass, which no member could repeat alone.
    """
    reason = why_not_vmap(models[0])
    if reason is not None:
        raise MethodError(f'vectorize="vmap" was given for {reason}. Use vectorize="loop".')
    weights, buffers = stack_module_state(list(models))
    return VmappedStack(models, weights, buffers)


def why_not_vmap(model: nn.Module) -> str | None:
    """What keeps a model from being mapped, as far as its modules tell, or None."""
    for name, part in model.named_modules():
        rate = getattr(part, "p", 0.0) if "Dropout" in type(part).__name__ else getattr(part, "dropout", 0.0)
        if isinstance(rate, float) and rate > 0:
            return f"a model with random dropout at {name!r}"
    if any(part._forward_hooks or part._forward_pre_hooks for part in model.modules()):
        return "a model with hooks"
    return None
