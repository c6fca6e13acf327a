"""The net and input behind the golden arrays, by their filling rule; tests/golden/README.md says what the arrays are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden" / "smoothgrad_ig_captum.npz"


def fill(net: nn.Module) -> nn.Module:
    """Parameters from sines by tensor number and flat index, batch norms from cosines; float64, eval."""
    net.double()
    with torch.no_grad():
        for number, (_, parameter) in enumerate(net.named_parameters()):
            k = torch.arange(parameter.numel(), dtype=torch.float64)
            fan = parameter[0].numel() if parameter.dim() > 1 else 4
            values = torch.sin(0.7 * k + 1.3 * number + 0.5) / fan**0.5
            parameter.copy_(values.reshape(parameter.shape))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                k = torch.arange(module.num_features, dtype=torch.float64)
                module.weight.copy_(1 + 0.2 * torch.sin(k))
                module.bias.copy_(0.1 * torch.cos(k))
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(0.1 * torch.cos(2 * k))
                module.running_var.copy_(1 + 0.3 * torch.sin(k + 1))
    return net.eval()


def tiny_cnn() -> nn.Sequential:
    """3→4→5 convolutions with batch norm and ReLU, pooled to three classes; 328 parameters."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )
    fill(net)
    return net


class TinySeries(nn.Module):
    """Two channels of a signal to three classes: convolution, tanh, convolution, GELU, square, mean over time."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv1d(2, 4, 5, padding=2)
        self.d = nn.Conv1d(4, 4, 3, padding=1)
        self.l = nn.Linear(4, 3)
        fill(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.l(nn.functional.gelu(self.d(self.c(x).tanh())).square().mean(-1))
        return out


def series(length: int = 16) -> tuple[Tensor, Tensor]:
    """A signal with two channels and its baseline, (1, 2, length) each."""
    k = torch.arange(length, dtype=torch.float64)
    first = (2 * torch.pi * 2 * k / 16).cos() + 0.5 * (2 * torch.pi * 5 * k / 16 + 0.3).sin() + 0.2
    return torch.stack([first, (0.9 * k).sin()])[None], (0.1 * k.cos()).expand(1, 2, length).clone()


def tiny_mlp() -> nn.Sequential:
    """A smooth net, 6→8→8→3 with GELU, layer norm and SiLU."""
    net = nn.Sequential(
        nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 3)
    )
    fill(net)
    return net


def example(*shape: int) -> Tensor:
    """cos(0.37 k + 0.1 (k mod 11)) over the flat index k."""
    k = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return torch.cos(0.37 * k + 0.1 * (k % 11)).reshape(shape)


def golden() -> dict[str, Tensor]:
    """The committed arrays as tensors."""
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def largest(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference, shapes required equal."""
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())
