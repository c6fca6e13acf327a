"""Decoders with a recurrent state: state spaces, linear attention, gated convolutions, and hybrids with attention."""

from __future__ import annotations

from collections.abc import Callable

from .building import EXPERTS, SIZES, Built, decoder

__all__ = ["RECURRENT"]

GROUPED = {**SIZES, "num_key_value_heads": 2}


def mamba() -> Built:
    return decoder("MambaForCausalLM", "MambaConfig", hidden_size=32, num_hidden_layers=2, state_size=4)


def mamba2() -> Built:
    return decoder(
        "Mamba2ForCausalLM", "Mamba2Config", hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=8,
        head_dim=8, n_groups=2, chunk_size=4,
    )  # fmt: skip


def falcon_mamba() -> Built:
    return decoder(
        "FalconMambaForCausalLM", "FalconMambaConfig", hidden_size=32, num_hidden_layers=2, state_size=4
    )


def jamba() -> Built:
    """A state-space layer with an MLP, then an attention layer with experts."""
    return decoder(
        "JambaForCausalLM", "JambaConfig", **GROUPED, **EXPERTS, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_d_state=4,
    )  # fmt: skip


def rwkv() -> Built:
    return decoder(
        "RwkvForCausalLM", "RwkvConfig", hidden_size=32, attention_hidden_size=32, num_hidden_layers=2,
        context_length=16,
        use_cache=False, rescale_every=0,  # they write in place, to what backward needs and to the weights
    )  # fmt: skip


def recurrent_gemma() -> Built:
    return decoder(
        "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", **GROUPED, lru_width=32, attention_window_size=4,
        block_types=["recurrent", "attention"],
    )  # fmt: skip


def qwen3_next() -> Built:
    """A gated delta rule, then gated attention, both with experts."""
    return decoder(
        "Qwen3NextForCausalLM", "Qwen3NextConfig", **GROUPED, **EXPERTS, head_dim=8, linear_key_head_dim=8,
        linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip


def bamba() -> Built:
    return decoder(
        "BambaForCausalLM", "BambaConfig", **GROUPED, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8,
        mamba_d_state=4, mamba_chunk_size=4,
    )  # fmt: skip


def zamba() -> Built:
    return decoder(
        "ZambaForCausalLM", "ZambaConfig", **{**SIZES, "num_hidden_layers": 3}, num_key_value_heads=4,
        layers_block_type=["mamba", "hybrid", "hybrid"], mamba_d_state=4,
    )  # fmt: skip


def zamba2() -> Built:
    return decoder(
        "Zamba2ForCausalLM", "Zamba2Config", **SIZES, num_key_value_heads=4, layers_block_type=["mamba", "hybrid"],
        mamba_d_state=4, n_mamba_heads=4, mamba_headdim=16, chunk_size=4, adapter_rank=4,
    )  # fmt: skip


def falcon_h1() -> Built:
    """State space and attention side by side in every layer."""
    return decoder(
        "FalconH1ForCausalLM", "FalconH1Config", **GROUPED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
        mamba_d_state=4, mamba_chunk_size=4,
    )  # fmt: skip


def granite_hybrid() -> Built:
    return decoder(
        "GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", **GROUPED, **EXPERTS, layer_types=["mamba", "attention"],
        mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_chunk_size=4, num_local_experts=4,
        num_experts_per_tok=2, shared_intermediate_size=16,
    )  # fmt: skip


def nemotron_h() -> Built:
    return decoder(
        "NemotronHForCausalLM", "NemotronHConfig", hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, layers_block_type=["mamba", "attention", "moe"], mamba_num_heads=4,
        mamba_head_dim=8, ssm_state_size=4, n_groups=2, chunk_size=4, **EXPERTS,
        n_routed_experts=4, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16,
    )  # fmt: skip


def lfm2() -> Built:
    """Short gated convolutions, then attention."""
    return decoder(
        "Lfm2ForCausalLM",
        "Lfm2Config",
        **GROUPED,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    )


RECURRENT: dict[str, Callable[[], Built]] = {
    function.__name__: function
    for function in (
        mamba, mamba2, falcon_mamba, jamba, rwkv, recurrent_gemma, qwen3_next, bamba, zamba, zamba2, falcon_h1,
        granite_hybrid, nemotron_h, lfm2,
    )
}  # fmt: skip
