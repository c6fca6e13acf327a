"""Threads share one model: the same bits as alone, while others train a copy and run the model itself."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb

from .fingerprint import assert_untouched
from .methods import images, values

JOBS: list[tuple[Any, str]] = [
    (pb.Gradient(), "input"),
    (pb.IntegratedGradients(steps=4), "1"),
    (pb.SmoothGrad(samples=3), "input"),
    (pb.SmoothGrad(pb.IntegratedGradients(steps=2), samples=2), "4"),
    (pb.GradCAM(), "2"),
    (pb.ExpectedGradients(samples=3), "input"),
    (pb.IntegratedGradients(tol=0.05, max_steps=9), "2:input"),
    (pb.VarGrad(samples=3), "3"),
]


def shared_model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(),
            nn.Linear(12, 3),
        ).double().eval()  # fmt: skip


def together(workers: list[Callable[[], None]], background: list[Callable[[threading.Event], None]]) -> None:
    """Run all at once; the background ends when the workers have. Raises the first error of any."""
    errors: list[BaseException] = []
    ended, start = threading.Event(), threading.Barrier(len(workers) + len(background))

    def guarded(run: Callable[[], None]) -> Callable[[], None]:
        def body() -> None:
            start.wait()
            try:
                run()
            except BaseException as error:
                errors.append(error)

        return body

    front = [threading.Thread(target=guarded(work)) for work in workers]
    back = [threading.Thread(target=guarded(lambda run=run: run(ended))) for run in background]
    for thread in front + back:
        thread.start()
    for thread in front:
        thread.join()
    ended.set()
    for thread in back:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("calls", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_eight_threads_explain_one_model(calls: int) -> None:
    net, x = shared_model(), images(2)
    wanted = [values(pb.explain(net, x, target=1, method=method, site=site)) for method, site in JOBS]
    with torch.no_grad():
        plain = net(x)
    different: list[str] = []
    rounds = {"trained": 0, "ran": 0}

    def explainer(number: int) -> Callable[[], None]:
        def work() -> None:
            for call in range(calls):
                job = (number + call) % len(JOBS)
                method, site = JOBS[job]
                found = values(pb.explain(net, x, target=1, method=method, site=site))
                if not torch.equal(found, wanted[job]):
                    different.append(f"{method} at {site}")

        return work

    def train(ended: threading.Event) -> None:
        pupil = copy.deepcopy(net).train()
        optimizer = torch.optim.SGD(pupil.parameters(), lr=0.01)
        while not ended.is_set() or rounds["trained"] < 3:
            optimizer.zero_grad()
            loss = pupil(x.detach()).square().mean()
            loss.backward()
            optimizer.step()
            assert torch.isfinite(loss)
            rounds["trained"] += 1

    def infer(ended: threading.Event) -> None:
        while not ended.is_set() or rounds["ran"] < 3:
            with torch.no_grad():
                if not torch.equal(net(x), plain):
                    different.append("plain inference")
            assert torch.equal(net(x), plain)
            rounds["ran"] += 1

    with assert_untouched(net, x):
        together([explainer(number) for number in range(8)], [train, infer])
    assert different == []
    assert min(rounds.values()) >= 3


def test_threads_share_one_problem() -> None:
    """A posed problem is safe too: hooks on its private model are taken in turn."""
    net, x = shared_model(), images(2)
    problem = pb.pose(net, x, target=1, site="2")
    wanted = problem.grad()
    assert isinstance(wanted, Tensor)
    different: list[int] = []

    def work() -> None:
        for call in range(20):
            found = problem.grad(problem.point)
            assert isinstance(found, Tensor)
            if not torch.equal(found, wanted):
                different.append(call)

    together([work] * 6, [])
    assert different == []


def test_threads_with_random_forwards_do_not_mix_their_draws() -> None:
    """allow_train freezes the draws of each call by itself, whichever threads run beside it."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double().train()
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    method = pb.IntegratedGradients(steps=4)

    def run() -> Tensor:
        return values(pb.explain(net, x, target=1, method=method, allow_train=True))

    wanted = run()
    different: list[int] = []

    def work() -> None:
        for call in range(20):
            if not torch.equal(run(), wanted):
                different.append(call)

    before = torch.get_rng_state()
    together([work] * 4, [])
    assert different == []
    assert torch.equal(torch.get_rng_state(), before)
