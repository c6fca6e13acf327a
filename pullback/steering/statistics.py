"""What steering did: how many tokens, and by which angle they were turned."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["LayerStatistics", "SteeringStatistics"]

_FOLD_AFTER = 256  # passes


@dataclass(frozen=True)
class LayerStatistics:
    """One block: tokens steered, mean angle between h and h~ in degrees, mean ||h~ - h|| / ||h||."""

    tokens: int
    mean_angle: float
    mean_displacement: float


@dataclass(frozen=True)
class SteeringStatistics:
    """What a steering context did so far.

    Attributes:
        layers: by block number; only blocks where a token was steered.
        calls: passes through steered blocks in the thread of the context.
        calls_of_other_threads: passes of other threads, which were left alone.
        gate: (batch,) the gate's answer for the last prompt; None without a gate.
    """

    layers: dict[int, LayerStatistics]
    calls: int
    calls_of_other_threads: int
    gate: Tensor | None


@dataclass
class Tally:
    """Running sums of one block. The norms of a pass are kept and folded later, off the path of generation."""

    direction_norm: float
    preserve_norm: bool
    waiting: list[tuple[Tensor, Tensor, Tensor | float, Tensor | None]] = field(default_factory=list)
    tokens: int = 0
    angle: float = 0.0
    displacement: float = 0.0

    def add(self, norm: Tensor, reached: Tensor, step: Tensor | float, selected: Tensor | None) -> None:
        """||h||, ||h + a v|| and the step a, each (batch, length, 1); ``selected`` None for all tokens."""
        step = step.detach() if isinstance(step, Tensor) else step
        self.waiting.append((norm.detach(), reached.detach(), step, selected))
        if len(self.waiting) >= _FOLD_AFTER:
            self.fold()

    def fold(self) -> None:
        for norm, reached, step, selected in self.waiting:
            n = norm.double().cpu()
            a = step.double().cpu() if isinstance(step, Tensor) else torch.full_like(n, step)
            # <h, v> = (||h + a v||^2 - ||h||^2 - a^2 ||v||^2) / 2 a: no product of its own while generating
            end = reached.double().cpu()
            along = ((end - n) * (end + n) - (a * self.direction_norm) ** 2) / (2 * a)
            cosine = torch.where(n * a == 0, 0.0, along / n.clamp_min(1e-300))
            across = (self.direction_norm**2 - cosine**2).clamp_min(0.0).sqrt()
            angle = torch.atan2(a.abs() * across, n + a * cosine)
            moved = (
                2.0 * torch.sin(angle / 2)
                if self.preserve_norm
                else a.abs() * self.direction_norm / n.clamp_min(1e-300)
            )
            chosen = torch.ones_like(n, dtype=torch.bool) if selected is None else selected.cpu().expand_as(n)
            self.tokens += int(chosen.sum())
            self.angle += float(angle[chosen].sum())
            self.displacement += float(moved[chosen].sum())
        self.waiting.clear()

    def result(self) -> LayerStatistics | None:
        self.fold()
        if not self.tokens:
            return None
        angle = math.degrees(self.angle / self.tokens)
        return LayerStatistics(self.tokens, angle, self.displacement / self.tokens)
