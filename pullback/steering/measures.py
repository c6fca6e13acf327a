"""Measures of steering: multiple choice, margins, perplexity and divergence on neutral text, degeneration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pullback.core.errors import InputError

from .pairs import encode_prompt, in_batches, padded_inputs, require_fitting
from .questions import EncodedQuestion
from .scoring import Setting, logits_of, row_of, steered
from .vector import SteeringVector

__all__ = ["AnswerMeasures", "Degeneration", "NeutralText", "answer_measures", "degeneration", "neutral_text"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class AnswerMeasures:
    """What the log-probabilities of its answers say about each question; all (questions,) float64.

    Attributes:
        mc1: 1 where the best true answer, or the likeliest where none is named, is likelier than every false one; a
            tie is 0.
        mc2: the share of true answers in the probability of all, ``Σ_true p / Σ p``.
        mc2_per_token: the same with ``p^(1/tokens)``.
        log_prob: ``log Σ_true p``.
        margin: ``log Σ_true p - log Σ_false p``, so that mc2 is its logistic function.
    """

    mc1: Floats
    mc2: Floats
    mc2_per_token: Floats
    log_prob: Floats
    margin: Floats


def answer_measures(questions: Sequence[EncodedQuestion], log_probs: Tensor) -> AnswerMeasures:
    """Measures from log p (answers,), in the order of ``answer_log_probs``; NaN where an answer's is NaN.

    Source: Lin et al. 2022 (TruthfulQA), section 3.2 for MC1 and its repository for MC2.
    """
    values = log_probs.double().numpy()
    owner = np.concatenate([np.full(len(q.answers), place) for place, q in enumerate(questions)])
    true = np.concatenate([np.arange(len(q.answers)) < q.true for q in questions])
    best = np.concatenate(
        [
            np.arange(len(q.answers)) == q.best if q.best is not None else np.arange(len(q.answers)) < q.true
            for q in questions
        ]
    )
    tokens = np.array([len(answer) for q in questions for answer in q.answers], dtype=np.float64)
    count = len(questions)
    with np.errstate(invalid="ignore"):  # of NaN, which stay what they are
        log_true = _log_sums(values, owner, true, count)
        margin = log_true - _log_sums(values, owner, ~true, count)
        per_token = values / tokens
        margin_per_token = _log_sums(per_token, owner, true, count) - _log_sums(
            per_token, owner, ~true, count
        )
        right = _largest(values, owner, best, count) > _largest(values, owner, ~true, count)
    mc1 = np.where(np.isnan(margin), np.nan, right)
    return AnswerMeasures(mc1, _logistic(margin), _logistic(margin_per_token), log_true, margin)


@dataclass(frozen=True)
class NeutralText:
    """The model on text that steering should leave alone.

    Attributes:
        perplexity: ``exp(-mean log p(token | before))``; infinite where the model predicts NaN.
        ratio: to the unsteered model's.
        divergence: KL(unsteered || steered) of the next token, mean over tokens, nats.
        tokens: how many were predicted.
    """

    perplexity: float
    ratio: float
    divergence: float
    tokens: int


@torch.no_grad()
def neutral_text(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Any],
    steerings: Sequence[tuple[SteeringVector | None, Setting]],
    *,
    batch_size: int = 8,
    blocks: str | None = None,
) -> list[NeutralText]:
    """Perplexity and divergence on neutral texts under several settings, all tokens steered whatever their scope.

    Args:
        texts: text or token ids, at least two tokens each.
        steerings: vectors with their settings; None is the model as it is.

    Raises InputError for no texts, texts of one token, and encoder-decoders. Cost: a forward per batch for the model as
    it is and for each setting.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not len(texts):
        raise InputError(f"neutral is {texts!r}; expected a list of texts, or of lists of token ids.")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(
            "neutral text is for models that continue text, and this one is an encoder-decoder: neutral=None."
        )
    rows = []
    for number, text in enumerate(texts):
        name = f"neutral text {number}"
        ids, others = encode_prompt(name, text, None, tokenizer)
        if len(ids) < 2 or others:
            raise InputError(f"{name} has {len(ids)} tokens; expected text of at least two.")
        require_fitting(name, ids, [()], model)
        rows.append(row_of(number, ids))
    rows.sort(key=lambda row: len(row.ids))
    plain, tokens = 0.0, 0
    sums = [[0.0, 0.0] for _ in steerings]
    for batch in in_batches(model, rows, batch_size):
        inputs = padded_inputs(model, tokenizer, batch)
        base = logits_of(model(**inputs))
        following = [row.ids[1:].to(base.device)[:, None] for row in batch]
        plainly = _log_probs(base, following)
        plain -= sum(float(p.gather(1, ids).sum()) for p, ids in zip(plainly, following, strict=True))
        tokens += sum(map(len, following))
        del base
        for total, (vector, setting) in zip(sums, steerings, strict=True):
            found = plainly
            if vector is not None and setting.strength != 0:
                with steered(model, vector, setting, "all", blocks):
                    found = _log_probs(logits_of(model(**inputs)), following)
            for p, q, ids in zip(plainly, found, following, strict=True):
                total[0] -= float(q.gather(1, ids).sum())
                total[1] += float((p.exp() * (p - q)).sum())
    return [
        NeutralText(
            _exp(loss / tokens), _exp((loss - plain) / tokens), _or_infinite(divergence / tokens), tokens
        )
        for loss, divergence in sums
    ]


@dataclass(frozen=True)
class Degeneration:
    """How much generated text runs in circles; means over texts.

    Attributes:
        distinct_1, distinct_2: different unigrams and bigrams as a share of all.
        repetition: share of 4-grams that stood in the text before.
        length: tokens.
    """

    distinct_1: float
    distinct_2: float
    repetition: float
    length: float


def degeneration(texts: Sequence[Sequence[int]]) -> Degeneration:
    """Measures of generated token ids; texts too short for an n-gram count as not repetitive.

    Source: Li et al. 2016 (distinct-n), Welleck et al. 2020 (repetition of 4-grams).

    >>> degeneration([[1, 2, 1, 2, 1, 2]])
    Degeneration(distinct_1=0.3333333333333333, distinct_2=0.4, repetition=0.33333333333333337, length=6.0)
    """
    if not len(texts):
        raise InputError("there are no generated texts; expected at least one.")

    def distinct(size: int) -> float:
        shares = []
        for text in texts:
            grams = [tuple(text[at : at + size]) for at in range(len(text) - size + 1)]
            shares.append(len(set(grams)) / len(grams) if grams else 1.0)
        return float(np.mean(shares))

    length = float(np.mean([len(text) for text in texts]))
    return Degeneration(distinct(1), distinct(2), 1.0 - distinct(4), length)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700.0 else math.inf


def _or_infinite(value: float) -> float:
    """A model that predicts NaN is as far off as can be."""
    return math.inf if math.isnan(value) else value


def _log_probs(logits: Tensor, following: Sequence[Tensor]) -> list[Tensor]:
    """Of each text, (tokens, vocabulary) float64: what each of its tokens but the first was predicted as."""
    return [row[: len(ids)].double().log_softmax(-1) for row, ids in zip(logits, following, strict=True)]


def _largest(values: Floats, owner: NDArray[Any], chosen: NDArray[np.bool_], count: int) -> Floats:
    found = np.full(count, -np.inf)
    np.maximum.at(found, owner[chosen], values[chosen])
    return found


def _log_sums(values: Floats, owner: NDArray[Any], chosen: NDArray[np.bool_], count: int) -> Floats:
    found = np.full(count, -np.inf)
    np.logaddexp.at(found, owner[chosen], values[chosen])
    return found


def _logistic(values: Floats) -> Floats:
    from scipy.special import expit

    return np.asarray(expit(values), dtype=np.float64)
