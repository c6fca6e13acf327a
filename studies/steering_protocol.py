"""How the steering studies choose a setting and what they read off: one next token, one of two answers right.

A setting (one block or all of them, and a strength) is chosen on questions that no vector was fitted on, and reported
on a third set. Every method is chosen from the same settings under the same budget, random directions too.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from pullback.evaluation import student_interval
from pullback.steering import SteeringVector

__all__ = [
    "Answered",
    "Questions",
    "Setting",
    "answered",
    "choose",
    "effect",
    "interval",
    "quantile",
    "write_table",
]

STRENGTHS = (0.2, 0.4, 0.8)
SMALLEST_MASS = 0.9  # of what both answers have together without steering


@dataclass(frozen=True, eq=False)
class Questions:
    """Prompts of one length, as the model's inputs, and their answers (n, 2): the preferred one, the other."""

    inputs: Mapping[str, Tensor]
    answers: Tensor


@dataclass(frozen=True, eq=False)
class Answered:
    """Log-probabilities (n, 2) of the answers, the preferred one first."""

    log_probs: Tensor

    @property
    def margins(self) -> Tensor:
        """log p(preferred) - log p(the other), (n,)."""
        return self.log_probs[:, 0] - self.log_probs[:, 1]

    @property
    def accuracy(self) -> float:
        """How often the preferred answer is the likelier one."""
        return float((self.margins > 0).double().mean())

    @property
    def mass(self) -> float:
        """The mean probability of both answers together."""
        return float(self.log_probs.exp().sum(1).mean())


@dataclass(frozen=True)
class Setting:
    """Where and how strongly a vector is applied."""

    layers: tuple[int, ...]
    strength: float
    last_only: bool = False


@torch.no_grad()
def answered(
    model: nn.Module,
    questions: Questions,
    vector: SteeringVector | None = None,
    setting: Setting | None = None,
) -> Answered:
    """What the model says, steered or as it is."""

    def run() -> Tensor:
        logits: Tensor = model(**questions.inputs).logits[:, -1]
        return logits.log_softmax(-1).gather(1, questions.answers)

    if vector is None or setting is None:
        return Answered(run())
    scope: Any = "all"
    if setting.last_only:
        scope = torch.zeros(questions.inputs["input_ids"].shape[1], dtype=torch.bool)
        scope[-1] = True
    with vector.apply(model, setting.strength, layers=list(setting.layers), scope=scope):
        return Answered(run())


def choose(
    model: nn.Module, vector: SteeringVector, questions: Questions, base: Answered, last_only: bool = False
) -> Setting:
    """The setting with the best accuracy within the budget; of equal ones that with the largest mean margin."""
    # the middle blocks and all: in the last one alone steering is a bias on the logits
    middle = vector.layers[len(vector.layers) // 3 : -(len(vector.layers) // 3)]
    places = [*((layer,) for layer in middle), vector.layers]
    best: tuple[tuple[float, float], Setting] | None = None
    weakest = Setting(places[0], STRENGTHS[0], last_only)
    for layers in places:
        for strength in STRENGTHS:
            setting = Setting(layers, strength, last_only)
            found = answered(model, questions, vector, setting)
            if found.mass < SMALLEST_MASS * base.mass:
                continue
            score = found.accuracy, float(found.margins.mean())
            if best is None or score > best[0]:
                best = score, setting
    return weakest if best is None else best[1]


def effect(
    model: nn.Module, vector: SteeringVector, setting: Setting, questions: Questions, base: Answered
) -> dict[str, Any]:
    """What a setting does to questions, and what the opposite strength does."""
    found = answered(model, questions, vector, setting)
    opposite = answered(model, questions, vector, replace(setting, strength=-setting.strength))
    return {
        "layers": list(setting.layers),
        "strength": setting.strength,
        "accuracy": found.accuracy,
        "gain": float((found.log_probs[:, 0] - base.log_probs[:, 0]).mean()),
        "margin gain": float((found.margins - base.margins).mean()),
        "moved the wrong way": float((found.margins < base.margins).double().mean()),
        "mass": found.mass / base.mass,
        "accuracy the other way": opposite.accuracy,
    }


def interval(values: Sequence[float]) -> str:
    """The mean over seeds with Student's 95 % interval."""
    found = student_interval(list(values))
    return (
        f"{found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]"
        if len(values) > 1
        else f"{mean(values):.3f}"
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The empirical quantile."""
    return float(torch.tensor(list(values), dtype=torch.float64).quantile(share))


def write_table(rows: Sequence[Mapping[str, Any]], lines: Sequence[str], out: Path) -> str:
    """The rows as ``table.csv``, the lines as ``table.txt``; returns the text."""
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = "\n".join(lines)
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    return text
