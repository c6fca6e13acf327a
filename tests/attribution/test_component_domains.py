"""What a domain holds of each example: completeness, and the parts follow the rows, in batches and chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import pullback as pb
from pullback.attribution.domains import ICA, InDomain, Polar, SeasonalTrend

from .smooth_series import BATCH, EXACT, PERIOD, change, explained, mixed, seasons, smooth_net


@pytest.fixture(scope="module")
def ica() -> ICA:
    return ICA().fit(mixed(400))


def domains(ica: ICA) -> list[tuple[Any, Tensor]]:
    return [
        (ica, mixed()),
        (replace(ica, parts="mixing"), mixed()),
        (SeasonalTrend(PERIOD), seasons()),
        (SeasonalTrend(PERIOD, parts="full"), seasons()),
        (Polar(), mixed()),
        (Polar(phase_baseline=0.4), mixed()),
        (SeasonalTrend(PERIOD, robust=True, trend=21), seasons()),
    ]


def test_sums_are_the_change_of_score_and_synthesis_gives_the_signal_back(ica: ICA) -> None:
    net = smooth_net()
    for domain, x in domains(ica):
        fitted = domain.fitted(x)
        assert (fitted.synthesis(fitted.analysis(x)) - x).abs().max() < 1e-12
        single = domain.fitted(x.float())
        assert (single.synthesis(single.analysis(x.float())) - x.float()).abs().max() < 1e-5 * x.abs().max()
        found = explained(domain, x).values.flatten(1).sum(1)
        assert (found - change(net, x, torch.zeros_like(x))).abs().max() < 1e-10


def test_what_is_held_of_an_example_follows_its_row(ica: ICA) -> None:
    net = smooth_net()
    index = torch.tensor([3, 0, 3, 1])
    for domain, x in domains(ica):
        together = explained(domain, x, net=net).values
        for row in range(BATCH):
            alone = explained(domain, x[row : row + 1], net=net).values
            assert torch.allclose(alone[0], together[row], rtol=0, atol=1e-13)
        chunks = pb.explain(net, x, target=1, method=InDomain(domain, EXACT), chunk=3).values
        assert torch.allclose(chunks, together, rtol=0, atol=1e-13)
        problem = pb.pose(net, x, target=1)
        inside = problem.in_domain(domain)
        assert torch.allclose(inside.rows(index).grad(), inside.grad()[index], rtol=0, atol=1e-13)
        assert torch.allclose(EXACT(inside.rows(index)), together[index], rtol=0, atol=1e-13)
        assert torch.allclose(inside.rows(index).score(), problem.score()[index], rtol=0, atol=1e-12)
        assert torch.equal(
            EXACT(problem.rows(index).in_domain(domain)), EXACT(problem.in_domain(domain))[index]
        )


def test_noise_on_the_coefficients_meets_the_parts_of_its_own_example() -> None:
    x, method = seasons(), pb.SmoothGrad(EXACT, samples=3, noise=0.1)
    together = pb.explain(smooth_net(), x, target=1, method=InDomain(SeasonalTrend(PERIOD), method)).values
    alone = pb.explain(smooth_net(), x[2:3], target=1, method=InDomain(SeasonalTrend(PERIOD), method)).values
    assert torch.allclose(together[2], alone[0], rtol=0, atol=1e-12)
