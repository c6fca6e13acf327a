"""Decoders with mixtures of experts: a router sends each token to some of several MLPs."""

from __future__ import annotations

from collections.abc import Callable

from .building import EXPERTS, SIZES, Built, decoder, sequence_to_sequence

__all__ = ["MIXTURES"]

ROUTED = {**SIZES, **EXPERTS, "num_key_value_heads": 2, "num_experts_per_tok": 2}


def mixtral() -> Built:
    return decoder("MixtralForCausalLM", "MixtralConfig", **ROUTED, num_local_experts=4)


def qwen2_moe() -> Built:
    """A shared expert behind a gate of its own."""
    return decoder(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", **ROUTED, num_experts=4, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )  # fmt: skip


def qwen3_moe() -> Built:
    return decoder(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", **ROUTED, num_experts=4, moe_intermediate_size=16, head_dim=8
    )


def olmoe() -> Built:
    return decoder("OlmoeForCausalLM", "OlmoeConfig", **ROUTED, num_experts=4)


def deepseek_v2() -> Built:
    return decoder(
        "DeepseekV2ForCausalLM", "DeepseekV2Config", **{**ROUTED, "num_key_value_heads": 4}, kv_lora_rank=16,
        q_lora_rank=None, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_group=2,
        topk_group=1, first_k_dense_replace=1, moe_intermediate_size=16, n_shared_experts=1,
    )  # fmt: skip


def deepseek_v3() -> Built:
    """Attention through a low-rank latent, a sigmoid router with a bias that only chooses."""
    return decoder(
        "DeepseekV3ForCausalLM", "DeepseekV3Config", **{**ROUTED, "num_key_value_heads": 4}, kv_lora_rank=16,
        q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_group=2,
        topk_group=1, first_k_dense_replace=1, moe_intermediate_size=16,
    )  # fmt: skip


def llama4_text() -> Built:
    return decoder(
        "Llama4ForCausalLM", "Llama4TextConfig", **{**ROUTED, "num_experts_per_tok": 1}, num_local_experts=4,
        intermediate_size_mlp=48, head_dim=8, attention_chunk_size=4, interleave_moe_layer_step=2,
    )  # fmt: skip


def gpt_oss() -> Built:
    """Attention sinks; the experts' gate is clamped and adds a constant 1."""
    return decoder(
        "GptOssForCausalLM", "GptOssConfig", **ROUTED, num_local_experts=4, head_dim=8, sliding_window=4
    )


def phimoe() -> Built:
    return decoder("PhimoeForCausalLM", "PhimoeConfig", **ROUTED, num_local_experts=4)


def granitemoe() -> Built:
    return decoder("GraniteMoeForCausalLM", "GraniteMoeConfig", **ROUTED, num_local_experts=4)


def minimax() -> Built:
    """Lightning attention (linear, with decay), then softmax attention."""
    return decoder(
        "MiniMaxForCausalLM", "MiniMaxConfig", **ROUTED, num_local_experts=4, block_size=4, head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip


def ernie4_5_moe() -> Built:
    return decoder(
        "Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig", **SIZES, **EXPERTS, num_key_value_heads=2, moe_k=2,
        moe_num_experts=4, moe_intermediate_size=16, moe_layer_start_index=1, moe_layer_end_index=1,
    )  # fmt: skip


def glm4_moe() -> Built:
    return decoder(
        "Glm4MoeForCausalLM", "Glm4MoeConfig", **ROUTED, head_dim=8, n_routed_experts=4, first_k_dense_replace=1,
        moe_intermediate_size=16,
    )  # fmt: skip


def switch_transformers() -> Built:
    return sequence_to_sequence(
        "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", d_model=32, d_kv=8, d_ff=48,
        num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_heads=4,
        num_experts=4, expert_capacity=16,
    )  # fmt: skip


MIXTURES: dict[str, Callable[[], Built]] = {
    function.__name__: function
    for function in (
        mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, llama4_text, gpt_oss, phimoe, granitemoe,
        minimax, ernie4_5_moe, glm4_moe, switch_transformers,
    )
}  # fmt: skip
