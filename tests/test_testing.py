"""The assertions for users' test suites: they pass where they should, and fail on each kind of fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.testing import assert_complete, assert_model_untouched


def net(bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8, bias), nn.ReLU(), nn.Linear(8, 3, bias)).double()


def inputs(batch: int = 3) -> Tensor:
    return torch.randn(batch, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_auto_is_complete() -> None:
    assert_complete(net(), inputs())


def test_a_homogeneous_net_is_complete_to_rounding_under_input_times_gradient() -> None:
    """x · ∂f/∂x = f for f homogeneous of degree one; with biases it is not."""
    assert_complete(net(bias=False), inputs(), method="ixg", tolerance=1e-12)
    with pytest.raises(AssertionError, match="3 of 3 examples are not complete"):
        assert_complete(net(), inputs(), method=pb.InputXGradient(), tolerance=1e-3)


@pytest.mark.parametrize("change", [lambda v: -v, lambda v: 1.2 * v, lambda v: v * torch.nan])
def test_wrong_values_fail_though_the_method_records_no_gap(change: Callable[[Tensor], Tensor]) -> None:
    def method(problem: pb.Problem) -> Any:
        return change(problem.point * problem.grad())

    with pytest.raises(AssertionError, match="not complete"):
        assert_complete(net(bias=False), inputs(), method=method)


def test_the_message_names_the_worst_example_and_the_numbers() -> None:
    def method(problem: pb.Problem) -> Tensor:
        values = problem.point * problem.grad()
        return values * torch.tensor([[1.0], [3.0], [1.5]], dtype=torch.float64)

    with pytest.raises(AssertionError) as caught:
        assert_complete(net(bias=False), inputs(), method=method, tolerance=0.01, target=0)
    text = str(caught.value)
    assert text.startswith("2 of 3 examples are not complete")
    one = pb.explain(net(bias=False), inputs(), method="ixg", target=0)
    totals, sizes = one.values.sum(1), one.values.abs().sum(1)
    worst = int(
        ((totals * torch.tensor([0, 2.0, 0.5])).abs() / (sizes * torch.tensor([1, 3.0, 1.5]))).argmax()
    )
    assert f"of example {worst} miss" in text
    assert "tolerance=0.01 allows" in text


def test_the_baseline_is_the_reference_and_few_steps_fail() -> None:
    """On a square with x' = 0, one left step sees gradient 0 at the start, so everything is missing."""

    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square().sum(1)

    assert_complete(Square(), inputs(), method=pb.IntegratedGradients(steps=1), tolerance=1e-12)
    # midpoint is exact for squares from any baseline; left is not
    assert_complete(
        Square(), inputs(), method=pb.IntegratedGradients(steps=1), baseline=pb.Constant(2.0), tolerance=1e-9
    )
    assert_complete(Square(), inputs(), method="ig(steps=1)", baseline="mean", tolerance=1e-9)
    with pytest.raises(AssertionError):
        assert_complete(Square(), inputs(), method=pb.IntegratedGradients(steps=4, quadrature="left"))


def test_a_negative_tolerance_is_refused() -> None:
    with pytest.raises(pb.InputError, match="tolerance is a share"):
        assert_complete(net(), inputs(), tolerance=-0.1)


def test_explaining_passes() -> None:
    model = net()
    with assert_model_untouched(model):
        pb.explain(model, inputs())


FAULTS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "value": (lambda m: m[0].weight.data[0, 0].add_(1), "0.weight"),
    "same value written": (lambda m: m[0].weight.detach().copy_(m[0].weight.detach()), "0.weight"),
    "gradient": (lambda m: m(inputs()).sum().backward(), "0.weight"),
    "flag": (lambda m: m[2].bias.requires_grad_(False), "2.bias"),
    "mode": (lambda m: m[1].train(not m[1].training), "1.training"),
    "hook": (lambda m: m[1].register_forward_hook(lambda *_: None), "1._forward_hooks"),
    "attribute": (lambda m: setattr(m[1], "seen", 1), "1.seen"),
    "removed": (lambda m: delattr(m[1], "inplace"), "1.inplace"),
    "module": (lambda m: m.append(nn.ReLU()), "_modules"),
    "parameter": (lambda m: setattr(m[0], "bias", nn.Parameter(m[0].bias.detach())), "0.bias"),
    "buffer": (lambda m: m.register_buffer("count", torch.zeros(())), "count"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_change_is_named(name: str) -> None:
    model = net()
    change, where = FAULTS[name]
    with (
        pytest.raises(AssertionError, match=f"the model was changed: .*{where}"),
        assert_model_untouched(model),
    ):
        change(model)


def test_an_unchanged_model_with_nan_and_a_gradient_passes() -> None:
    model = net()
    model[0].bias.data[0] = torch.nan
    model[2].weight.grad = torch.ones_like(model[2].weight)
    with assert_model_untouched(model):
        pass


def test_changes_are_seen_when_the_body_raises_and_its_error_is_kept() -> None:
    model = net()

    def change_and_raise() -> None:
        model[1].seen = 1
        raise KeyError("of the body")

    with pytest.raises(AssertionError) as caught, assert_model_untouched(model):
        change_and_raise()
    assert isinstance(caught.value.__context__, KeyError)
    with pytest.raises(KeyError), assert_model_untouched(net()):
        raise KeyError("of the body")
