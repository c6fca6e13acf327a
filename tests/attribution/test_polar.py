"""Amplitude and phase: against the one-sided spectrum, closed forms on one bin, and what becomes of undefined phases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import pullback as pb
from pullback.attribution.domains import Fourier, Polar
from pullback.core.errors import InputError, MethodError

from .smooth_series import EXACT, change, draws, explained, mixed, smooth_net


def test_with_the_phases_kept_it_is_the_one_sided_spectrum() -> None:
    """From zeros every bin grows along its own direction: the path is straight in time, whatever the model."""
    for length in (15, 16):
        x = draws(2, 3, length, seed=4)
        result = explained(Polar(), x)
        assert result.values[..., 1, :].abs().max() == 0
        spectrum = explained(Fourier("one"), x).values
        assert torch.allclose(result.values[..., 0, :], spectrum, rtol=0, atol=1e-13)


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 64])
def test_synthesis_gives_every_length_back(length: int) -> None:
    x = draws(2, 3, length, seed=1)
    assert (Polar().synthesis(Polar().analysis(x)) - x).abs().max() < 1e-13
    fitted = Polar().fitted(x)
    assert (fitted.synthesis(fitted.analysis(x).clone()) - x).abs().max() < 1e-13
    single = Polar().fitted(x.float())
    assert (single.synthesis(single.analysis(x.float())) - x.float()).abs().max() < 1e-6


def test_baselines_with_phases_of_their_own_are_honoured() -> None:
    net, x = smooth_net(), mixed()
    for baseline in (draws(*x.shape, seed=2), torch.full_like(x, 0.5), x.roll(3, -1), -x):
        for domain in (Polar(), Polar(phase_baseline=1.0)):
            values = explained(domain, x, baseline, net).values
            assert (values.flatten(1).sum(1) - change(net, x, baseline)).abs().max() < 1e-10
    shifted = explained(Polar(), x, x.roll(3, -1), net).values
    assert shifted[..., 0, :].abs().max() < 1e-13  # the amplitudes are the same
    assert shifted[..., 1, :].abs().max() > 1e-3
    wave = torch.cos(2 * math.pi * 5 * torch.arange(48.0, dtype=torch.float64) / 48).expand_as(x)
    phases = explained(Polar(), x, wave, net).values[..., 1, :]
    assert phases[..., torch.arange(25) != 5].abs().max() == 0  # rounding is no amplitude
    assert phases[..., 5].abs().max() > 1e-5


def test_one_bin_in_closed_form() -> None:
    """f = Σ_t x_t cos(ωt) is A cos φ N/2; from (0, φ₀) the straight line has the integrals below."""
    size, amplitude, phase, start = 16, 1.5, 0.9, 0.3
    t = torch.arange(float(size), dtype=torch.float64)
    wave = torch.cos(2 * math.pi * 2 * t / size)
    x = amplitude * torch.cos(2 * math.pi * 2 * t / size + phase)[None]

    def model(x: Tensor) -> Tensor:
        return x @ wave[:, None]

    values = pb.explain(model, x, target=0, method=pb.InDomain(Polar(phase_baseline=start), EXACT)).values
    turn, scale = phase - start, amplitude * size / 2
    grown = scale * (math.sin(phase) - math.sin(start)) / turn  # ∫ A cos(φ₀ + α·turn) dα
    turned = scale * math.cos(phase) - grown
    assert float(values[0, 0, 2]) == pytest.approx(grown, abs=1e-12)
    assert float(values[0, 1, 2]) == pytest.approx(turned, abs=1e-12)
    others = values[..., torch.arange(size // 2 + 1) != 2]
    assert others.abs().max() < 1e-12


def test_phases_turn_the_short_way_round() -> None:
    t = torch.arange(16.0, dtype=torch.float64) * 2 * math.pi * 3 / 16
    x, baseline = torch.cos(t + 3.0)[None], torch.cos(t - 3.0)[None]
    domain = Polar().fitted(x)
    turn = domain.analysis(x) - domain.analysis(baseline)
    assert float(turn[0, 1, 3]) == pytest.approx(6.0 - 2 * math.pi, abs=1e-12)
    assert (domain.synthesis(domain.analysis(baseline)) - baseline).abs().max() < 1e-13


def test_frequencies_names_and_refusals() -> None:
    assert Polar(sample_rate=100.0).frequencies(5).tolist() == [0.0, 20.0, 40.0]
    assert Polar().labels(torch.Size([2, 3])) == ["amplitude", "phase"]
    assert repr(Polar().fitted(draws(1, 8))) == repr(Polar())
    for wrong, text in (
        (
            {"phase_baseline": "input"},
            "phase_baseline is an angle in radians, or None for the input's phase; got 'in",
        ),
        ({"phase_baseline": float("inf")}, "phase_baseline is an angle"),
        ({"sample_rate": 0}, "sample_rate is in samples per second"),
    ):
        with pytest.raises(MethodError, match=text):
            Polar(**wrong)
    with pytest.raises(MethodError, match=r"how many samples to synthesise.*call \.fitted\(x\) first"):
        Polar().synthesis(Polar().analysis(draws(1, 8)).clone())
    with pytest.raises(InputError, match="takes real values, got"):
        Polar().analysis(draws(1, 8).to(torch.complex128))
    with pytest.raises(InputError, match=r"Polar was fitted to values of shape \(1, 8\), got \(1, 9\)"):
        Polar().fitted(draws(1, 8)).analysis(draws(1, 9))
