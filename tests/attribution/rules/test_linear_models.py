"""Linear rules in whole networks: merged batch normalisation, composites, captum's LRP, conservation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import pullback as pb
from pullback.attribution.rules.composites import (
    EPSILON,
    EPSILON_ALPHA2_BETA1,
    EPSILON_GAMMA,
    EPSILON_PLUS,
)
from pullback.attribution.rules.linear import AlphaBeta, Epsilon, Gamma, MergedBatchNorm, ZPlus
from pullback.core.overrides import Rule, overrides
from tests.attribution.rules.linear_reference import coefficient, draws, relevance

RULES: list[Any] = [Epsilon(1e-3), ZPlus(), AlphaBeta(), Gamma(), ZPlus(bias=False), Gamma(bias=False)]
COMPOSITES = {
    "epsilon": EPSILON,
    "plus": EPSILON_PLUS,
    "alpha_beta": EPSILON_ALPHA2_BETA1,
    "gamma": EPSILON_GAMMA,
}


def randomised(module: nn.Module, bias: bool = True) -> nn.Module:
    """The module in float64 and eval mode with random parameters and statistics of either sign."""
    module = module.double().eval().requires_grad_(False)
    for number, (name, value) in enumerate([*module.named_parameters(), *module.named_buffers()]):
        if value.is_floating_point():
            value.copy_(draws(*value.shape, seed=number))
            if name.endswith("running_var"):
                value.abs_().add_(0.1)
            if name.endswith("bias") and not bias:
                value.zero_()
    return module


PAIRS: dict[str, tuple[nn.Module, nn.Module, Tensor]] = {
    "conv": (nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), draws(2, 2, 5, 5)),
    "conv_without_bias": (nn.Conv1d(2, 4, 3, bias=False), nn.BatchNorm1d(4), draws(2, 2, 5)),
    "not_affine": (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3, affine=False), draws(2, 2, 3, 3, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), draws(2, 4, 3, 3)),
    "linear": (nn.Linear(5, 4), nn.BatchNorm1d(4, eps=0.3), draws(3, 5)),
    "sync": (nn.Conv2d(2, 4, 3), nn.SyncBatchNorm(4), draws(2, 2, 5, 5)),
}


def folded(layer: Any, norm: Any) -> Any:
    """One layer with the weights of both, written for each kind from the formula."""
    gamma = norm.weight if norm.affine else torch.ones_like(norm.running_mean)
    beta = norm.bias if norm.affine else torch.zeros_like(norm.running_mean)
    scale = gamma / (norm.running_var + norm.eps).sqrt()
    one = copy.deepcopy(layer)
    if isinstance(
        layer, nn.ConvTranspose2d
    ):  # weight (in, out / groups): output o of group g is g * out/groups + o
        for j in range(layer.in_channels):
            group = j // (layer.in_channels // layer.groups)
            for o in range(layer.weight.shape[1]):
                one.weight[j, o] *= scale[group * layer.weight.shape[1] + o]
    else:
        for k in range(len(scale)):
            one.weight[k] *= scale[k]
    bias = 0 if layer.bias is None else layer.bias
    one.bias = nn.Parameter((bias - norm.running_mean) * scale + beta, requires_grad=False)
    return one


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("pair", PAIRS)
def test_merged_batch_norm_is_the_folded_layer(pair: str, rule: Any) -> None:
    layer, norm, x = PAIRS[pair]
    layer, norm = randomised(copy.deepcopy(layer)), randomised(copy.deepcopy(norm))
    both, one = (
        nn.Sequential(layer, norm, nn.ReLU(inplace=True)),
        nn.Sequential(folded(layer, norm), nn.ReLU()),
    )
    torch.testing.assert_close(both(x), one(x))
    outgoing = draws(*both(x).shape, seed=9)
    rules = (rule, MergedBatchNorm())
    expected = coefficient(one, x, outgoing, rules)
    torch.testing.assert_close(coefficient(both, x, outgoing, rules), expected, rtol=1e-9, atol=1e-10)
    assert (
        coefficient(both, x, outgoing, [rule]) - expected
    ).abs().max() > 1e-3  # unmerged is something else
    with overrides(both, rules) as coverage:
        assert torch.equal(both(x.clone().requires_grad_()), both(x))
    assert sum(coverage.covered.values()) == 2


def untouched(layer: nn.Module, change: Callable[[Tensor], Tensor], norm: nn.Module) -> None:
    """Batch normalisation of a changed layer output has the ordinary derivative."""
    x = draws(2, 2, 5, 5)
    model = lambda z: norm(change(layer(z)))  # noqa: E731
    outgoing = draws(*model(x).shape, seed=9)
    found = coefficient(model, x, outgoing, (ZPlus(), MergedBatchNorm()))
    assert torch.equal(found, coefficient(model, x, outgoing, (ZPlus(),)))


def test_only_an_untouched_layer_is_merged() -> None:
    conv, norm = randomised(nn.Conv2d(2, 4, 3)), randomised(nn.BatchNorm2d(4))
    untouched(conv, F.relu, norm)
    untouched(conv, torch.Tensor.relu_, norm)  # a write in place: the same tensor, another value
    untouched(conv, lambda y: y * 2, norm)


def test_batch_norm_over_places_is_not_merged() -> None:
    """(B, T, C) -> BatchNorm1d over T scales places, not outputs: no weight of the layer says that."""
    linear, norm = randomised(nn.Linear(3, 4)), randomised(nn.BatchNorm1d(5))
    model, x = nn.Sequential(linear, norm), draws(2, 5, 3)
    outgoing = draws(2, 5, 4, seed=9)
    found = coefficient(model, x, outgoing, (ZPlus(), MergedBatchNorm()))
    assert torch.equal(found, coefficient(model, x, outgoing, (ZPlus(),)))


def test_torch_batch_norm_has_other_positions() -> None:
    conv, norm = randomised(nn.Conv2d(2, 4, 3)), randomised(nn.BatchNorm2d(4))
    affine, stats = (norm.weight, norm.bias), (norm.running_mean, norm.running_var)
    x, outgoing = draws(2, 2, 5, 5), draws(2, 4, 3, 3, seed=9)
    rules = (Gamma(), MergedBatchNorm())
    raw = lambda z: torch.batch_norm(conv(z), *affine, *stats, False, 0.1, 1e-5, False)  # type: ignore[arg-type]  # noqa: E731
    named = lambda z: F.batch_norm(conv(z), *stats, bias=affine[1], weight=affine[0])  # type: ignore[arg-type]  # noqa: E731
    expected = coefficient(nn.Sequential(conv, norm), x, outgoing, rules)
    assert torch.equal(coefficient(raw, x, outgoing, rules), expected)
    assert torch.equal(coefficient(named, x, outgoing, rules), expected)


class Residual(nn.Module):
    """Two conv-BN pairs around a sum, pooling, a dense head: a small ResNet."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        branch = checkpoint(self.second, x, use_reentrant=False) if self.checkpointed else self.second(x)
        branch += x
        return self.head(self.pool(F.relu(branch)))


@pytest.mark.parametrize("name", COMPOSITES)
def test_composite_on_a_residual_network(name: str) -> None:
    """Merged network equals its folded copy, also with checkpoints; times the point it is the relevance."""
    net: Any = randomised(Residual())
    plain = copy.deepcopy(net)
    plain.first = nn.Sequential(folded(net.first[0], net.first[1]), nn.ReLU())
    plain.second = folded(net.second[0], net.second[1])
    x = draws(3, 2, 8, 8)
    found = {
        key: pb.pose(model, x, target=1).under(COMPOSITES[name], uncovered="gradient").grad()
        for key, model in (("merged", net), ("folded", plain))
    }
    torch.testing.assert_close(found["merged"], found["folded"], rtol=1e-8, atol=1e-10)
    again = copy.deepcopy(net)
    again.checkpointed = True
    outgoing = F.one_hot(torch.ones(3, dtype=torch.long), 3)
    torch.testing.assert_close(coefficient(again, x, outgoing, COMPOSITES[name]), found["merged"])


@pytest.mark.parametrize("name", ["epsilon", "plus", "gamma"])
def test_a_network_without_biases_conserves(name: str) -> None:
    """Σ x ⊙ c is the score: nothing is absorbed but ε, which is 0 here."""
    net = randomised(
        nn.Sequential(
            *(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 2), nn.ReLU()),
            *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6, 3)),
        ),
        bias=False,
    )
    x = draws(4, 2, 8, 8)
    problem = pb.pose(net, x, target=2)
    under = problem.under(COMPOSITES[name], uncovered="gradient")
    found = (x * under.grad()).sum((1, 2, 3))  # type: ignore[operator]
    torch.testing.assert_close(found, problem.score(), rtol=1e-3, atol=1e-4)
    assert torch.equal(under.score(), problem.score())
    exact: dict[str, Rule] = {"epsilon": Epsilon(0.0), "plus": ZPlus(0.0), "gamma": Gamma(epsilon=0.0)}
    rules = (exact[name],) if name != "plus" else (ZPlus(0.0, applies_to="convolution"),)
    found = (x * problem.under(rules, uncovered="gradient").grad()).sum((1, 2, 3))  # type: ignore[operator]
    torch.testing.assert_close(found, problem.score(), rtol=1e-10, atol=1e-12)


class Convolutional(nn.Module):
    """captum knows no nn.Flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 2), nn.ReLU())
        )
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x).flatten(1))


def captum_relevance(net: nn.Module, x: Tensor, rules: dict[str, Any]) -> Tensor:
    """captum's LRP of output 1, with its rules put on the layers with these names."""
    from captum.attr import LRP

    net = copy.deepcopy(net)
    for name, rule in rules.items():
        net.get_submodule(name).rule = rule
    found: Tensor = LRP(net).attribute(x.clone(), target=1)
    return found.detach()


@pytest.mark.parametrize("name", ["epsilon", "gamma", "z_plus"])
def test_captum(name: str) -> None:
    """Agreement where captum's definitions are the same.

    captum leaves the bias of a modified layer as it is (we split or enlarge it by sign as the papers do) and modifies
    weights without regard to the input's sign, so γ and z+ are compared without biases in denominators, for inputs
    that are not negative.
    """
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule

    net = randomised(Convolutional())
    x = draws(2, 2, 8, 8).abs()
    theirs: dict[str, Callable[[], Any]] = {
        "epsilon": lambda: EpsilonRule(1e-3),
        "gamma": lambda: GammaRule(0.25, set_bias_to_zero=True),
        "z_plus": lambda: Alpha1_Beta0_Rule(set_bias_to_zero=True),
    }
    ours: dict[str, Any] = {
        "epsilon": Epsilon(1e-3, applies_to="convolution"),
        "gamma": Gamma(0.25, bias=False, epsilon=1e-9, applies_to="convolution"),
        "z_plus": ZPlus(bias=False, epsilon=1e-9, applies_to="convolution"),
    }
    rules = {"features.0": theirs[name](), "features.3": theirs[name](), "head": EpsilonRule(1e-6)}
    expected = captum_relevance(net, x, rules)
    score = net(x)[:, 1]
    outgoing = torch.zeros(2, 3).double()
    outgoing[:, 1] = 1
    found = relevance(net, x, outgoing, [ours[name], Epsilon(applies_to="dense")])
    # captum divides the score by itself plus ε once more at the output
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(score.abs().max()))


def test_within_chooses_the_rule() -> None:
    net = randomised(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)))
    with overrides(net, [ZPlus(within="0"), Epsilon()]) as coverage:
        net(draws(1, 2, 6, 6).requires_grad_())
    assert set(coverage.covered) == {
        ("conv2d", "0", repr(ZPlus(within="0"))),
        ("conv2d", "1", repr(Epsilon())),
    }
