"""Noisy copies of a problem's point: draws that batch mates, order, chunk, dtype and device cannot change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import noise as draws
from ..core.errors import MethodError
from ..core.points import Point, expand_like, leaves, map_leaves, take
from ..core.problem import Problem

__all__ = ["NoisyPoints", "example_range", "require_noise"]


class NoisyPoints:
    """``x + σ ε`` for numbered draws of ε ~ N(0, 1), σ = noise · (max x - min x) of each example.

    Args:
        noise: standard deviation as a fraction of each example's range at the site.
        seed: names the draws, ``stream`` those of one among several nested methods.
        antithetic: draws come in pairs ±ε.
        independent: each example of a batch has draws of its own, by its position; else they share them.

    Padding gets no noise. ``constant`` says whether some example has no range, so that nothing moves it.
    """

    def __init__(
        self,
        problem: Problem,
        noise: float,
        seed: int,
        *,
        antithetic: bool = False,
        independent: bool = False,
        stream: str = "0",
    ) -> None:
        self._problem, self._seed, self._stream = problem, seed, stream
        self._antithetic, self._independent = antithetic, independent
        self._scale = map_leaves(lambda leaf: noise * example_range(leaf, problem.free), problem.point)
        self.constant = noise > 0 and any(bool((each == 0).any()) for each in leaves(self._scale))
        self._draws: dict[tuple[int, int, str], Tensor] = {}

    def __call__(self, nodes: Tensor, index: Tensor) -> Point:
        """The point of row r under draw ``nodes[r]``, row r being about example ``index[r]``."""
        pairs = list(zip(nodes.tolist(), index.tolist(), strict=True))
        moved: dict[str, Tensor] = {}
        for name, leaf, sigma in _named(self._problem.point, self._scale):
            noise = torch.stack([self._drawn(node, row, name, leaf) for node, row in pairs])
            spread = noise.to(leaf.device) * expand_like(sigma[index.to(sigma.device)], leaf)
            moved[name] = take(leaf, index) + spread.to(leaf.dtype)  # type: ignore[operator]
        return moved[""] if isinstance(self._problem.point, Tensor) else moved

    def _drawn(self, node: int, row: int, name: str, leaf: Tensor) -> Tensor:
        """One example's noise for one draw; padding gets none, so its length cannot change the draw."""
        number, sign = (node // 2, 1 - 2 * (node % 2)) if self._antithetic else (node, 1)
        own = f"/{int(self._problem.examples[row])}" if self._independent else ""
        stream = f"{self._stream}/{name}{own}"
        free = None if self._problem.free is None else self._problem.free[row]
        shape = leaf.shape[1:] if free is None else (int(free.sum()), *leaf.shape[2:])
        key = (number, shape[0] if shape else 0, stream)
        if key not in self._draws:
            # rows come draw by draw, so only the present draw is worth keeping
            if any(kept[0] != number for kept in self._draws):
                self._draws.clear()
            self._draws[key] = complex_normal(shape, self._seed, number, stream, leaf)
        unit = sign * self._draws[key]
        if free is None:
            return unit
        full = torch.zeros(leaf.shape[1:], dtype=unit.dtype)
        full[free.cpu()] = unit
        return full


def require_noise(noise: float) -> None:
    """Raise MethodError unless the noise is a fraction of a range."""
    if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not 0 <= noise < float("inf"):
        raise MethodError(f"noise is a fraction of the example's range, at least 0; got {noise!r}.")


def example_range(leaf: Tensor, free: Tensor | None) -> Tensor:
    """max - min over each example, in at least float32, padding left out: (B,)."""
    values = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    values = values.detach().to(torch.float64 if values.dtype == torch.float64 else torch.float32)
    low = high = values
    if free is not None:
        padding = ~free.reshape(*free.shape, *[1] * (values.dim() - 2)).to(values.device)
        low, high = values.masked_fill(padding, torch.inf), values.masked_fill(padding, -torch.inf)
    return high.reshape(len(high), -1).max(1).values - low.reshape(len(low), -1).min(1).values


def complex_normal(shape: Any, seed: int, draw: int, name: str, like: Tensor) -> Tensor:
    """Standard normal noise; for complex values independent real and imaginary parts."""
    if not like.is_complex():
        return draws.normal(shape, seed, draw, name)
    return torch.view_as_complex(draws.normal((*shape, 2), seed, draw, name))


def _named(point: Point, scale: Point) -> list[tuple[str, Tensor, Tensor]]:
    if isinstance(point, Tensor):
        assert isinstance(scale, Tensor)
        return [("", point, scale)]
    assert isinstance(scale, dict)
    return [(name, leaf, scale[name]) for name, leaf in point.items()]
