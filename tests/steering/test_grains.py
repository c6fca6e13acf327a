"""GrAInS against closed forms on a linear language model, and step by step on a tiny Llama."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pullback.steering import Pair, fit
from pullback.steering.agreement import principal_direction
from tests.steering.models import built

VOCABULARY, WIDTH = 12, 5


class Mixing(nn.Module):
    """h_t + W Σ_{s <= t} h_s"""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.linear(h.cumsum(1))  # type: ignore[no-any-return]


class LinearLM(nn.Module):
    """Two mixing blocks: everything about it has a closed form. It takes no attention mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Mixing(), Mixing()])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embedding(input_ids)
        for block in self.blocks:
            h = block(h)
        return self.head(h)  # type: ignore[no-any-return]

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first, second = (block.linear.weight.detach() for block in self.blocks)  # type: ignore[union-attr]
        return self.embedding.weight.detach(), first, second, self.head.weight.detach()  # type: ignore[return-value]


PAIRS = [([1, 2, 3, 4, 5], 6, 7), ([8, 9, 10, 2, 5], 6, 7), ([4, 4, 3, 11], 6, 9)]


def linear() -> LinearLM:
    return LinearLM().double().eval()


def closed_form(model: LinearLM, ids: list[int], yes: int, no: int, k: int) -> tuple[Tensor, Tensor, Any]:
    """The two displacements (block, width) and the chosen places of one pair, by hand; the baseline is the mean."""
    embedding, first, second, head = model.parts()
    eye, length = torch.eye(WIDTH, dtype=torch.float64), len(ids)
    delta = embedding[ids] - embedding.mean(0)
    # of the token at i: to block 0 by W1, to block 1 by W1 + W2 (1 + (T - i) W1), as it comes again in T - i sums
    ways = [(first, first + second @ (eye + (length - i) * first)) for i in range(length)]
    moves = torch.stack([torch.stack([way @ delta[i] for way in ways[i]]) for i in range(length)])
    scores = {i: float((head[yes] - head[no]) @ moves[i, 1]) for i in range(length - 1)}
    positive = sorted((i for i in scores if scores[i] > 0), key=lambda i: -scores[i])[:k]
    negative = sorted((i for i in scores if scores[i] < 0), key=lambda i: scores[i])[:k]
    return moves[positive].sum(0), moves[negative].sum(0), (positive, negative, scores)


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


@pytest.mark.parametrize("attribution", ["ig", "relp", "gradient"])
def test_of_a_linear_model_scores_choices_and_direction_are_the_closed_form(attribution: Any) -> None:
    model = linear()
    vector = fit(model, None, PAIRS, k=2, attribution=attribution, steps=3, aggregate="mean")
    found = [closed_form(model, *pair, k=2) for pair in PAIRS]
    mean = torch.stack([positive - negative for positive, negative, _ in found]).mean(0)
    for chosen, (_, _, (positive, negative, scores)) in zip(vector.provenance["chosen"], found, strict=True):
        assert [place for place, _, _ in chosen["positive"]] == sorted(positive)
        assert [place for place, _, _ in chosen["negative"]] == sorted(negative)
        for place, score, modality in chosen["positive"] + chosen["negative"]:
            assert score == pytest.approx(scores[place], rel=1e-9)
            assert modality == "text"
        assert abs(chosen["gap"]) < 1e-9 * abs(chosen["change"])
    for block in (0, 1):
        # directions are kept in float32
        torch.testing.assert_close(vector.directions[block].double(), unit(mean[block]), atol=1e-7, rtol=0)
        assert vector.scales[block] == pytest.approx(float(mean[block].norm()), rel=1e-9)
    assert any(negative for _, _, (_, negative, _) in found)  # both signs are put to the test


def test_principal_directions_of_both_halves_are_subtracted() -> None:
    model = linear()
    vector = fit(model, None, PAIRS, k=1)
    found = [closed_form(model, *pair, k=1) for pair in PAIRS]
    for block in (0, 1):
        halves = []
        for half in (0, 1):
            rows = torch.stack([each[half][block] for each in found])
            _, vectors = torch.linalg.eigh(rows.T @ rows)
            axis = vectors[:, -1]
            halves.append(axis * torch.sign(rows.mean(0) @ axis))
        torch.testing.assert_close(
            vector.directions[block].double(), unit(halves[0] - halves[1]), atol=1e-6, rtol=0
        )


def test_halves_alone() -> None:
    model = linear()
    positive, negative, _ = closed_form(model, *PAIRS[0], k=2)
    for combine, wanted in (("positive", positive), ("negative", -negative)):
        vector = fit(model, None, PAIRS[:1], k=2, combine=combine)
        torch.testing.assert_close(vector.directions[1].double(), unit(wanted[1]), atol=1e-7, rtol=0)


def test_mean_gradient_and_mean_difference_of_a_linear_model() -> None:
    model = linear()
    embedding, first, second, head = model.parts()
    eye = torch.eye(WIDTH, dtype=torch.float64)
    down = torch.stack([head[yes] - head[no] for _, yes, no in PAIRS]).mean(0)
    vector = fit(model, None, PAIRS, "mean_grad")
    for block, wanted in enumerate(((eye + second).T @ down, down)):
        torch.testing.assert_close(vector.directions[block].double(), unit(wanted), atol=1e-7, rtol=0)
        assert vector.scales[block] == pytest.approx(float(wanted.norm()))
    apart = torch.stack([embedding[yes] - embedding[no] for _, yes, no in PAIRS]).mean(0)
    vector = fit(model, None, PAIRS, "mean_diff")
    for block, way in enumerate((eye + first, (eye + second) @ (eye + first))):
        wanted = way @ apart
        torch.testing.assert_close(vector.directions[block].double(), unit(wanted), atol=1e-7, rtol=0)
        assert vector.scales[block] == pytest.approx(float(wanted.norm()))


def test_the_principal_direction_is_not_centred_and_points_with_the_mean() -> None:
    torch.manual_seed(0)
    axis = unit(torch.randn(6, dtype=torch.float64))
    across = torch.randn(40, 6, dtype=torch.float64) * 0.05
    lengths = torch.rand(40, 1, dtype=torch.float64) * 0.02 + 1.0
    for sign in (1.0, -1.0):
        found, explained = principal_direction(sign * lengths * axis + across)
        assert float(found @ (sign * axis)) > 0.99
        assert 0.9 < explained < 1.0
    centred = sign * lengths * axis + across
    found, _ = principal_direction(centred - centred.mean(0))
    assert abs(float(found @ axis)) < 0.9
    assert principal_direction(torch.zeros(3, 4))[1] == 0.0


def log_probability(model: Any, embeddings: Tensor, answer: list[int]) -> Tensor:
    after = model.get_input_embeddings()(torch.tensor([answer]))
    logits = model(inputs_embeds=torch.cat([embeddings, after], 1)).logits[0].log_softmax(-1)
    start = embeddings.shape[1] - 1
    return sum(logits[start + j, token] for j, token in enumerate(answer))  # type: ignore[return-value]


def last_outputs(model: Any, embeddings: Tensor) -> Tensor:
    found: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: found.append(output[0, -1].detach()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(inputs_embeds=embeddings)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def test_step_by_step_on_a_llama_with_answers_of_several_tokens() -> None:
    model: Any = built("llama", double=True)[0]
    pairs = [
        ([5, 6, 7, 8], [9], [10, 4]),
        ([1, 6, 9, 11, 12, 3], [9, 4], [10, 3, 8]),
        ([5, 6, 2, 8, 13], 3, 10),
    ]
    k, steps = 2, 4
    table = model.get_input_embeddings().weight.detach()
    baseline, halves = table.mean(0), []
    for ids, *answers in pairs:
        yes, no = ([answer] if isinstance(answer, int) else answer for answer in answers)
        clean = table[ids][None]
        scores = torch.zeros(len(ids), dtype=torch.float64)
        for step in range(steps):
            point = (baseline + (step + 0.5) / steps * (clean - baseline)).requires_grad_()
            contrast = log_probability(model, point, yes) - log_probability(model, point, no)
            (gradient,) = torch.autograd.grad(contrast, point)
            scores += (gradient * (clean - baseline))[0].sum(-1) / steps
        # 1 and 2 begin and end texts, the last token is the one that is read
        free = [i for i in range(len(ids) - 1) if ids[i] not in (0, 1, 2)]
        both = []
        for sign in (1, -1):
            best = sorted((i for i in free if sign * scores[i] > 0), key=lambda i: -sign * float(scores[i]))[
                :k
            ]
            without = clean.clone()
            without[0, best] = baseline
            both.append(last_outputs(model, clean) - last_outputs(model, without))
        halves.append(torch.stack(both))
    vector = fit(model, None, [Pair(*pair) for pair in pairs], k=k, steps=steps, aggregate="mean")
    mean = torch.stack(halves).mean(0)
    for block in (0, 1):
        wanted = mean[0, block] - mean[1, block]
        torch.testing.assert_close(vector.directions[block].double(), unit(wanted), atol=1e-6, rtol=0)
        assert vector.scales[block] == pytest.approx(float(wanted.norm()), rel=1e-6)


def test_mean_gradient_and_difference_step_by_step_on_a_llama() -> None:
    model: Any = built("llama", double=True)[0]
    ids, yes, no = [5, 6, 7, 8], [9, 3], [10, 4, 11]
    table = model.get_input_embeddings().weight.detach()
    gradients = [torch.zeros(32, dtype=torch.float64) for _ in range(2)]
    for sign, answer in ((1, yes), (-1, no)):
        kept: list[Tensor] = []
        handles = [
            layer.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output))
            for layer in model.model.layers
        ]
        value = log_probability(model, table[ids][None].clone().requires_grad_(), answer)
        for block, gradient in enumerate(torch.autograd.grad(value, kept)):
            gradients[block] += sign * gradient[0, len(ids) - 1]
        for handle in handles:
            handle.remove()
    vector = fit(model, None, [(ids, yes, no)], "mean_grad")
    for block in (0, 1):
        torch.testing.assert_close(
            vector.directions[block].double(), unit(gradients[block]), atol=1e-6, rtol=0
        )
    states = [last_outputs(model, table[ids + answer][None]) for answer in (yes, no)]
    vector = fit(model, None, [(ids, yes, no)], "mean_diff")
    for block in (0, 1):
        wanted = states[0][block] - states[1][block]
        torch.testing.assert_close(vector.directions[block].double(), unit(wanted), atol=1e-6, rtol=0)
        assert vector.scales[block] == pytest.approx(float(wanted.norm()), rel=1e-6)
