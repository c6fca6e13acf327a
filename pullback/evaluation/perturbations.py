"""What infidelity subtracts from the input: squares replaced by a noisy baseline, all of it, or Gaussian noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pullback.attribution.baselines import baseline_point, default_baseline
from pullback.attribution.noisy_points import example_range
from pullback.core import noise as draws
from pullback.core.errors import InputError
from pullback.core.points import Point, expand_like, map_leaves
from pullback.core.problem import Problem
from pullback.evaluation.imputation import Mask, NoisyLinear, parsed_mask

__all__ = [
    "GaussianNoise",
    "NoisyBaseline",
    "Perturbation",
    "SquareRemoval",
    "parsed_perturbation",
    "row_uniform",
]


class Perturbation(Protocol):
    """The I of one draw, of the point's structure; and where something is removed, true there (None: nowhere)."""

    def __call__(self, problem: Problem, draw: int, seed: int) -> tuple[Point, Point | None]: ...


@dataclass(frozen=True)
class GaussianNoise:
    """I = ε, ε ~ N(0, σ²) in each element, σ = ``noise`` times the example's range (max − min) at the site."""

    noise: float = 0.15

    def __post_init__(self) -> None:
        _require_noise(self.noise, above=0.0)

    def __call__(self, problem: Problem, draw: int, seed: int) -> tuple[Point, None]:
        return map_leaves(lambda leaf: _normal(leaf, self.noise, problem, draw, seed), problem.point), None


@dataclass(frozen=True)
class NoisyBaseline:
    """I = x − (x0 + ε): everything becomes the baseline x0 = ``mask`` plus noise, σ = ``noise`` times the range."""

    noise: float = 0.15
    mask: Mask = None

    def __post_init__(self) -> None:
        _require_noise(self.noise)

    def __call__(self, problem: Problem, draw: int, seed: int) -> tuple[Point, Point]:
        gone = map_leaves(lambda leaf: torch.ones_like(leaf, dtype=torch.bool), problem.point)
        return _replaced(problem, gone, self.mask, self.noise, draw, seed), gone


@dataclass(frozen=True)
class SquareRemoval:
    """I = 1_S (x − x0 − ε): a random square S becomes the baseline x0 = ``mask`` plus noise.

    Its sides are drawn from 1 to ``size`` times the shorter side, its place uniformly. In a series (B, C, T) and in a
    text (B, T, D) S is an interval; in vectors (B, F) a random set of so many elements. σ = ``noise`` times the range.
    """

    size: float = 0.4
    noise: float = 0.0
    mask: Mask = None

    def __post_init__(self) -> None:
        _require_noise(self.noise)
        if not 0 < self.size <= 1:
            raise InputError(f"size={self.size} was given. Expected a share of the shorter side in (0, 1].")

    def __call__(self, problem: Problem, draw: int, seed: int) -> tuple[Point, Point]:
        gone = map_leaves(lambda leaf: self._square(leaf, problem, draw, seed), problem.point)
        return _replaced(problem, gone, self.mask, self.noise, draw, seed), gone

    def _square(self, leaf: Tensor, problem: Problem, draw: int, seed: int) -> Tensor:
        side, *place = draws.uniform((4,), seed, draw, "square").tolist()
        if problem.free is not None:
            free = problem.free.to(leaf.device)
            # places are counted among real tokens, so that padding changes nothing
            at, count = free.cumsum(1) - 1, free.sum(1, keepdim=True)
            length = 1 + (side * (self.size * count).floor().clamp_min(1)).floor()
            first = (place[0] * (count - length + 1)).floor()
            run: Tensor = (at >= first) & (at < first + length) & free
            return run.reshape(*run.shape, *[1] * (leaf.ndim - 2)).expand_as(leaf)
        if leaf.ndim == 2:
            size = 1 + int(side * max(1, int(self.size * leaf.shape[1])))
            order = draws.uniform(leaf.shape[1:], seed, draw, "subset").argsort().argsort()
            return (order < size).to(leaf.device).expand_as(leaf)
        dims = [1] if problem.posed.token_site else list(range(2, leaf.ndim))
        longest = max(1, int(self.size * min(leaf.shape[dim] for dim in dims)))
        width = 1 + int(side * longest)
        within = torch.ones_like(leaf, dtype=torch.bool)
        for dim, start in zip(dims, place, strict=False):
            first = int(start * (leaf.shape[dim] - width + 1))
            at = torch.arange(leaf.shape[dim], device=leaf.device)
            inside = (at >= first) & (at < first + width)
            within &= inside.reshape([-1 if each == dim else 1 for each in range(leaf.ndim)])
        return within


_NAMED = {"square": SquareRemoval, "noisy_baseline": NoisyBaseline, "gaussian": GaussianNoise}


def parsed_perturbation(given: str | Perturbation) -> Perturbation:
    """A perturbation from its name, or the object itself. Raises InputError."""
    if isinstance(given, str) and given.strip().lower() in _NAMED:
        return _NAMED[given.strip().lower()]()  # type: ignore[no-any-return]
    if callable(given) and not isinstance(given, type):
        return given
    raise InputError(
        f'perturbation={given!r} was given. Expected "square", "noisy_baseline", "gaussian", or an object such as '
        "SquareRemoval(size=0.2)."
    )


def row_uniform(leaf: Tensor, problem: Problem, draw: int, seed: int, stream: str) -> Tensor:
    """Uniform numbers on [0, 1) of a leaf's shape, examples sharing them; 0.5 at padding, which changes no draw."""
    return _by_row(leaf, problem, lambda shape: draws.uniform(shape, seed, draw, stream), 0.5)


def _normal(leaf: Tensor, share: float, problem: Problem, draw: int, seed: int) -> Tensor:
    unit = _by_row(leaf, problem, lambda shape: draws.normal(shape, seed, draw, "perturbation"), 0.0)
    spread = expand_like(share * example_range(leaf, problem.free), leaf)
    return unit * spread.to(leaf.real.dtype)


def _by_row(
    leaf: Tensor, problem: Problem, drawn: Callable[[Sequence[int]], Tensor], padding: float
) -> Tensor:
    """Draws of one example's shape for every example, by the number of its real tokens where there is padding."""
    if problem.free is None:
        return drawn(leaf.shape[1:]).to(leaf).expand_as(leaf)
    whole = torch.full(leaf.shape, padding, dtype=leaf.dtype, device=leaf.device)
    for row, real in zip(whole, problem.free.to(leaf.device), strict=True):
        row[real] = drawn((int(real.sum()), *leaf.shape[2:])).to(leaf)
    return whole


def _replaced(problem: Problem, gone: Point, mask: Mask, share: float, draw: int, seed: int) -> Point:
    filler = parsed_mask(mask)
    if isinstance(filler, NoisyLinear):
        raise InputError(
            'mask="noisy_linear" was given to a perturbation. Expected a baseline such as "mean" or "blur"; noise is '
            "its own parameter here."
        )
    reference = baseline_point(default_baseline(problem) if filler is None else filler, problem)

    def difference(leaf: Tensor, base: Tensor, removed: Tensor) -> Tensor:
        added = _normal(leaf, share, problem, draw, seed) if share else 0.0
        return torch.where(removed, leaf - base - added, 0.0)

    return map_leaves(difference, problem.point, reference, gone)


def _require_noise(noise: float, above: float = -1.0) -> None:
    if not above < noise < float("inf") or noise < 0:
        raise InputError(
            f"noise={noise} was given. Expected a standard deviation as a share of the example's range, "
            f"{'above 0' if above == 0 else '0 or more'}."
        )
