"""Choosing strength and blocks of a steering vector on validation questions, under a budget of perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from pullback.core.errors import InputError, MethodError

from .blocks import find_blocks, select_layers
from .measures import AnswerMeasures, answer_measures, neutral_text
from .questions import encode_questions, require_disjoint
from .scoring import Setting, answer_log_probs, require_eval
from .vector import SteeringVector

__all__ = ["STRENGTHS", "Sweep", "SweepPoint", "require_budget", "sweep"]

STRENGTHS = (0.1, 0.2, 0.4, 0.8)
_MEASURES = ("margin_shift", "mc1", "mc2")


@dataclass(frozen=True)
class SweepPoint:
    """One strength at one choice of blocks, on the validation questions.

    Attributes:
        margin_shift, mc1, mc2, anti_steerable: means over questions, as in ``Evaluation``.
        perplexity_ratio, divergence: on the neutral texts.
        mass: the mean probability of all answers of a question together, over that without steering.
        allowed: whether the ratio is within the budget, and the mass is not below the smallest.
    """

    strength: float
    layers: tuple[int, ...]
    margin_shift: float
    mc1: float
    mc2: float
    anti_steerable: float
    perplexity_ratio: float
    divergence: float
    mass: float
    allowed: bool


@dataclass(frozen=True, eq=False)
class Sweep:
    """The points of a sweep, and the setting it chose.

    Attributes:
        points: in the order of blocks, then strengths.
        best: the setting of the largest ``measure`` among the allowed points; strength 0 where none is allowed.
        measure, budget: what was maximised, and under which perplexity ratio.
        prompts: digests of the validation prompts, which ``evaluate`` refuses to test on.
    """

    points: tuple[SweepPoint, ...]
    best: Setting
    measure: str
    budget: float
    prompts: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything in types JSON knows."""
        return asdict(self)


def sweep(
    model: nn.Module,
    tokenizer: Any,
    vector: SteeringVector,
    questions: Sequence[Any],
    *,
    neutral: Sequence[Any],
    strengths: Sequence[float] = STRENGTHS,
    layers: Sequence[Any] | None = None,
    budget: float = 1.05,
    smallest_mass: float = 0.0,
    measure: str = "margin_shift",
    setting: Setting | None = None,
    batch_size: int = 16,
    blocks: str | None = None,
) -> Sweep:
    """The strength and blocks that steer validation questions most while neutral text stays as likely as before.

    Args:
        vector: with directions at all blocks in question.
        questions: validation questions; they may be neither fitted on nor tested on afterwards.
        neutral: texts for the perplexity ratio.
        strengths: finite numbers.
        layers: choices of blocks, each as ``SteeringVector.select`` takes them; None is every block in the middle
            third alone, and the vector's blocks together. The last block alone is a bias on the logits.
        budget: largest ratio of perplexities, steered over unsteered.
        smallest_mass: of the answers' probability without steering, what they keep at least; 0.9 is good where the
            answers are single words, so that a vector that makes all answers unlikely is not chosen.
        measure: "margin_shift", "mc1" or "mc2"; of equal points the one with the larger margin shift, then the
            weaker, is chosen.
        setting: scale, scope and norm; its strength and blocks are not used.
        batch_size, blocks: as in ``evaluate``.

    Raises InputError for no questions, no neutral text, or questions that were fitted on; MethodError for no strengths
    or ones that are not finite.

    Cost: questions and neutral texts once for each strength at each choice of blocks.

    >>> import torch; from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model, vector = LlamaForCausalLM(LlamaConfig(**sizes)).eval(), SteeringVector({1: torch.eye(8)[0]})
    >>> len(sweep(model, None, vector, [([5, 6], 8, 9)], neutral=[[5, 7, 8]], strengths=[0.1, 0.2]).points)
    2
    """
    require_eval(model)
    if measure not in _MEASURES:
        raise MethodError(f"measure={measure!r}; expected one of {', '.join(map(repr, _MEASURES))}.")
    if isinstance(strengths, str) or not isinstance(strengths, Sequence) or not len(strengths):
        raise MethodError(f"strengths={strengths!r}; expected a list of numbers such as [0.1, 0.2, 0.4].")
    require_budget(budget)
    if (
        isinstance(smallest_mass, bool)
        or not isinstance(smallest_mass, int | float)
        or not smallest_mass >= 0
    ):
        raise MethodError(f"smallest_mass={smallest_mass!r}; expected a share such as 0.9, or 0 for none.")
    if neutral is None:
        raise InputError("neutral is None; expected texts on which the perplexity budget is measured.")
    plain = replace(setting or Setting(), layers=None, strength=0.0)
    settings = [replace(plain, strength=strength) for strength in strengths]  # refuses what is not finite
    encoded = encode_questions(model, tokenizer, questions)
    require_disjoint(
        encoded, vector.provenance.get("prompts") or (), "are prompts that the vector was fitted on"
    )
    count = len(find_blocks(model, blocks))
    choices = (
        _middle_and_all(vector, count)
        if layers is None
        else [_chosen(each, vector, count) for each in layers]
    )
    if not choices:
        raise MethodError("layers is empty; expected choices of blocks such as [4, 5, [4, 5, 6]].")

    def answered(one: SteeringVector | None, at: Setting) -> Any:
        log_probs = answer_log_probs(model, tokenizer, encoded, one, at, batch_size=batch_size, blocks=blocks)
        return answer_measures(encoded, log_probs)

    places = [(vector.select(list(choice)), at) for choice in choices for at in settings]
    texts = neutral_text(model, tokenizer, neutral, places, batch_size=batch_size, blocks=blocks)
    base = answered(None, plain)
    points = []
    for (one, at), text in zip(places, texts, strict=True):
        found = answered(one, at)
        shift = found.margin - base.margin
        mass = _mass(found) / _mass(base)
        points.append(
            SweepPoint(
                at.strength,
                one.layers,
                float(shift.mean()),
                float(found.mc1.mean()),
                float(found.mc2.mean()),
                float(np.where(np.isnan(shift), np.nan, shift < 0).mean()),
                text.ratio,
                text.divergence,
                mass,
                text.ratio <= budget and mass >= smallest_mass,
            )
        )
    allowed = [point for point in points if point.allowed and math.isfinite(point.margin_shift)]
    best = plain
    if allowed:
        top = max(allowed, key=lambda p: (getattr(p, measure), p.margin_shift, -abs(p.strength)))
        best = replace(plain, strength=top.strength, layers=top.layers)
    return Sweep(tuple(points), best, measure, float(budget), tuple(q.digest for q in encoded))


def _mass(found: AnswerMeasures) -> float:
    """The mean over questions of Σ p over all answers."""
    return float((np.exp(found.log_prob) + np.exp(found.log_prob - found.margin)).mean())


def require_budget(budget: Any) -> None:
    """Raise MethodError for what is no ratio of perplexities."""
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget > 0:
        raise MethodError(f"budget={budget!r}; expected a ratio of perplexities such as 1.05.")


def _chosen(choice: Any, vector: SteeringVector, count: int) -> tuple[int, ...]:
    return vector.select(select_layers(choice, count)).layers


def _middle_and_all(vector: SteeringVector, count: int) -> list[tuple[int, ...]]:
    middle = [(layer,) for layer in vector.layers if count // 3 <= layer < count - count // 3]
    return list(dict.fromkeys([*middle, vector.layers]))
