"""The decomposition of a score is exact, on every way of writing a network, and term by term what it should be."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import pullback as pb
from pullback.attribution import FullGradTerms, fullgrad_terms
from pullback.attribution.rules.presets import PRESETS
from tests.golden_net import example, largest, tiny_mlp


def gap(found: FullGradTerms) -> float:
    """|Σ terms - score| as a share of Σ |terms|, recomputed from the tensors that were returned."""
    assert isinstance(found.input_term, Tensor)
    parts = [found.input_term.flatten(1).sum(1), *found.sums().values()]
    total = torch.stack(parts)
    return float(((total.sum(0) - found.score).abs() / total.abs().sum(0)).max())


def weighted(output: Tensor) -> Tensor:
    """A linear score that no normalisation makes zero."""
    flat = output.flatten(1)
    return flat @ torch.cos(torch.arange(flat.shape[1], dtype=flat.dtype))


class Computes(nn.Module):
    """A forward written as a function of the module, with a few layers to use."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                k = torch.arange(parameter.numel(), dtype=parameter.dtype)
                parameter.copy_((0.5 * torch.sin(0.7 * k + number)).reshape(parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(inputs: int = 3, outputs: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1).double()


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs).double()


def inception(net: Any, x: Tensor) -> Tensor:
    stem = net.a(x).relu()
    net.b(stem)  # an auxiliary head whose result nobody uses
    return torch.cat([stem, F.avg_pool2d(stem, 3, 1, 1)], 1)


def written(net: Any, x: Tensor) -> Tensor:
    buffer = torch.full((len(x), 5), 0.7, dtype=x.dtype)
    buffer[:, 1:4] = x
    buffer[:, 0] = 2.5
    other = x.sin()
    other[:, 1] = 3.0
    other[:, 0].fill_(2.0)
    other[:, 2].mul_(1.5).add_(0.25)
    return torch.cat([buffer.square(), other], 1).tanh()


def attention(mask: str, eager: bool) -> Callable[[Any, Tensor], Tensor]:
    def forward(net: Any, x: Tensor) -> Tensor:
        q, k, v = net.a(x).chunk(3, -1)
        seen = torch.ones(5, 5, dtype=torch.bool).tril()
        if mask == "padding":
            seen = torch.tensor([1, 1, 1, 0, 0]).bool().expand(5, 5)
        additive = torch.zeros(5, 5, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        if not eager:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen if mask == "boolean" else additive)
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        logits = logits.masked_fill(~seen, -torch.inf) if mask == "boolean" else logits + additive
        return logits.softmax(-1) @ v

    return forward


TOKENS, IMAGE, FLAT = (2, 5, 6), (2, 3, 6, 6), (2, 3)
NETS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "in-place ReLU": (nn.Sequential(conv(), nn.ReLU(inplace=True), conv(), nn.ReLU(inplace=True)), IMAGE),
    "residual": (Computes(lambda net, x: x + net.b(net.a(x).relu_()), a=conv(), b=conv()), IMAGE),
    "in-place residual": (Computes(lambda net, x: net.a(x).add_(x).mul_(2).sub_(0.3).exp_(), a=conv()), IMAGE),
    "dense": (Computes(lambda net, x: net.b(torch.cat([x, net.a(x).relu()], 1)), a=conv(), b=conv(6)), IMAGE),
    "inception": (Computes(inception, a=conv(), b=conv()), IMAGE),
    "shared": (Computes(lambda net, x: net.a(net.a(net.a(x).relu()).tanh()), a=conv()), IMAGE),
    "smooth": (nn.Sequential(conv(), nn.GELU(), nn.GroupNorm(3, 3).double(), conv(), nn.SiLU(inplace=True)), IMAGE),
    "functional": (Computes(lambda net, x: F.layer_norm(F.gelu(x @ x.transpose(1, 2)), (5,)) + 0.1), TOKENS),
    "rms": (nn.Sequential(linear(6, 4), nn.RMSNorm(4).double(), linear(4, 3)), TOKENS),
    "conv1d": (nn.Sequential(nn.Conv1d(5, 4, 3).double(), nn.Softplus()), TOKENS),
    "conv3d": (nn.Sequential(nn.Conv3d(1, 2, 2).double(), nn.ELU(), nn.MaxPool3d(2)), (2, 1, 5, 5, 5)),
    "lstm": (Computes(lambda net, x: net.a(x)[0], a=nn.LSTM(6, 4, bidirectional=True, batch_first=True).double()), TOKENS),
    "gru, time first": (Computes(lambda net, x: net.a(x.transpose(0, 1))[0].transpose(0, 1), a=nn.GRU(6, 4).double()), TOKENS),
    "lstm cell": (Computes(lambda net, x: net.a(x[:, 1], net.a(x[:, 0]))[1], a=nn.LSTMCell(6, 4).double()), TOKENS),
    "written": (Computes(written), FLAT),
    "checkpoint": (Computes(lambda net, x: checkpoint(net.a, x, use_reentrant=False), a=nn.Sequential(conv(), nn.GELU())), IMAGE),
    "encoder": (nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, activation="gelu").double(), TOKENS),
    "time first encoder": (Computes(lambda net, x: net.a(x.transpose(0, 1)).transpose(0, 1), a=nn.TransformerEncoderLayer(6, 2, 8).double()), TOKENS),
    "flattened tokens": (Computes(lambda net, x: net.a(x.reshape(-1, 6)).sigmoid().reshape(2 if len(x) == 2 else 1, 5, 4), a=linear(6, 4)), TOKENS),
    "gated scan": (Computes(lambda net, x: (torch.cumsum(net.a(x).sigmoid().log(), 1).exp() * net.b(x)).cumsum(1), a=linear(6, 4), b=linear(6, 4)), TOKENS),
    **{f"attention, {mask}, {'eager' if eager else 'sdpa'}": (Computes(attention(mask, eager), a=linear(6, 12)), TOKENS)
       for mask in ("boolean", "additive", "padding") for eager in (True, False)},
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_complete(name: str) -> None:
    net, shape = NETS[name]
    before = copy.deepcopy(net.state_dict())
    attributes = {path: set(vars(module)) for path, module in net.named_modules()}
    found = fullgrad_terms(net.eval(), example(*shape), target=pb.Norm())
    assert gap(found) < 1e-10
    assert found.uncovered == ()
    assert float(found.residual.abs().max()) < 1e-10 * float(found.score.abs().max()) * 100
    # nothing is left on the model
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert {path: set(vars(module)) for path, module in net.named_modules()} == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("name", NETS)
def test_batch_is_per_example(name: str) -> None:
    net, shape = NETS[name]
    x = example(*shape)
    together = fullgrad_terms(net.eval(), x, target=pb.Norm())
    for row in range(2):
        alone = fullgrad_terms(net, x[row : row + 1], target=pb.Norm())
        for term, total in alone.sums().items():
            # cancelling terms as large as a mask's constants carry that constant's rounding
            scale = max(1.0, *(float(each.abs().max()) for each in together.sums().values()))
            assert abs(float(total - together.sums()[term][row])) < 1e-12 * scale, term


@pytest.mark.parametrize(
    "name", ["add", "cat", "where", "masked_fill", "setitem", "fill", "linear", "layer_norm"]
)
def test_no_constant_may_be_dropped(name: str) -> None:
    """Each of these terms is large enough that completeness fails without it."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.b(net.a(x) + torch.cos(torch.arange(6, dtype=x.dtype)))
        x = torch.cat([x, torch.full_like(x[:, :1], 0.6).detach()], 1)
        x = torch.where(torch.arange(x.shape[1]) == 1, 0.9, x).masked_fill(
            torch.arange(x.shape[1]) == 2, -0.7
        )
        x = x.clone()
        x[:, 0] = 1.3
        x[:, 4].fill_(0.4)
        return (x * torch.arange(1, 8, dtype=x.dtype) / 10).tanh()

    net = Computes(forward, a=linear(3, 6), b=nn.LayerNorm(6).double())
    found = fullgrad_terms(net, example(2, 3), target=pb.Norm())
    assert gap(found) < 1e-12
    kept = [(key, term) for key, term in found.terms if key.split(":")[-1] != name]
    assert len(kept) < len(found.terms)
    assert gap(FullGradTerms(found.input_term, kept, found.score, found.residual)) > 1e-3


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize(
    "name", ["smooth", "encoder", "attention, boolean, eager", "lstm", "dense", "written"]
)
def test_complete_under_rules(name: str, preset: str) -> None:
    """Any surrogate derivative keeps the sum, as long as the biases are the surrogate's too."""
    net, shape = NETS[name]
    found = fullgrad_terms(net.eval(), example(*shape), target=weighted, rules=PRESETS[preset])
    assert gap(found) < 1e-10
    problem = pb.pose(net, example(*shape), target=weighted).under(PRESETS[preset], uncovered="gradient")
    gradient = problem.grad()
    assert isinstance(gradient, Tensor)
    assert isinstance(found.input_term, Tensor)
    assert largest(found.input_term, gradient * example(*shape)) < 1e-13


def test_what_cannot_be_looked_into_is_named_and_left_in_the_residual() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return 3 * ctx.saved_tensors[0] ** 2 * grad

    def cubed(net: Any, x: Tensor) -> Tensor:
        result: Tensor = Cube.apply(x)
        return result

    x = example(2, 3)
    found = fullgrad_terms(Computes(cubed), x, target=1)
    assert found.uncovered == ("Cube",)
    assert largest(found.residual, -2 * x[:, 1] ** 3) < 1e-14


def test_names_sites_and_chunks() -> None:
    net, x = tiny_mlp(), example(5, 6)
    whole = fullgrad_terms(net, x, target=1)
    parts = fullgrad_terms(net, x, target=1, chunk=2)
    assert [name for name, _ in whole.terms] == [
        "0:linear",
        "1:gelu",
        "2:layer_norm",
        "3:linear",
        "4:silu",
        "5:linear",
    ]
    for (_, a), (_, b) in zip(whole.terms, parts.terms, strict=True):
        assert largest(a, b) < 1e-14
    later = fullgrad_terms(net, x, target=1, site="2")
    assert [name for name, _ in later.terms] == ["3:linear", "4:silu", "5:linear"]
    assert gap(later) < 1e-14
    assert gap(fullgrad_terms(net.float(), x.float(), target=1)) < 1e-5
    with pytest.raises(pb.MethodError, match=r"plain callable.*IntegratedGradients"):
        fullgrad_terms(lambda z: z.exp(), x, target=1)


class WrittenThroughAnotherView(nn.Module):
    """An einsum's result is a view of a tensor it hides; the write goes through a view of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bid,bjd->bij", x, x)
        y.transpose(1, 2)[:, 0] = 0.0
        return y.sum((1, 2))[:, None]


def test_a_write_through_another_view_loses_nothing() -> None:
    x = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = fullgrad_terms(WrittenThroughAnotherView(), x, 0)
    assert found.residual.abs().max() <= 1e-14 * found.score.abs().max()
    assert found.uncovered == ()


def test_rules_that_hold_everything_say_so() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Softplus(), nn.Linear(3, 2))
    with pytest.raises(pb.MethodError, match="under these rules nothing leads from"):
        pb.attribution.conservation_report(net, torch.ones(1, 3), 0, PRESETS["relp"])
