"""Sparse autoencoders: selection, loss, upkeep and normalisation, against their definitions in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pullback.core.errors import InputError, MethodError
from pullback.steering.sae import SparseAutoencoder, SparseAutoencoderConfig

WIDTH, LATENTS, K = 6, 20, 4
CONFIG = SparseAutoencoderConfig(WIDTH, LATENTS, K, "gradient", beta=5.0)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def autoencoder(config: SparseAutoencoderConfig = CONFIG, **settings: Any) -> SparseAutoencoder:
    """With an encoder of its own and biases, so that nothing is right by symmetry."""
    made = SparseAutoencoder(config, dtype=torch.float64, **settings)
    with torch.no_grad():
        made.encoder.add_(0.3 * random(LATENTS, WIDTH, seed=1))
        made.encoder_bias.add_(0.2 * random(LATENTS, seed=2))
        made.decoder_bias.add_(random(WIDTH, seed=3))
    return made


X, G = random(9, WIDTH, seed=4), random(9, WIDTH, seed=5)


def by_definition(a: SparseAutoencoder, x: Tensor, g: Tensor, beta: float) -> Tensor:
    """The dense latents."""
    z = (x - a.decoder_bias) @ a.encoder.t() + a.encoder_bias
    s = z + beta * z * (g @ a.decoder.t()).abs()
    chosen = s >= s.topk(K).values[:, -1:]
    return torch.where(chosen, z.relu(), 0.0)


# --- selection (golden checks 1, 2, 4) ---


def test_the_gradient_selects_and_the_value_stays_relu() -> None:
    a = autoencoder()
    for beta in (0.0, 0.5, 5.0):
        dense = by_definition(a, X, G, beta)
        torch.testing.assert_close(a.encode(X, G, beta=beta).dense(), dense, rtol=0, atol=1e-12)
        torch.testing.assert_close(a(X, G, beta=beta), dense @ a.decoder + a.decoder_bias, rtol=0, atol=1e-12)
    assert not a.encode(X, G).indices.equal(a.encode(X, selection="topk").indices)


def test_beta_zero_is_topk_and_looks_at_no_gradient() -> None:
    a = autoencoder()
    plain = a.encode(X, selection="topk")
    for gradient in (None, torch.full_like(G, torch.inf), G):
        assert a.encode(X, gradient, beta=0.0).indices.equal(plain.indices)
        assert a.encode(X, gradient, beta=0.0).values.equal(plain.values)
    without = autoencoder(replace(CONFIG, beta=0.0))
    topk = autoencoder(replace(CONFIG, selection="topk"))
    dead = torch.arange(LATENTS) < 5
    for made in (without, topk):
        optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            made.normalize_decoder_()
            made.loss(X, None, dead=dead).total.backward()
            made.project_decoder_gradient_()
            optimizer.step()
    assert all(one.equal(other) for one, other in zip(without.parameters(), topk.parameters(), strict=True))


def test_sign_scale_and_batch_of_the_gradient_do_not_matter() -> None:
    a = autoencoder()
    chosen = a.encode(X, G).indices
    assert a.encode(X, -G).indices.equal(chosen)
    assert a.encode(X, 4 * G, beta=5.0 / 4).indices.equal(chosen)
    assert torch.cat([a.encode(X[:2], G[:2]).indices, a.encode(X[2:], G[2:]).indices]).equal(chosen)
    a.gradient_scale.fill_(8.0)
    assert a.encode(X, 8 * G).indices.equal(chosen)
    assert not a.encode(X, G).indices.equal(chosen)


def test_the_term_of_the_score_is_the_slope_of_the_loss() -> None:
    """w_i . g is the change of the model's loss per unit of w_i written at x (golden check 5)."""
    a = autoencoder()
    readout = random(WIDTH, 7, seed=6)

    def loss(x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.tanh(x) @ readout, torch.arange(9) % 7, reduction="sum")

    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(x), x)
    for latent in (0, 11):
        shift = torch.zeros_like(X)
        shift[3] = 1e-5 * a.latent_direction(latent)
        slope = (loss(X + shift) - loss(X - shift)) / 2e-5
        assert float(slope) == pytest.approx(float(g[3] @ a.latent_direction(latent)), abs=1e-9)


def test_permuted_latents_and_scaled_activations() -> None:
    """Golden check 12."""
    a = autoencoder()
    order = torch.randperm(LATENTS, generator=torch.Generator().manual_seed(0))
    permuted = SparseAutoencoder.from_parameters(
        CONFIG,
        encoder=a.encoder[order],
        encoder_bias=a.encoder_bias[order],
        decoder=a.decoder[order],
        decoder_bias=a.decoder_bias,
    )
    torch.testing.assert_close(
        permuted.encode(X, G).dense(), a.encode(X, G).dense()[:, order], rtol=0, atol=1e-12
    )
    scaled = SparseAutoencoder.from_parameters(
        CONFIG,
        encoder=a.encoder,
        encoder_bias=3 * a.encoder_bias,
        decoder=a.decoder,
        decoder_bias=3 * a.decoder_bias,
    )
    torch.testing.assert_close(
        scaled.encode(3 * X, beta=0.0).dense(), 3 * a.encode(X, beta=0.0).dense(), rtol=0, atol=1e-12
    )


def test_shapes_tiles_and_decode() -> None:
    a = autoencoder()
    whole = a(X, G)
    torch.testing.assert_close(a.decode(a.encode(X, G)), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        a(X.reshape(3, 3, WIDTH), G.reshape(3, 3, WIDTH)).reshape(9, WIDTH), whole, rtol=0, atol=0
    )
    one = a.encode(X[0], G[0])
    assert one.indices.shape == (K,)
    torch.testing.assert_close(a.decode(one), whole[0], rtol=0, atol=1e-12)
    a.memory_budget = 9 * 8 * 2 * 7  # seven columns of z and of the score
    assert a._columns(9, 2) == 7
    torch.testing.assert_close(a(X, G), whole, rtol=0, atol=1e-12)
    a.memory_budget = 0
    assert a._columns(9, 2) == K
    torch.testing.assert_close(a(X, G), whole, rtol=0, atol=1e-12)


def test_attribution_to_latents_is_complete() -> None:
    """sum_i a_i (w_i . g) + b . g + (x - xhat) . g = x . g (golden check 6)."""
    a = autoencoder()
    latents = a.encode(X, G).dense()
    of_latents = (latents * (G @ a.decoder.t())).sum(1)
    error = ((X - a(X, G)) * G).sum(1)
    torch.testing.assert_close(of_latents + G @ a.decoder_bias + error, (X * G).sum(1), rtol=0, atol=1e-12)


def test_orthonormal_dictionary_reconstructs_exactly() -> None:
    """k = n with tied orthonormal weights and a bias that keeps every z positive: xhat - x = W^T b."""
    rows = torch.linalg.qr(random(WIDTH, WIDTH)).Q
    config = SparseAutoencoderConfig(WIDTH, WIDTH, WIDTH)
    high = torch.full((WIDTH,), 50.0, dtype=torch.float64)
    a = SparseAutoencoder.from_parameters(
        config, encoder=rows, encoder_bias=high, decoder=rows, decoder_bias=-(high @ rows)
    )
    with torch.no_grad():
        a.encoder_bias.sub_(rows @ (high @ rows))  # undo W (x - b) = W x + W W^T h
    assert a.loss(X).reconstruction.item() < 1e-24


# --- errors ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 21}, r"^k is 21 for 20 latents; expected 1 to 20\.$"),
        ({"width": 0}, r"^width is 0; expected a whole number of at least 1\.$"),
        ({"selection": "grad"}, r"""^selection is 'grad'; expected one of "topk", "gradient"\.$"""),
        ({"normalization": "batch"}, r'expected one of "none", "mean_norm", "row"\.$'),
        ({"beta": float("nan")}, r"^beta is nan; expected a finite number of at least 0\.$"),
        ({"auxiliary_k": 0}, r"^auxiliary_k is 0; expected"),
    ],
)
def test_configurations_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        replace(CONFIG, **settings)


def test_inputs_that_cannot_be_encoded() -> None:
    a = autoencoder()
    with pytest.raises(InputError, match=r"needs the gradient .* selection=\"topk\" for gradient-free"):
        a.encode(X)
    with pytest.raises(InputError, match=r"^the gradient is \(2, 6\) for x \(9, 6\)\.$"):
        a.encode(X, G[:2])
    with pytest.raises(
        InputError, match=r"^x is \(9, 5\) torch\.float64; expected activations \(\.\.\., 6\)"
    ):
        a.encode(X[:, :5], G)
    with pytest.raises(InputError, match="without a token"):
        a.encode(X[:0], G[:0])
    for bad in (torch.nan, torch.inf):
        wrong = X.clone()
        wrong[1, 2] = bad
        with pytest.raises(InputError, match=r"^x has NaN or infinite entries; .* Mask padding\.$"):
            a.encode(wrong, G)
        with pytest.raises(InputError, match=r"^the gradient has NaN"):
            a.encode(X, wrong)
    with pytest.raises(MethodError, match=r"^selection is 'threshold'"):
        a.encode(X, G, selection="threshold")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match=r"^beta is -1\.0"):
        a.encode(X, G, beta=-1.0)
    with pytest.raises(InputError, match=r"^there is no latent 20; expected 0 to 19"):
        a.latent_direction(20)
