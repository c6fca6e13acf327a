"""Norms with constant statistics and attention with constant weights, against their matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pullback.attribution.rules.frozen import FrozenNorm, ValueAttention
from pullback.core.errors import CoverageError, MethodError
from pullback.core.overrides import overrides

ATTENTION = functional.scaled_dot_product_attention


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def jacobian(rule: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(outputs, inputs) under a rule; the value must be untouched, bit for bit."""
    plain = run(x.clone().requires_grad_() * 1).detach()
    rows = []
    for number in range(plain.numel()):
        leaf = x.detach().clone().requires_grad_()
        with overrides(nn.Identity(), [rule]):
            value = run(leaf * 1)
            assert torch.equal(value, plain)
            rows.append(torch.autograd.grad(value.flatten()[number], leaf, allow_unused=True)[0])
    return torch.stack([torch.zeros_like(x) if row is None else row for row in rows]).flatten(1)


def affine(norm: nn.Module) -> nn.Module:
    """Weights and biases that are not one and zero, as constants."""
    norm.double().requires_grad_(False)
    for number, parameter in enumerate(norm.parameters()):
        parameter.copy_(1 + 0.3 * torch.sin(torch.arange(parameter.numel()) + number))
    return norm


def test_layer_norm_is_diagonal() -> None:
    x, norm = draws(2, 5), affine(nn.LayerNorm(5, eps=0.1))
    found = jacobian(FrozenNorm(), norm, x)
    sigma = (x.var(1, unbiased=False, keepdim=True) + 0.1).sqrt()
    assert torch.allclose(found.diagonal(), (norm.weight / sigma).flatten(), atol=1e-15)
    assert torch.equal(found - torch.diag(found.diagonal()), torch.zeros_like(found))
    # the plain derivative is not: the test can fail
    leaf = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(norm(leaf)[0, 0], leaf)
    assert plain[0, 1:].abs().min() > 1e-3


def test_other_norms_are_diagonal() -> None:
    x = draws(2, 4, 3)
    group = x.reshape(2, 2, 6).var(2, unbiased=False).repeat_interleave(2, 1)[..., None]
    instance = x.var(2, unbiased=False, keepdim=True)
    square = x.square().mean((1, 2), keepdim=True)
    weight = affine(nn.GroupNorm(2, 4)).weight[:, None]
    cases: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (affine(nn.GroupNorm(2, 4, eps=0.1)), weight / (group + 0.1).sqrt()),
        (affine(nn.InstanceNorm1d(4, eps=0.1, affine=True)), weight / (instance + 0.1).sqrt()),
        (nn.InstanceNorm1d(4), 1 / (instance + 1e-5).sqrt()),
        (nn.RMSNorm((4, 3), eps=0.1, elementwise_affine=False), 1 / (square + 0.1).sqrt()),
        (nn.RMSNorm((4, 3), elementwise_affine=False), 1 / (square + torch.finfo(x.dtype).eps).sqrt()),
        (
            nn.LayerNorm((4, 3), elementwise_affine=False),
            1 / (x.var((1, 2), False, keepdim=True) + 1e-5).sqrt(),
        ),
    ]
    for norm, wanted in cases:
        found = jacobian(FrozenNorm(), norm, x)
        assert torch.allclose(found, torch.diag(wanted.expand_as(x).flatten()), atol=1e-14), norm


def test_stored_statistics_are_left_alone() -> None:
    x = draws(2, 4, 3)
    norm = affine(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)).eval()
    leaf = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(norm(leaf).sum(), leaf)
    assert torch.allclose(jacobian(FrozenNorm(), norm, x).sum(0), plain.flatten(), atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_statistics_are_float32(dtype: torch.dtype) -> None:
    x = draws(1, 6).to(dtype)
    leaf = x.clone().requires_grad_()
    with overrides(nn.Identity(), [FrozenNorm()]):
        value = functional.layer_norm(leaf, (6,))
        (found,) = torch.autograd.grad(value.sum(), leaf)
    assert torch.equal(value, functional.layer_norm(x, (6,)))
    assert torch.equal(found, (x.float().var(1, False, keepdim=True) + 1e-5).rsqrt().to(dtype).expand(1, 6))


def weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, temperature: float) -> Tensor:
    logits = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    return torch.softmax(logits / temperature, -1)


CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "bool": {"attn_mask": CAUSAL.flip(1) | torch.eye(4, dtype=torch.bool)},
    "additive": {"attn_mask": draws(4, 4, seed=5)},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.9},
}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("masked", MASKS)
def test_fused_attention_reaches_the_values_alone(masked: str, temperature: float) -> None:
    q, k, v = draws(2, 4, 3), draws(2, 4, 3, seed=1), draws(2, 4, 3, seed=2)
    settings = MASKS[masked]
    leaves = [each.requires_grad_() for each in (q, k, v)]
    plain = ATTENTION(*leaves, **settings).detach()
    with overrides(nn.Identity(), [ValueAttention(temperature)]):
        value = ATTENTION(*leaves, **settings)
        assert torch.equal(value, plain)
        g = draws(2, 4, 3, seed=3)
        found = torch.autograd.grad((value * g).sum(), leaves, allow_unused=True)
    mask = CAUSAL if masked == "causal" else settings.get("attn_mask")
    share = weights(q, k, mask, settings.get("scale", 1 / math.sqrt(3)), temperature).detach()
    assert found[0] is None
    assert found[1] is None
    assert torch.allclose(found[2], share.transpose(-1, -2) @ g, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_grouped_queries_and_a_mask_that_carries_signal(temperature: float) -> None:
    q, k, v = draws(1, 4, 3, 2), draws(1, 2, 3, 2, seed=1), draws(1, 2, 3, 2, seed=2).requires_grad_()
    mask = draws(3, 3, seed=4).requires_grad_()
    with overrides(nn.Identity(), [ValueAttention(temperature)]):
        value = ATTENTION(q, k, v, attn_mask=mask, enable_gqa=True)
        found, nothing = torch.autograd.grad(value.sum(), (v, mask), allow_unused=True)
    assert torch.equal(value, ATTENTION(q, k, v, attn_mask=mask, enable_gqa=True))
    assert nothing is None
    share = weights(q, k.repeat_interleave(2, 1), mask.detach(), 1 / math.sqrt(2), temperature)
    wanted = (share.transpose(-1, -2) @ torch.ones_like(q)).reshape(1, 2, 2, 3, 2).sum(2)
    assert torch.allclose(found, wanted, atol=1e-14)


def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (1, 2, 4, 3) that all depend on x (1, 2, 4, 3)."""
    return x * 1.3, x.flip(-1) * 0.7, x.cumsum(2)


def logits(x: Tensor) -> Tensor:
    q, k, _ = split(x)
    return q @ k.mT


WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "matmul": lambda x: logits(x).softmax(-1) @ split(x)[2],
    "function": lambda x: torch.matmul(functional.softmax(logits(x), dim=3), split(x)[2]),
    "float and dropout": lambda x: (
        functional.dropout(logits(x).softmax(-1, dtype=torch.float64), 0.1, training=False) @ split(x)[2]
    ),
    "bmm of flat heads": lambda x: torch.bmm(
        logits(x).softmax(-1).reshape(2, 4, 4), split(x)[2].reshape(2, 4, 3)
    ).reshape(1, 2, 4, 3),
    "einsum": lambda x: torch.einsum("bhqk,bhkd->bhqd", logits(x).softmax(-1), split(x)[2]),
    "values first": lambda x: (split(x)[2].mT @ logits(x).softmax(-1).mT).mT,
    "softmax over rows": lambda x: logits(x).mT.softmax(-2).transpose(2, 3) @ split(x)[2],
    "permuted rows": lambda x: logits(x).mT.softmax(2).permute(0, 1, 3, -2) @ split(x)[2],
    "permuted heads": lambda x: (logits(x).permute(0, 2, 1, 3).softmax(-1).permute(0, 2, 1, 3)) @ split(x)[2],
}


@pytest.mark.parametrize("temperature", [1.0, 0.4, 2.5])
@pytest.mark.parametrize("name", WRITTEN)
def test_attention_that_is_written_out(name: str, temperature: float) -> None:
    """The same derivative as the fused call's, at any temperature, from the weights alone."""
    x = draws(1, 2, 4, 3)

    def fused(x: Tensor) -> Tensor:
        return ATTENTION(*split(x), scale=1.0)

    found = jacobian(ValueAttention(temperature), WRITTEN[name], x)
    assert torch.allclose(found, jacobian(ValueAttention(temperature), fused, x), atol=1e-13)
    share = weights(*split(x)[:2], None, 1.0, temperature)
    (wanted,) = torch.autograd.functional.jacobian(lambda z: share @ split(z)[2], (x,))
    assert torch.allclose(found, wanted.reshape(24, 24), atol=1e-13)


def test_multi_head_attention_is_one_rule_either_way() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.MultiheadAttention(4, 2, batch_first=True).double().eval().requires_grad_(False)
    x = draws(1, 3, 4)
    fused = jacobian(ValueAttention(1.7), lambda z: layer(z, z, z, need_weights=False)[0], x)
    written = jacobian(ValueAttention(1.7), lambda z: layer(z, z, z)[0], x)
    assert torch.allclose(fused, written, atol=1e-13)


def test_other_softmaxes_keep_their_gradient() -> None:
    """A classifier's probabilities, a mixture's gate, a product of two softmaxes."""
    x = draws(2, 3)
    cases: list[Callable[[Tensor], Tensor]] = [
        lambda z: z.softmax(-1),
        lambda z: (z.softmax(-1) * z.tanh()).sum(-1),
        lambda z: z.softmax(-1) @ z.softmax(-1).mT,
        lambda z: z.softmax(-1).log() @ z.mT,
    ]
    for run in cases:
        plain = torch.autograd.functional.jacobian(run, x)
        assert torch.allclose(jacobian(ValueAttention(), run, x).flatten(), plain.flatten(), atol=1e-15)


def test_weights_that_were_masked_after_the_softmax() -> None:
    x = draws(1, 2, 4, 3)

    def run(z: Tensor) -> Tensor:
        return (logits(z).softmax(-1) * CAUSAL) @ split(z)[2]

    share = weights(*split(x)[:2], None, 1.0, 1.0) * CAUSAL
    (wanted,) = torch.autograd.functional.jacobian(lambda z: share @ split(z)[2], (x,))
    assert torch.allclose(jacobian(ValueAttention(), run, x), wanted.reshape(24, 24), atol=1e-13)
    with pytest.raises(
        CoverageError, match=r"ValueAttention\(temperature=2.0, .* scaled, masked or reshaped"
    ):
        jacobian(ValueAttention(2.0), run, x)


def test_temperature_is_checked() -> None:
    with pytest.raises(MethodError, match="temperature is a finite number above 0"):
        ValueAttention(0.0)
