"""Vision models: classes, regions, boxes and similarities, against gradients by hand on the user's model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import pullback as pb
from tests.conformance.fingerprint import assert_untouched
from tests.single_input import only
from tests.zoo.architectures import SIZES, build, clip, convnext, noise, resnet, segformer, swin, vit

transformers = pytest.importorskip("transformers")


def double(pair: tuple[nn.Module, dict[str, Tensor]]) -> tuple[Any, dict[str, Tensor]]:
    model, inputs = pair
    return model.double(), {
        key: value.double() if value.is_floating_point() else value for key, value in inputs.items()
    }


def detr() -> tuple[nn.Module, dict[str, Tensor]]:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    return build(
        "DetrForObjectDetection", "DetrConfig", {"pixel_values": noise(2, 3, 64, 64)}, backbone_config=backbone,
        use_timm_backbone=False, use_pretrained_backbone=False, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
        num_queries=4, num_labels=3,
    )  # fmt: skip


def yolos() -> tuple[nn.Module, dict[str, Tensor]]:
    return build(
        "YolosForObjectDetection", "YolosConfig", {"pixel_values": noise(2, 3, 32, 32)}, **SIZES,
        image_size=[32, 32], patch_size=8, num_detection_tokens=4, num_labels=3, use_mid_position_embeddings=False,
    )  # fmt: skip


def by_hand(model: Any, inputs: dict[str, Tensor], score: Callable[[Any], Tensor]) -> Tensor:
    pixels = inputs["pixel_values"].clone().requires_grad_()
    return torch.autograd.grad(score(model(**{**inputs, "pixel_values": pixels})).sum(), pixels)[0]


def assert_close(got: Tensor, wanted: Tensor) -> None:
    assert wanted.abs().max() > 0
    assert (got - wanted).abs().max() <= 1e-9 * wanted.abs().max()


@pytest.mark.parametrize("make", [vit, swin, convnext, resnet])
@pytest.mark.parametrize("preset", ["logit", "probability", "margin"])
def test_classification(make: Any, preset: str) -> None:
    model, inputs = double(make())
    targets: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
        "logit": ([2, 0], lambda z: z[torch.arange(2), [2, 0]]),
        "probability": (pb.Probability(1), lambda z: z.softmax(1)[:, 1]),
        "margin": (pb.Margin(1, 2), lambda z: z[:, 1] - z[:, 2]),
    }
    target, score = targets[preset]
    with assert_untouched(model, inputs):
        found = pb.explain(model, inputs, target=target, method="gradient")
    assert_close(only(found), by_hand(model, inputs, lambda output: score(output.logits)))


@pytest.mark.parametrize("given", ["none", "class", "mask"])
def test_segmentation(given: str) -> None:
    model, inputs = double(segformer())
    with torch.no_grad():
        logits = model(**inputs).logits
    mask = torch.zeros(8, 8)
    mask[2:5, 1:4] = 1
    predicted = logits.argmax(1)
    common = torch.stack([row.flatten().bincount(minlength=3).argmax() for row in predicted])
    where = {
        "none": (predicted == common[:, None, None]).double(),
        "class": (predicted == 0).double(),
        "mask": mask.double().expand(2, 8, 8),
    }[given]
    index = common if given == "none" else torch.tensor([0, 0] if given == "class" else [2, 2])
    target = {"none": None, "class": 0, "mask": pb.MaskSum(mask, 2)}[given]
    found = pb.explain(model, inputs, target=target, method="gradient")
    wanted = by_hand(
        model, inputs, lambda output: (output.logits[torch.arange(2), index] * where).flatten(1).sum(1)
    )
    assert_close(only(found), wanted)


@pytest.mark.parametrize("make", [detr, yolos])
def test_detection(make: Any) -> None:
    """None is the most confident query and its class; by number and label the one asked for."""
    model, inputs = double(make())
    with torch.no_grad():
        confidence = model(**inputs).logits.softmax(2)[:, :, :3]
    query = confidence.amax(2).argmax(1)
    label = confidence[torch.arange(2), query].argmax(1)
    found = pb.explain(model, inputs, method="gradient")
    assert_close(only(found), by_hand(model, inputs, lambda z: z.logits[torch.arange(2), query, label]))
    assert found.labels == [
        f"query {q}, class {k}" for q, k in zip(query.tolist(), label.tolist(), strict=True)
    ]
    asked = pb.explain(model, inputs, target=pb.Detection(index=3, label=1), method="gradient")
    assert_close(only(asked), by_hand(model, inputs, lambda z: z.logits[:, 3, 1]))


def test_similarity_of_pictures_and_texts() -> None:
    """The score is each picture's with its own text, whatever else is in the batch."""
    model, inputs = double(clip())
    found = pb.explain(model, inputs, method="gradient", site="input:pixel_values")
    wanted = by_hand(model, inputs, lambda output: output.logits_per_image.diagonal())
    assert_close(only(found), wanted)
    text = pb.explain(model, inputs, method="gradient")
    assert text.site == "embeddings"
    assert only(text).shape == (2, 7, 32)

    class Picture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = model

        def forward(self, pixel_values: Tensor) -> Tensor:
            hidden = self.clip.vision_model(pixel_values).pooler_output
            return self.clip.visual_projection(hidden)  # type: ignore[no-any-return]

    reference = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    pixels = inputs["pixel_values"]
    similar = pb.explain(Picture().eval(), pixels, target=pb.Similarity(reference), method="gradient")
    own = pixels.clone().requires_grad_()
    score = functional.cosine_similarity(Picture()(own), reference[None], 1).sum()
    assert_close(only(similar), torch.autograd.grad(score, own)[0])


def test_grad_cam_at_a_convolution_and_its_enlargement() -> None:
    model, inputs = double(resnet())
    site = "resnet.encoder.stages.1"
    found = pb.explain(model, inputs, target=1, site=site, method=pb.GradCAM(rectify=False))
    kept: list[Tensor] = []
    handle = model.get_submodule(site).register_forward_hook(lambda *given: kept.append(given[2]))
    output = model(**inputs).logits[:, 1].sum()
    handle.remove()
    activation = kept[-1]
    gradient = torch.autograd.grad(output, activation)[0]
    wanted = torch.einsum("bc,bchw->bhw", gradient.mean((2, 3)), activation)[:, None].detach()
    assert_close(only(found), wanted)
    large = only(found.upsample(32))
    assert large.shape == (2, 1, 32, 32)
    assert_close(large, functional.interpolate(wanted, size=(32, 32), mode="bilinear", align_corners=False))
    conserved = only(found.upsample(32, conserve=True)).flatten(1).sum(1)
    assert torch.allclose(conserved, wanted.flatten(1).sum(1), atol=1e-10)
    with pytest.raises(
        pb.MethodError, match=r'Try site="resnet\.encoder\.stages\.1\.layers\.1\.layer\.1\.convolution"'
    ):
        pb.explain(model, inputs, target=1, method=pb.GradCAM())


def test_grad_cam_over_the_tokens_of_a_vit() -> None:
    """Channels last: the weights are means over tokens, the map has one value per token."""
    model, inputs = double(vit())
    found = pb.explain(model, inputs, target=1, site="vit.layers.0", method=pb.GradCAM(channel_dim=-1))
    gradient = only(pb.explain(model, inputs, target=1, site="vit.layers.0", method="gradient"))
    assert isinstance(found.point, Tensor)
    wanted = torch.einsum("bd,btd->bt", gradient.mean(1), found.point).relu()[:, :, None]
    assert_close(only(found), wanted)
    assert only(found).shape == (2, 17, 1)
