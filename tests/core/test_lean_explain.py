"""Explanations with the lean backward: the same bits, fewer bytes, and only where that pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pullback as pb
from pullback.core import problem as problem_module
from pullback.core.audit import Uncovered, audit
from pullback.core.lean import SMALLEST, Lean
from pullback.core.overrides import overrides
from pullback.core.resources import PeakMeter, Resources
from pullback.testing import assert_model_untouched
from tests.core.rules import Scaled


def network(inplace: bool = True, dtype: torch.dtype = torch.float32, depth: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=inplace),
            nn.MaxPool2d(3, 2, 1),
            *(layer for _ in range(depth) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(inplace=inplace),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 5),
        )
        for module in net:
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval().to(dtype)


def images(size: int = 80, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return draw.to(dtype)


class Mirror:
    """A domain: the value upside down."""

    def analysis(self, x: Tensor) -> Tensor:
        return x.flip(-2)

    synthesis = analysis


class Functional(nn.Module):
    """The same operations without their modules."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(network()[0].weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(F.conv2d(x, self.weight)), 2).mean((2, 3))


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From how many elements on evaluations were lean, one entry per lean evaluation."""
    found: list[int] = []
    original = problem_module.lean_backward

    def counted(smallest: int) -> Any:
        found.append(smallest)
        return original(smallest)

    monkeypatch.setattr(problem_module, "lean_backward", counted)
    # as on images large enough for memory to matter
    monkeypatch.setattr(Resources, "is_roomy", lambda self: False)
    return found


def without_lean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Resources, "lean_from", lambda self, rows: None)


@pytest.mark.parametrize("method", ["gradient", "integrated_gradients(steps=5)", "smoothgrad(samples=3)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_explanations_are_equal_to_the_bit(
    method: str, dtype: torch.dtype, channels_last: bool, monkeypatch: pytest.MonkeyPatch, entered: list[int]
) -> None:
    net, x = network(dtype=dtype), images(dtype=dtype)
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    with assert_model_untouched(net):
        ours = pb.explain(net, x, target=1, method=method)
    assert entered
    without_lean(monkeypatch)
    native = pb.explain(net, x, target=1, method=method)
    assert torch.equal(ours.values, native.values)
    assert torch.equal(ours.score, native.score)
    assert ours.diagnostics.keys() == native.diagnostics.keys()
    assert str(ours.diagnostics.get("coverage")) == str(native.diagnostics.get("coverage"))


@pytest.mark.parametrize("site", ["input", "0", "3", "4:input"])
def test_at_sites_in_domains_and_for_several_targets(
    site: str, monkeypatch: pytest.MonkeyPatch, entered: list[int]
) -> None:
    net, x = network(), images()

    def run() -> list[Tensor]:
        several = pb.explain_targets(net, x, [0, 1], method="gradient", site=site)
        mirrored = pb.pose(net, x, target=1, site=site).in_domain(Mirror()).grad()
        return [*(each.values for each in several), mirrored]

    ours = run()
    assert entered
    without_lean(monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(ours, run(), strict=True))


def test_functional_calls_and_plain_callables_count(
    monkeypatch: pytest.MonkeyPatch, entered: list[int]
) -> None:
    net = Functional().requires_grad_(False)
    for model in (net, net.forward):
        entered.clear()
        ours = pb.explain(model, images(), target=1, method="gradient")
        assert entered == [SMALLEST]
        with monkeypatch.context() as patch:
            without_lean(patch)
            assert torch.equal(ours.values, pb.explain(model, images(), target=1, method="gradient").values)


def test_time_is_worth_more_where_memory_is_plenty(
    entered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a MiB or so stay native, unless the user divides the batch or gives a budget; rows of 14 MiB do not."""
    monkeypatch.undo()
    resources = Resources()
    resources.row_bytes, resources.lean_row = 2**20, SMALLEST
    assert resources.lean_from(16) is None
    assert Resources("auto", "1 GiB").budget is not None
    for chosen in (Resources(chunk=16), Resources()):
        chosen.row_bytes, chosen.lean_row = (2**20 if chosen.chunk else 14 * 2**20), SMALLEST
        assert chosen.lean_from(16) == SMALLEST


def test_tiny_networks_and_transformers_never_enter(entered: list[int]) -> None:
    pb.explain(network(), images(8), target=1, method=pb.IntegratedGradients(steps=16))
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True, activation="gelu")
    patches = nn.Sequential(nn.Conv1d(64, 64, 1), nn.Flatten(2))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.layers = patches, nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(self.patches(x).transpose(1, 2)).mean(1)

    pb.explain(Encoder().eval(), torch.randn(8, 64, 256), target=1, method="gradient")
    assert not entered


def test_rules_keep_the_native_backward(entered: list[int]) -> None:
    problem = pb.pose(network(), images(), target=1)
    problem.under([Scaled()], uncovered="gradient").grad()
    assert not entered
    problem.grad()
    assert entered


def test_as_a_rule_it_covers_nothing_and_linear_steps_stay_linear() -> None:
    net = network().requires_grad_(False)
    x = images().requires_grad_()
    (native,) = torch.autograd.grad(net(x * 1)[:, 1].sum(), x)
    with overrides(net, [Lean()]) as coverage:
        output = net(x * 1)
        assert audit(output, coverage) == (
            Uncovered("relu", "5", 1),
            Uncovered("max_pool2d", "3", 1),
            Uncovered("relu", "2", 1),
        )
        assert torch.equal(torch.autograd.grad(output[:, 1].sum(), x)[0], native)
    assert not coverage.covered
    assert coverage.plain == {("relu", "2"): 1, ("max_pool2d", "3"): 1, ("relu", "5"): 1}


def peak(run: Any) -> int:
    with PeakMeter() as meter:
        run()
    return meter.peak


def test_the_peak_is_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network(depth=12), images(160, 4)
    problem = pb.pose(net, x, target=1)
    ours = peak(problem.grad)
    without_lean(monkeypatch)
    assert ours <= 0.6 * peak(pb.pose(net, x, target=1).grad)


def test_a_budget_allows_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether an operation is lean may not depend on the rows then: the peak must stay a straight line."""
    net, x = network(depth=12), images(32, 1)
    method = pb.IntegratedGradients(steps=64)

    def run() -> pb.Attribution:
        return pb.explain(net, x, target=1, method=method, memory_budget="12MiB")

    found: list[pb.Attribution] = []
    assert peak(lambda: found.append(run())) <= 12 * 2**20
    without_lean(monkeypatch)
    native = run()
    assert found[0].meta["chunk"] >= 1.5 * native.meta["chunk"]
    gap = (found[0].values - native.values).abs().max() / native.values.abs().max()
    assert gap <= 1e-5


def test_gradients_that_the_models_forward_takes(entered: list[int]) -> None:
    """A force is the derivative of an energy; its explanation needs second derivatives."""

    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = network(inplace=False, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x if x.requires_grad else x.requires_grad_()
                (force,) = torch.autograd.grad(self.energy(x).pow(3).sum(), x, create_graph=True)
            return force.square().flatten(1).sum(1, keepdim=True)

    net, x = Force(), images(dtype=torch.float64)
    ours = pb.explain(net, x, target=0, method="gradient").values
    assert entered
    z = x.clone().requires_grad_()
    (native,) = torch.autograd.grad(net(z).sum(), z)
    assert torch.equal(ours, native)


def test_checkpoints_of_the_model_recompute_leanly(entered: list[int]) -> None:
    class Checkpointing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(inplace=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)

    net, x = Checkpointing(), images()
    ours = pb.explain(net, x, target=1, method="gradient").values
    assert entered
    assert torch.equal(ours, pb.explain(net.net, x, target=1, method="gradient").values)


def test_compiled_parts(entered: list[int]) -> None:
    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(inplace=False)
            self.inner = torch.compile(lambda z: F.relu(z * 2), backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.inner(x))

    net, x = Compiled(), images()
    ours = pb.explain(net, x, target=1, method="gradient").values
    assert entered
    z = x.clone().requires_grad_()
    (native,) = torch.autograd.grad(net.net(F.relu(z * 2))[:, 1].sum(), z)
    assert torch.equal(ours, native)
