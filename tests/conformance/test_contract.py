"""What every method promises: about batches, chunks, seeds, threads, dtypes, text and completeness."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.attribution.spelling import parse_method

from .methods import (
    INPUT_ONLY,
    INSTANCES,
    MODEL_FREE,
    NAMES,
    SEED_UNUSED,
    explain,
    images,
    relative,
    site_of,
    smooth_net,
    values,
)

every_method = pytest.mark.parametrize("name", NAMES)


@every_method
def test_finite_and_of_the_points_rows(name: str) -> None:
    found = explain(smooth_net(), images(), name)
    assert torch.isfinite(values(found)).all()
    assert values(found).shape[0] == 4
    assert values(found).dtype == torch.float64
    if name not in ("GradCAM", "LayerCAM", "FullGrad"):
        assert isinstance(found.point, Tensor)
        assert values(found).shape == found.point.shape
    assert values(found).abs().sum() > 0
    assert found.method == repr(INSTANCES[name])
    assert torch.as_tensor(found.diagnostics["evaluations"]).shape == (4,)


@every_method
def test_batch_mates_do_not_matter(name: str) -> None:
    net, x = smooth_net(), images()
    whole = values(explain(net, x, name))
    single = torch.cat([values(explain(net, row[None], name)) for row in x])
    assert relative(single, whole) <= 1e-12
    order = torch.tensor([2, 0, 3, 1])
    assert relative(values(explain(net, x[order], name)), whole[order]) <= 1e-12


@every_method
@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_chunk_does_not_matter(name: str, chunk: int) -> None:
    net, x = smooth_net(), images()
    auto, cut = explain(net, x, name), explain(net, x, name, chunk=chunk)
    assert relative(values(cut), values(auto)) <= 1e-12
    assert torch.equal(
        torch.as_tensor(cut.diagnostics["evaluations"]), torch.as_tensor(auto.diagnostics["evaluations"])
    )


@every_method
def test_same_seed_same_bits_and_no_global_randomness(name: str) -> None:
    net, x = smooth_net(), images()
    torch.manual_seed(7)
    first = values(explain(net, x, name))
    torch.manual_seed(8)
    np.random.seed(3)  # noqa: NPY002 - the global state is what is tested
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    again = values(explain(net, x, name))
    assert torch.equal(first, again)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


@pytest.mark.parametrize(
    "name", [name for name in NAMES if hasattr(INSTANCES[name], "seed") and name not in SEED_UNUSED]
)
def test_another_seed_is_another_draw(name: str) -> None:
    net, x = smooth_net(), images()
    assert not torch.equal(values(explain(net, x, name)), values(explain(net, x, name, seed=11)))


@every_method
def test_number_of_threads_does_not_matter(name: str) -> None:
    net, x = smooth_net(), images()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = values(explain(net, x, name))
        torch.set_num_threads(2)
        two = values(explain(net, x, name))
    finally:
        torch.set_num_threads(threads)
    assert relative(two, one) <= 1e-12


@every_method
def test_text_reads_back(name: str) -> None:
    method = INSTANCES[name]
    if name == "InDomain" and not hasattr(pb, "Fourier"):
        pytest.skip("no registered domain yet")
    assert parse_method(repr(method)) == method
    spelled, parameters = repr(method).split("(", 1)
    assert parse_method(f"{spelled.upper()}({parameters}") == method


@pytest.mark.parametrize("name", [name for name in NAMES if name not in INPUT_ONLY])
def test_works_at_a_layer(name: str) -> None:
    net, x = smooth_net(), images()
    found = explain(net, x, name, site="1")
    assert found.site == "1"
    assert values(found).shape[0] == 4
    # the same method on the rest of the net, with the layer's value as its input
    if site_of(name) is None:
        rest = explain(net[2:], net[:2](x).detach(), name)
        assert relative(values(found), values(rest)) <= 1e-12


@every_method
def test_under_smoothgrad(name: str) -> None:
    """No noise: the method itself. Noise: the mean over the very points, from the definition."""
    net, x = smooth_net(), images(2)
    plain = explain(net, x, name)
    still = explain(net, x, name, method=pb.SmoothGrad(INSTANCES[name], samples=2, noise=0.0))
    assert relative(values(still), values(plain)) <= 1e-12
    smooth = pb.SmoothGrad(INSTANCES[name], samples=3, noise=0.1)
    together = values(explain(net, x, name, method=smooth))
    apart = torch.cat([values(explain(net, row[None], name, method=smooth, chunk=1)) for row in x])
    assert torch.isfinite(together).all()
    assert relative(apart, together) <= 1e-12
    assert not torch.equal(together, values(plain))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MODEL_FREE])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_low_precision_is_near_float64(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Weights that bfloat16 holds exactly; bfloat16 has 8 bits, and a variance squares its error."""
    net = smooth_net().bfloat16().double()
    wide = values(explain(net, images(), name))
    low = values(explain(net.to(dtype), images().to(dtype), name))
    assert low.dtype == dtype
    difference = (low.double() - wide).norm() / wide.norm()
    assert difference <= (3 * tolerance if name == "VarGrad" else tolerance)


class _Attention(nn.Module):
    """One self-attention block over rows of the image, without kinks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x.transpose(1, 2).flatten(2))
        mixed, _ = self.mix(rows, rows, rows, need_weights=False)
        out: Tensor = self.head((rows + mixed).tanh().mean(1))
        return out


class _Recurrent(nn.Module):
    """An LSTM over rows of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(12, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.cells(x.transpose(1, 2).flatten(2))
        out: Tensor = self.head(states[:, -1])
        return out


def _architecture(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return (
            smooth_net()
            if kind == "cnn"
            else {"attention": _Attention, "lstm": _Recurrent}[kind]().double().eval()
        )


@pytest.mark.parametrize("kind", ["cnn", "attention", "lstm"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("GradCAM", "LayerCAM")])
def test_gap_is_the_completeness_gap_and_small(name: str, kind: str) -> None:
    """Σ values - (f(x) - f(x')) is what ``gap`` says; with enough steps it vanishes on a smooth net."""
    net, x = _architecture(kind), images(3)
    method: Any = INSTANCES[name]
    if explain(net, x, name).diagnostics["gap"] is None:
        pytest.skip(f"{name} promises no completeness")
    fields = getattr(method, "__dataclass_fields__", {})
    if "steps" in fields:
        method = dataclasses.replace(method, steps=128)
    if name == "InDomain":
        method = pb.InDomain(method.domain, pb.IntegratedGradients(steps=128))
    found = explain(net, x, name, method=method)
    with torch.no_grad():
        change = net(x)[:, 1] - net(torch.zeros_like(x))[:, 1]
    gap = torch.as_tensor(found.diagnostics["gap"])
    assert torch.allclose(gap, values(found).flatten(1).sum(1) - change, atol=1e-10)
    # midpoint on a smooth net: the error falls as 1/steps², here a few 1e-5 of the change
    assert (gap.abs() <= 2e-3 * change.abs().clamp_min(0.1)).all()


def test_at_an_activation_boundary_a_point_may_flip() -> None:
    """A ReLU net is not differentiable where a unit is exactly 0: there the result is one of the two sides.

    This is the documented limit of "nothing depends on the chunk": rounding of a differently shaped matmul may put
    the same point on either side. The promise holds again a hair away from the kink.
    """
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 2, bias=False)).double()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[2].weight.copy_(torch.tensor([[2.0], [3.0]]))
    at = [
        float(values(pb.explain(net, torch.tensor([[z]]).double(), target=0, method="gradient")))
        for z in (-1e-9, 0.0, 1e-9)
    ]
    assert at[0] == 0.0
    assert at[2] == 2.0
    assert at[1] in (0.0, 2.0)
