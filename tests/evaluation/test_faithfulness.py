"""Deletion and insertion against loops, closed forms and their symmetries; ties, batch mates, nests of inputs, errors."""

from __future__ import annotations

import itertools
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.core.errors import InputError, MethodError
from pullback.evaluation import curve_intervals, deletion, insertion

LEVELS = (0.0, 0.1, 0.35, 0.5, 0.8, 1.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def convolutional(channels: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)
        ).double().eval()  # fmt: skip


def linear(weight: list[float]) -> nn.Linear:
    net = nn.Linear(len(weight), 1, bias=False).double()
    net.weight.data.copy_(torch.tensor([weight]))
    return net


@pytest.mark.parametrize("granularity", ["pixel", "element"])
@pytest.mark.parametrize("ranking", ["signed", "absolute"])
@pytest.mark.parametrize("order", ["descending", "ascending"])
@pytest.mark.parametrize("restore", [False, True])
def test_curves_follow_the_definition(granularity: str, ranking: str, order: str, restore: bool) -> None:
    model, x, a = convolutional(), normal(3, 3, 4, 5), normal(3, 3, 4, 5, seed=1)
    metric = insertion if restore else deletion
    result = metric(
        model, x, a, target=2, levels=LEVELS, granularity=granularity, ranking=ranking, order=order, mask=0.25
    )
    places = list(itertools.product(range(4), range(5)))
    parts: list[Any] = (
        places if granularity == "pixel" else list(itertools.product(range(3), range(4), range(5)))
    )
    for row in range(3):

        def relevance(part: Any, own: Tensor = a[row]) -> float:
            values = own[:, part[0], part[1]].tolist() if len(part) == 2 else [float(own[part])]
            return sum(abs(v) for v in values) if ranking == "absolute" else sum(values)

        ordered = sorted(parts, key=relevance, reverse=order == "descending")
        heights = []
        for level in LEVELS:
            image = torch.full_like(x[row], 0.25) if restore else x[row].clone()
            for part in ordered[: round(level * len(parts))]:
                where = (slice(None), *part) if len(part) == 2 else part
                image[where] = x[row][where] if restore else 0.25
            heights.append(model(image[None])[0, 2].item())
        assert result.curve is not None
        assert result.curve[row].tolist() == pytest.approx(heights, abs=1e-12)
        area = sum(
            (after - before) * (u + v) / 2
            for (before, u), (after, v) in itertools.pairwise(zip(LEVELS, heights, strict=True))
        )
        assert float(result.values[row]) == pytest.approx(area, abs=1e-12)
    assert result.details["clean"].tolist() == pytest.approx(model(x)[:, 2].tolist(), abs=1e-12)
    assert result.direction == ("higher" if restore == (order == "descending") else "lower")
    assert result.name == ("insertion" if restore else "deletion")
    assert result.params == {
        "levels": list(LEVELS), "order": order, "mask": result.params["mask"], "granularity": granularity,
        "ranking": ranking, "seed": 0, "site": "input",
    }  # fmt: skip


def test_a_linear_model_has_a_closed_form() -> None:
    """Removing parts by falling w·x leaves the sum of the rest: a cumulative sum of the sorted contributions."""
    weight, x = normal(1, 12), normal(4, 12, seed=1)
    net = linear(weight[0].tolist())
    levels = [step / 12 for step in range(13)]
    sorted_parts = (weight * x).sort(1, descending=True).values
    given = torch.cat([torch.zeros(4, 1, dtype=torch.float64), sorted_parts.cumsum(1)], 1)
    added = insertion(net, x, weight * x, levels=levels)
    removed = deletion(net, x, weight * x, levels=levels)
    torch.testing.assert_close(added.curve, given)
    torch.testing.assert_close(removed.curve, given[:, -1:] - given)
    # the area of a straight line in between, and any other order is worse
    torch.testing.assert_close(added.values + removed.values, given[:, -1])
    for seed in range(100):
        shuffled = normal(4, 12, seed=10 + seed)
        assert bool((deletion(net, x, shuffled, levels=levels).values >= removed.values - 1e-12).all())
        assert bool((insertion(net, x, shuffled, levels=levels).values <= added.values + 1e-12).all())


def test_the_area_does_not_depend_on_the_number_or_spacing_of_levels() -> None:
    """Equal contributions make a straight line, whose mean height is half the score on any grid from 0 to 1."""
    net, x = linear([1.0] * 20), torch.ones(1, 20, dtype=torch.float64)
    a = torch.arange(20.0)[None]
    for levels in ((0, 1), (0, 0.05, 1), [step / 20 for step in range(21)]):
        assert float(deletion(net, x, a, levels=levels).values) == pytest.approx(10.0, abs=1e-12)
    assert float(deletion(net, x, a, levels=(0.5, 0.6, 1)).values) == pytest.approx(5.0, abs=1e-12)


@pytest.mark.parametrize("mask", ["zeros", "mean", "noisy_linear"])
def test_insertion_ascending_is_deletion_backwards(mask: str) -> None:
    """Also with ties: the ascending order is the descending one reversed."""
    model, x, a = convolutional(), normal(2, 3, 6, 6), normal(2, 3, 6, 6, seed=1).round()
    levels = (0.0, 0.25, 0.5, 0.75, 1.0)
    removed = deletion(model, x, a, levels=levels, mask=mask)
    restored = insertion(model, x, a, levels=levels, mask=mask, order="ascending")
    torch.testing.assert_close(restored.curve.flip(1), removed.curve)
    torch.testing.assert_close(restored.values, removed.values)
    opposite = deletion(model, x, -a + 1e-9 * normal(2, 3, 6, 6, seed=2), levels=levels, mask=mask)
    assert not torch.allclose(opposite.values, removed.values)


def test_no_batch_mate_chunk_or_order_matters() -> None:
    """Chunks change the order of sums inside convolutions, hence not bit by bit."""
    model, x, a = convolutional(), normal(5, 3, 6, 6), normal(5, 3, 6, 6, seed=1).round()
    whole = insertion(model, x, a, mask="noisy_linear", levels=LEVELS)
    for row in range(5):
        alone = insertion(model, x[row : row + 1], a[row : row + 1], mask="noisy_linear", levels=LEVELS)
        torch.testing.assert_close(alone.curve[0], whole.curve[row], rtol=1e-9, atol=1e-9)
    divided = insertion(model, x.flip(0), a.flip(0), mask="noisy_linear", levels=LEVELS, chunk=2)
    torch.testing.assert_close(divided.curve.flip(0), whole.curve, rtol=1e-9, atol=1e-9)


def test_ties_are_broken_at_random_by_seed_and_content() -> None:
    """A map that is 1 on half of the parts takes those first, in an order that prefers none of them."""
    net = linear([1.0] + [0.0] * 19)
    x, a = 1 + 0.01 * normal(400, 20).abs(), torch.tensor([[1.0] * 10 + [0.0] * 10]).expand(400, -1)
    first = deletion(net, x, a, levels=(0, 0.25, 0.5))
    gone = (first.curve == 0).double().mean(0).tolist()
    # part 0 is among the first 5 of 10 with probability .5: a standard deviation of .025 over 400 examples
    assert gone[0] == 0
    assert gone[1] == pytest.approx(0.5, abs=0.1)
    assert gone[2] == 1
    again, other = (deletion(net, x, a, levels=(0, 0.25, 0.5), seed=seed) for seed in (0, 1))
    assert torch.equal(again.curve, first.curve)
    assert not torch.equal(other.curve, first.curve)
    state = torch.get_rng_state()
    deletion(net, x[:2], a[:2])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_constant_attribution_is_warned_of() -> None:
    x = normal(3, 4)
    a = torch.stack([torch.zeros(4), torch.ones(4), torch.arange(4.0)])
    with pytest.warns(
        UserWarning, match="2 of 3 attributions are the same everywhere: their order is random"
    ):
        deletion(linear([1.0, 2, 3, 4]), x, a)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deletion(linear([1.0, 2, 3, 4]), x, a[2:].expand(3, -1))


def test_series_probabilities_and_results_of_explain() -> None:
    """One-dimensional inputs; a result carries its target; a callable is given the class."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 10, 4)).double()
    x = normal(3, 2, 12)
    target = torch.tensor([3, 0, 2])
    explained = pb.explain(net, x, target=target, method="gradient")
    by_result = deletion(net, x, explained, levels=LEVELS, mask="noisy_linear")
    by_tensor = deletion(net, x, explained.values, target=target, levels=LEVELS, mask="noisy_linear")
    assert torch.equal(by_result.curve, by_tensor.curve)
    asked = []

    def attribution(given: Tensor, index: Tensor) -> Any:
        asked.append(index)
        return SimpleNamespace(values=pb.explain(net, given, target=index, method="gradient").values)

    by_call = deletion(net, x, attribution, target=target, levels=LEVELS, mask="noisy_linear")
    assert torch.equal(by_call.curve, by_tensor.curve)
    assert torch.equal(asked[0], target)
    probability = insertion(net, x, explained, target=pb.Probability(target), levels=LEVELS)
    expected = net(x).softmax(1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(probability.curve[:, -1], expected)
    assert probability.curve[:, 0].tolist() == [float(probability.curve[i, 0]) for i in range(3)]


def test_several_leaves_are_ranked_together() -> None:
    class Two(nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return (first.sum(1) + 10 * second.sum(1))[:, None]

    first, second = torch.ones(1, 3, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    a = {"first": torch.tensor([[5.0, 1, 3]]), "second": torch.tensor([[4.0, 2]])}
    result = deletion(Two(), (first, second), a, levels=[step / 5 for step in range(6)])
    assert result.curve.tolist() == [[23.0, 22, 12, 11, 1, 0]]
    with pytest.raises(
        InputError, match=r"An attribution to one tensor was given. Expected \['first', 'second'\]"
    ):
        deletion(Two(), (first, second), a["first"])


def test_padding_of_a_text_is_never_ranked() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 1)
            self.embedding.weight.data.copy_(torch.arange(7.0)[:, None])

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return (self.embedding(input_ids)[..., 0] * attention_mask).sum(1, keepdim=True)

    inputs = {
        "input_ids": torch.tensor([[1, 2, 4, 6], [5, 3, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
    }
    a = torch.tensor([[4.0, 3, 2, 1], [1, 2, 9, 9]])[..., None]
    result = deletion(Words(), inputs, a, levels=(0, 0.5, 1), mask=0.0)
    assert result.curve.tolist() == [[13.0, 10, 0], [8, 5, 0]]
    backwards = deletion(Words(), inputs, a, levels=(0, 0.5, 1), mask=0.0, order="ascending")
    assert backwards.curve.tolist() == [[13.0, 3, 0], [8, 3, 0]]


def test_curve_intervals_are_those_of_each_step() -> None:
    result = deletion(convolutional(), normal(6, 3, 4, 4), normal(6, 3, 4, 4, seed=1), levels=LEVELS)
    intervals = curve_intervals(result, level=0.9)
    assert [each.estimate for each in intervals] == pytest.approx(result.curve.mean(0).tolist(), abs=1e-12)
    assert all(each.low < each.estimate < each.high and each.level == 0.9 for each in intervals)
    with pytest.raises(InputError, match=r"has no curve\. Expected one of deletion or insertion"):
        curve_intervals(SimpleNamespace(name="leakage", curve=None))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"levels": (0.5,)}, r"levels=\(0.5,\) was given. Expected at least two rising fractions in \[0, 1\]"),
        ({"levels": (0, 0.5, 0.5)}, "Expected at least two rising fractions"),
        ({"levels": (0, 1.5)}, "Expected at least two rising fractions"),
        ({"levels": (0, float("nan"), 1)}, "Expected at least two rising fractions"),
        ({"order": "up"}, "order='up' was given. Expected 'descending' or 'ascending'"),
        ({"granularity": "patch"}, "granularity='patch' was given. Expected 'pixel' or 'element'"),
        ({"ranking": "abs"}, "ranking='abs' was given. Expected 'signed' or 'absolute'"),
        ({"mask": pb.Blur}, 'A mask of type type was given. Expected "zeros", "mean", "blur", "noisy_linear"'),
        ({"mask": "noisy_linear"}, r'"noisy_linear" was given for values of shape \(2, 4\). Expected images'),
        ({"attribution": torch.ones(2, 5)}, r"shape \(2, 5\) was given for 'input' of shape \(2, 4\)"),
        ({"attribution": torch.ones(3, 4)}, r"shape \(3, 4\) was given for 'input' of shape \(2, 4\)"),
        ({"attribution": torch.tensor([[1, 2, 3, 4], [1, 2, 3, torch.nan]])}, r"NaN or infinite values \(first: example 1\)"),
        ({"attribution": 3}, r"An attribution of type int was given. Expected a tensor \(n, ...\)"),
        ({"attribution": SimpleNamespace(values=torch.ones(2, 4), target=("mean", "mean"))}, "explains 'mean', which is no"),
        ({"attribution": SimpleNamespace(values=torch.ones(2, 4), domain="Fourier()")}, r"in the domain Fourier\(\) was given"),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(change: dict[str, Any], text: str) -> None:
    settings: dict[str, Any] = {"attribution": torch.arange(8.0).reshape(2, 4), **change}
    attribution = settings.pop("attribution")
    with pytest.raises(InputError, match=text):
        deletion(linear([1.0, 2, 3, 4]), normal(2, 4), attribution, **settings)


def test_an_unknown_mask_is_named_with_its_nearest() -> None:
    with pytest.raises(MethodError, match=r'"zeroes" is unknown\. Nearest: "Zeros".* Or "noisy_linear"\.$'):
        deletion(linear([1.0, 2]), normal(1, 2), torch.tensor([[1.0, 2]]), mask="zeroes")
