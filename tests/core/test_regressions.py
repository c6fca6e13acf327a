"""What an adversarial review found wrong in the core, each against an independent derivation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.core.errors import InputError, TargetError


class Reader(nn.Module):
    """A bag of tokens with positions, nonlinear in each."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(11, 5)
        self.layer = nn.Linear(5, 6)
        self.head = nn.Linear(6, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.embed.weight.data[0] = 9.0  # a padding token that stands out
        self.double().eval()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache_position: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if cache_position is not None:
            hidden = hidden + torch.sin(cache_position.double())[None, :, None]
        hidden = torch.tanh(self.layer(hidden))
        mask = torch.ones(hidden.shape[:2]) if attention_mask is None else attention_mask
        real = (mask == 0) if mask.is_floating_point() and bool((mask <= 0).all()) else mask
        weight = real.to(hidden)[..., None]
        return self.head((hidden * weight).sum(1) / weight.sum(1)).tanh()


IDS = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize("chunk", ["auto", 2, 3])
def test_positions_as_many_as_examples_are_not_examples(chunk: int | str) -> None:
    ids, positions = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]]), torch.arange(3)
    method = pb.IntegratedGradients(steps=5)
    three = pb.explain(
        Reader(), {"input_ids": ids, "cache_position": positions}, target=0, method=method, chunk=chunk
    )
    two = pb.explain(Reader(), {"input_ids": ids[:2], "cache_position": positions}, target=0, method=method)
    torch.testing.assert_close(three.values[:2], two.values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["gradient", "ig(tol=0.01)", "smoothgrad(ixg, samples=4)"])
def test_an_additive_mask_marks_the_same_padding(method: str) -> None:
    additive = torch.zeros(MASK.shape).masked_fill(MASK == 0, -1e9)
    plain = pb.explain(Reader(), {"input_ids": IDS, "attention_mask": MASK}, target=0, method=method)
    same = pb.explain(Reader(), {"input_ids": IDS, "attention_mask": additive}, target=0, method=method)
    assert float(plain.values.abs().sum()) > 0
    torch.testing.assert_close(same.values, plain.values, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "method", ["smoothgrad(samples=4)", "random_attribution", "expected_gradients(samples=4)"]
)
def test_padding_of_embeddings_handed_in_neither_counts_nor_receives(method: str) -> None:
    net = Reader()
    vectors = net.embed(IDS).detach()
    both = pb.explain(net, {"inputs_embeds": vectors, "attention_mask": MASK}, target=0, method=method).values
    alone = {"inputs_embeds": vectors[:1, 1:], "attention_mask": MASK[:1, 1:]}
    torch.testing.assert_close(
        both[0, 1:], pb.explain(net, alone, target=0, method=method).values[0], rtol=0, atol=1e-12
    )
    assert float(both[0, 0].abs().max()) == 0


def test_heads_as_many_as_tokens_are_not_padding() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.weights = nn.Identity()
            self.double().eval()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            heads = self.embed(input_ids).unflatten(-1, (3, 2)).transpose(1, 2)  # (B, 3 heads, T, 2)
            scores = heads @ heads.mT + torch.where(attention_mask == 0, -1e9, 0.0)[:, None, None]
            return (self.weights(scores.softmax(-1)) @ heads).flatten(1)

    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    values = pb.explain(Attention(), inputs, target=17, site="weights", method="gradient").values
    # entry 17 belongs to the last head
    assert float(values[0, 2].abs().max()) > 0


class First:
    """A domain that keeps the first two entries only."""

    lossy = True

    def analysis(self, x: Tensor) -> Tensor:
        return x[:, :2]

    def synthesis(self, coefficients: Tensor) -> Tensor:
        return torch.cat([coefficients, torch.zeros_like(coefficients)], 1)


def small() -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double().eval()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).double()
    return net


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_the_score_in_a_lossy_domain_is_that_of_the_synthesis() -> None:
    problem = pb.pose(small(), X, target=0).in_domain(First())
    kept = X.clone()
    kept[:, 2:] = 0
    torch.testing.assert_close(problem.score(), small()(kept)[:, 0].detach(), rtol=0, atol=1e-14)
    found = pb.explain(small(), X, target=0, method=pb.InDomain(First(), pb.IntegratedGradients(tol=0.01)))
    assert found.diagnostics["converged"].all()
    assert any("loses something" in note for note in found.diagnostics["notes"])


def test_values_under_other_names_are_refused() -> None:
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    problem = pb.pose(Sum(), {"a": X, "b": X}, target=0)
    with pytest.raises(InputError, match="'c'"):
        problem.score({"a": X, "c": X})


def test_a_generator_of_the_model_is_frozen_and_left_as_it_was() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(3)

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rand(x.shape, generator=self.generator)

    net = Noisy().eval()
    before = net.generator.get_state().clone()
    result = pb.explain(net, torch.ones(2, 3), target=1, method=pb.IntegratedGradients(steps=4))
    assert torch.equal(net.generator.get_state(), before)
    # linear in x for frozen draws, hence complete
    assert float(result.diagnostics["gap"].abs().max()) < 1e-6
    assert any("random" in note for note in result.diagnostics["notes"])


def test_a_target_that_changes_the_output_in_place_is_refused() -> None:
    def doubled(output: Tensor) -> Tensor:
        return output.mul_(2)[:, 0]

    with pytest.raises(TargetError, match="in place"):
        pb.explain(small(), X, target=doubled)


def test_a_chunk_that_divides_batch_statistics_is_noted() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).double().train()
    for chunk, said in ((2, True), (4, False), ("auto", False)):
        problem = pb.pose(net, torch.cat([X, X[:1]]), target=0, allow_train=True, chunk=chunk)
        assert any("depend on" in note for note in problem.diagnostics.get("notes", [])) is said
