"""Networks of torch.nn's own recurrent, attention and mixing layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .building import CLASSES, IMAGES, VOCABULARY, Built, of_module, seeded, tokens

__all__ = ["SEQUENCE_LAYERS"]


class Recurrent(nn.Module):
    """The last state of both directions of a fused recurrent layer."""

    def __init__(self, first: nn.Module, layer: nn.LSTM | nn.GRU) -> None:
        super().__init__()
        self.first, self.layer, self.head = first, layer, nn.Linear(2 * layer.hidden_size, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        out, _ = self.layer(self.first(input))
        forward, backward = out.chunk(2, -1)
        return self.head(torch.cat([forward[:, -1], backward[:, 0]], 1))  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """nn.MultiheadAttention over positions; a class token is its query."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True, add_bias_kv=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        patches = self.patches(input).flatten(2).transpose(1, 2)
        found, _ = self.attention(self.token.expand(len(input), -1, -1), patches, patches)
        return self.head(found[:, 0])  # type: ignore[no-any-return]


class Mixer(nn.Module):
    """An MLP over positions, then one over channels."""

    def __init__(self, positions: int, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.over_positions = nn.Sequential(nn.Linear(positions, 24), nn.SELU(), nn.Linear(24, positions))
        self.over_channels = nn.Sequential(nn.Linear(channels, 24), nn.ELU(), nn.Linear(24, channels))

    def forward(self, input: Tensor) -> Tensor:
        out = input + self.over_positions(self.norms[0](input).transpose(1, 2)).transpose(1, 2)
        return out + self.over_channels(self.norms[1](out))  # type: ignore[no-any-return]


class Patches(nn.Module):
    """Patches of an image as a sequence through some layers, averaged and classified."""

    def __init__(self, width: int, *layers: nn.Module) -> None:
        super().__init__()
        self.patches, self.layers = nn.Conv2d(3, width, 8, 8), nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.patches(input).flatten(2).transpose(1, 2))).mean(1))  # type: ignore[no-any-return]


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=True, activation="gelu")
    return Patches(16, nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def lstm_on_tokens() -> Built:
    lstm = partial(nn.LSTM, 16, 12, num_layers=2, batch_first=True, bidirectional=True)
    return seeded(lambda: Recurrent(nn.Embedding(VOCABULARY, 16), lstm()), {"input": tokens()})


SEQUENCE_LAYERS: dict[str, Callable[[], Built]] = {
    "lstm": lstm_on_tokens,
    "gru": lambda: of_module(
        lambda: Recurrent(nn.Linear(3, 16), nn.GRU(16, 12, batch_first=True, bidirectional=True)), 2, 9, 3),
    "transformer_encoder": lambda: of_module(transformer, *IMAGES),
    "multihead_attention": lambda: of_module(SelfAttention, *IMAGES),
    "mixer": lambda: of_module(lambda: Patches(16, Mixer(16, 16), Mixer(16, 16)), *IMAGES),
}  # fmt: skip
