"""Excitation and semantic pullbacks: published numbers, limits, exactness of the forward, completeness, spelling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import pullback as pb
from pullback.attribution.spelling import parse_method
from pullback.core.errors import MethodError
from pullback.core.overrides import Rule, overrides

from ..golden_net import example, tiny_cnn, tiny_mlp

X = example(2, 3, 8, 8)
TARGETS = [0, 2]


def values(model: nn.Module, x: Any, method: Any, **settings: Any) -> Tensor:
    found = pb.explain(model, x, method=method, **settings).values
    assert isinstance(found, Tensor)
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / a.norm() / b.norm())


@pytest.mark.parametrize(
    ("temperature", "norm", "alike"),
    [(0.1, 0.323329, 0.98247), (0.3, 0.219431, 0.96217), (1.0, 0.077735, 0.83806)],
)
def test_printed_numbers_of_the_official_code(temperature: float, norm: float, alike: float) -> None:
    """Norm and cosine to the gradient on the golden net, targets 0 and 2, six and five printed digits."""
    found = values(tiny_cnn(), X, pb.ExcitationPullback(temperature), target=TARGETS)
    assert round(float(found.norm()), 6) == norm
    assert round(cosine(found, values(tiny_cnn(), X, "gradient", target=TARGETS)), 5) == alike


def test_printed_cosine_of_the_semantic_pullback() -> None:
    found = values(tiny_cnn(), X, pb.SemanticPullback(), target=TARGETS)
    assert round(cosine(found, values(tiny_cnn(), X, "gradient", target=TARGETS)), 3) == 0.938


def test_by_hand_on_one_hidden_layer() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double().eval()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first, last = net[0].weight.detach(), net[2].weight.detach()
    z = net[0](x).detach()
    for method, gate in (
        (pb.ExcitationPullback(0.4), torch.sigmoid(z / 0.4)),
        (pb.SemanticPullback(relu=0.4), torch.special.ndtr(z / 0.4)),
    ):
        assert torch.allclose(values(net, x, method, target=1), (gate * last[1]) @ first, atol=1e-15)


def test_semantic_pullback_by_hand() -> None:
    """GELU, layer norm with constant statistics, SiLU: the product of the five Jacobians."""
    net, x = tiny_mlp(), example(2, 6)
    a, _, norm, b, _, c = net
    with torch.no_grad():
        z = a(x)
        h = functional.gelu(z)
        u = b(norm(h))
        scale = norm.weight / (h.var(1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    back = torch.sigmoid(u / 1.6) * c.weight[TARGETS]
    wanted = (((back @ b.weight) * scale) * torch.special.ndtr(z)) @ a.weight
    assert torch.allclose(values(net, x, pb.SemanticPullback(), target=TARGETS), wanted, atol=1e-15)


def test_cold_is_the_gradient_and_hot_the_halved_averaged_net() -> None:
    net = tiny_cnn()
    plain = values(net, X, "gradient", target=TARGETS)
    for method in (pb.ExcitationPullback(1e-6), pb.ExcitationPullback(1e-6, pooling="detached")):
        assert torch.equal(values(net, X, method, target=TARGETS), plain)

    class Half(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z / 2

    linear = nn.Sequential(*net)
    linear[2], linear[6], linear[3] = Half(), Half(), nn.AvgPool2d(2)
    wanted = values(linear, X, "gradient", target=TARGETS)
    hot = values(net, X, pb.ExcitationPullback(1e9), target=TARGETS)
    assert torch.allclose(hot, wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("method", [pb.ExcitationPullback(), pb.SemanticPullback()])
def test_forward_is_untouched_bit_for_bit(method: Any) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        net, x = tiny_cnn().to(dtype), X.to(dtype)
        problem = pb.pose(net, x, target=TARGETS)
        ruled = problem.under(method.rules, uncovered="gradient")
        scores, _ = ruled.evaluate_rows(x, torch.arange(2))
        plain, _ = problem.evaluate_rows(x, torch.arange(2))
        assert torch.equal(scores, plain)
        assert torch.equal(scores, net(x)[torch.arange(2), TARGETS].detach().to(scores))


class _Raises(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        if torch.is_grad_enabled() and z.abs().max() > 1e3:
            raise RuntimeError("too large")
        return z


def test_gradient_is_as_before_afterwards_also_after_an_exception() -> None:
    net = nn.Sequential(*tiny_cnn(), _Raises())
    before = values(net, X, "gradient", target=TARGETS)
    values(net, X, pb.ExcitationPullback(), target=TARGETS)
    with pytest.raises(RuntimeError, match="too large"):
        values(net, 1e9 * X, pb.ExcitationPullback(), target=TARGETS)
    assert torch.equal(values(net, X, "gradient", target=TARGETS), before)


class _Dense(nn.Module):
    """DenseNet's habit: the last rectifier is a function call in place."""

    def __init__(self, net: nn.Sequential, functional_call: bool) -> None:
        super().__init__()
        self.first, self.act, self.rest = net[:6], net[6], net[7:]
        self.functional_call = functional_call

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        z = functional.relu(z, inplace=True) if self.functional_call else self.act(z)
        out: Tensor = self.rest(z)
        return out


def test_functional_and_in_place_equal_the_module() -> None:
    found = [
        values(_Dense(tiny_cnn(), flag), X, pb.ExcitationPullback(), target=TARGETS) for flag in (True, False)
    ]
    assert torch.equal(*found)
    assert torch.equal(found[0], values(tiny_cnn(), X, pb.ExcitationPullback(), target=TARGETS))
    assert not torch.equal(found[0], values(tiny_cnn(), X, "gradient", target=TARGETS))


def linearised(rules: tuple[Rule, ...], net: nn.Sequential, x: Tensor, target: int) -> Tensor:
    """⟨∇f, x⟩ + Σ ⟨δ_v, y_v - J̃ u_v⟩ over the layers, with the derivative under the rules as J̃ throughout."""
    with overrides(nn.Identity(), rules):
        places = [x.clone().requires_grad_()]
        for layer in net:
            places.append(layer(places[-1]))
        grads = torch.autograd.grad(places[-1][0, target], places, retain_graph=True)
        total = (grads[0] * x).sum()
        for number, layer in enumerate(net):
            u = places[number].detach().requires_grad_()
            # δ_v times the affine remainder of this layer alone
            out = layer(u * 1)
            (back,) = torch.autograd.grad(out, u, grads[number + 1])
            total = total + (grads[number + 1] * out).sum().detach() - (back * u).sum().detach()
    return total


@pytest.mark.parametrize("method", [pb.ExcitationPullback(), pb.SemanticPullback()])
def test_fullgrad_under_the_rules_is_complete(method: Any) -> None:
    """Any derivative adds up if it is the same in δ and in the bias terms: f = ⟨∇̃f, x⟩ + Σ ⟨δ̃, b̃⟩."""
    for net, x in ((tiny_cnn(), X[:1]), (tiny_mlp(), example(1, 6))):
        for target in (0, 2):
            score = float(net(x)[0, target].detach())
            assert abs(float(linearised(method.rules, net, x, target)) - score) <= 1e-12
    # the bias term of a gated ReLU is relu(z) - σ(z/T) z
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_()
    with overrides(nn.Identity(), pb.ExcitationPullback().rules):
        (gate,) = torch.autograd.grad(torch.relu(z).sum(), z)
    assert torch.equal(gate, torch.sigmoid(z.detach() / 0.3))


@pytest.mark.parametrize("method", [pb.ExcitationPullback(), pb.SemanticPullback()])
def test_batch_is_one_by_one(method: Any) -> None:
    net = tiny_cnn()
    whole = values(net, X, method, target=1)
    single = torch.cat([values(net, row[None], method, target=1, chunk=1) for row in X])
    assert float((whole - single).abs().max()) <= 1e-15


def test_excitation_needs_a_relu_or_a_max_pool() -> None:
    net, x = tiny_mlp(), example(2, 6)
    with pytest.raises(
        MethodError, match=r"softens no operation .*gelu, layer_norm, silu\).*SemanticPullback\(\)"
    ):
        values(net, x, pb.ExcitationPullback())
    plain = values(net, x, "gradient")
    assert torch.equal(values(net, x, pb.ExcitationPullback(absent="gradient")), plain)
    # one max pool alone will do
    pool = nn.Sequential(nn.MaxPool1d(2), nn.Flatten(), nn.Linear(3, 2)).double().eval()
    assert values(pool, example(2, 1, 6), pb.ExcitationPullback()).abs().sum() > 0


def test_what_the_papers_do_not_name_keeps_its_gradient_and_is_listed() -> None:
    net = (
        nn.Sequential(nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        .double()
        .eval()
    )
    found = pb.explain(net, example(1, 6), method=pb.SemanticPullback(), target=0)
    listed = {each["operation"]: each["rule"] for each in found.diagnostics["coverage"]}
    assert listed["sigmoid"] == "gradient"
    assert listed["relu"].startswith("NormalGate(temperature=0.6")
    smooth = nn.Sequential(nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 2)).double().eval()
    found = pb.explain(smooth, example(1, 6), method=pb.SemanticPullback(), target=0)
    assert "this is the plain gradient" in found.diagnostics["notes"][0]
    assert torch.equal(found.values, values(smooth, example(1, 6), "gradient", target=0))  # type: ignore[arg-type]


def test_under_smoothgrad_and_at_a_layer() -> None:
    net = tiny_cnn()
    smooth = pb.SmoothGrad(pb.ExcitationPullback(), samples=6, noise=0.1)
    found = pb.explain(net, X, method=smooth, target=TARGETS)
    assert any(each["rule"].startswith("SigmoidGate") for each in found.diagnostics["coverage"])
    assert cosine(found.values, values(net, X, pb.ExcitationPullback(), target=TARGETS)) > 0.9  # type: ignore[arg-type]
    layer = values(net, X, pb.ExcitationPullback(), target=TARGETS, site="3")
    rest = values(net[4:], net[:4](X).detach(), pb.ExcitationPullback(), target=TARGETS)
    assert torch.allclose(layer, rest, atol=1e-15)


def test_parts_can_be_switched_off() -> None:
    hard = values(tiny_cnn(), X, pb.ExcitationPullback(0.3, pooling=None), target=0)
    soft = values(tiny_cnn(), X, pb.ExcitationPullback(0.3), target=0)
    assert float((hard - soft).abs().max()) > 1e-4
    net, x = tiny_mlp(), example(2, 6)
    rules = pb.SemanticPullback(norms="gradient", attention=None).rules
    assert {type(rule).__name__ for rule in rules} == {"NormalGate", "SigmoidGate", "SoftPool"}
    kept = values(net, x, pb.SemanticPullback(norms="gradient"), target=0)
    assert float((kept - values(net, x, pb.SemanticPullback(), target=0)).abs().max()) > 1e-4


def test_text_and_parameters() -> None:
    for method in (pb.ExcitationPullback(0.1, None, "faithful"), pb.SemanticPullback(attention=None)):
        assert parse_method(repr(method)) == method
    for make, message in (
        (lambda: pb.ExcitationPullback(0.0), "temperature is a finite number above 0"),
        (lambda: pb.ExcitationPullback(pooling="hard"), '"live" or "detached"'),
        (lambda: pb.ExcitationPullback(absent="note"), '"error" or "gradient"'),
        (lambda: pb.SemanticPullback(gelu=-1.0), "gelu is a finite number above 0"),
        (lambda: pb.SemanticPullback(norms="none"), '"frozen" or "gradient"'),
        (lambda: pb.SemanticPullback(padding="zero"), '"corrected" or "faithful"'),
    ):
        with pytest.raises(MethodError, match=message):
            make()  # type: ignore[no-untyped-call]
