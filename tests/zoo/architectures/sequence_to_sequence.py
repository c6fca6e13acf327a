"""Encoder-decoders: the tokens of one sequence, predicted from another."""

from __future__ import annotations

from collections.abc import Callable

from .building import ENCODER_DECODER, SHARED, Built, build, noise, sequence_to_sequence, tokens

__all__ = ["SEQUENCE_TO_SEQUENCE"]

LONG = {**ENCODER_DECODER, "max_position_embeddings": 32}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def t5() -> Built:
    return sequence_to_sequence("T5ForConditionalGeneration", "T5Config", **T5)


def t5_v1_1() -> Built:
    """A gated GELU instead of ReLU, no tied head."""
    return sequence_to_sequence(
        "T5ForConditionalGeneration",
        "T5Config",
        **T5,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )


def umt5() -> Built:
    return sequence_to_sequence("UMT5ForConditionalGeneration", "UMT5Config", **T5)


def longt5() -> Built:
    return sequence_to_sequence(
        "LongT5ForConditionalGeneration", "LongT5Config", **T5, encoder_attention_type="transient-global",
        local_radius=2, global_block_size=2,
    )  # fmt: skip


def bart() -> Built:
    return sequence_to_sequence("BartForConditionalGeneration", "BartConfig", **LONG)


def mbart() -> Built:
    return sequence_to_sequence("MBartForConditionalGeneration", "MBartConfig", **LONG)


def plbart() -> Built:
    return sequence_to_sequence("PLBartForConditionalGeneration", "PLBartConfig", **LONG)


def pegasus() -> Built:
    return sequence_to_sequence("PegasusForConditionalGeneration", "PegasusConfig", **LONG)


def marian() -> Built:
    return sequence_to_sequence("MarianMTModel", "MarianConfig", **LONG, activation_function="swish")


def m2m_100() -> Built:
    return sequence_to_sequence("M2M100ForConditionalGeneration", "M2M100Config", **LONG)


def blenderbot() -> Built:
    return sequence_to_sequence("BlenderbotForConditionalGeneration", "BlenderbotConfig", **LONG)


def prophetnet() -> Built:
    """Two streams predict the next and the next but one token."""
    return sequence_to_sequence(
        "ProphetNetForConditionalGeneration", "ProphetNetConfig", hidden_size=32, encoder_ffn_dim=48,
        decoder_ffn_dim=48, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
        num_decoder_attention_heads=4, max_position_embeddings=32, ngram=2,
    )  # fmt: skip


def whisper() -> Built:
    return build(
        "WhisperForConditionalGeneration", "WhisperConfig",
        {"input_features": noise(2, 8, 32), "decoder_input_ids": tokens(5)}, **SHARED, **ENCODER_DECODER,
        decoder_start_token_id=1, num_mel_bins=8, max_source_positions=16, max_target_positions=16,
    )  # fmt: skip


def speech_to_text() -> Built:
    return build(
        "Speech2TextForConditionalGeneration", "Speech2TextConfig",
        {"input_features": noise(2, 32, 8), "decoder_input_ids": tokens(5)}, **SHARED, **ENCODER_DECODER,
        decoder_start_token_id=1, input_feat_per_channel=8, num_conv_layers=2, conv_channels=16,
        max_source_positions=32, max_target_positions=16,
    )  # fmt: skip


SEQUENCE_TO_SEQUENCE: dict[str, Callable[[], Built]] = {
    function.__name__: function
    for function in (
        t5, t5_v1_1, umt5, longt5, bart, mbart, plbart, pegasus, marian, m2m_100, blenderbot, prophetnet, whisper,
        speech_to_text,
    )
}  # fmt: skip
