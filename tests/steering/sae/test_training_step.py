"""Sparse autoencoders in training: the loss, the decoder's upkeep, dead latents, and normalisation of the input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from .test_model import CONFIG, LATENTS, WIDTH, G, X, autoencoder

# --- loss ---


def test_loss_of_the_mean_is_one_and_batches_can_share_their_statistics() -> None:
    a = autoencoder(replace(CONFIG, selection="topk", auxiliary_weight=0.0))
    with torch.no_grad():
        a.encoder_bias.fill_(-1e3)  # nothing fires: xhat = b_dec
        a.decoder_bias.copy_(X.mean(0))
    assert a.loss(X).reconstruction.item() == pytest.approx(1.0, abs=1e-12)

    a = autoencoder()
    dead = torch.arange(LATENTS) < 9
    whole = a.loss(X[:8], G[:8], dead=dead)
    known: list[Tensor] = []  # what averaging over two processes gives, in the order of the calls
    residual = (X[:8] - whole.output).detach()
    for target in (X[:8], residual):
        known += [target.mean(0), (target - target.mean(0)).square().mean()]
    parts = []
    for half in (slice(0, 4), slice(4, 8)):
        answers = iter(known)
        parts.append(a.loss(X[half], G[half], dead=dead, average=lambda _, answers=answers: next(answers)))
    for name in ("total", "reconstruction", "auxiliary"):
        mean = (getattr(parts[0], name) + getattr(parts[1], name)) / 2
        assert mean.item() == pytest.approx(float(getattr(whole, name)), rel=1e-12)


def test_auxiliary_loss_has_the_bias_once_and_moves_dead_latents_only() -> None:
    """Golden check 10."""
    a = autoencoder(replace(CONFIG, auxiliary_k=3))
    dead = torch.arange(LATENTS) % 3 == 0
    found = a.loss(X, G, dead=dead)
    z = (X - a.decoder_bias) @ a.encoder.t() + a.encoder_bias
    residual = X - a(X, G)
    decoded = torch.zeros_like(X)
    for token in range(9):
        for latent in sorted((i for i in range(LATENTS) if dead[i]), key=lambda i: -float(z[token, i]))[:3]:
            decoded[token] += z[token, latent].relu() * a.decoder[latent]  # no bias: the residual has none
    by_hand = (decoded - residual).square().mean() / (residual - residual.mean(0)).square().mean()
    assert float(found.auxiliary) == pytest.approx(float(by_hand), rel=1e-12)
    assert float(found.total) == pytest.approx(float(found.reconstruction + by_hand / 32), rel=1e-12)
    found.auxiliary.backward()
    for parameter in (a.encoder, a.encoder_bias, a.decoder):
        assert parameter.grad is not None
        assert not parameter.grad[~dead].any()
        assert parameter.grad[dead].any()
    assert a.decoder_bias.grad is None or not a.decoder_bias.grad.any()


def test_without_dead_latents_the_auxiliary_loss_is_zero() -> None:
    a = autoencoder()
    found = a.loss(X, G)
    assert float(found.auxiliary) == 0.0
    assert found.total.equal(found.reconstruction)
    every = a.loss(X, G, dead=torch.ones(LATENTS, dtype=torch.bool))  # k_aux = 3 of 20
    assert float(every.auxiliary) > 0


# --- upkeep ---


def test_decoder_gradient_is_tangent_and_rows_have_norm_one() -> None:
    a = autoencoder()
    a.loss(X, G).total.backward()
    assert a.decoder.grad is not None
    before = a.decoder.grad.clone()
    a.project_decoder_gradient_()
    along = (before * a.decoder).sum(1, keepdim=True)
    torch.testing.assert_close(a.decoder.grad, before - along * a.decoder.detach(), rtol=0, atol=1e-12)
    assert float((a.decoder.grad * a.decoder).sum(1).abs().max()) < 1e-12
    assert float(along.abs().max()) > 1e-3
    with torch.no_grad():
        a.decoder.mul_(torch.arange(1, LATENTS + 1).unsqueeze(1))
    a.normalize_decoder_()
    torch.testing.assert_close(a.decoder.norm(dim=1), torch.ones(LATENTS).double(), rtol=0, atol=1e-12)


def test_latents_die_of_silence_in_tokens() -> None:
    a = autoencoder(replace(CONFIG, dead_after=18))
    latents = a.encode(X, G)
    fired = (latents.dense() > 1e-3).any(0)
    assert fired.any()
    assert not fired.all()
    a.count_(latents)
    assert a.tokens_since_fired.equal(torch.where(fired, 0, 9))
    assert not a.dead_latents().any()
    a.count_(latents)
    assert a.dead_latents().equal(~fired)


@pytest.mark.parametrize("subtract", [True, False])
def test_mean_norm_is_folded_exactly(subtract: bool) -> None:
    a = autoencoder(replace(CONFIG, normalization="mean_norm", subtract_decoder_bias=subtract))
    a.fit_normalization_(100 * X)
    assert float((100 * X * a.input_scale).norm(dim=1).mean()) == pytest.approx(WIDTH**0.5, rel=1e-12)
    folded = a.folded()
    assert folded.config.normalization == "none"
    assert folded.encode(100 * X, G).indices.equal(a.encode(100 * X, G).indices)
    torch.testing.assert_close(folded(100 * X, G), a(100 * X, G), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        folded.encode(100 * X, G).values, a.encode(100 * X, G).values / a.input_scale, rtol=1e-12, atol=1e-12
    )


def test_row_normalisation_is_undone_at_the_output() -> None:
    a = autoencoder(replace(CONFIG, normalization="row"))
    mean, deviation = X.mean(1, keepdim=True), X.std(1, keepdim=True) + 1e-5
    inner = autoencoder()
    expected = inner((X - mean) / deviation, G) * deviation + mean
    torch.testing.assert_close(a(X, G), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(a.decode(a.encode(X, G)), expected, rtol=0, atol=1e-12)
    # the loss compares normalised rows
    row = (X - mean) / deviation
    fvu = (inner(row, G) - row).square().mean() / (row - row.mean(0)).square().mean()
    assert float(a.loss(X, G).reconstruction) == pytest.approx(float(fvu), rel=1e-12)
