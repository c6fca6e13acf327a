"""The transforms themselves: inverses, adjoints, other people's implementations, frequencies, bands."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from tests.golden_net import TinySeries

LENGTHS = [1, 2, 3, 15, 16, 64]
ALONG = [
    pb.Fourier(),
    pb.Fourier("one"),
    pb.DCT(),
    pb.STFT(),
    pb.STFT(8, 3, "hamming"),
    pb.STFT(5, 5, "rectangular"),
    pb.Wavelet("haar"),
    pb.Wavelet("sym4", level=2),
    pb.Wavelet("bior4.4", level=2),
    pb.Wavelet("bior3.5", level=1, mode="symmetric"),
    pb.Chain(pb.DCT(), pb.Wavelet("db2")),
]
PLANES = [
    pb.Fourier(dim=(-2, -1)),
    pb.Fourier("one", dim=(-2, -1)),
    pb.DCT(dim=(2, 3)),
    pb.Wavelet("db2", dim=(-2, -1)),
    pb.Wavelet("bior2.2", dim=(-2, -1), level=2, mode="symmetric"),
]


def signals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("domain", ALONG, ids=repr)
@pytest.mark.parametrize("length", LENGTHS)
def test_synthesis_gives_the_signal_back(domain: Any, length: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        x = signals(2, 3, length).to(dtype)
        for again in (domain.synthesis(domain.analysis(x)) if not isinstance(domain, pb.Chain) else x, None):
            if again is None:
                fitted = domain.fitted(x)
                again = fitted.synthesis(fitted.analysis(x).clone())
            assert again.dtype == dtype
            torch.testing.assert_close(again, x, rtol=0, atol=tolerance)


@pytest.mark.parametrize("domain", PLANES, ids=repr)
@pytest.mark.parametrize("shape", [(8, 8), (7, 12), (5, 1)])
def test_synthesis_gives_the_image_back(domain: Any, shape: tuple[int, int]) -> None:
    x = signals(2, 3, *shape)
    torch.testing.assert_close(domain.synthesis(domain.analysis(x)), x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("domain", [*ALONG, *PLANES], ids=repr)
def test_gradients_go_through_the_true_adjoint(domain: Any) -> None:
    """<S c, g> = Re <c, S* g> for coefficients and gradients that have nothing to do with each other."""
    x = signals(2, 3, 8, 15)
    domain = domain.fitted(x)
    like = domain.analysis(x)
    c = torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
    value, g = domain.synthesis(c), signals(2, 3, 8, 15, seed=2)
    (pulled,) = torch.autograd.grad(value, c, g)
    inner = (c.detach() * pulled.conj()).sum()
    torch.testing.assert_close(inner.real, (value.detach() * g).sum(), rtol=1e-12, atol=0)


def test_cosines_are_scipys_and_orthonormal() -> None:
    scipy_fft = pytest.importorskip("scipy.fft")
    for length in LENGTHS:
        x = signals(2, length)
        wanted = torch.from_numpy(scipy_fft.dct(x.numpy(), norm="ortho"))
        torch.testing.assert_close(pb.DCT().analysis(x), wanted, rtol=0, atol=1e-13)
    image = signals(2, 6, 7)
    wanted = torch.from_numpy(scipy_fft.dctn(image.numpy(), axes=(1, 2), norm="ortho"))
    torch.testing.assert_close(pb.DCT(dim=(-2, -1)).analysis(image), wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", ["periodization", "symmetric", "zero"])
@pytest.mark.parametrize("name", ["haar", "db3", "bior2.6", "rbio1.3"])
@pytest.mark.parametrize("length", [15, 16, 37])
def test_wavelets_are_pywavelets(name: str, mode: str, length: int) -> None:
    pywt = pytest.importorskip("pywt")
    x, domain = signals(2, length), pb.Wavelet(name, level=2, mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = pywt.wavedec(x.numpy(), name, level=2, mode=mode)
        assert torch.equal(domain.analysis(x), torch.from_numpy(np.concatenate(parts, -1)))
        c = signals(2, sum(part.shape[-1] for part in parts), seed=1)
        pieces = [piece.numpy() for piece in c.split([part.shape[-1] for part in parts], -1)]
        wanted = torch.from_numpy(pywt.waverec(pieces, name, mode=mode)[..., :length])
    torch.testing.assert_close(domain.fitted(x).synthesis(c), wanted, rtol=0, atol=1e-13)
    sizes = domain.level_sizes(length)
    assert list(sizes) == ["approximation", "detail 2", "detail 1"]
    assert list(sizes.values()) == [part.shape[-1] for part in parts]


def test_image_wavelets_are_pywavelets() -> None:
    pywt = pytest.importorskip("pywt")
    x = signals(16, 8)
    whole = pywt.coeffs_to_array(pywt.wavedec2(x.numpy(), "db2", mode="periodization", level=2))[0]
    found = pb.Wavelet("db2", level=2, dim=(-2, -1)).analysis(x[None])[0]
    assert torch.equal(found, torch.from_numpy(whole))


def test_the_stft_is_its_definition() -> None:
    x, domain = signals(1, 40), pb.STFT(8, 2, sample_rate=4.0)
    window = torch.hann_window(8, dtype=torch.float64)
    found = domain.analysis(x)
    assert found.shape == (1, 5, 23)
    for number in (3, 10, 18):  # windows fully inside: their middles lie at 0, 0.5, 1, ... s minus the lead
        start = 2 * number - 6
        wanted = torch.fft.rfft(x[0, start : start + 8] * window) if start >= 0 else None
        if wanted is not None:
            torch.testing.assert_close(found[0, :, number], wanted, rtol=0, atol=1e-13)
            assert float(domain.times(40)[number]) == (start + 4) / 4.0
    assert domain.frequencies(40).tolist() == [0, 0.5, 1, 1.5, 2]


def test_frequencies() -> None:
    rate = 100.0
    for length in (15, 16):
        time = torch.arange(length, dtype=torch.float64) / rate
        for domain, exact in (
            (pb.Fourier("one", rate), True),
            (pb.Fourier("two", rate), True),
            (pb.DCT(sample_rate=rate), False),
        ):
            axis = domain.frequencies(length)
            tone = (2 * torch.pi * 3 * rate / length * time).cos()[None]
            peak = axis[domain.analysis(tone)[0].abs().argmax()].abs()
            assert abs(float(peak) - 3 * rate / length) < (1e-9 if exact else rate / length)
    assert pb.Fourier().frequencies(4).tolist() == [0, 0.25, -0.5, -0.25]
    plane = pb.Fourier("one", dim=(-2, -1)).frequencies((4, 6))
    assert plane.shape == (4, 4)
    assert float(plane[1, 2]) == pytest.approx((0.25**2 + (2 / 6) ** 2) ** 0.5)
    slow = pb.Wavelet("db4", level=2, sample_rate=64.0).frequencies(32)
    assert slow.unique().tolist() == [4, 12, 24]  # 0-8, 8-16, 16-32 Hz


def test_principal_components() -> None:
    data = signals(50, 3, 4) @ torch.diag(torch.tensor([1.0, 4.0, 0.1, 2.0]).double()) + 5
    full = pb.PCA.fit(data)
    x = data[:2]
    torch.testing.assert_close(full.synthesis(full.analysis(x)), x, rtol=0, atol=1e-12)
    spread = full.analysis(data).flatten(0, 1)
    covariance = spread.T @ spread / len(spread)
    assert float((covariance - covariance.diag().diag()).abs().max()) < 1e-12
    assert covariance.diag().tolist() == sorted(covariance.diag().tolist(), reverse=True)
    two = pb.PCA.fit(data, components=2)
    found = pb.explain(nn.Flatten(), x, target=3, method=pb.InDomain(two, pb.IntegratedGradients(steps=2)))
    assert any("loses something" in note for note in found.diagnostics["notes"])
    kept = two.synthesis(two.analysis(x))
    start = two.synthesis(two.analysis(torch.zeros_like(x)))
    change = (kept - start).flatten(1)[:, 3]
    torch.testing.assert_close(found.values.flatten(1).sum(1), change, rtol=0, atol=1e-12)  # type: ignore[union-attr]
    assert not pb.explain(
        nn.Flatten(), x, target=3, method=pb.InDomain(full, pb.IntegratedGradients(steps=2))
    ).diagnostics["notes"]


def test_bands() -> None:
    rate, length = 32.0, 64
    bands = pb.Bands({"low": (0, 4), "mid": (4, 8), "high": (8, 17)})
    x = signals(2, 2, length)
    method = pb.IntegratedGradients(steps=4)
    sums = {}
    for sides in ("one", "two"):
        domain = pb.Fourier(sides, rate)
        found = pb.explain(TinySeries(), x, target=0, method=pb.InDomain(domain, method))
        sums[sides] = bands.sums(found.values, domain, length)  # type: ignore[arg-type]
        total = sum(each.flatten(1).sum(1) for each in sums[sides].values())
        torch.testing.assert_close(total, found.values.flatten(1).sum(1), rtol=0, atol=1e-14)  # type: ignore[union-attr]
        # bin k is k/2 Hz: [4, 8) are the bins from 8 to 15
        if sides == "one":
            torch.testing.assert_close(
                sums["one"]["mid"], torch.as_tensor(found.values)[..., 8:16].sum(-1), rtol=0, atol=1e-15
            )
        gone = bands.without(x, domain, "mid")
        spectrum = torch.fft.rfft(gone).abs()
        assert float(spectrum[..., 8:16].max()) < 1e-12
        torch.testing.assert_close(
            torch.fft.rfft(x)[..., 16:], torch.fft.rfft(gone)[..., 16:], rtol=0, atol=1e-12
        )
    for name in bands.bands:
        torch.testing.assert_close(sums["one"][name], sums["two"][name], rtol=0, atol=1e-15)
    stft = pb.STFT(16, sample_rate=rate)
    values = torch.ones(2, 2, *stft.analysis(x).shape[-2:])
    assert bands.sums(values, stft, length)["low"].shape == (2, 2, values.shape[-1])
    assert float(bands.sums(values, stft, length)["low"][0, 0, 0]) == 2  # 0 and 2 Hz
    waves = pb.Wavelet("haar", level=2, sample_rate=rate)
    assert float(bands.sums(torch.ones(1, length), waves, length)["mid"]) == 16  # the octave 4-8 Hz
