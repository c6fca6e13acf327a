"""Small nets with the habits that break attribution tools; each builder gives a model in eval mode and inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

Built = tuple[nn.Module, Any]


def vectors(batch: int = 3, size: int = 6) -> Tensor:
    return torch.randn(batch, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Written(nn.Module):
    """A net whose forward is given as a function of itself and x."""

    def __init__(self, forward: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def linear(inputs: int = 6, outputs: int = 4) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def in_place_relu() -> Built:
    return nn.Sequential(nn.ReLU(inplace=True), linear(6, 8), nn.ReLU(inplace=True), linear(8, 4)), vectors()


def in_place_first() -> Built:
    def forward(self: Any, x: Tensor) -> Tensor:
        x *= 2
        x[:, 0] = 0
        return functional.relu_(self.first(x))

    return Written(forward, first=linear()), vectors()


def reused_module() -> Built:
    act, same = nn.Tanh(), linear(6, 6)
    return nn.Sequential(same, act, same, act, linear()), vectors()


def functional_relu() -> Built:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.second(functional.relu(self.first(x)))

    return Written(forward, first=linear(6, 8), second=linear(8, 4)), vectors()


def frozen() -> Built:
    net = nn.Sequential(linear(6, 8), nn.GELU(), linear(8, 4))
    net[0].requires_grad_(False)
    return net, vectors()


def hooked() -> Built:
    net = nn.Sequential(linear(6, 8), nn.Tanh(), linear(8, 4))
    seen: list[int] = []
    net[0].register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    net[1].register_forward_hook(lambda module, args, output: output + 0.1)
    net[2].register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(1))
    net[2].register_full_backward_pre_hook(lambda module, grad_out: seen.append(1))
    return net, vectors()


def batch_norm() -> Built:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), linear(48, 4))
    nn.init.normal_(net[1].running_mean)
    return net, images()


def lstm() -> Built:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.cells(x.flatten(2).transpose(1, 2))[0][:, -1])

    return Written(forward, cells=nn.LSTM(2, 5, num_layers=2, batch_first=True), head=linear(5, 4)), images()


def weight_norm() -> Built:
    return nn.Sequential(parametrizations.weight_norm(linear(6, 8)), nn.Tanh(), linear(8, 4)), vectors()


def spectral_norm() -> Built:
    return nn.Sequential(parametrizations.spectral_norm(linear(6, 8)), nn.Tanh(), linear(8, 4)), vectors()


def tied() -> Built:
    net = nn.Sequential(linear(6, 6), nn.Tanh(), linear(6, 6))
    net[2].weight = net[0].weight
    return net, vectors()


def non_contiguous() -> Built:
    return nn.Sequential(linear(6, 8), nn.Tanh(), linear(8, 4)), vectors(6, 3).T


def channels_last() -> Built:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), linear(48, 4))
    return net.to(memory_format=torch.channels_last), images().to(memory_format=torch.channels_last)


def counting_buffer() -> Built:
    """Writes into a buffer at every forward; the value does not enter the output."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.count += 1
        self.mean.mul_(0.9).add_(x.detach().mean(), alpha=0.1)
        return self.first(x)

    return Written(forward, first=linear(), count=torch.zeros(()), mean=torch.zeros(())), vectors()


def attribute_writer() -> Built:
    """Keeps its last activation, a list of norms and a call count on itself."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.last = self.first(x)
        self.norms.append(1)
        self.calls += 1
        self.table["calls"] = self.calls
        return self.last.tanh()

    net = Written(forward, first=linear())
    vars(net).update(norms=[], calls=0, table={})
    return net, vectors()


def parameter_assigner() -> Built:
    """Replaces its parameter's data and registers new buffers in the forward."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.first.weight.data = self.first.weight.data * 1.0
        self.register_buffer("late", x.detach().mean())
        return self.first(x)

    return Written(forward, first=linear()), vectors()


def mode_switcher() -> Built:
    """Switches modes, grads and hooks of its parts in the forward."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.first.train()
        self.first.requires_grad_(False)
        handle = self.first.register_forward_hook(lambda module, args, output: output * 2)
        try:
            return self.first(x)
        finally:
            handle.remove()
            self.first.eval()

    return Written(forward, first=linear()), vectors()


NETS: dict[str, Callable[[], Built]] = {
    build.__name__: build
    for build in (
        in_place_relu, in_place_first, reused_module, functional_relu, frozen, hooked, batch_norm, lstm, weight_norm,
        spectral_norm, tied, non_contiguous, channels_last, counting_buffer, attribute_writer, parameter_assigner,
        mode_switcher,
    )
}  # fmt: skip


def built(name: str, dtype: torch.dtype = torch.float64) -> Built:
    """The net of this name with fixed weights, in eval mode, and its inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, inputs = NETS[name]()
    return net.to(dtype).eval(), inputs.to(dtype)
