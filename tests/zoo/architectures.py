"""Tiny, randomly initialised ``transformers`` models, built from configs without any download.

``ARCHITECTURES[name]()`` returns ``(model in eval mode, inputs)``; equal names give equal weights and inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Built = tuple[nn.Module, Inputs]

VOCABULARY = 40
SHARED: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
ENCODER_DECODER: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip


def tokens(length: int = 7, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def build(model_class: str, config_class: str, inputs: Inputs, **settings: Any) -> Built:
    """A model of ``model_class`` with the settings that differ from the config's defaults."""
    import transformers

    config = getattr(transformers, config_class)(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config)
        for parameter in model.parameters():  # several architectures start at zero, where gradients vanish
            if parameter.is_floating_point() and parameter.detach().std(unbiased=False) < 1e-3:
                with torch.no_grad():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), inputs


def decoder(model_class: str, config_class: str, **settings: Any) -> Built:
    return build(model_class, config_class, {"input_ids": tokens()}, **SHARED, **settings)


def encoder(model_class: str, config_class: str, **settings: Any) -> Built:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return build(
        model_class, config_class, {"input_ids": tokens(), "attention_mask": mask}, **SHARED, **settings
    )


def image(model_class: str, config_class: str, **settings: Any) -> Built:
    return build(model_class, config_class, {"pixel_values": noise(2, 3, 32, 32)}, **settings)


def sequence_to_sequence(model_class: str, config_class: str, **settings: Any) -> Built:
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(5)}
    return build(model_class, config_class, inputs, **SHARED, decoder_start_token_id=1, **settings)


def gpt2() -> Built:
    return decoder("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=32)


def gpt_neo() -> Built:
    return decoder(
        "GPTNeoForCausalLM", "GPTNeoConfig", hidden_size=32, num_layers=2, num_heads=4,
        attention_types=[[["global", "local"], 1]], window_size=4, max_position_embeddings=32,
    )  # fmt: skip


def gpt_neox() -> Built:
    return decoder("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES)


def gptj() -> Built:
    return decoder(
        "GPTJForCausalLM", "GPTJConfig", n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=32
    )


def llama() -> Built:
    return decoder("LlamaForCausalLM", "LlamaConfig", **SIZES, num_key_value_heads=2)


def mistral() -> Built:
    return decoder("MistralForCausalLM", "MistralConfig", **SIZES, num_key_value_heads=2, sliding_window=4)


def qwen2() -> Built:
    return decoder("Qwen2ForCausalLM", "Qwen2Config", **SIZES, num_key_value_heads=2)


def qwen3() -> Built:
    return decoder("Qwen3ForCausalLM", "Qwen3Config", **SIZES, num_key_value_heads=2, head_dim=8)


def gemma2() -> Built:
    return decoder(
        "Gemma2ForCausalLM", "Gemma2Config", **SIZES, num_key_value_heads=2, head_dim=8, sliding_window=4
    )


def phi() -> Built:
    return decoder("PhiForCausalLM", "PhiConfig", **SIZES)


def falcon() -> Built:
    return decoder(
        "FalconForCausalLM", "FalconConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )


def mixtral() -> Built:
    return decoder(
        "MixtralForCausalLM", "MixtralConfig", **SIZES, num_key_value_heads=2, num_local_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip


def opt() -> Built:
    return decoder(
        "OPTForCausalLM", "OPTConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
        word_embed_proj_dim=32, max_position_embeddings=32,
    )  # fmt: skip


def bloom() -> Built:
    return decoder("BloomForCausalLM", "BloomConfig", hidden_size=32, n_layer=2, n_head=4)


def mamba() -> Built:
    return decoder("MambaForCausalLM", "MambaConfig", hidden_size=32, num_hidden_layers=2, state_size=4)


def rwkv() -> Built:
    return decoder(
        "RwkvForCausalLM", "RwkvConfig", hidden_size=32, attention_hidden_size=32, num_hidden_layers=2,
        context_length=16,
        use_cache=False, rescale_every=0,  # they write in place, to what backward needs and to the weights
    )  # fmt: skip


def bert() -> Built:
    return encoder("BertForSequenceClassification", "BertConfig", **SIZES, num_labels=3)


def roberta() -> Built:
    return encoder("RobertaForSequenceClassification", "RobertaConfig", **SIZES, num_labels=3)


def distilbert() -> Built:
    return encoder(
        "DistilBertForSequenceClassification", "DistilBertConfig", dim=32, n_layers=2, n_heads=4,
        hidden_dim=48, num_labels=3,
    )  # fmt: skip


def electra() -> Built:
    return encoder(
        "ElectraForSequenceClassification", "ElectraConfig", **SIZES, embedding_size=16, num_labels=3
    )


def albert() -> Built:
    return encoder(
        "AlbertForSequenceClassification", "AlbertConfig", **SIZES, embedding_size=16, num_labels=3
    )


def deberta_v2() -> Built:
    return encoder(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", **SIZES, relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_buckets=8, num_labels=3,
    )  # fmt: skip


def modernbert() -> Built:
    return encoder(
        "ModernBertForSequenceClassification", "ModernBertConfig", **SIZES, num_labels=3, cls_token_id=1,
        sep_token_id=2, attn_implementation="sdpa",
    )  # fmt: skip


def t5() -> Built:
    return sequence_to_sequence(
        "T5ForConditionalGeneration", "T5Config", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )


def bart() -> Built:
    return sequence_to_sequence(
        "BartForConditionalGeneration", "BartConfig", **ENCODER_DECODER, max_position_embeddings=32
    )


def vit() -> Built:
    return image("ViTForImageClassification", "ViTConfig", **SIZES, image_size=32, patch_size=8, num_labels=3)


def deit() -> Built:
    return image(
        "DeiTForImageClassification", "DeiTConfig", **SIZES, image_size=32, patch_size=8, num_labels=3
    )


def swin() -> Built:
    return image(
        "SwinForImageClassification", "SwinConfig", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2],
        num_heads=[2, 4], window_size=4, num_labels=3,
    )  # fmt: skip


def convnext() -> Built:
    return image(
        "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1],
        num_labels=3,
    )  # fmt: skip


def resnet() -> Built:
    return image(
        "ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2],
        layer_type="basic", num_labels=3,
    )  # fmt: skip


def segformer() -> Built:
    return image(
        "SegformerForSemanticSegmentation", "SegformerConfig", hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16, num_labels=3,
    )  # fmt: skip


def wav2vec2() -> Built:
    return build(
        "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", {"input_values": noise(2, 800)}, **SIZES,
        vocab_size=VOCABULARY, conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(8, 4),
        num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4,
        classifier_proj_size=16, num_labels=3,
    )  # fmt: skip


def whisper() -> Built:
    return build(
        "WhisperForConditionalGeneration", "WhisperConfig",
        {"input_features": noise(2, 8, 32), "decoder_input_ids": tokens(5)}, **SHARED, **ENCODER_DECODER,
        decoder_start_token_id=1, num_mel_bins=8, max_source_positions=16, max_target_positions=16,
    )  # fmt: skip


def clip() -> Built:
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    text = {**SIZES, **SHARED, "max_position_embeddings": 16}
    return build(
        "CLIPModel", "CLIPConfig", {"input_ids": tokens(), "pixel_values": noise(2, 3, 32, 32)},
        text_config=text, vision_config=vision, projection_dim=16,
    )  # fmt: skip


def llava() -> Built:
    """Image token 3 stands four times, once per 16-pixel patch of a 32-pixel image, before the text."""
    ids = tokens().clamp(min=4)
    vision = {
        **SIZES,
        "image_size": 32,
        "patch_size": 16,
        "model_type": "clip_vision_model",
        "projection_dim": 16,
    }
    return build(
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"input_ids": torch.cat([torch.full((2, 4), 3), ids], 1), "pixel_values": noise(2, 3, 32, 32)},
        text_config={**SIZES, **SHARED, "model_type": "llama", "num_key_value_heads": 2},
        vision_config=vision, image_token_index=3, image_seq_length=4,
    )  # fmt: skip


ARCHITECTURES: dict[str, Callable[[], Built]] = {
    function.__name__: function
    for function in (
        gpt2, gpt_neo, gpt_neox, gptj, llama, mistral, qwen2, qwen3, gemma2, phi, falcon, mixtral, opt, bloom,
        mamba, rwkv, bert, roberta, distilbert, electra, albert, deberta_v2, modernbert, t5, bart, vit, deit,
        swin, convnext, resnet, segformer, wav2vec2, whisper, clip, llava,
    )
}  # fmt: skip
