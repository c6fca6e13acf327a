"""Baselines: the reference each name stands for, at inputs and at token embeddings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

import pullback as pb
from pullback.attribution.baselines import baseline_point
from pullback.attribution.spelling import parse_baseline
from pullback.core.errors import InputError, MethodError
from pullback.core.problem import Problem
from tests.golden_net import example, largest, tiny_cnn

X = example(2, 3, 8, 8)


def posed(x: Tensor = X) -> Problem:
    return pb.pose(tiny_cnn(), x, target=0)


def point(baseline: Any, problem: Problem | None = None, draw: int = 0) -> Tensor:
    found = baseline_point(baseline, problem or posed(), draw)
    assert isinstance(found, Tensor)
    return found


def test_plain_values() -> None:
    assert torch.equal(point(pb.Zeros()), torch.zeros_like(X))
    assert torch.equal(point(None), torch.zeros_like(X))
    assert torch.equal(point(pb.Constant(0.3)), torch.full_like(X, 0.3))
    assert largest(point(pb.ChannelMean()), X.mean((2, 3), keepdim=True).expand_as(X)) < 1e-15
    flat = pb.pose(nn.Linear(6, 2).double(), example(2, 6), target=0)
    assert largest(point(pb.ChannelMean(), flat), example(2, 6).mean(1, keepdim=True).expand(2, 6)) < 1e-15


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_blur_is_scipys_gaussian_of_each_plane(sigma: float) -> None:
    found = point(pb.Blur(sigma=sigma))
    for b in range(2):
        for c in range(3):
            expected = gaussian_filter(X[b, c].numpy(), sigma, mode="nearest")
            np.testing.assert_allclose(found[b, c].numpy(), expected, rtol=0, atol=1e-12)
    with pytest.raises(
        MethodError, match=r"Blur needs \(B, C, ...\) values with a spatial dimension, got \(2, 6\)"
    ):
        point(pb.Blur(), pb.pose(nn.Linear(6, 2).double(), example(2, 6), target=0))


def test_given_is_one_per_example_or_one_for_all() -> None:
    rows = example(2, 3, 8, 8) * 0.5
    assert torch.equal(point(pb.Given(rows)), rows)
    assert torch.equal(point(pb.Given(rows[:1])), rows[:1].expand(2, 3, 8, 8))
    assert torch.equal(point(pb.Given(rows[1])), rows[1].expand(2, 3, 8, 8))
    assert torch.equal(point(pb.Given(torch.tensor(2.0))), torch.full_like(X, 2.0))
    # rows of a problem repeated in another order keep their own baseline
    assert torch.equal(point(pb.Given(rows), posed().rows(torch.tensor([1, 0, 1]))), rows[[1, 0, 1]])
    with pytest.raises(
        InputError, match=r"the baseline has shape \(3, 8, 7\); the site 'input' has \(2, 3, 8, 8\)"
    ):
        point(pb.Given(torch.zeros(3, 8, 7)))
    assert pb.Given(rows) == pb.Given(rows.clone())
    assert hash(pb.Given(rows)) == hash(pb.Given(rows.clone()))
    assert pb.Given(rows) != pb.Given(rows + 1)
    assert repr(pb.Given(rows)).startswith("Given('2x3x8x8:")


def test_uniform_stays_in_range_and_depends_on_the_draw() -> None:
    found = point(pb.Uniform())
    for b in range(2):
        assert float(X[b].min()) <= float(found[b].min()) < float(found[b].max()) <= float(X[b].max())
        # 192 draws fill their range to a few per cent
        assert float(found[b].max() - found[b].min()) > 0.9 * float(X[b].max() - X[b].min())
    bounded = point(pb.Uniform(low=2.0, high=3.0))
    assert float(bounded.min()) >= 2
    assert float(bounded.max()) < 3
    assert torch.equal(point(pb.Uniform(), draw=1), point(pb.Uniform(), draw=1))
    assert largest(point(pb.Uniform(), draw=1), found) > 0.1
    assert largest(point(pb.Uniform(seed=1)), found) > 0.1
    alone = baseline_point(pb.Uniform(), posed(X[1:]), 0)
    assert isinstance(alone, Tensor)
    assert largest(alone, found[1:]) < 1e-15


def test_dataset_gives_each_of_its_rows_about_equally_often() -> None:
    rows = torch.arange(4.0).double().reshape(4, 1, 1, 1).expand(4, 3, 8, 8)
    counts = np.bincount(
        [int(point(pb.Dataset(rows), draw=draw)[0, 0, 0, 0]) for draw in range(400)], minlength=4
    )
    # binomial with mean 100 and deviation 8.7
    assert counts.min() > 60
    assert counts.max() < 140


def test_names() -> None:
    assert parse_baseline("zeros") == pb.Zeros()
    assert parse_baseline("Blur(sigma=5)") == pb.Blur(sigma=5)
    assert parse_baseline("mean_embedding") == pb.MeanEmbedding()
    assert parse_baseline("pad") == pb.TokenEmbedding("pad")
    with pytest.raises(MethodError, match=r'"blurr" is unknown\. Nearest: "Blur"'):
        parse_baseline("blurr(3)")
    with pytest.raises(MethodError, match="has no baseline to set"):
        pb.explain(tiny_cnn(), X, target=0, method="gradient", baseline="zeros")


class Reader(nn.Module):
    """Token embeddings, normalised as pre-norm language models do, summed up."""

    def __init__(self, **tokens: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6).double()
        with torch.no_grad():
            self.embed.weight.copy_(example(11, 6))
        self.norm = nn.LayerNorm(6).double()
        self.head = nn.Linear(6, 2).double()
        self.config = SimpleNamespace(**tokens)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(input_ids)).square().mean(1))


IDS = torch.tensor([[1, 5, 7], [2, 2, 9]])


def reading(**tokens: int) -> Problem:
    return pb.pose(Reader(**tokens), {"input_ids": IDS}, target=0)


def test_the_default_at_embeddings_is_the_mask_else_the_mean() -> None:
    table = example(11, 6)
    assert largest(point(None, reading(mask_token_id=3)), table[3].expand(2, 3, 6)) == 0
    assert largest(point(None, reading()), table.mean(0).expand(2, 3, 6)) < 1e-15
    assert largest(point(pb.MeanEmbedding(), reading(mask_token_id=3)), table.mean(0).expand(2, 3, 6)) < 1e-15
    assert largest(point(pb.TokenEmbedding(4), reading()), table[4].expand(2, 3, 6)) == 0


def test_pad_is_refused_where_it_means_end_of_text() -> None:
    assert (
        largest(
            point(pb.TokenEmbedding("pad"), reading(pad_token_id=0, eos_token_id=1)),
            example(11, 6)[0].expand(2, 3, 6),
        )
        == 0
    )
    for clash in ({"pad_token_id": 1, "eos_token_id": 1}, {"pad_token_id": 1, "bos_token_id": 1}):
        with pytest.raises(
            MethodError, match=r"the pad token 1 is also the end or beginning of text.*MeanEmbedding\(\)"
        ):
            point(pb.TokenEmbedding("pad"), reading(**clash))
    with pytest.raises(MethodError, match=r"no mask token is known: .* Give its id, TokenEmbedding\(103\)"):
        point(pb.TokenEmbedding(), reading())
    with pytest.raises(
        MethodError, match='text baselines need the site "embeddings"; this problem is at "input"'
    ):
        point(pb.MeanEmbedding())


def test_a_zero_embedding_before_a_normalisation_is_warned_of() -> None:
    found = pb.explain(
        Reader(), {"input_ids": IDS}, target=0, method=pb.IntegratedGradients(steps=4), baseline="zeros"
    )
    assert any(
        "jumps within the first hundredth of the path from Zeros()" in note
        for note in found.diagnostics["notes"]
    )
    quiet = pb.explain(Reader(), {"input_ids": IDS}, target=0, method=pb.IntegratedGradients(steps=4))
    assert quiet.diagnostics["notes"] == []
