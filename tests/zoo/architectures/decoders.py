"""Decoders with attention: language models that read tokens from left to right."""

from __future__ import annotations

from collections.abc import Callable

from .building import SIZES, Built, decoder

__all__ = ["DECODERS"]

GROUPED = {**SIZES, "num_key_value_heads": 2}  # two heads share each key and value


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


def gpt_bigcode() -> Built:
    """One key and value for all heads."""
    return decoder(
        "GPTBigCodeForCausalLM", "GPTBigCodeConfig", n_embd=32, n_layer=2, n_head=4, n_positions=32
    )


def gpt_neox_japanese() -> Built:
    return decoder(
        "GPTNeoXJapaneseForCausalLM", "GPTNeoXJapaneseConfig", hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_multiple_size=2,
    )  # fmt: skip


def openai_gpt() -> Built:
    return decoder("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", n_embd=32, n_layer=2, n_head=4, n_positions=32)


def codegen() -> Built:
    return decoder(
        "CodeGenForCausalLM", "CodeGenConfig", n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=32
    )


def ctrl() -> Built:
    return decoder("CTRLLMHeadModel", "CTRLConfig", n_embd=32, n_layer=2, n_head=4, dff=48, n_positions=32)


def opt() -> Built:
    return decoder(
        "OPTForCausalLM", "OPTConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
        word_embed_proj_dim=32, max_position_embeddings=32,
    )  # fmt: skip


def biogpt() -> Built:
    return decoder("BioGptForCausalLM", "BioGptConfig", **SIZES, max_position_embeddings=32)


def phi() -> Built:
    return decoder("PhiForCausalLM", "PhiConfig", **SIZES)


def phi3() -> Built:
    return decoder("Phi3ForCausalLM", "Phi3Config", **GROUPED)


def falcon() -> Built:
    return decoder(
        "FalconForCausalLM", "FalconConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )


def mpt() -> Built:
    return decoder(
        "MptForCausalLM", "MptConfig", d_model=32, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=32
    )


def bloom() -> Built:
    return decoder("BloomForCausalLM", "BloomConfig", hidden_size=32, n_layer=2, n_head=4)


def starcoder2() -> Built:
    return decoder("Starcoder2ForCausalLM", "Starcoder2Config", **GROUPED)


def persimmon() -> Built:
    """Squared ReLU, norms of queries and keys."""
    return decoder("PersimmonForCausalLM", "PersimmonConfig", **SIZES)


def nemotron() -> Built:
    """LayerNorm with a scale of 1 + weight, squared ReLU."""
    return decoder("NemotronForCausalLM", "NemotronConfig", **GROUPED, head_dim=8)


def llama() -> Built:
    return decoder("LlamaForCausalLM", "LlamaConfig", **GROUPED)


def smollm3() -> Built:
    """Every second layer without rotary positions."""
    return decoder("SmolLM3ForCausalLM", "SmolLM3Config", **GROUPED, no_rope_layer_interval=2)


def mistral() -> Built:
    return decoder("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=4)


def qwen2() -> Built:
    return decoder("Qwen2ForCausalLM", "Qwen2Config", **GROUPED)


def qwen3() -> Built:
    return decoder("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=8)


def gemma() -> Built:
    return decoder("GemmaForCausalLM", "GemmaConfig", **GROUPED, head_dim=8)


def gemma2() -> Built:
    return decoder("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, head_dim=8, sliding_window=4)


def gemma3() -> Built:
    return decoder(
        "Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, head_dim=8, sliding_window=4,
        query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip


def stablelm() -> Built:
    return decoder("StableLmForCausalLM", "StableLmConfig", **GROUPED, qk_layernorm=True)


def cohere() -> Built:
    """Attention and MLP side by side, norms of queries and keys."""
    return decoder("CohereForCausalLM", "CohereConfig", **GROUPED, use_qk_norm=True)


def cohere2() -> Built:
    return decoder(
        "Cohere2ForCausalLM", "Cohere2Config", **GROUPED, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip


def olmo() -> Built:
    """LayerNorm without weights."""
    return decoder("OlmoForCausalLM", "OlmoConfig", **GROUPED, clip_qkv=0.02)


def olmo2() -> Built:
    """Norms after attention and MLP instead of before."""
    return decoder("Olmo2ForCausalLM", "Olmo2Config", **GROUPED)


def granite() -> Built:
    return decoder(
        "GraniteForCausalLM", "GraniteConfig", **GROUPED, residual_multiplier=0.5, embedding_multiplier=2.0
    )


def glm4() -> Built:
    return decoder("Glm4ForCausalLM", "Glm4Config", **GROUPED, head_dim=8)


def helium() -> Built:
    return decoder("HeliumForCausalLM", "HeliumConfig", **GROUPED, head_dim=8)


def diffllama() -> Built:
    """The difference of two attention maps."""
    return decoder("DiffLlamaForCausalLM", "DiffLlamaConfig", **GROUPED)


def apertus() -> Built:
    """xIELU, an activation with parameters of its own."""
    return decoder("ApertusForCausalLM", "ApertusConfig", **GROUPED)


def exaone4() -> Built:
    return decoder(
        "Exaone4ForCausalLM", "Exaone4Config", **GROUPED, sliding_window=4, head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip


def modernbert_decoder() -> Built:
    return decoder(
        "ModernBertDecoderForCausalLM", "ModernBertDecoderConfig", **SIZES, cls_token_id=1, sep_token_id=2
    )


DECODERS: dict[str, Callable[[], Built]] = {
    function.__name__: function
    for function in (
        gpt2, gpt_neo, gpt_neox, gpt_neox_japanese, gptj, gpt_bigcode, openai_gpt, codegen, ctrl, opt, biogpt,
        phi, phi3, falcon, mpt, bloom, starcoder2, persimmon, nemotron, llama, smollm3, mistral, qwen2, qwen3, gemma,
        gemma2, gemma3, stablelm, cohere, cohere2, olmo, olmo2, granite, glm4, helium, diffllama, apertus, exaone4,
        modernbert_decoder,
    )
}  # fmt: skip
