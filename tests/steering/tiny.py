"""A tiny Llama in float64, a vector that is known to steer it, and questions about it."""

from __future__ import annotations

from typing import Any

import torch

from pullback.steering import Pair, Question, SteeringVector

GOOD, BAD = 8, 9


def llama(seed: int = 0, layers: int = 3, positions: int = 64) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=positions, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
        )  # fmt: skip
        return LlamaForCausalLM(config).double().eval()


def prompts(count: int, seed: int, length: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(3, 30, (count, length), generator=generator).tolist()
    return [[1, *row[: 2 + number % (length - 1)]] for number, row in enumerate(found)]


def pairs(count: int, seed: int) -> list[Pair]:
    return [Pair(prompt, GOOD, BAD) for prompt in prompts(count, seed)]


def questions(seed: int = 5) -> list[Question]:
    """Answers of different numbers and lengths."""
    first, second, third = prompts(3, seed)
    return [
        Question(first, [[8, 4, 5], 7], [[9, 4], [9, 4, 6], [10]]),
        Question(second, [[11]], [[12, 13, 14, 15]], best=0),
        Question(third, [[8], [8, 9], [8, 9, 10]], [[9, 8]], best=2),
    ]


def towards(model: Any, layer: int = -1, sign: float = 1.0) -> SteeringVector:
    """From the unembedding of BAD to that of GOOD, through the final norm's weights: in the last block the margin of
    every prompt grows with it."""
    weights = model.lm_head.weight.detach()
    count = model.config.num_hidden_layers
    move = sign * (weights[GOOD] - weights[BAD]) * model.model.norm.weight.detach()
    return SteeringVector.from_displacements({layer % count: move}, model, method="given")
