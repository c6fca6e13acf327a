"""The streaming estimator: weighted sums and second moments as by hand, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.core.estimator import Moments, WeightedSum, mean_gradient, stream
from pullback.core.points import take

RANDOM = torch.Generator().manual_seed(0)
VALUES = torch.randn(12, 3, generator=RANDOM, dtype=torch.float64)
ROWS = torch.tensor([0, 1, 0, 2, 2, 1, 0, 0, 1, 2, 0, 1])


def by_hand(rows: Tensor) -> tuple[Tensor, Tensor]:
    groups = [VALUES[rows == example] for example in range(3)]
    return torch.stack([group.mean(0) for group in groups]), torch.stack(
        [group.var(0, unbiased=False) for group in groups]
    )


@pytest.mark.parametrize("cut", [1, 2, 5, 12])
def test_moments_of_rows_in_any_portions(cut: int) -> None:
    moments = Moments(3, VALUES[:3])
    for portion in torch.arange(12).split(cut):
        moments.add(VALUES[portion], ROWS[portion], torch.ones(len(portion)))
    mean, variance = by_hand(ROWS)
    assert torch.allclose(moments.mean, mean, atol=1e-14)
    assert torch.allclose(moments.variance(), variance, atol=1e-14)
    assert moments.weight.tolist() == [5.0, 4.0, 3.0]


def test_weights_count_as_repetitions() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0])
    moments, repeated = Moments(1, VALUES[:1]), VALUES[[0, 1, 1, 2, 2, 2]]
    for row in range(3):
        moments.add(VALUES[row : row + 1], torch.zeros(1, dtype=torch.long), weights[row : row + 1])
    assert torch.allclose(moments.mean[0], repeated.mean(0))
    assert torch.allclose(moments.variance()[0], repeated.var(0, unbiased=False))


def test_without_second_moments_sums_are_weighted_sums() -> None:
    sums = WeightedSum(3, VALUES[:3])
    sums.add(VALUES, ROWS, torch.arange(12.0))
    wanted = torch.stack(
        [(VALUES * torch.arange(12.0)[:, None])[example == ROWS].sum(0) for example in range(3)]
    )
    assert torch.allclose(sums.sum, wanted)


def test_variance_of_nearly_equal_float32_values() -> None:
    """10^4 + small noise in float32: the difference of squares would give garbage, even below zero."""
    values = (1e4 + torch.linspace(0, 0.05, 64)).float()[:, None]
    moments = Moments(1, values)
    for row in values:
        moments.add(row[None], torch.zeros(1, dtype=torch.long), torch.ones(1))
    assert moments.mean.dtype == torch.float64
    assert torch.allclose(moments.variance()[0], values.double().var(0, unbiased=False), rtol=1e-9)


def test_complex_moments() -> None:
    """The variance of complex values is E|z - Ez|², real."""
    z = torch.complex(VALUES[:6], VALUES[6:])
    moments = Moments(1, z)
    for portion in torch.arange(6).split(4):
        moments.add(z[portion], torch.zeros(len(portion), dtype=torch.long), torch.ones(len(portion)))
    assert torch.allclose(moments.mean[0], z.mean(0))
    assert torch.allclose(moments.variance()[0], (z - z.mean(0)).abs().square().mean(0))


class Cubic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.pow(3).sum(1, keepdim=True)


@pytest.mark.parametrize("chunk", [1, 2, 4, 7, 100])
def test_mean_gradient_by_hand_and_nodes_come_in_order(chunk: int) -> None:
    """f = Σx³: the weighted mean of 3 (α x)² is 3 x² Σ w α²."""
    x = VALUES[:2]
    problem = pb.pose(Cubic(), x, target=0, chunk=chunk)
    alpha, weights = torch.tensor([0.1, 0.5, 0.9]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    visited: list[tuple[int, int]] = []
    sizes: list[int] = []

    def place(nodes: Tensor, index: Tensor) -> Tensor:
        visited.extend(zip(nodes.tolist(), index.tolist(), strict=True))
        sizes.append(len(nodes))
        return alpha[nodes][:, None] * take(problem.point, index)  # type: ignore[operator]

    found = mean_gradient(problem, weights, place)
    assert torch.allclose(found, 3 * x.square() * (weights * alpha.square()).sum())  # type: ignore[arg-type]
    assert visited == [(node, example) for node in range(3) for example in range(2)]
    assert max(sizes) <= chunk
    assert problem.evaluations_of_rows().tolist() == [3, 3]


def test_stream_of_other_values_than_gradients() -> None:
    problem = pb.pose(Cubic(), VALUES[:2], target=0)
    moments = stream(
        problem,
        torch.ones(4),
        lambda nodes, index: take(problem.point, index),
        lambda z, nodes, index: z * nodes[:, None],
        second=True,
    )
    assert torch.allclose(moments.mean, 1.5 * VALUES[:2])
    assert torch.allclose(moments.variance(), 1.25 * VALUES[:2].square())
    assert problem.evaluations_of_rows().tolist() == [0, 0]
