"""Evaluation of autoencoders: known ends, a slow re-derivation, and the warning about gradient-free inference."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pullback.core.errors import InputError
from pullback.steering.sae import (
    SparseAutoencoder,
    SparseAutoencoderConfig,
    evaluate_sae,
    pareto_curve,
    pareto_table,
)

VOCABULARY, WIDTH = 11, 4


def language_model() -> nn.Sequential:
    torch.manual_seed(2)
    return (
        nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Tanh(), nn.Linear(WIDTH, VOCABULARY))
        .double()
        .eval()
    )


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))


def mirrored(decoder_bias: Tensor | None = None, encoder_bias: float = 0.0) -> SparseAutoencoder:
    """ReLU(x) - ReLU(-x) = x: the identity, as an autoencoder."""
    both = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]).double()
    return SparseAutoencoder.from_parameters(
        SparseAutoencoderConfig(WIDTH, 2 * WIDTH, k=2 * WIDTH),
        encoder=both, decoder=both, encoder_bias=torch.full((2 * WIDTH,), encoder_bias).double(),
        decoder_bias=torch.zeros(WIDTH).double() if decoder_bias is None else decoder_bias,
    )  # fmt: skip


def test_identity_mean_and_nothing_have_their_known_scores() -> None:
    model, ids = language_model(), tokens()
    whole = evaluate_sae(model, "1", [ids], mirrored())
    found = whole.selections["gradient-free"]
    assert found.fvu == pytest.approx(0, abs=1e-28)
    assert [found.ce_score_zero, found.ce_score_mean, found.kl_score_zero] == pytest.approx([1, 1, 1])
    assert [found.added_ce, found.kl] == pytest.approx([0, 0], abs=1e-14)
    with torch.no_grad():
        mean = model[:2](ids)[:, 1:].flatten(0, 1).mean(0)
    # an encoder that never fires: what is left is the bias
    middle = evaluate_sae(model, "1", [ids], mirrored(mean, encoder_bias=-50.0)).selections["gradient-free"]
    assert middle.fvu == pytest.approx(1, abs=1e-12)
    assert middle.ce_score_mean == pytest.approx(0, abs=1e-12)
    assert middle.kl_score_mean == pytest.approx(0, abs=1e-12)
    assert (middle.l0, middle.dead_share) == (0, 1)
    with pytest.warns(UserWarning, match="worse than the mean"):
        nothing = evaluate_sae(model, "1", [ids], mirrored(encoder_bias=-50.0))
    assert nothing.selections["gradient-free"].ce_score_zero == pytest.approx(0, abs=1e-12)
    assert nothing.warnings


@pytest.mark.parametrize("padded", [False, True])
def test_measures_are_those_of_a_loop_over_tokens(padded: bool) -> None:
    model, ids = language_model(), tokens()
    sae = SparseAutoencoder(SparseAutoencoderConfig(WIDTH, 9, k=2), seed=4, dtype=torch.float64)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.net(input_ids)  # type: ignore[no-any-return]

    mask = torch.ones_like(ids)
    if padded:
        mask[1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = evaluate_sae(Masked().eval(), "net.1", [inputs], sae)
        halves = [{key: value[rows] for key, value in inputs.items()} for rows in (slice(0, 1), slice(1, 3))]
        parts = evaluate_sae(Masked().eval(), "net.1", halves, sae)
    found = whole.selections["gradient-free"]
    ce = own = zero = mean_ce = kl = error = 0.0
    predicted = active = 0
    fired: set[int] = set()
    kept = [(b, t) for b in range(3) for t in range(1, 7) if mask[b, t]]
    with torch.no_grad():
        hidden = model[:2](ids)
        xs = torch.stack([hidden[place] for place in kept])
        for b, t in kept:
            encoded = sae.encode(hidden[b, t])
            error += float((hidden[b, t] - sae.decode(encoded)).square().sum())
            on = {int(i) for i, v in zip(encoded.indices, encoded.values, strict=True) if v > 0}
            active, fired = active + len(on), fired | on
        for b in range(3):
            for t in range(6):
                if not (mask[b, t] and mask[b, t + 1]):
                    continue
                label = int(ids[b, t + 1])
                # the first position is skipped: it keeps its activation
                states = [hidden[b, t]] * 4
                if t > 0:
                    states[1:] = [sae.forward(hidden[b, t]), torch.zeros(WIDTH).double(), xs.mean(0)]
                logs = [model[2](state).log_softmax(-1) for state in states]
                own, ce, zero, mean_ce = (
                    total - float(log[label])
                    for total, log in zip((own, ce, zero, mean_ce), logs, strict=True)
                )
                kl += float((logs[0].exp() * (logs[0] - logs[1])).sum())
                predicted += 1
    assert (whole.tokens, whole.predicted) == (len(kept), predicted)
    assert found.fvu == pytest.approx(error / float((xs - xs.mean(0)).square().sum()), rel=1e-12)
    assert found.l0 == pytest.approx(active / len(kept))
    assert found.dead_share == pytest.approx(1 - len(fired) / 9)
    expected = [own, ce, ce - own, zero, mean_ce, kl]
    measured = [whole.ce, found.ce, found.added_ce, whole.ce_zero, whole.ce_mean, found.kl]
    assert measured == pytest.approx([value / predicted for value in expected], rel=1e-10)
    assert found.ce_score_zero == pytest.approx((zero - ce) / (zero - own), rel=1e-9)
    assert found.ce_score_mean == pytest.approx((mean_ce - ce) / (mean_ce - own), rel=1e-9)
    assert list(vars(parts.selections["gradient-free"]).values()) == pytest.approx(
        list(vars(found).values()), rel=1e-9
    )


class Whisper(nn.Module):
    """Logits read one quiet direction only, which is on or off."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        on = torch.relu(self.site(x)[:, 1] - 0.2)
        return torch.stack([8 * on, torch.ones_like(on), 0.3 * torch.ones_like(on)], 1)


def whisper_batch(rows: int = 600) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.zeros(rows, 2, dtype=torch.float64)
    x[:, 0] = 1 + torch.rand(rows, generator=generator, dtype=torch.float64)
    x[:, 1] = 0.5 * (torch.rand(rows, generator=generator) < 0.4)
    labels = torch.multinomial(Whisper()(x).softmax(-1), 1, generator=generator)[:, 0]
    return {"x": x, "labels": labels}


def test_a_gradient_selection_that_collapses_without_gradient_is_warned_of() -> None:
    eye = torch.eye(2).double()
    sae = SparseAutoencoder.from_parameters(
        SparseAutoencoderConfig(2, 2, k=1, selection="gradient", beta=30.0),
        encoder=eye, decoder=eye, encoder_bias=torch.zeros(2).double(), decoder_bias=torch.zeros(2).double(),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="gradient-free inference loses"):
        found = evaluate_sae(Whisper().eval(), "site", [whisper_batch()], sae, skip_positions=())
    assert list(found.selections) == ["fresh label", "data label", "gradient-free"]
    fresh, data, free = found.selections.values()
    # where the whisper is on, its gradient is the only one; by size the loud direction always wins
    assert fresh.ce_score_mean > 0.9
    assert data.ce_score_mean > 0.9
    # by size every token is read as off, as under zero ablation
    assert free.ce_score_zero == pytest.approx(0, abs=1e-12)
    # the price of selecting what matters: the loud direction is lost there
    assert fresh.fvu > free.fvu
    assert len(found.warnings) >= 1


def test_mistakes_are_named() -> None:
    model, sae = language_model(), mirrored()
    with pytest.raises(InputError, match="a list of batches that is read twice"):
        evaluate_sae(model, "1", tokens(), sae)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="an empty one"):
        evaluate_sae(model, "1", [], sae)
    with pytest.raises(InputError, match="at least two k and three seeds"):
        pareto_curve(lambda kind, k, seed: {}, ["topk"], (2, 4), seeds=(0, 1))
    with pytest.raises(InputError, match="at least two k and three seeds"):
        pareto_curve(lambda kind, k, seed: {}, ["topk"], (2,))


def test_pareto_rows_and_intervals() -> None:
    def evaluated(kind: str, k: int, seed: int) -> dict[str, Any]:
        return {"fvu": k * 10.0 + seed + (100 if kind == "gradient" else 0)}

    rows = pareto_curve(evaluated, ["topk", "gradient"], (2, 4))
    assert len(rows) == 12
    points = pareto_table(rows)
    assert [(p.kind, p.k, p.mean) for p in points] == [
        ("topk", 2, 21.0), ("topk", 4, 41.0), ("gradient", 2, 121.0), ("gradient", 4, 141.0)
    ]  # fmt: skip
    # sd 1, n 3: t(0.975, 2) / sqrt(3) = 2.4841
    assert points[0].high - points[0].mean == pytest.approx(2.4841, abs=1e-4)
