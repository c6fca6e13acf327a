"""Evaluation of autoencoders against definitions written out: FVU, scores and effects of steering."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pullback.core.errors import InputError, MethodError
from pullback.steering.sae import SparseAutoencoder, SparseAutoencoderConfig, evaluate_sae, steering_effect
from tests.conformance.fingerprint import assert_untouched
from tests.steering.sae.language_model import WIDTH, LanguageModel, batches

LATENTS = 24
BATCHES = batches(3)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel().double()  # type: ignore[return-value]


def autoencoder(selection: str = "topk", k: int = 3) -> SparseAutoencoder:
    config = SparseAutoencoderConfig(WIDTH, LATENTS, k, selection, beta=30.0)  # type: ignore[arg-type]
    made = SparseAutoencoder(config, dtype=torch.float64, seed=1)
    with torch.no_grad():
        made.encoder_bias.add_(0.1)
        made.decoder_bias.add_(0.05)
    return made


def rows(model: LanguageModel) -> Tensor:
    return torch.cat([model.below(ids)[:, 1:].flatten(0, 1) for ids in BATCHES]).detach()


def by_definition(model: LanguageModel, replaced: object) -> tuple[float, float]:
    """Cross-entropy per token, and KL from the model's own prediction, with other values after the first position."""
    loss = divergence = 0.0
    count = 0
    for ids in BATCHES:
        with torch.no_grad():
            hidden = model.below(ids)
            own = model.above(hidden)[:, :-1].log_softmax(-1)
            new = hidden.clone()
            new[:, 1:] = replaced(hidden[:, 1:])  # type: ignore[operator]
            after = model.above(new)[:, :-1].log_softmax(-1)
        loss += float(cross_entropy(after.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        divergence += float((own.exp() * (own - after)).sum())
        count += ids[:, 1:].numel()
    return loss / count, divergence / count


def test_all_figures_by_definition(model: LanguageModel) -> None:
    sae = autoencoder()
    with assert_untouched(model, BATCHES[0]):
        found = evaluate_sae(model, "first", sae, BATCHES)
    x = rows(model)
    mean = x.mean(0)
    latents = sae.encode(x)
    again = sae.decode(latents).detach()
    measured = found.measures["size"]
    assert found.tokens == len(x)
    assert measured.fvu == pytest.approx(
        float((x - again).square().sum() / (x - mean).square().sum()), rel=1e-10
    )
    assert measured.l0 == pytest.approx(float((latents.values != 0).sum()) / len(x))
    assert measured.dead_share == pytest.approx(float((latents.dense() <= 0).all(0).double().mean()))
    ce, _ = by_definition(model, lambda h: h)
    zero, kl_zero = by_definition(model, torch.zeros_like)
    ablated, _ = by_definition(model, lambda h: mean.expand_as(h))
    with_sae, kl = by_definition(model, lambda h: sae(h))
    assert found.ce == pytest.approx(ce, rel=1e-10)
    assert found.ce_zero == pytest.approx(zero, rel=1e-10)
    assert found.ce_mean == pytest.approx(ablated, rel=1e-10)
    assert measured.added_ce == pytest.approx(with_sae - ce, rel=1e-8)
    assert measured.ce_score == pytest.approx((zero - with_sae) / (zero - ce), rel=1e-8)
    assert measured.ce_score_mean == pytest.approx((ablated - with_sae) / (ablated - ce), rel=1e-8)
    assert measured.kl_score == pytest.approx((kl_zero - kl) / kl_zero, rel=1e-8)


def test_fixed_points(model: LanguageModel) -> None:
    """The identity scores 1 with FVU 0; the mean has FVU 1 and scores 0 against itself (golden check 7)."""
    eye = torch.eye(WIDTH, dtype=torch.float64)
    config = SparseAutoencoderConfig(WIDTH, WIDTH, WIDTH)
    shift = torch.full((WIDTH,), -50.0, dtype=torch.float64)
    identity = SparseAutoencoder.from_parameters(
        config,
        encoder=eye,
        encoder_bias=torch.zeros(WIDTH, dtype=torch.float64),
        decoder=eye,
        decoder_bias=shift,
    )
    measured = evaluate_sae(model, "first", identity, BATCHES).measures["size"]
    assert measured.fvu == pytest.approx(0, abs=1e-20)
    assert measured.ce_score == pytest.approx(1)
    assert measured.ce_score_mean == pytest.approx(1)
    assert measured.kl_score == pytest.approx(1)
    silent = SparseAutoencoder.from_parameters(
        replace(config, k=1), encoder=0 * eye, encoder_bias=torch.full((WIDTH,), -1.0, dtype=torch.float64),
        decoder=eye, decoder_bias=rows(model).mean(0),
    )  # fmt: skip
    measured = evaluate_sae(model, "first", silent, BATCHES).measures["size"]
    assert measured.fvu == pytest.approx(1)
    assert measured.l0 == 0
    assert measured.dead_share == 1
    assert measured.ce_score_mean == pytest.approx(0, abs=1e-12)


def test_a_gradient_autoencoder_is_measured_three_ways(model: LanguageModel) -> None:
    sae = autoencoder("gradient", k=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate_sae(model, "first", sae, BATCHES)
        again = evaluate_sae(model, "first", sae, BATCHES)
        other = evaluate_sae(model, "first", sae, BATCHES, seed=1)
    assert list(found.measures) == ["gradient, fresh label", "gradient, data label", "size"]
    assert found == again
    assert other.measures["gradient, fresh label"] != found.measures["gradient, fresh label"]
    assert other.measures["gradient, data label"] == found.measures["gradient, data label"]
    # by the data's own label: the gradient of the summed loss
    error = variance = 0.0
    mean = rows(model).mean(0)
    for ids in BATCHES:
        hidden = model.below(ids).detach().requires_grad_()
        loss = cross_entropy(model.above(hidden)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, hidden)
        x = hidden[:, 1:].detach()
        error += float((x - sae(x, gradient[:, 1:])).square().sum().detach())
        variance += float((x - mean).square().sum())
    assert found.measures["gradient, data label"].fvu == pytest.approx(error / variance, rel=1e-9)
    assert [row["selection"] for row in found.to_records()] == list(found.measures)
    assert "gradient, fresh label" in str(found)


def test_collapse_without_gradient_warns() -> None:
    from pullback.steering.sae.evaluation import SelectionMeasures, _warn_of_collapse

    good = SelectionMeasures(0.1, 2, 0, 1, 0.1, 0.9, 0.9, 0.9)
    with pytest.warns(UserWarning, match=r"falls from 0\.900 to 0\.300.*select by size"):
        _warn_of_collapse({"gradient, fresh label": good, "size": replace(good, ce_score=0.3)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn_of_collapse({"gradient, fresh label": good, "size": replace(good, ce_score=0.85)})


def test_steering_effects_by_hand(model: LanguageModel) -> None:
    sae = autoencoder()
    found = steering_effect(model, "first", sae, BATCHES, [3, 5], norm=0.5)
    alpha = 0.5 * float(rows(model).norm(dim=1).mean())
    mean = largest = kl = 0.0
    count = 0
    for ids in BATCHES:
        with torch.no_grad():
            hidden = model.below(ids)
            moved = hidden.clone()
            moved[:, 1:] += alpha * sae.latent_direction(3)
            before, after = model.above(hidden)[:, 1:], model.above(moved)[:, 1:]
        change = ((after - after.mean(-1, keepdim=True)) - (before - before.mean(-1, keepdim=True))).abs()
        mean, largest = mean + float(change.mean(-1).sum()), largest + float(change.amax(-1).sum())
        p, q = before.log_softmax(-1), after.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        count += change[..., 0].numel()
    assert found[3] == pytest.approx(
        {"mean": mean / count, "largest": largest / count, "kl": kl / count}, rel=1e-9
    )
    assert found[5] != found[3]
    silent = steering_effect(model, "first", sae, BATCHES, [3], norm=0.0)
    assert silent[3] == pytest.approx({"mean": 0.0, "largest": 0.0, "kl": 0.0}, abs=1e-12)


def test_mistakes_say_what_to_do(model: LanguageModel) -> None:
    with pytest.raises(InputError, match="token_batches is empty"):
        evaluate_sae(model, "first", autoencoder(), [])
    with pytest.raises(MethodError, match="ways has 'best'"):
        evaluate_sae(model, "first", autoencoder(), BATCHES, ways=["best"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="there is no latent 99"):
        steering_effect(model, "first", autoencoder(), BATCHES, [99])
    other = SparseAutoencoder(SparseAutoencoderConfig(5, 9, 2))
    with pytest.raises(InputError, match="expected activations"):
        evaluate_sae(model, "first", other, BATCHES)
