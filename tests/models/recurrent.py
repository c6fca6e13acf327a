"""A recurrent net with everything that a recurrent net may have: layers, both directions, dropout between."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["RecurrentClassifier"]


class RecurrentClassifier(nn.Module):
    """``kind`` is nn.LSTM, nn.GRU or nn.RNN; (B, T, 3) -> (B, 2)."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.memory = kind(3, 4, num_layers=2, batch_first=True, bidirectional=True, dropout=0.2)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(x)[0][:, -1])  # type: ignore[no-any-return]
