"""Memory of an explanation: flat in the number of points, within the budget, and less after it ran out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.core.resources import PeakMeter

from .methods import images, relative, smooth_net, values


def cnn() -> tuple[nn.Module, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(2, 16, 3),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(576, 4),
        )
    return net.eval(), torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(1))


def transformer() -> tuple[nn.Module, Any]:
    from tests.zoo.architectures import decoder

    return decoder("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=1, n_head=2, n_positions=16)


METHODS: dict[str, Callable[[int], Any]] = {
    "integrated gradients": lambda points: pb.IntegratedGradients(steps=points),
    "smoothgrad": lambda points: pb.SmoothGrad(samples=points),
    "expected gradients": lambda points: pb.ExpectedGradients(samples=points),
}


def peak(run: Callable[[], Any]) -> int:
    """The most bytes of tensors alive at once, made while running."""
    with PeakMeter() as meter:
        run()
    return meter.peak


@pytest.mark.parametrize("build", [cnn, transformer])
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("points", [128, pytest.param(1024, marks=pytest.mark.slow)])
def test_flat_in_the_number_of_points(
    build: Callable[[], tuple[nn.Module, Any]], kind: str, points: int
) -> None:
    """At a fixed chunk, from 16 points on: within 10 % (nodes and weights are some bytes per point)."""
    model, inputs = build()
    few, many = (
        peak(lambda number=number: pb.explain(model, inputs, target=1, method=METHODS[kind](number), chunk=8))
        for number in (16, points)
    )
    assert many <= 1.1 * few
    assert few > 0


def test_the_meter_sees_a_list_of_all_points() -> None:
    """The measure above can fail: a loop that keeps every gradient grows."""

    def hoard(problem: pb.Problem) -> Tensor:
        kept = [problem.grad(problem.point * (k + 1) / points) for k in range(points)]
        return torch.stack(kept).mean(0)  # type: ignore[arg-type]

    model, inputs = cnn()
    points = 16
    few = peak(lambda: pb.explain(model, inputs, target=1, method=hoard))
    points = 256
    many = peak(lambda: pb.explain(model, inputs, target=1, method=hoard))
    assert many > 2 * few


@pytest.mark.parametrize("build", [cnn, transformer])
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("rows", [12, 20, 50])
def test_the_budget_is_kept(build: Callable[[], tuple[nn.Module, Any]], kind: str, rows: float) -> None:
    """Budgets of so many rows, measured as what one row needs."""
    model, inputs = build()
    first = {name: leaf[:1] for name, leaf in inputs.items()} if isinstance(inputs, dict) else inputs[:1]
    one = peak(lambda: pb.explain(model, first, target=1, method="gradient", chunk=1))
    budget = int(rows * one)
    run: list[pb.Attribution] = []
    used = peak(
        lambda: run.append(
            pb.explain(model, inputs, target=1, method=METHODS[kind](32), memory_budget=budget)
        )
    )
    assert used <= budget, f"{used} of {budget}"
    free = pb.explain(model, inputs, target=1, method=METHODS[kind](32))
    assert relative(values(run[0]), values(free)) <= 1e-4


@pytest.mark.parametrize("share", [1.2, 1.7, 2.0, 2.5, 4.0])
def test_a_tight_budget_is_kept_or_refused(share: float) -> None:
    """Also by the probe: two rows are tried only where they fit."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 32, 3, padding=1), nn.GELU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)).eval()
    x = torch.randn(3, 3, 32, 32)
    budget = int(share * peak(lambda: pb.explain(model, x[:1], target=1, method="gradient", chunk=1)))

    refused: list[pb.InputError] = []

    def run() -> None:
        try:
            pb.explain(model, x, target=1, method=pb.IntegratedGradients(steps=16), memory_budget=budget)
        except pb.InputError as error:
            refused.append(error)

    assert peak(run) <= budget
    assert not refused or share < 2.5


def test_a_larger_budget_is_used() -> None:
    model, x = cnn()
    small, large = (
        pb.explain(model, x, target=1, method=pb.IntegratedGradients(steps=64), memory_budget=budget).meta[
            "chunk"
        ]
        for budget in (1_000_000, 10_000_000)
    )
    assert 1 <= small < large


@pytest.mark.parametrize("budget", [10, "1kB", "2 KiB"])
def test_too_small_a_budget_is_refused(budget: int | str) -> None:
    model, x = cnn()
    with pytest.raises(pb.InputError, match=r"memory_budget is [\d,]+ bytes, but one example needs [\d,]+"):
        pb.explain(model, x, target=1, memory_budget=budget)


class _Limited(nn.Module):
    """A device that holds no more than so many rows."""

    def __init__(self, rows: int, error: Callable[[], Exception]) -> None:
        super().__init__()
        self.rows = rows
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.rows:
            raise self.error()
        return x


ERRORS: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: not enough memory: you tried"
    ),
    "python": MemoryError,
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("site", ["input", "2"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_out_of_memory_halves_the_chunk_and_nothing_else(rows: int, site: str, error: str) -> None:
    net, x = smooth_net(), images(4)
    tight = nn.Sequential(*net[:5], _Limited(rows, ERRORS[error]), *net[5:])
    for method in (
        pb.IntegratedGradients(steps=7),
        pb.SmoothGrad(pb.IntegratedGradients(steps=3), samples=3),
    ):
        wanted = pb.explain(net, x, target=1, method=method, site=site)
        found = pb.explain(tight, x, target=1, method=method, site=site)
        assert relative(values(found), values(wanted)) <= 1e-12
        assert found.meta["chunk"] <= rows
        assert relative(found.score, wanted.score) <= 1e-12


def test_out_of_memory_with_several_targets() -> None:
    net, x = smooth_net(), images(4)
    tight = nn.Sequential(*net[:5], _Limited(2, ERRORS["cuda"]), *net[5:])
    wanted = pb.explain_targets(net, x, [0, 1, 2], method=pb.IntegratedGradients(steps=5))
    found = pb.explain_targets(tight, x, [0, 1, 2], method=pb.IntegratedGradients(steps=5))
    for a, b in zip(found, wanted, strict=True):
        assert relative(values(a), values(b)) <= 1e-12


def test_out_of_memory_at_one_row_is_the_users() -> None:
    tight = nn.Sequential(_Limited(0, ERRORS["cuda"]), *smooth_net())
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        pb.explain(tight, images(3), target=1, method="gradient")


def test_another_error_is_not_taken_for_memory() -> None:
    tight = nn.Sequential(_Limited(2, lambda: RuntimeError("shapes do not match")), *smooth_net())
    with pytest.raises(RuntimeError, match="shapes do not match"):
        pb.explain(tight, images(3), target=1, method="gradient")
