"""Classifiers of images, two segmenters, and one that predicts depth."""

from __future__ import annotations

from collections.abc import Callable

from .building import SIZES, Built, image

__all__ = ["VISION"]

PATCHES = {**SIZES, "image_size": 32, "patch_size": 8, "num_labels": 3}


def vit() -> Built:
    return image("ViTForImageClassification", "ViTConfig", **PATCHES)


def deit() -> Built:
    return image("DeiTForImageClassification", "DeiTConfig", **PATCHES)


def beit() -> Built:
    return image("BeitForImageClassification", "BeitConfig", **PATCHES, use_relative_position_bias=True)


def data2vec_vision() -> Built:
    return image(
        "Data2VecVisionForImageClassification", "Data2VecVisionConfig", **PATCHES,
        use_shared_relative_position_bias=True,
    )  # fmt: skip


def dinov2() -> Built:
    return image(
        "Dinov2ForImageClassification", "Dinov2Config", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8, num_labels=3, mlp_ratio=2, use_swiglu_ffn=True,
    )  # fmt: skip


def dinov2_with_registers() -> Built:
    return image(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, image_size=32, patch_size=8, num_labels=3, mlp_ratio=2, num_register_tokens=2,
    )  # fmt: skip


def ijepa() -> Built:
    return image("IJepaForImageClassification", "IJepaConfig", **PATCHES)


def siglip() -> Built:
    return image("SiglipForImageClassification", "SiglipConfig", vision_config=PATCHES, num_labels=3)


def swin() -> Built:
    return image(
        "SwinForImageClassification", "SwinConfig", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2],
        num_heads=[2, 4], window_size=4, num_labels=3,
    )  # fmt: skip


def swinv2() -> Built:
    """Cosine attention with a learned temperature."""
    return image(
        "Swinv2ForImageClassification", "Swinv2Config", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2],
        num_heads=[2, 4], window_size=4, num_labels=3, pretrained_window_sizes=[0, 0],
    )  # fmt: skip


def hiera() -> Built:
    return image(
        "HieraForImageClassification", "HieraConfig", image_size=[32, 32], embed_dim=16, depths=[1, 1], num_heads=[1, 2],
        patch_size=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1], masked_unit_size=[4, 4], num_query_pool=1,
        masked_unit_attention=[True, False], num_labels=3,
    )  # fmt: skip


def convnext() -> Built:
    return image(
        "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1],
        num_labels=3,
    )  # fmt: skip


def convnextv2() -> Built:
    return image(
        "ConvNextV2ForImageClassification", "ConvNextV2Config", hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1],
        num_labels=3,
    )  # fmt: skip


def resnet() -> Built:
    return image(
        "ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2],
        layer_type="basic", num_labels=3,
    )  # fmt: skip


def resnet_bottleneck() -> Built:
    return image(
        "ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1],
        layer_type="bottleneck", num_labels=3,
    )  # fmt: skip


def regnet() -> Built:
    return image(
        "RegNetForImageClassification", "RegNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
        groups_width=4, num_labels=3,
    )  # fmt: skip


def bit() -> Built:
    """Convolutions with standardised weights, group norm."""
    return image(
        "BitForImageClassification", "BitConfig", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=2,
        num_labels=3,
    )  # fmt: skip


def mobilenet_v1() -> Built:
    return image(
        "MobileNetV1ForImageClassification", "MobileNetV1Config", depth_multiplier=0.25, num_labels=3
    )


def mobilenet_v2() -> Built:
    return image(
        "MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.25, num_labels=3,
        finegrained_output=False,
    )  # fmt: skip


def mobilevit() -> Built:
    return image(
        "MobileViTForImageClassification", "MobileViTConfig", hidden_sizes=[16, 16, 16], num_attention_heads=2,
        neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 16], expand_ratio=2.0, image_size=32, num_labels=3,
        initializer_range=0.2,
       
    )  # fmt: skip


def mobilevitv2() -> Built:
    """Attention that is linear in the number of patches."""
    return image(
        "MobileViTV2ForImageClassification", "MobileViTV2Config", width_multiplier=0.25, image_size=64, size=64, num_labels=3,
        n_attn_blocks=[1, 1, 1], initializer_range=0.2,
    )  # fmt: skip


def efficientnet() -> Built:
    return image(
        "EfficientNetForImageClassification", "EfficientNetConfig", image_size=32, width_coefficient=0.25,
        depth_coefficient=0.2, kernel_sizes=[3, 3], in_channels=[32, 16], out_channels=[16, 32], strides=[1, 2],
        num_block_repeats=[1, 2], expand_ratios=[1, 4], hidden_dim=320, initializer_range=0.2, num_labels=3,
    )  # fmt: skip


def poolformer() -> Built:
    return image(
        "PoolFormerForImageClassification", "PoolFormerConfig", hidden_sizes=[8, 16], depths=[1, 1], patch_sizes=[7, 3],
        strides=[4, 2], padding=[2, 1], num_encoder_blocks=2, num_labels=3, layer_scale_init_value=0.5,
    )  # fmt: skip


def pvt() -> Built:
    return image(
        "PvtForImageClassification", "PvtConfig", image_size=32, num_encoder_blocks=2, depths=[1, 1],
        sequence_reduction_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[4, 2], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], num_labels=3, initializer_range=0.2,
    )  # fmt: skip


def pvt_v2() -> Built:
    return image(
        "PvtV2ForImageClassification", "PvtV2Config", image_size=32, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
        hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        num_labels=3,
    )  # fmt: skip


def levit() -> Built:
    return image(
        "LevitForImageClassification", "LevitConfig", image_size=64, size=64, hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8], num_labels=3,
    )  # fmt: skip


def cvt() -> Built:
    return image(
        "CvtForImageClassification", "CvtConfig", embed_dim=[8, 16, 16], num_heads=[1, 2, 2], depth=[1, 2, 3],
        num_labels=3,
    )  # fmt: skip


def focalnet() -> Built:
    return image(
        "FocalNetForImageClassification", "FocalNetConfig", image_size=32, embed_dim=8, hidden_sizes=[8, 16], depths=[1, 1],
        focal_levels=[2, 2], focal_windows=[3, 3], num_labels=3,
    )  # fmt: skip


def segformer() -> Built:
    return image(
        "SegformerForSemanticSegmentation", "SegformerConfig", hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16, num_labels=3,
    )  # fmt: skip


def dpt() -> Built:
    """A depth for every pixel."""
    return image(
        "DPTForDepthEstimation", "DPTConfig", **{**SIZES, "num_hidden_layers": 4}, image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8, num_channels=3,
    )  # fmt: skip


VISION: dict[str, Callable[[], Built]] = {
    function.__name__: function
    for function in (
        vit, deit, beit, data2vec_vision, dinov2, dinov2_with_registers, ijepa, siglip, swin, swinv2, hiera, convnext,
        convnextv2, resnet, resnet_bottleneck, regnet, bit, mobilenet_v1, mobilenet_v2, mobilevit, mobilevitv2,
        efficientnet, poolformer, pvt, pvt_v2, levit, cvt, focalnet, segformer, dpt,
    )
}  # fmt: skip
