"""Networks of our own in the manner of torchvision: each has a trait that trips up explanations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .building import CLASSES, IMAGES, Built, of_module

__all__ = ["CONVOLUTIONAL"]


def normed(
    inside: int, outside: int, kernel: int = 3, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Sequential:
    """Convolution and batch norm that keep the size up to the stride."""
    padding = dilation * (kernel // 2)
    convolution = nn.Conv2d(inside, outside, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside))


def pooled(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class Residual(nn.Module):
    """One ReLU module for both places, in place, after an addition in place."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.first, self.second = normed(inside, outside, 3, stride), normed(outside, outside)
        self.shortcut = normed(inside, outside, 1, stride) if stride > 1 else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.second(self.relu(self.first(input)))
        out += self.shortcut(input)
        return self.relu(out)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = normed(3, 8)
        self.layers = nn.Sequential(Residual(8, 8), Residual(8, 16, 2))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        out = self.layers(F.max_pool2d(F.relu(self.stem(input), inplace=True), 3, 2, 1))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(out, 1), 1))  # type: ignore[no-any-return]


class Dense(nn.Module):
    """Each layer reads the concatenation of all before it."""

    def __init__(self, layers: int, inside: int, growth: int) -> None:
        super().__init__()
        widths = [inside + layer * growth for layer in range(layers)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(True), nn.Conv2d(width, growth, 3, padding=1))
            for width in widths
        )

    def forward(self, input: Tensor) -> Tensor:
        features = [input]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Branches(nn.Module):
    """Branches of several kernel sizes and a pool side by side; activations as functions."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.narrow, self.wide = normed(inside, width, 1), normed(inside, width, 3)
        self.dilated, self.after_pool = normed(inside, width, 3, dilation=2), normed(inside, width, 1)

    def forward(self, input: Tensor) -> Tensor:
        pool = F.max_pool2d(input, 3, stride=1, padding=1)
        parts = (self.narrow(input), self.wide(input), self.dilated(input), self.after_pool(pool))
        return torch.cat([F.relu(part) for part in parts], 1)


class GoogLeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 5, 2, 2), nn.LocalResponseNorm(3)
        self.first, self.second = Branches(8, 4), Branches(16, 4)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        out = self.norm(F.max_pool2d(F.relu(self.stem(input)), 3, 2, ceil_mode=True))
        return self.head(self.second(self.first(out)).mean((2, 3)))  # type: ignore[no-any-return]


class Inception(nn.Module):
    """The auxiliary head speaks in training only, and the output then is a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = normed(3, 8, 3, 2)
        self.first, self.second = Branches(8, 4), Branches(16, 4)
        self.head, self.auxiliary = pooled(16), pooled(16)

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        middle = self.first(F.avg_pool2d(F.relu(self.stem(input)), 3, 2, 1, count_include_pad=False))
        out: Tensor = self.head(self.second(middle))
        return (out, self.auxiliary(middle)) if self.training else out


class SqueezeExcite(nn.Module):
    """Channels scaled by a gate that reads all positions."""

    def __init__(self, channels: int, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)
        self.gate = gate

    def forward(self, input: Tensor) -> Tensor:
        mean = F.adaptive_avg_pool2d(input, 1)
        return input * self.gate(self.up(F.relu(self.down(mean), inplace=True)))


class Inverted(nn.Module):
    """Wide depthwise convolution between narrow ends, with a shortcut."""

    def __init__(
        self, channels: int, activation: Callable[[], nn.Module], gate: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        wide = 2 * channels
        self.block = nn.Sequential(
            normed(channels, wide, 1), activation(), normed(wide, wide, 5, groups=wide), activation(),
            SqueezeExcite(wide, gate), normed(wide, channels, 1),
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        return input + self.block(input)  # type: ignore[no-any-return]


class Shuffle(nn.Module):
    """Half of the channels pass by; the two halves are then shuffled into each other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            normed(half, half, 1),
            nn.ReLU(True),
            normed(half, half, 3, groups=half),
            normed(half, half, 1),
            nn.ReLU(True),
        )

    def forward(self, input: Tensor) -> Tensor:
        kept, changed = input.chunk(2, 1)
        out = torch.cat([kept, self.branch(changed)], 1)
        return out.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)  # type: ignore[no-any-return]


class Fire(nn.Module):
    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inside, width, 1)
        self.narrow, self.wide = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        out = F.relu(self.squeeze(input))
        return torch.cat([F.relu(self.narrow(out)), F.relu(self.wide(out))], 1)


class UNet(nn.Module):
    """A class for every pixel: down, up by interpolation and by transposed convolution, with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner, self.bottom = normed(3, 8), normed(8, 16), normed(16, 16)
        self.up = nn.ConvTranspose2d(32, 8, 2, 2)
        self.head = nn.Conv2d(16, CLASSES, 1)

    def forward(self, input: Tensor) -> Tensor:
        outer = F.leaky_relu(self.outer(input), 0.1)
        inner = F.leaky_relu(self.inner(F.max_pool2d(outer, 2)), 0.1)
        bottom = F.relu(self.bottom(F.avg_pool2d(inner, 2)))
        back = F.interpolate(bottom, size=inner.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(torch.cat([self.up(torch.cat([back, inner], 1)), outer], 1))  # type: ignore[no-any-return]


def inverted_net(activation: Callable[[], nn.Module], gate: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(
        normed(3, 8, 3, 2),
        activation(),
        Inverted(8, activation, gate),
        Inverted(8, activation, gate),
        pooled(8),
    )


CONVOLUTIONAL: dict[str, Callable[[], Built]] = {
    "plain_vgg": lambda: of_module(lambda: nn.Sequential(
        normed(3, 8), nn.ReLU(True), normed(8, 8), nn.ReLU(True), nn.MaxPool2d(2, 2), normed(8, 16), nn.ReLU(True),
        nn.MaxPool2d(2, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 24), nn.ReLU(True), nn.Dropout(),
        nn.Linear(24, CLASSES),
    ), *IMAGES),
    "plain_resnet": lambda: of_module(ResNet, *IMAGES),
    "plain_densenet": lambda: of_module(lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), Dense(3, 8, 4), nn.BatchNorm2d(20), nn.ReLU(True), nn.Conv2d(20, 8, 1), nn.AvgPool2d(2),
        Dense(2, 8, 4), pooled(16),
    ), *IMAGES),
    "plain_inception": lambda: of_module(Inception, *IMAGES),
    "plain_googlenet": lambda: of_module(GoogLeNet, *IMAGES),
    "plain_mobilenet_v3": lambda: of_module(lambda: inverted_net(nn.Hardswish, F.hardsigmoid), *IMAGES),
    "plain_efficientnet": lambda: of_module(lambda: inverted_net(partial(nn.SiLU, True), torch.sigmoid), *IMAGES),
    "plain_squeezenet": lambda: of_module(lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(True), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(8, 4), Fire(8, 4),
        nn.AvgPool2d(3, 2, ceil_mode=True), nn.Conv2d(8, CLASSES, 1), nn.ReLU(True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ), *IMAGES),
    "plain_shufflenet": lambda: of_module(
        lambda: nn.Sequential(normed(3, 16, 3, 2), nn.ReLU(True), Shuffle(16), Shuffle(16), pooled(16)), *IMAGES),
    "plain_unet": lambda: of_module(UNet, *IMAGES),
    "gated_convolution": lambda: of_module(lambda: nn.Sequential(
        nn.Conv1d(2, 16, 5, padding=2), nn.GLU(1), nn.Conv1d(8, 32, 3, padding=2, dilation=2), nn.GLU(1), nn.InstanceNorm1d(16),
        nn.AdaptiveMaxPool1d(2), nn.Flatten(), nn.Linear(32, CLASSES),
    ), 2, 2, 24),
    "convolution_1d": lambda: of_module(lambda: nn.Sequential(
        nn.Conv1d(2, 8, 5, 2, 2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 16, 3, padding="same"),
        nn.GroupNorm(4, 16), nn.Mish(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    ), 2, 2, 24),
    "convolution_3d": lambda: of_module(lambda: nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.PReLU(4), nn.MaxPool3d(2), nn.Conv3d(4, 8, 3), nn.Softplus(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, CLASSES),
    ), 2, 1, 8, 8, 8),
}  # fmt: skip
