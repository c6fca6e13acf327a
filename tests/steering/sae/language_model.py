"""A language model small enough to differentiate by hand, whose parts count what they do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WORDS, WIDTH = 20, 8


TOKENS_AT_HEAD: list[int] = []  # of each call, also on a copy of the model


class Head(nn.Linear):
    """Output embeddings that count the tokens they see at once."""

    def forward(self, hidden: Tensor) -> Tensor:
        TOKENS_AT_HEAD.append(hidden.shape[:-1].numel())
        return super().forward(hidden)


class LanguageModel(nn.Module):
    """Embeddings, two causal layers, and logits; ``softcap`` after the head makes it no head by itself."""

    def __init__(self, softcap: float | None = None, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embeddings = nn.Embedding(WORDS, WIDTH)
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.head = Head(WIDTH, WORDS)
        self.softcap = softcap
        self.eval()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def below(self, input_ids: Tensor) -> Tensor:
        embedded = self.embeddings(input_ids)
        return self.first(embedded.cumsum(1).tanh())

    def above(self, hidden: Tensor) -> Tensor:
        logits = self.head(4 * (hidden + self.second(hidden.cumsum(1).tanh())))
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.above(self.below(input_ids))


def batches(count: int = 10, examples: int = 6, length: int = 9, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, WORDS, (examples, length), generator=generator) for _ in range(count)]
