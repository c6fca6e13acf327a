"""Nested rules, their error estimates, and what ``tol`` promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pullback as pb
from pullback.attribution.refinement import MIDPOINT, TRAPEZOID, NestedRule, error_with_kinks, smooth_error
from pullback.core.points import Point

RULES = {"midpoint": MIDPOINT, "trapezoid": TRAPEZOID}


def levels(rule: NestedRule, count: int) -> list[tuple[Tensor, Tensor]]:
    """Nodes and weights of the first levels, each with all that the levels before brought."""
    found: list[tuple[Tensor, Tensor]] = []
    ends = [0.0, 1.0] if rule.ends else []
    nodes, weights, steps = torch.tensor(ends).double(), torch.full((len(ends),), 0.5).double(), rule.first
    for _ in range(count):
        new_nodes = rule.new_nodes(steps)
        nodes, weights = torch.cat([nodes, new_nodes]), torch.cat([weights, torch.ones_like(new_nodes)])
        order = nodes.argsort()
        found.append((nodes[order], weights[order] / steps))
        steps *= rule.growth
    return found


@pytest.mark.parametrize("name", RULES)
def test_levels_are_the_rule_and_keep_their_nodes(name: str) -> None:
    rule, steps = RULES[name], RULES[name].first
    for nodes, weights in levels(rule, 4):
        edges = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        wanted = (edges[1:] + edges[:-1]) / 2 if rule is MIDPOINT else edges
        torch.testing.assert_close(nodes, wanted, rtol=0, atol=1e-15)
        assert len(nodes) == steps + rule.ends
        # both are exact for straight lines, and their errors for a square are -1/12n² and 1/6n²
        assert float(weights.sum()) == pytest.approx(1, abs=1e-15)
        assert float(weights @ nodes) == pytest.approx(1 / 2, abs=1e-15)
        off = float(weights @ nodes**2) - 1 / 3
        assert off == pytest.approx((-1 / 12 if rule is MIDPOINT else 1 / 6) / steps**2, rel=1e-9)
        steps *= rule.growth


def test_estimates_are_exact_for_the_errors_they_assume() -> None:
    """Changes of levels whose error is C n^-2: both estimates; C n^-1 with errors of one sign: the smooth one."""
    change, before = torch.tensor([3.0]).double(), torch.tensor([12.0]).double()
    assert float(smooth_error(change, before)) == pytest.approx(1.0)  # errors 16, 4, 1
    change, before = torch.tensor([1.0]).double(), torch.tensor([2.0]).double()
    assert float(smooth_error(change, before)) == pytest.approx(1.0)  # errors 4, 2, 1
    change, before = torch.tensor([8.0]).double(), torch.tensor([72.0]).double()
    assert float(error_with_kinks(change, before)) == pytest.approx(8 / 9)  # errors 81, 9, 1: an upper bound
    # faster than the second order is never believed, and growing changes are no series
    assert float(smooth_error(torch.tensor([3.0]), torch.tensor([3e3]))) == pytest.approx(1.0)
    assert float(smooth_error(torch.tensor([3.0]), torch.tensor([1.0]))) == pytest.approx(9.0)
    # ReLU nets: changes fall by a third
    kinked = error_with_kinks(torch.tensor([1.0]), torch.tensor([3.0]))
    assert float(kinked) == pytest.approx(0.4)
    assert float(smooth_error(torch.tensor([0.0]), torch.tensor([0.0]))) == 0


def reference(net: Callable[[Tensor], Tensor], x: Tensor, steps: int = 2187) -> Tensor:
    """Integrated gradients from zero by midpoints, with nothing of ours."""
    total = torch.zeros_like(x)
    for alpha in ((torch.arange(steps).double() + 0.5) / steps).split(243):
        z = (alpha[:, None, None] * x).requires_grad_()
        total += torch.autograd.grad(net(z.flatten(0, 1)).sum(), z)[0].sum(0)
    return total / steps * x


def net_of(act: nn.Module, width: int = 96) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, width), act, nn.Linear(width, width), act, nn.Linear(width, 1)
    ).double()


def relative_error(values: Point, exact: Tensor) -> Tensor:
    assert isinstance(values, Tensor)
    off: Tensor = torch.linalg.vector_norm(values - exact, dim=1) / torch.linalg.vector_norm(exact, dim=1)
    return off


@pytest.fixture
def x() -> Tensor:
    return 2 * torch.randn(24, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), nn.Tanh()])
def test_smooth_nets_meet_the_tolerance_and_say_their_error(act: nn.Module, x: Tensor) -> None:
    net = net_of(act)
    found = pb.explain(net, x, target=0, method=pb.IntegratedGradients(tol=0.01))
    error = relative_error(found.values, reference(net, x))
    assert bool((error <= 0.01).all())
    assert found.diagnostics["converged"].all()
    evaluations = found.diagnostics["evaluations"].double()
    assert float(evaluations.mean()) <= 25
    # points of trapezoidal levels, which only doubling has
    assert set(evaluations.tolist()) <= {5, 9, 17, 33, 65}
    ratio = found.diagnostics["error"] / error
    assert float(ratio.min()) > 0.5
    assert float(ratio.median()) < 4


@pytest.mark.parametrize("act", [nn.ReLU(), nn.LeakyReLU(0.1)])
def test_nets_with_kinks_say_their_error_within_a_factor_of_two(act: nn.Module, x: Tensor) -> None:
    net = net_of(act)
    found = pb.explain(net, x, target=0, method=pb.IntegratedGradients(tol=0.02))
    ratio = found.diagnostics["error"] / relative_error(found.values, reference(net, x))
    assert set(found.diagnostics["evaluations"].tolist()) <= {9, 27, 81, 243}
    assert float(((ratio > 0.5) & (ratio < 2)).double().mean()) > 0.9


def test_a_kink_that_the_graph_hides_is_met_with_caution(x: Tensor) -> None:
    """``z * (z > 0)`` counts as smooth; the changes then fall by half, and the stated error rises with their ratio."""
    net = net_of(nn.ReLU())

    def hidden(z: Tensor) -> Tensor:
        for layer in net:
            z = z * (z > 0) if isinstance(layer, nn.ReLU) else layer(z)
        return z

    found = pb.explain(hidden, x, target=0, method=pb.IntegratedGradients(tol=0.02))
    ratio = found.diagnostics["error"] / relative_error(found.values, reference(net, x))
    assert 0.5 < float(ratio.median()) < 2
    assert float(ratio.min()) > 1 / 5


def test_a_step_too_thin_to_be_seen_is_not_called_converged() -> None:
    """Almost all of the change happens in the first hundred-thousandth of the path, as from a zero baseline to a norm."""
    x = torch.tensor([[1.0, 2.0]]).double()

    def model(z: Tensor) -> Tensor:
        return F.rms_norm(z, (2,), eps=1e-10) @ torch.tensor([[1.0], [3.0]]).double()

    found = pb.explain(model, x, target=0, method=pb.IntegratedGradients(tol=0.05))
    assert not found.diagnostics["converged"].any()
    # the gradient at the baseline, 1e5 times the weight 1/1024, is left out of what is returned
    assert isinstance(found.values, Tensor)
    assert float(found.values.abs().max()) < 10
    assert any("did not reach" in note for note in found.diagnostics["notes"])


@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU()])
def test_batch_mates_and_chunks_change_nothing(act: nn.Module, x: Tensor) -> None:
    net, method = net_of(act, 24), pb.IntegratedGradients(tol=0.02 if isinstance(act, nn.ReLU) else 0.005)
    x = x[:6] * torch.tensor([0.01, 0.3, 1, 1, 2, 3]).double()[:, None]
    whole = pb.explain(net, x, target=0, method=method)
    assert isinstance(whole.values, Tensor)
    assert len(whole.diagnostics["evaluations"].unique()) > 1
    for row in range(6):
        alone = pb.explain(net, x[row : row + 1], target=0, method=method, chunk=5)
        assert isinstance(alone.values, Tensor)
        torch.testing.assert_close(alone.values[0], whole.values[row], rtol=0, atol=1e-12)
        assert alone.diagnostics["evaluations"][0] == whole.diagnostics["evaluations"][row]
        assert float(alone.diagnostics["error"][0]) == pytest.approx(
            float(whole.diagnostics["error"][row]), rel=1e-9
        )


@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU()])
@pytest.mark.parametrize("most", [3, 8, 9, 16, 64])
def test_max_steps_is_the_most_that_is_spent(act: nn.Module, most: int, x: Tensor) -> None:
    found = pb.explain(net_of(act, 24), x, target=0, method=pb.IntegratedGradients(tol=1e-9, max_steps=most))
    assert most / 3 < int(found.diagnostics["evaluations"].max()) <= most
    assert not found.diagnostics["converged"].any()
