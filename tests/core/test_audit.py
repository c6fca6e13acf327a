"""Coverage says where a rule acted, and the audit names every nonlinear step that no rule saw."""

from __future__ import annotations

import json
import threading
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
from pullback.core.overrides import Operation, overrides, rules_paused, with_gradient_of


def _points(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    draw = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draw.to(dtype).requires_grad_()


@dataclass(frozen=True)
class Scaled:
    """The derivative of the operations is replaced by ``slope`` times the input's."""

    operations: tuple[str, ...] = ("relu",)
    slope: float = 0.5
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        return with_gradient_of(operation.value(), self.slope * operation.args[0])


@dataclass(frozen=True)
class Detach:
    operations: tuple[str, ...] = ("softmax",)
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        return operation.value().detach()


@dataclass(frozen=True)
class DetachQueries:
    operations: tuple[str, ...] = ("scaled_dot_product_attention",)
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        query, key, *rest = operation.args
        return operation.function(query.detach(), key.detach(), *rest, **operation.kwargs)


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


class SquareFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with rules_paused():
            return grads[0] * 2 * ctx.saved_tensors[0], None


@dataclass(frozen=True)
class Square:
    operations: tuple[str, ...] = ("tanh", "mul")
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        return SquareFunction.apply(operation.args[0], operation.value().detach())


def _gradient(
    run: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, rules: list[Any], module: nn.Module
) -> Tensor:
    with overrides(module, rules):
        return torch.autograd.grad((run(x) * weight).sum(), x)[0]


@pytest.mark.parametrize("need_weights", [True, False])
def test_composite_multihead_attention(need_weights: bool) -> None:
    """nn.MultiheadAttention with constant probabilities P: the gradient is sum_h W_v,h' W_o,h' (P_h' g)."""
    attention = (
        nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64).eval().requires_grad_(False)
    )
    x, weight = _points(3, 5, 4), _points(3, 5, 4, seed=1).detach()
    probabilities = attention(x, x, x, average_attn_weights=False)[1].detach()
    value, out = attention.in_proj_weight[8:].view(2, 2, 4), attention.out_proj.weight.view(4, 2, 2)
    expected = torch.einsum("bti,iho,bhts,hoe->bse", weight, out, probabilities, value)
    rules = [Detach(), DetachQueries()]
    run = lambda z: attention(z, z, z, need_weights=need_weights)[0]  # noqa: E731
    torch.testing.assert_close(_gradient(run, x, weight, rules, attention), expected)
    with overrides(attention, rules) as coverage:
        assert torch.equal(run(x), run(x.detach().requires_grad_()))
    name = "softmax" if need_weights else "scaled_dot_product_attention"
    assert {key[:2] for key in coverage.covered} == {(name, "")}


def test_composite_transformer_layer_takes_no_fast_path() -> None:
    layer = (
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dtype=torch.float64)
        .eval()
        .requires_grad_(False)
    )
    x = _points(2, 5, 4)
    plain = layer(x)
    with overrides(layer, [DetachQueries(), Scaled()]) as coverage:
        ruled = layer(x)
    assert torch.equal(plain, ruled)
    assert set(coverage.covered) == {
        ("scaled_dot_product_attention", "self_attn", repr(DetachQueries())),
        ("relu", "", repr(Scaled())),
    }
    assert set(coverage.plain) == {("layer_norm", "norm1"), ("layer_norm", "norm2")}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.act = nn.Linear(4, 4, dtype=torch.float64), nn.ReLU()
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.gate(x)) + x.tanh()


def _network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(Block(), Block(), nn.ReLU())


@pytest.mark.parametrize(
    ("within", "paths"),
    [
        (None, {"0.act", "1.act", "2"}),
        ("Block", {"0.act", "1.act"}),
        ("1", {"1.act"}),
        ("*.act", {"0.act", "1.act"}),
        ("Sequential", {"0.act", "1.act", "2"}),
        ("Nowhere", set()),
    ],
)
def test_within_and_module_paths(within: str | None, paths: set[str]) -> None:
    network = _network()
    with overrides(network, [Scaled(within=within)]) as coverage:
        network(_points(2, 4))
    assert {key[1] for key in coverage.covered} == paths
    assert coverage.plain[("tanh", "0")] == coverage.plain[("tanh", "1")] == 1
    relus = {
        record["module"]: record["rule"] for record in coverage.summary() if record["operation"] == "relu"
    }
    assert {path for path, rule in relus.items() if rule != "gradient"} == paths
    assert json.loads(json.dumps(coverage.summary())) == coverage.summary()


def test_module_paths_survive_an_exception_the_model_catches() -> None:
    class Fallback(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return self[0](x)
            except RuntimeError:
                return x.tanh()

    with overrides(model := Fallback(nn.Linear(3, 3)), []) as coverage:
        model(_points(2, 4))
    assert coverage.plain == {("tanh", ""): 1}


def test_checkpoint_is_exact_inside_the_context() -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for child in self:
                x = checkpoint(child, x, use_reentrant=False)
            return x

    network, x, weight = _network(), _points(2, 4), torch.ones(2, 4, dtype=torch.float64)
    twin = Checkpointed(*network)
    rules = [Scaled(slope=0.3, within="Block"), Scaled(("tanh",), slope=2.0, within="Sequential")]
    rules_twin = [rules[0], Scaled(("tanh",), slope=2.0, within="Checkpointed")]
    expected = _gradient(network, x, weight, rules, network)
    assert not torch.allclose(expected, _gradient(network, x, weight, [], network))
    torch.testing.assert_close(_gradient(twin, x, weight, rules_twin, twin), expected, rtol=0, atol=0)
    with overrides(twin, rules_twin) as coverage:
        twin(x).sum().backward()
    assert sum(coverage.covered.values()) == 4  # recomputation is not counted
    torch.testing.assert_close(x.grad, _gradient(network, x, weight, rules, network), rtol=0, atol=0)


def test_within_cannot_be_decided_in_a_recomputed_function() -> None:
    x = _points(3)
    with overrides(nn.Identity(), [Scaled(("exp",), within="Block")]):
        y = checkpoint(torch.exp, x, use_reentrant=False)
        with pytest.raises(CoverageError, match="checkpoint whole modules"):
            y.sum().backward()


def test_only_the_threads_with_rules_are_ruled() -> None:
    network, x, weight = _network(), _points(2, 4).detach(), torch.ones(2, 4, dtype=torch.float64)
    slopes = [None, 0.3, None, 0.7]

    def gradient(slope: float | None) -> Tensor:
        z = x.clone().requires_grad_()
        if slope is None:
            return torch.autograd.grad((network(z) * weight).sum(), z)[0]
        return _gradient(network, z, weight, [Scaled(slope=slope, within="Block")], network)

    expected = [gradient(slope) for slope in slopes]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            if not torch.equal(gradient(slopes[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not torch.equal(expected[0], expected[1])


def test_double_backward_vmap_and_transforms() -> None:
    """value e^x, gradient of x^3: f' = 3 x^2, f'' = 6 x."""

    def f(x: Tensor) -> Tensor:
        return with_gradient_of(x.exp(), x**3)

    x = _points(4)
    first = torch.autograd.grad(f(x).sum(), x, create_graph=True)[0]
    torch.testing.assert_close(first, 3 * x**2)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), x)[0], 6 * x)
    z = x.detach()
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(f))(z), 3 * z**2)
    torch.testing.assert_close(torch.func.grad(lambda x: torch.func.vmap(f)(x).sum())(z), 3 * z**2)
    torch.testing.assert_close(torch.func.jvp(f, (z,), (torch.ones_like(z),))[1], 3 * z**2)
    with overrides(nn.Identity(), [Scaled(("tanh",), slope=0.3)]):
        ruled = torch.func.grad(lambda x: torch.func.vmap(torch.tanh)(x).sum())(z)
    torch.testing.assert_close(ruled, torch.full_like(z, 0.3))


def test_double_backward_through_a_rule_function_is_plain() -> None:
    """d/dx of the ruled gradient x tanh'(x)... here s(x) = x^2: s' = 2x, s'' = 2, products in it unruled."""
    x = _points(3)
    with overrides(nn.Identity(), [Square()]):
        first = torch.autograd.grad(x.tanh().sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), x)[0]
    torch.testing.assert_close(first, 2 * x)
    torch.testing.assert_close(second, torch.full_like(x, 2.0))


def test_stray_parameters_are_constants() -> None:
    original = nn.Linear(4, 4, dtype=torch.float64)
    x = _points(2, 4)
    with overrides(nn.Identity(), []):
        (torch.cat([original(x), original.weight.T @ original.weight]) * original.bias).sum().backward()
    assert original.weight.grad is None
    assert original.bias.grad is None
    torch.testing.assert_close(x.grad, (original.bias @ original.weight).expand(2, 4))
    with overrides(nn.Identity(), [], detach=False):
        assert torch.autograd.grad(original(x).sum(), original.weight)[0].any()
    with overrides(nn.Identity(), []):  # a graph made outside may still be differentiated inside
        loss = original(x)
    assert not torch.autograd.grad(loss.sum(), x)[0].isnan().any()


def test_inference_tensors_become_ordinary_without_a_copy() -> None:
    with torch.inference_mode():
        table = _points(4).detach() + 0
    x = _points(4)
    with overrides(nn.Identity(), []):
        y = (x * table).sum()
        alias = table.view(2, 2)
    assert torch.equal(torch.autograd.grad(y, x)[0], table.clone())
    assert alias.data_ptr() == table.data_ptr()
    assert not alias.is_inference()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_function_inside(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: torch.relu(z) * 2, backend=backend)
    x, weight = _points(3, 4), _points(3, 4, seed=1).detach()
    for _ in range(2):
        gradient = _gradient(compiled, x, weight, [Scaled(slope=0.3)], nn.Identity())
        torch.testing.assert_close(gradient, 0.6 * weight)
        torch.testing.assert_close(
            torch.autograd.grad((compiled(x) * weight).sum(), x)[0], 2 * weight * (x > 0)
        )


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
            output = module(_points(2, 3, 4))
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
    x = _points(3)
    rules = [Scaled(("relu", "exp"))]

    def uncovered() -> tuple[Uncovered, ...]:
        with overrides(nn.Identity(), rules) as coverage:
            return audit(compiled(x), coverage)

    assert {entry.kind for entry in uncovered()} <= {"compiled"}
    with torch.compiler.set_stance("force_eager"):
        assert uncovered() == ()
