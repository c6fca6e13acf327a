"""Standings: ranks, ties and controls by paired differences over seeds and images together."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pullback.core.errors import InputError
from pullback.evaluation import hierarchical_bootstrap, standings

NAN = float("nan")


def noise(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(4, 60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_ranks_follow_the_direction_and_differences_are_paired() -> None:
    shared = noise(0, 10.0)
    values = {
        "a": shared + 0.3 + noise(1, 0.1),
        "b": shared + noise(2, 0.1),
        "c": shared - 0.3 + noise(3, 0.1),
    }
    found = standings(values, "higher")
    assert [found[name].rank.estimate for name in "abc"] == [1.0, 2.0, 3.0]
    # the images differ by far more than the methods; in pairs the methods are told apart all the same
    assert [found[name].tied for name in "abc"] == [True, False, False]
    assert found["a"].interval.high - found["a"].interval.low > 2
    assert (found["b"].rank.low, found["b"].rank.high) == (2.0, 2.0)
    assert found["a"].interval == hierarchical_bootstrap(values["a"], samples=500)
    turned = standings(values, "lower")
    assert [turned[name].rank.estimate for name in "abc"] == [3.0, 2.0, 1.0]
    assert [turned[name].tied for name in "abc"] == [False, False, True]


def test_what_cannot_be_told_apart_is_tied_and_its_rank_is_uncertain() -> None:
    found = standings({"a": noise(1), "b": noise(2), "c": noise(3) - 5}, "higher")
    assert found["a"].tied
    assert found["b"].tied
    assert not found["c"].tied
    assert (found["a"].rank.low, found["a"].rank.high) == (1.0, 2.0)
    same = standings({"a": noise(1), "b": noise(1)}, "higher")
    assert same["a"].rank.estimate == same["b"].rank.estimate == 1.5


def test_one_seed_that_differs_is_not_a_difference_of_methods() -> None:
    """Resampling images alone would call this a sure win."""
    table = noise(1, 0.01)
    better = table.clone()
    better[0] += 1.0
    assert standings({"a": better, "b": table}, "higher")["b"].tied


def test_a_method_has_to_beat_every_control() -> None:
    values = {"good": noise(1) + 3, "middle": noise(2), "edges": noise(3), "random": noise(4) - 3}
    found = standings(values, "higher", frozenset({"edges", "random"}))
    assert found["good"].beats_controls is True
    assert found["middle"].beats_controls is False  # it beats the random map only
    assert found["edges"].beats_controls is None
    # controls are not ranked among the methods, but have a place
    assert found["good"].rank.estimate == 1
    assert found["middle"].rank.estimate == 2
    assert not found["random"].tied
    assert found["random"].rank.estimate == 3


def test_a_variant_has_to_be_beaten_by_nobody_and_is_not_ranked() -> None:
    values = {"a": noise(1), "blurred": noise(2) + 3, "random": noise(3) - 3}
    found = standings(values, "higher", frozenset({"random"}), frozenset({"blurred"}))
    assert found["a"].beats_controls is True
    assert (found["a"].rank.estimate, found["a"].tied) == (1.0, True)
    assert (found["blurred"].beats_controls, found["blurred"].tied) == (None, False)


def test_undefined_methods_have_no_rank_and_do_not_count() -> None:
    values = {"a": noise(1) + 3, "dead": torch.full((4, 60), NAN), "b": noise(2)}
    found = standings(values, "higher", frozenset())
    assert math.isnan(found["dead"].rank.estimate)
    assert not found["dead"].tied
    assert found["b"].rank.estimate == 2
    assert found["a"].beats_controls is None
    half = noise(1) + 3
    half[:, :30] = NAN
    assert standings({"half": half, "b": noise(2)}, "higher")["half"].interval.undefined == 120
    alone = standings({"dead": torch.full((1, 2), NAN)}, "lower")
    assert math.isnan(alone["dead"].interval.estimate)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"\[\(4, 60\), \(4, 59\)\] were given. Expected \(seeds, images\)"):
        standings({"a": noise(1), "b": noise(1)[:, 1:]}, "higher")
