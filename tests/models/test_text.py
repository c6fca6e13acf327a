"""Hugging Face text models by token ids: sites, labels, targets, baselines and generated text."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.attribution.baselines import baseline_point
from tests.models.words import tokenizer
from tests.single_input import only
from tests.zoo.architectures import bert, deberta_v2, gemma2, gpt2, llama, t5, tokens

pytest.importorskip("transformers")
PROMPTS = ["the capital of France is", "the city is"]


def double(build: Any) -> nn.Module:
    model: nn.Module = build()[0].double()
    return model


def encoded(side: str = "right", texts: Any = PROMPTS) -> Any:
    return tokenizer(side)(texts, return_tensors="pt", padding=True)


def gradient_at_embeddings(model: Any, ids: Tensor, score: Any, **inputs: Any) -> Tensor:
    """By hand: embed, run on inputs_embeds, differentiate."""
    start = model.get_input_embeddings()(ids).detach().requires_grad_()
    found: Tensor = torch.autograd.grad(score(model(inputs_embeds=start, **inputs).logits), start)[0]
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("build", [gpt2, llama])
def test_decoders_against_a_gradient_by_hand(build: Any, side: str) -> None:
    model, texts = double(build), encoded(side)
    word = tokenizer().convert_tokens_to_ids("Paris")
    found = pb.explain(model, texts, target=word, method="gradient")
    assert found.site == "embeddings"
    lasts = texts["attention_mask"].shape[1] - 1 - texts["attention_mask"].flip(1).argmax(1)
    wanted = gradient_at_embeddings(
        model, texts["input_ids"],
        lambda logits: logits[torch.arange(2), lasts, word].sum(), attention_mask=texts["attention_mask"],
    )  # fmt: skip
    wanted = wanted * texts["attention_mask"][:, :, None]
    # rotary angles are float32 in transformers
    assert torch.allclose(only(found), wanted, atol=1e-9 * float(wanted.abs().max()))
    assert [word for word in found.tokens[1] if word != "[PAD]"] == PROMPTS[1].split()  # type: ignore[index]
    assert found.tokens[0] == PROMPTS[0].split()  # type: ignore[index]


def test_encoder_and_encoder_decoder_against_a_gradient_by_hand() -> None:
    model, texts = double(bert), encoded()
    wanted = gradient_at_embeddings(
        model, texts["input_ids"], lambda z: z[:, 2].sum(), attention_mask=texts["attention_mask"]
    ) * texts["attention_mask"][:, :, None]  # fmt: skip
    found = pb.explain(model, texts, target=2, method="gradient")
    assert torch.allclose(only(found), wanted, atol=1e-12)

    model, answer = double(t5), tokens(3)
    inputs = {**texts, "decoder_input_ids": answer}
    wanted = gradient_at_embeddings(
        model, texts["input_ids"], lambda z: z[:, 1].log_softmax(1)[torch.arange(2), answer[:, 2]].sum(),
        attention_mask=texts["attention_mask"], decoder_input_ids=answer,
    ) * texts["attention_mask"][:, :, None]  # fmt: skip
    found = pb.explain(model, inputs, target=pb.TokenAt(2, answer[:, 2]), method="gradient")
    assert torch.allclose(only(found), wanted, atol=1e-10 * float(wanted.abs().max()))
    assert found.tokens is not None
    assert len(found.tokens[0]) == only(found).shape[1] == 5


@pytest.mark.parametrize("side", ["left", "right"])
def test_strings_of_several_tokens_against_the_chain_rule(side: str) -> None:
    """log p("New York") - log p("Rome"), each from its own continuation, differentiated by hand."""
    model, words = double(llama), tokenizer(side)
    ids = words(PROMPTS[0], return_tensors="pt")["input_ids"]
    new, york, rome = (words.convert_tokens_to_ids(word) for word in ("New", "York", "Rome"))
    start = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
    tail = model.get_input_embeddings()(torch.tensor([[new]])).detach()  # type: ignore[operator]
    long = model(inputs_embeds=torch.cat([start, tail], 1)).logits.log_softmax(2)
    short = model(inputs_embeds=start).logits.log_softmax(2)
    score = long[0, 4, new] + long[0, 5, york] - short[0, 4, rome]
    wanted = torch.autograd.grad(score, start)[0][0]
    target = pb.Contrast("New York", "Rome", tokenizer=words)
    found = pb.explain(model, encoded(side), target=target, method="gradient")
    real = encoded(side)["attention_mask"][0].bool()
    assert torch.allclose(found.score[0], score.detach(), atol=1e-8)
    assert torch.allclose(only(found)[0][real], wanted, atol=1e-8 * float(wanted.abs().max()))
    assert not only(found)[encoded(side)["attention_mask"] == 0].any()
    assert found.labels[0] == "log-probability of 'New York' minus 'Rome'"


@pytest.mark.parametrize("given", ["ids", "text"])
@pytest.mark.parametrize("build", [gpt2, llama])
def test_generated_text_row_by_row(build: Any, given: str) -> None:
    """One row per output token, against a loop of forwards that each see only what came before."""
    model, words = double(build), tokenizer()
    prompt = words(PROMPTS[0], return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)  # type: ignore[operator]
    ids = output[0, 5:].tolist() if given == "ids" else words.encode("Paris and Rome")
    found = pb.explain_generation(
        model, prompt, ids if given == "ids" else "Paris and Rome", tokenizer=words, method="gradient"
    )
    assert only(found).shape[:2] == (len(ids), 5 + len(ids) - 1)
    for row, token in enumerate(ids):
        read = torch.cat([prompt["input_ids"], torch.tensor([ids[:row]], dtype=torch.long)], 1)
        wanted = gradient_at_embeddings(model, read, lambda z, t=token: z[0, -1].log_softmax(0)[t])[0]
        assert torch.allclose(only(found)[row, : len(wanted)], wanted, atol=1e-9 * float(wanted.abs().max()))
        assert not only(found)[row, len(wanted) :].any()
    assert found.tokens is not None
    assert found.tokens[0][:5] == PROMPTS[0].split()
    assert len(found.tokens) == len(ids)


def test_mean_embedding_is_the_mean_of_what_the_module_gives() -> None:
    """gemma multiplies by sqrt(width) inside its embedding module, so the mean of its weights is another vector."""
    model = double(gemma2)
    module: Any = model.get_input_embeddings()  # type: ignore[operator]
    start = baseline_point(pb.MeanEmbedding(), pb.pose(model, tokens()))
    assert isinstance(start, Tensor)
    wanted = torch.stack([module(torch.tensor(token)) for token in range(40)]).mean(0).detach()
    assert torch.allclose(start, wanted.expand_as(start), atol=1e-12)
    assert not torch.allclose(start[0, 0], module.weight.mean(0).detach(), rtol=0.1)


@pytest.mark.parametrize("masked", [False, True])
def test_default_baselines(masked: bool) -> None:
    """The mask token where the target's tokenizer knows one, else the mean embedding; at layers and pixels zeros."""
    model, words = double(bert), tokenizer(mask=masked)
    problem = pb.pose(model, encoded(), target=pb.LogProb([0, 1], tokenizer=words))
    table = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    wanted = table[4] if masked else table.mean(0)
    start = baseline_point(None, problem)
    assert isinstance(start, Tensor)
    assert torch.allclose(start, wanted.expand_as(start), atol=1e-12)
    at_layer = baseline_point(None, pb.pose(model, encoded(), site="bert.encoder.layer.0"))
    assert isinstance(at_layer, Tensor)
    assert not at_layer.any()


@pytest.mark.parametrize(
    "method", [pb.IntegratedGradients(steps=4), pb.SmoothGrad(pb.IntegratedGradients(steps=4), 2)]
)
@pytest.mark.parametrize("build", [llama, gemma2])
def test_a_zero_baseline_warns_where_the_embeddings_are_normalised(build: Any, method: Any) -> None:
    model = double(build)
    with pytest.warns(UserWarning, match=r"the score jumps.*from Zeros\(\).*Use baseline=MeanEmbedding\(\)"):
        found = pb.explain(model, tokens(), method=method, baseline="zeros")
    if isinstance(method, pb.IntegratedGradients):
        assert "the score jumps" in found.diagnostics["notes"][0]
        assert str(found).endswith("1 note")


@pytest.mark.parametrize(
    ("build", "baseline"),
    [(bert, "zeros"), (deberta_v2, None), (llama, None), (gemma2, None), (gpt2, "zeros")],
)
def test_other_models_and_baselines_are_silent(build: Any, baseline: str | None) -> None:
    """Position embeddings are added before the norm, so zero words are no jump; nor is the mean embedding."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pb.explain(double(build), tokens(), method="ig(steps=4)", baseline=baseline)
    assert found.diagnostics["notes"] == []


class Careless(nn.Module):
    """Reads its padding: the mask is taken and not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 4), nn.Linear(4, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mixed: Tensor = self.head(self.embed(input_ids).mean(1).tanh())
        return mixed


@pytest.mark.parametrize("method", ["gradient", "ig(steps=50)", "smoothgrad(samples=4)"])
def test_padding_receives_nothing_even_where_the_model_reads_it(method: str) -> None:
    """It stays at its clean value on every path, and the words add up to the change of the score by themselves."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Careless().double()
    texts = encoded()
    real = texts["attention_mask"].bool()
    found = pb.explain(model, texts, target=1, method=method)
    assert not only(found)[~real].any()
    assert (only(found)[real] != 0).all()
    if method.startswith("ig"):
        start = torch.where(real[:, :, None], model.embed.weight.mean(0), model.embed(texts["input_ids"]))
        change = found.score - model.head(start.mean(1).tanh())[:, 1].detach()
        assert torch.allclose(only(found).sum((1, 2)), change, atol=1e-6)
