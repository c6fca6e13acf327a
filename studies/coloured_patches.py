"""Small LLaVAs that answer from an image or from words, trained on ``pullback.datasets.coloured_patches``.

As in ``studies.register``, half of the documents are corrupted: 15 % of their words become the mask token, 15 % of
their patches the image's mean colour, which is near what masking puts in their place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pullback.datasets import PatchDocuments, coloured_patches
from pullback.datasets.coloured_patches import GRID, IMAGE, PATCHES, SIDE, VOCABULARY
from pullback.datasets.registers import BOS, EOS, MASK, PAD

__all__ = ["build", "corrupted", "trained"]


def build(seed: int) -> Any:
    """A CLIP tower of two layers over sixteen patches, and a Llama of four layers and width 64."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(
            LlavaConfig(
                text_config={
                    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 4,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
                    "max_position_embeddings": 64, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
                },
                vision_config={
                    "model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "intermediate_size": 64, "image_size": GRID * SIDE, "patch_size": SIDE,
                    "projection_dim": 32,
                },
                image_token_index=IMAGE, image_seq_length=PATCHES, vision_feature_layer=-1,
            )
        )  # fmt: skip


def corrupted(documents: PatchDocuments, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and pixels, of half of the documents 15 % masked."""
    x, pixels = documents.x, documents.pixels
    touched = torch.rand((len(x), 1), generator=generator) < 0.5
    hidden = (torch.rand(x.shape, generator=generator) < 0.15) & touched
    patches = hidden[:, 1 : 1 + PATCHES].reshape(-1, 1, GRID, GRID)
    patches = patches.repeat_interleave(SIDE, 2).repeat_interleave(SIDE, 3)
    hidden[:, : 1 + PATCHES] = False
    return x.masked_fill(hidden, MASK), torch.where(patches, pixels.mean((2, 3), keepdim=True), pixels)


def trained(seed: int, steps: int, checkpoint: Path | None = None) -> Any:
    """A model in eval mode, trained on the answers for ``steps`` of 64 documents; read from ``checkpoint`` if there."""
    from safetensors.torch import load_model, save_model

    model = build(seed)
    if checkpoint is not None and checkpoint.exists():
        load_model(model, checkpoint)
        return model.eval()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        documents = coloured_patches(64, seed=seed * 1_000_003 + step)
        first = documents.prompts.shape[1]
        x, pixels = corrupted(documents, generator)
        logits = model(input_ids=x, pixel_values=pixels).logits[:, first - 1 : -1 : 3]
        loss = F.cross_entropy(logits.flatten(0, 1), documents.x[:, first::3].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, checkpoint)
    return model.eval()
