"""Frozen statistics: norms with constant mean and variance, attention with constant weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pullback.core.errors import CoverageError
from pullback.core.operations import node_operation
from pullback.core.overrides import PASS, Operation, with_gradient_of

from .soft_gates import at_least_float32, require_temperature

__all__ = ["FrozenNorm", "ValueAttention"]


@dataclass(frozen=True)
class FrozenNorm:
    """Backward through a norm is multiplication by γ/σ: mean and variance are constants; forward is untouched.

    ``∂y_i/∂x_j = γ_i/σ`` for i = j and exactly 0 otherwise, for layer, group and instance norm; rms_norm has the root
    mean square for σ. Norms by stored statistics are linear already. A norm written out in ``pow``, ``mean`` and
    ``rsqrt`` is no norm to this rule: its plain gradient stays, and coverage names its parts.

    Args:
        within: fnmatch pattern on an enclosing module's path or class name; None is anywhere.

    Source: arXiv 2507.22832v5, appendix A.3 (layer norm); the other norms: ours.

    Example:
        >>> from pullback.core.overrides import overrides
        >>> x = torch.tensor([[1.0, 3.0]], requires_grad=True)
        >>> with overrides(torch.nn.LayerNorm(2), [FrozenNorm()]):
        ...     torch.autograd.grad(torch.nn.functional.layer_norm(x, (2,))[0, 0], x)
        (tensor([[1.0000, 0.0000]]),)
    """

    within: str | None = None
    operations: frozenset[str] = field(
        default=frozenset(["layer_norm", "rms_norm", "group_norm", "instance_norm"]), init=False, repr=False
    )

    def __call__(self, operation: Operation) -> Any:
        x = operation.args[0]
        parts = _norm_parts(operation, x.detach())
        if parts is None:
            return PASS
        inverse, weight, bias = parts
        if any(isinstance(each, Tensor) and each.requires_grad for each in (weight, bias)):
            return PASS  # a scale that carries signal is a product, which this rule does not know
        value = operation.function(x.detach(), *operation.args[1:], **operation.kwargs)
        surrogate = at_least_float32(x) * inverse
        return with_gradient_of(value, surrogate if weight is None else surrogate * at_least_float32(weight))


def _norm_parts(operation: Operation, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """1/σ, γ and β shaped against x; None where the statistics are stored ones."""
    wide = at_least_float32(x)
    if operation.name in ("layer_norm", "rms_norm"):
        dims = [*range(-len(operation.argument(1, "normalized_shape")), 0)]
        weight = operation.argument(2, "weight")
        if operation.name == "layer_norm":
            variance = wide.var(dims, unbiased=False, keepdim=True)
            bias, eps = operation.argument(3, "bias"), operation.argument(4, "eps", 1e-5)
            return (variance + eps).rsqrt(), weight, bias
        eps = operation.argument(3, "eps")
        square = wide.square().mean(dims, keepdim=True)
        return (square + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt(), weight, None
    if operation.name == "group_norm":
        groups = operation.argument(1, "num_groups")
        weight, bias = operation.argument(2, "weight"), operation.argument(3, "bias")
        variance = wide.reshape(len(x), groups, -1).var(-1, unbiased=False)
        inverse = (variance + operation.argument(4, "eps", 1e-5)).rsqrt()
        inverse = inverse.repeat_interleave(x.shape[1] // groups, 1)
    else:
        if not operation.argument(5, "use_input_stats", True):
            return None
        weight, bias = operation.argument(3, "weight"), operation.argument(4, "bias")
        variance = wide.flatten(2).var(-1, unbiased=False)
        inverse = (variance + operation.argument(7, "eps", 1e-5)).rsqrt()
    shape = [*inverse.shape, *[1] * (x.dim() - 2)]
    return inverse.reshape(shape), None if weight is None else weight.reshape(shape[1:]), bias


@dataclass(frozen=True)
class ValueAttention:
    """Backward through attention reaches the values alone: its weights A are constants; forward is untouched.

    Forward A = softmax(L), backward A_τ = softmax(L/τ): ``∂L/∂V = A_τᵀ g``, nothing to queries and keys. Holds for
    ``scaled_dot_product_attention``, and for a product (matmul, bmm, einsum) one of whose factors is a softmax, seen in
    the autograd graph through reshapes, casts, dropout and masks; A_τ is then A^(1/τ), normalised. Other softmaxes, a
    classifier's or a router's, keep their gradient. ``within`` restricts it.

    Args:
        temperature: τ > 0, a factor on the logits' scale; 1 uses A itself.
        within: fnmatch pattern on an enclosing module's path or class name; None is anywhere.

    Raises:
        MethodError: the temperature is not a finite number above 0.
        CoverageError: with another temperature than 1, weights were scaled or masked between softmax and product.

    Source: arXiv 2507.22832v5, appendix A.5, eq. 18 and 19, by operation instead of by module class.

    Example:
        >>> from pullback.core.overrides import overrides
        >>> q = torch.ones(1, 2, 1, requires_grad=True)
        >>> with overrides(torch.nn.Identity(), [ValueAttention()]):
        ...     torch.autograd.grad(functional.scaled_dot_product_attention(q, q, q)[0, 0, 0], q)
        (tensor([[[0.5000],
                 [0.5000]]]),)
    """

    temperature: float = 1.0
    within: str | None = None
    operations: frozenset[str] = field(
        default=frozenset(["scaled_dot_product_attention", "matmul", "bmm", "einsum"]), init=False, repr=False
    )

    def __post_init__(self) -> None:
        require_temperature(self.temperature)

    def __call__(self, operation: Operation) -> Any:
        if operation.name == "scaled_dot_product_attention":
            return self._fused(operation)
        factors = _factors(operation)
        chains = [_since_softmax(factor) for factor in factors]
        found = [(number, chain) for number, chain in enumerate(chains) if chain is not None]
        if len(found) != 1:
            return PASS
        (number, chain), frozen = found[0], [*factors]
        frozen[number] = factors[number].detach()
        value = _product(operation, frozen)
        if self.temperature == 1:
            return value
        frozen[number] = self._tempered(factors[number], chain, operation)
        return with_gradient_of(value.detach(), _product(operation, frozen))

    def _tempered(self, weights: Tensor, chain: list[Any], operation: Operation) -> Tensor:
        """softmax(L/τ) from A = softmax(L): what normalising lost cancels. Entries that underflowed stay 0."""
        dim = _softmax_dim(chain)
        if dim is None:
            raise CoverageError(
                f"{self!r} cannot tell over which dimension the weights of {operation.name} in module "
                f"{operation.module_path!r} sum to one: they were scaled, masked or reshaped after their softmax. "
                "Use temperature=1.0, or scaled_dot_product_attention in the model."
            )
        logits = at_least_float32(weights.detach()).log() / self.temperature
        tempered = logits.softmax(dim).nan_to_num(0.0)  # a row that is masked throughout
        return tempered.to(weights.dtype)

    def _fused(self, operation: Operation) -> Any:
        query, key, value, *rest = operation.args
        mask = operation.argument(3, "attn_mask")
        if mask is not None and mask.requires_grad:
            # detaching the mask would choose another kernel, and other bits
            output = operation.value().detach()
        elif self.temperature == 1:
            return operation.function(query.detach(), key.detach(), value, *rest, **operation.kwargs)
        else:
            output = operation.function(
                query.detach(), key.detach(), value.detach(), *rest, **operation.kwargs
            )
        scale = operation.argument(6, "scale")
        if scale is None:
            scale = 1 / math.sqrt(query.shape[-1])
        if mask is not None:
            mask = mask.detach()
            mask = mask if mask.dtype == torch.bool else mask / self.temperature
        surrogate = functional.scaled_dot_product_attention(
            query.detach(),
            key.detach(),
            value,
            attn_mask=mask,
            is_causal=bool(operation.argument(5, "is_causal", False)),
            scale=scale / self.temperature,
            enable_gqa=bool(operation.argument(7, "enable_gqa", False)),
        )
        return with_gradient_of(output, surrogate)


# what may lie between a softmax and its product with the values: shapes only, and scales and masks
_RESHAPES = frozenset(
    [
        "to_copy",
        "view",
        "unsafe_view",
        "_reshape_alias",
        "expand",
        "clone",
        "contiguous",
        "alias",
        "transpose",
        "t",
        "permute",
        "unsqueeze",
        "slice",
    ]
)
_MASKS = frozenset(["native_dropout", "mul", "div", "masked_fill", "where"])


def _factors(operation: Operation) -> list[Tensor]:
    if operation.name != "einsum":
        return [operation.args[0], operation.argument(1, "other")]
    operands = operation.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    return [*operands]


def _product(operation: Operation, factors: list[Tensor]) -> Tensor:
    leading = () if operation.name != "einsum" else operation.args[:1]
    result: Tensor = operation.function(*leading, *factors)
    return result


def _since_softmax(factor: object) -> list[Any] | None:
    """The autograd nodes from the softmax that made this factor to the factor; None if none did."""
    nodes: list[Any] = []
    node: Any = factor.grad_fn if isinstance(factor, Tensor) else None
    while node is not None:
        nodes.insert(0, node)
        name = node_operation(node.name())
        if name == "softmax":
            return nodes
        live = [following for following, _ in node.next_functions if following is not None]
        node = live[0] if len(live) == 1 and name in _RESHAPES | _MASKS else None
    return None


def _softmax_dim(nodes: list[Any]) -> int | None:
    """The factor's dimension, from the end, over which its softmax summed; None where it was lost on the way."""
    shape = _shape(nodes[0])
    dim = _signed(nodes[0]._saved_dim, len(shape))
    for node in nodes[1:]:
        name, before, shape = node_operation(node.name()), shape, _shape(node)
        rank = len(shape)
        if name == "transpose":
            pair = [_signed(node._saved_dim0, rank), _signed(node._saved_dim1, rank)]
            dim = pair[1 - pair.index(dim)] if dim in pair else dim
        elif name == "t":
            dim = -3 - dim
        elif name == "permute":
            dim = [_signed(each, rank) for each in node._saved_dims].index(dim) - rank
        elif name in _MASKS or shape[dim:] != before[dim:]:
            return None
    return dim


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node._input_metadata[0].shape)


def _signed(dim: int, rank: int) -> int:
    """A saved dimension counted from the end; autograd keeps negative ones as unsigned numbers."""
    return (dim - 2**64 if dim >= 2**63 else dim) % rank - rank
