"""Attention rules: what flows to queries, keys and values; eager, fused, grouped and packed attention agree."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pullback.attribution.rules.presets import ATTNLRP, RELP, RELP_WITHOUT_ATTENTION
from tests.attribution.rules.propagation import coefficients, random, relevance

PRESETS = {"detach": RELP, "gradient": RELP_WITHOUT_ATTENTION, "attnlrp": ATTNLRP}
QUERY, KEY, VALUE = random(2, 4, 5, 8), random(2, 4, 5, 8, seed=1), random(2, 4, 5, 8, seed=2)
PADDED = torch.ones(2, 1, 5, 5, dtype=torch.bool)
PADDED[1, :, :, 3:] = False
ADDED = random(1, 1, 5, 5, seed=7)


def fused(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **settings)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.matmul(scores.softmax(-1), v)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    return torch.einsum("bhij,bhjd->bhid", weights / weights.sum(-1, keepdim=True), v)


CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()
SAME: dict[str, tuple[Any, Any]] = {
    "plain": (fused, eager),
    "causal": (lambda q, k, v: fused(q, k, v, is_causal=True), lambda q, k, v: eager(q, k, v, CAUSAL)),
    "boolean": (lambda q, k, v: fused(q, k, v, attn_mask=PADDED), lambda q, k, v: eager(q, k, v, PADDED)),
    "additive": (lambda q, k, v: fused(q, k, v, attn_mask=ADDED), lambda q, k, v: eager(q, k, v, ADDED)),
    "scale": (lambda q, k, v: fused(q, k, v, scale=0.3), lambda q, k, v: eager(q, k, v, scale=0.3)),
    "keywords": (lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v), eager),
}


@pytest.mark.parametrize("attention", PRESETS)
@pytest.mark.parametrize("case", SAME)
def test_fused_equals_eager(case: str, attention: str) -> None:
    weight = random(2, 4, 5, 8, seed=3)
    one, other = SAME[case]
    found = coefficients(one, PRESETS[attention], QUERY, KEY, VALUE, weight=weight)
    wanted = coefficients(other, PRESETS[attention], QUERY, KEY, VALUE, weight=weight)
    for each, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, expected, rtol=1e-11, atol=1e-14)
    assert any(each.any() for each in found[:2]) == (attention != "detach")


def test_constant_attention_gives_all_to_the_values() -> None:
    weight = random(2, 4, 5, 8, seed=3)
    for function in (fused, eager, by_hand):
        of_query, of_key, of_value = coefficients(function, RELP, QUERY, KEY, VALUE, weight=weight)
        assert not of_query.any()
        assert not of_key.any()
        weights = (QUERY @ KEY.transpose(-1, -2) / math.sqrt(8)).softmax(-1)
        torch.testing.assert_close(of_value, weights.transpose(-1, -2) @ weight, rtol=1e-12, atol=1e-14)


def test_uniform_attention_is_the_mean_of_values() -> None:
    zero = torch.zeros_like(QUERY)
    *_, of_value = coefficients(fused, RELP, zero, KEY, VALUE)
    torch.testing.assert_close(of_value, torch.ones_like(VALUE), rtol=1e-13, atol=0)


def test_shares_of_attnlrp() -> None:
    """A quarter of the gradient to query and key, half to the value: gradient times input of a product of three."""
    weight = random(2, 4, 5, 8, seed=3)
    leaves = [each.clone().requires_grad_() for each in (QUERY, KEY, VALUE)]
    plain = torch.autograd.grad((fused(*leaves) * weight).sum(), leaves)
    found = coefficients(fused, ATTNLRP, QUERY, KEY, VALUE, weight=weight)
    for each, gradient, share in zip(found, plain, (0.25, 0.25, 0.5), strict=True):
        torch.testing.assert_close(each, gradient * share, rtol=1e-12, atol=1e-15)


def test_grouped_queries_equal_repeated_heads() -> None:
    few_keys, few_values = KEY[:, :2], VALUE[:, :2]
    weight = random(2, 4, 5, 8, seed=3)
    grouped = coefficients(
        lambda q, k, v: fused(q, k, v, enable_gqa=True), RELP, QUERY, few_keys, few_values, weight=weight
    )
    repeated = coefficients(
        lambda q, k, v: fused(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)),
        RELP, QUERY, few_keys, few_values, weight=weight,
    )  # fmt: skip
    torch.testing.assert_close(grouped[2], repeated[2], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("attention", PRESETS)
def test_a_mask_that_carries_signal(attention: str) -> None:
    """The value is the native one though another kernel runs; constant attention holds the mask, too."""
    found = coefficients(
        lambda q, k, v, m: fused(q, k, v, attn_mask=m), PRESETS[attention], QUERY, KEY, VALUE, ADDED
    )
    wanted = coefficients(eager, PRESETS[attention], QUERY, KEY, VALUE, ADDED)
    for each, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, expected, rtol=1e-11, atol=1e-14)
    assert bool(found[3].any()) == (attention != "detach")


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_multihead_attention_conserves(need_weights: bool, bias: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True).double().eval().requires_grad_(False)

    def run(x: Tensor) -> Tensor:
        return layer(x, x, x, need_weights=need_weights)[0]

    x, weight = random(2, 5, 8), random(2, 5, 8, seed=3)
    total = ((run(x) - run(torch.zeros_like(x))) * weight).sum()
    if bias:  # the values' and the output's bias absorb, whatever the weights: they sum to one
        assert relevance(run, RELP, x, weight=weight).item() == pytest.approx(total.item(), rel=1e-11)
    else:
        assert relevance(run, RELP, x, weight=weight).item() == pytest.approx(
            (run(x) * weight).sum().item(), rel=1e-11
        )


def test_transformer_encoder_without_biases_conserves() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            8, 2, 16, activation="gelu", batch_first=True, norm_first=True, bias=False
        )
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval().requires_grad_(False)
    x, weight = random(2, 5, 8), random(2, 5, 8, seed=3)
    total = (net(x) * weight).sum().item()
    assert relevance(net, RELP, x, weight=weight).item() == pytest.approx(total, rel=1e-11)
    for rules in (RELP_WITHOUT_ATTENTION, ATTNLRP):
        assert abs(relevance(net, rules, x, weight=weight).item() - total) > 1e-2 * abs(total)


def test_complex_rotary_is_linear() -> None:
    angles = torch.polar(torch.ones(5, 4).double(), random(5, 4, seed=8))

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(2, 4, 5, 4, 2))
        return torch.view_as_real(pairs * angles).flatten(-2)

    weight = random(2, 4, 5, 8, seed=3)
    x = QUERY.clone().requires_grad_()
    plain = torch.autograd.grad((rotate(x) * weight).sum(), x)[0]
    torch.testing.assert_close(
        coefficients(rotate, RELP, QUERY, weight=weight)[0], plain, rtol=1e-13, atol=1e-15
    )
