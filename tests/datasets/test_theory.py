"""The theory's data against its definition, and the max-margin network with equal gradients on all blocks."""

from __future__ import annotations

import pytest
import torch

from pullback.core.errors import InputError
from pullback.datasets import Signals, block_signal, signal_coordinates


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_block_signal_is_the_signal_in_one_block_plus_bounded_noise(noise: float) -> None:
    u = torch.tensor([0.5, -2.0, 1.0])
    data = block_signal(500, blocks=8, block_size=3, noise=noise, signal=u)
    blocks = data.x.reshape(500, 8, 3)
    for row in range(500):
        place, sign = int(data.position[row]), 2 * int(data.y[row]) - 1
        rest = blocks[row].clone()
        rest[place] -= sign * u
        assert float(rest.norm(dim=1).max()) <= noise + 1e-6  # float32 rounding of |u| = 2.3
        assert data.signal_mask[row].nonzero()[:, 0].tolist() == [3 * place, 3 * place + 1, 3 * place + 2]


def test_block_signal_never_uses_the_second_half_and_is_balanced() -> None:
    data = block_signal(4000, blocks=10)
    counts = data.position.bincount(minlength=10).double()
    assert counts[5:].sum() == 0
    assert bool(((counts[:5] - 800).abs() < 5 * (4000 * 0.2 * 0.8) ** 0.5).all())  # five standard deviations
    assert abs(data.y.double().mean() - 0.5) < 5 * 0.5 / 4000**0.5
    assert bool((data.x.abs().sum(1) == 1).all())  # noise 0, block size 1: nothing but ±1


def test_noise_fills_the_ball_evenly() -> None:
    radius = (
        block_signal(2000, blocks=4, block_size=2, noise=1.0, signal=torch.zeros(2))
        .x.reshape(-1, 2)
        .norm(dim=1)
    )
    # Area grows with the radius squared, so half of the points lie within √½.
    assert abs((radius < 0.5**0.5).double().mean() - 0.5) < 5 * 0.5 / 8000**0.5


def test_golden_11_the_max_margin_network_marks_every_possible_place_alike() -> None:
    blocks, size, noise = 10, 3, 0.005
    u = torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64)
    data = block_signal(400, blocks, size, noise, signal=u)
    # f(x) = Σ_{j ≤ d/2} relu(<u, x_j>) - relu(-<u, x_j>): a pair of units per relevant block.
    weight = torch.zeros(blocks // 2, blocks, size, dtype=torch.float64)
    weight[torch.arange(5), torch.arange(5)] = u
    weight = weight.flatten(1)
    x = data.x.double().requires_grad_()
    f = ((x @ weight.T).relu() - (-x @ weight.T).relu()).sum(1)
    sign = 2 * data.y - 1
    assert bool((f * sign > 1 - 5 * noise).all())  # all correct, with margin
    (gradient,) = torch.autograd.grad(f.sum(), x)
    norms = gradient.reshape(-1, blocks, size).norm(dim=2)
    assert float((norms[:, :5] / norms[:, :1] - 1).abs().max()) < 1e-6
    assert norms[:, 0].min() > 0
    assert float(norms[:, 5:].abs().max()) == 0


def test_signal_coordinates_carry_the_sign_and_nothing_else_does() -> None:
    data = signal_coordinates(300, 12, signals=3, relevant=8, low=0.5, high=2.0, noise=0.1, seed=4)
    for row in range(300):
        places, sign = data.position[row].tolist(), 2 * int(data.y[row]) - 1
        assert len(set(places)) == 3
        assert max(places) < 8
        assert data.signal_mask[row].nonzero()[:, 0].tolist() == sorted(places)
        for column in range(12):
            value = float(data.x[row, column])
            if column in places:
                assert 0.5 - 0.1 <= value * sign <= 2.0 + 0.1
            else:
                assert abs(value) <= 0.1


def test_half_of_the_coordinates_gives_the_set_of_the_theory() -> None:
    data = signal_coordinates(1000, 10, relevant=5)
    assert data.position.max() == 4
    assert bool((data.x.abs().sum(1) == 1).all())
    assert torch.equal(data.x.sum(1), (2 * data.y - 1).float())


@pytest.mark.parametrize("bias", [0.0, 0.3, 1.0])
def test_bias_is_the_chance_of_coordinate_zero(bias: float) -> None:
    data = signal_coordinates(4000, 5, bias=bias)
    counts = data.position.flatten().bincount(minlength=5).double() / 4000
    spread = 5 * 0.5 / 4000**0.5
    assert abs(counts[0] - bias) <= spread
    assert bool(((counts[1:] - (1 - bias) / 4).abs() < spread).all())
    several = signal_coordinates(4000, 5, signals=2, bias=bias)
    assert abs((several.position == 0).any(1).double().mean() - bias) <= spread


def test_seeds() -> None:
    before = torch.get_rng_state()
    for build in (
        lambda seed: block_signal(50, seed=seed),
        lambda seed: signal_coordinates(50, 6, seed=seed),
    ):
        assert torch.equal(build(1).x, build(1).x)
        assert not torch.equal(build(1).x, build(2).x)
        assert len(build(1)) == 50
    assert torch.equal(torch.get_rng_state(), before)


def test_indexing_gives_pairs_and_subsets() -> None:
    data = signal_coordinates(20, 6, signals=2)
    x, y = data[4]
    assert torch.equal(x, data.x[4])
    assert y == data.y[4]
    up = data[data.y == 1]
    assert isinstance(up, Signals)
    assert len(up) == int(data.y.sum())
    assert up.signal_mask.equal(data.signal_mask[data.y == 1])
    assert up.position.equal(data.position[data.y == 1])
    assert up.meta == data.meta


def test_errors_say_what_was_given() -> None:
    with pytest.raises(InputError, match=r"blocks=9 was given\. Expected an even number"):
        block_signal(5, blocks=9)
    with pytest.raises(InputError, match=r"signal of shape \(2,\).*Expected \(3,\)"):
        block_signal(5, block_size=3, signal=torch.ones(2))
    with pytest.raises(InputError, match="noise=-1"):
        block_signal(5, noise=-1)
    with pytest.raises(InputError, match=r"signals=3, relevant=2"):
        signal_coordinates(5, 10, signals=3, relevant=2)
    with pytest.raises(InputError, match=r"Expected 0 < low <= high"):
        signal_coordinates(5, 10, low=2, high=1)
    with pytest.raises(InputError, match="one more relevant coordinate than signals"):
        signal_coordinates(5, 2, signals=2, bias=0.5)
