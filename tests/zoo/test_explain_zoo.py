"""Explanations of real architectures: without wrappers, without a trace, and adding up.

The gradient runs over the whole zoo; what takes many passes, only over its core.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.core.targets import main_tensor
from tests.conformance.fingerprint import assert_untouched
from tests.single_input import only
from tests.zoo.architectures import (
    ARCHITECTURES,
    CORE,
    SCORED,
    Inputs,
    WithoutFloat32,
    in_float64,
    one_example,
    target_of,
)

pytest.importorskip("transformers")

# ReLU, or a normalisation that bends the score sharply near the baseline; the hard routing of mixtral jumps on the path,
# which no number of steps can add up
ROUGH = {
    "opt": 1e-4,
    "rwkv": 1e-2,
    "t5": 2e-2,
    "resnet": 1e-2,
    "segformer": 1e-4,
    "mixtral": 2e-2,
    "distilbert": 1e-3,
    "wav2vec2": 1e-4,
}
SMOOTH = 1e-5
METHODS = {
    "gradient": pb.Gradient(),
    "ig": pb.IntegratedGradients(steps=8),
    "smoothgrad": pb.SmoothGrad(samples=2),
}
# a module in the middle of each, whose output the score depends on
MIDDLE = {
    "gpt2": "transformer.h.0", "gpt_neo": "transformer.h.0", "gpt_neox": "gpt_neox.layers.0",
    "gptj": "transformer.h.0", "llama": "model.layers.0", "mistral": "model.layers.0", "qwen2": "model.layers.0",
    "qwen3": "model.layers.0", "gemma2": "model.layers.0", "phi": "model.layers.0", "falcon": "transformer.h.0",
    "mixtral": "model.layers.0", "opt": "model.decoder.layers.0", "bloom": "transformer.h.0",
    "mamba": "backbone.layers.0", "rwkv": "rwkv.blocks.0", "bert": "bert.encoder.layer.0",
    "roberta": "roberta.encoder.layer.0", "distilbert": "distilbert.transformer.layer.0",
    "electra": "electra.encoder.layer.0", "albert": "albert.encoder.embedding_hidden_mapping_in",
    "deberta_v2": "deberta.encoder.layer.0", "modernbert": "model.layers.0", "t5": "encoder.block.0",
    "bart": "model.encoder.layers.0", "vit": "vit.layers.0", "deit": "deit.layers.0",
    "swin": "swin.encoder.layers.0", "convnext": "convnext.encoder.stages.0",
    "resnet": "resnet.encoder.stages.0", "segformer": "segformer.stages.0.blocks.0",
    "wav2vec2": "wav2vec2.feature_extractor", "whisper": "model.encoder.layers.0", "clip": "vision_model.encoder.layers.0",
    "llava": "model.language_model.layers.0",
}  # fmt: skip


@lru_cache(maxsize=2)
def built(name: str) -> tuple[nn.Module, Inputs]:
    return in_float64(ARCHITECTURES[name]())


def tolerance(values: Tensor) -> float:
    # rows of a batch of two and of one go through different kernels, and rotary angles are float32
    return 1e-9 * float(values.abs().max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_methods_run_and_leave_no_trace(name: str) -> None:
    model, inputs = built(name)
    with assert_untouched(model, inputs):
        found = {
            each: pb.explain(model, inputs, target=SCORED.get(name), method=method)
            for each, method in METHODS.items()
            if name in CORE or each == "gradient"
        }
    assert all(parameter.grad is None for parameter in model.parameters())
    mask = inputs.get("attention_mask")
    last = -1 if mask is None else mask.sum(1) - 1
    for each in found.values():
        assert torch.isfinite(only(each)).all()
        assert (only(each).flatten(1).abs().sum(1) > 0).all()
        assert each.meta["model"] == type(model).__name__
        if mask is not None:
            assert not only(each)[mask == 0].any()
    # the score explained is the model's own number
    if name in SCORED:
        return
    with torch.no_grad():
        output = model(**inputs)
    logits = main_tensor(output)
    if hasattr(output, "logits_per_image"):
        logits = logits.diagonal()[:, None]
    if logits.ndim == 2:
        assert torch.allclose(found["gradient"].score, logits.amax(1).double(), atol=1e-6)
    if logits.ndim == 3:
        assert torch.allclose(
            found["gradient"].score, logits[torch.arange(2), last].amax(1).double(), atol=1e-6
        )


@pytest.mark.parametrize("name", CORE)
def test_integrated_gradients_add_up(name: str) -> None:
    """By a direct count: the values' sum against the difference of two forwards, not only the recorded gap."""
    model, inputs = built(name)
    method = pb.IntegratedGradients(steps=200, quadrature="gausslegendre")
    problem = pb.pose(model, inputs)
    from pullback.attribution.baselines import baseline_point

    start = baseline_point(None, problem)
    found = pb.explain(model, inputs, method=method)
    difference = problem.score() - problem.score(start)
    scale = float(only(found).abs().flatten(1).sum(1).max())
    gap = float((only(found).double().flatten(1).sum(1) - difference).abs().max())
    assert gap <= ROUGH.get(name, SMOOTH) * scale
    assert torch.allclose(found.diagnostics["gap"].abs().max(), torch.tensor(gap).double(), atol=1e-5 * scale)


def test_most_are_held_to_the_smooth_tolerance() -> None:
    assert len(CORE) - len(ROUGH) >= 20


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_equals_its_examples(name: str) -> None:
    model, inputs = built(name)

    def values(inputs: Inputs) -> Tensor:
        with WithoutFloat32():  # routers in float32 round differently for more rows
            return only(pb.explain(model, inputs, target=target_of(name), method="gradient"))

    whole = values(inputs)
    for row in range(2):
        assert (whole[row] - values(one_example(inputs, row))[0]).abs().max() <= tolerance(whole)


@pytest.mark.parametrize("name", CORE)
def test_a_site_in_the_middle(name: str) -> None:
    """The point is what the module gave, and the gradient there is autograd's own on the user's model."""
    model, inputs = built(name)
    seen: list[Tensor] = []

    def watch(module: nn.Module, args: object, output: object) -> None:
        first = output if isinstance(output, Tensor) else output[0]  # type: ignore[index]
        first.retain_grad()
        seen.append(first)

    found = pb.explain(model, inputs, target=target_of(name), method="gradient", site=MIDDLE[name])
    problem = pb.pose(model, inputs, target=target_of(name))
    handle = model.get_submodule(MIDDLE[name]).register_forward_hook(watch)
    try:
        output = model(**inputs)
        problem.posed.targets[0].score(output, torch.arange(2)).sum().backward()
    finally:
        handle.remove()
        model.zero_grad()
    user = [each for each in seen if each.grad is not None]
    assert len(user) == 1
    assert isinstance(found.point, Tensor)
    assert torch.allclose(found.point, user[0].detach(), atol=1e-6)
    assert user[0].grad is not None
    assert user[0].grad.abs().max() > 0
    mask = inputs.get("attention_mask")
    wanted = user[0].grad
    if mask is not None and wanted.shape[:2] == mask.shape:
        wanted = wanted * mask[:, :, None]
    assert (only(found) - wanted).abs().max() <= tolerance(wanted)


@pytest.mark.parametrize("name", ["llava", "paligemma", "qwen2_vl"])
def test_merged_images_are_part_of_the_sequence(name: str) -> None:
    """The point is what the language model reads: at the image tokens (3), the image and not the table's row."""
    model, inputs = built(name)
    found = pb.explain(model, inputs, target=1, method="gradient")
    image = inputs["input_ids"] == 3
    assert only(found)[image].abs().max() > 0
    assert isinstance(found.point, Tensor)
    table = model.get_input_embeddings()(inputs["input_ids"])
    assert not torch.equal(found.point[image], table[image])
