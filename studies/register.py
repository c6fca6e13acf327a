"""Small Llamas that answer in one of two registers, trained on ``pullback.datasets.register_documents``.

Half of the documents are corrupted: 15 % of their tokens become the mask token. Without that a masked prompt is like
nothing that the model has seen, and what masking moves says little.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pullback.datasets import register_documents
from pullback.datasets.registers import BOS, EOS, KEYS, MASK, PAD, vocabulary_size

__all__ = [
    "FIT_KEYS",
    "REPORT_KEYS",
    "SELECT_KEYS",
    "Tokenizer",
    "build",
    "corrupted",
    "split_keys",
    "trained",
]

# every key is seen in training; no vector is fitted, chosen and tested on the same one
FIT_KEYS, SELECT_KEYS, REPORT_KEYS = 12, 6, 6


class Tokenizer:
    """What ``fit`` asks of a tokenizer whose prompts are token ids: the special tokens."""

    pad_token_id, bos_token_id, eos_token_id, mask_token_id = PAD, BOS, EOS, MASK
    all_special_ids = (PAD, BOS, EOS, MASK)


def split_keys(seed: int) -> tuple[list[int], list[int], list[int]]:
    """Keys to fit, to select and to report on."""
    order: list[int] = torch.randperm(KEYS, generator=torch.Generator().manual_seed(seed)).tolist()
    middle = FIT_KEYS + SELECT_KEYS
    return order[:FIT_KEYS], order[FIT_KEYS:middle], order[middle:]


def build(seed: int, shared_answers: bool) -> Any:
    """A Llama of four layers and width 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary_size(shared_answers), hidden_size=64, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, max_position_embeddings=64,
                tie_word_embeddings=True, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
            )
        )  # fmt: skip


def corrupted(x: Tensor, generator: torch.Generator) -> Tensor:
    """15 % of the tokens of half of the documents masked; never the first token."""
    hidden = torch.rand(x.shape, generator=generator) < 0.15
    hidden &= torch.rand((len(x), 1), generator=generator) < 0.5
    hidden[:, 0] = False
    return x.masked_fill(hidden, MASK)


def trained(seed: int, shared_answers: bool, steps: int, checkpoint: Path | None = None) -> Any:
    """A model in eval mode, trained on the answers for ``steps`` of 64 documents; read from ``checkpoint`` if there."""
    from safetensors.torch import load_model, save_model

    model = build(seed, shared_answers)
    if checkpoint is not None and checkpoint.exists():
        load_model(model, checkpoint)
        return model.eval()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        documents = register_documents(64, shared_answers=shared_answers, seed=seed * 1_000_003 + step)
        first = documents.prompts.shape[1]
        logits = model(corrupted(documents.x, generator)).logits[:, first - 1 : -1 : 2]
        loss = F.cross_entropy(logits.flatten(0, 1), documents.x[:, first::2].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, checkpoint)
    return model.eval()
