"""Independent components: closed forms from the gradients of the time path, honoured baselines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pullback.attribution.domains import ICA
from pullback.core.errors import InputError, MethodError

from .smooth_series import (
    BATCH,
    CHANNELS,
    LENGTH,
    MEAN,
    MIXING,
    change,
    draws,
    explained,
    mean_gradient,
    mixed,
    smooth_net,
    sources,
)


@pytest.fixture(scope="module")
def ica() -> ICA:
    return ICA().fit(mixed(400))


def test_fit_finds_the_sources_strongest_first(ica: ICA) -> None:
    found = ica.analysis(mixed(400)).transpose(0, 1).flatten(1)
    true = sources(400).transpose(0, 1).flatten(1)
    likeness = torch.corrcoef(torch.cat([found, true]))[:3, 3:].abs()
    assert likeness.amax(1).min() > 0.95  # FastICA's own error on samples that are finite
    assert sorted(likeness.argmax(1).tolist()) == [0, 1, 2]
    assert ica.mixing is not None
    assert (ica.mixing.norm(dim=0).diff() <= 0).all()
    assert torch.allclose(found.var(1, correction=0), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("start", ["zeros", "given"])
def test_sources_get_their_share_of_the_time_gradient(ica: ICA, start: str) -> None:
    net, x = smooth_net(), mixed()
    baseline = torch.zeros_like(x) if start == "zeros" else draws(*x.shape, seed=9)
    gradient = mean_gradient(net, x, baseline)
    values = explained(ica, x, baseline, net).values
    assert ica.mixing is not None
    assert ica.unmixing is not None
    for row, component in ((0, 0), (1, 2), (3, 1)):
        moved = ica.unmixing[component] @ (x - baseline)[row]
        felt = sum(ica.mixing[channel, component] * gradient[row, channel] for channel in range(CHANNELS))
        assert torch.allclose(values[row, component], moved * felt, rtol=0, atol=1e-13)
    assert (values.flatten(1).sum(1) - change(net, x, baseline)).abs().max() < 1e-10


def test_mixing_entries_follow_the_closed_form_and_the_baseline_is_honoured(ica: ICA) -> None:
    net, x, domain = smooth_net(), mixed(), replace(ica, parts="mixing")
    assert ica.mixing is not None
    assert ica.mean is not None
    signals = ica.analysis(x)
    at_mean = ica.mean[:, None].expand(BATCH, -1, LENGTH).clone()
    for baseline, offset in ((torch.zeros_like(x), True), (at_mean, False)):
        gradient = mean_gradient(net, x, baseline)
        values = explained(domain, x, baseline, net).values
        for component in range(3):
            score = torch.zeros(BATCH, dtype=torch.float64)
            for channel in range(CHANNELS):
                score += ica.mixing[channel, component] * (signals[:, component] * gradient[:, channel]).sum(
                    -1
                )
            assert torch.allclose(values.sum(1)[:, component], score, rtol=0, atol=1e-12)
        mean = torch.einsum("c,bct->bc", ica.mean, gradient) * offset
        assert torch.allclose(values[..., -1], mean, rtol=0, atol=1e-11)
        total = values.flatten(1).sum(1)
        assert (total - change(net, x, baseline)).abs().max() < 1e-10
    with pytest.raises(InputError, match="this one, such as a baseline, is no such mixture"):
        explained(domain, x, draws(*x.shape, seed=9), net)


def test_order_and_sign_of_components_are_only_names(ica: ICA) -> None:
    order, signs = torch.tensor([2, 0, 1]), torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    assert ica.mixing is not None
    assert ica.unmixing is not None
    other = replace(ica, mixing=ica.mixing[:, order] * signs, unmixing=ica.unmixing[order] * signs[:, None])
    x = mixed()
    assert torch.allclose(explained(other, x).values, explained(ica, x).values[:, order], rtol=0, atol=1e-14)


def test_signals_of_fewer_dimensions_than_channels() -> None:
    """After an average reference one channel is minus the sum of the others."""
    three = mixed(400)
    x = torch.cat([three, -three.sum(1, keepdim=True)], 1)
    ica = ICA().fit(x)
    assert ica.components == 3
    assert (ica.synthesis(ica.analysis(x)) - x).abs().max() < 1e-12
    with pytest.raises(
        MethodError, match="4 components were asked of signals with 4 channels and 3 dimensions"
    ):
        ICA(components=4).fit(x)
    with pytest.raises(
        InputError, match=r"ICA with 2 components does not represent .* ICA\(\).fit\(signals\)"
    ):
        ICA(components=2).fit(x)
    with pytest.raises(InputError, match="does not represent this signal"):
        ica.analysis(draws(1, 4, 30))


def test_a_given_mixing_needs_no_fit_and_prints_as_a_digest() -> None:
    ica = ICA(mixing=MIXING)
    assert torch.allclose(ica.analysis(mixed()), torch.linalg.inv(MIXING) @ mixed(), rtol=0, atol=1e-12)
    assert ica == ICA(mixing=MIXING.clone())
    assert hash(ica) == hash(ICA(mixing=MIXING.clone()))
    assert ica != ICA(mixing=MIXING * 2)
    assert repr(ica).startswith("ICA(mixing='3x3:")
    assert repr(ICA(parts="mixing", seed=4)) == "ICA(parts='mixing', seed=4)"


def test_what_ica_refuses(ica: ICA) -> None:
    x = mixed()
    for method in (ICA(), ICA(parts="mixing")):
        with pytest.raises(MethodError, match=r"is not fitted: call ICA\(\).fit\(signals\)"):
            explained(method, x)
    for wrong, text in (
        ({"parts": "gates"}, 'parts is "sources" or "mixing"'),
        ({"components": 0}, "components is a whole number"),
        ({"iterations": None}, "iterations is a whole number"),
        ({"mean": MEAN}, "needs the mixing too"),
        ({"mixing": MEAN}, r"mixing is \(channels, components\), got \(3,\)"),
        ({"mixing": MIXING, "mean": MEAN[:2]}, r"mean has shape \(2,\); the mixing asks for \(3,\)"),
    ):
        with pytest.raises(MethodError, match=text):
            ICA(**wrong)
    with pytest.raises(
        InputError, match=r"3 channels and 3 components: it takes signals \(B, 3, T\), got \(1, 2, 9\)"
    ):
        ica.analysis(draws(1, 2, 9))
    with pytest.raises(InputError, match=r"real signals, got torch\.complex128"):
        ica.analysis(mixed().to(torch.complex128))
    with pytest.raises(InputError, match="takes finite signals"):
        ICA().fit(torch.full((2, 3, 40), float("nan")))
    with pytest.raises(MethodError, match="did not reach tolerance=1e-15 in 1 iterations"):
        ICA(tolerance=1e-15, iterations=1).fit(x)
    with pytest.raises(
        MethodError, match=r"only together with the example whose sources are mixed.*fitted\(x\)"
    ):
        replace(ica, parts="mixing").analysis(x)
