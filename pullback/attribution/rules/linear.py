"""Layer-wise relevance propagation through linear and convolution layers, in coefficient form.

A layer is y_k = Σ_j w_jk x_j + b_k. The relevance of a value is the value times its coefficient, R_k = y_k c_k and
R_j = x_j c_j: a rule says what c_j is for given c_k, and the backward pass carries c where it carried the gradient.
Contributions x_j w_jk are split by sign, (·)⁺ and (·)⁻. The forward value stays the native one.

Every rule has ``bias``: true, the bias takes its share of the relevance; false, denominators leave it out, so that
the inputs share everything. ``epsilon`` stabilises a denominator z as z + ε sign(z), sign(0) = 1; a denominator of
exactly zero has no contributions and passes nothing. ``applies_to`` is "convolution", "dense" or "all". ``conserves``
tells the conservation report that what does not reach the inputs is with the bias (and the stabiliser).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.errors import MethodError
from ...core.overrides import PASS, Operation
from .linear_maps import (
    OPERATIONS,
    AppliesTo,
    LinearCall,
    LinearMap,
    known_call,
    propagate,
    require_scope,
    ruled,
)

__all__ = ["AlphaBeta", "Epsilon", "Gamma", "MergedBatchNorm", "ZPlus"]

Transposed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Epsilon:
    """The ε-rule: c_j = Σ_k w_jk s_k with s_k = y_k c_k / (y_k + ε sign(y_k)) (Bach et al. 2015).

    ``epsilon=0`` is LRP-0, the plain gradient: relevance is then gradient times input. MethodError for ε < 0.

    >>> import pullback as pb
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> problem = pb.pose(model, torch.ones(1, 2), target=0).under((Epsilon(epsilon=0.0),))
    >>> torch.equal(problem.grad(), model.weight)
    True
    """

    epsilon: float = 1e-6
    bias: bool = True
    applies_to: AppliesTo = "all"
    within: str | None = None
    family: ClassVar[str] = "linear"
    conserves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require(self)

    @property
    def operations(self) -> frozenset[str]:
        return OPERATIONS[self.applies_to]

    def __call__(self, operation: Operation) -> Any:
        return ruled(operation, self)

    def coefficient(
        self, linear: LinearMap, x: Tensor, weight: Tensor, bias: Tensor | None, outgoing: Tensor
    ) -> Tensor:
        z, transposed = _with_transposed(linear, x, weight)
        if self.epsilon == 0 and (self.bias or bias is None):
            return transposed(outgoing)  # y / y = 1, also in the limit at 0
        y = z if bias is None else z + bias
        return transposed(_share(_relevance(y, outgoing), y if self.bias else z, self.epsilon))


@dataclass(frozen=True)
class ZPlus:
    """The z⁺-rule: R_j = Σ_k (x_j w_jk)⁺ / (Σ_j (x_j w_jk)⁺ + b_k⁺) R_k (Montavon et al. 2017).

    c_j = Σ_k w⁺_jk s_k where x_j ≥ 0 and Σ_k w⁻_jk s_k where x_j < 0. MethodError for ε < 0.

    >>> import pullback as pb
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[3.0, -1.0]]))
    >>> pb.pose(model, torch.ones(1, 2), target=0).under((ZPlus(epsilon=0.0),)).grad()
    tensor([[2., 0.]])
    """

    epsilon: float = 1e-6
    bias: bool = True
    applies_to: AppliesTo = "all"
    within: str | None = None
    family: ClassVar[str] = "linear"
    conserves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require(self)

    @property
    def operations(self) -> frozenset[str]:
        return OPERATIONS[self.applies_to]

    def __call__(self, operation: Operation) -> Any:
        return ruled(operation, self)

    def coefficient(
        self, linear: LinearMap, x: Tensor, weight: Tensor, bias: Tensor | None, outgoing: Tensor
    ) -> Tensor:
        y = linear(x, weight) if bias is None else linear(x, weight) + bias
        parts = _contributions(linear, x, weight)
        total = parts.positive
        if bias is not None and self.bias:
            total = total + bias.clamp(min=0)
        share = _share(_relevance(y, outgoing), total, self.epsilon)
        return torch.where(x >= 0, parts.by_positive_weight(share), parts.by_negative_weight(share))


@dataclass(frozen=True)
class AlphaBeta:
    """The αβ-rule: R_j = Σ_k (α (x_j w_jk)⁺ / (z_k⁺ + b_k⁺) − β (x_j w_jk)⁻ / (z_k⁻ + b_k⁻)) R_k (Bach et al. 2015).

    α − β = 1 and β ≥ 0, else MethodError. A y_k without contributions of one sign leaves that sign's part to nobody,
    as in the literature.

    >>> AlphaBeta(alpha=1.0, beta=0.0)
    AlphaBeta(alpha=1.0, beta=0.0, epsilon=1e-06, bias=True, applies_to='all', within=None)
    """

    alpha: float = 2.0
    beta: float = 1.0
    epsilon: float = 1e-6
    bias: bool = True
    applies_to: AppliesTo = "all"
    within: str | None = None
    family: ClassVar[str] = "linear"
    conserves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require(self)
        if self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise MethodError(
                f"AlphaBeta(alpha={self.alpha}, beta={self.beta}): expected alpha - beta = 1 with beta >= 0, or "
                "relevance is not conserved. Try AlphaBeta(alpha=2, beta=1) or AlphaBeta(alpha=1, beta=0)."
            )

    @property
    def operations(self) -> frozenset[str]:
        return OPERATIONS[self.applies_to]

    def __call__(self, operation: Operation) -> Any:
        return ruled(operation, self)

    def coefficient(
        self, linear: LinearMap, x: Tensor, weight: Tensor, bias: Tensor | None, outgoing: Tensor
    ) -> Tensor:
        parts = _contributions(linear, x, weight)
        positive, negative = parts.positive, parts.negative()
        y = positive + negative if bias is None else positive + negative + bias
        if bias is not None and self.bias:
            positive, negative = positive + bias.clamp(min=0), negative + bias.clamp(max=0)
        relevance = _relevance(y, outgoing)
        return parts.coefficient(
            self.alpha * _share(relevance, positive, self.epsilon),
            -self.beta * _share(relevance, negative, self.epsilon),
        )


@dataclass(frozen=True)
class Gamma:
    """The γ-rule for inputs and outputs of either sign (Montavon et al. 2019; Andéol et al. 2021).

    R_j = Σ_k (x_j w_jk + γ (x_j w_jk)^σ) / Σ_j (x_j w_jk + γ (x_j w_jk)^σ) R_k, where σ is the sign of y_k, + at 0;
    the bias enters the denominator in the same way. γ = 0 is the ε-rule, γ → ∞ the z⁺-rule where y_k ≥ 0.
    MethodError for γ < 0.

    >>> Gamma(gamma=-1.0)
    Traceback (most recent call last):
    ...
    pullback.core.errors.MethodError: Gamma(gamma=-1.0): expected gamma >= 0. Try Gamma(gamma=0.25).
    """

    gamma: float = 0.25
    epsilon: float = 1e-6
    bias: bool = True
    applies_to: AppliesTo = "all"
    within: str | None = None
    family: ClassVar[str] = "linear"
    conserves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require(self)
        if not self.gamma >= 0:
            raise MethodError(f"Gamma(gamma={self.gamma}): expected gamma >= 0. Try Gamma(gamma=0.25).")

    @property
    def operations(self) -> frozenset[str]:
        return OPERATIONS[self.applies_to]

    def __call__(self, operation: Operation) -> Any:
        return ruled(operation, self)

    def coefficient(
        self, linear: LinearMap, x: Tensor, weight: Tensor, bias: Tensor | None, outgoing: Tensor
    ) -> Tensor:
        parts = _contributions(linear, x, weight)
        positive, negative = parts.positive, parts.negative()
        y = positive + negative if bias is None else positive + negative + bias
        if bias is not None and self.bias:
            positive, negative = positive + bias.clamp(min=0), negative + bias.clamp(max=0)
        upward = y >= 0
        total = positive + negative + self.gamma * torch.where(upward, positive, negative)
        share = _share(_relevance(y, outgoing), total, self.epsilon)
        favoured = (1 + self.gamma) * share
        return parts.coefficient(torch.where(upward, favoured, share), torch.where(upward, share, favoured))


@dataclass(frozen=True)
class MergedBatchNorm:
    """Batch normalisation in eval mode as part of the linear layer it follows, under that layer's rule.

    y = γ (W x + b − μ)/√(σ² + ε) + β is one linear layer with weight γW/√(σ² + ε), so the layer's own output in
    between has no relevance of its own. Where no ruled layer stands directly before (pre-activation networks,
    DenseNet), it is an affine map with the ordinary derivative, whose shift absorbs its share.

    >>> MergedBatchNorm()
    MergedBatchNorm(within=None)
    """

    operations: ClassVar[frozenset[str]] = frozenset(["batch_norm"])
    conserves: ClassVar[bool] = True
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        argument = operation.argument
        if isinstance(operation.function, types.FunctionType):
            order = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        else:  # torch.batch_norm takes the affine parameters first
            order = ("weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
        given = {name: argument(place, name) for place, name in enumerate(order, 1)}
        mean, variance, weight, shift = (
            given[name] for name in ("running_mean", "running_var", "weight", "bias")
        )
        y = argument(0, "input")
        known = known_call(y)
        constants = [value for value in (mean, variance, weight, shift) if value is not None]
        if (
            given["training"]
            or known is None
            or mean is None
            or any(each.requires_grad for each in constants)
        ):
            return PASS
        call, rule = known
        scale = (_wide(variance) + (1e-5 if given["eps"] is None else given["eps"])).rsqrt()
        if weight is not None:
            scale = scale * weight
        merged = call.linear.scaled(_wide(call.weight), scale, y)
        if merged is None:
            return PASS
        spatial = [1] * (y.dim() - 2)
        bias = -mean * scale if shift is None else shift - mean * scale
        bias = bias.reshape(-1, *spatial)
        if call.bias is not None:
            bias = bias + call.bias * scale.reshape(-1, *spatial)
        with torch.no_grad():
            value: Tensor = operation.value()
        dtype = call.weight.dtype
        return propagate(value, LinearCall(call.linear, call.x, merged.to(dtype), bias.to(dtype)), rule)


@dataclass(frozen=True)
class _Contributions:
    """The contributions x_j w_jk of one layer: their positive sum per output, and the weight's transposed parts."""

    x: Tensor
    positive: Tensor
    negative: Callable[[], Tensor]
    by_positive_weight: Transposed
    by_negative_weight: Transposed

    def coefficient(self, share_positive: Tensor, share_negative: Tensor) -> Tensor:
        """c_j where an output hands ``share_positive`` to positive and ``share_negative`` to negative contributions."""
        above = self.by_positive_weight(share_positive) + self.by_negative_weight(share_negative)
        below = self.by_negative_weight(share_positive) + self.by_positive_weight(share_negative)
        return torch.where(self.x >= 0, above, below)


def _contributions(linear: LinearMap, x: Tensor, weight: Tensor) -> _Contributions:
    above, below = x.clamp(min=0), x.clamp(max=0)
    raising, lowering = weight.clamp(min=0), weight.clamp(max=0)
    first, by_positive_weight = _with_transposed(linear, above, raising)
    second, by_negative_weight = _with_transposed(linear, below, lowering)

    def negative() -> Tensor:
        return linear(above, lowering) + linear(below, raising)

    return _Contributions(x, first + second, negative, by_positive_weight, by_negative_weight)


def _with_transposed(linear: LinearMap, x: Tensor, weight: Tensor) -> tuple[Tensor, Transposed]:
    """W x, and the map s -> Wᵀ s."""
    y, *pullback = torch.func.vjp(lambda value: linear(value, weight), x)

    def transposed(share: Tensor) -> Tensor:
        found: Tensor = pullback[0](share.to(y.dtype))[0]
        return found

    return y, transposed


def _wide(value: Tensor) -> Tensor:
    """Half precision as float32: sums and quotients near zero need the digits."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _relevance(y: Tensor, outgoing: Tensor) -> Tensor:
    return _wide(y) * _wide(outgoing)


def _share(relevance: Tensor, total: Tensor, epsilon: float) -> Tensor:
    """Relevance per unit of contribution, R / (z + ε sign(z)); nothing where z is exactly zero."""
    total = _wide(total)
    stabilised = torch.where(total < 0, total - epsilon, total + epsilon)
    empty = total == 0
    return torch.where(empty, 0.0, relevance / torch.where(empty, 1.0, stabilised))


def _require(rule: Epsilon | ZPlus | AlphaBeta | Gamma) -> None:
    name = type(rule).__name__
    require_scope(name, rule.applies_to)
    if not rule.epsilon >= 0:
        raise MethodError(f"{name}(epsilon={rule.epsilon}): expected epsilon >= 0. Try {name}(epsilon=1e-6).")
