"""The gradient of an eval-mode batch norm does not depend on the layout in which its own gradient comes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from tests.single_input import only


class Tokens(nn.Module):
    """Batch norm before a permutation to tokens, as in LeViT and CvT."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        kind = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dimensions]
        self.norm = kind(4)
        self.read = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        return torch.tanh(self.read(tokens)).sum(1)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_one_example_equals_the_same_in_a_batch(dimensions: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Tokens(dimensions).double().eval()
        x = torch.randn(2, 4, *[3] * dimensions, dtype=torch.float64)
        net.norm.running_var.uniform_(0.5, 2)
    batch = only(pb.explain(net, x, target=1, method="gradient"))
    for row in range(2):
        alone = only(pb.explain(net, x[row : row + 1], target=1, method="gradient"))
        torch.testing.assert_close(alone[0], batch[row], rtol=0, atol=1e-14)
    one, step = x[:1], 1e-6 * torch.ones_like(x[:1])
    slope = (net(one + step) - net(one - step))[0, 1] / 2e-6
    assert only(pb.explain(net, one, target=1, method="gradient")).sum().item() == pytest.approx(
        slope.item(), rel=1e-7
    )


def test_channels_last_weights_after_a_batch_norm() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.LazyLinear(2)).eval()
        x = torch.randn(2, 4, 6, 6)
    net(x)
    net[1].to(memory_format=torch.channels_last)
    batch = only(pb.explain(net, x, target=1, method="gradient"))
    alone = only(pb.explain(net, x[:1], target=1, method="gradient"))
    torch.testing.assert_close(alone[0], batch[0], rtol=1e-5, atol=1e-6)


class Functional(nn.Module):
    """Batch norm called as a function, with and without a module of the kind beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, 1.5, 1.0, 2.0], dtype=torch.float64))
        self.read = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = 0.1 * self.scale, self.scale
        tokens = nn.functional.batch_norm(x, mean, variance, self.scale, mean).flatten(2).transpose(1, 2)
        return torch.tanh(self.read(tokens)).sum(1)


@pytest.mark.parametrize("method", ["gradient", "lrp", "fullgrad"])
@pytest.mark.parametrize("budget", [None, "1GB"])
def test_a_functional_batch_norm_is_guarded_too(method: str, budget: str | None) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x = Functional(), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    batch = only(pb.explain(net, x, target=1, method=method, chunk=2))
    for row in range(2):
        alone = only(pb.explain(net, x[row : row + 1], target=1, method=method, memory_budget=budget))
        torch.testing.assert_close(alone[0], batch[row], rtol=0, atol=1e-13)
