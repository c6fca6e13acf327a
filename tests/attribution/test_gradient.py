"""Gradient and input times gradient against finite differences, Euler's theorem and hand formulas."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pullback as pb
from tests.golden_net import example, fill, largest, tiny_cnn, tiny_mlp


def test_gradient_is_the_slope_of_the_score() -> None:
    """Central differences, h² error: 1e-5 squared and rounding 1e-16 / 1e-5."""
    x, step = example(2, 6), 1e-5
    gradient = pb.explain(tiny_mlp(), x, target=2, method=pb.Gradient()).values
    with torch.no_grad():
        for entry in range(6):
            move = torch.zeros(6).double()
            move[entry] = step
            slope = (tiny_mlp()(x + move) - tiny_mlp()(x - move))[:, 2] / (2 * step)
            assert largest(gradient[:, entry], slope) < 1e-9


def test_gradient_at_a_layer_is_the_chain_rules_inner_factor() -> None:
    """With a first layer W x + b, the gradient at the input is Wᵀ times the gradient at its output."""
    net, x = tiny_mlp(), example(3, 6)
    outer = pb.explain(net, x, target=1, method="gradient").values
    inner = pb.explain(net, x, target=1, site="0", method="gradient").values
    assert largest(outer, inner @ net[0].weight.detach()) < 1e-15


def test_input_times_gradient_sums_to_the_score_without_biases() -> None:
    """Euler's theorem: a ReLU net without biases is homogeneous of degree one."""
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    fill(net)
    x = example(4, 6)
    found = pb.explain(net, x, target=1, method=pb.InputXGradient())
    with torch.no_grad():
        assert largest(found.values.sum(1), net(x)[:, 1]) < 1e-15
    gradient = pb.explain(net, x, target=1, method="saliency").values
    assert torch.equal(found.values, x * gradient)


def test_complex_values_use_the_conjugate() -> None:
    """For f = Re(w z), the first-order share of z is Re(w z), not Re(conj(w) z)."""
    w, z = (
        torch.tensor([1 + 2j, -0.5 + 1j]).to(torch.complex128),
        torch.tensor([[0.3 - 1j, 2 + 0.5j]]).to(torch.complex128),
    )

    def score(value: Tensor) -> Tensor:
        return (w * value).real.sum(1, keepdim=True)

    found = pb.explain(score, z, target=0, method=pb.InputXGradient()).values
    assert found.dtype == torch.float64
    assert largest(found, (w * z).real) < 1e-15
    assert largest((w.conj() * z).real, (w * z).real) > 0.1


def test_a_leaf_the_score_ignores_gets_zero() -> None:
    class First(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a.square() + 0 * b.sum()

    a, b = example(2, 1), example(2, 3)
    found = pb.explain(First(), (a, b), target=0, method="gradient").values
    assert isinstance(found, dict)
    assert largest(found["a"], 2 * a) < 1e-15
    assert torch.equal(found["b"], torch.zeros_like(b))


def test_one_evaluation_per_example() -> None:
    found = pb.explain(tiny_cnn(), example(2, 3, 8, 8), target=0, method="gradient")
    assert found.diagnostics["evaluations"].tolist() == [1, 1]
