"""Encoders of text: classifiers over a padded batch, and one masked language model."""

from __future__ import annotations

from collections.abc import Callable

from .building import SHARED, SIZES, Built, build, encoder, noise

__all__ = ["ENCODERS"]

CLASSES = {**SIZES, "num_labels": 3}


def bert() -> Built:
    return encoder("BertForSequenceClassification", "BertConfig", **CLASSES)


def bert_masked() -> Built:
    """Logits over the vocabulary at every position."""
    return encoder("BertForMaskedLM", "BertConfig", **SIZES)


def roberta() -> Built:
    return encoder("RobertaForSequenceClassification", "RobertaConfig", **CLASSES)


def roberta_prelayernorm() -> Built:
    return encoder("RobertaPreLayerNormForSequenceClassification", "RobertaPreLayerNormConfig", **CLASSES)


def distilbert() -> Built:
    return encoder(
        "DistilBertForSequenceClassification", "DistilBertConfig", dim=32, n_layers=2, n_heads=4,
        hidden_dim=48, num_labels=3,
    )  # fmt: skip


def electra() -> Built:
    return encoder("ElectraForSequenceClassification", "ElectraConfig", **CLASSES, embedding_size=16)


def albert() -> Built:
    return encoder("AlbertForSequenceClassification", "AlbertConfig", **CLASSES, embedding_size=16)


def deberta() -> Built:
    return encoder(
        "DebertaForSequenceClassification", "DebertaConfig", **CLASSES, relative_attention=True,
        pos_att_type=["p2c", "c2p"], max_relative_positions=8,
    )  # fmt: skip


def deberta_v2() -> Built:
    return encoder(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", **CLASSES, relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_buckets=8,
    )  # fmt: skip


def modernbert() -> Built:
    return encoder(
        "ModernBertForSequenceClassification", "ModernBertConfig", **CLASSES, cls_token_id=1, sep_token_id=2,
        attn_implementation="sdpa",
    )  # fmt: skip


def xlnet() -> Built:
    """On embeddings: it transposes token ids before it looks them up, and no site has the batch second."""
    return build(
        "XLNetForSequenceClassification", "XLNetConfig", {"inputs_embeds": noise(2, 7, 32)}, **SHARED, d_model=32,
        n_layer=2, n_head=4, d_inner=48, num_labels=3,
    )  # fmt: skip


def xlm() -> Built:
    return encoder(
        "XLMForSequenceClassification", "XLMConfig", emb_dim=32, n_layers=2, n_heads=4, num_labels=3,
        max_position_embeddings=32,
    )  # fmt: skip


def funnel() -> Built:
    return encoder(
        "FunnelForSequenceClassification", "FunnelConfig", d_model=32, block_sizes=[1, 1], n_head=4, d_head=8,
        d_inner=48, num_labels=3,
    )  # fmt: skip


def mpnet() -> Built:
    return encoder("MPNetForSequenceClassification", "MPNetConfig", **CLASSES)


def longformer() -> Built:
    """Each token sees the four nearest ones and the first."""
    return encoder(
        "LongformerForSequenceClassification", "LongformerConfig", length=8, **CLASSES, attention_window=4
    )


def big_bird() -> Built:
    """Blocks of two tokens see their neighbours, the ends and one random block."""
    return encoder(
        "BigBirdForSequenceClassification", "BigBirdConfig", sep_token_id=2, length=16, **CLASSES, block_size=2,
        num_random_blocks=1, max_position_embeddings=32,
    )  # fmt: skip


def convbert() -> Built:
    return encoder(
        "ConvBertForSequenceClassification",
        "ConvBertConfig",
        **CLASSES,
        embedding_size=16,
        conv_kernel_size=3,
    )


def squeezebert() -> Built:
    return encoder("SqueezeBertForSequenceClassification", "SqueezeBertConfig", **CLASSES, embedding_size=32)


def mobilebert() -> Built:
    return encoder(
        "MobileBertForSequenceClassification", "MobileBertConfig", **CLASSES, embedding_size=16,
        intra_bottleneck_size=16, true_hidden_size=16,
    )  # fmt: skip


def rembert() -> Built:
    return encoder("RemBertForSequenceClassification", "RemBertConfig", **CLASSES, input_embedding_size=16)


def roformer() -> Built:
    return encoder("RoFormerForSequenceClassification", "RoFormerConfig", **CLASSES, embedding_size=32)


def esm() -> Built:
    """Masks the embeddings of padding before the first layer."""
    return encoder(
        "EsmForSequenceClassification", "EsmConfig", **CLASSES, position_embedding_type="rotary", mask_token_id=3,
        token_dropout=False,
    )  # fmt: skip


def ibert() -> Built:
    return encoder("IBertForSequenceClassification", "IBertConfig", **CLASSES, quant_mode=False)


def luke() -> Built:
    return encoder(
        "LukeForSequenceClassification", "LukeConfig", **CLASSES, entity_vocab_size=8, entity_emb_size=8
    )


def eurobert() -> Built:
    return encoder("EuroBertForSequenceClassification", "EuroBertConfig", **CLASSES, mask_token_id=3)


ENCODERS: dict[str, Callable[[], Built]] = {
    function.__name__: function
    for function in (
        bert, bert_masked, roberta, roberta_prelayernorm, distilbert, electra, albert, deberta, deberta_v2, modernbert,
        xlnet, xlm, funnel, mpnet, longformer, big_bird, convbert, squeezebert, mobilebert, rembert, roformer,
        esm, ibert, luke, eurobert,
    )
}  # fmt: skip
