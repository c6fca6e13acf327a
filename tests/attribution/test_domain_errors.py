"""What domains refuse, and what they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import pullback as pb
from pullback.core.errors import InputError, MethodError
from tests.golden_net import TinySeries


def signals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Broken:
    """A pair that is no inverse of each other, in a way to choose."""

    way: str
    linear: ClassVar[bool] = True

    def analysis(self, x: Tensor) -> Tensor:
        return x / 0 if self.way == "infinite" else x

    def synthesis(self, coefficients: Tensor) -> Tensor:
        if self.way == "half":
            return 0.5 * coefficients
        if self.way == "short":
            return coefficients[..., :-1]
        return coefficients.where(
            coefficients > 0, coefficients.exp() - (coefficients.exp() - coefficients).detach()
        )


@dataclass(frozen=True)
class Clipped:
    """Gives x back, and is not linear though it says so."""

    linear = True

    def analysis(self, x: Tensor) -> Tensor:
        return x.sign() * x.square()

    def synthesis(self, coefficients: Tensor) -> Tensor:
        return coefficients.sign() * coefficients.abs().sqrt()


@pytest.mark.parametrize(
    ("domain", "error", "text"),
    [
        (Broken("half"), MethodError, r"does not give the value back.* off by 0\.5 .*lossy = True"),
        (
            Broken("short"),
            MethodError,
            r"synthesis of .* gives shape \(1, 2, 14\) for .*\(1, 2, 15\).*fitted",
        ),
        (Broken("infinite"), InputError, "NaN or infinite"),
        (Clipped(), MethodError, "says linear = True, but its synthesis is not linear"),
        (pb.Fourier, MethodError, r"a domain is an object .* such as Fourier\(\)"),
        (pb.Fourier(dim=0), InputError, "dimension 0.*counts examples"),
        (pb.DCT(dim=(-3, -1)), InputError, "dimension -3"),
        (
            pb.Linear(torch.eye(14).double()),
            InputError,
            r"takes 14 values along dimension -1, got \(1, 2, 15\)",
        ),
        (pb.Chain(pb.Fourier(), pb.DCT()), InputError, "takes real values, got torch.complex128"),
        (pb.PCA.fit(signals(9, 14)), InputError, "takes 14 values"),
    ],
    ids=str,
)
def test_what_cannot_be_explained_says_why(domain: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        method = pb.InDomain(domain, pb.IntegratedGradients(steps=2))
        pb.explain(TinySeries(), signals(1, 2, 15), target=1, method=method)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: pb.Fourier("both"), 'sides is "two" or "one"'),
        (lambda: pb.Fourier(sample_rate=-1.0), "sample_rate is in samples per second"),
        (lambda: pb.DCT(dim=(1, 1)), "dim is"),
        (lambda: pb.STFT(8, 8), r"no window sees, so that nothing .*hop: 2"),
        (lambda: pb.STFT(8, window="round"), "window 'round' is unknown. Choose one of hann"),
        (lambda: pb.Wavelet("db"), 'wavelet "db" is unknown. Nearest: db'),
        (lambda: pb.Wavelet("morl"), "is unknown"),
        (lambda: pb.Wavelet(mode="round"), "mode 'round' is unknown"),
        (lambda: pb.Linear(torch.ones(3, 3)), r"has rank 1, so values of length 3 cannot"),
        (lambda: pb.Linear(torch.eye(3), torch.eye(2)), r"inverse has shape \(2, 2\)"),
        (lambda: pb.PCA(torch.ones(2, 3), torch.zeros(3)), "not orthonormal"),
        (lambda: pb.PCA.fit(torch.ones(4, 3), components=4), "components is a whole number from 1 to 3"),
        (lambda: pb.Bands({}), "bands are given by name"),
        (lambda: pb.Bands({"a": (4, 2)}), r"band 'a' is \(low, high\) in Hz"),
        (
            lambda: pb.Bands({"a": (1, 2)}).masks(pb.Fourier(), 16),
            r"in Hz, but Fourier.* has no sample rate. Give it",
        ),
        (lambda: pb.Bands({"a": (1, 2)}).masks(pb.Linear(torch.eye(2)), 2), "has no frequencies"),
        (
            lambda: pb.Bands({"a": (1, 2)}).sums(torch.ones(1, 9), pb.Fourier("one", 8.0), 15),
            "has 8 frequencies for length 15",
        ),
        (
            lambda: pb.Bands({"a": (1, 2)}).without(torch.ones(1, 9), pb.Fourier("one", 8.0), "b"),
            "no band 'b'",
        ),
    ],
)
def test_parameters_out_of_range_say_what_to_type(make: Any, text: str) -> None:
    with pytest.raises(MethodError, match=text):
        make()


def test_another_length_than_fitted_to_is_refused() -> None:
    for domain in (pb.Fourier("one"), pb.Fourier(), pb.DCT(), pb.STFT(8), pb.Wavelet("haar")):
        with pytest.raises(InputError, match="fitted to length"):
            domain.fitted(signals(1, 16)).analysis(signals(1, 15))
    with pytest.raises(InputError, match=r"has \(9,\) coefficients for length \(16,\), got \(8,\)"):
        pb.Fourier("one").fitted(signals(1, 16)).synthesis(torch.zeros(1, 8, dtype=torch.complex128))
    with pytest.raises(InputError, match=r"takes real values, got torch\.complex128"):
        pb.Fourier().analysis(torch.zeros(1, 8, dtype=torch.complex128))
