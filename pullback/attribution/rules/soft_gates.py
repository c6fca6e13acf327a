"""Soft gates: activations whose derivative is a smooth, positive gate instead of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pullback.attribution.rules.surrogate import through_ratio
from pullback.core.errors import MethodError
from pullback.core.overrides import PASS, Operation

__all__ = ["GATE_FAMILIES", "Family", "NormalGate", "SigmoidGate", "at_least_float32", "require_temperature"]

Family = Literal["relu", "gelu", "silu"]
GATE_FAMILIES: dict[str, frozenset[str]] = {
    "relu": frozenset(["relu", "relu6", "leaky_relu", "prelu", "rrelu", "hardtanh", "threshold"]),
    "gelu": frozenset(["gelu"]),
    "silu": frozenset(["silu", "hardswish"]),
}
"""Which operations a gate softens together. ``clamp`` is not among them: it mostly guards denominators."""


@dataclass(frozen=True)
class SigmoidGate:
    """Backward through an activation is multiplication by σ(z/T), z the pre-activation; forward is untouched.

    ReLU: σ(z/T) for 1[z > 0]; SiLU: σ(z/T), its own gate at T = 1. The rest of the ReLU family (ours): the
    expected derivative E[g'(z + ε)] under logistic noise of scale T, so leaky_relu and prelu of slope a get
    a + (1 - a) σ(z/T), and relu6 and hardtanh on [l, h] get σ((z - l)/T) - σ((z - h)/T). hardswish has SiLU's gate
    (ours). At z = 0 ReLU's gate is one half. Computed in at least float32, saved in the gradient's dtype.

    Args:
        temperature: T > 0, in units of the pre-activation. T → 0 gives ReLU's own derivative.
        family: "relu", "gelu" or "silu": which operations.
        within: fnmatch pattern on an enclosing module's path or class name; None is anywhere.

    Raises:
        MethodError: a parameter is out of range.

    Source: Pulling Back the Curtain on ReLU Networks, arXiv 2507.22832v4 (ReLU); v5, eq. 13 (SiLU).

    Example:
        >>> from pullback.core.overrides import overrides
        >>> z = torch.zeros(1, requires_grad=True)
        >>> with overrides(torch.nn.ReLU(), [SigmoidGate()]):
        ...     torch.autograd.grad(z.relu().sum(), z)
        (tensor([0.5000]),)
    """

    temperature: float = 0.3
    family: Family = "relu"
    within: str | None = None

    def __post_init__(self) -> None:
        require_temperature(self.temperature)
        require_family(self.family)

    @property
    def operations(self) -> frozenset[str]:
        return GATE_FAMILIES[self.family]

    def __call__(self, operation: Operation) -> Any:
        return gated(operation, self.temperature, torch.sigmoid)


@dataclass(frozen=True)
class NormalGate:
    """Backward through an activation is multiplication by Φ(z/τ), the normal distribution function.

    Φ(z/τ) = E_ε 1[z + ε > 0], ε ~ N(0, τ²): SmoothGrad at that one ReLU. As SigmoidGate otherwise, with Φ for σ;
    σ(z/T) ≈ Φ(z/(1.702 T)). GELU: its own gate at τ = 1; its negative slope is dropped, so no τ gives the plain
    derivative.

    Args: as SigmoidGate.

    Source: Pulling Back the Curtain on Deep Networks, arXiv 2507.22832v5, eq. 12 and 14.

    Example:
        >>> from pullback.core.overrides import overrides
        >>> z = torch.tensor([-1.0, 1.0], requires_grad=True)
        >>> with overrides(torch.nn.ReLU(), [NormalGate(1.0)]):
        ...     torch.autograd.grad(z.relu().sum(), z)
        (tensor([0.1587, 0.8413]),)
    """

    temperature: float = 0.6
    family: Family = "relu"
    within: str | None = None

    def __post_init__(self) -> None:
        require_temperature(self.temperature)
        require_family(self.family)

    @property
    def operations(self) -> frozenset[str]:
        return GATE_FAMILIES[self.family]

    def __call__(self, operation: Operation) -> Any:
        return gated(operation, self.temperature, torch.special.ndtr)


def gated(operation: Operation, temperature: float, distribution: Callable[[Tensor], Tensor]) -> Any:
    """The operation's value with the derivative E[g'(z + ε)], ε of this distribution and scale."""
    z = operation.args[0]
    constant = z.detach()
    slope = _negative_slope(operation, constant)
    if slope is None:
        return PASS
    wide = at_least_float32(constant)

    def share_above(threshold: float) -> Tensor:
        return distribution((wide - threshold) / temperature)

    if operation.name == "relu6":
        gate = share_above(0.0) - share_above(6.0)
    elif operation.name == "hardtanh":
        low = operation.argument(1, "min_val", -1.0)
        gate = share_above(low) - share_above(operation.argument(2, "max_val", 1.0))
    elif operation.name == "threshold":
        gate = share_above(operation.argument(1, "threshold"))
    else:
        gate = share_above(0.0)
        if not isinstance(slope, float) or slope != 0.0:
            gate = slope + (1 - slope) * gate
    value = operation.function(constant, *operation.args[1:], **operation.kwargs)
    return through_ratio(z, value, gate.to(z.dtype))


def _negative_slope(operation: Operation, z: Tensor) -> float | Tensor | None:
    """The derivative below zero; None where it is random or carries signal itself."""
    if operation.name == "leaky_relu":
        return float(operation.argument(1, "negative_slope", 0.01))
    if operation.name == "rrelu":
        if operation.argument(3, "training", False):
            return None
        lower, upper = operation.argument(1, "lower", 1 / 8), operation.argument(2, "upper", 1 / 3)
        return (float(lower) + float(upper)) / 2
    if operation.name == "prelu":
        weight = operation.argument(1, "weight")
        if weight.requires_grad:
            return None
        wide = at_least_float32(weight.detach())
        return wide if weight.numel() == 1 else wide.reshape(-1, *[1] * (z.dim() - 2))
    return 0.0


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision widened to float32; anything wider unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def require_temperature(temperature: object, name: str = "temperature") -> None:
    """Check that a temperature is a finite positive number. Raises MethodError."""
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 0 < float(temperature) < math.inf:  # type: ignore[arg-type]
        raise MethodError(f"{name} is a finite number above 0, for example 0.3; got {temperature!r}.")


def require_family(family: object) -> None:
    """Check the name of a gate family. Raises MethodError."""
    if family not in GATE_FAMILIES:
        raise MethodError(f'family is "relu", "gelu" or "silu", got {family!r}.')
