"""Latents as coordinates of a site: every method explains them, and with the error they say all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.core.errors import InputError, MethodError
from pullback.steering.sae import Latents, SparseAutoencoder, SparseAutoencoderConfig
from tests.conformance.fingerprint import assert_untouched
from tests.steering.sae.test_model import CONFIG, LATENTS, WIDTH, autoencoder, random

NORMALIZATIONS = ("none", "mean_norm", "row")


class Net(nn.Module):
    """Smooth, with positions: (B, T, 5) -> (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.below, self.above, self.out = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 7), nn.Linear(7, 3)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.below(x)
        return self.out(self.above(hidden).tanh().mean(1))


def sae_of(normalization: Any = "none") -> SparseAutoencoder:
    made = autoencoder(replace(CONFIG, normalization=normalization))
    made.input_scale.fill_(1.7 if normalization == "mean_norm" else 1.0)
    return made


NET, X = Net(), random(2, 4, 5, seed=8)


def site_values() -> tuple[Tensor, Tensor]:
    """The value at the site and the gradient of output 1 there, by hand."""
    h = NET.below(X).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(NET.out(NET.above(h).tanh().mean(1))[:, 1].sum(), h)
    return h.detach(), gradient


def explained(part: Any, method: Any, normalization: Any = "none", **options: Any) -> pb.Attribution:
    domain = Latents(sae_of(normalization), part, **options)
    return pb.explain(NET, X, target=1, site="below", method=pb.InDomain(domain, method))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_latents_times_gradient_is_the_definition_and_complete(normalization: Any) -> None:
    """``Σ a_i (w_i · g) + e · g + b · g = x · g`` (golden check 6), with each token's own scale."""
    h, g = site_values()
    sae = sae_of(normalization)
    with assert_untouched(NET, X):
        found = explained("both", pb.InputXGradient(), normalization).values
    latents = sae.encode(h, selection="topk")
    scale: Any = {"none": 1.0, "mean_norm": 1 / 1.7, "row": latents.deviation}[normalization]
    constant = sae.decoder_bias.detach() * scale
    if latents.mean is not None:
        constant = constant + latents.mean
    by_hand = latents.dense() * (g * scale @ sae.decoder.detach().t())
    torch.testing.assert_close(found[..., :LATENTS], by_hand.detach(), rtol=0, atol=1e-12)
    error = (h - sae.decode(latents).detach()) * g
    torch.testing.assert_close(found[..., LATENTS:], error, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.sum(-1) + (constant * g).sum(-1), (h * g).sum(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", ["latents", "error", "both"])
@pytest.mark.parametrize(
    "method",
    [
        pb.Gradient(), pb.SmoothGrad(samples=3), pb.IntegratedGradients(steps=64), pb.ExpectedGradients(samples=8),
        pb.RelP(), pb.SemanticPullback(), pb.RandomAttribution(),
    ],
    ids=lambda method: type(method).__name__,
)  # fmt: skip
def test_every_method_explains_every_part(part: Any, method: Any) -> None:
    with assert_untouched(NET, X):
        found = explained(part, method)
    width = {"latents": LATENTS, "error": WIDTH, "both": LATENTS + WIDTH}[part]
    assert found.values.shape == (2, 4, width)
    assert torch.isfinite(found.values).all()
    assert found.values.abs().sum() > 0
    alone = pb.explain(
        NET, X[1:], target=1, site="below", method=pb.InDomain(Latents(sae_of(), part), method)
    )
    if not isinstance(method, pb.SmoothGrad | pb.ExpectedGradients | pb.RandomAttribution):
        torch.testing.assert_close(alone.values, found.values[1:], rtol=1e-10, atol=1e-12)


def test_integrated_gradients_walk_in_the_latents() -> None:
    """A slow re-derivation: the mean of w_i · g on the line between the two dense latents, times their difference."""
    sae = sae_of()
    found = explained("latents", pb.IntegratedGradients(steps=4, quadrature="midpoint"))
    h, _ = site_values()
    latents = sae.encode(h, selection="topk").dense().detach()
    start = sae.encode(torch.zeros_like(h), selection="topk").dense().detach()
    rest = h - (latents @ sae.decoder + sae.decoder_bias).detach()
    total = torch.zeros_like(latents)
    for node in (0.125, 0.375, 0.625, 0.875):
        a = (start + node * (latents - start)).requires_grad_()
        value = NET.out(NET.above(a @ sae.decoder.detach() + sae.decoder_bias.detach() + rest).tanh().mean(1))
        total += torch.autograd.grad(value[:, 1].sum(), a)[0] / 4
    torch.testing.assert_close(found.values, total * (latents - start), rtol=1e-9, atol=1e-12)


def test_the_gradient_selects_where_it_is_given() -> None:
    h, g = site_values()
    sae = sae_of()
    loud = 100 * g  # the net is mild
    found = explained("latents", pb.InputXGradient(), gradient=loud)
    expected = sae.encode(h, loud).dense() * (g @ sae.decoder.t())
    torch.testing.assert_close(found.values, expected.detach(), rtol=0, atol=1e-12)
    plain = explained("latents", pb.InputXGradient()).values
    assert ((found.values != 0) != (plain != 0)).any()


def test_mistakes_say_what_to_do() -> None:
    sae = sae_of()
    with pytest.raises(MethodError, match=r'part=.rest.; expected "latents", "error" or "both"'):
        Latents(sae, "rest")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="takes a SparseAutoencoder, got a Linear"):
        Latents(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(MethodError, match=r"call \.fitted\(x\) first"):
        Latents(sae).analysis(random(2, WIDTH))
    with pytest.raises(InputError, match=r"the gradient is \(1, 6\)"):
        explained("latents", pb.Gradient(), gradient=random(1, 6))
    other = SparseAutoencoder(SparseAutoencoderConfig(4, 9, 2))
    with pytest.raises(InputError, match="expected activations"):
        pb.explain(NET, X, target=1, site="below", method=pb.InDomain(Latents(other), pb.Gradient()))
