"""The audit names every nonlinear step that no rule saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pullback.core.audit import Uncovered, audit, require_covered
from pullback.core.errors import CoverageError
from pullback.core.overrides import Operation, overrides, with_gradient_of
from tests.core.rules import DetachQueries, Scaled, points


@dataclass(frozen=True)
class Surrogate:
    """A rule whose surrogate is itself full of nonlinear operations."""

    operations: tuple[str, ...]
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        x = operation.args[0]
        return with_gradient_of(operation.value(), x.sin() * x.cos() + x.logsumexp(0))


@dataclass(frozen=True)
class Lean:
    operations: tuple[str, ...] = ("exp",)
    within: str | None = None
    preserves_gradient: bool = True

    def __call__(self, operation: Operation) -> Any:
        return operation.value()


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 3 * grads[0] * ctx.saved_tensors[0] ** 2


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * x


class Wrapped(nn.Module):
    def __init__(self, run: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = Caller(run)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.inner(x.reshape(6, 4)) * 2.0, (0, 1)).mean(-1, keepdim=True) / 3


class Caller(nn.Module):
    def __init__(self, run: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        result = self.run(x)
        return result if isinstance(result, Tensor) else result[0]


def _exponential_of_a_view(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :2].exp_()
    return y


def _audit(run: Callable[[Tensor], Any], rules: list[Any] | None = None) -> tuple[Uncovered, ...]:
    module = Wrapped(run)
    with overrides(module, rules or []) as coverage:
        for _ in range(3):  # TorchScript optimises from the second call on
            output = module(points(2, 3, 4))
        return audit(output, coverage)


NAMED: dict[str, tuple[Callable[[Tensor], Any], tuple[str, str]]] = {
    "function": (Cube.apply, ("Cube", "function")),
    "lstm": (nn.LSTM(4, 4, dtype=torch.float64), ("lstm", "operation")),
    "gru": (nn.GRU(4, 4, dtype=torch.float64), ("gru", "operation")),
    "checkpoint": (
        lambda x: checkpoint(torch.exp, x, use_reentrant=True),
        ("CheckpointFunction", "checkpoint"),
    ),
    "gelu": (F.gelu, ("gelu", "operation")),
    "softmax": (lambda x: x.softmax(-1), ("softmax", "operation")),
    "norm": (lambda x: x / F.normalize(x).detach() + x.norm(), ("norm", "operation")),
    "mul": (lambda x: x * x, ("mul", "operation")),
    "matmul": (lambda x: x @ x.T @ x.detach(), ("matmul", "operation")),
    "div": (lambda x: 1 / (x + 5), ("div", "operation")),
    "in place": (lambda x: x.clone().mul_(x), ("mul", "operation")),
    "view in place": (lambda x: _exponential_of_a_view(x), ("exp", "operation")),
    "layer_norm": (lambda x: F.layer_norm(x, (4,)), ("layer_norm", "operation")),
}


@pytest.mark.parametrize("case", NAMED)
def test_audit_names(case: str) -> None:
    run, (operation, kind) = NAMED[case]
    assert _audit(run) == (
        Uncovered(operation, "inner" if not isinstance(run, nn.RNNBase) else "inner.run", 1, kind),
    )


def test_audit_names_scripts() -> None:
    assert {(entry.module_path, entry.operation) for entry in _audit(scripted)} <= {
        ("inner", name)
        for name in ("sigmoid", "mul", "torch::jit::(anonymous namespace)::DifferentiableGraphBackward")
    }
    assert _audit(scripted)


CONSTANT = torch.full((4, 4), 2.0, dtype=torch.float64)
LINEAR_RUNS: dict[str, Callable[[Tensor], Tensor]] = {
    "products with constants": lambda x: (x * 2) @ CONSTANT / 3 - x.mul(CONSTANT[0]),
    "views": lambda x: torch.stack(x.view(2, 3, 4).transpose(0, 1)[..., ::2].unbind(0)).flatten(1).view(6, 2),
    "writes": lambda x: x.clone().index_fill_(0, torch.tensor([1]), 3.0).mul_(2).add_(x),
    "writes in views": lambda x: _written(x),
    "convolution": lambda x: F.avg_pool1d(
        F.conv1d(x[None], CONSTANT.expand(4, 4)[:, None].expand(4, 6, 4)), 1
    )[0],
    "batch norm": lambda x: F.batch_norm(x, CONSTANT[0], CONSTANT[0]),
    "interpolation": lambda x: F.interpolate(x[None], scale_factor=2.0)[0],
    "fourier": lambda x: torch.fft.irfft(torch.fft.rfft(x)),
    "einsum": lambda x: torch.einsum("ij,jk->ik", x, CONSTANT),
    "where": lambda x: torch.where(CONSTANT[0] > 1, x, 0.0).masked_fill(x > 9, 1.0).cumsum(0),
    "cast": lambda x: x.float().double().contiguous().expand(6, 4),
    "checkpoint": lambda x: checkpoint(lambda y: y * 2, x, use_reentrant=False),
}


def _written(x: Tensor) -> Tensor:
    y = torch.zeros(6, 4, dtype=x.dtype)
    y[:, 1:] = x[:, 1:]
    y[0] += 2 * x[1]
    return y


@pytest.mark.parametrize("case", LINEAR_RUNS)
def test_linear_steps_are_never_named(case: str) -> None:
    assert _audit(LINEAR_RUNS[case]) == ()


def test_what_a_rule_made_is_not_named() -> None:
    names = ("exp", "mul", "gelu", "layer_norm")
    rules = [Surrogate(names), Scaled(slope=0.5), DetachQueries()]
    run = lambda x: F.layer_norm(F.gelu(x.clone().relu_() * x).exp(), (4,))  # noqa: E731
    assert _audit(run, rules) == ()
    assert _audit(run, rules[1:2])[0].operation in names
    assert len(_audit(run, rules[1:2])) == 4
    lean = _audit(torch.exp, [Lean()])
    assert lean == (Uncovered("exp", "inner", 1),)


def test_require_covered() -> None:
    require_covered((), "LRP()")
    found = _audit(lambda x: Cube.apply(x).exp() + x.exp())
    with pytest.raises(CoverageError) as error:
        require_covered(found, "LRP()")
    text = str(error.value)
    assert "no rule of LRP() covers exp in module 'inner', 2 calls; Cube (custom autograd.Function" in text
    assert text.endswith('Add a rule, or pass uncovered="gradient".')


def test_compiled_code_is_named_and_force_eager_is_the_way_out() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: torch.relu(z).exp(), backend="aot_eager")
    x = points(3)
    rules = [Scaled(("relu", "exp"))]

    def uncovered() -> tuple[Uncovered, ...]:
        with overrides(nn.Identity(), rules) as coverage:
            return audit(compiled(x), coverage)

    assert {entry.kind for entry in uncovered()} <= {"compiled"}
    with torch.compiler.set_stance("force_eager"):
        assert uncovered() == ()
