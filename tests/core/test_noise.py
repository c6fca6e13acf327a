"""Noise: named by seed, draw and stream, and by nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pullback as pb
from pullback.core.noise import generator, normal, uniform


def test_named_by_seed_draw_and_stream() -> None:
    draws = [
        normal((50,), *name)
        for name in [(0, 0, ""), (1, 0, ""), (0, 1, ""), (0, 0, "x"), (10, 1, ""), (1, 0, "1")]
    ]
    for number, draw in enumerate(draws):
        for other in draws[:number]:
            assert abs(float(torch.corrcoef(torch.stack([draw, other]))[0, 1])) < 0.5
    assert torch.equal(draws[0], normal((50,), 0, 0))
    assert not torch.equal(normal((3,), 1, 11), normal((3,), 11, 1))


def test_the_global_state_plays_no_part() -> None:
    torch.manual_seed(1)
    first, before = normal((4,), 0, 0), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, normal((4,), 0, 0))
    torch.manual_seed(1)
    assert torch.equal(before, torch.get_rng_state())
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(first, normal((4,), 0, 0))
        assert uniform((4,), 0, 0).dtype == torch.float32
    finally:
        torch.set_default_dtype(previous)


def test_distribution() -> None:
    """Moments over draws and entries; 10^5 numbers, so five standard errors are 0.016 and 0.011."""
    many = torch.stack([normal((100,), 0, draw) for draw in range(1000)])
    assert abs(float(many.mean())) < 0.016
    assert abs(float(many.var()) - 1) < 0.023
    flat = torch.stack([uniform((100,), 0, draw) for draw in range(1000)])
    assert abs(float(flat.mean()) - 0.5) < 0.005
    assert float(flat.min()) >= 0 and float(flat.max()) < 1  # noqa: PT018


def test_generators_are_of_the_cpu_and_apart() -> None:
    assert generator(0, 0).device.type == "cpu"
    assert generator(0, 0).initial_seed() != generator(0, 0, "x").initial_seed()
    assert generator(-1, 0).initial_seed() >= 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_smoothgrad_meets_the_same_noise_in_every_batch_order_chunk_and_dtype(dtype: torch.dtype) -> None:
    """A method that returns its point makes the draws visible: bitwise the same wherever an example stands."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen: dict[tuple[int, int], list[torch.Tensor]] = {}

    def spy(problem: pb.Problem) -> torch.Tensor:
        assert isinstance(problem.point, torch.Tensor)
        for example, point in zip(problem.examples.tolist(), problem.point, strict=True):
            seen.setdefault((number, example), []).append(point)
        return problem.point

    net = nn.Linear(5, 2).to(dtype)
    number = 0
    pb.explain(net, x, target=0, method=pb.SmoothGrad(spy, samples=6))
    for chunk in (1, 3, 7):
        number = chunk
        pb.explain(net, x, target=0, method=pb.SmoothGrad(spy, samples=6), chunk=chunk)
    number = 100
    pb.explain(net, x[2:3], target=0, method=pb.SmoothGrad(spy, samples=6))
    for example in range(4):
        wanted = torch.stack(seen[0, example])
        assert wanted.unique(dim=0).shape[0] == 6
        for chunk in (1, 3, 7):
            assert torch.equal(torch.stack(seen[chunk, example]), wanted)
    assert torch.equal(torch.stack(seen[100, 0]), torch.stack(seen[0, 2]))
