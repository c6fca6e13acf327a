"""Integrated gradients in linear domains: golden arrays, closed forms, the shared path, invariances."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from tests.golden_net import TinySeries, series

GOLDEN = Path(__file__).parents[1] / "golden" / "crossdomain_linear_T16.npz"
GAUSS = pb.IntegratedGradients(steps=64, quadrature="gausslegendre")
LENGTHS = [1, 2, 3, 15, 16, 64]
DOMAINS: dict[str, Any] = {
    "fourier": pb.Fourier(),
    "one-sided": pb.Fourier("one"),
    "stft": pb.STFT(8, 3),
    "dct": pb.DCT(),
    "haar": pb.Wavelet("haar"),
    "db4": pb.Wavelet("db4"),
    "biorthogonal": pb.Wavelet("bior2.2", level=1),
    "padded": pb.Wavelet("bior2.6", level=2, mode="symmetric"),
    "channels": pb.Linear(torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, -1.0]]), dim=1),
    "chain": pb.Chain(pb.Linear(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), dim=1), pb.Fourier("one")),
}


def signals(length: int, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, 2, length, generator=generator, dtype=torch.float64)


def values(method: Any, x: Tensor, **settings: Any) -> Tensor:
    found = pb.explain(TinySeries(), x, target=1, method=method, **settings).values
    assert isinstance(found, Tensor)
    return found


def mean_gradient(x: Tensor, start: Tensor, alphas: Tensor) -> Tensor:
    """The mean of the gradients at nodes of equal weight, one backward pass each."""
    total = torch.zeros_like(x)
    for alpha in alphas.tolist():
        z = (start + alpha * (x - start)).requires_grad_()
        total += torch.autograd.grad(TinySeries()(z)[:, 1].sum(), z)[0]
    return total / len(alphas)


@dataclass(frozen=True)
class TrendAndRest:
    """A moving average over five samples, and what it leaves."""

    linear: ClassVar[bool] = True

    def analysis(self, x: Tensor) -> Tensor:
        padded = nn.functional.pad(x, (2, 2), mode="replicate")
        trend = nn.functional.avg_pool1d(padded, 5, stride=1)
        return torch.stack([trend, x - trend], 1)

    def synthesis(self, coefficients: Tensor) -> Tensor:
        return coefficients.sum(1)


def test_golden_arrays_of_linear_domains() -> None:
    golden = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN).items()}
    x, start = series()
    for domain, name in (
        (pb.Wavelet("haar", level=4), "ig_haar"),
        (pb.Linear(golden["haar_matrix"]), "ig_haar"),
        (pb.DCT(), "ig_dct"),
        (pb.Linear(golden["dct_matrix"]), "ig_dct"),
    ):
        found = pb.explain(TinySeries(), x, target=1, method=pb.InDomain(domain, GAUSS), baseline=start)
        # values are of order 1e-4, and agree to a few units in the last place
        torch.testing.assert_close(found.values, golden[name], rtol=1e-12, atol=1e-17)
        assert float(found.diagnostics["gap"].abs()) <= 1e-15
    parts = values(pb.InDomain(TrendAndRest(), GAUSS), x, baseline=start)
    torch.testing.assert_close(parts[:, 0], golden["ig_trend"], rtol=1e-12, atol=1e-17)
    torch.testing.assert_close(parts[:, 1], golden["ig_rest"], rtol=1e-12, atol=1e-17)


def test_the_sum_is_the_published_one() -> None:
    """-1.2110e-3; it would be -4.50e-4 without the conjugate, -2.138e-3 with inner bins counted twice."""
    x, start = series()
    for sides in ("two", "one"):
        found = values(pb.InDomain(pb.Fourier(sides), GAUSS), x, baseline=start)
        assert abs(float(found.sum()) + 1.21098626e-3) < 1e-11


@pytest.mark.parametrize("length", LENGTHS)
def test_fourier_has_its_closed_form(length: int) -> None:
    """(1/N) Re(FFT(Δx) · conj FFT(ḡ)), right sums; one-sided: inner bins twice, DC and an even N's Nyquist once."""
    x = signals(length)
    start = 0.1 * torch.arange(length, dtype=torch.float64).cos().expand_as(x)
    steps = 8
    weighted = mean_gradient(x, start, torch.arange(1, steps + 1) / steps)
    wanted = (torch.fft.fft(x - start) * torch.fft.fft(weighted).conj()).real / length
    method = pb.IntegratedGradients(steps=steps, quadrature="right")
    two = values(pb.InDomain(pb.Fourier(), method), x, baseline=start)
    torch.testing.assert_close(two, wanted, rtol=0, atol=1e-14)
    mirrored = two.roll(-1, -1).flip(-1)
    torch.testing.assert_close(two, mirrored, rtol=0, atol=1e-17)
    counts = torch.full((length // 2 + 1,), 2.0, dtype=torch.float64)
    counts[0] = 1
    if length % 2 == 0:
        counts[-1] = 1
    one = values(pb.InDomain(pb.Fourier("one"), method), x, baseline=start)
    torch.testing.assert_close(one, counts * two[..., : length // 2 + 1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", DOMAINS)
def test_the_sum_is_that_in_time_at_any_number_of_steps(name: str, length: int) -> None:
    x = signals(length)
    for steps in (1, 2):
        method = pb.IntegratedGradients(steps=steps)
        in_time = values(method, x, baseline="mean").flatten(1).sum(1)
        found = values(pb.InDomain(DOMAINS[name], method), x, baseline="mean").flatten(1).sum(1)
        torch.testing.assert_close(found, in_time, rtol=0, atol=1e-14)


@dataclass(frozen=True)
class Undeclared:
    """A domain that does not say it is linear, so that its path is walked among its coefficients."""

    domain: Any

    def analysis(self, x: Tensor) -> Tensor:
        found: Tensor = self.domain.analysis(x)
        return found

    def synthesis(self, coefficients: Tensor) -> Tensor:
        found: Tensor = self.domain.synthesis(coefficients)
        return found

    def fitted(self, x: Tensor) -> Undeclared:
        return Undeclared(self.domain.fitted(x)) if hasattr(self.domain, "fitted") else self


@pytest.mark.parametrize("name", DOMAINS)
@pytest.mark.parametrize("length", [3, 15, 16])
@pytest.mark.parametrize(
    "method", [pb.IntegratedGradients(steps=5), pb.IntegratedGradients(tol=1e-3)], ids=["5", "tol"]
)
def test_the_shortcut_is_complex_autograd_among_the_coefficients(name: str, length: int, method: Any) -> None:
    x = signals(length)
    short = values(pb.InDomain(DOMAINS[name], method), x)
    long = values(pb.InDomain(Undeclared(DOMAINS[name]), method), x)
    torch.testing.assert_close(short, long, rtol=1e-11, atol=1e-15)


class Counted(nn.Module):
    """How many rows went forward with gradients, and without."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinySeries()
        self.rows = {True: 0, False: 0}

    def forward(self, x: Tensor) -> Tensor:
        self.rows[torch.is_grad_enabled() and x.requires_grad] += len(x)
        found: Tensor = self.inner(x)
        return found


def test_one_sweep_serves_all_linear_domains() -> None:
    x, net = signals(16), Counted()
    method = pb.IntegratedGradients(steps=8)
    methods = {"time": method} | {name: pb.InDomain(each, method) for name, each in DOMAINS.items()}
    found = pb.compare(net, x, methods, target=1, baseline="mean", chunk=6)
    assert found["time"].diagnostics["evaluations"].tolist() == [8, 8, 8]
    assert all(found[name].diagnostics["evaluations"].tolist() == [0, 0, 0] for name in DOMAINS)
    assert net.rows[True] <= 8 * 3 + 6  # and what the chunk's probe needs
    for name, each in DOMAINS.items():
        alone = values(pb.InDomain(each, method), x, baseline="mean")
        torch.testing.assert_close(found[name].values, alone, rtol=0, atol=1e-15)


def test_to_a_tolerance_domains_share_the_levels() -> None:
    """Each domain stops by its own map; only what no other one needed before is evaluated."""
    x = 3 * signals(16)
    method = pb.IntegratedGradients(tol=1e-4)
    methods = {
        "fourier": pb.InDomain(pb.Fourier(), method),
        "time": method,
        "db4": pb.InDomain(pb.Wavelet(), method),
    }
    together = pb.compare(TinySeries(), x, methods, target=1)
    alone = {name: pb.explain(TinySeries(), x, target=1, method=each) for name, each in methods.items()}
    for name in methods:
        torch.testing.assert_close(together[name].values, alone[name].values, rtol=0, atol=1e-15)
        assert together[name].diagnostics["converged"].all()
    spent = torch.stack([each.diagnostics["evaluations"] for each in together.values()]).sum(0)
    most = torch.stack([each.diagnostics["evaluations"] for each in alone.values()]).amax(0)
    assert torch.equal(spent, most)


@pytest.mark.parametrize("name", ["fourier", "one-sided", "stft", "biorthogonal", "chain"])
def test_completeness(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 6, 5, padding=2), nn.SiLU(), nn.Flatten(), nn.Linear(96, 3)).double()
    found = pb.explain(net, signals(16), target=2, method=pb.InDomain(DOMAINS[name], GAUSS))
    assert float(found.diagnostics["gap"].abs().max()) <= 1e-10
    with torch.no_grad():
        change = net(signals(16))[:, 2] - net(torch.zeros(1, 2, 16, dtype=torch.float64))[:, 2]
    torch.testing.assert_close(found.values.flatten(1).sum(1), change, rtol=0, atol=1e-10)  # type: ignore[union-attr]


def test_two_nodes_of_gauss_are_exact_for_a_cubic() -> None:
    x = signals(15)
    method = pb.InDomain(pb.Fourier("one"), pb.IntegratedGradients(steps=2, quadrature="gausslegendre"))
    found = pb.explain(lambda z: (z**3).sum((1, 2))[:, None], x, target=0, method=method)
    assert float(found.diagnostics["gap"].abs().max()) <= 1e-12


def test_permutation_and_sign_of_components_commute() -> None:
    turn = torch.linalg.qr(signals(16)[0].T @ signals(16)[0] + torch.eye(16).double())[0]
    order, sign = torch.randperm(16, generator=torch.Generator().manual_seed(0)), torch.ones(16).double()
    sign[::3] = -1
    x = signals(16)
    plain = values(pb.InDomain(pb.Linear(turn), GAUSS), x)
    moved = values(pb.InDomain(pb.Linear(sign[:, None] * turn[order]), GAUSS), x)
    torch.testing.assert_close(moved, plain[..., order], rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["fourier", "one-sided", "stft", "db4", "chain"])
def test_a_batch_is_its_rows_and_chunks_do_not_matter(name: str) -> None:
    x, method = signals(15, 64), pb.InDomain(DOMAINS[name], pb.IntegratedGradients(steps=3))
    together = values(method, x)
    for chunk in (7, 64):
        torch.testing.assert_close(values(method, x, chunk=chunk), together, rtol=0, atol=1e-14)
    alone = torch.cat([values(method, row[None]) for row in x])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", DOMAINS)
def test_at_the_baseline_everything_is_zero(name: str) -> None:
    x = signals(16)
    found = values(pb.InDomain(DOMAINS[name], pb.IntegratedGradients(steps=2)), x, baseline=x)
    assert torch.count_nonzero(found) == 0


def test_nothing_is_left_on_the_model_or_the_input() -> None:
    net, x = TinySeries(), signals(16)
    before = x.clone()
    net.train()
    pb.explain(net, x, target=1, method=pb.InDomain(pb.Fourier(), pb.IntegratedGradients(steps=2)))
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert net.training
    assert not x.requires_grad
    assert torch.equal(x, before)
