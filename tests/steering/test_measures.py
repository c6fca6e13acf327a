"""Measures from hand-made log-probabilities, and perplexity and divergence against their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from pullback import InputError
from pullback.steering import Question, Setting
from pullback.steering.measures import answer_measures, degeneration, neutral_text
from pullback.steering.questions import encode_questions
from tests.steering.models import random_vector
from tests.steering.tiny import llama

TEXTS = [[1, 5, 6, 7, 8], [1, 9], [1, 10, 11, 12]]


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def measures(asked: list[Question], *probabilities: float) -> Any:
    return answer_measures(encode_questions(llama(), None, asked), logs(*probabilities))


def test_multiple_choice_by_hand() -> None:
    asked = [Question([5], [3, 4], [6, 7]), Question([5, 6], [3], [6])]
    found = measures(asked, 0.1, 0.3, 0.2, 0.2, 0.1, 0.4)
    np.testing.assert_allclose(found.mc1, [1, 0])
    np.testing.assert_allclose(found.mc2, [0.4 / 0.8, 0.1 / 0.5], rtol=1e-12)
    np.testing.assert_allclose(found.log_prob, [math.log(0.4), math.log(0.1)], rtol=1e-12)
    np.testing.assert_allclose(found.margin, [math.log(0.4 / 0.4), math.log(0.1 / 0.4)], atol=1e-15)


def test_mc1_asks_the_best_answer_where_one_is_named_and_a_tie_is_wrong() -> None:
    assert measures([Question([5], [3, 4], [6], best=0)], 0.1, 0.3, 0.2).mc1.tolist() == [0]
    assert measures([Question([5], [3, 4], [6], best=1)], 0.1, 0.3, 0.2).mc1.tolist() == [1]
    assert measures([Question([5], [3, 4], [6])], 0.1, 0.3, 0.3).mc1.tolist() == [0]


def test_per_token_takes_the_root_of_the_number_of_tokens() -> None:
    found = measures([Question([5], [[3, 4]], [6, [7, 8, 9]])], 0.09, 0.2, 0.008)
    np.testing.assert_allclose(found.mc2_per_token, [0.3 / (0.3 + 0.2 + 0.2)], rtol=1e-12)
    np.testing.assert_allclose(found.mc2, [0.09 / 0.298], rtol=1e-12)


def test_improbable_answers_do_not_underflow() -> None:
    encoded = encode_questions(llama(), None, [Question([5], [3], [6])])
    found = answer_measures(encoded, torch.tensor([-2000.0, -2001.0], dtype=torch.float64))
    np.testing.assert_allclose(found.mc2, [1 / (1 + math.exp(-1))], rtol=1e-12)


def test_neutral_text_without_steering() -> None:
    model = llama()
    vector = random_vector(model, [1], width=16)
    for steering, setting in ((None, Setting()), (vector, Setting(0.0))):
        (found,) = neutral_text(model, None, TEXTS, [(steering, setting)])
        assert (found.ratio, found.divergence, found.tokens) == (1.0, 0.0, 8)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    (found,) = neutral_text(model, None, TEXTS, [(None, Setting())])
    assert found.perplexity == pytest.approx(30.0, rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_perplexity_and_divergence_by_their_definitions(batch_size: int) -> None:
    model = llama()
    vector, setting = random_vector(model, [1], width=16), Setting(0.8)
    plain, moved, divergence = [], [], []
    for text in TEXTS:
        ids = torch.tensor([text])
        with torch.no_grad():
            p = model(ids).logits[0, :-1].softmax(-1)
            with vector.apply(model, 0.8):
                q = model(ids).logits[0, :-1].softmax(-1)
        for at, token in enumerate(text[1:]):
            plain.append(math.log(p[at, token]))
            moved.append(math.log(q[at, token]))
            divergence.append(sum(float(a * math.log(a / b)) for a, b in zip(p[at], q[at], strict=True)))
    first, found = neutral_text(
        model, None, TEXTS, [(None, setting), (vector, setting)], batch_size=batch_size
    )
    assert first.perplexity == pytest.approx(math.exp(-np.mean(plain)), rel=1e-10)
    assert found.perplexity == pytest.approx(math.exp(-np.mean(moved)), rel=1e-10)
    assert found.ratio == pytest.approx(found.perplexity / first.perplexity, rel=1e-12)
    assert found.divergence == pytest.approx(np.mean(divergence), rel=1e-9)
    assert found.divergence > 1e-3


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "neutral is []"), ("text", "neutral is 'text'"), ([[5]], "neutral text 0 has 1 tokens")],
)
def test_what_is_no_neutral_text(texts: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        neutral_text(llama(), None, texts, [(None, Setting())])
    assert message in str(caught.value)


def test_degeneration_by_hand() -> None:
    circles = degeneration([[1, 2] * 6])  # 12 tokens, 11 bigrams of 2 kinds, 9 4-grams of 2 kinds
    assert (circles.distinct_1, circles.distinct_2) == (pytest.approx(2 / 12), pytest.approx(2 / 11))
    assert (circles.repetition, circles.length) == (pytest.approx(7 / 9), 12)
    fresh = degeneration([[1, 2, 3, 4, 5], [6, 7, 8]])
    assert (fresh.distinct_1, fresh.distinct_2, fresh.repetition, fresh.length) == (1, 1, 0, 4)
    both = degeneration([[1, 2] * 6, list(range(12))])
    assert both.repetition == pytest.approx(7 / 18)
    with pytest.raises(InputError, match="no generated texts"):
        degeneration([])
