"""Deletion and insertion of coefficients: against a loop over them, closed forms, and the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.core.errors import InputError
from pullback.evaluation import deletion, insertion

LEVELS = (0.0, 0.2, 0.35, 0.5, 0.9, 1.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class OneSided:
    """Frequencies of a series of an even length."""

    def analysis(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x)

    def synthesis(self, coefficients: Tensor) -> Tensor:
        return torch.fft.irfft(coefficients)


@dataclass(frozen=True)
class Scaled:
    """Every coordinate by a factor; with 1 the site's own coordinates."""

    factor: float = 1.0

    def analysis(self, x: Tensor) -> Tensor:
        return x * self.factor

    def synthesis(self, coefficients: Tensor) -> Tensor:
        return coefficients / self.factor


@dataclass(frozen=True, eq=False)
class Rotated:
    """Coordinates along the columns of an orthogonal matrix."""

    matrix: Tensor

    def analysis(self, x: Tensor) -> Tensor:
        return x @ self.matrix

    def synthesis(self, coefficients: Tensor) -> Tensor:
        return coefficients @ self.matrix.T


def convolutional() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv1d(2, 4, 5), nn.Tanh(), nn.AdaptiveAvgPool1d(3), nn.Flatten(), nn.Linear(12, 3)
        ).double().eval()  # fmt: skip


@pytest.mark.parametrize("order", ["descending", "ascending"])
@pytest.mark.parametrize("restore", [False, True])
def test_curves_follow_the_definition(order: str, restore: bool) -> None:
    """Complex coefficients, both channels of a frequency together, replaced by those of a mask that is not zero."""
    model, x, a = convolutional(), normal(3, 2, 16), normal(3, 2, 9, seed=1)
    mask = normal(1, 2, 16, seed=2)
    metric = insertion if restore else deletion
    result = metric(model, x, a, target=1, levels=LEVELS, order=order, mask=mask, domain=OneSided())
    assert result.curve is not None
    for row in range(3):
        ordered = sorted(
            range(9), key=lambda k, own=a[row]: float(own[:, k].sum()), reverse=order == "descending"
        )
        own, other = torch.fft.rfft(x[row]), torch.fft.rfft(mask[0])
        for level, height in zip(LEVELS, result.curve[row].tolist(), strict=True):
            kept = other.clone() if restore else own.clone()
            for k in ordered[: round(level * 9)]:
                kept[:, k] = own[:, k] if restore else other[:, k]
            assert model(torch.fft.irfft(kept)[None])[0, 1].item() == pytest.approx(height, abs=1e-12)
    assert result.params["domain"] == "OneSided()"
    assert result.details["clean"].tolist() == pytest.approx(model(x)[:, 1].tolist(), abs=1e-12)


def test_a_linear_model_has_a_closed_form_in_every_orthogonal_basis() -> None:
    """w·x = (wQ)·(xQ), so removing coefficients leaves a cumulative sum of sorted products."""
    matrix = torch.linalg.qr(normal(8, 8)).Q
    weight, x = normal(1, 8, seed=1), normal(4, 8, seed=2)
    net = nn.Linear(8, 1, bias=False).double()
    net.weight.data.copy_(weight)
    levels = [step / 8 for step in range(9)]
    products = (weight @ matrix) * (x @ matrix)
    restored = torch.cat([torch.zeros(4, 1).double(), products.sort(1, descending=True).values.cumsum(1)], 1)
    added = insertion(net, x, products, levels=levels, domain=Rotated(matrix))
    removed = deletion(net, x, products, levels=levels, domain=Rotated(matrix))
    torch.testing.assert_close(added.curve, restored)
    torch.testing.assert_close(removed.curve, restored[:, -1:] - restored)
    for seed in range(20):
        random = deletion(net, x, normal(4, 8, seed=10 + seed), levels=levels, domain=Rotated(matrix))
        assert bool((random.values >= removed.values - 1e-12).all())


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_the_sites_own_coordinates_are_a_domain_too(factor: float) -> None:
    """With ties, whose order then follows the coefficients' content: the same for the identity."""
    model, x = convolutional(), normal(3, 2, 16)
    a = normal(3, 2, 16, seed=1)
    plain = deletion(model, x, a, target=0, mask=0.5)
    seen = deletion(model, x, a, target=0, mask=0.5, domain=Scaled(factor))
    assert torch.equal(plain.values, seen.values)
    assert "domain" not in plain.params


def test_results_bring_site_target_and_domain() -> None:
    model, x = convolutional(), normal(2, 2, 16)
    method = pb.InDomain(OneSided(), pb.IntegratedGradients(steps=8))
    found = pb.explain(model, x, target=torch.tensor([2, 0]), method=method)
    result = deletion(model, x, found, domain=OneSided(), levels=LEVELS)
    by_hand = deletion(model, x, found.values, target=torch.tensor([2, 0]), domain=OneSided(), levels=LEVELS)
    assert torch.equal(result.values, by_hand.values)
    with pytest.raises(
        InputError, match=r"in the domain OneSided\(\) was given, with domain=None.* pass the same domain"
    ):
        deletion(model, x, found)
    with pytest.raises(InputError, match=r"in the domain OneSided\(\) was given, with domain=Scaled"):
        insertion(model, x, found, domain=Scaled())
    at_site = pb.explain(model, x, method="gradient")
    with pytest.raises(InputError, match=r"at the site itself was given, with domain=OneSided\(\)"):
        deletion(model, x, at_site, domain=OneSided())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"mask": "noisy_linear"}, r'mask="noisy_linear" was given with a domain'),
        (
            {"attribution": torch.ones(2, 2, 16)},
            r"shape \(2, 2, 16\) was given for 'input' of shape \(2, 2, 9\)",
        ),
    ],
)
def test_what_does_not_fit_a_domain(settings: dict[str, Any], text: str) -> None:
    attribution = settings.pop("attribution", normal(2, 2, 9))
    with pytest.raises(InputError, match=text):
        deletion(convolutional(), normal(2, 2, 16), attribution, domain=OneSided(), **settings)
