"""Our methods in captum's form, inside captum's own tools."""

from __future__ import annotations

import pytest
import torch
from captum import attr as captum_attr
from captum import metrics as captum_metrics
from torch import Tensor, nn

import pullback as pb
from pullback.core.errors import InputError, TargetError
from tests.golden_net import example, largest, tiny_mlp

X = example(3, 6)


@pytest.mark.parametrize("target", [1, torch.tensor([0, 2, 1]), [0, 2, 1], (2,)])
@pytest.mark.filterwarnings("ignore:Input Tensor 0")
def test_captums_targets_mean_the_same(target: object) -> None:
    ours = pb.as_captum(pb.Gradient())(tiny_mlp()).attribute(X, target=target)
    theirs = captum_attr.Saliency(tiny_mlp()).attribute(X.clone(), target=target, abs=False)
    assert isinstance(ours, Tensor)
    assert largest(ours, theirs) < 1e-14


def test_no_target_means_one_number_per_example() -> None:
    net = nn.Linear(6, 1).double()
    found = pb.as_captum("gradient")(net).attribute(X)
    assert isinstance(found, Tensor)
    assert largest(found, net.weight.expand(3, 6)) < 1e-15
    with pytest.raises(
        TargetError, match=r"target=None means one number per example, but the output has shape \(3, 3\)"
    ):
        pb.as_captum(pb.Gradient())(tiny_mlp()).attribute(X)


def test_baselines_of_captums_forms() -> None:
    engine = pb.as_captum(pb.IntegratedGradients(steps=16))(tiny_mlp())
    reference = captum_attr.IntegratedGradients(tiny_mlp())
    for baselines in (None, 0.3, 0, 0.1 * X.flip(0), (0.2,)):
        theirs = reference.attribute(X.clone(), baselines, target=1, n_steps=16, method="riemann_middle")
        ours = engine.attribute(X, target=1, baselines=baselines)
        assert isinstance(ours, Tensor)
        assert largest(ours, theirs) < 1e-12


class Weighted(nn.Module):
    def forward(self, a: Tensor, b: Tensor, factor: Tensor | None = None) -> Tensor:
        product = (a.square() * b).sum(1)
        return product if factor is None else product * factor


def test_structure_and_further_arguments() -> None:
    engine = pb.as_captum(pb.InputXGradient())(Weighted())
    a, b, factor = example(2, 4), example(2, 4) + 0.5, torch.tensor([2, 3])
    found = engine.attribute((a, b), additional_forward_args=factor)
    assert isinstance(found, tuple)
    assert largest(found[0], 2 * a.square() * b * factor[:, None]) < 1e-14
    assert largest(found[1], a.square() * b * factor[:, None]) < 1e-14
    alone = engine.attribute(a, additional_forward_args=b)
    assert isinstance(alone, Tensor)
    assert largest(alone, 2 * a.square() * b) < 1e-14
    with pytest.raises(InputError, match="every input must be a floating tensor"):
        engine.attribute((a, torch.ones(2, 4, dtype=torch.long)))
    with pytest.raises(InputError, match="2 baselines for 1 inputs"):
        pb.as_captum(pb.IntegratedGradients())(Weighted()).attribute(
            a, additional_forward_args=b, baselines=(0, 1)
        )
    paths = pb.as_captum(pb.IntegratedGradients(steps=2, quadrature="gausslegendre"))(Weighted())
    both = paths.attribute((a, b), baselines=(0, 0.0))
    assert largest(both[0], a.square() * b * 2 / 3) < 1e-14


def test_inside_captums_noise_tunnel(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = example(12, 6)
    monkeypatch.setattr(torch, "normal", lambda mean, std: noise * std)
    tunnel = captum_attr.NoiseTunnel(pb.as_captum(pb.Gradient())(tiny_mlp()))
    theirs = captum_attr.NoiseTunnel(captum_attr.Saliency(tiny_mlp()))
    expected = theirs.attribute(X.clone(), target=1, nt_samples=4, stdevs=0.5, abs=False)
    assert largest(tunnel.attribute(X, target=1, nt_samples=4, stdevs=0.5), expected) < 1e-14


def test_inside_captums_metrics() -> None:
    def perturb(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(each + 0.1 for each in inputs) if isinstance(inputs, tuple) else inputs + 0.1

    ours = captum_metrics.sensitivity_max(
        pb.as_captum(pb.Gradient())(tiny_mlp()).attribute, X, perturb, target=1
    )
    clean, moved = (pb.explain(tiny_mlp(), x, target=1, method="gradient").values for x in (X, X + 0.1))
    assert largest(ours, (moved - clean).norm(dim=1) / clean.norm(dim=1)) < 1e-12
