"""Path stability against counts by hand and a pairwise AUC."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pullback.attribution.path_stability import path_stability
from pullback.core import noise
from pullback.core.errors import InputError, MethodError, ModelError

from ..conformance.fingerprint import assert_untouched
from ..golden_net import example, tiny_cnn

X = example(3, 3, 8, 8)


def shifted() -> nn.Sequential:
    net = tiny_cnn()
    with torch.no_grad():
        net[1].bias += 0.3
    return net


def pre_activations(net: nn.Sequential, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [net[:2](x), net[:6](x)]


def test_shares_and_bins_by_counting() -> None:
    early, late = shifted(), tiny_cnn()
    found = path_stability(early, late, X, temperature=0.5, edges=(0.0, 0.5, 1.0, 3.0))
    before, now = pre_activations(early, X), pre_activations(late, X)
    assert found.layers == ("2", "6")
    assert found.units.tolist() == [3 * 4 * 64, 3 * 5 * 16]
    same = [((a > 0) == (b > 0)).double() for a, b in zip(before, now, strict=True)]
    assert torch.allclose(found.stability, torch.stack([each.mean() for each in same]))
    assert 0.3 < found.overall < 0.999
    flat, size = torch.cat([s.flatten() for s in same]), torch.cat([z.flatten() for z in now]).abs() / 0.5
    assert math.isclose(found.overall, float(flat.mean()))
    for number, (low, high) in enumerate(itertools.pairwise((0.0, 0.5, 1.0, 3.0, math.inf))):
        inside = (size >= low) & (size < high)
        assert int(found.bin_units[number]) == int(inside.sum())
        if inside.any():
            assert math.isclose(float(found.bin_stability[number]), float(flat[inside].mean()))


def test_auc_by_all_pairs() -> None:
    """Every pair of a draw that stayed and one that flipped, ties a half."""
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU()).double().eval()
    x = torch.tensor([[0.3, -0.2], [1.0, 0.7]], dtype=torch.float64)
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, 0.5], [1.0, 2.0]]))
        net[0].bias.copy_(torch.tensor([0.05, 0.1, 0.05]))
    found = path_stability(net, net, x, noise=0.8, samples=6, seed=3)
    z = net[0](x).detach()
    spread = x.amax(1) - x.amin(1)
    stayed, flipped = [], []
    for draw in range(6):
        unit = torch.stack([noise.normal((2,), 3, draw, f"paths/{row}") for row in range(2)]).double()
        moved = net[0](x + unit * (0.8 * spread)[:, None]).detach()
        keep = (moved > 0) == (z > 0)
        stayed += z.abs()[keep].tolist()
        flipped += z.abs()[~keep].tolist()
    assert stayed
    assert flipped
    wins = [float(a > b) + 0.5 * float(a == b) for a in stayed for b in flipped]
    assert math.isclose(found.overall_auc, sum(wins) / len(wins), rel_tol=1e-12)
    assert math.isclose(float(found.auc[0]), found.overall_auc)
    assert found.overall == 1.0


def test_excitation_predicts_stability_on_the_golden_net() -> None:
    found = path_stability(shifted(), tiny_cnn(), X)
    kept = found.bin_stability[found.bin_units > 20]
    assert kept[-1] == 1.0
    assert kept[0] < kept[-1]
    assert found.overall_auc > 0.8


def test_state_dicts_functional_calls_and_no_trace() -> None:
    late = tiny_cnn()

    class Written(nn.Module):
        def __init__(self, net: nn.Sequential) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            z = torch.relu_(self.net[:2](x))
            out: Tensor = self.net[3:](z)
            return out

    state = shifted().state_dict()
    with assert_untouched(late, X):
        by_state = path_stability(state, late, X)
    by_model = path_stability(shifted(), late, X)
    # as text, where NaN equals NaN
    assert str(by_state.to_rows()) == str(by_model.to_rows())
    written = path_stability(Written(shifted()), Written(tiny_cnn()), X)
    assert written.stability.tolist() == by_model.stability.tolist()


def test_rows_and_plot() -> None:
    found = path_stability(shifted(), tiny_cnn(), X, edges=(0.0, 1.0, 1e9))
    rows = found.to_rows()
    assert [row["name"] for row in rows] == ["2", "6", "[0, 1)", "[1, 1e+09)", "[1e+09, inf)", "all"]
    assert math.isnan(rows[4]["stability"])
    assert rows[-1]["units"] == int(found.units.sum())
    axes = found.plot()
    assert axes.lines[0].get_xdata().tolist() == [0.0, 1.0]  # type: ignore[union-attr]


def test_errors() -> None:
    net = tiny_cnn()
    smooth = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).eval()
    cases: list[tuple[type[Exception], str, Any]] = [
        (ModelError, "ran 0 and 0 rectifiers", lambda: path_stability(smooth, smooth, torch.ones(1, 2))),
        (ModelError, "ran 1 and 2 rectifiers .* not the same", lambda: path_stability(net[:4], net, X)),
        (InputError, "finite floating-point inputs", lambda: path_stability(net, net, X.long())),
        (InputError, "finite floating-point inputs", lambda: path_stability(net, net, X / 0)),
        (MethodError, "edges rise from 0", lambda: path_stability(net, net, X, edges=(0.5, 1.0))),
        (MethodError, "noise is a finite number", lambda: path_stability(net, net, X, noise=0.0)),
    ]
    for error, message, make in cases:
        with pytest.raises(error, match=message):
            make()
