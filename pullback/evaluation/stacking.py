"""Many models of one architecture as one: their weights stacked along a first dimension, their logits in one call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from pullback.core.errors import MethodError

__all__ = [
    "LinearStack",
    "Stack",
    "VmappedStack",
    "linear_stack",
    "vmapped_stack",
    "why_not_stack",
    "why_not_vmap",
]

# They act on each number by itself, whatever dimensions stand before it.
_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh,
    nn.Hardtanh, nn.Identity,
)  # fmt: skip


class Stack(Protocol):
    """E models: ``state`` lists every tensor, first dimension E; ``parameters`` those that are trained."""

    @property
    def parameters(self) -> list[Tensor]: ...

    @property
    def state(self) -> list[Tensor]: ...

    def logits(self, x: Tensor, training: bool) -> Tensor:
        """x (E, B, *S), each model its own batch -> (E, B, classes)."""

    def module(self, member: int) -> nn.Module:
        """One model by itself, with the present weights."""


@dataclass(frozen=True, eq=False)
class LinearStack:
    """A stack of perceptrons: each layer is one batched matrix product, activations act on all models at once."""

    models: Sequence[nn.Sequential]
    # (weight (E, inputs, outputs), bias (E, 1, outputs) or None) per linear layer, the module for an activation
    layers: Sequence[tuple[Tensor, Tensor | None] | nn.Module]

    @property
    def parameters(self) -> list[Tensor]:
        pairs = [layer for layer in self.layers if isinstance(layer, tuple)]
        return [tensor for pair in pairs for tensor in pair if tensor is not None]

    @property
    def state(self) -> list[Tensor]:
        return self.parameters

    def logits(self, x: Tensor, training: bool) -> Tensor:
        h = x
        for layer in self.layers:
            if isinstance(layer, tuple):
                weight, bias = layer
                h = torch.bmm(h, weight) if bias is None else torch.baddbmm(bias, h, weight)
            else:
                h = h.flatten(2) if isinstance(layer, nn.Flatten) else layer(h)
        return h

    def module(self, member: int) -> nn.Module:
        alone = copy.deepcopy(self.models[member])
        with torch.no_grad():
            for part, layer in zip(alone, self.layers, strict=True):
                if isinstance(layer, tuple):
                    assert isinstance(part, nn.Linear)
                    part.weight.copy_(layer[0][member].T)
                    if layer[1] is not None:
                        part.bias.copy_(layer[1][member, 0])
        return alone


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

    def logits(self, x: Tensor, training: bool) -> Tensor:
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
        return stacked

    def module(self, member: int) -> nn.Module:
        alone = copy.deepcopy(self.models[member])
        values = {name: value[member] for name, value in {**self.weights, **self.buffers}.items()}
        alone.load_state_dict(values, strict=False)
        return alone


def linear_stack(models: Sequence[nn.Module]) -> LinearStack:
    """Stack perceptrons: ``nn.Sequential`` of ``Flatten``, ``Linear`` and elementwise activations.

    Raises ``MethodError`` for any other model.

    >>> from pullback.evaluation import multilayer_perceptron
    >>> stack = linear_stack([multilayer_perceptron(4, 2, (8,)) for _ in range(3)])
    >>> stack.logits(torch.rand(3, 5, 4), training=True).shape
    torch.Size([3, 5, 2])
    """
    reason = why_not_stack(models[0])
    if reason is not None:
        raise MethodError(f'vectorize="stack" was given for {reason}. Use vectorize="vmap" or "loop".')
    sequences = [model for model in models if isinstance(model, nn.Sequential)]
    layers: list[tuple[Tensor, Tensor | None] | nn.Module] = []
    for parts in zip(*sequences, strict=True):
        linears = [part for part in parts if isinstance(part, nn.Linear)]
        if not linears:
            layers.append(parts[0])
            continue
        weight = torch.stack([linear.weight.detach().T for linear in linears]).contiguous().requires_grad_()
        bias = None
        if linears[0].bias is not None:
            bias = torch.stack([linear.bias.detach()[None] for linear in linears]).requires_grad_()
        layers.append((weight, bias))
    return LinearStack(sequences, layers)


def vmapped_stack(models: Sequence[nn.Module]) -> VmappedStack:
    """Stack models of one architecture for ``torch.vmap``.

    Raises ``MethodError`` where members draw random numbers in the forward pass, which no member could repeat alone.
    """
    reason = why_not_vmap(models[0])
    if reason is not None:
        raise MethodError(f'vectorize="vmap" was given for {reason}. Use vectorize="loop".')
    weights, buffers = stack_module_state(list(models))
    return VmappedStack(models, weights, buffers)


def why_not_stack(model: nn.Module) -> str | None:
    """What keeps a model from being stacked as a perceptron, or None."""
    if type(model) is not nn.Sequential:
        return f"a {type(model).__name__}, which is not an nn.Sequential of linear layers and activations"
    for name, part in model.named_children():
        first = name == "0" and type(part) is nn.Flatten and (part.start_dim, part.end_dim) == (1, -1)
        if not first and type(part) is not nn.Linear and type(part) not in _ELEMENTWISE:
            return f"a model with {type(part).__name__} at {name!r}, which is not a linear layer or an activation"
    if _hooked(model):
        return "a model with hooks"
    return None


def why_not_vmap(model: nn.Module) -> str | None:
    """What keeps a model from being mapped, as far as its modules tell, or None."""
    for name, part in model.named_modules():
        rate = getattr(part, "p", 0.0) if "Dropout" in type(part).__name__ else getattr(part, "dropout", 0.0)
        if isinstance(rate, float) and rate > 0:
            return f"a model with random dropout at {name!r}"
    if _hooked(model):
        return "a model with hooks"
    return None


def _hooked(model: nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
