"""The perturbations of infidelity: where squares lie, how wide the noise is, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pullback as pb
from pullback.core.errors import InputError
from pullback.evaluation import GaussianNoise, NoisyBaseline, SquareRemoval


def test_squares_are_squares() -> None:
    """One rectangle of equal sides, the same for all examples and channels, of every size up to the largest."""
    problem = pb.pose(nn.Flatten(), torch.arange(480.0).reshape(2, 2, 10, 12), target=0)
    sizes = set()
    for draw in range(60):
        change, gone = SquareRemoval(0.5, mask=7.0)(problem, draw, 0)
        assert torch.equal(change, torch.where(gone, problem.point - 7.0, 0.0))
        rows, columns = gone[0, 0].any(1), gone[0, 0].any(0)
        assert torch.equal(gone, (rows[:, None] & columns).expand_as(gone))
        for side in (rows, columns):
            at = side.nonzero()[:, 0]
            assert int(at[-1] - at[0]) + 1 == len(at)
        assert int(rows.sum()) == int(columns.sum())
        sizes.add(int(rows.sum()))
    assert sizes == {1, 2, 3, 4, 5}


def test_gaussian_noise_is_a_share_of_each_range() -> None:
    x = torch.stack([torch.linspace(0, 1, 4000), torch.linspace(-5, 5, 4000)]).double()
    change, removed = GaussianNoise(0.2)(pb.pose(nn.Identity(), x, target=0), 0, 0)
    # the relative error of a standard deviation from 4000 draws is 0.011
    assert change.std(1).tolist() == pytest.approx([0.2, 2.0], rel=0.05)
    assert removed is None


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GaussianNoise(0.0), "noise=0.0 was given. Expected a standard deviation .* above 0"),
        (lambda: NoisyBaseline(-1.0), "noise=-1.0 was given.* 0 or more"),
        (lambda: SquareRemoval(0.0), r"size=0.0 was given. Expected a share of the shorter side in \(0, 1\]"),
    ],
)
def test_errors_of_perturbations(make: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        make()
