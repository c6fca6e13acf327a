"""Every domain gives the value back: 1e-10 in float64, 1e-6 in float32, of the largest entry."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pullback as pb

GENERATOR = torch.Generator().manual_seed(0)
SIGNALS = torch.randn(2, 3, 128, generator=GENERATOR) + torch.sin(torch.arange(128) / 5)
DATA = torch.randn(4, 3, 400, generator=GENERATOR).double().exp()
DOMAINS: dict[str, Any] = {
    "fourier": pb.Fourier(),
    "one-sided": pb.Fourier(sides="one"),
    "stft": pb.STFT(32),
    "dct": pb.DCT(),
    "orthogonal wavelet": pb.Wavelet("db4"),
    "biorthogonal wavelet": pb.Wavelet("bior2.2"),
    "polar": pb.Polar(),
    "gates": pb.SeasonalTrend(32),
    "parts": pb.SeasonalTrend(32, parts="full"),
    "ica": pb.ICA().fit(DATA),
    "pca": pb.PCA.fit(torch.randn(200, 128, generator=GENERATOR).double()),
}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", DOMAINS)
def test_reconstruction(name: str, dtype: torch.dtype, bound: float) -> None:
    x = SIGNALS.to(dtype)
    domain = DOMAINS[name]
    fitted = domain.fitted(x) if hasattr(domain, "fitted") else domain
    again = fitted.synthesis(fitted.analysis(x)).to(dtype)
    assert (again - x).abs().max() <= bound * x.abs().max()
