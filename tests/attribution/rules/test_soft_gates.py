"""Soft gates against their formulas: expected derivatives under noise, limits, precision, memory, spelling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pullback.attribution.rules.soft_gates import NormalGate, SigmoidGate
from pullback.core.errors import MethodError
from pullback.core.overrides import overrides

Z = torch.linspace(-7.3, 9.1, 41, dtype=torch.float64)  # no kink of any activation below is hit


def derivative(rule: Any, run: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The derivative of an elementwise run under a rule; its value must be untouched."""
    z = z.detach().clone().requires_grad_()
    plain = run(z.clone()).detach()
    with overrides(nn.Identity(), [rule]):
        value = run(z * 1)
        assert torch.equal(value, plain)
        return torch.autograd.grad(value.sum(), z)[0]


def expected_derivative(run: Callable[[Tensor], Tensor], z: Tensor, draws: Tensor) -> Tensor:
    """The mean of the plain derivative at z + ε over the draws."""
    moved = (z[:, None] + draws).requires_grad_()
    return torch.autograd.grad(run(moved).sum(), moved)[0].mean(1)


def logistic(scale: float, count: int = 20001) -> Tensor:
    """Quantiles of the logistic distribution, midpoints."""
    p = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return scale * torch.logit(p)


def normal(scale: float, count: int = 20001) -> Tensor:
    p = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return scale * torch.special.ndtri(p)


FAMILY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "relu6": functional.relu6,
    "leaky_relu": lambda z: functional.leaky_relu(z, 0.2),
    "prelu": lambda z: functional.prelu(z, torch.tensor([0.3], dtype=torch.float64)),
    "hardtanh": lambda z: functional.hardtanh(z, -2.0, 1.5),
    "threshold": lambda z: functional.threshold(z, 0.7, 0.0),
    "rrelu in eval mode": lambda z: functional.rrelu(z, 0.1, 0.3, training=False),
}


@pytest.mark.parametrize("name", FAMILY)
def test_gate_is_the_expected_derivative_under_noise(name: str) -> None:
    """20001 quantiles stand for the noise: each step of the mean is 1/20001."""
    run = FAMILY[name]
    sigmoid = derivative(SigmoidGate(0.8), run, Z)
    assert torch.allclose(sigmoid, expected_derivative(run, Z, logistic(0.8)), atol=2e-4)
    gaussian = derivative(NormalGate(0.8), run, Z)
    assert torch.allclose(gaussian, expected_derivative(run, Z, normal(0.8)), atol=2e-4)
    assert not torch.allclose(sigmoid, gaussian, atol=1e-2)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("rule", [SigmoidGate(1e-6), NormalGate(1e-6)])
def test_cold_gate_is_the_plain_derivative(name: str, rule: Any) -> None:
    z = Z.clone().requires_grad_()
    (plain,) = torch.autograd.grad(FAMILY[name](z).sum(), z)
    assert torch.equal(derivative(rule, FAMILY[name], Z), plain)


def test_closed_forms() -> None:
    """The formulas of the papers, written with exp and erf."""
    sigma = 1 / (1 + torch.exp(-Z / 0.3))
    assert torch.allclose(derivative(SigmoidGate(0.3), torch.relu, Z), sigma, atol=1e-15)
    phi = (1 + torch.erf(Z / (0.6 * math.sqrt(2)))) / 2
    assert torch.allclose(derivative(NormalGate(0.6), torch.relu, Z), phi, atol=1e-15)
    assert torch.allclose(derivative(NormalGate(0.6, "gelu"), functional.gelu, Z), phi, atol=1e-15)
    wide = 1 / (1 + torch.exp(-Z / 1.6))
    for run in (functional.silu, functional.hardswish):
        assert torch.allclose(derivative(SigmoidGate(1.6, "silu"), run, Z), wide, atol=1e-15)
    # the approximation between the two gates: |σ(1.702 z) - Φ(z)| < 0.01 everywhere
    assert float((torch.sigmoid(1.702 * Z) - torch.special.ndtr(Z)).abs().max()) < 0.01


def test_gelu_gate_is_not_its_slope() -> None:
    """At τ = 1 the gate is Φ(z) and the slope Φ + zφ: .0228 and -.0852 at z = -2 (published digits)."""
    z = torch.tensor([-2.0], dtype=torch.float64)
    assert round(float(derivative(NormalGate(1.0, "gelu"), functional.gelu, z)), 4) == 0.0228
    leaf = z.clone().requires_grad_()
    assert round(float(torch.autograd.grad(functional.gelu(leaf), leaf)[0]), 4) == -0.0852


def test_half_at_zero() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    for rule in (SigmoidGate(0.3), NormalGate(0.6)):
        assert float(derivative(rule, torch.relu, zero)) == 0.5


def test_families_do_not_touch_one_another() -> None:
    z = Z.clone().requires_grad_()
    for run, rule in ((functional.gelu, NormalGate()), (torch.relu, SigmoidGate(1.6, "silu"))):
        (plain,) = torch.autograd.grad(run(z).sum(), z)
        assert torch.equal(derivative(rule, run, Z), plain)


def test_slopes_per_channel() -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slopes = torch.tensor([0.1, 0.5, -0.2], dtype=torch.float64)
    found = derivative(SigmoidGate(0.5), lambda z: functional.prelu(z, slopes), x)
    wanted = torch.stack([s + (1 - s) * torch.sigmoid(x[:, c] / 0.5) for c, s in enumerate(slopes)], 1)
    assert torch.allclose(found, wanted, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gates_are_float32_gates_rounded_once(dtype: torch.dtype) -> None:
    z = Z.to(dtype)
    for rule, gate in ((SigmoidGate(0.3), torch.sigmoid), (NormalGate(0.6), torch.special.ndtr)):
        found = derivative(rule, torch.relu, z)
        assert found.dtype == dtype
        assert torch.equal(found, gate(z.float() / rule.temperature).to(dtype))


def test_gates_under_autocast() -> None:
    """The pre-activation is bfloat16 there, its gate is not computed in it."""
    weight = torch.eye(4)
    x = torch.tensor([[-0.51, 0.37, 1.93, -2.2]])
    with torch.autocast("cpu", torch.bfloat16):
        found = derivative(SigmoidGate(0.3), lambda z: torch.relu(functional.linear(z, weight)), x)
    gate = torch.sigmoid(x.bfloat16().float() / 0.3).bfloat16().float()
    assert torch.equal(found, gate)


def test_only_the_gate_is_kept() -> None:
    saved: list[Tensor] = []
    x = torch.randn(64, requires_grad=True)
    with overrides(nn.Identity(), [SigmoidGate()]):
        z = x.view(8, 8)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            torch.relu(z)
    (kept,) = saved
    assert torch.equal(kept, torch.sigmoid(z.detach() / 0.3))


@pytest.mark.parametrize(
    "run",
    [
        torch.relu,
        functional.relu,
        lambda z: functional.relu(z, inplace=True),
        torch.relu_,
        Tensor.relu,
        Tensor.relu_,
        nn.ReLU(),
        nn.ReLU(inplace=True),
        torch.ops.aten.relu.default,
    ],
)
def test_every_spelling_of_relu(run: Callable[[Tensor], Tensor]) -> None:
    assert torch.equal(derivative(SigmoidGate(0.3), run, Z), torch.sigmoid(Z / 0.3))


def test_vmap_forward_mode_and_double_backward() -> None:
    rule, z = SigmoidGate(0.3), Z[:5].clone()
    gate = torch.sigmoid(z / 0.3)
    with overrides(nn.Identity(), [rule]):
        jacobian = torch.func.jacrev(torch.relu)(z)
        tangent = torch.func.jvp(torch.relu, (z,), (torch.ones_like(z),))[1]
        leaf = z.clone().requires_grad_()
        (first,) = torch.autograd.grad((torch.relu(leaf) ** 2).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), leaf)
    assert torch.allclose(jacobian, torch.diag(gate), atol=1e-15)
    assert torch.allclose(tangent, gate, atol=1e-15)
    # d/dz of 2 y gate, where dy/dz is the gate again and the gate is constant
    assert torch.allclose(second, 2 * gate**2, atol=1e-15)


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan, True, "warm"])
def test_temperature_is_checked(temperature: Any) -> None:
    for rule in (SigmoidGate, NormalGate):
        with pytest.raises(MethodError, match="temperature is a finite number above 0"):
            rule(temperature)


def test_family_is_checked() -> None:
    with pytest.raises(MethodError, match='"relu", "gelu" or "silu", got \'tanh\''):
        NormalGate(1.0, "tanh")  # type: ignore[arg-type]
