"""The conservation report: where relevance goes, block by block, and that it adds up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.attribution import conservation_report
from pullback.attribution.rules.presets import RELP
from tests.attribution.test_fullgrad_terms import NETS, Computes, conv, linear, weighted
from tests.golden_net import example, largest, tiny_cnn, tiny_mlp


def total(report: pb.attribution.conservation.ConservationReport) -> Tensor:
    return report.input_share + report.absorbed + report.leaked + report.residual


def test_a_relu_network_only_loses_to_its_biases() -> None:
    net, x = tiny_cnn(), example(2, 3, 8, 8)
    report = conservation_report(net, x, 1)
    assert [block.name for block in report.blocks] == ["0", "1", "5", "9"]
    assert not report.leaked.any()
    assert largest(report.blocks[-1].absorbed, net[9].bias[1].detach().expand(2)) < 1e-15
    gradient = pb.pose(net, x, target=1).grad()
    assert isinstance(gradient, Tensor)
    assert largest(report.input_share, (gradient * x).flatten(1).sum(1)) < 1e-15
    assert largest(total(report), report.score) < 1e-15
    assert report.residual.abs().max() < 1e-15


def test_what_gelu_and_layer_norm_leak_and_what_the_rules_stop() -> None:
    net, x = tiny_mlp(), example(2, 6)
    plain, ruled = conservation_report(net, x, 1), conservation_report(net, x, 1, RELP)
    leaks = {block.name: block.leaked for block in plain.blocks}
    z = net[0](x).detach()
    delta = torch.autograd.functional.jacobian(lambda h: net[1:](h)[:, 1].sum(), z)
    slope = torch.autograd.functional.jacobian(lambda h: nn.functional.gelu(h).sum(), z)
    density = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
    assert isinstance(delta, Tensor)
    assert isinstance(slope, Tensor)
    assert largest(leaks["1"], (delta / slope * -z.square() * density).sum(1)) < 1e-13
    assert float(leaks["2"].abs().max()) > 1e-3
    assert ruled.leaked.abs().max() < 1e-15
    # the mean of a layer norm is linear and its spread constant: only its shift is absorbed
    assert {block.name: bool(block.absorbed.any()) for block in ruled.blocks}["2"]
    for report in (plain, ruled):
        assert largest(total(report), report.score) < 1e-14


@pytest.mark.parametrize("rules", [(), RELP], ids=["gradient", "relp"])
@pytest.mark.parametrize(
    "name", ["smooth", "encoder", "lstm", "written", "attention, boolean, sdpa", "checkpoint"]
)
def test_adds_up(name: str, rules: tuple[pb.core.overrides.Rule, ...]) -> None:
    net, shape = NETS[name]
    report = conservation_report(net.eval(), example(*shape), weighted, rules)
    size = torch.stack([block.absorbed.abs() + block.leaked.abs() for block in report.blocks]).sum(0)
    assert (report.residual.abs() <= 1e-12 * (size + report.input_share.abs())).all()
    assert largest(total(report), report.score) < 1e-12
    assert report.uncovered == ()


def test_literals_are_constants_and_curvature_is_a_leak() -> None:
    net = Computes(lambda net, x: (x + 0.5) * (x - 2.0))
    report = conservation_report(net, torch.tensor([[3.0]], dtype=torch.float64), 0)
    # f = 3.5 · 1; δ at the first factor is 1, at the second 3.5; the product's own bias is -f
    assert float(report.input_share) == pytest.approx(3 * 4.5)
    assert float(report.absorbed) == pytest.approx(1 * 0.5 + 3.5 * -2.0)
    assert float(report.leaked) == pytest.approx(-3.5)
    halved = conservation_report(net, torch.tensor([[3.0]], dtype=torch.float64), 0, RELP)
    assert float(halved.input_share) == pytest.approx(3 * 2.25)
    assert float(halved.absorbed) == pytest.approx((0.5 + 3.5 * -2.0) / 2)
    assert float(halved.leaked) == pytest.approx(0)


def test_blocks_rows_and_table() -> None:
    inner = nn.Sequential(linear(6, 4), nn.Tanh())
    net = nn.Sequential(inner, nn.Sequential(linear(4, 2), nn.Sequential(linear(2, 2))))
    x = example(2, 6)
    coarse, fine = (conservation_report(net, x, 1, depth=depth) for depth in (1, 2))
    assert [block.name for block in coarse.blocks] == ["0", "1"]
    assert [block.name for block in fine.blocks] == ["0.0", "0.1", "1.0", "1.1"]
    assert largest(fine.blocks[0].absorbed + fine.blocks[1].absorbed, coarse.blocks[0].absorbed) < 1e-15
    rows = coarse.to_rows()
    assert [row["block"] for row in rows] == 2 * ["input", "0", "1", "residual", "score"]
    for example_rows in (rows[:5], rows[5:]):
        assert sum(row["total"] for row in example_rows[:-1]) == pytest.approx(
            example_rows[-1]["total"], abs=1e-15
        )
    lines = str(coarse).splitlines()
    assert lines[0].split() == ["example", "0", "absorbed", "leaked", "total"]
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 12
    assert f"{float(coarse.score[1]):.4g}" in lines[-1]
    with pytest.raises(pb.MethodError, match="depth counts"):
        conservation_report(net, x, 1, depth=0)


def test_batch_is_per_example() -> None:
    net, x = nn.Sequential(conv(), nn.SiLU(), conv()), example(3, 3, 5, 5)
    whole = conservation_report(net, x, weighted, RELP)
    for row in range(3):
        alone = conservation_report(net, x[row : row + 1], weighted, RELP)
        for one, many in zip(alone.blocks, whole.blocks, strict=True):
            assert abs(float(one.absorbed - many.absorbed[row])) < 1e-13
            assert abs(float(one.leaked - many.leaked[row])) < 1e-13
