"""Leakage against the definition, element by element; ties, dead attributions, callables, errors."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from pullback.core.errors import InputError
from pullback.evaluation import leakage


def attributions(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


@pytest.mark.parametrize(("reduce", "size"), [("abs", abs), ("positive", lambda a: max(a, 0.0))])
def test_null_mass_and_top_shares_follow_the_definition(reduce: str, size: object) -> None:
    a, signal = attributions(6, 1, 7, 5), mask(6, 1, 7, 5)
    result = leakage(None, None, a, signal_mask=signal, fractions=(0.1, 0.2, 1.0), reduce=reduce)
    for row in range(6):
        sizes = [size(value) for value in a[row].flatten().tolist()]
        outside = [not inside for inside in signal[row].flatten().tolist()]
        mass = sum(s for s, out in zip(sizes, outside, strict=True) if out) / sum(sizes)
        assert float(result.values[row]) == pytest.approx(mass, abs=1e-12)
        order = sorted(range(35), key=lambda j: -sizes[j])
        for fraction, k in ((0.1, 4), (0.2, 7)):
            share = sum(outside[j] for j in order[:k]) / k
            assert float(result.details[f"null_share@{fraction}"][row]) == pytest.approx(share, abs=1e-12)
        assert float(result.details["null_area"][row]) == pytest.approx(sum(outside) / 35)
        assert float(result.details["null_share@1"][row]) == pytest.approx(sum(outside) / 35)
    assert (result.name, result.direction) == ("leakage", "lower")
    assert result.params == {"fractions": [0.1, 0.2, 1.0], "reduce": reduce}


def test_an_oracle_scores_zero_and_its_inverse_one() -> None:
    signal = mask(5, 30)
    for a, expected in ((signal.double(), 0.0), ((~signal).double(), 1.0)):
        result = leakage(None, None, a, signal_mask=signal, fractions=(0.1,))
        assert result.values.tolist() == [expected] * 5
        assert result.details["null_share@0.1"].tolist() == [expected] * 5


def test_an_uninformative_attribution_scores_the_null_area() -> None:
    signal = torch.zeros(1, 1, 56, 28, dtype=torch.bool)
    signal[:, :, :28] = True
    result = leakage(None, None, attributions(400, 1, 56, 28), signal_mask=signal)
    # The mean over 400 images of shares of 157 elements: standard deviation below .002.
    for values in (result.values, result.details["null_share@0.1"]):
        assert abs(float(values.mean()) - 0.5) < 0.01


@pytest.mark.parametrize("flipped", [False, True])
def test_ties_do_not_prefer_low_indices(flipped: bool) -> None:
    signal = torch.tensor([[True] * 10 + [False] * 30])
    signal = signal.flip(1) if flipped else signal
    constant = leakage(None, None, torch.ones(1, 40), signal_mask=signal, fractions=(0.05, 0.25))
    assert float(constant.details["null_share@0.05"]) == 0.75
    assert float(constant.details["null_share@0.25"]) == 0.75


def test_ties_count_as_the_mean_over_random_orders() -> None:
    a = torch.tensor([[3.0, 2.0, 2.0, -2.0, 2.0, 0.0, 0.0, 1.0, 2.0, 0.0]])
    signal = torch.tensor([[False, True, False, True, True, False, True, True, False, True]])
    generator = random.Random(0)
    total = 0.0
    for _ in range(20_000):
        order = sorted(range(10), key=lambda j: (-abs(float(a[0, j])), generator.random()))
        total += sum(not bool(signal[0, j]) for j in order[:4]) / 4
    result = leakage(None, None, a, signal_mask=signal, fractions=(0.4,))
    assert float(result.details["null_share@0.4"]) == pytest.approx(total / 20_000, abs=0.01)
    assert float(result.details["null_share@0.4"]) == pytest.approx((1 + 3 * 2 / 5) / 4)


def test_scale_does_not_matter_and_half_precision_does_not_overflow() -> None:
    a, signal = attributions(4, 1000), mask(4, 1000)
    reference = leakage(None, None, a, signal_mask=signal)
    assert torch.allclose(leakage(None, None, a * 1e-30, signal_mask=signal).values, reference.values)
    large = leakage(None, None, (a * 1e4).half(), signal_mask=signal)  # sums beyond float16's 65,504
    assert torch.allclose(large.values, reference.values, atol=1e-3)


def test_a_shared_mask_and_channels_broadcast() -> None:
    a, signal = attributions(3, 4, 6, 6), mask(1, 1, 6, 6)
    shared = leakage(None, None, a, signal_mask=signal)
    spelled_out = leakage(None, None, a, signal_mask=signal.expand(3, 4, 6, 6).clone())
    assert torch.equal(shared.values, spelled_out.values)


def test_a_dead_attribution_is_nan_with_a_warning_and_the_others_are_scored() -> None:
    a, signal = attributions(3, 20), mask(3, 20)
    a[1] = 0
    with pytest.warns(UserWarning, match=r"1 of 3 attributions are zero everywhere.*undefined.*collapsed"):
        result = leakage(None, None, a, signal_mask=signal)
    assert result.values.isnan().tolist() == [False, True, False]
    assert result.details["null_share@0.25"].isnan().tolist() == [False, True, False]
    assert result.mean() == pytest.approx(float(result.values[[0, 2]].mean()))
    with pytest.warns(UserWarning, match="3 of 3 .* after dropping negative parts"):
        leakage(None, None, -attributions(3, 20).abs(), signal_mask=signal, reduce="positive")


def gradient(model: nn.Module) -> object:
    def attribution(x: Tensor, target: Tensor) -> Tensor:
        point = x.clone().requires_grad_()
        score = model(point).gather(1, target[:, None]).sum()
        return torch.autograd.grad(score, point)[0]

    return attribution


def test_a_callable_gets_the_predicted_class_or_the_given_target() -> None:
    model = nn.Linear(6, 3).double()
    x, signal = attributions(5, 6), mask(1, 6)
    weight = model.weight.detach()
    predicted = model(x).argmax(1)
    by_prediction = leakage(model, x, gradient(model), signal_mask=signal)
    expected = leakage(None, None, weight[predicted], signal_mask=signal)
    assert torch.equal(by_prediction.values, expected.values)
    target = (predicted + 1) % 3
    by_target = leakage(model, x, gradient(model), signal_mask=signal, target=target)
    assert torch.equal(by_target.values, leakage(None, None, weight[target], signal_mask=signal).values)
    assert not torch.equal(by_prediction.values, by_target.values)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_anything_with_values_will_do() -> None:
    a, signal = attributions(3, 8), mask(3, 8)
    expected = leakage(None, None, a, signal_mask=signal).values
    named = SimpleNamespace(values=a)
    assert torch.equal(leakage(None, None, named, signal_mask=signal).values, expected)
    called = leakage(None, torch.zeros(3, 8), lambda x, target: named, signal_mask=signal)
    assert torch.equal(called.values, expected)


def test_attributions_that_require_grad_leave_no_graph() -> None:
    a = attributions(3, 8).requires_grad_()
    assert not leakage(None, None, a, signal_mask=mask(3, 8)).values.requires_grad


def without(attribution: object, signal: Tensor, **options: object) -> object:
    return lambda: leakage(None, None, attribution, signal_mask=signal, **options)


def test_errors_say_what_was_given() -> None:
    a, signal = attributions(3, 8), mask(3, 8)
    broken = a.clone()
    broken[2, 0] = float("nan")
    for wrong, message in (
        (without(broken, signal), "1 attributions have NaN.*example 2"),
        (without(a, mask(3, 7)), r"\(3, 7\) was given.*\(3, 8\)"),
        (without(a, mask(8)), r"signal_mask of shape \(8,\)"),
        (without(a, signal.float()), r"torch.float32.*mask\.bool\(\)"),
        (without(a[0], signal), r"attribution of shape \(8,\)"),
        (without(lambda x, target: a, signal), "callable attribution was given without x"),
        (without([1.0], signal), "attribution of type list"),
        (without({"x": a}, signal), "attribution of type dict"),
        (without(a, signal, reduce="square"), "reduce='square'"),
        (without(a, signal, fractions=(5,)), r"shares of the elements in \(0, 1\]"),
        (lambda: leakage(None, a[:2], a, signal_mask=signal), "3 attributions for 2 inputs"),
        (lambda: leakage(None, a, lambda x, target: "a", signal_mask=signal), "attribution is a str"),
        (lambda: leakage(torch.sum, a, lambda x, target: a, signal_mask=signal), "pass target="),
    ):
        with pytest.raises(InputError, match=message):
            wrong()
