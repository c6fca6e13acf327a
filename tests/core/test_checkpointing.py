"""Block checkpointing: the same explanation from less memory, also under rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.core.checkpointing import checkpointed
from pullback.core.overrides import Rule
from pullback.core.resources import PeakMeter
from pullback.testing import assert_model_untouched
from tests.core.rules import Detach, Scaled
from tests.zoo.architectures import ARCHITECTURES, in_float64, target_of

NAMES = ["gpt2", "llama", "bert", "t5", "vit", "mamba", "resnet"]


class Counted(nn.Module):
    """A feed-forward layer with a residual that counts its runs."""

    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        Counted.runs += 1
        return x + self.inner(x.tanh())


def deep(layers: int = 6) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(*(Counted() for _ in range(layers)))).double()


def points() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def apart(ours: Any, native: Any) -> float:
    return float((ours - native).abs().max() / native.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_explanations_agree(name: str) -> None:
    model, inputs = in_float64(ARCHITECTURES[name]())
    target = target_of(name)
    with assert_model_untouched(model):
        less = checkpointed(model)
        ours = pb.explain(less, inputs, target=target, method=pb.IntegratedGradients(steps=3))
    native = pb.explain(model, inputs, target=target, method=pb.IntegratedGradients(steps=3))
    found, wanted = (
        each.values if isinstance(each.values, dict) else {"": each.values} for each in (ours, native)
    )
    assert found.keys() == wanted.keys()
    assert all(apart(found[key], wanted[key]) <= 1e-12 for key in wanted)
    assert torch.equal(ours.score, native.score)


def test_blocks_run_twice_and_only_above_the_site() -> None:
    net = deep()
    for site, runs in {"input": 6, "1.2": 3, "1.2.inner.0": 3, "1.5": 0}.items():
        problem = pb.pose(checkpointed(net), points(), target=1, site=site)
        Counted.runs = 0
        ours = problem.grad()
        assert Counted.runs == 6 + runs
        native = pb.pose(net, points(), target=1, site=site).grad()
        assert apart(ours, native) <= 1e-12


@pytest.mark.parametrize(
    "rules", [[Scaled(("gelu",))], [Scaled(("gelu",), within="*inner*")], [Detach(("gelu",))]], ids=repr
)
def test_rules_hold_in_the_second_run(rules: list[Rule]) -> None:
    net = deep()
    ours, native = (
        pb.pose(model, points(), target=1).under(rules, uncovered="gradient").grad()
        for model in (checkpointed(net), net)
    )
    assert apart(ours, native) <= 1e-12
    assert apart(native, pb.pose(net, points(), target=1).grad()) > 1e-3


@pytest.mark.parametrize("method", ["AttnLRP()", "LRP()"])
def test_relevance_of_a_transformer(method: str) -> None:
    model, inputs = in_float64(ARCHITECTURES["gpt2"]())
    target = target_of("gpt2")
    ours, native = (
        pb.explain(each, inputs, target=target, method=method).values for each in (checkpointed(model), model)
    )
    assert apart(ours, native) <= 1e-12


def test_a_rule_on_the_blocks_own_operation_is_refused_rather_than_lost() -> None:
    """The tanh runs in the block itself, which is not on record the second time."""
    problem = pb.pose(checkpointed(deep()), points(), target=1)
    ruled = problem.under([Scaled(("tanh",), within="1.*")], uncovered="gradient")
    with pytest.raises(pb.CoverageError, match="tanh is recomputed in the backward outside any module"):
        ruled.grad()


def test_the_peak_is_lower() -> None:
    net = deep(24)
    x = torch.randn(256, 8, dtype=torch.float64)
    peaks = []
    for model in (checkpointed(net), net):
        problem = pb.pose(model, x, target=1, chunk=256)
        with PeakMeter() as meter:
            problem.grad()
        peaks.append(meter.peak)
    assert peaks[0] <= 0.4 * peaks[1]


def test_a_model_without_repeated_blocks_is_refused() -> None:
    with pytest.raises(pb.ModelError, match=r"Sequential has no nn\.ModuleList .* blocks of one class"):
        checkpointed(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
