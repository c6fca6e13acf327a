"""Choosing blocks and strength on a validation split, under a budget for the damage done to other text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import nn

from pullback.core.errors import MethodError

from .answers import Answered, Questions, Setting, answered
from .blocks import Layers
from .text_quality import neutral_text, token_batches
from .vector import SteeringVector

__all__ = ["SteeringSweep", "SweepPoint", "sweep"]

Criterion = Literal["margin", "log_prob", "mc1", "mc2"]
SMALLEST_MASS = 0.9  # of what all answers have together without steering


@dataclass(frozen=True)
class SweepPoint:
    """One setting: the mean of the criterion, and what it costs.

    ``mass``: the probability of all answers together, over that without steering. ``perplexity_ratio``: on neutral
    text; None without. ``within``: whether the budget is kept.
    """

    setting: Setting
    value: float
    mass: float
    perplexity_ratio: float | None
    within: bool


@dataclass(frozen=True)
class SteeringSweep:
    """Every setting tried. ``best``: the best within the budget, the gentlest of equal ones; None where none is better
    than no steering, whose value is ``unsteered``."""

    points: tuple[SweepPoint, ...]
    unsteered: float
    criterion: str

    @property
    def best(self) -> Setting | None:
        able = [point for point in self.points if point.within and point.value > self.unsteered]
        if not able:
            return None
        return min(able, key=lambda point: (-point.value, abs(point.setting.strength))).setting

    def to_records(self) -> list[dict[str, Any]]:
        """One flat row per setting."""
        return [
            {"layers": point.setting.layers, "strength": point.setting.strength, self.criterion: point.value,
             "mass": point.mass, "perplexity_ratio": point.perplexity_ratio, "within": point.within}
            for point in self.points
        ]  # fmt: skip

    def __str__(self) -> str:
        lines = [f"{'blocks':<24}{'strength':>9}{self.criterion:>11}{'mass':>8}{'ppl ratio':>11}"]
        for point in self.points:
            ratio = "" if point.perplexity_ratio is None else f"{point.perplexity_ratio:.3f}"
            chosen = "  best" if point.setting == self.best else "" if point.within else "  over budget"
            where = "all" if point.setting.layers is None else str(point.setting.layers)
            lines.append(
                f"{where:<24}{point.setting.strength:>9.3g}{point.value:>11.4f}{point.mass:>8.3f}{ratio:>11}{chosen}"
            )
        return "\n".join([*lines, f"unsteered {self.unsteered:.4f}"])


def sweep(
    model: nn.Module,
    tokenizer: Any,
    vector: SteeringVector,
    items: Sequence[Any],
    *,
    strengths: Sequence[float] = (0.1, 0.2, 0.4, 0.8),
    layers: Sequence[Layers | None] | None = None,
    criterion: Criterion = "margin",
    neutral: Sequence[Any] = (),
    budget: float = 1.05,
    setting: Setting | None = None,
    batch_size: int = 16,
    blocks: str | None = None,
) -> SteeringSweep:
    """Try a vector at every strength and choice of blocks on validation items.

    A setting is within the budget where it multiplies the perplexity of neutral text by at most ``budget``, and leaves
    the answers together 0.9 of their probability (a vector that makes all answers unlikely says nothing about them).

    Args:
        items: validation items, neither fitted on nor reported on; see ``split_questions``.
        strengths: as ``SteeringVector.apply`` takes them.
        layers: choices of blocks; None is each of the middle third of the vector's, and all of them. The last block
            alone is a bias on the logits, and is only tried where it is asked for.
        criterion: whose mean is the largest: "margin", "log_prob", "mc1" or "mc2", as in ``evaluate``.
        neutral, budget, batch_size, blocks: as in ``evaluate``.
        setting: scale, scope and norm for all.

    Returns:
        a SteeringSweep, whose ``best`` is a setting for ``evaluate``.

    Raises MethodError for no strengths, for one that is not positive, and for an unknown criterion.

    Cost: one forward per answer and setting, two per neutral text and setting.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> vector = SteeringVector({0: torch.eye(8)[0]})
    >>> len(sweep(LlamaForCausalLM(LlamaConfig(**sizes)).eval(), None, vector, [([5, 6], 7, 8)]).points)
    4
    """
    if criterion not in get_args(Criterion):
        raise MethodError(
            f"criterion={criterion!r}; expected one of {', '.join(map(repr, get_args(Criterion)))}."
        )
    if not strengths or not all(
        isinstance(each, int | float) and not isinstance(each, bool) and 0 < each < float("inf")
        for each in strengths
    ):
        raise MethodError(f"strengths={strengths!r}; expected positive numbers such as (0.2, 0.4, 0.8).")
    if not budget > 1:
        raise MethodError(f"budget={budget!r}; expected a ratio of perplexities above 1, such as 1.05.")
    choices = _middle_third(vector) if layers is None else list(layers)
    questions = Questions.encoded(model, tokenizer, items)
    texts = token_batches(tokenizer, neutral)
    base = answered(model, tokenizer, questions, batch_size=batch_size)
    plain = neutral_text(model, texts, blocks=blocks) if texts else None
    points = []
    for chosen in choices:
        for strength in strengths:
            tried = replace(setting or Setting(), strength=float(strength), layers=chosen)
            found = answered(model, tokenizer, questions, vector, tried, batch_size=batch_size, blocks=blocks)
            mass = float(found.mass().mean() / base.mass().mean())
            ratio = None
            if plain is not None:
                ratio = neutral_text(model, texts, vector, tried, blocks=blocks).perplexity / plain.perplexity
            within = mass >= SMALLEST_MASS and (ratio is None or ratio <= budget)
            points.append(SweepPoint(tried, _value(found, criterion), mass, ratio, within))
    return SteeringSweep(tuple(points), _value(base, criterion), criterion)


def _value(found: Answered, criterion: Criterion) -> float:
    values = {
        "margin": found.margins,
        "log_prob": found.preferred,
        "mc1": found.mc1,
        "mc2": found.mc2,
    }[criterion]()
    return float(values.mean())


def _middle_third(vector: SteeringVector) -> list[Layers | None]:
    layers = vector.layers
    if len(layers) == 1:
        return [None]
    third = len(layers) // 3
    middle = layers[third : len(layers) - third] if third else layers[:-1]
    return [*([layer] for layer in middle), None] if len(middle) > 1 or third else [None]
