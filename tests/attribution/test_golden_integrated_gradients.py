"""Integrated gradients against golden arrays, exactness and completeness (attribution-methods.md 2.8)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.attribution import integrated_gradients as module
from pullback.attribution.paths import nodes_and_weights
from pullback.core.errors import MethodError
from tests.golden_net import example, golden, largest, tiny_cnn, tiny_mlp

CAPTUM = {
    "gausslegendre": "gausslegendre",
    "riemann_middle": "midpoint",
    "riemann_left": "left",
    "riemann_right": "right",
}


def golden_map(quadrature: str) -> Tensor:
    arrays = golden()
    method = pb.IntegratedGradients(steps=50, quadrature=quadrature)
    return pb.explain(tiny_cnn(), arrays["x"], target=arrays["target"], method=method).values


@pytest.mark.parametrize("name", CAPTUM)
def test_golden_maps_to_captums_float32_step_sizes(name: str) -> None:
    expected = golden()[f"captum_ig_{name}50"]
    assert largest(golden_map(CAPTUM[name]), expected) < 5e-8 * float(expected.abs().max())


@pytest.mark.parametrize("name", CAPTUM)
def test_golden_maps_with_the_same_float32_step_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, weights = nodes_and_weights(CAPTUM[name], 50)
    monkeypatch.setattr(module, "nodes_and_weights", lambda *_: (nodes, weights.float().double()))
    assert largest(golden_map(CAPTUM[name]), golden()[f"captum_ig_{name}50"]) < 1e-12


def test_captums_trapezoid_is_the_trapezoid_rule_times_49_50ths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are spaced for 50 intervals on 50 nodes, so they sum to 49/50; ours always sum to one."""
    nodes = torch.from_numpy(np.linspace(0, 1, 50))
    weights = torch.full((50,), 1 / 49, dtype=torch.float64)
    weights[[0, -1]] /= 2
    monkeypatch.setattr(module, "nodes_and_weights", lambda *_: (nodes, weights))
    expected = golden()["captum_ig_riemann_trapezoid50"]
    assert largest(0.98 * golden_map("left"), expected) < 5e-8 * float(expected.abs().max())


@pytest.mark.parametrize("quadrature", ["midpoint", "gausslegendre", "left", "right"])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_weights_sum_to_one(quadrature: str, steps: int) -> None:
    nodes, weights = nodes_and_weights(quadrature, steps)
    assert abs(float(weights.sum()) - 1) < 1e-14
    assert float(nodes.min()) >= 0
    assert float(nodes.max()) <= 1


def test_two_gauss_nodes_are_exact_on_a_cubic() -> None:
    """IG_i of Σ x_i³ from a to x is (x_i - a_i)(x_i² + x_i a_i + a_i²) = x_i³ - a_i³."""
    x, start = example(2, 5), example(1, 5) * 0.3 + 0.1
    method = pb.IntegratedGradients(steps=2, quadrature="gausslegendre", baseline=pb.Given(start))
    found = pb.explain(lambda z: z.pow(3).sum(1, keepdim=True), x, target=0, method=method).values
    assert largest(found, x.pow(3) - start.pow(3)) < 1e-14
    midpoint = pb.IntegratedGradients(steps=2, baseline=pb.Given(start))
    coarse = pb.explain(lambda z: z.pow(3).sum(1, keepdim=True), x, target=0, method=midpoint).values
    assert largest(coarse, x.pow(3) - start.pow(3)) > 1e-3


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a.square() * b).sum(1, keepdim=True)


def test_several_inputs_share_one_path() -> None:
    """From zero, f = Σ a² b: the path integrals of 2ab·a and a²·b over α² give 2/3 a² b and 1/3 a² b."""
    a, b = example(2, 4), example(2, 4) + 0.5
    method = pb.IntegratedGradients(steps=2, quadrature="gausslegendre")
    found = pb.explain(Product(), (a, b), target=0, method=method)
    assert isinstance(found.values, dict)
    assert largest(found.values["a"], a.square() * b * 2 / 3) < 1e-14
    assert largest(found.values["b"], a.square() * b / 3) < 1e-14
    assert float(found.diagnostics["gap"].abs().max()) < 1e-14


@pytest.mark.parametrize("chunk", [1, 7])
def test_rows_and_chunks_do_not_matter(chunk: int) -> None:
    x = example(3, 6)
    method = pb.IntegratedGradients(steps=9)
    whole = pb.explain(tiny_mlp(), x, target=1, method=method, chunk=1000).values
    assert largest(pb.explain(tiny_mlp(), x, target=1, method=method, chunk=chunk).values, whole) < 1e-12
    singles = [pb.explain(tiny_mlp(), row[None], target=1, method=method, chunk=chunk).values for row in x]
    assert largest(torch.cat(singles), whole) < 1e-12


@pytest.mark.parametrize("method", [pb.IntegratedGradients(steps=4), pb.IntegratedGradients(tol=0.05)])
def test_no_way_to_go_is_zero_everywhere(method: pb.IntegratedGradients) -> None:
    x = example(2, 6)
    found = pb.explain(tiny_mlp(), x, target=0, method=method, baseline=x)
    assert torch.equal(found.values, torch.zeros_like(x))
    assert torch.equal(found.diagnostics["gap"], torch.zeros(2).double())


def test_the_model_and_the_input_are_left_alone() -> None:
    net, x = tiny_cnn().train(), example(2, 3, 8, 8)
    net[1].eval()
    net[5].eval()
    net[0].weight.requires_grad_(False)
    before, given = copy.deepcopy(net.state_dict()), x.clone()
    pb.explain(net, x, target=0, method=pb.IntegratedGradients(steps=4))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * 8
    assert [part.training for part in net] == [True, False, True, True, True, False, True, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(x, given)
    assert x.grad is None
    assert not x.requires_grad


def test_completeness_on_a_smooth_net() -> None:
    x = example(4, 6)
    gauss = pb.IntegratedGradients(steps=50, quadrature="gausslegendre", baseline=pb.Constant(0.1))
    found = pb.explain(tiny_mlp(), x, target=2, method=gauss)
    with torch.no_grad():
        change = tiny_mlp()(x)[:, 2] - tiny_mlp()(torch.full_like(x, 0.1))[:, 2]
    assert largest(found.values.sum(1), change) < 1e-10
    assert largest(found.diagnostics["gap"], found.values.sum(1) - change) < 1e-14


def test_midpoint_gaps_fall_as_the_square_of_the_steps() -> None:
    x = example(1, 6)
    gaps = [
        float(
            pb.explain(
                tiny_mlp(), x, target=1, method=pb.IntegratedGradients(steps=steps, baseline=pb.Constant(0.1))
            )
            .diagnostics["gap"]
            .abs()
        )
        for steps in (32, 64)
    ]
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.1)


def test_completeness_on_a_relu_net() -> None:
    arrays = golden()
    with torch.no_grad():
        net = tiny_cnn()
        change = (net(arrays["x"]) - net(torch.zeros_like(arrays["x"]))).gather(1, arrays["target"][:, None])[
            :, 0
        ]
    plain = pb.explain(net, arrays["x"], target=arrays["target"], method=pb.IntegratedGradients(steps=50))
    assert largest(plain.diagnostics["gap"], plain.values.flatten(1).sum(1) - change) < 1e-14
    # the spec's 50-step deltas of this net are 5e-4 and 3e-4
    assert 1e-4 < float(plain.diagnostics["gap"].abs().max()) < 6e-4
    method = pb.IntegratedGradients(tol=2e-4, max_steps=6561)
    refined = pb.explain(net, arrays["x"], target=arrays["target"], method=method)
    assert refined.diagnostics["converged"].all()
    gap, scale = refined.diagnostics["gap"].abs(), refined.values.abs().flatten(1).sum(1)
    assert bool((gap <= 2e-4 * scale).all())
    assert bool((gap <= 1e-3 * change.abs()).all())


def test_tolerance_spends_evaluations_where_they_are_needed() -> None:
    """A straight and a curved score in one batch: the straight one stops at five nodes, the other goes on."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()

    def model(z: Tensor) -> Tensor:
        return (2 * z[:, :1] + torch.sin(20 * z[:, 1:])) + 0.1 * z[:, 1:]

    found = pb.explain(model, x, target=0, method=pb.IntegratedGradients(tol=1e-3))
    straight, curved = found.diagnostics["evaluations"].tolist()
    assert straight == 5
    assert curved > 33
    assert found.diagnostics["converged"].tolist() == [True, True]
    expected = torch.tensor([[2.0, 0.0], [0.0, float(np.sin(20)) + 0.1]]).double()
    assert largest(found.values, expected) < 2e-3
    short = pb.explain(model, x, target=0, method=pb.IntegratedGradients(tol=1e-3, max_steps=9))
    assert short.diagnostics["converged"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": 0}, "steps is a whole number, at least 1; got 0"),
        ({"steps": True}, "got True"),
        (
            {"quadrature": "simpson"},
            "quadrature 'simpson' is unknown. Choose one of midpoint, gausslegendre, left, right",
        ),
        ({"tol": 1.5}, "tol is a relative error between 0 and 1, got 1.5"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, object], text: str) -> None:
    with pytest.raises(MethodError, match=text):
        pb.IntegratedGradients(**settings)  # type: ignore[arg-type]
