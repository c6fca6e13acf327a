"""Rules in context: composites, module paths, checkpoints, threads, transforms, stray parameters, compiled code."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pullback.core.errors import CoverageError
from pullback.core.overrides import Operation, overrides, rules_paused, with_gradient_of
from tests.core.rules import Detach, DetachQueries, Scaled, points, ruled_gradient


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


@pytest.mark.parametrize("need_weights", [True, False])
def test_composite_multihead_attention(need_weights: bool) -> None:
    """nn.MultiheadAttention with constant probabilities P: the gradient is sum_h W_v,h' W_o,h' (P_h' g)."""
    attention = (
        nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64).eval().requires_grad_(False)
    )
    x, weight = points(3, 5, 4), points(3, 5, 4, seed=1).detach()
    probabilities = attention(x, x, x, average_attn_weights=False)[1].detach()
    value, out = attention.in_proj_weight[8:].view(2, 2, 4), attention.out_proj.weight.view(4, 2, 2)
    expected = torch.einsum("bti,iho,bhts,hoe->bse", weight, out, probabilities, value)
    rules = [Detach(), DetachQueries()]
    run = lambda z: attention(z, z, z, need_weights=need_weights)[0]  # noqa: E731
    torch.testing.assert_close(ruled_gradient(run, x, weight, rules, attention), expected)
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
    x = points(2, 5, 4)
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
        network(points(2, 4))
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
        model(points(2, 4))
    assert coverage.plain == {("tanh", ""): 1}


def test_checkpoint_is_exact_inside_the_context() -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for child in self:
                x = checkpoint(child, x, use_reentrant=False)
            return x

    network, x, weight = _network(), points(2, 4), torch.ones(2, 4, dtype=torch.float64)
    twin = Checkpointed(*network)
    rules = [Scaled(slope=0.3, within="Block"), Scaled(("tanh",), slope=2.0, within="Sequential")]
    rules_twin = [rules[0], Scaled(("tanh",), slope=2.0, within="Checkpointed")]
    expected = ruled_gradient(network, x, weight, rules, network)
    assert not torch.allclose(expected, ruled_gradient(network, x, weight, [], network))
    torch.testing.assert_close(ruled_gradient(twin, x, weight, rules_twin, twin), expected, rtol=0, atol=0)
    with overrides(twin, rules_twin) as coverage:
        twin(x).sum().backward()
    assert sum(coverage.covered.values()) == 4  # recomputation is not counted
    torch.testing.assert_close(x.grad, ruled_gradient(network, x, weight, rules, network), rtol=0, atol=0)


def test_within_cannot_be_decided_in_a_recomputed_function() -> None:
    x = points(3)
    with overrides(nn.Identity(), [Scaled(("exp",), within="Block")]):
        y = checkpoint(torch.exp, x, use_reentrant=False)
        with pytest.raises(CoverageError, match="checkpoint whole modules"):
            y.sum().backward()


def test_only_the_threads_with_rules_are_ruled() -> None:
    network, x, weight = _network(), points(2, 4).detach(), torch.ones(2, 4, dtype=torch.float64)
    slopes = [None, 0.3, None, 0.7]

    def gradient(slope: float | None) -> Tensor:
        z = x.clone().requires_grad_()
        if slope is None:
            return torch.autograd.grad((network(z) * weight).sum(), z)[0]
        return ruled_gradient(network, z, weight, [Scaled(slope=slope, within="Block")], network)

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

    x = points(4)
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
    x = points(3)
    with overrides(nn.Identity(), [Square()]):
        first = torch.autograd.grad(x.tanh().sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), x)[0]
    torch.testing.assert_close(first, 2 * x)
    torch.testing.assert_close(second, torch.full_like(x, 2.0))


def test_stray_parameters_are_constants() -> None:
    original = nn.Linear(4, 4, dtype=torch.float64)
    x = points(2, 4)
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
        table = points(4).detach() + 0
    x = points(4)
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
    x, weight = points(3, 4), points(3, 4, seed=1).detach()
    for _ in range(2):
        gradient = ruled_gradient(compiled, x, weight, [Scaled(slope=0.3)], nn.Identity())
        torch.testing.assert_close(gradient, 0.6 * weight)
        torch.testing.assert_close(
            torch.autograd.grad((compiled(x) * weight).sum(), x)[0], 2 * weight * (x > 0)
        )
