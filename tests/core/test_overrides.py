"""Rules replace derivatives, never values: every spelling, in place, errors, order of rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.errors import MethodError
from pullback.core.overrides import PASS, Operation, overrides, with_gradient_of
from pullback.core.spellings import canonical
from tests.core.rules import Detach, Scaled, points, ruled_gradient

Run = Callable[[Tensor], Tensor]


def _in_place(function: Callable[[Tensor], Any]) -> Run:
    def run(x: Tensor) -> Tensor:
        y = x.clone()
        function(y)
        return y

    return run


SPELLINGS: dict[str, Run] = {
    "F.relu": F.relu,
    "F.relu keyword": lambda x: F.relu(input=x),
    "F.relu inplace=": _in_place(lambda x: F.relu(x, inplace=True)),
    "F.relu inplace positional": _in_place(lambda x: F.relu(x, True)),
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU inplace": _in_place(nn.ReLU(inplace=True)),
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": _in_place(lambda x: x.relu_()),
    "torch.relu": torch.relu,
    "torch.relu keyword": lambda x: torch.relu(input=x),
    "torch.relu_": _in_place(torch.relu_),
    "aten packet": torch.ops.aten.relu,
    "aten overload": torch.ops.aten.relu.default,
    "aten keyword": lambda x: torch.ops.aten.relu(self=x),
    "aten in place": _in_place(torch.ops.aten.relu_.default),
    "view in place": _in_place(lambda x: x.view(-1).relu_()),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_takes_the_rule(spelling: str) -> None:
    x, weight = points(3, 4), points(3, 4, seed=1).detach()
    run = SPELLINGS[spelling]
    assert torch.equal(ruled_gradient(run, x, weight, [Scaled(slope=0.3)]), 0.3 * weight)
    assert torch.equal(ruled_gradient(run, x, weight, []), weight * (x > 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_values_are_untouched(spelling: str, dtype: torch.dtype) -> None:
    x = points(3, 4, dtype=dtype)
    plain = SPELLINGS[spelling](x)
    with overrides(nn.Identity(), [Scaled()]):
        ruled = SPELLINGS[spelling](x)
    assert torch.equal(plain, ruled)
    assert plain.dtype == ruled.dtype


def test_nonfinite_values_are_untouched() -> None:
    x = torch.tensor([float("inf"), float("-inf"), 1.0], requires_grad=True)
    assert torch.equal(with_gradient_of(x.exp(), 2 * x), x.exp())


CALLS = {
    "x + 2": ("add", lambda x: x + 2, lambda x: x + 2),
    "2 + x": ("add", lambda x: 2 + x, lambda x: x + 2),
    "x += 2": ("add", _in_place(lambda x: x.__iadd__(2)), lambda x: x + 2),
    "x - 2": ("sub", lambda x: x - 2, lambda x: x - 2),
    "2 * x": ("mul", lambda x: 2 * x, lambda x: 2 * x),
    "torch.multiply": ("mul", lambda x: torch.multiply(x, other=torch.tensor(2.0)), lambda x: 2 * x),
    "x / 3": ("div", lambda x: x / 3, lambda x: x / 3),
    "x /= 3": ("div", _in_place(lambda x: x.__itruediv__(3)), lambda x: x / 3),
    "x ** 2": ("pow", lambda x: x**2, lambda x: x * x),
    "x **= 2": ("pow", _in_place(lambda x: x.pow_(2)), lambda x: x * x),
    "x @ c": ("matmul", lambda x: x @ torch.ones(4, 4, dtype=x.dtype), lambda x: x.sum(1, True).expand(3, 4)),
    "special.expit": ("sigmoid", torch.special.expit, torch.sigmoid),
    "cat": ("cat", lambda x: torch.cat([x[:1], x[1:]]), lambda x: x),
    "cat keyword": ("cat", lambda x: torch.cat(tensors=(x[:1], x[1:])), lambda x: x),
    "aten.gelu": ("gelu", lambda x: torch.ops.aten.gelu.default(x, approximate="tanh"), None),
    "F.softplus": ("softplus", lambda x: F.softplus(x, beta=2), None),
    "F.max_pool1d": ("max_pool1d", lambda x: F.max_pool1d(x, 2), None),
    "F.silu in place": ("silu", _in_place(lambda x: F.silu(x, inplace=True)), F.silu),
}


@pytest.mark.parametrize("text", CALLS)
def test_operators_methods_and_lists_reach_their_rule(text: str) -> None:
    name, run, expected = CALLS[text]
    x = points(3, 4)
    with overrides(nn.Identity(), [Detach((name,))]) as coverage:
        y = run(x)
    assert {key[0] for key in coverage.covered} == {name}
    torch.testing.assert_close(y, run(x), rtol=0, atol=0, check_stride=False)
    if expected is not None:
        torch.testing.assert_close(y, expected(x))
    assert not y.requires_grad or "=" in text or "in place" in text
    if y.requires_grad:  # an in-place write of a constant: no derivative is left
        assert not torch.autograd.grad(y.sum(), x)[0].any()


REFLECTED = {"2 - x": lambda x: 2 - x, "2 / x": lambda x: 2 / x, "2 ** x": lambda x: 2**x}


@pytest.mark.parametrize(("text", "run"), REFLECTED.items())
def test_reflected_operators_are_turned_round(text: str, run: Run) -> None:
    seen: list[Operation] = []

    @dataclass(frozen=True)
    class Look:
        operations: tuple[str, ...] = ("sub", "div", "pow")
        within: None = None

        def __call__(self, operation: Operation) -> Any:
            seen.append(operation)
            return operation.value()

    x = points(3)
    with overrides(nn.Identity(), [Look()]):
        y = run(x)
    assert torch.equal(y, run(x))
    assert seen[0].args[0] == 2
    assert seen[0].args[1] is x
    assert torch.equal(torch.rsub(x, 2, alpha=3), canonical(torch.rsub).function(2, x, alpha=3))


def test_in_place_readers_before_and_after() -> None:
    """y = a x; z = y^2; y.relu_(); out = z + y: dout/dx = a (2 a x + s), s the rule's slope."""
    x, constant = points(5), 1.5

    def run(x: Tensor) -> Tensor:
        y = constant * x
        z = y.clone() ** 2
        y.relu_()
        y += z
        return y.mul_(y.detach() * 0 + 1)

    gradient = ruled_gradient(run, x, torch.ones(()), [Scaled(slope=0.3)])
    torch.testing.assert_close(gradient, constant * (2 * constant * x + 0.3).detach())


def test_in_place_product_with_itself() -> None:
    """x.mul_(x) under a rule that saves both operands: the write must not invalidate what was saved."""

    @dataclass(frozen=True)
    class Half:
        operations: tuple[str, ...] = ("mul",)
        within: None = None

        def __call__(self, operation: Operation) -> Any:
            value = operation.value()
            return with_gradient_of(value, value / 2)

    x = points(4)
    gradient = ruled_gradient(
        _in_place(lambda y: y.mul_(y)), x, torch.ones((), dtype=x.dtype).expand(4), [Half()]
    )
    # the test's own weighting is a product too: one more half
    torch.testing.assert_close(gradient, x.detach() / 2)


def test_in_place_errors_are_torchs_own() -> None:
    x = points(3)
    with overrides(nn.Identity(), [Detach(("add",))]), pytest.raises(RuntimeError):
        x.clone().add_(torch.ones(2, 3))
    with overrides(nn.Identity(), [Scaled()]), pytest.raises(RuntimeError, match="leaf"):
        x.relu_()


def test_out_is_refused() -> None:
    x = points(3)
    with (
        overrides(nn.Identity(), [Scaled(("exp",))]),
        pytest.raises(MethodError, match=r"exp\(out=.*without out="),
    ):
        torch.exp(x, out=torch.empty(3))


def test_first_matching_rule_wins_and_pass_falls_through() -> None:
    @dataclass(frozen=True)
    class Nothing:
        operations: tuple[str, ...] = ("relu",)
        within: None = None

        def __call__(self, operation: Operation) -> Any:
            return PASS

    x = points(3)
    weight = torch.ones(3, dtype=x.dtype)
    assert torch.equal(
        ruled_gradient(torch.relu, x, weight, [Scaled(slope=0.2), Scaled(slope=0.7)]), 0.2 * weight
    )
    assert torch.equal(ruled_gradient(torch.relu, x, weight, [Nothing(), Scaled(slope=0.7)]), 0.7 * weight)
    assert torch.equal(ruled_gradient(torch.relu, x, weight, [Nothing()]), (x > 0).double())


class Attention(nn.Module):
    """Attention written by hand, one head."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT / x.shape[-1] ** 0.5).softmax(-1) @ x


def test_detached_softmax_in_hand_written_attention() -> None:
    x = points(2, 5, 4)
    weight = points(2, 5, 4, seed=1).detach()
    probabilities = (x @ x.mT / 2).softmax(-1).detach()
    module = Attention()
    torch.testing.assert_close(
        ruled_gradient(module, x, weight, [Detach()], module), probabilities.mT @ weight
    )


def test_exceptions_leave_no_hook_and_no_mode() -> None:
    @dataclass(frozen=True)
    class Broken:
        operations: tuple[str, ...] = ("relu",)
        within: None = None

        def __call__(self, operation: Operation) -> Any:
            raise RuntimeError("broken rule")

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(RuntimeError, match="broken rule"), overrides(model, [Broken()]):
        model(points(2, 4, dtype=torch.float32))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_hooks_always_called for module in model.modules())
    assert torch._C._len_torch_function_stack() == 0


def test_nested_overrides_ask_the_innermost_first() -> None:
    x = points(3)
    weight = torch.ones(3, dtype=x.dtype)
    with overrides(nn.Identity(), [Scaled(slope=0.2), Scaled(("tanh",), slope=5.0)]) as outer:
        inner = ruled_gradient(torch.relu, x, weight, [Scaled(slope=0.7)])
        passed = ruled_gradient(torch.tanh, x, weight, [Scaled(slope=0.7)])
        after = torch.autograd.grad(torch.relu(x).sum(), x)[0]
    assert torch.equal(inner, 0.7 * weight)
    assert torch.equal(passed, 5.0 * weight)
    assert torch.equal(after, 0.2 * weight)
    assert {key[0]: count for key, count in outer.covered.items()} == {"relu": 1, "tanh": 1}


def test_the_same_context_twice_in_a_thread_is_reentrant() -> None:
    module, x = nn.ReLU(), points(3)
    weight = torch.ones(3, dtype=x.dtype)
    with overrides(module, [Scaled(slope=0.2)]), overrides(module, [Scaled(slope=0.2)]):
        assert torch.equal(ruled_gradient(module, x, weight, [Scaled(slope=0.2)], module), 0.2 * weight)
    assert not module._forward_hooks
