"""Latents as steering vectors, latents held at values, and how a dictionary is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pullback.core.errors import InputError, MethodError, SiteError
from pullback.steering.sae import (
    SparseAutoencoder,
    SparseAutoencoderConfig,
    clamp,
    latent_statistics,
    latent_vector,
)
from tests.conformance.fingerprint import assert_untouched
from tests.steering.models import built
from tests.steering.sae.language_model import WIDTH, LanguageModel, batches
from tests.steering.sae.test_evaluation import autoencoder

BATCHES = batches(3)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel().double()  # type: ignore[return-value]


def test_statistics_by_definition(model: LanguageModel) -> None:
    sae = autoencoder()
    with assert_untouched(model, BATCHES[0]):
        found = latent_statistics(model, "first", sae, BATCHES, contexts=4)
    dense = torch.stack([sae.encode(model.below(ids)).dense() for ids in BATCHES]).detach()[:, :, 1:]
    flat = dense.flatten(0, 2)
    torch.testing.assert_close(found.frequency, (flat > 0).double().mean(0))
    torch.testing.assert_close(found.largest.float(), flat.amax(0).float())
    used = flat.amax(0) > 0
    expected = torch.where(used, flat.sum(0) / (flat > 0).sum(0).clamp(min=1), 0.0)
    torch.testing.assert_close(found.mean, expected)
    for latent, entries in found.contexts.items():
        values = [value for value, *_ in entries]
        assert values == sorted(values, reverse=True)
        assert len(entries) == min(4, int((flat[:, latent] > 0).sum()))
        for value, batch, example, position in entries:
            assert value == pytest.approx(float(dense[batch, example, position - 1, latent]), rel=1e-6)


def output_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What leaves the first block, by a hook that comes after those of steering."""
    found: list[torch.Tensor] = []
    handle = model.model.layers[0].register_forward_hook(
        lambda module, args, output: found.append(output.clone())
    )
    with torch.no_grad():
        model(input_ids=inputs["input_ids"])
    handle.remove()
    return found[0]


def test_a_latent_is_a_vector() -> None:
    llama, inputs = built("llama")
    sae = SparseAutoencoder(SparseAutoencoderConfig(32, 64, 4))
    statistics = latent_statistics(llama, "model.layers.0", sae, [inputs["input_ids"]])
    latent = int(statistics.frequency.argmax())
    for scale, length in (
        ("unit", 1.0),
        ("mean", statistics.mean[latent]),
        ("largest", statistics.largest[latent]),
    ):
        vector = latent_vector(sae, latent, 0, llama, scale=scale, statistics=statistics)  # type: ignore[arg-type]
        torch.testing.assert_close(vector.directions[0], sae.latent_direction(latent))
        assert vector.scales[0] == pytest.approx(float(length), rel=1e-5)
        plain = output_of(llama, inputs)
        with vector.apply(llama, 2.0, scale="fit", preserve_norm=False):
            steered = output_of(llama, inputs)
        moved = plain + 2 * length * sae.latent_direction(latent)
        torch.testing.assert_close(steered, moved.to(steered), rtol=1e-5, atol=1e-5)


def test_a_latent_is_held_and_the_rest_stays(model: LanguageModel) -> None:
    sae, ids = autoencoder(), BATCHES[0]
    with torch.no_grad():
        hidden = model.below(ids)
    dense = sae.encode(hidden).dense().detach()
    latent = int((dense > 0).flatten(0, 1).sum(0).argmax())
    for value in (0.0, 2.5):
        found: list[Any] = []
        with assert_untouched(model, ids), clamp(model, "first", sae, {latent: value}):
            handle = model.second.register_forward_pre_hook(lambda module, args: None)
            found.append(model(ids).detach())
            handle.remove()
        held = dense.clone()
        held[..., latent] = value
        error = hidden - sae.decode(sae.encode(hidden)).detach()
        expected = model.above(held @ sae.decoder.detach() + sae.decoder_bias.detach() + error).detach()
        torch.testing.assert_close(found[0], expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(model(ids), model.above(hidden))


def test_mistakes_say_what_to_do(model: LanguageModel) -> None:
    sae = autoencoder()
    statistics = latent_statistics(model, "first", sae, BATCHES)
    silent = int(statistics.frequency.argmin())
    for arguments, error, text in (
        ({"latent": 99}, InputError, "there is no latent 99"),
        ({"scale": "best"}, MethodError, '"unit", "mean" or "largest"'),
        ({"scale": "mean"}, MethodError, "needs statistics=latent_statistics"),
    ):
        with pytest.raises(error, match=text):
            latent_vector(sae, **{"latent": 1, "block": 0, **arguments})  # type: ignore[arg-type]
    if statistics.frequency[silent] == 0:
        with pytest.raises(InputError, match="was never active"):
            latent_vector(sae, silent, 0, scale="mean", statistics=statistics)
    with pytest.raises(InputError, match="token_batches is empty"):
        latent_statistics(model, "first", sae, [])
    with pytest.raises(SiteError, match='no module "third"'):
        clamp(model, "third", sae, {1: 0.0})
    with pytest.raises(InputError, match="values is empty"):
        clamp(model, "first", sae, {})
    with pytest.raises(InputError, match="expected finite numbers"):
        clamp(model, "first", sae, {1: float("nan")})
    wide = SparseAutoencoder(SparseAutoencoderConfig(WIDTH + 1, 9, 2))
    with pytest.raises(InputError, match="expected activations"), clamp(model, "first", wide, {1: 0.0}):
        model(BATCHES[0])
    assert not model.first._forward_hooks
