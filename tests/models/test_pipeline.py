"""Transformers pipelines: text and pictures in, the same answer as the model with the prepared tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.pipelines import is_pipeline, opened
from tests.conformance.fingerprint import assert_untouched
from tests.models.words import tokenizer
from tests.single_input import only
from tests.zoo.architectures import SHARED, SIZES, bert, build, llama, vit

transformers = pytest.importorskip("transformers")
TEXTS = ["it was a very good film", "a bad film"]


def classifier(**settings: Any) -> Any:
    labels = {0: "negative", 1: "neutral", 2: "positive"}
    model: Any = bert()[0].double()
    model.config.id2label, model.config.label2id = labels, {name: number for number, name in labels.items()}
    return transformers.pipeline(
        "text-classification", model=model, tokenizer=tokenizer(**settings), device="cpu"
    )


def generator(**settings: Any) -> Any:
    return transformers.pipeline(
        "text-generation", model=llama()[0].double(), tokenizer=tokenizer("left", **settings), device="cpu"
    )


def images() -> Any:
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=True)
    return transformers.pipeline(
        "image-classification", model=vit()[0], image_processor=processor, device="cpu"
    )


class Chunked:
    """What question answering does with long texts: several calls of the model for one input."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.tokenizer = model, tokenizer()

    def preprocess(self, text: str) -> Any:
        yield self.tokenizer(text, return_tensors="pt")
        yield self.tokenizer(text, return_tensors="pt")

    def __call__(self, text: str) -> None:
        """A pipeline is called."""


@pytest.mark.parametrize("texts", [TEXTS[0], TEXTS, tuple(TEXTS), [TEXTS[1]]])
def test_text_classification(texts: Any) -> None:
    pipe = classifier()
    given = [texts] if isinstance(texts, str) else list(texts)
    with assert_untouched(pipe.model):
        found = pb.explain(pipe, texts, target="positive", method="ig(steps=8)")
    tensors = tokenizer()(given, return_tensors="pt", padding=True)
    wanted = pb.explain(pipe.model, tensors, target=2, method="ig(steps=8)", baseline=pb.TokenEmbedding(4))
    assert torch.allclose(only(found), only(wanted), atol=1e-12)
    assert found.labels == ["class 2 (positive)"] * len(given)
    assert [word for word in found.tokens[-1] if word != "[PAD]"] == given[-1].split()  # type: ignore[index]
    assert found.meta["model"] == "BertForSequenceClassification"
    assert not only(found)[tensors["attention_mask"] == 0].any()


def test_the_predicted_class_is_the_pipelines_answer() -> None:
    pipe = classifier()
    found = pb.explain(pipe, TEXTS[0], method="gradient")
    assert found.labels[0].endswith(f"({pipe(TEXTS[0])[0]['label']})")
    pair = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    assert found.tokens != (tokens := pb.explain(pipe, pair, method="gradient").tokens)
    assert tokens == [[*TEXTS[0].split(), *TEXTS[1].split()]]


def test_compare_and_several_targets() -> None:
    pipe = classifier()
    found = pb.compare(pipe, TEXTS, ["gradient", "ig(steps=4)"], target="positive")
    alone = pb.explain(pipe, TEXTS, method="ig(steps=4)", target="positive")
    assert torch.allclose(only(list(found.values())[1]), only(alone), atol=1e-12)
    assert all(each.tokens == alone.tokens for each in found.values())
    both = pb.explain_targets(pipe, TEXTS, ["negative", "positive"], method="ig(steps=4)")
    assert torch.allclose(only(both[1]), only(alone), atol=1e-12)
    assert both[0].labels == ["class 0 (negative)"] * 2
    assert both[0].tokens == alone.tokens


def test_a_language_model_takes_words_as_targets() -> None:
    pipe, words = generator(), tokenizer("left")
    texts = ["the capital of France is", "the city is"]
    tensors = words(texts, return_tensors="pt", padding=True)
    for target, wanted in [
        ("Paris", pb.LogProb("Paris", tokenizer=words)),
        ("New York", pb.LogProb("New York", tokenizer=words)),
        (pb.Contrast("Paris", "Rome"), pb.Contrast("Paris", "Rome", tokenizer=words)),
    ]:
        found = pb.explain(pipe, texts, target=target, method="gradient")
        expected = pb.explain(pipe.model, tensors, target=wanted, method="gradient")
        assert torch.equal(only(found), only(expected))
        assert found.labels == expected.labels
    several = pb.explain_targets(pipe, texts, ["Paris", "New York"], method="gradient")
    assert several[1].labels == ["log-probability of 'New York'"] * 2
    rows = pb.explain_generation(pipe, texts[0], "Paris and Rome", method="gradient")
    expected = pb.explain_generation(
        pipe.model, words(texts[0], return_tensors="pt"), "Paris and Rome", tokenizer=words, method="gradient"
    )
    assert torch.equal(only(rows), only(expected))
    assert len(rows) == 3


def test_fill_mask_reads_the_mask() -> None:
    model = build("BertForMaskedLM", "BertConfig", {}, **SIZES, **SHARED)[0].double()
    pipe = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer(), device="cpu")
    found = pb.explain(pipe, "the capital of [MASK] is Rome", target="Italy", method="gradient")
    assert found.labels == ["log-probability of token 'Italy' at 3"]
    assert found.tokens == [["the", "capital", "of", "[MASK]", "is", "Rome"]]


def test_image_classification() -> None:
    from PIL import Image

    pipe = images()
    picture = Image.fromarray(
        (255 * torch.rand(40, 40, 3, generator=torch.Generator().manual_seed(0))).byte().numpy()
    )
    pixels = pipe.image_processor(picture, return_tensors="pt")["pixel_values"]
    wanted = pb.explain(pipe.model, {"pixel_values": pixels}, target=1, method="gradient")
    for given in (picture, [picture], np.asarray(picture), {"pixel_values": pixels}, pixels):
        found = pb.explain(pipe, given, target=1, method="gradient")
        assert torch.allclose(only(found), only(wanted), atol=1e-6 * float(only(wanted).abs().max()))
    assert only(pb.explain(pipe, [picture, picture], target=1, method="gradient")).shape == (2, 3, 32, 32)
    cam = pb.explain(pipe, picture, target=1, site="vit.layers.1", method=pb.GradCAM(channel_dim=-1))
    assert only(cam).shape == (1, 17, 1)


def test_what_is_no_pipeline_stays_what_it_is() -> None:
    class Own:
        """A callable with a model and a preparation, but nothing to prepare with."""

        model = nn.Linear(2, 2)

        def preprocess(self, x: Tensor) -> Tensor:
            return x

        def __call__(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.model(x))

    own, x = Own(), torch.ones(1, 2)
    assert not is_pipeline(own)
    assert opened(own, x).model is own
    assert opened(own.model, x).inputs is x
    assert "plain callable" in pb.explain(own, x, target=0, method="gradient").diagnostics["notes"][0]


def test_errors_say_what_to_type() -> None:
    with pytest.raises(pb.InputError, match="the list given to the pipeline is empty"):
        pb.explain(classifier(), [])
    pipe = classifier()
    pipe.tokenizer.pad_token = None
    with pytest.raises(pb.InputError, match=r"different lengths need padding.*Set its pad_token"):
        pb.explain(pipe, TEXTS)
    with pytest.raises(pb.TargetError, match=r'no label "positiv".*positive'):
        pb.explain(classifier(), TEXTS, target="positiv")
    labels = {0: "entailment", 1: "neutral", 2: "contradiction"}
    model: Any = bert()[0]
    model.config.id2label, model.config.label2id = labels, {name: number for number, name in labels.items()}
    zero_shot = transformers.pipeline(
        "zero-shot-classification", model=model, tokenizer=tokenizer(), device="cpu"
    )
    with pytest.raises(
        pb.InputError, match=r"cannot prepare a str alone.*pb\.explain\(pipeline\.model, inputs\)"
    ):
        pb.explain(zero_shot, TEXTS[0])
    with pytest.raises(pb.InputError, match="cuts this input into 2 calls"):
        pb.explain(Chunked(model), TEXTS[0])
