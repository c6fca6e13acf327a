"""Relevance mass and rank, the pointing game, entropy, Gini, and similarities: definitions, scipy, chance, flags."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.spatial.distance import cosine as cosine_distance
from scipy.stats import entropy as scipy_entropy
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from pullback.core.errors import InputError
from pullback.evaluation import entropy, gini, leakage, pointing_game, relevance_mass, relevance_rank
from pullback.evaluation.correlation import cosine, pearson, spearman, structural_similarity

LOCAL = [relevance_mass, relevance_rank, pointing_game]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signal(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) < 0.3


@pytest.mark.parametrize(("reduce", "size"), [("abs", abs), ("positive", lambda v: max(v, 0.0))])
def test_shares_follow_the_definition(reduce: Any, size: Any) -> None:
    a, mask = normal(6, 1, 5, 7), signal(6, 1, 5, 7)
    found = [metric(None, None, a, signal_mask=mask, reduce=reduce).values for metric in LOCAL]
    for row in range(6):
        sizes, inside = [size(v) for v in a[row].flatten().tolist()], mask[row].flatten().tolist()
        order = sorted(range(35), key=lambda at: -sizes[at])
        number = sum(inside)
        expected = [
            sum(v for v, on in zip(sizes, inside, strict=True) if on) / sum(sizes),
            sum(inside[at] for at in order[:number]) / number,
            float(inside[order[0]]),
        ]
        assert [float(values[row]) for values in found] == pytest.approx(expected, abs=1e-12)


def test_mass_is_the_rest_of_leakage() -> None:
    a, mask = normal(4, 3, 8, 8), signal(4, 1, 8, 8)
    for reduce in ("abs", "positive"):
        mass = relevance_mass(None, None, a, signal_mask=mask, reduce=reduce)
        torch.testing.assert_close(
            mass.values, 1 - leakage(None, None, a, signal_mask=mask, reduce=reduce).values
        )
        assert mass.details["area"].tolist() == pytest.approx(mask.double().mean((1, 2, 3)).tolist())


@pytest.mark.parametrize("metric", LOCAL)
def test_an_oracle_has_one_its_inverse_zero_and_noise_the_area(metric: Any) -> None:
    mask = signal(1, 12, 12).expand(900, -1, -1)
    oracle = mask.double() * (1 + normal(900, 12, 12).abs())
    assert metric(None, None, oracle, signal_mask=mask).values.tolist() == [1.0] * 900
    inverse = (~mask).double() * (1 + normal(900, 12, 12).abs())
    assert metric(None, None, inverse, signal_mask=mask).values.tolist() == [0.0] * 900
    noise = metric(None, None, normal(900, 12, 12), signal_mask=mask)
    # the share of 900 hits has a standard deviation of .015
    assert noise.mean() == pytest.approx(float(noise.details["area"][0]), abs=0.05)
    assert noise.direction == "higher"


def test_ties_share_the_places() -> None:
    a = torch.tensor([[2.0, 2, 2, 1, 0, 0]])
    mask = torch.tensor([[True, False, False, True, False, False]])
    assert float(pointing_game(None, None, a, signal_mask=mask).values) == pytest.approx(1 / 3)
    # two of the three tied ones fill both places
    assert float(relevance_rank(None, None, a, signal_mask=mask).values) == pytest.approx(1 / 3)


@pytest.mark.parametrize("tolerance", [1.0, 1.5, 2.9, 40.0])
def test_tolerance_is_a_euclidean_distance(tolerance: float) -> None:
    mask = torch.zeros(1, 1, 6, 9, dtype=torch.bool)
    mask[..., 1, 2] = mask[..., 5, 8] = True
    for row in range(6):
        for column in range(9):
            a = torch.zeros(1, 1, 6, 9)
            a[..., row, column] = 1
            near = min(math.dist((row, column), at) for at in ((1, 2), (5, 8))) <= tolerance
            if tolerance < 40:
                result = pointing_game(None, None, a, signal_mask=mask, tolerance=tolerance)
                assert float(result.values) == float(near)
    if tolerance == 40:
        with pytest.warns(
            UserWarning, match="pointing_game is undefined .* the mask is all signal, or has none"
        ):
            assert bool(pointing_game(None, None, a, signal_mask=mask, tolerance=tolerance).values.isnan())
    series = pointing_game(
        None,
        None,
        torch.eye(5)[:, None],
        signal_mask=torch.eye(5).bool()[:1, None].expand(5, -1, -1),
        tolerance=2,
    )
    assert series.values.tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("metric", LOCAL)
def test_what_says_nothing_is_flagged(metric: Any) -> None:
    a, mask = normal(3, 6).abs(), torch.tensor([[True] * 2 + [False] * 4, [True] * 6, [False] * 6])
    with pytest.warns(
        UserWarning,
        match=rf"{metric.__name__} is undefined \(NaN\) for 2 of 3 examples: the mask is all signal",
    ):
        assert metric(None, None, a, signal_mask=mask).values.isnan().tolist() == [False, True, True]
    with pytest.warns(
        UserWarning, match="for 1 of 1 examples: the attribution is constant after dropping negative parts"
    ):
        assert bool(metric(None, None, -a[:1], signal_mask=mask[:1]).values.isnan())


def test_entropy_and_gini_of_closed_forms() -> None:
    a = torch.stack([torch.ones(8), torch.eye(8)[3], torch.tensor([1.0, -1, 0, 0, 0, 0, 0, 0])])
    assert entropy(None, None, a).values.tolist() == pytest.approx([math.log(8), 0, math.log(2)])
    assert gini(None, None, a).values.tolist() == pytest.approx([0, 7 / 8, 6 / 8])
    other = normal(4, 3, 5)
    sizes = other.abs().flatten(1)
    assert entropy(None, None, other).values.tolist() == pytest.approx(
        [scipy_entropy(row) for row in sizes.numpy()]
    )
    # half the relative mean absolute difference
    apart = (sizes[:, :, None] - sizes[:, None]).abs().mean((1, 2)) / (2 * sizes.mean(1))
    torch.testing.assert_close(gini(None, None, other).values, apart)
    assert (entropy(None, None, a).direction, gini(None, None, a).direction) == ("lower", "higher")


@pytest.mark.parametrize("metric", [entropy, gini])
def test_a_zero_map_has_no_complexity(metric: Any) -> None:
    with pytest.warns(
        UserWarning, match=f"{metric.__name__} is undefined .* the attribution is zero everywhere"
    ):
        assert metric(None, None, torch.tensor([[0.0, 0], [1, 0]])).values.isnan().tolist() == [True, False]
    with pytest.raises(InputError, match="1 attributions have NaN or infinite values"):
        metric(None, None, torch.tensor([[torch.inf, 0]]))


def test_similarities_are_scipys_also_with_ties_and_left_out_entries() -> None:
    a, b, where = normal(5, 40).mul(2).round(), normal(5, 40, seed=1).mul(2).round(), signal(5, 40)
    for row in range(5):
        keep = where[row]
        for ours, theirs in (
            (pearson, lambda u, v: pearsonr(u, v).statistic),
            (spearman, lambda u, v: spearmanr(u, v).statistic),
            (cosine, lambda u, v: 1 - cosine_distance(u, v)),
        ):
            assert float(ours(a, b)[row]) == pytest.approx(theirs(a[row], b[row]), abs=1e-12)
            some = ours(a, b, where)[row]
            assert float(some) == pytest.approx(theirs(a[row][keep], b[row][keep]), abs=1e-12)
    flat = torch.full((5, 40), 0.1).double()
    for measure in (pearson, spearman):
        assert bool(measure(a, flat).isnan().all())
    assert bool(cosine(a, 0 * flat).isnan().all())
    assert cosine(1e-200 * a, a).tolist() == pytest.approx([1.0] * 5)


def test_structural_similarity() -> None:
    a = normal(2, 3, 9, 9)
    assert structural_similarity(a, 5 * a).tolist() == pytest.approx([1.0, 1.0])
    assert bool((structural_similarity(a, normal(2, 3, 9, 9, seed=1)) < 0.5).all())
    assert structural_similarity(a, torch.ones_like(a)).isnan().all()
    with pytest.raises(InputError, match=r"of at least 7 x 7 pixels; use similarity=\"spearman\""):
        structural_similarity(a[..., :6], a[..., :6])


@pytest.mark.parametrize("metric", LOCAL)
def test_errors(metric: Any) -> None:
    a, mask = normal(2, 4), torch.tensor([[True, False, False, False]]).expand(2, -1)
    with pytest.raises(InputError, match=r"reduce='square' was given. Expected \"abs\" or \"positive\""):
        metric(None, None, a, signal_mask=mask, reduce="square")
    with pytest.raises(InputError, match=r"A signal_mask of shape \(2, 3\) was given"):
        metric(None, None, a, signal_mask=mask[:, :3])
    with pytest.raises(InputError, match="1 attributions have NaN"):
        metric(None, None, torch.tensor([[1.0, 2, 3, 4], [torch.nan] * 4]), signal_mask=mask)


@pytest.mark.parametrize(
    ("shape", "tolerance"), [((2, 4), 1.0), ((2, 1, 4, 4), -1.0), ((2, 1, 4, 4), math.inf)]
)
def test_errors_of_tolerance(shape: tuple[int, ...], tolerance: float) -> None:
    with pytest.raises(InputError, match=f"tolerance={tolerance} was given for attributions of shape"):
        pointing_game(None, None, normal(*shape), signal_mask=signal(*shape), tolerance=tolerance)
