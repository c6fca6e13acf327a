"""Methods other than integrated gradients in domains; text, files and half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.attribution.spelling import parse_method
from tests.golden_net import TinySeries


def signals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


METHODS: list[Any] = [
    pb.Gradient(),
    pb.InputXGradient(),
    pb.SmoothGrad(samples=3),
    pb.VarGrad(samples=3),
    pb.SmoothGrad(pb.IntegratedGradients(steps=2), samples=3),
    pb.ExpectedGradients(samples=3),
    pb.LRP(uncovered="gradient"),
    pb.SemanticPullback(),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize(
    "domain", [pb.Fourier("one"), pb.STFT(8), pb.Wavelet("db2")], ids=lambda d: type(d).__name__
)
def test_every_method_works_in_every_domain(domain: Any, method: Any) -> None:
    net = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(60, 3)).double()
    x = signals(3, 2, 15)
    whole = pb.explain(net, x, target=1, method=pb.InDomain(domain, method)).values
    assert isinstance(whole, Tensor)
    assert whole.dtype == torch.float64
    assert whole.shape == domain.analysis(x).shape
    assert bool(torch.isfinite(whole).all())
    assert float(whole.abs().max()) > 0
    single = [pb.explain(net, row[None], target=1, method=pb.InDomain(domain, method)).values for row in x]
    alone = torch.cat([each for each in single if isinstance(each, Tensor)])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-13)


def test_products_of_gradients_sum_as_in_time() -> None:
    """Σ Re(c · conj(S*g)) = Σ x · g, for gradients and for relevance."""
    net = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(60, 3)).double()
    x = signals(3, 2, 15)
    for method in (pb.InputXGradient(), pb.LRP()):
        plain = pb.explain(net, x, target=1, method=method).values.flatten(1).sum(1)  # type: ignore[union-attr]
        for domain in (pb.Fourier("one"), pb.STFT(8), pb.Wavelet("bior2.2", level=1)):
            found = pb.explain(net, x, target=1, method=pb.InDomain(domain, method)).values
            torch.testing.assert_close(found.flatten(1).sum(1), plain, rtol=0, atol=1e-12)  # type: ignore[union-attr]


def test_a_gradient_is_the_derivative_by_the_amplitude() -> None:
    net, x, domain = TinySeries(), signals(1, 2, 16), pb.Fourier("one")
    found = pb.explain(net, x, target=1, method=pb.InDomain(domain, pb.Gradient())).values
    c, step = domain.analysis(x), 1e-6
    for channel, k in ((0, 0), (1, 3), (0, 8)):
        longer, shorter = c.clone(), c.clone()
        longer[0, channel, k] *= 1 + step / c[0, channel, k].abs()
        shorter[0, channel, k] *= 1 - step / c[0, channel, k].abs()
        with torch.no_grad():
            fitted = domain.fitted(x)
            rise = (net(fitted.synthesis(longer)) - net(fitted.synthesis(shorter)))[0, 1] / (2 * step)
        assert float(found[0, channel, k]) == pytest.approx(float(rise), rel=1e-5)  # type: ignore[index]


def test_text_and_files(tmp_path: Any) -> None:
    for text, domain in (
        ("in_domain(fourier(), ig)", pb.Fourier()),
        ('in_domain(fourier("one", sample_rate=32.0), ig)', pb.Fourier("one", 32.0)),
        ('in_domain(chain(wavelet("haar"), dct), ig)', pb.Chain(pb.Wavelet("haar"), pb.DCT())),
    ):
        method = parse_method(text)
        assert method == pb.InDomain(domain, pb.IntegratedGradients())
        assert parse_method(repr(method)) == method
    x = signals(2, 2, 15)
    found = pb.explain(TinySeries(), x, target=1, method='in_domain(fourier("one"), ig(steps=2))')
    assert found.domain == repr(pb.Fourier("one"))
    found.save(tmp_path / "a.safetensors")
    again = pb.load(tmp_path / "a.safetensors")
    assert again.domain == found.domain
    assert torch.equal(again.point, pb.Fourier("one").analysis(x))  # type: ignore[arg-type]
    assert torch.equal(again.values, found.values)  # type: ignore[arg-type]


def test_half_precision_works_through_a_wider_transform() -> None:
    net, x = TinySeries(), signals(2, 2, 16).bfloat16()
    method = pb.InDomain(pb.Fourier("one"), pb.IntegratedGradients(steps=8))
    low = pb.explain(net.bfloat16(), x, target=1, method=method)
    assert low.values.dtype == torch.bfloat16  # type: ignore[union-attr]
    high = pb.explain(net.double(), x.double(), target=1, method=method)
    apart = (low.values.double() - high.values).norm() / high.values.norm()  # type: ignore[union-attr, operator]
    assert float(apart) < 0.1  # bfloat16 keeps 8 bits, and the scores differ by little
