"""TruthfulQA for a steering vector: fitted, chosen and tested on questions that have nothing in common."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from pullback.core.errors import MethodError

from .directions import fit
from .evaluate import evaluate
from .pairs import Pair
from .questions import Question
from .results import Evaluation
from .scoring import Setting
from .sweep import STRENGTHS, Sweep, sweep
from .vector import SteeringVector

if TYPE_CHECKING:
    from pullback.datasets import QuestionSplit, TruthfulQuestion

__all__ = ["TEMPLATE", "TruthfulQAResult", "truthful_pairs", "truthful_questions", "truthfulqa"]

TEMPLATE = "Q: {question}\nA:"


@dataclass(frozen=True, eq=False)
class TruthfulQAResult:
    """The vector, the sweep that chose its setting on the validation questions, and its evaluation on the test."""

    vector: SteeringVector
    sweep: Sweep
    evaluation: Evaluation
    split: QuestionSplit[TruthfulQuestion]


def truthful_pairs(questions: Sequence[TruthfulQuestion], template: str = TEMPLATE) -> list[Pair]:
    """Pairs to fit on: the best answer against the best incorrect one, a space before either.

    >>> from pullback.datasets import TruthfulQuestion
    >>> truthful_pairs([TruthfulQuestion("Why?", "", "", "No reason", "Magic", ("No reason",), ("Magic",))])[0].prompt
    'Q: Why?\\nA:'
    """
    prompts = _prompts(questions, template)
    return [
        Pair(prompt, f" {each.best}", f" {each.best_incorrect}")
        for prompt, each in zip(prompts, questions, strict=True)
    ]


def truthful_questions(questions: Sequence[TruthfulQuestion], template: str = TEMPLATE) -> list[Question]:
    """Questions for MC1 and MC2: all correct answers against all incorrect ones, the best one for MC1."""
    prompts = _prompts(questions, template)
    return [
        Question(
            prompt,
            [f" {a}" for a in each.correct],
            [f" {a}" for a in each.incorrect],
            each.correct.index(each.best),
        )
        for prompt, each in zip(prompts, questions, strict=True)
    ]


def truthfulqa(
    model: nn.Module,
    tokenizer: Any,
    path: str | os.PathLike[str],
    method: str = "grains",
    *,
    fit_questions: int = 50,
    validation_questions: int = 100,
    test_questions: int | None = None,
    template: str = TEMPLATE,
    fit_settings: Mapping[str, Any] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    layers: Sequence[Any] | None = None,
    setting: Setting | None = None,
    neutral: Sequence[Any] | None = None,
    budget: float = 1.05,
    random_draws: int = 20,
    generations: int = 0,
    instruction: str | None = None,
    seed: int = 0,
    batch_size: int = 16,
    blocks: str | None = None,
) -> TruthfulQAResult:
    """Fit a vector to some questions of TruthfulQA, choose its setting on others and test it on the rest.

    Args:
        model: a causal language model in eval mode, and its ``tokenizer``.
        path: of ``TruthfulQA.csv``.
        method, fit_settings: of ``fit``.
        fit_questions, validation_questions, test_questions: how many; None is all that are left.
        template: of the prompts, "{question}" in it. Published figures put six solved examples before it, so figures
            with this one are not to be compared with them.
        strengths, layers, budget: of ``sweep``.
        setting: scale, scope and norm.
        neutral: texts for perplexity; None is ``pullback.datasets.neutral_sentences()``.
        random_draws, generations, instruction: of ``evaluate``.
        seed: of the split, of random methods and of the bootstrap.

    Raises what ``load_truthfulqa``, ``split_questions``, ``fit``, ``sweep`` and ``evaluate`` raise.

    Cost: of ``fit``; the validation questions at each strength and choice of layers; the test questions about 25 times.
    """
    from pullback.datasets import load_truthfulqa, neutral_sentences, split_questions

    split = split_questions(
        load_truthfulqa(path), fit_questions, validation_questions, test_questions, seed=seed
    )
    pairs = truthful_pairs(split.fit, template)
    texts = neutral_sentences() if neutral is None else neutral
    common: dict[str, Any] = {"batch_size": batch_size, "blocks": blocks}
    settings: dict[str, Any] = {"seed": seed, "blocks": blocks, **(fit_settings or {})}
    vector = fit(model, tokenizer, pairs, method, **settings)  # type: ignore[arg-type]
    chosen = sweep(
        model, tokenizer, vector, truthful_questions(split.validation, template), neutral=texts, strengths=strengths,
        layers=layers, budget=budget, setting=setting, **common,
    )  # fmt: skip
    evaluation = evaluate(
        model, tokenizer, vector, truthful_questions(split.test, template), setting=chosen, fit_pairs=pairs,
        neutral=texts, budget=budget, random_draws=random_draws, generations=generations, instruction=instruction,
        seed=seed, **common,
    )  # fmt: skip
    return TruthfulQAResult(vector, chosen, evaluation, split)


def _prompts(questions: Sequence[TruthfulQuestion], template: str) -> list[str]:
    if not isinstance(template, str) or "{question}" not in template:
        raise MethodError(
            f'template={template!r}; expected text with "{{question}}" in it, such as {TEMPLATE!r}.'
        )
    return [template.replace("{question}", each.question) for each in questions]
