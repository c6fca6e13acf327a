"""Sparse feature circuits: effects against patching by hand, and curves with known ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pullback.core.errors import InputError, MethodError
from pullback.steering.sae import (
    SparseAutoencoder,
    SparseAutoencoderConfig,
    circuit_curve,
    latent_effects,
)

WIDTH = 4


def linear_case() -> tuple[nn.Module, SparseAutoencoder, Tensor, Tensor]:
    """A linear readout of an orthonormal dictionary: the metric is a weighted sum of latents."""
    model = nn.Sequential(nn.Identity(), nn.Linear(WIDTH, 1, bias=False)).double().eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, -8.0, 0.5, 0.0]]))
    eye = torch.eye(WIDTH, dtype=torch.float64)
    zeros = torch.zeros(WIDTH, dtype=torch.float64)
    sae = SparseAutoencoder.from_parameters(
        SparseAutoencoderConfig(WIDTH, WIDTH, k=3),
        encoder=eye,
        encoder_bias=zeros,
        decoder=eye,
        decoder_bias=zeros,
    )
    clean = torch.tensor([[[3.0, 2.0, 1.0, 0.5]], [[1.0, 4.0, 2.0, 0.1]]], dtype=torch.float64)
    return model, sae, clean, torch.zeros_like(clean)


def metric(output: Tensor) -> Tensor:
    return output.sum((1, 2))


@pytest.mark.parametrize("method", ["exact", "atp", "relp", "ig"])
def test_effects_of_a_linear_readout_are_its_weights(method: str) -> None:
    model, sae, clean, corrupted = linear_case()
    effects = latent_effects(model, clean, corrupted, metric, {"0": sae}, method)  # type: ignore[arg-type]
    values = clean.clone()
    values[..., 3] = 0  # the fourth direction is not selected: it is the error, with weight 0
    expected = -values * model[1].weight
    torch.testing.assert_close(effects.latents["0"], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        effects.errors["0"], torch.zeros(2, 1, dtype=torch.float64), rtol=0, atol=1e-12
    )
    ranked = effects.ranked(2)
    assert [node.latent for node in ranked] == [1, 0]
    assert ranked[0].effect == pytest.approx(8.0 * 3.0)
    assert ranked[1].effect == pytest.approx(-2.0)


def test_curves_follow_the_weights() -> None:
    model, sae, clean, corrupted = linear_case()
    effects = latent_effects(model, clean, corrupted, metric, {"0": sae}, "atp")
    curve = circuit_curve(
        model, clean, corrupted, metric, {"0": sae}, effects, [0, 1, 2, 3, 5], ablation="zero"
    )
    # mean terms: -24 of latent 1, 2 of latent 0, 0.75 of latent 2
    full = 2 - 24 + 0.75
    assert curve.full == pytest.approx(full)
    assert curve.empty == pytest.approx(0.0)
    assert curve.faithfulness == pytest.approx([0, -24 / full, -22 / full, 1, 1])
    assert curve.completeness == pytest.approx([1, 2.75 / full, 0.75 / full, 0, 0])


def test_ablations_differ_and_nodes_downstream_are_computed_anew() -> None:
    model, sae, clean, _ = linear_case()
    corrupted = clean.flip(0)
    effects = latent_effects(model, clean, clean + 1, metric, {"0": sae}, "atp")
    with pytest.raises(InputError, match="nothing that a circuit could carry"):
        # the examples' mean stands in for each: the mean metric of a linear readout stays
        circuit_curve(model, clean, corrupted, metric, {"0": sae}, effects, [1])
    shifted = circuit_curve(model, clean, clean + 1, metric, {"0": sae}, effects, [5], ablation="corrupted")
    assert shifted.empty - shifted.full == pytest.approx(1 - 8 + 0.5)
    deep = nn.Sequential(nn.Identity(), nn.Identity(), model[1]).eval()
    two = {"0": sae, "1": sae}
    both = latent_effects(deep, clean, torch.zeros_like(clean), metric, two, "atp")
    curve = circuit_curve(deep, clean, clean, metric, two, both, [0, 1, 2, 10], ablation="zero")
    # the strongest node at both sites carries latent 1; at one site alone it carries nothing
    full = 2 - 24 + 0.75
    assert curve.faithfulness == pytest.approx([0, 0, -24 / full, 1])


def test_mistakes_are_named() -> None:
    model, sae, clean, corrupted = linear_case()
    with pytest.raises(InputError, match="no autoencoders given"):
        latent_effects(model, clean, corrupted, metric, {})
    effects = latent_effects(model, clean, corrupted, metric, {"0": sae}, "atp")
    with pytest.raises(InputError, match="from 0 to 5"):
        circuit_curve(model, clean, corrupted, metric, {"0": sae}, effects, [6])
    with pytest.raises(MethodError, match='"corrupted", "mean", "zero"'):
        circuit_curve(model, clean, corrupted, metric, {"0": sae}, effects, [1], ablation="no")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected the same"):
        circuit_curve(model, clean, corrupted, metric, {"1": sae}, effects, [1])


def test_nodes_by_position() -> None:
    model, sae, clean, _ = linear_case()
    twice = torch.cat([clean, 2 * clean], 1)
    effects = latent_effects(model, twice, torch.zeros_like(twice), metric, {"0": sae}, "atp")
    first = effects.ranked(1, per_position=True)[0]
    assert (first.position, first.latent) == (1, 1)
    assert first.effect == pytest.approx(48.0)
    curve = circuit_curve(
        model, twice, twice, metric, {"0": sae}, effects, [1], ablation="zero", per_position=True
    )
    assert curve.faithfulness == pytest.approx([-48 / (3 * (2 - 24 + 0.75))])
