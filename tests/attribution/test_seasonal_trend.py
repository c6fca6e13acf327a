"""Trend, seasonal part and residual: closed forms from the gradients of the time path, honoured baselines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pullback.attribution.domains import SeasonalTrend
from pullback.attribution.domains.fixed_parts import FixedParts
from pullback.core.errors import InputError, MethodError

from .smooth_series import (
    BATCH,
    CHANNELS,
    LENGTH,
    PERIOD,
    change,
    draws,
    explained,
    mean_gradient,
    seasons,
    smooth_net,
)


@pytest.mark.parametrize(
    "settings", [{"seasonal": 9}, {"seasonal": 9, "trend": 23}, {"seasonal": 7, "robust": True}]
)
def test_parts_are_those_of_statsmodels(settings: dict[str, Any]) -> None:
    from statsmodels.tsa.seasonal import STL

    x = seasons()
    x[2, 1, 20] += 5.0  # an outlier
    parts = SeasonalTrend(PERIOD, parts="full", **settings).analysis(x)
    fit = STL(x[2, 1].numpy(), period=PERIOD, **settings).fit()
    for part, expected in zip(parts[2, 1], (fit.trend, fit.seasonal, fit.resid), strict=True):
        assert np.abs(part.numpy() - expected).max() < 1e-12


def test_a_gate_gets_the_product_of_its_part_with_the_time_gradient() -> None:
    net, x = smooth_net(), seasons()
    gradient = mean_gradient(net, x, torch.zeros_like(x))
    parts = SeasonalTrend(PERIOD, parts="full").analysis(x)
    result = explained(SeasonalTrend(PERIOD), x, net=net)
    assert torch.equal(result.point, torch.ones(BATCH, CHANNELS, 3, dtype=torch.float64))
    expected = torch.zeros(BATCH, CHANNELS, 3, dtype=torch.float64)
    for part in range(3):
        expected[..., part] = (parts[..., part, :] * gradient).sum(-1)
    assert torch.allclose(result.values, expected, rtol=0, atol=1e-13)
    full = explained(SeasonalTrend(PERIOD, parts="full"), x, net=net).values
    assert torch.allclose(full, parts * gradient[..., None, :], rtol=0, atol=1e-14)
    assert torch.allclose(full.sum(-1), result.values, rtol=0, atol=1e-13)


def test_baselines_of_gates_are_mixtures_of_the_parts() -> None:
    net, x = smooth_net(), seasons()
    trend = SeasonalTrend(PERIOD, parts="full").analysis(x)[..., 0, :]
    kept = explained(SeasonalTrend(PERIOD), x, trend, net).values
    assert kept[..., 0].abs().max() < 1e-13
    assert (kept.flatten(1).sum(1) - change(net, x, trend)).abs().max() < 1e-10
    other = draws(*x.shape, seed=5)
    with pytest.raises(
        InputError, match=r"trend, seasonal, residual.* no such mixture: .* % of it would be lost"
    ):
        explained(SeasonalTrend(PERIOD), x, other, net)
    honoured = explained(SeasonalTrend(PERIOD, parts="full"), x, other, net).values
    assert (honoured.flatten(1).sum(1) - change(net, x, other)).abs().max() < 1e-10


def test_a_part_that_is_zero_gets_nothing() -> None:
    x = torch.ones(1, CHANNELS, LENGTH, dtype=torch.float64)  # STL: all trend, up to rounding
    parts = torch.stack([x, torch.zeros_like(x), torch.zeros_like(x)], -2)
    fixed = FixedParts("parts", parts, x, torch.ones(1, CHANNELS, 3, dtype=torch.float64), ("a", "b", "c"))
    assert torch.equal(fixed.analysis(x), torch.ones(1, CHANNELS, 3, dtype=torch.float64))
    half = fixed.analysis(x / 2)
    assert torch.allclose(half[..., 0], torch.full((1, CHANNELS), 0.5, dtype=torch.float64))
    assert torch.equal(half[..., 1:], torch.zeros(1, CHANNELS, 2, dtype=torch.float64))
    with pytest.raises(
        InputError, match=r"holds the parts of values of shape \(1, 3, 48\), got \(2, 3, 48\)"
    ):
        fixed.analysis(x.repeat(2, 1, 1))


def test_what_seasonal_trend_refuses() -> None:
    for wrong, text in (
        ({"period": 1}, "period is a number of samples, at least 2, got 1"),
        ({"period": 4, "seasonal": 8}, "seasonal is an odd number of seasons, at least 3, got 8"),
        ({"period": 4, "trend": 3}, "trend is an odd number of samples larger than the period 4, got 3"),
        ({"period": 4, "parts": "half"}, 'parts is "gates" or "full", got \'half\''),
    ):
        with pytest.raises(MethodError, match=text):
            SeasonalTrend(**wrong)
    with pytest.raises(InputError, match=r"two seasons, 50 samples along the last axis, got \(4, 3, 48\)"):
        explained(SeasonalTrend(25), seasons())
    with pytest.raises(InputError, match=r"decomposes real series, got torch\.complex128"):
        SeasonalTrend(PERIOD).fitted(seasons().to(torch.complex128))
    for call in (SeasonalTrend(PERIOD).analysis, SeasonalTrend(PERIOD).synthesis):
        with pytest.raises(MethodError, match=r'InDomain\(...\).*\.fitted\(x\) first, or take parts="full"'):
            call(seasons())
