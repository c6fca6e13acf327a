"""Class activation maps against their definitions as slow loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.core.errors import MethodError
from tests.golden_net import example, largest, tiny_cnn, tiny_mlp

X, TARGET = example(2, 3, 8, 8), torch.tensor([1, 2])


def activation_and_gradient(net: nn.Sequential, depth: int) -> tuple[Tensor, Tensor]:
    """By plain autograd through the two halves of the net."""
    with torch.no_grad():
        inner = net[: depth + 1](X)
    inner.requires_grad_()
    score = net[depth + 1 :](inner).gather(1, TARGET[:, None]).sum()
    return inner.detach(), torch.autograd.grad(score, inner)[0]


def loop(activation: Tensor, gradient: Tensor, own_weight: bool, rectify: bool) -> Tensor:
    batch, channels, height, width = activation.shape
    cam = torch.zeros(batch, 1, height, width).double()
    for b in range(batch):
        for c in range(channels):
            mean = sum(gradient[b, c, i, j] for i in range(height) for j in range(width)) / (height * width)
            for i in range(height):
                for j in range(width):
                    weight = max(gradient[b, c, i, j], gradient.new_zeros(())) if own_weight else mean
                    cam[b, 0, i, j] += weight * activation[b, c, i, j]
    return cam.clamp_min(0) if rectify else cam


@pytest.mark.parametrize("rectify", [True, False])
@pytest.mark.parametrize("depth", [0, 4, 6])
def test_maps_are_the_definitions(depth: int, rectify: bool) -> None:
    net = tiny_cnn()
    activation, gradient = activation_and_gradient(net, depth)
    for method, own in ((pb.GradCAM(rectify), False), (pb.LayerCAM(rectify), True)):
        found = pb.explain(net, X, target=TARGET, site=str(depth), method=method).values
        assert largest(found, loop(activation, gradient, own, rectify)) < 1e-14
        assert own or rectify == (float(found.min()) >= 0)


class Tokens(nn.Module):
    """Patches as tokens (B, T, D), read out by their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 5).double()
        self.head = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)).mean(1))


def test_tokens_have_their_channels_last() -> None:
    net, x = Tokens(), example(2, 4, 8)
    point = pb.pose(net, x, target=0, site="embed")
    gradient = point.grad()
    assert isinstance(gradient, Tensor)
    assert isinstance(point.point, Tensor)
    found = pb.explain(
        net, x, target=0, site="embed", method=pb.GradCAM(rectify=False, channel_dim=-1)
    ).values
    assert found.shape == (2, 4, 1)
    for b in range(2):
        for t in range(4):
            expected = (gradient[b].mean(0) * point.point[b, t]).sum()
            assert float(abs(found[b, t, 0] - expected)) < 1e-15


@pytest.mark.parametrize("method", [pb.GradCAM(), pb.LayerCAM()])
def test_places_without_channels_are_refused_with_a_site_to_type(method: object) -> None:
    name = type(method).__name__
    with pytest.raises(
        MethodError, match=rf"{name} needs a layer's activations .* site 'input' .*Try site=\"4\""
    ):
        pb.explain(tiny_cnn(), X, target=0, method=method)
    with pytest.raises(MethodError, match=r"site '1' is \(2, 8\)\. Choose a layer with spatial dimensions"):
        pb.explain(tiny_mlp(), example(2, 6), target=0, site="1", method=method)
