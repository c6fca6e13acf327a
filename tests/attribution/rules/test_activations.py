"""The identity rule: g(x) / x everywhere, its limit at zero, and the same for hand-written and opaque activations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pullback.attribution.rules.activations import (
    IdentityRule,
    OpaqueActivation,
    ShiftedIdentityRule,
    secant,
)
from pullback.attribution.rules.presets import RELP
from pullback.core.audit import audit
from pullback.core.overrides import overrides
from tests.attribution.rules.propagation import coefficients, random

C = math.sqrt(2 / math.pi)
# name -> (function, derivative at zero)
ACTIVATIONS: dict[str, tuple[Any, float]] = {
    "gelu": (F.gelu, 0.5),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), 0.5),
    "silu": (F.silu, 0.5),
    "mish": (F.mish, 0.6),
    "hardswish": (F.hardswish, 0.5),
    "elu": (F.elu, 1.0),
    "celu": (F.celu, 1.0),
    "selu": (F.selu, 1.7580993408473766),  # torch's derivative at its kink, the one from the left
    "tanh": (torch.tanh, 1.0),
    "hardtanh": (F.hardtanh, 1.0),
    "softsign": (F.softsign, 1.0),
    "clamp": (lambda x: x.clamp(-0.5, 1.5), 1.0),
    "atan": (torch.atan, 1.0),
    "expm1": (torch.expm1, 1.0),
}
HAND_WRITTEN: dict[str, tuple[Any, Any]] = {
    "gelu": (lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), F.gelu),
    "gelu_tanh": (lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * x**3))), None),
    "gelu_tanh_pow": (lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 3.0)))), None),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), None),
    "swish_in_place": (lambda x: (x * 1.0).mul_(torch.sigmoid(x)), F.silu),
    "mish": (lambda x: x * torch.tanh(F.softplus(x)), F.mish),
    "silu_exp": (lambda x: x * (1 / (1 + torch.exp(-x))), F.silu),
    "silu_division": (lambda x: x / (1 + torch.exp(-x)), F.silu),
    "relu_squared": (lambda x: F.relu(x).square(), None),
    "aten": (torch.ops.aten.silu.default, F.silu),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_identity_rule_is_value_over_input(name: str) -> None:
    function, slope = ACTIVATIONS[name]
    x = torch.cat([random(20) * 3, torch.tensor([0.0, -0.0, 1e-200])]).double()
    (found,) = coefficients(function, RELP, x)
    regular = x.abs() > 1e-100
    torch.testing.assert_close(
        found[regular], (function(x) / x)[regular], rtol=1e-14, atol=0
    )  # one division's rounding
    if name != "softsign":  # decomposed: x / (1 + |x|) with a constant denominator
        torch.testing.assert_close(
            found[~regular], torch.full((3,), slope, dtype=x.dtype), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written_activations_obey_it(name: str) -> None:
    function, native = HAND_WRITTEN[name]
    x = random(30) * 2
    (found,) = coefficients(function, RELP, x)
    torch.testing.assert_close(found, function(x) / x, rtol=1e-12, atol=1e-15)
    if native is not None:
        torch.testing.assert_close(found, coefficients(native, RELP, x)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "spelling", ["positional", "keywords", "one bound at a time", "broadcast", "in place"]
)
def test_clamp_by_tensors_is_clamp_by_numbers_entry_by_entry(spelling: str) -> None:
    """Entries whose bounds hold zero obey the identity rule; where g(0) is a bound, the gradient stays."""
    x = torch.tensor([-2.0, 0.0, 0.3, 2.0, 2.0, -3.0]).double()
    low = torch.tensor([-0.5, -0.5, -0.5, -0.5, 0.5, 0.5]).double()
    high = torch.tensor([1.5, 1.5, 1.5, 1.5, 3.0, 3.0]).double()
    written: dict[str, Any] = {
        "positional": lambda x: torch.clamp(x, low, high),
        "keywords": lambda x: x.clip(min=low, max=high),
        "one bound at a time": lambda x: x.clamp_min(low).clamp_max(high),
        "broadcast": lambda x: x.clamp(low.expand(2, 6), high),
        "in place": lambda x: (x * 1.0).clamp_(low, high),
    }
    (found,) = coefficients(written[spelling], RELP, x)
    identity = torch.tensor([0.25, 1.0, 1.0, 0.75, 1.0, 0.0]).double()
    if spelling == "broadcast":
        identity = 2 * identity
    torch.testing.assert_close(found, identity, rtol=1e-15, atol=0)
    for entry in range(4):
        (by_number,) = coefficients(lambda x: x.clamp(-0.5, 1.5), RELP, x[entry : entry + 1])
        assert by_number.item() == identity[entry] / (2 if spelling == "broadcast" else 1)


def test_bounds_that_carry_signal_share_as_a_maximum_does() -> None:
    x, low = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 0.5]).double()
    of_x, of_low = coefficients(torch.clamp, RELP, x, low)
    assert of_x.tolist() == [1, 0]
    assert of_low.tolist() == [0, 1]


def test_relu_is_its_gradient() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0])
    assert torch.equal(coefficients(F.relu, RELP, x)[0], torch.tensor([0.0, 0.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_inputs_have_finite_ratios(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, 1e-40, -1e-40, -40.0, 40.0, -1e4, 1e4, 6e-8]).to(dtype)
    for function in (F.gelu, F.silu, torch.tanh):
        (found,) = coefficients(function, RELP, x)
        assert found.dtype == dtype
        assert torch.isfinite(found).all()
        slope = 1.0 if function is torch.tanh else 0.5
        assert found[:4].tolist() == pytest.approx([slope] * 4, rel=1e-2)
    assert coefficients(F.gelu, RELP, torch.tensor([-40.0]))[0].item() == 0


def test_a_wrong_slope_would_be_seen() -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(secant(x, F.gelu(x), 0.0).sum(), x)[0].tolist() == [0, 0]
    assert coefficients(F.gelu, (IdentityRule(),), torch.zeros(2).double())[0].tolist() == [0.5, 0.5]


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("the rule's derivative must be taken, not this one")


class OwnSiLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Differentiable.apply(x)


class _Differentiable(_Hidden):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grads[0] * (s + x * s * (1 - s))


class OwnSoftmaxActivation(nn.Module):
    """Called an activation and of equal shape, but not elementwise."""

    def forward(self, x: Tensor) -> Tensor:
        return _Mixing.apply(x)


class _Mixing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


def test_opaque_activation_modules_obey_the_identity_rule() -> None:
    x = random(2, 5)
    net = nn.Sequential(nn.Linear(5, 5, bias=False), OwnSiLU(), nn.Linear(5, 1, bias=False)).double()
    same = nn.Sequential(net[0], nn.SiLU(), net[2])
    torch.testing.assert_close(
        coefficients(net, RELP, x)[0], coefficients(same, RELP, x)[0], rtol=0, atol=1e-14
    )


def test_opaque_modules_that_mix_entries_are_named() -> None:
    net = nn.Sequential(OwnSoftmaxActivation())
    x = random(2, 5).requires_grad_()
    with overrides(net, (OpaqueActivation(),)) as coverage:
        found = audit(net(x), coverage)
    assert [(entry.operation, entry.module_path) for entry in found] == [("_Mixing", "0")]


def test_shifted_identity_lets_a_sigmoid_carry() -> None:
    x = random(7)
    (found,) = coefficients(torch.sigmoid, (ShiftedIdentityRule(("sigmoid",)), *RELP), x)
    torch.testing.assert_close(found, (torch.sigmoid(x) - 0.5) / x, rtol=1e-12, atol=0)
    assert coefficients(torch.sigmoid, (ShiftedIdentityRule(("sigmoid",)),), torch.zeros(1))[
        0
    ].item() == pytest.approx(0.25)
