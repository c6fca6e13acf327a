"""Latents in use: statistics and contexts by hand, steering vectors, clamps, effects against their closed form."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from pullback.core.errors import InputError, MethodError, SiteError
from pullback.steering.sae import (
    SparseAutoencoder,
    SparseAutoencoderConfig,
    clamped,
    latent_statistics,
    latent_vector,
    steering_effects,
)
from tests.steering.models import built

VOCABULARY, WIDTH = 7, 4


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Identity(), nn.Linear(WIDTH, VOCABULARY))
        .double()
        .eval()
    )


def autoencoder(k: int = 2) -> SparseAutoencoder:
    return SparseAutoencoder(SparseAutoencoderConfig(WIDTH, 6, k), seed=1, dtype=torch.float64)


def ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(4))


def test_statistics_are_those_of_dense_latents() -> None:
    net, sae, x = model(), autoencoder(), ids()
    found = latent_statistics(net, "1", [x[:1], x[1:]], sae, contexts=3)
    with torch.no_grad():
        dense = sae.encode(net[:2](x)).dense()
    real = dense[:, 1:].flatten(0, 1)
    assert found.count == 12
    torch.testing.assert_close(found.frequency, (real > 0).double().mean(0))
    torch.testing.assert_close(found.mean * (real > 0).sum(0), real.sum(0))
    torch.testing.assert_close(found.largest, real.amax(0).float())
    latent = int(found.largest.argmax())
    for value, (example, position) in zip(found.top_values[latent], found.top_places[latent], strict=True):
        if value > 0:
            assert float(dense[example, position, latent]) == pytest.approx(float(value), rel=1e-6)
            assert position > 0
    first = found.contexts(latent, before=1, after=1)[0]
    example, position = found.top_places[latent, 0].tolist()
    assert first.tokens[first.place] == int(x[example, position])
    assert first.tokens == x[example, position - 1 : position + 2].tolist()
    with pytest.raises(InputError, match="expected 0 to 5"):
        found.contexts(6)


def test_steering_by_a_latent_of_a_linear_readout() -> None:
    # logits move by alpha W w_i everywhere, whatever the context
    net, sae, x = model(), autoencoder(), ids()
    found = steering_effects(net, "1", [x[:2], x[2:]], sae, [0, 4], norm=0.7, skip_positions=())
    with torch.no_grad():
        change = 0.7 * sae.decoder[[0, 4]] @ net[2].weight.T
        change = change - change.mean(1, keepdim=True)
        logits = net(x)[:, :-1].flatten(0, 1)
        kl = [
            float(
                (logits.softmax(-1) * (logits.log_softmax(-1) - (logits + row).log_softmax(-1)))
                .sum(-1)
                .mean()
            )
            for row in change
        ]
    torch.testing.assert_close(found.logits, change)
    torch.testing.assert_close(found.mean_change, change.abs().mean(1))
    torch.testing.assert_close(found.largest_change, change.abs().amax(1))
    assert found.kl.tolist() == pytest.approx(kl)
    statistics = latent_statistics(net, "1", [x], sae)
    own = steering_effects(net, "1", [x], sae, [0, 4], statistics=statistics, skip_positions=())
    torch.testing.assert_close(own.strength, statistics.mean[[0, 4]])
    torch.testing.assert_close(own.logits, change / 0.7 * own.strength[:, None])
    with pytest.raises(MethodError, match="give norm="):
        steering_effects(net, "1", [x], sae, [0])


def test_clamping_moves_one_latent_and_keeps_the_error() -> None:
    net, sae, x = model(), autoencoder(), ids()
    with torch.no_grad():
        hidden = net[:2](x)
        dense = sae.encode(hidden).dense()
        plain = net(x)
        with clamped(net, "1", sae, {2: 3.0, 0: 0.0}):
            moved = net(x)
            elsewhere: list[Tensor] = []
            thread = threading.Thread(target=lambda: elsewhere.append(net(x)))
            thread.start()
            thread.join()
        step = (3.0 - dense[..., 2:3]) * sae.decoder[2] - dense[..., :1] * sae.decoder[0]
        torch.testing.assert_close(moved, net[2](hidden + step), rtol=1e-12, atol=1e-12)
        assert torch.equal(elsewhere[0], plain)
        assert torch.equal(net(x), plain)
    assert not net[1]._forward_hooks
    with pytest.raises(InputError, match="there is no latent 6"), clamped(net, "1", sae, {6: 0.0}):
        pass
    with pytest.raises(InputError, match="finite"), clamped(net, "1", sae, {1: float("nan")}):
        pass


def test_a_latents_vector_steers_by_its_direction_and_mean_value() -> None:
    llama, inputs = built("llama", double=True)
    sae = SparseAutoencoder(SparseAutoencoderConfig(32, 40, 4), seed=2, dtype=torch.float64)
    statistics = latent_statistics(llama, "model.layers.0", [dict(inputs)], sae)
    latent = int(statistics.mean.argmax())
    vector = latent_vector(sae, latent, llama, "model.layers.0", statistics=statistics)
    torch.testing.assert_close(vector.directions[0], sae.decoder[latent].detach().float())
    assert vector.scales[0] == pytest.approx(float(statistics.mean[latent]))
    assert vector.provenance["latent"] == latent
    with torch.no_grad(), vector.apply(llama, 2.0, scale="fit", preserve_norm=False):
        steered = llama(**inputs).logits
    with torch.no_grad():
        plain = llama(**inputs).logits
    assert (steered - plain).abs().max() > 1e-3
    with pytest.raises(SiteError, match=r'expected one of "model.layers.0" to "model.layers.1"'):
        latent_vector(sae, 0, llama, "model.norm")
    silent = int(statistics.mean.argmin())
    if statistics.mean[silent] == 0:
        with pytest.raises(InputError, match="never fires"):
            latent_vector(sae, silent, llama, "model.layers.0", statistics=statistics)
