"""Intervals cover what they should; tests agree with scipy and with counting by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from pullback.core.errors import InputError
from pullback.evaluation import (
    bootstrap_interval,
    hierarchical_bootstrap,
    paired_difference,
    student_interval,
)

NAN = float("nan")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_bootstrap_agrees_with_scipy(statistic: str) -> None:
    from scipy.stats import bootstrap

    values = normal(200) ** 3
    ours = bootstrap_interval(values, statistic, samples=20_000)
    theirs = bootstrap(
        (values,),
        getattr(np, statistic),
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    # Two Monte-Carlo estimates of the same quantile: a few percent of the interval's width.
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.05 * width
    assert abs(ours.high - theirs.high) < 0.05 * width
    assert ours.estimate == getattr(np, statistic)(values)


def test_bootstrap_of_the_mean_has_the_width_of_the_central_limit_theorem() -> None:
    values = normal(2000)
    interval = bootstrap_interval(values, level=0.9, samples=10_000)
    half = 1.6449 * values.std() / math.sqrt(2000)
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.05)
    assert interval.low < interval.estimate < interval.high


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    covered = sum(0.0 in bootstrap_interval(normal(60, seed=s), level=0.8, samples=400) for s in range(400))
    assert abs(covered / 400 - 0.8) < 0.07  # 3 standard deviations, and a little for n = 60


def test_nans_are_left_out_and_counted() -> None:
    with_nan = bootstrap_interval([1.0, NAN, 2.0, 4.0, NAN])
    without = bootstrap_interval([1.0, 2.0, 4.0])
    assert (with_nan.low, with_nan.estimate, with_nan.high) == (without.low, without.estimate, without.high)
    assert (with_nan.count, with_nan.undefined) == (3, 2)
    nothing = bootstrap_interval([NAN, NAN])
    assert math.isnan(nothing.estimate)
    assert nothing.undefined == 2
    single = bootstrap_interval([3.0])
    assert single.estimate == 3.0
    assert math.isnan(single.low)


def test_the_same_seed_gives_the_same_interval_and_the_global_generators_are_untouched() -> None:
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    values = torch.from_numpy(normal(50))
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5)
    assert bootstrap_interval(values, seed=5) != bootstrap_interval(values, seed=6)
    a, b = normal(30, seed=1), normal(30, seed=2)
    assert paired_difference(a, b, seed=1) == paired_difference(a, b, seed=1)
    table = normal(3, 20)
    assert hierarchical_bootstrap(table, seed=1) == hierarchical_bootstrap(table, seed=1)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_student_interval_agrees_with_scipy() -> None:
    from scipy.stats import ttest_1samp

    values = normal(5)
    theirs = ttest_1samp(values, 0).confidence_interval(0.9)
    ours = student_interval([*values, NAN], 0.9)
    assert (ours.low, ours.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))
    assert ours.undefined == 1


def test_exact_p_value_counts_the_sign_patterns() -> None:
    differences = normal(8) + 0.4
    observed = abs(differences.sum())
    hits = sum(
        abs(float(np.dot(signs, differences))) >= observed - 1e-12
        for signs in itertools.product((1, -1), repeat=8)
    )
    result = paired_difference(differences, np.zeros(8))
    assert result.p_value == hits / 256
    assert result.interval.estimate == pytest.approx(differences.mean())


def test_sampled_p_value_agrees_with_scipy() -> None:
    from scipy.stats import permutation_test

    a, b = normal(40, seed=1) + 0.4, normal(40, seed=2)
    ours = paired_difference(a, b, samples=20_000).p_value
    theirs = permutation_test(
        (a, b), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=5000, rng=3
    ).pvalue
    assert 0.005 < ours < 0.5  # neither certain nor hopeless, so that the comparison can fail
    assert abs(ours - theirs) < 5 * math.sqrt(ours / 5000)


def test_p_values_are_uniform_without_a_difference_and_small_with_one() -> None:
    null = [
        paired_difference(normal(30, seed=s), normal(30, seed=s + 999), samples=200).p_value
        for s in range(300)
    ]
    assert abs(np.mean(np.array(null) < 0.2) - 0.2) < 0.07  # 3 standard deviations of 300 coin flips
    assert paired_difference(normal(30) + 3, normal(30, seed=1)).p_value == 1 / 2001
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).p_value == 1.0
    assert paired_difference(normal(30), normal(30)).p_value == 1.0


def test_pairs_with_a_nan_are_left_out() -> None:
    result = paired_difference([1.0, NAN, 3.0, 4.0], [0.0, 0.0, NAN, 0.0])
    assert (result.interval.estimate, result.interval.count, result.interval.undefined) == (2.5, 2, 2)
    assert result.p_value == 0.5  # two of four sign patterns
    assert math.isnan(paired_difference([NAN], [1.0]).p_value)


def variance_components(seeds: int, images: int, own: float, shared: float, rest: float) -> np.ndarray:
    return own * normal(seeds, 1) + shared * normal(1, images, seed=1) + rest * normal(seeds, images, seed=2)


def test_hierarchical_bootstrap_adds_the_variance_of_seeds_and_of_images() -> None:
    seeds, images = 40, 200
    table = variance_components(seeds, images, own=0.3, shared=2.0, rest=0.1)
    interval = hierarchical_bootstrap(table, samples=4000)
    # Variance of the pigeonhole bootstrap: of row means over rows plus of column means over columns.
    expected = math.sqrt(table.mean(1).var() / seeds + table.mean(0).var() / images)
    assert (interval.high - interval.low) / 3.92 == pytest.approx(expected, rel=0.06)
    assert interval.estimate == pytest.approx(table.mean())
    seeds_alone = bootstrap_interval(table.mean(1))
    assert interval.high - interval.low > 2 * (seeds_alone.high - seeds_alone.low)


def test_three_levels_add_the_variances_of_bases_of_seeds_within_them_and_of_images() -> None:
    bases, seeds, images = 20, 12, 150
    table = (
        0.5 * normal(bases, 1, 1) + 0.8 * normal(bases, seeds, 1, seed=1) + 1.5 * normal(1, 1, images, seed=2)
    )
    interval = hierarchical_bootstrap(table, samples=4000)
    cells, of_bases = table.mean(2), table.mean((1, 2))
    # of base means over bases, of seeds around their base over all seeds, of column means over columns
    expected = math.sqrt(
        of_bases.var() / bases + cells.var(1).mean() / (bases * seeds) + table.mean((0, 1)).var() / images
    )
    assert (interval.high - interval.low) / 3.92 == pytest.approx(expected, rel=0.06)
    assert interval.estimate == pytest.approx(table.mean())
    # seeds taken for independent of their base model give too narrow an interval
    flat = hierarchical_bootstrap(table.reshape(bases * seeds, images), samples=4000)
    assert interval.high - interval.low > 1.2 * (flat.high - flat.low)
    assert hierarchical_bootstrap(table[:1]) == hierarchical_bootstrap(table[0])


def test_independent_images_average_out_and_shared_ones_do_not() -> None:
    table = variance_components(10, 100, own=0.0, shared=1.0, rest=0.0)
    shared = hierarchical_bootstrap(table)
    independent = hierarchical_bootstrap(table, images="independent")
    # All rows are equal: ten independent resamples of the images divide the spread by √10.
    ratio = (shared.high - shared.low) / (independent.high - independent.low)
    assert ratio == pytest.approx(math.sqrt(10), rel=0.1)


def test_hierarchical_bootstrap_with_one_seed_is_the_plain_bootstrap() -> None:
    row = normal(300)
    one, plain = hierarchical_bootstrap(row[None], samples=10_000), bootstrap_interval(row, samples=10_000)
    width = plain.high - plain.low
    assert abs(one.low - plain.low) < 0.05 * width
    assert abs(one.high - plain.high) < 0.05 * width


def test_hierarchical_bootstrap_leaves_nans_out() -> None:
    table = np.full((3, 10), 0.25)
    table[1, 4] = NAN
    interval = hierarchical_bootstrap(table)
    assert (interval.low, interval.high, interval.count, interval.undefined) == (0.25, 0.25, 29, 1)
    assert math.isnan(hierarchical_bootstrap(np.full((2, 2), NAN)).estimate)


def test_errors_say_what_was_given() -> None:
    with pytest.raises(InputError, match=r"shape \(0,\).*at least one value"):
        bootstrap_interval([])
    with pytest.raises(InputError, match="statistic='mode'"):
        bootstrap_interval([1.0], "mode")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="level=95 was given"):
        bootstrap_interval([1.0], level=95)
    with pytest.raises(InputError, match="samples=0 was given"):
        bootstrap_interval([1.0], samples=0)
    with pytest.raises(InputError, match=r"2 and 1 values.*same examples in the same order"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(InputError, match=r"shape \(3,\).*\(seeds, images\)"):
        hierarchical_bootstrap([1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="images='crossed'"):
        hierarchical_bootstrap([[1.0]], images="crossed")  # type: ignore[arg-type]
