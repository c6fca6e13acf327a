"""Controls know nothing of the model, and say so by their values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.filters import sobel
from torch import nn

import pullback as pb
from pullback.core.errors import MethodError
from tests.golden_net import example, largest, tiny_cnn, tiny_mlp


def test_random_maps_belong_to_examples_not_to_places() -> None:
    x = example(4, 6)
    order = torch.tensor([2, 0, 3, 1])
    whole = pb.explain(tiny_mlp(), x, target=0, method=pb.RandomAttribution(seed=5)).values
    moved = pb.explain(tiny_mlp(), x[order], target=0, method=pb.RandomAttribution(seed=5)).values
    assert torch.equal(moved, whole[order])
    alone = pb.explain(tiny_mlp(), x[2:3], target=0, method=pb.RandomAttribution(seed=5)).values
    assert torch.equal(alone, whole[2:3])
    assert largest(whole[0], whole[1]) > 0.1
    other = pb.explain(tiny_mlp(), x, target=0, method=pb.RandomAttribution(seed=6)).values
    assert largest(whole, other) > 0.1


def test_random_maps_are_standard_normal_and_blind_to_model_and_target() -> None:
    x = example(1, 1, 100, 100)
    net = nn.Sequential(nn.Flatten(), nn.Linear(10000, 2).double())
    found = pb.explain(net, x, target=0, method="random").values
    # of 10000 draws: standard error 0.01 of the mean and 0.007 of the deviation
    assert abs(float(found.mean())) < 0.04
    assert abs(float(found.std()) - 1) < 0.03
    again = pb.explain(
        nn.Sequential(nn.Flatten(), nn.Linear(10000, 2).double()), x, target=1, method="random"
    )
    assert torch.equal(found, again.values)
    assert again.diagnostics["evaluations"].tolist() == [0]


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 16)])
def test_edges_are_scikit_images_sobel(shape: tuple[int, ...]) -> None:
    x = example(*shape)
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(2).double())
    net(x)
    found = pb.explain(net, x, target=0, method="edges").values
    for b in range(shape[0]):
        for c in range(shape[1]):
            np.testing.assert_array_equal(found[b, c].numpy(), sobel(x[b, c].numpy()))
    assert float(found.max()) > 0.1


def test_a_step_is_an_edge_of_known_strength() -> None:
    """scikit-image takes √((h² + v²)/2) of normalised slopes, so a step by one gives 1/√2 on either side."""
    x = torch.zeros(1, 1, 6, 6).double()
    x[..., 3:] = 1
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2).double())
    found = pb.explain(net, x, target=0, method=pb.EdgeDetector()).values[0, 0]
    expected = torch.zeros(6, 6).double()
    expected[:, 2:4] = 0.5**0.5
    assert largest(found, expected) < 1e-12


def test_vectors_have_no_edges() -> None:
    with pytest.raises(
        MethodError, match=r"EdgeDetector needs an image .* or a series .*; 'input' is \(2, 6\)"
    ):
        pb.explain(tiny_mlp(), example(2, 6), target=0, method="edges")
    assert pb.explain(tiny_cnn(), example(1, 3, 8, 8), target=0, method="edges").values.shape == (1, 3, 8, 8)
