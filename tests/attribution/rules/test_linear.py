"""Linear rules against their definitions term by term, their limits and axioms, in every spelling of a linear map."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pullback.attribution.rules.linear import AlphaBeta, Epsilon, Gamma, ZPlus
from pullback.core.errors import MethodError
from pullback.core.overrides import overrides
from tests.attribution.rules.linear_reference import (
    coefficient,
    dense_matrix,
    draws,
    reference,
    relevance,
)

KINDS: dict[str, Any] = {"epsilon": Epsilon, "z_plus": ZPlus, "alpha_beta": AlphaBeta, "gamma": Gamma}
# weight shape, input shape without batch, bias length, the call
LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, Callable[..., Tensor]]] = {
    "linear": ((4, 6), (6,), 4, F.linear),
    "linear_tokens": ((4, 3), (2, 3), 4, F.linear),
    "addmm": ((6, 4), (6,), 4, lambda x, w, b: x @ w if b is None else torch.addmm(b, x, w)),
    "addmm_scaled": (
        (6, 4),
        (6,),
        4,
        lambda x, w, b: 0.5 * (x @ w) if b is None else torch.addmm(b / -2, x, w, beta=-2, alpha=0.5),
    ),
    "conv1d": ((4, 1, 3), (2, 5), 4, lambda x, w, b: F.conv1d(x, w, b, 2, 1, groups=2)),
    "conv2d": ((3, 2, 2, 3), (2, 4, 4), 3, lambda x, w, b: F.conv2d(x, w, b, padding="same")),
    "conv2d_dilated": ((2, 2, 2, 2), (2, 4, 4), 2, lambda x, w, b: F.conv2d(x, w, b, dilation=2)),
    "conv3d": ((2, 1, 2, 2, 2), (1, 3, 3, 2), 2, lambda x, w, b: F.conv3d(x, w, b, (1, 2, 1))),
    "conv_transpose1d": ((2, 3, 3), (2, 3), 3, lambda x, w, b: F.conv_transpose1d(x, w, b, 2, 1, 1)),
    "conv_transpose2d": (
        (2, 2, 2, 2),
        (2, 2, 2),
        4,
        lambda x, w, b: F.conv_transpose2d(x, w, b, groups=2),
    ),
    "conv_transpose3d": ((1, 2, 2, 2, 1), (1, 2, 2, 2), 2, F.conv_transpose3d),
    "convolution": (
        (3, 2, 2, 2),
        (2, 3, 3),
        3,
        lambda x, w, b: torch.convolution(x, w, b, (1, 1), (0, 0), (1, 1), False, (0, 0), 1),
    ),
    "aten": ((3, 2, 2), (2, 4), 3, lambda x, w, b: torch.ops.aten.conv1d.default(x, w, b)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_definition(layer: str, kind: str, bias: bool) -> None:
    """R_j from loops over all j and k; both sides round in float64, quotients near zero cost three digits."""
    shape, inputs, outputs, call = LAYERS[layer]
    w, b, x = draws(*shape, seed=1), draws(outputs, seed=2), draws(2, *inputs, seed=3)
    x[0].flatten()[0] = 0.0
    rule = KINDS[kind](bias=bias)
    matrix = dense_matrix(lambda unit: call(unit, w, None), inputs)
    value = call(x, w, b)
    offset = (value - call(x, w, None))[0].flatten()
    outgoing = draws(*value.shape, seed=4)
    found = relevance(lambda z: call(z, w, b), x, outgoing, [rule])
    for row in range(2):
        expected = reference(kind, matrix, x[row].flatten(), offset, outgoing[row].flatten(), bias)
        torch.testing.assert_close(found[row].flatten(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["matmul", "right", "bmm", "mm_right"])
def test_products_with_a_constant(kind: str, name: str) -> None:
    """Whichever side is live, and with a batch of weights: the definition, one example at a time."""
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "matmul": lambda z: z @ draws(3, 4, seed=1),
        "right": lambda z: torch.matmul(draws(5, 2, seed=1), z),
        "bmm": lambda z: torch.bmm(draws(1, 5, 2, seed=1).expand(len(z), -1, -1), z),
        "mm_right": lambda z: torch.mm(draws(5, 2, seed=1), z[0])[None],
    }
    call, x = calls[name], draws(1, 2, 3, seed=3)
    outgoing = draws(*call(x).shape, seed=4)
    expected = reference(kind, dense_matrix(call, (2, 3)), x.flatten(), None, outgoing.flatten(), True)
    found = relevance(call, x, outgoing, [KINDS[kind]()])
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-11, atol=1e-12)


def layer() -> Any:
    conv = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect", dtype=torch.float64).requires_grad_(False)
    conv.weight.copy_(draws(4, 2, 3, 3, seed=1))
    conv.bias.copy_(draws(4, seed=2))
    return conv


@pytest.mark.parametrize("rule", [ZPlus(bias=False, epsilon=0), Gamma(bias=False, epsilon=0)])
def test_without_the_bias_relevance_is_conserved(rule: Any) -> None:
    x, outgoing = draws(3, 2, 5, 5, seed=3), draws(3, 4, 5, 5, seed=4)
    found = relevance(layer(), x, outgoing, [rule]).sum((1, 2, 3))
    torch.testing.assert_close(found, (layer()(x) * outgoing).sum((1, 2, 3)), rtol=1e-9, atol=0)


def test_the_bias_absorbs_its_share() -> None:
    """One input 3, weight 2, bias 4: z+ gives 6/10 of R = 10 to the input, all of it without the bias."""
    call = lambda z: F.linear(z, torch.tensor([[2.0]]), torch.tensor([4.0]))  # noqa: E731
    x, one = torch.tensor([[3.0]]), torch.ones(1, 1)
    for kind in (Epsilon, ZPlus, Gamma):
        assert relevance(call, x, one, [kind(epsilon=0)]).item() == pytest.approx(6)
        assert relevance(call, x, one, [kind(epsilon=0, bias=False)]).item() == pytest.approx(10)


def test_limits() -> None:
    """ε → 0 is the gradient, γ = 0 is ε, α = 1 is z+, γ → ∞ is z+ where y ≥ 0."""
    conv, x, outgoing = layer(), draws(2, 2, 5, 5, seed=3), draws(2, 4, 5, 5, seed=4)
    run = lambda *rules: coefficient(conv, x, outgoing, rules)  # noqa: E731
    assert torch.equal(run(Epsilon(0.0)), run())
    torch.testing.assert_close(run(Epsilon(1e-12)), run(), rtol=0, atol=1e-8)
    assert (run(Epsilon(0.1)) - run()).abs().max() > 1e-2
    torch.testing.assert_close(run(Gamma(0.0)), run(Epsilon()), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(run(AlphaBeta(1.0, 0.0)), run(ZPlus()), rtol=1e-12, atol=1e-12)
    outgoing = outgoing * (conv(x) > 0.5)
    torch.testing.assert_close(run(Gamma(1e9)), run(ZPlus()), rtol=1e-5, atol=1e-7)


def test_epsilon_zero_at_zero_output_is_the_gradient() -> None:
    x, w = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
    call = lambda z: F.linear(z, w)  # noqa: E731
    assert torch.equal(coefficient(call, x, torch.ones(1, 1), [Epsilon(0.0)]), w)
    for rule in (Epsilon(), ZPlus(), AlphaBeta(), Gamma()):  # 0/0: nobody contributed, nobody receives
        assert torch.equal(coefficient(call, x, torch.ones(1, 1), [rule]), torch.zeros(1, 2))


def test_an_input_of_zero_has_the_coefficient_of_a_small_positive_one() -> None:
    """y = 2 x_1 + 4 x_2 - x_3 at (0, 1, 0): z+ = 4 and c = w+ y / z+."""
    w, x = torch.tensor([[2.0, 4.0, -1.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    found = coefficient(lambda z: F.linear(z, w), x, torch.ones(1, 1), [ZPlus(0.0)])
    assert torch.equal(found, torch.tensor([[2.0, 4.0, 0.0]]))


@pytest.mark.parametrize("rule", [Epsilon(), ZPlus(), AlphaBeta(), Gamma()])
def test_forward_is_native_and_a_batch_is_its_rows(rule: Any) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        conv = layer().to(dtype)
        x = draws(3, 2, 5, 5, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
        with overrides(conv, [rule]) as coverage:
            assert torch.equal(conv(x), conv(x.detach()))
        assert coverage.covered == {("conv2d", "", repr(rule)): 1}
    conv, x, outgoing = layer(), draws(3, 2, 5, 5), draws(3, 4, 5, 5, seed=4)
    rows = [coefficient(conv, x[i : i + 1], outgoing[i : i + 1], [rule]) for i in range(3)]
    torch.testing.assert_close(
        coefficient(conv, x, outgoing, [rule]), torch.cat(rows), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("rule", [Epsilon(), ZPlus(), AlphaBeta(), Gamma()])
def test_lower_precision_agrees_with_float64(rule: Any) -> None:
    """Positive inputs and outputs far from zero: only the rounding of the sums is left."""
    w, x = draws(4, 16).abs() - 0.2, draws(2, 16, seed=3).abs()
    exact = coefficient(lambda z: F.linear(z, w), x, torch.ones(2, 4), [rule])
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        low = w.to(dtype)
        found = coefficient(partial(torch.matmul, other=low.T), x.to(dtype), torch.ones(2, 4), [rule])
        assert found.dtype == dtype
        assert (found.double() - exact).norm() < tolerance * exact.norm()


def test_autocast() -> None:
    w, x = draws(4, 16, dtype=torch.float32), draws(2, 16, seed=3, dtype=torch.float32)
    exact = coefficient(lambda z: F.linear(z, w), x, torch.ones(2, 4), [ZPlus()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = coefficient(lambda z: F.linear(z, w), x, torch.ones(2, 4), [ZPlus()])
        half = coefficient(lambda z: F.linear(z, w), x.bfloat16(), torch.ones(2, 4), [ZPlus()])
    assert (found - exact).norm() < 1e-5 * exact.norm()  # relevance is computed in float32
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() < 0.1 * exact.norm()


def test_computed_weights_and_constant_inputs_are_passed_on() -> None:
    x = draws(2, 3)
    with overrides(nn.Identity(), [ZPlus()]) as coverage:
        live = x.clone().requires_grad_()
        F.linear(live, live)
        F.linear(x, live)
        torch.mm(live, live.T)
    assert not coverage.covered


def test_a_live_bias_is_a_sum() -> None:
    """addmm(r, x, W) is W x + r in two steps."""
    x, w, r = draws(2, 3), draws(3, 4, seed=1), draws(2, 4, seed=2)
    outgoing = draws(2, 4, seed=4)
    fused = lambda z: torch.addmm(r * z[:, :1], z, w, beta=2, alpha=3)  # noqa: E731
    apart = lambda z: z @ (3 * w) + 2 * r * z[:, :1]  # noqa: E731
    torch.testing.assert_close(
        coefficient(fused, x, outgoing, [ZPlus()]), coefficient(apart, x, outgoing, [ZPlus()])
    )
    leaf = x.clone().requires_grad_()
    with overrides(nn.Identity(), [ZPlus()]):
        assert torch.equal(fused(leaf), fused(x))


def test_applies_to() -> None:
    assert "linear" not in ZPlus(applies_to="convolution").operations
    assert Epsilon(applies_to="dense").operations | Epsilon(applies_to="convolution").operations == (
        Epsilon().operations
    )
    assert "conv2d" in ZPlus(applies_to="convolution").operations


def test_in_place_activation_after_the_layer() -> None:
    """y is not kept, so ReLU may overwrite it."""
    conv, x, outgoing = layer(), draws(2, 2, 5, 5), draws(2, 4, 5, 5, seed=4)
    plain = coefficient(nn.Sequential(conv, nn.ReLU()), x, outgoing, [ZPlus()])
    assert torch.equal(coefficient(nn.Sequential(conv, nn.ReLU(inplace=True)), x, outgoing, [ZPlus()]), plain)


@pytest.mark.parametrize("rule", [Epsilon(), ZPlus(), AlphaBeta(), Gamma()])
def test_function_transforms(rule: Any) -> None:
    conv, x, outgoing = layer(), draws(3, 2, 5, 5), draws(4, 5, 5, seed=4)
    expected = coefficient(conv, x, outgoing.expand(3, -1, -1, -1), [rule])

    def score(row: Tensor) -> Tensor:
        total: Tensor = (conv(row) * outgoing).sum()
        return total

    with overrides(conv, [rule]):
        found = torch.func.vmap(torch.func.grad(score))(x)
        outside = torch.func.grad(lambda z: torch.func.vmap(score)(z).sum())(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(outside, expected, rtol=1e-10, atol=1e-12)


def test_double_backward_is_the_derivative_of_the_coefficient() -> None:
    """c_j = w⁺_j y(x)/z⁺(x) depends on x."""
    w, x = draws(3, 4, seed=1), draws(4).requires_grad_()

    def first(z: Tensor) -> Tensor:
        with overrides(nn.Identity(), [ZPlus(0.1)]):
            return torch.autograd.grad(F.linear(z[None], w)[0, 0], z, create_graph=True)[0]

    (second,) = torch.autograd.grad(first(x)[0], x)
    step = 1e-6 * torch.eye(4, dtype=torch.float64)
    numeric = torch.stack([(first(x + d)[0] - first(x - d)[0]) / 2e-6 for d in step]).detach()
    torch.testing.assert_close(second, numeric, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: AlphaBeta(2.0, 2.0), r"AlphaBeta\(alpha=2.0, beta=2.0\): expected alpha - beta = 1"),
        (lambda: AlphaBeta(0.0, -1.0), "beta >= 0"),
        (lambda: Gamma(-1.0), "expected gamma >= 0"),
        (lambda: Gamma(float("nan")), "expected gamma >= 0"),
        (lambda: Epsilon(-1e-6), r"Epsilon\(epsilon=-1e-06\): expected epsilon >= 0"),
        (
            lambda: cast(Any, ZPlus)(applies_to="conv"),
            r"applies_to='conv'\): expected \"all\", \"convolution\" or \"dense\"",
        ),
    ],
)
def test_errors(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(MethodError, match=text):
        make()
