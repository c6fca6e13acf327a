"""Latents and the error as a site: every method there equals the method on a net that starts at the latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.attribution.patching import patching_scores
from pullback.core.errors import InputError, MethodError
from pullback.core.sites import Site
from pullback.steering.sae import Latents, SparseAutoencoder, SparseAutoencoderConfig
from tests.conformance.methods import INPUT_ONLY, INSTANCES, LAYER_ONLY, MODEL_FREE, NAMES

WIDTH, LATENTS = 6, 10
RULED = {"Relevance", "LRP", "RelP", "CPLRP", "AttnLRP", "MambaLRP"}


def net() -> nn.Sequential:
    torch.manual_seed(3)
    made = nn.Sequential(
        nn.Linear(5, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 8), nn.GELU(), nn.Flatten(), nn.Linear(24, 4)
    )
    return made.double().eval()


def autoencoder(**settings: Any) -> SparseAutoencoder:
    config = SparseAutoencoderConfig(WIDTH, LATENTS, k=3, **settings)
    made = SparseAutoencoder(config, seed=1, dtype=torch.float64).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    made.decoder_bias.copy_(0.3 * torch.randn(WIDTH, generator=generator, dtype=torch.float64))
    made.encoder_bias.copy_(0.1 * torch.randn(LATENTS, generator=generator, dtype=torch.float64))
    if config.normalization == "mean_norm":
        made.input_scale.fill_(1.7)
    return made


def batch(rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 3, 5, generator=generator, dtype=torch.float64)


def from_latents(model: nn.Sequential, sae: SparseAutoencoder) -> nn.Sequential:
    """The rest of the net behind [latents, error] as its input: an independent spelling of the site."""
    first = nn.Linear(LATENTS + WIDTH, WIDTH).double()
    with torch.no_grad():
        first.weight.copy_(torch.cat([sae.decoder, torch.eye(WIDTH, dtype=torch.float64)]).T)
        first.bias.copy_(sae.decoder_bias)
    return nn.Sequential(first, *model[2:]).eval()


def parts(model: nn.Sequential, sae: SparseAutoencoder, x: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = model[:2](x)
        found = sae.encode(hidden).dense()
        return torch.cat([found, hidden - sae.forward(hidden)], -1)


@pytest.mark.parametrize("name", sorted({*NAMES} - {*LAYER_ONLY} - INPUT_ONLY - MODEL_FREE - RULED))
def test_every_method_explains_latents_as_it_explains_an_input(name: str) -> None:
    model, sae, x = net(), autoencoder(), batch()
    at = Latents(sae, "all").at("1")
    found = pb.explain(model, x, target=1, site=at, method=INSTANCES[name])
    expected = pb.explain(from_latents(model, sae), parts(model, sae, x), target=1, method=INSTANCES[name])
    assert isinstance(found.values, Tensor)
    assert isinstance(expected.values, Tensor)
    # the same operations but for one matrix product in another order
    torch.testing.assert_close(found.values, expected.values, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.point, expected.point, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(RULED))
def test_rules_pull_back_to_latents_through_the_decoder(name: str) -> None:
    model, sae, x = net(), autoencoder(), batch()
    plain = pb.explain(model, x, target=1, site="1", method=INSTANCES[name])
    found = pb.explain(model, x, target=1, site=Latents(sae, "all").at("1"), method=INSTANCES[name])
    assert isinstance(plain.values, Tensor)
    assert isinstance(found.values, Tensor)
    coefficient = plain.values / plain.point
    directions = torch.cat([sae.decoder, torch.eye(WIDTH, dtype=torch.float64)])
    expected = parts(model, sae, x) * (coefficient @ directions.T)
    torch.testing.assert_close(found.values, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("normalization", ["none", "mean_norm", "row"])
def test_latents_error_and_bias_share_out_the_gradient(normalization: str) -> None:
    # sum_i a_i (w_i . g) + e . g + b . g = x . g, in the units that the normalisation makes of them
    model, sae, x = net(), autoencoder(normalization=normalization), batch()
    with torch.no_grad():
        hidden = model[:2](x)
    gradient = pb.explain(model, x, target=2, site="1", method="gradient").values
    total = {
        part: pb.explain(model, x, target=2, site=Latents(sae, part).at("1"), method="input_x_gradient")
        .values.sum((1, 2))
        for part in ("latents", "error", "all")
    }  # fmt: skip
    nothing = sae.encode(hidden)
    nothing = type(nothing)(
        nothing.indices, 0 * nothing.values, nothing.count, nothing.mean, nothing.deviation
    )
    bias = (sae.decode(nothing) * gradient).sum((1, 2))
    assert bias.abs().min() > 1e-3
    torch.testing.assert_close(total["latents"] + total["error"] + bias, (hidden * gradient).sum((1, 2)))
    torch.testing.assert_close(total["latents"] + total["error"], total["all"])


def test_integrated_gradients_of_latents_go_from_none_to_all() -> None:
    model, sae, x = net(), autoencoder(), batch()
    found = pb.explain(model, x, target=2, site=Latents(sae).at("1"), method=pb.IntegratedGradients(steps=64))
    with torch.no_grad():
        hidden = model[:2](x)
        without = model[2:](hidden - sae.forward(hidden) + sae.decoder_bias)[:, 2]
        gone = model(x)[:, 2] - without
    # 64 midpoints on a smooth path: an error of the order of 1 / (24 * 64^2)
    torch.testing.assert_close(found.values.sum((1, 2)), gone, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.score, model(x)[:, 2])


def test_chunks_targets_and_the_site_text() -> None:
    model, sae, x = net(), autoencoder(), batch(3)
    at = Latents(sae).at("1")
    assert str(at) == "Latents(10 of width 6, k=3, part='latents') at 1"
    assert at.plain == Site("module", "1")
    whole = pb.explain(model, x, target=0, site=at, method="ig(steps=5)")
    small = pb.explain(model, x, target=0, site=at, method="ig(steps=5)", chunk=2)
    torch.testing.assert_close(whole.values, small.values, rtol=1e-12, atol=1e-14)
    assert whole.site == str(at)
    each = pb.explain_targets(model, x, [0, 3], site=at, method="gradient")
    torch.testing.assert_close(
        each[0].values, pb.explain(model, x, target=0, site=at, method="gradient").values
    )
    assert not torch.allclose(each[0].values, each[1].values)


def test_gradient_selection_needs_a_gradient_of_the_activations() -> None:
    model, x = net(), batch()
    sae = autoencoder(selection="gradient", beta=50.0)
    with pytest.raises(InputError, match='selection="topk"'):
        pb.explain(model, x, site=Latents(sae).at("1"), method="gradient")
    gradient = pb.explain(model, x, target=1, site="1", method="gradient").values
    chosen = pb.explain(model, x, target=1, site=Latents(sae, gradient=gradient).at("1"), method="gradient")
    with torch.no_grad():
        expected = sae.encode(model[:2](x), gradient).dense()
        plain = sae.encode(model[:2](x), selection="topk").dense()
    torch.testing.assert_close(chosen.point, expected)
    assert not torch.equal(expected, plain)
    with pytest.raises(InputError, match="expected the gradient of the loss at these activations"):
        pb.explain(model, x, site=Latents(sae, gradient=gradient[:, :2]).at("1"), method="gradient")
    with pytest.raises(MethodError, match='expected one of "latents", "error", "all"'):
        Latents(sae, "errors")  # type: ignore[arg-type]


def metric(output: Tensor) -> Tensor:
    return output[:, 1] - output[:, 0]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patching_one_latent_is_a_forward_with_its_value_moved(direction: Any) -> None:
    model, sae, x = net(), autoencoder(), batch()
    y = batch().flip(0) + 0.2
    latents, error = Latents(sae).at("1"), Latents(sae, "error").at("1")
    found = patching_scores(
        model, x, y, metric, [latents, error], "exact", direction, per_head={str(latents): LATENTS}
    )
    base, other = (y, x) if direction == "denoise" else (x, y)
    mine, given = parts(model, sae, base), parts(model, sae, other)
    with torch.no_grad():
        hidden = model[:2](base)
        before = metric(model[2:](hidden))
        assert found[latents].shape == (2, 3, LATENTS)
        assert found[error].shape == (2, 3)
        for position in range(3):
            for latent in range(LATENTS):
                moved = hidden.clone()
                step = given[:, position, latent] - mine[:, position, latent]
                moved[:, position] += step[:, None] * sae.decoder[latent]
                effect = metric(model[2:](moved)) - before
                torch.testing.assert_close(found[latents][:, position, latent], effect, atol=1e-12, rtol=1e-9)
            moved = hidden.clone()
            moved[:, position] += given[:, position, LATENTS:] - mine[:, position, LATENTS:]
            torch.testing.assert_close(
                found[error][:, position], metric(model[2:](moved)) - before, atol=1e-12, rtol=1e-9
            )


@pytest.mark.parametrize("method", ["atp", "relp", "ig"])
def test_first_order_patching_of_latents_is_the_sites_gradient_through_the_decoder(method: Any) -> None:
    model, sae, x = net(), autoencoder(), batch()
    y = batch().flip(0) + 0.2
    latents, error = Latents(sae).at("1"), Latents(sae, "error").at("1")
    plain = patching_scores(model, x, y, metric, ["1"], method, "noise", per_head=WIDTH)["1"]
    found = patching_scores(
        model, x, y, metric, [latents, error], method, "noise", per_head={str(latents): LATENTS}
    )
    with torch.no_grad():
        gradient = plain / (model[:2](y) - model[:2](x))
    move = parts(model, sae, y) - parts(model, sae, x)
    torch.testing.assert_close(
        found[latents], move[..., :LATENTS] * (gradient @ sae.decoder.T), rtol=1e-8, atol=1e-11
    )
    torch.testing.assert_close(found[error], (move[..., LATENTS:] * gradient).sum(-1), rtol=1e-8, atol=1e-11)
    # together they are what the plain site gets
    torch.testing.assert_close(found[latents].sum(-1) + found[error], plain.sum(-1), rtol=1e-8, atol=1e-11)


def test_two_sites_along_one_path_keep_their_total_gradients() -> None:
    # an earlier site's gradient goes through the whole later value, its error included
    model, x = net(), batch()
    y = batch().flip(0) + 0.2
    torch.manual_seed(1)
    later = SparseAutoencoder(SparseAutoencoderConfig(8, 12, k=2), dtype=torch.float64)
    early = Latents(autoencoder()).at("1")
    alone = patching_scores(model, x, y, metric, [early], "atp")[early]
    both = patching_scores(model, x, y, metric, [early, Latents(later).at("3")], "atp")
    torch.testing.assert_close(both[early], alone, rtol=1e-12, atol=1e-14)
