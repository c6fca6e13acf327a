"""Suites on CUDA: the numbers of the CPU, from data that stays on the device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pullback.datasets import mnist
from pullback.evaluation.suites import suite

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_metrics_are_those_of_the_cpu() -> None:
    few = suite(
        "faithfulness", metrics=("deletion", "infidelity", "gini"), methods=("gradient", "integrated gradients"),
        controls=("random × input", "blurred gradient", "untrained gradient"),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(2304, 10)).double().eval()
    x = mnist(split="test").x[:4].double()
    here, there = few.on(net, x), few.on(net.cuda(), x.cuda())
    for one, other in zip(here.rows, there.rows, strict=True):
        assert one.values == pytest.approx(other.values, rel=2e-3, abs=1e-6), (one.method, one.metric)


def test_a_suite_trains_and_retrains_on_the_device() -> None:
    few = suite(
        "diffroar", device="cuda", models=(("block_mnist", "standard"),), methods=("gradient",), controls=("random",),
        training_images=1000, seeds=1, masks=("zeros",),
    )  # fmt: skip
    found = few.run()
    random = [score for score in found.scores() if score.method == "random" and "DiffROAR" in score.metric]
    assert all(abs(score.interval.estimate) < 0.1 for score in random)
