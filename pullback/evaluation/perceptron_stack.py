"""Perceptrons of one architecture trained as one: their gradients in closed form, without autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from pullback.core.errors import MethodError

__all__ = ["PerceptronStack", "cross_entropy_gradient", "perceptron_stack", "why_no_perceptron"]

# They act on each number by itself, whatever dimensions stand before it.
_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh,
    nn.Hardtanh, nn.Identity,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Linear:
    """E linear layers: ``weight`` (E, outputs, inputs), ``bias`` (E, outputs, 1) or None, and where gradients go."""

    weight: Tensor
    bias: Tensor | None
    weight_gradient: Tensor
    bias_gradient: Tensor | None

    def __call__(self, h: Tensor) -> Tensor:
        product = torch.bmm(self.weight, h)
        return product if self.bias is None else product.add_(self.bias)


@dataclass(frozen=True, eq=False)
class PerceptronStack:
    """E perceptrons whose every layer is one batched matrix product.

    With h_l = f(W_l h_{l-1} + b_l) and g_l = d loss / d (W_l h_{l-1} + b_l): d loss / d W_l = g_l h_{l-1}ᵀ,
    d loss / d b_l = Σ_examples g_l, g_{l-1} = f'(·) · W_lᵀ g_l. Written out, a step calls about thirty operations for
    all members; autograd and its bookkeeping would cost a third of the time again.

    Values are (E, features, B), features before examples: the softmax then runs along memory, which is ten times
    faster for ten classes than the other way round.
    """

    models: Sequence[nn.Sequential]
    layers: Sequence[Linear | nn.Module]
    # all weights and biases in one vector, of which the layers are views: one tensor for the optimizer
    vector: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        return [self.vector]

    @property
    def state(self) -> list[Tensor]:
        linears = [layer for layer in self.layers if isinstance(layer, Linear)]
        return [tensor for each in linears for tensor in (each.weight, each.bias) if tensor is not None]

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        return self._values(x)[-1]

    @torch.no_grad()
    def learn(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        values = self._values(x)
        picked = values[-1].log_softmax(1).gather(1, labels[:, None])
        count = labels.shape[1]
        self._pull_back(values, cross_entropy_gradient(values[-1], labels).div_(count), into_weights=True)
        return picked.sum((1, 2)).div_(-count), values[-1]

    @torch.no_grad()
    def input_gradient(self, x: Tensor, cotangent: Callable[[Tensor], Tensor]) -> Tensor:
        values = self._values(x)
        return self._pull_back(values, cotangent(values[-1]), into_weights=False).mT.reshape(x.shape)

    def module(self, member: int) -> nn.Module:
        alone = self.models[member]
        with torch.no_grad():
            for part, layer in zip(alone, self.layers, strict=True):
                if isinstance(layer, Linear):
                    assert isinstance(part, nn.Linear)
                    part.weight.copy_(layer.weight[member])
                    if layer.bias is not None:
                        part.bias.copy_(layer.bias[member, :, 0])
        return alone

    def _values(self, x: Tensor) -> list[Tensor]:
        """The input and the result of every layer, (E, features, B)."""
        values = [x.flatten(2).mT]
        for layer in self.layers:
            if isinstance(layer, nn.Identity):
                values.append(values[-1])
            elif isinstance(layer, nn.ReLU):
                values.append(values[-1].relu())
            elif isinstance(layer, Linear):
                values.append(layer(values[-1]))
            else:
                # some write into their input, which the derivative needs
                values.append(layer(values[-1].clone()))
        return values

    def _pull_back(self, values: Sequence[Tensor], g: Tensor, into_weights: bool) -> Tensor:
        """The gradient with respect to the input, or, where that is not needed, the weights' into their ``grad``."""
        first = next(number for number, layer in enumerate(self.layers) if isinstance(layer, Linear))
        steps = list(zip(self.layers, pairwise(values), strict=True))
        for number, (layer, (before, after)) in reversed(list(enumerate(steps))):
            if isinstance(layer, nn.Identity):
                continue
            if isinstance(layer, nn.ReLU):
                g = torch.ops.aten.threshold_backward(g, after, 0)
            elif not isinstance(layer, Linear):
                with torch.enable_grad():
                    point = before.clone().requires_grad_()
                    result = layer(point * 1)
                (g,) = torch.autograd.grad(result, point, g)
            else:
                if into_weights:
                    torch.bmm(g, before.mT, out=layer.weight_gradient)
                    if layer.bias_gradient is not None:
                        torch.sum(g, 2, keepdim=True, out=layer.bias_gradient)
                    if number == first:
                        break
                # the input's gradient in the layout of the input: examples before features
                turned = number == first
                g = torch.bmm(g.mT, layer.weight).mT if turned else torch.bmm(layer.weight.mT, g)
        return g


def cross_entropy_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """softmax(logits) - onehot(labels): of the cross-entropies summed over examples; logits (E, C, B), labels (E, B).

    >>> cross_entropy_gradient(torch.zeros(1, 2, 1), torch.tensor([[1]])).flatten()
    tensor([ 0.5000, -0.5000])
    """
    minus = torch.full((), -1.0, dtype=logits.dtype, device=logits.device).expand(labels[:, None].shape)
    return logits.softmax(1).scatter_add_(1, labels[:, None], minus)


def perceptron_stack(models: Sequence[nn.Module]) -> PerceptronStack:
    """Stack perceptrons: ``nn.Sequential`` of ``Flatten``, ``Linear`` and elementwise activations.

    Raises ``MethodError`` for any other model.

    >>> from pullback.evaluation import multilayer_perceptron
    >>> stack = perceptron_stack([multilayer_perceptron(4, 2, (8,)) for _ in range(3)])
    >>> stack.logits(torch.rand(3, 5, 4)).shape
    torch.Size([3, 2, 5])
    """
    reason = why_no_perceptron(models[0])
    if reason is not None:
        raise MethodError(f'vectorize="stack" was given for {reason}. Use vectorize="vmap" or "loop".')
    sequences = [model for model in models if isinstance(model, nn.Sequential)]
    layers = list(zip(*sequences, strict=True))
    shapes = []
    for parts in layers:
        if isinstance(parts[0], nn.Linear):
            outputs, inputs = parts[0].weight.shape
            shapes += [(len(models), outputs, inputs)]
            shapes += [(len(models), outputs, 1)] if parts[0].bias is not None else []
    like = next(models[0].parameters())
    vector = torch.empty(sum(map(math.prod, shapes)), dtype=like.dtype, device=like.device)
    vector.grad = torch.zeros_like(vector)
    places = list(zip(_views(vector, shapes), _views(vector.grad, shapes), strict=True))
    stacked: list[Linear | nn.Module] = []
    for parts in layers:
        linears = [part for part in parts if isinstance(part, nn.Linear)]
        if not linears:
            # values come flat
            stacked.append(nn.Identity() if isinstance(parts[0], nn.Flatten) else parts[0])
            continue
        weight, weight_gradient = places.pop(0)
        torch.stack([linear.weight.detach() for linear in linears], out=weight)
        bias = bias_gradient = None
        if linears[0].bias is not None:
            bias, bias_gradient = places.pop(0)
            torch.stack([linear.bias.detach()[:, None] for linear in linears], out=bias)
        stacked.append(Linear(weight, bias, weight_gradient, bias_gradient))
    return PerceptronStack(sequences, stacked, vector)


def _views(vector: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    parts = vector.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def why_no_perceptron(model: nn.Module) -> str | None:
    """What keeps a model from being stacked as a perceptron, or None."""
    if type(model) is not nn.Sequential:
        return f"a {type(model).__name__}, which is not an nn.Sequential of linear layers and activations"
    for name, part in model.named_children():
        first = name == "0" and type(part) is nn.Flatten and (part.start_dim, part.end_dim) == (1, -1)
        if not first and type(part) is not nn.Linear and type(part) not in _ELEMENTWISE:
            return f"a model with {type(part).__name__} at {name!r}, which is not a linear layer or an activation"
    own = sum(len(part._parameters) - (part.bias is None) for part in model if isinstance(part, nn.Linear))
    parameters = list(model.parameters())
    if not own or len(parameters) < own or not all(value.requires_grad for value in parameters):
        return "a model without weights, with shared or with frozen ones"
    if any(part._forward_hooks or part._forward_pre_hooks for part in model.modules()):
        return "a model with hooks"
    return None
