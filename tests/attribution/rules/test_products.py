"""The half rule and powers: m factors share alike, constants and additive parts stay what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pullback.attribution.rules.presets import CP_LRP, RELP
from pullback.attribution.rules.products import HalfRule, PowerRule
from tests.attribution.rules.propagation import coefficients, random, relevance

TWO: dict[str, Any] = {
    "mul": (lambda a, b: a * b, (3, 4), (3, 4)),
    "broadcast": (lambda a, b: a * b, (3, 4), (4,)),
    "in_place": (lambda a, b: (a * 1).mul_(b), (3, 4), (3, 4)),
    "matmul": (torch.matmul, (3, 4), (4, 2)),
    "operator": (lambda a, b: a @ b, (2, 3, 4), (4, 2)),
    "bmm": (torch.bmm, (2, 3, 4), (2, 4, 2)),
    "einsum": (lambda a, b: torch.einsum("ij,jk->ik", a, b), (3, 4), (4, 2)),
    "einsum_list": (lambda a, b: torch.einsum("ij,jk->ik", [a, b]), (3, 4), (4, 2)),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 1), (3, 4), (4, 2)),
    "outer": (torch.outer, (3,), (4,)),
    "linear": (F.linear, (3, 4), (2, 4)),
    "conv1d": (F.conv1d, (2, 3, 7), (4, 3, 2)),
    "baddbmm": (lambda a, b: torch.baddbmm(torch.zeros(2, 3, 2).double(), a, b), (2, 3, 4), (2, 4, 2)),
    "baddbmm_keywords": (
        lambda a, b: torch.zeros(2, 3, 2).double().baddbmm(batch1=a, batch2=b, beta=0.5, alpha=0.3),
        (2, 3, 4),
        (2, 4, 2),
    ),
    "addcmul": (lambda a, b: torch.addcmul(torch.zeros(3, 4).double(), a, b, value=2), (3, 4), (3, 4)),
}


@pytest.mark.parametrize("name", TWO)
def test_two_signals_get_half_each(name: str) -> None:
    function, left, right = TWO[name]
    a, b = random(*left, seed=1), random(*right, seed=2)
    y = function(a, b)
    weight = random(*y.shape, seed=3)
    of_a, of_b = coefficients(function, (HalfRule(),), a, b, weight=weight)
    half = (y * weight).sum() / 2
    assert (a * of_a).sum().item() == pytest.approx(half.item(), abs=1e-13)
    assert (b * of_b).sum().item() == pytest.approx(half.item(), abs=1e-13)


@pytest.mark.parametrize("name", TWO)
def test_a_constant_factor_is_linear(name: str) -> None:
    function, left, right = TWO[name]
    a, b = random(*left, seed=1), random(*right, seed=2)
    (found,) = coefficients(lambda a: function(a, b), (HalfRule(),), a)
    x = a.clone().requires_grad_()
    assert torch.equal(found, torch.autograd.grad(function(x, b).sum(), x)[0])


def test_three_signals_get_a_third_each() -> None:
    a, b, c = random(3, 4), random(4, 5, seed=1), random(5, 2, seed=2)
    text = "ij,jk,kl->il"
    third = torch.einsum(text, a, b, c).sum() / 3
    for value, found in zip(
        (a, b, c), coefficients(lambda *abc: torch.einsum(text, *abc), (HalfRule(),), a, b, c), strict=True
    ):
        assert (value * found).sum().item() == pytest.approx(third.item(), rel=1e-12)
    x = random(5)
    (found,) = coefficients(torch.prod, (HalfRule(),), x)
    torch.testing.assert_close(x * found, (x.prod() / 5).expand(5), rtol=1e-12, atol=0)


def test_what_is_added_keeps_its_own_relevance() -> None:
    added, a, b = random(3, 2), random(3, 4, seed=1), random(4, 2, seed=2)
    of_added, of_a, of_b = coefficients(torch.addmm, (HalfRule(),), added, a, b)
    assert torch.equal(of_added, torch.ones_like(added))
    product = (a @ b).sum().item()
    assert (a * of_a).sum().item() == pytest.approx(product / 2, rel=1e-12)
    assert (b * of_b).sum().item() == pytest.approx(product / 2, rel=1e-12)


def test_squares_are_one_thing_however_written() -> None:
    x = random(6)
    written = [lambda x: x * x, lambda x: x**2, torch.square, lambda x: x.pow(2), lambda x: x**2.0]
    for function in written:
        torch.testing.assert_close(coefficients(function, RELP, x)[0], x, rtol=1e-14, atol=0)
    for power in (1.0, 1.5, 3):
        y = random(6).abs()
        assert relevance(lambda y: y**power, (PowerRule(),), y).item() == pytest.approx(  # noqa: B023
            (y**power).sum().item(), rel=1e-12
        )


@pytest.mark.parametrize(
    "gate", [lambda x: x**-0.5, torch.sqrt, torch.rsqrt, torch.exp, lambda x: 2**x, torch.sigmoid, torch.erf]
)
def test_gates_are_constant(gate: Any) -> None:
    x, y = random(4).abs(), random(4, seed=1)
    of_x, of_y = coefficients(lambda x, y: gate(x) * y, RELP, x, y)
    assert not of_x.any()
    assert torch.equal(of_y, gate(x))


def test_denominators_interpolations_and_matrices_are_constant() -> None:
    x, y = random(4), random(4, seed=1).abs() + 1
    of_x, of_y = coefficients(lambda x, y: x / y, RELP, x, y)
    assert torch.equal(of_x, 1 / y)
    assert not of_y.any()
    of_x, of_y, of_w = coefficients(torch.lerp, RELP, x, y, torch.sigmoid(x))
    assert not of_w.any()
    torch.testing.assert_close(of_x, 1 - torch.sigmoid(x), rtol=1e-13, atol=0)
    matrix = torch.tril(random(4, 4)) + 3 * torch.eye(4).double()
    of_matrix, of_b = coefficients(
        lambda a, b: torch.linalg.solve_triangular(a, b, upper=False), RELP, matrix, x[:, None]
    )
    assert not of_matrix.any()
    assert of_b.any()


def test_gated_products_give_all_to_the_signal_under_cp_lrp() -> None:
    a, b = random(5), random(5, seed=1)
    of_gate, of_signal = coefficients(lambda a, b: F.silu(a) * b, CP_LRP, a, b)
    assert not of_gate.any()
    assert torch.equal(of_signal, F.silu(a))
    of_gate, of_signal = coefficients(lambda a, b: F.silu(a) * b, RELP, a, b)
    torch.testing.assert_close(a * of_gate, F.silu(a) * b / 2, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(b * of_signal, F.silu(a) * b / 2, rtol=1e-12, atol=1e-15)


def test_glu_conserves() -> None:
    x = random(3, 8)
    assert relevance(lambda x: F.glu(x, -1), RELP, x).item() == pytest.approx(
        F.glu(x, -1).sum().item(), rel=1e-12
    )


@pytest.mark.parametrize("spelling", ["functional", "torch"])
def test_a_bag_of_computed_embeddings_and_computed_weights_is_a_product(spelling: str) -> None:
    """Each takes half; with constant weights the bag is linear and all goes to the table."""
    index, table, weights = torch.tensor([[0, 2, 1], [3, 3, 0]]), random(4, 5), random(2, 3, seed=1)

    def bag(table: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if spelling == "functional":
            return F.embedding_bag(index, table, per_sample_weights=weights, mode="sum")
        offsets = torch.tensor([0, 3])
        return torch.embedding_bag(table, index.flatten(), offsets, False, 0, False, weights.flatten())[0]

    half = bag(table, weights).sum().item() / 2
    of_table, of_weights = coefficients(bag, RELP, table, weights)
    assert (table * of_table).sum().item() == pytest.approx(half, rel=1e-12)
    assert (weights * of_weights).sum().item() == pytest.approx(half, rel=1e-12)
    (alone,) = coefficients(lambda table: bag(table, weights), RELP, table)
    assert torch.equal(alone, 2 * of_table)
