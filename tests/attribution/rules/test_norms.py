"""Norms: the closed form of the rule, hand-written norms, and scale invariance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pullback.attribution.rules.norms import NormRule
from pullback.attribution.rules.presets import RELP
from tests.attribution.rules.propagation import coefficients, random, relevance

GAMMA, BETA = random(6, seed=4), random(6, seed=5)
EPSILON = 1e-5


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (6,), GAMMA, BETA, EPSILON)


HAND_WRITTEN: dict[str, Any] = {
    "var": lambda x: (
        (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + EPSILON).sqrt() * GAMMA + BETA
    ),
    "rsqrt": lambda x: (
        (x - x.mean(-1, keepdim=True))
        * torch.rsqrt((x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + EPSILON)
        * GAMMA
        + BETA
    ),
    "var_mean": lambda x: (lambda spread: (x - spread[1]) * (spread[0] + EPSILON).rsqrt() * GAMMA + BETA)(
        torch.var_mean(x, -1, unbiased=False, keepdim=True)
    ),
}
RMS: dict[str, Any] = {
    "rsqrt": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * GAMMA,
    "sqrt": lambda x: x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPSILON) * GAMMA,
    "power": lambda x: x * (x.square().mean(-1, keepdim=True) + EPSILON) ** -0.5 * GAMMA,
}


def test_layer_norm_against_the_closed_form() -> None:
    x, c = random(3, 6), random(3, 6, seed=1)
    (found,) = coefficients(layer_norm, (NormRule(),), x, weight=c)
    centring = torch.eye(6).double() - torch.ones(6, 6).double() / 6
    expected = (GAMMA * c) @ centring / (x.var(-1, unbiased=False, keepdim=True) + EPSILON).sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written_layer_norms_agree(name: str) -> None:
    x, c = random(3, 6), random(3, 6, seed=1)
    (native,) = coefficients(layer_norm, RELP, x, weight=c)
    (found,) = coefficients(HAND_WRITTEN[name], RELP, x, weight=c)
    torch.testing.assert_close(found, native, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", RMS)
def test_rms_norms_agree(name: str) -> None:
    x, c = random(3, 6), random(3, 6, seed=1)
    (native,) = coefficients(lambda x: F.rms_norm(x, (6,), GAMMA, EPSILON), RELP, x, weight=c)
    torch.testing.assert_close(
        native, GAMMA * c / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt(), rtol=1e-13, atol=0
    )
    torch.testing.assert_close(coefficients(RMS[name], RELP, x, weight=c)[0], native, rtol=1e-12, atol=1e-14)


NORMS: dict[str, Any] = {
    "layer_2d": (nn.LayerNorm((4, 5)), (2, 3, 4, 5)),
    "no_affine": (nn.LayerNorm(5, elementwise_affine=False), (2, 5)),
    "group": (nn.GroupNorm(2, 6), (2, 6, 3, 4)),
    "group_flat": (nn.GroupNorm(3, 6, affine=False), (4, 6)),
    "instance": (nn.InstanceNorm2d(3, affine=True), (2, 3, 4, 5)),
    "rms": (nn.RMSNorm(5), (2, 5)),
    "batch_in_training": (nn.BatchNorm1d(5), (4, 5)),
    "normalize": (lambda x: F.normalize(x, dim=-1), (2, 5)),
}


@pytest.mark.parametrize("name", NORMS)
def test_relevance_is_conserved_but_for_the_bias(name: str) -> None:
    norm, shape = NORMS[name]
    if isinstance(norm, nn.Module):
        norm = norm.double().train(name == "batch_in_training")
        norm.requires_grad_(False)
        for parameter in norm.parameters():
            parameter += 0.3 * random(*parameter.shape, seed=9)
    x, bias = random(*shape), getattr(norm, "bias", None)
    weight = random(*shape, seed=2)
    state = (
        {key: value.clone() for key, value in norm.state_dict().items()}
        if isinstance(norm, nn.Module)
        else {}
    )

    def without_statistics(x: Tensor) -> Tensor:
        if isinstance(norm, nn.Module):
            norm.load_state_dict(state)
        return norm(x)

    total = (without_statistics(x) * weight).sum()
    if bias is not None:
        broadcast = bias if name.startswith("layer") else bias.reshape(1, -1, *[1] * (len(shape) - 2))
        total = total - (weight * broadcast).sum()
    found = relevance(without_statistics, RELP, x, weight=weight)
    assert found.item() == pytest.approx(total.item(), abs=1e-4 if name == "normalize" else 1e-12)
    x = x.clone().requires_grad_()
    plain = torch.autograd.grad((without_statistics(x) * weight).sum(), x)[0]
    assert abs((x * plain).sum().item() - total.item()) > 1e-2


def test_scaling_the_stream_scales_the_coefficient_down() -> None:
    x = random(3, 6)
    norm = nn.RMSNorm(6, eps=0.0).double()
    (once,) = coefficients(norm, RELP, x)
    (twice,) = coefficients(norm, RELP, 2 * x)
    torch.testing.assert_close(twice, once / 2, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_values_and_coefficients(dtype: torch.dtype) -> None:
    x = random(3, 6)
    norm = nn.LayerNorm(6)
    wide = coefficients(norm.double(), RELP, x, weight=random(3, 6, seed=2))[0]
    low = coefficients(norm.to(dtype), RELP, x.to(dtype), weight=random(3, 6, seed=2).to(dtype))[0]
    assert low.dtype == dtype
    assert (low.double() - wide).abs().max() <= wide.abs().max() * (0.03 if dtype == torch.bfloat16 else 1e-5)


def test_cosine_similarity_conserves() -> None:
    a, b = random(4, 6), random(4, 6, seed=1)
    wanted = F.cosine_similarity(a, b, dim=1)
    assert relevance(lambda a, b: F.cosine_similarity(a, b, dim=1), RELP, a, b).item() == pytest.approx(
        wanted.sum().item(), rel=1e-12
    )
    constant = random(1, 6, seed=3)
    assert relevance(lambda a: F.cosine_similarity(a, constant), RELP, a).item() == pytest.approx(
        F.cosine_similarity(a, constant).sum().item(), rel=1e-12
    )
