"""Sound, video, time series, and models that read images together with text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .building import SHARED, SIZES, VOCABULARY, Built, Inputs, build, noise, tokens

__all__ = ["AUDIO_AND_MULTIMODAL"]

SOUND: dict[str, Any] = {
    **SIZES, "vocab_size": VOCABULARY, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16, "num_labels": 3,
}  # fmt: skip
PATCHES: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}
TEXT: dict[str, Any] = {**SIZES, **SHARED, "max_position_embeddings": 16}


def sound() -> Inputs:
    return {"input_values": noise(2, 800)}


def image_and_text() -> Inputs:
    return {"input_ids": tokens(), "pixel_values": noise(2, 3, 32, 32)}


def image_before_text(image_tokens: int = 4) -> torch.Tensor:
    """Image token 3 stands several times before the text, once per patch."""
    return torch.cat([torch.full((2, image_tokens), 3), tokens().clamp(min=4)], 1)


def wav2vec2() -> Built:
    return build("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", sound(), **SOUND)


def hubert() -> Built:
    return build(
        "HubertForSequenceClassification", "HubertConfig", sound(), **SOUND, feat_extract_norm="layer"
    )


def wavlm() -> Built:
    """Attention with a gated relative position bias."""
    return build("WavLMForSequenceClassification", "WavLMConfig", sound(), **SOUND)


def unispeech_sat() -> Built:
    return build("UniSpeechSatForSequenceClassification", "UniSpeechSatConfig", sound(), **SOUND)


def sew() -> Built:
    """Halves the sequence before attention and doubles it after."""
    return build("SEWForSequenceClassification", "SEWConfig", sound(), **SOUND, squeeze_factor=2)


def ast() -> Built:
    return build(
        "ASTForAudioClassification", "ASTConfig", {"input_values": noise(2, 24, 16)}, **SIZES, patch_size=8,
        frequency_stride=4, time_stride=4, max_length=24, num_mel_bins=16, num_labels=3,
    )  # fmt: skip


def timesformer() -> Built:
    return build(
        "TimesformerForVideoClassification", "TimesformerConfig", {"pixel_values": noise(2, 2, 3, 16, 16)}, **SIZES,
        image_size=16, patch_size=8, num_frames=2, num_labels=3,
    )  # fmt: skip


def videomae() -> Built:
    return build(
        "VideoMAEForVideoClassification", "VideoMAEConfig", {"pixel_values": noise(2, 4, 3, 16, 16)}, **SIZES,
        image_size=16, patch_size=8, num_frames=4, tubelet_size=2, num_labels=3,
    )  # fmt: skip


def patchtst() -> Built:
    return build(
        "PatchTSTForClassification", "PatchTSTConfig", {"past_values": noise(2, 16, 2)}, num_input_channels=2,
        context_length=16, patch_length=4, patch_stride=4, num_hidden_layers=2, d_model=32, ffn_dim=48, num_targets=3,
        use_cls_token=True,
    )  # fmt: skip


def patchtsmixer() -> Built:
    return build(
        "PatchTSMixerForTimeSeriesClassification", "PatchTSMixerConfig", {"past_values": noise(2, 16, 2)},
        num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, num_layers=2, d_model=16,
        num_targets=3,
    )  # fmt: skip


def clip() -> Built:
    return build(
        "CLIPModel",
        "CLIPConfig",
        image_and_text(),
        text_config=TEXT,
        vision_config=PATCHES,
        projection_dim=16,
    )


def siglip_pair() -> Built:
    return build("SiglipModel", "SiglipConfig", image_and_text(), text_config=TEXT, vision_config=PATCHES)


def git() -> Built:
    """The patches stand before the words that are written about them."""
    return build("GitForCausalLM", "GitConfig", image_and_text(), **TEXT, vision_config=PATCHES)


def blip() -> Built:
    return build(
        "BlipForConditionalGeneration", "BlipConfig", image_and_text(),
        text_config={**TEXT, "encoder_hidden_size": 32}, vision_config=PATCHES, image_text_hidden_size=16,
    )  # fmt: skip


def llava() -> Built:
    vision = {**PATCHES, "patch_size": 16, "model_type": "clip_vision_model", "projection_dim": 16}
    return build(
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"input_ids": image_before_text(), "pixel_values": noise(2, 3, 32, 32)},
        text_config={**SIZES, **SHARED, "model_type": "llama", "num_key_value_heads": 2},
        vision_config=vision, image_token_index=3, image_seq_length=4,
    )  # fmt: skip


def paligemma() -> Built:
    """Without the token types transformers 5.23 leaves the mask out under sdpa, and every token sees every other."""
    ids = image_before_text()
    return build(
        "PaliGemmaForConditionalGeneration", "PaliGemmaConfig",
        {"input_ids": ids, "pixel_values": noise(2, 3, 32, 32), "token_type_ids": (ids != 3).long()},
        text_config={**SIZES, **SHARED, "model_type": "gemma", "num_key_value_heads": 2, "head_dim": 8},
        vision_config={**PATCHES, "patch_size": 16, "model_type": "siglip_vision_model"}, image_token_index=3,
        projection_dim=32,
    )  # fmt: skip


def qwen2_vl() -> Built:
    """Pixels come as one row per patch, all images of the batch after each other: 4 x 4 patches, merged to 2 x 2."""
    return build(
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
        {
            "input_ids": image_before_text(), "pixel_values": noise(2 * 16, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": (image_before_text() == 3).long(),
        },
        text_config={
            **SIZES, **SHARED, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2},
        image_token_id=3, video_token_id=0, vision_start_token_id=1, vision_end_token_id=2,
    )  # fmt: skip


AUDIO_AND_MULTIMODAL: dict[str, Callable[[], Built]] = {
    function.__name__: function
    for function in (
        wav2vec2, hubert, wavlm, unispeech_sat, sew, ast, timesformer, videomae, patchtst, patchtsmixer, clip, siglip_pair,
        git, blip, llava, paligemma, qwen2_vl,
    )
}  # fmt: skip
