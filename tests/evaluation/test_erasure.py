"""Comprehensiveness, sufficiency, faithfulness correlation and estimate, monotonicity: loops, closed forms, errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import pullback as pb
from pullback.core.errors import InputError
from pullback.evaluation import (
    comprehensiveness,
    faithfulness_correlation,
    faithfulness_estimate,
    monotonicity,
    sufficiency,
)

EACH = [comprehensiveness, sufficiency, faithfulness_correlation, faithfulness_estimate, monotonicity]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(features: int, classes: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(features, 6), nn.Tanh(), nn.Linear(6, classes)).double()


def linear(weight: Tensor) -> nn.Linear:
    net = nn.Linear(weight.numel(), 1).double()
    net.weight.data.copy_(weight.reshape(1, -1))
    return net


class Words(nn.Module):
    """The score is a saturating function of the sum of what the real tokens are worth."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 2).double()
        self.embedding.weight.data.copy_(normal(9, 2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        worth = (self.embedding(input_ids).sum(2) * attention_mask).sum(1)
        return torch.stack([worth, -worth.sin()], 1)


def text() -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([[1, 2, 4, 6, 7], [5, 3, 8, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]),
    }


@pytest.mark.parametrize("kept", [False, True])
def test_tokens_removed_and_kept_follow_the_definition(kept: bool) -> None:
    """At least one token, at most the real ones; the probability of the predicted class, by a loop."""
    net, words, a, fractions = Words(), text(), normal(2, 5, 2, seed=3), (0.01, 0.4, 1.0)
    metric = sufficiency if kept else comprehensiveness
    result = metric(net, words, a, target=pb.Probability(1), fractions=fractions, mask=0.0)
    for row, length in enumerate((5, 3)):
        ids = words["input_ids"][row, :length].tolist()
        order = sorted(range(length), key=lambda at: -float(a[row, at].sum()))

        def probability(left: set[int], ids: list[int] = ids) -> float:
            worth = sum(float(net.embedding.weight.detach()[ids[at]].sum()) for at in left)
            return 1 / (1 + math.exp(worth + math.sin(worth)))

        clean, falls = probability(set(range(length))), []
        for fraction in fractions:
            top = set(order[: max(1, round(fraction * length))])
            falls.append(clean - probability(top if kept else set(range(length)) - top))
        assert result.curve[row].tolist() == pytest.approx(falls, abs=1e-12)
        assert float(result.values[row]) == pytest.approx(sum(falls) / 3, abs=1e-12)
        assert float(result.details["clean"][row]) == pytest.approx(clean, abs=1e-12)
    assert (result.name, result.direction) == (
        ("sufficiency", "lower") if kept else ("comprehensiveness", "higher")
    )


def test_a_linear_score_splits_into_what_is_removed_and_what_is_kept() -> None:
    weight, x = normal(10), normal(3, 10, seed=1)
    net, contributions = linear(weight), weight * x
    removed = comprehensiveness(net, x, contributions, fractions=(0.2, 0.5))
    kept = sufficiency(net, x, contributions, fractions=(0.2, 0.5))
    ordered = contributions.sort(1, descending=True).values
    top = torch.stack([ordered[:, :2].sum(1), ordered[:, :5].sum(1)], 1)
    torch.testing.assert_close(removed.curve, top)
    torch.testing.assert_close(kept.curve, contributions.sum(1, keepdim=True) - top)


def test_contributions_of_a_linear_model_correlate_perfectly_and_noise_does_not() -> None:
    weight, x = normal(30), normal(60, 30, seed=1)
    net = linear(weight)
    for metric, sign in itertools.product((faithfulness_correlation, faithfulness_estimate), (1, -1)):
        assert metric(net, x, sign * weight * x).values.tolist() == pytest.approx([sign] * 60, abs=1e-9)
        # 60 correlations of noise with a standard deviation of about 0.2 each
        assert abs(metric(net, x, normal(60, 30, seed=2)).mean()) < 0.12
        # a gradient is no contribution
        assert metric(net, x, weight.expand(60, -1)).mean() < 0.5


def test_faithfulness_correlation_follows_the_equation() -> None:
    """Bhatt et al.: the sets are found from the outside, by models that are asked about them."""
    x, a, masked = normal(2, 8), normal(2, 8, seed=1), []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network(8)

        def forward(self, x: Tensor) -> Tensor:
            masked.append(x.detach().clone())
            return self.inner(x)

    net = Watched()
    result = faithfulness_correlation(net, x, a, target=1, subset=0.4, samples=25, mask=0.5)
    rows = next(each for each in masked if len(each) == 50).reshape(25, 2, 8)
    for row in range(2):
        gone = rows[:, row] != x[row]
        assert gone.sum(1).tolist() == [3] * 25
        assert bool((rows[:, row][gone] == 0.5).all())
        assert len({tuple(each) for each in gone.tolist()}) > 15
        falls = net(x)[row, 1] - net(rows[:, row])[:, 1]
        expected = np.corrcoef((gone * a[row]).sum(1), falls.detach())[0, 1]
        assert float(result.values[row]) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("groups", [None, 4])
def test_faithfulness_estimate_follows_the_equation(groups: int | None) -> None:
    net, x, a = network(10), normal(3, 10), normal(3, 10, seed=1)
    result = faithfulness_estimate(net, x, a, target=2, groups=groups)
    for row in range(3):
        order = a[row].argsort(descending=True).tolist()
        count = groups or 10
        members = [
            [at for place, at in enumerate(order) if place * count // 10 == each] for each in range(count)
        ]
        relevance, falls = [], []
        for group in members:
            without = x[row].clone()
            without[group] = 0
            relevance.append(float(a[row, group].mean()))
            falls.append(float(net(x[row])[2] - net(without)[2]) / len(group))
        assert float(result.values[row]) == pytest.approx(np.corrcoef(relevance, falls)[0, 1], abs=1e-10)


def test_monotonicity_of_arya() -> None:
    """Restoring by rising contribution raises a linear score once contributions are positive, and not before."""
    weight, x = torch.tensor([1.0, 2, -3, 4]).double(), torch.ones(2, 4).double()
    result = monotonicity(linear(weight), x, torch.stack([weight, weight.abs()]))
    assert result.values.tolist() == [0.75, 0.75]
    assert result.curve[0].diff().tolist() == pytest.approx([-3, 1, 2, 4])
    assert result.curve[1].diff().tolist() == pytest.approx([1, 2, -3, 4])
    assert result.details["monotone"].tolist() == [0.0, 0.0]
    all_rise = monotonicity(linear(weight.abs()), x, weight.expand(2, -1))
    assert (all_rise.values.tolist(), all_rise.details["monotone"].tolist()) == ([1.0, 1.0], [1.0, 1.0])


def test_monotonicity_of_nguyen() -> None:
    """For a linear model E[(w_i (x_i - u))²]: a model that ignores x's sign; and the equation by a loop."""
    net, x, a = network(6), normal(2, 6), normal(2, 6, seed=1)
    result = monotonicity(net, x, a, definition="nguyen", target=0, samples=5, seed=3)
    problem = pb.pose(net, x, target=0)
    for row in range(2):
        expected = []
        for part in range(6):
            changes = []
            for draw in range(5):
                moved = x[row].clone()
                moved[part] = pb.Uniform(seed=3)(problem, draw)[row, part]
                changes.append(float(net(x[row])[0] - net(moved)[0]) ** 2)
            expected.append(sum(changes) / 5)
        assert result.curve[row].tolist() == pytest.approx(expected, abs=1e-12)
        correlation = spearmanr(a[row].abs(), expected).statistic
        assert float(result.values[row]) == pytest.approx(correlation, abs=1e-12)


@pytest.mark.parametrize("metric", EACH)
def test_batch_mates_padding_chunks_seeds(metric: Any) -> None:
    net, words, a = Words(), text(), normal(2, 5, 2, seed=3)
    state = torch.get_rng_state()
    whole = metric(net, words, a, target=1, mask=0.3)
    short = {name: value[1:, :3] for name, value in words.items()}
    alone = metric(net, short, a[1:, :3], target=1, mask=0.3)
    torch.testing.assert_close(alone.values[0], whole.values[1])
    torch.testing.assert_close(metric(net, words, a, target=1, mask=0.3, chunk=1).values, whole.values)
    assert torch.equal(torch.get_rng_state(), state)
    assert not whole.values.isnan().any()


def test_seeds_name_the_sets() -> None:
    net, x, a = network(12), normal(2, 12), normal(2, 12, seed=1)
    values = [faithfulness_correlation(net, x, a, seed=seed).values for seed in (0, 0, 1)]
    assert torch.equal(values[0], values[1])
    assert not torch.allclose(values[0], values[2])


@pytest.mark.parametrize("metric", EACH)
@pytest.mark.filterwarnings("ignore:.*are the same everywhere", "ignore:monotonicity is undefined")
def test_constant_maps_and_masks_that_change_nothing_are_flagged(metric: Any) -> None:
    x = torch.stack([torch.zeros(6), torch.ones(6)]).double()
    a = torch.arange(6.0).expand(2, -1)
    with pytest.warns(
        UserWarning, match=r"is undefined \(NaN\) for 1 of 2 examples: removing everything leaves the input"
    ):
        assert metric(linear(normal(6)), x, a).values.isnan().tolist() == [True, False]
    constant = torch.stack([a[0], torch.ones(6)])
    with pytest.warns(UserWarning, match=r"for 1 of 2 examples: the attribution.* has the model collapsed\?"):
        assert metric(linear(normal(6)), 1 + x, constant).values.isnan().tolist() == [False, True]
    if metric not in (comprehensiveness, sufficiency):
        with pytest.warns(UserWarning, match="for 2 of 2 examples: the attribution, or the score"):
            assert bool(metric(linear(torch.zeros(6)), 1 + x, a).values.isnan().all())


def test_nguyen_takes_black_inputs() -> None:
    """No mask is used, so an input of zeros and ones beside it can be measured with the zero mask."""
    x = torch.tensor([[0.0, 0, 0, 1]]).double()
    result = monotonicity(
        linear(torch.tensor([1.0, 2, 3, 4])),
        x,
        torch.tensor([[1.0, 2, 3, 4]]),
        definition="nguyen",
        samples=200,
    )
    assert float(result.values) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("metric", "change", "text"),
    [
        (comprehensiveness, {"fractions": (0.0, 0.5)}, r"fractions=\(0.0, 0.5\) was given. Expected shares of the parts in \(0, 1\]"),
        (sufficiency, {"fractions": ()}, r"fractions=\(\) was given"),
        (faithfulness_correlation, {"subset": 1.0}, "subset=1.0 was given. Expected a share of the parts between 0 and 1"),
        (monotonicity, {"definition": "strict"}, "definition='strict' was given. Expected 'arya' or 'nguyen'"),
        *((metric, {"granularity": "patch"}, "granularity='patch' was given. Expected 'pixel' or 'element'") for metric in EACH),
        *((metric, {"attribution": torch.ones(2, 5)}, r"shape \(2, 5\) was given for 'input'") for metric in EACH),
        *((metric, {"attribution": torch.full((2, 4), torch.nan)}, "2 attributions have NaN") for metric in EACH),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(metric: Any, change: dict[str, Any], text: str) -> None:
    settings: dict[str, Any] = {"attribution": torch.arange(8.0).reshape(2, 4), **change}
    with pytest.raises(InputError, match=text):
        metric(linear(normal(4)), normal(2, 4), settings.pop("attribution"), **settings)
