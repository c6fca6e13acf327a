"""Time several ways of doing the same thing, alternating, and report ratios with intervals.

Seconds mean nothing on a shared machine; the ratio of two runs right after one another does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

from pullback.evaluation import bootstrap_interval


@dataclass(frozen=True)
class Ratio:
    """The median of paired time ratios, with a 95 % bootstrap interval over pairs."""

    name: str
    low: float
    median: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.name}: {self.median:.3f}  [{self.low:.3f}, {self.high:.3f}]  ({self.pairs} pairs)"


def alternate(ways: Mapping[str, Callable[[], object]], pairs: int = 20) -> dict[str, list[float]]:
    """Seconds of each way, run in turn ``pairs`` times after one warm-up round; the order reverses every round."""
    for run in ways.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(pairs):
        for name in list(ways) if number % 2 == 0 else reversed(list(ways)):
            began = time.perf_counter()
            ways[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: Mapping[str, list[float]], ours: str, other: str) -> Ratio:
    """How long ``ours`` takes in units of ``other``: the median over pairs."""
    each = torch.tensor(
        [a / b for a, b in zip(seconds[ours], seconds[other], strict=True)], dtype=torch.float64
    )
    interval = bootstrap_interval(each, statistic="median")
    return Ratio(f"{ours} / {other}", interval.low, median(each.tolist()), interval.high, len(each))
