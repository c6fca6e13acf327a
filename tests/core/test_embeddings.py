"""Text by token ids: the embeddings, and padding that neither receives attribution nor changes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from tests.single_input import only
from tests.zoo.architectures import SIZES, decoder, encoder

TEXTS = [[5, 9, 3, 8, 17], [6, 12, 4]]
METHODS = [
    pb.Gradient(), pb.IntegratedGradients(steps=6), pb.SmoothGrad(samples=4), pb.IntegratedGradients(tol=0.05),
    pb.SmoothGrad(pb.IntegratedGradients(steps=3), samples=2), pb.VarGrad(samples=4),
    pb.RandomAttribution(),
    pb.ExpectedGradients(baseline=pb.Constant(0.1), samples=4),
]  # fmt: skip


def llama() -> nn.Module:
    return decoder("LlamaForCausalLM", "LlamaConfig", **SIZES, num_key_value_heads=2)[0].double()


def bert() -> nn.Module:
    return encoder("BertForSequenceClassification", "BertConfig", **SIZES, num_labels=3)[0].double()


def padded(texts: list[list[int]], side: str, width: int) -> dict[str, Tensor]:
    ids, mask = (
        torch.zeros(len(texts), width, dtype=torch.long),
        torch.zeros(len(texts), width, dtype=torch.long),
    )
    for row, text in enumerate(texts):
        place = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: repr(method)[:60])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("build", [llama, bert])
def test_padding_receives_nothing_and_changes_nothing(build: Any, side: str, method: Any) -> None:
    """Exact zeros at padding; the rest equals the text alone, without padding or batch mates.

    A llama's rotary positions are relative and a bert's masks absolute right padding, so both are exact; a bert with
    left padding sees other absolute positions and is left out.
    """
    if build is bert and side == "left":
        pytest.skip("absolute positions differ under left padding: another function")
    model = build()
    inputs = padded(TEXTS, side, 7)
    real = inputs["attention_mask"].bool()
    found = pb.explain(model, inputs, target=2, method=method)
    assert only(found)[~real].abs().sum() == 0
    assert only(found)[real].abs().sum() > 0
    for row, text in enumerate(TEXTS):
        alone = pb.explain(model, {"input_ids": torch.tensor([text])}, target=2, method=method)
        difference = (only(found)[row][real[row]] - only(alone)[0]).abs().max() / only(alone).abs().max()
        # rotary angles are float32 in transformers, so shifted positions differ by their rounding
        assert difference <= (1e-6 if side == "left" else 1e-9)
        if alone.diagnostics["gap"] is not None:
            assert torch.allclose(found.diagnostics["gap"][row], alone.diagnostics["gap"][0], atol=1e-7)


@pytest.mark.parametrize("width", [5, 6, 11])
def test_noise_does_not_depend_on_the_width_of_padding(width: int) -> None:
    inputs = padded(TEXTS, "right", width)
    found = only(pb.explain(llama(), inputs, target=2, method=pb.SmoothGrad(samples=3)))
    wanted = only(pb.explain(llama(), padded(TEXTS, "right", 5), target=2, method=pb.SmoothGrad(samples=3)))
    assert torch.allclose(found[:, :5], wanted, atol=1e-9 * float(wanted.abs().max()))


def test_the_embeddings_are_the_embedding_modules_output() -> None:
    model, ids = llama(), torch.tensor(TEXTS[:1])
    found = pb.explain(model, ids, target=2, method="gradient")
    assert found.site == "embeddings"
    table = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    assert torch.equal(found.point, table[ids])  # type: ignore[arg-type]
    embedded = table[ids].clone().requires_grad_()
    score = model(inputs_embeds=embedded).logits[0, -1, 2]
    wanted = torch.autograd.grad(score, embedded)[0]
    assert torch.allclose(only(found), wanted, atol=1e-12)
    by_path = pb.explain(model, ids, target=2, method="gradient", site="model.embed_tokens")
    assert torch.equal(only(by_path), only(found))


def test_chunks_of_the_clean_pass_agree() -> None:
    model, inputs = llama(), padded(TEXTS, "right", 7)
    whole = pb.explain(model, inputs, target=2, method="gradient")
    cut = pb.explain(model, inputs, target=2, method="gradient", chunk=1)
    assert torch.allclose(only(whole), only(cut), atol=1e-12)


def test_inputs_embeds_and_a_batch_encoding() -> None:
    import transformers

    model, ids = llama(), torch.tensor(TEXTS[:1])
    table = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    wanted = only(pb.explain(model, ids, target=2, method="gradient"))
    given = pb.explain(model, {"inputs_embeds": table[ids]}, target=2, method="gradient")
    assert given.site == "input"
    assert torch.allclose(only(given), wanted, atol=1e-12)
    encoding = transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert torch.allclose(only(pb.explain(model, encoding, target=2, method="gradient")), wanted, atol=1e-12)


class Bag(nn.Module):
    """Integer inputs and no embedding module that sees them."""

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.one_hot(ids, 5).double().sum(1)


def test_integers_without_embeddings_are_refused() -> None:
    with pytest.raises(
        pb.InputError, match="the inputs are integers and no embedding module of Bag was called with them"
    ):
        pb.explain(Bag(), torch.tensor([[1, 2]]))
    with pytest.raises(
        pb.InputError, match=r"no floating input to differentiate \(ids int64\).*convert it with x\.float"
    ):
        pb.explain(Bag(), torch.tensor([[1, 2]]), site="input")
    with pytest.raises(pb.InputError, match="no floating input to differentiate"):
        pb.explain(lambda ids: ids.double(), torch.tensor([[1, 2]]))


def test_an_embedding_bag_of_ones_own() -> None:
    """Any module with "embedding" in its class name, called with our ids, is the place."""

    class MyEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.arange(10.0, dtype=torch.float64).reshape(5, 2))

        def forward(self, ids: Tensor) -> Tensor:
            return self.table[ids]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = MyEmbedding()

        def forward(self, ids: Tensor) -> Tensor:
            return self.words(ids).square().sum(1)

    found = pb.explain(Net(), torch.tensor([[1, 3]]), target=0, method="gradient")
    assert only(found).tolist() == [[[4.0, 0.0], [12.0, 0.0]]]
