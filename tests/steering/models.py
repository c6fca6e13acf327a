"""Tiny models with random steering vectors, and what leaves their blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pullback.steering import SteeringVector, find_blocks
from tests.zoo.architectures import ARCHITECTURES, in_float64
from tests.zoo.architectures.audio_and_multimodal import image_before_text
from tests.zoo.architectures.building import SHARED, SIZES, Built, build, noise

DECODERS = (
    "llama",
    "gpt2",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon",
    "gemma3",
    "qwen3",
    "mixtral",
    "mamba",
    "jamba",
    "rwkv",
)
OTHERS = ("t5", "bart", "llava", "qwen2_vl", "qwen2_5_vl")


def qwen2_5_vl() -> Built:
    """As the zoo's Qwen2-VL, but the first vision block looks through windows of 2 x 2 merged patches."""
    ids = image_before_text()
    return build(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
        {
            "input_ids": ids, "pixel_values": noise(2 * 16, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": (ids == 3).long(),
        },
        text_config={
            **SIZES, **SHARED, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "patch_size": 4,
            "intermediate_size": 64, "window_size": 16, "fullatt_block_indexes": [1],
        },
        image_token_id=3, video_token_id=0, vision_start_token_id=1, vision_end_token_id=2,
    )  # fmt: skip


def built(name: str, double: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = qwen2_5_vl() if name == "qwen2_5_vl" else ARCHITECTURES[name]()
    return in_float64((model, inputs)) if double else (model, inputs)


def random_vector(
    model: nn.Module | None, layers: Sequence[int] = (0, 1), seed: int = 0, width: int = 32
) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    moves = {layer: 3.0 * torch.randn(width, generator=generator) for layer in layers}
    return SteeringVector.from_displacements(moves, model, method="random", settings={"seed": seed})


def block_outputs(model: nn.Module, **inputs: Any) -> list[Tensor]:
    """The hidden states that leave the blocks in one pass, by hooks that come after those of steering."""
    found: dict[int, Tensor] = {}

    def reader(layer: int) -> Any:
        def read(module: nn.Module, args: Any, output: Any) -> None:
            found[layer] = (output if isinstance(output, Tensor) else output[0]).detach().clone()

        return read

    blocks = find_blocks(model).modules
    handles = [block.register_forward_hook(reader(layer)) for layer, block in enumerate(blocks)]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [found[layer] for layer in range(len(blocks))]


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._forward_hooks_with_kwargs)
        for module in model.modules()
    )


def generated(model: nn.Module, inputs: dict[str, Any], tokens: int = 6, **settings: Any) -> Tensor:
    """The new tokens. The weights are random, so that the end token comes up by chance: it is forbidden, as is 3, the image."""
    given: dict[str, Any] = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "suppress_tokens": [3],
        **settings,
    }
    with torch.no_grad():
        out: Tensor = model.generate(**inputs, **given)  # type: ignore[operator]
    return (
        out if getattr(model.config, "is_encoder_decoder", False) else out[:, inputs["input_ids"].shape[1] :]
    )


def logits_of_generation(model: nn.Module, inputs: dict[str, Any], **settings: Any) -> Tensor:
    """The logits (token, batch, vocabulary) from which six tokens are generated."""
    with torch.no_grad():
        out = model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, suppress_tokens=[3], output_logits=True,
            return_dict_in_generate=True, **settings,
        )  # fmt: skip
    return torch.stack(out.logits)
