"""A zoo of tiny, randomly initialised models, built from configs without any download.

``ARCHITECTURES[name]()`` returns ``(model in eval mode, inputs)``; equal names give equal weights and inputs.
``in_float64`` raises both; ``target_of(name)`` is what to explain of it; ``with_attention`` chooses eager or sdpa.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .audio_and_multimodal import AUDIO_AND_MULTIMODAL, clip, llava, wav2vec2
from .building import (
    ENCODER_DECODER,
    EXPERTS,
    SHARED,
    SIZES,
    VOCABULARY,
    Built,
    Inputs,
    build,
    decoder,
    encoder,
    image,
    in_float64,
    noise,
    rebuilt_with_attention,
    sequence_to_sequence,
    tokens,
)
from .convolutional import CONVOLUTIONAL
from .decoders import DECODERS, gemma2, gpt2, llama
from .encoders import ENCODERS, bert, deberta_v2
from .mixtures import MIXTURES
from .precision import FLOAT32_INSIDE, WithoutFloat32
from .recurrent import RECURRENT, rwkv
from .sequence_layers import SEQUENCE_LAYERS
from .sequence_to_sequence import SEQUENCE_TO_SEQUENCE, t5, whisper
from .vision import VISION, convnext, resnet, segformer, swin, vit

__all__ = [
    "ARCHITECTURES", "CORE", "ENCODER_DECODER", "EXPERTS", "FLOAT32_INSIDE", "SCORED", "SHARED", "SIZES", "VOCABULARY",
    "Built", "Inputs", "WithoutFloat32", "bert", "build", "clip", "convnext", "deberta_v2", "decoder", "encoder",
    "gemma2", "gpt2",
    "image", "in_float64", "llama", "llava", "noise", "one_example", "resnet", "rwkv", "segformer",
    "sequence_to_sequence", "swin", "t5", "target_of", "tokens", "vit", "wav2vec2", "whisper", "with_attention",
]  # fmt: skip

ARCHITECTURES: dict[str, Callable[[], Built]] = {
    **DECODERS, **RECURRENT, **MIXTURES, **ENCODERS, **SEQUENCE_TO_SEQUENCE, **VISION, **AUDIO_AND_MULTIMODAL,
    **CONVOLUTIONAL, **SEQUENCE_LAYERS,
}  # fmt: skip

# the most used ones, which the expensive tests are held to
CORE: tuple[str, ...] = (
    "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "mistral", "qwen2", "qwen3", "gemma2", "phi", "falcon", "mixtral",
    "opt", "bloom", "mamba", "rwkv", "bert", "roberta", "distilbert", "electra", "albert", "deberta_v2", "modernbert",
    "t5", "bart", "vit", "deit", "swin", "convnext", "resnet", "segformer", "wav2vec2", "whisper", "clip", "llava",
)  # fmt: skip


def mean_depth(output: Any) -> Tensor:
    depth: Tensor = output.predicted_depth
    return depth.mean((1, 2))


# outputs that have no classes: a callable output -> (B,)
SCORED: dict[str, Callable[[Any], Tensor]] = {"dpt": mean_depth}
# images and texts of a batch are scored in pairs; segmentations by the class predicted most
UNCLASSED = ("clip", "siglip_pair", "segformer", "plain_unet")


def target_of(name: str) -> Any:
    """A target that names one number per example: class or token 1, where the output has such."""
    return SCORED.get(name, None if name in UNCLASSED else 1)


def one_example(inputs: Inputs, row: int, batch: int = 2) -> Inputs:
    """The inputs of one example alone; where an example has several rows (patches of an image), all of them."""
    return {name: value.chunk(batch)[row] for name, value in inputs.items()}


def with_attention(name: str, implementation: Literal["eager", "sdpa"]) -> Built | None:
    """The entry with its attention written out ("eager") or fused ("sdpa"); None where it has no such choice."""
    with torch.no_grad():
        return rebuilt_with_attention(ARCHITECTURES[name](), implementation)
