"""Small smooth nets on series with known sources and seasons, and the time path integrated one node at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.attribution.domains import InDomain

BATCH, CHANNELS, LENGTH, PERIOD = 4, 3, 48, 12
EXACT = pb.IntegratedGradients(steps=64, quadrature="gausslegendre")


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def sources(length: int = LENGTH) -> Tensor:
    t = torch.arange(float(length), dtype=torch.float64)
    parts = [torch.sin(t * 1.7), torch.sign(torch.sin(t * 0.61)), draws(length)]
    return torch.stack([torch.stack([part.roll(7 * row) for part in parts]) for row in range(BATCH)])


MIXING = torch.tensor([[1.0, 0.4, 0.2], [0.3, -1.0, 0.5], [-0.6, 0.2, 2.0]], dtype=torch.float64)
MEAN = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)


def mixed(length: int = LENGTH) -> Tensor:
    return MIXING @ sources(length) + MEAN[:, None]


def seasons() -> Tensor:
    t = torch.arange(float(LENGTH), dtype=torch.float64)
    rows = [t / 20 * (row - 1) + torch.sin(2 * math.pi * t / PERIOD + row) for row in range(BATCH * CHANNELS)]
    return torch.stack(rows).reshape(BATCH, CHANNELS, LENGTH) + 0.3 * draws(BATCH, CHANNELS, LENGTH, seed=3)


def smooth_net(length: int = LENGTH) -> nn.Module:
    net = nn.Sequential(
        nn.Conv1d(CHANNELS, 5, 5, padding=2),
        nn.GELU(),
        nn.Conv1d(5, 4, 3),
        nn.SiLU(),
        nn.Flatten(),
        nn.LazyLinear(2),
    ).double()
    net(torch.zeros(1, CHANNELS, length, dtype=torch.float64))
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            parameter.copy_(draws(*parameter.shape, seed=number) / parameter[0].numel() ** 0.5)
    return net.eval()


def mean_gradient(net: nn.Module, x: Tensor, start: Tensor) -> Tensor:
    """∫ ∇f from start to x with 64 Gauss-Legendre nodes, one at a time."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    total = torch.zeros_like(x)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        z = (start + node * (x - start)).requires_grad_()
        total += weight * torch.autograd.grad(net(z)[:, 1].sum(), z)[0]
    return total


def change(net: nn.Module, x: Tensor, start: Tensor) -> Tensor:
    with torch.no_grad():
        return (net(x) - net(start))[:, 1]


def explained(
    domain: Any, x: Tensor, baseline: Tensor | None = None, net: nn.Module | None = None
) -> pb.Attribution:
    net = smooth_net(x.shape[-1]) if net is None else net
    return pb.explain(net, x, target=1, method=InDomain(domain, EXACT), baseline=baseline)
