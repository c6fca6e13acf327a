"""Soft pooling against a loop over windows, its sums, its limits, and the padding it corrects."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pullback.attribution.rules.soft_pool import SoftPool
from pullback.core.errors import MethodError
from pullback.core.overrides import overrides


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pooled_gradient(rule: SoftPool, pool: Callable[[Tensor], Any], u: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of Σ g · pool(u) under a rule, and g. Values and indices must be untouched."""
    leaf = u.detach().clone().requires_grad_()
    plain = pool(u)
    with overrides(nn.Identity(), [rule]):
        found = pool(leaf * 1)
        if isinstance(plain, tuple):
            assert torch.equal(found[1], plain[1])
            found, plain = found[0], plain[0]
        assert torch.equal(found, plain)
        weight = draws(*found.shape, seed=1)
        return torch.autograd.grad((found * weight).sum(), leaf)[0], weight


def loop(
    u: Tensor, weight: Tensor, windows: list[list[list[int]]], rule: SoftPool, padding: Sequence[int]
) -> Tensor:
    """Window by window: autograd through Σ w u, w = softmax(u/T), places one by one.

    ``windows[d][o]``: the positions that output o reads along spatial dimension d, outside ones included.
    """
    rank = len(windows)
    sizes = u.shape[-rank:]
    planes = u.detach().reshape(-1, *sizes).clone().requires_grad_()
    outer = weight.reshape(len(planes), *weight.shape[-rank:])
    total = planes.new_zeros(())
    for plane in range(len(planes)):
        for out in itertools.product(*(range(len(each)) for each in windows)):
            entries = []
            for place in itertools.product(*(windows[d][o] for d, o in enumerate(out))):
                if all(0 <= p < size for p, size in zip(place, sizes, strict=True)):
                    entries.append(planes[(plane, *place)])
                elif rule.padding == "faithful" and all(
                    -pad <= p < size + pad for p, size, pad in zip(place, sizes, padding, strict=True)
                ):
                    entries.append(planes.new_zeros(()))
            values = torch.stack(entries)
            share = torch.softmax(values / rule.temperature, 0)
            if rule.weights == "detached":
                share = share.detach()
            total = total + outer[(plane, *out)] * (share * values).sum()
    return torch.autograd.grad(total, planes)[0].reshape(u.shape)


def regular(
    out: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    pad: Sequence[int],
    dilation: Sequence[int],
) -> list[list[list[int]]]:
    return [
        [[o * s - p + k * d for k in range(size)] for o in range(count)]
        for count, size, s, p, d in zip(out, kernel, stride, pad, dilation, strict=True)
    ]


RULES = [
    SoftPool(0.7, weights, padding)  # type: ignore[arg-type]
    for weights in ("live", "detached")
    for padding in ("corrected", "faithful")
]
# kernel, stride, padding, dilation, ceil_mode over 7 × 6 images
CASES = [
    ((2, 2), (2, 2), (0, 0), (1, 1), False),
    ((3, 3), (2, 2), (1, 1), (1, 1), False),
    ((3, 3), (2, 2), (0, 0), (1, 1), True),
    ((3, 3), (2, 2), (1, 1), (1, 1), True),
    ((3, 2), (1, 3), (1, 0), (1, 1), False),
    ((2, 3), (2, 1), (1, 1), (3, 2), False),
    ((2, 2), (3, 3), (1, 1), (2, 2), True),
    ((7, 6), (1, 1), (0, 0), (1, 1), False),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_dimensions_against_a_loop(rule: SoftPool, case: Any) -> None:
    kernel, stride, pad, dilation, ceil = case
    u = draws(1, 2, 7, 6)

    def pool(x: Tensor) -> Tensor:
        return functional.max_pool2d(x, kernel, stride, pad, dilation, ceil)

    found, weight = pooled_gradient(rule, pool, u)
    windows = regular(weight.shape[-2:], kernel, stride, pad, dilation)
    assert torch.allclose(found, loop(u, weight, windows, rule, pad), atol=1e-13)
    if rule.padding == "corrected":
        assert math.isclose(float(found.sum()), float(weight.sum()), abs_tol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_one_and_three_dimensions(rule: SoftPool) -> None:
    line, solid = draws(2, 3, 9), draws(2, 3, 4, 4)
    found, weight = pooled_gradient(rule, nn.MaxPool1d(3, 2, 1, ceil_mode=True), line)
    windows = regular(weight.shape[-1:], (3,), (2,), (1,), (1,))
    assert torch.allclose(found, loop(line, weight, windows, rule, (1,)), atol=1e-13)
    # without a batch dimension
    found, weight = pooled_gradient(rule, nn.MaxPool3d((3, 2, 2), (1, 2, 1), (1, 0, 1)), solid)
    windows = regular(weight.shape[-3:], (3, 2, 2), (1, 2, 1), (1, 0, 1), (1, 1, 1))
    assert torch.allclose(found, loop(solid, weight, windows, rule, (1, 0, 1)), atol=1e-13)


def adaptive(length: int, out: int) -> list[list[int]]:
    return [[*range(math.floor(o * length / out), math.ceil((o + 1) * length / out))] for o in range(out)]


@pytest.mark.parametrize("rule", RULES[:3], ids=repr)
def test_adaptive_pools(rule: SoftPool) -> None:
    u = draws(2, 2, 7, 5)
    found, weight = pooled_gradient(rule, nn.AdaptiveMaxPool2d((3, 2)), u)
    assert torch.allclose(found, loop(u, weight, [adaptive(7, 3), adaptive(5, 2)], rule, (0, 0)), atol=1e-13)
    found, weight = pooled_gradient(rule, nn.AdaptiveMaxPool1d(4, return_indices=True), u[0])
    assert torch.allclose(found, loop(u[0], weight, [adaptive(5, 4)], rule, (0,)), atol=1e-13)
    found, weight = pooled_gradient(rule, nn.AdaptiveMaxPool3d((1, None, 2)), u)
    windows = [adaptive(2, 1), adaptive(7, 7), adaptive(5, 2)]
    assert torch.allclose(found, loop(u, weight, windows, rule, (0, 0, 0)), atol=1e-13)


def test_indices_serve_unpooling() -> None:
    u = draws(1, 2, 4, 4).requires_grad_()
    with overrides(nn.Identity(), [SoftPool(0.5, "detached")]):
        value, index = functional.max_pool2d(u, 2, return_indices=True)
        (found,) = torch.autograd.grad(functional.max_unpool2d(value, index, 2).sum(), u)
    shares = torch.softmax(u.detach().unfold(2, 2, 2).unfold(3, 2, 2).flatten(4) / 0.5, -1)
    assert torch.allclose(found.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4), shares, atol=1e-15)


@pytest.mark.parametrize("weights", ["live", "detached"])
def test_limits(weights: Any) -> None:
    """Cold: the plain derivative, bit for bit. Hot: that of average pooling."""
    u, pool = draws(2, 3, 8, 8), nn.MaxPool2d(2)
    leaf = u.clone().requires_grad_()
    cold, weight = pooled_gradient(SoftPool(1e-6, weights), pool, u)
    assert torch.equal(cold, torch.autograd.grad((pool(leaf) * weight).sum(), leaf)[0])
    hot, weight = pooled_gradient(SoftPool(1e9, weights), pool, u)
    average = torch.autograd.grad((functional.avg_pool2d(leaf, 2) * weight).sum(), leaf)[0]
    # the next term is (u - mean)/T, about 1e-9
    assert torch.allclose(hot, average, atol=1e-8)


def test_faithful_padding_loses_gradient_as_published() -> None:
    """A zero 8 × 8 image, k3 s2 p1: 13.44 of 16 arrives in the official code; all of it when corrected."""
    u = torch.zeros(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    totals = {}
    for padding in ("faithful", "corrected"):
        with overrides(nn.Identity(), [SoftPool(0.3, "live", padding)]):  # type: ignore[arg-type]
            (found,) = torch.autograd.grad(functional.max_pool2d(u, 3, 2, 1).sum(), u)
        totals[padding] = float(found.sum())
    # 9 inner windows lose nothing, 6 on an edge 3/9, one in the corner 5/9
    assert math.isclose(totals["faithful"], 9 + 6 * 6 / 9 + 4 / 9, rel_tol=1e-14)
    assert round(totals["faithful"], 2) == 13.44
    assert math.isclose(totals["corrected"], 16.0, rel_tol=1e-14)


def test_windows_of_padding_alone_and_of_infinities() -> None:
    """A dilated window can miss the image; a masked place is -inf. Neither makes NaN."""
    image = torch.tensor([[[1.0, -1.0]]], dtype=torch.float64)
    found, _ = pooled_gradient(SoftPool(), lambda x: functional.max_pool1d(x, 2, 1, 1, 3), image)
    assert torch.equal(found, torch.zeros_like(found))
    masked = torch.tensor([[[1.0, -math.inf, 0.5, -math.inf]]], dtype=torch.float64)
    found, weight = pooled_gradient(SoftPool(0.3, "live"), lambda x: functional.max_pool1d(x, 2), masked)
    assert torch.equal(found, torch.stack([weight, torch.zeros_like(weight)], -1).flatten(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_shares_are_float32_shares_rounded_once(dtype: torch.dtype) -> None:
    u = draws(1, 1, 6).to(dtype).requires_grad_()
    with overrides(nn.Identity(), [SoftPool(0.3, "detached")]):
        (found,) = torch.autograd.grad(functional.max_pool1d(u, 3).sum(), u)
    shares = torch.softmax(u.detach().float().reshape(1, 1, 2, 3) / 0.3, -1).to(dtype)
    assert torch.equal(found, shares.flatten(2))


def test_vmap_and_forward_mode() -> None:
    u = draws(1, 6)
    with overrides(nn.Identity(), [SoftPool(0.3)]):
        backward = torch.func.jacrev(lambda x: functional.max_pool1d(x, 3))(u)
        forward = torch.func.jacfwd(lambda x: functional.max_pool1d(x, 3))(u)
    assert torch.allclose(backward, forward, atol=1e-14)
    assert torch.allclose(backward.sum(-1), torch.ones_like(backward.sum(-1)))


def test_parameters_are_checked() -> None:
    with pytest.raises(MethodError, match="temperature is a finite number above 0"):
        SoftPool(0.0)
    with pytest.raises(MethodError, match='"live" or "detached", got \'alive\''):
        SoftPool(weights="alive")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match='"corrected" or "faithful", got \'zeros\''):
        SoftPool(padding="zeros")  # type: ignore[arg-type]
