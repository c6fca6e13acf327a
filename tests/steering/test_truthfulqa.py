"""The protocol of TruthfulQA on a toy file: what is fitted, chosen and tested on, and with which prompts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from pullback import MethodError
from pullback.commands.models import load_tokenizer, named_model
from pullback.datasets import load_truthfulqa
from pullback.steering import Setting, evaluate, fit, sweep, truthful_pairs, truthful_questions, truthfulqa
from tests.steering.worded import saved, truthfulqa_csv


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = saved(tmp_path_factory.mktemp("model"))
    truthfulqa_csv(folder / "TruthfulQA.csv")
    return folder


def test_pairs_and_questions_are_the_files_answers(folder: Path) -> None:
    asked = load_truthfulqa(folder / "TruthfulQA.csv")[:1]
    (pair,) = truthful_pairs(asked)
    assert (pair.prompt, pair.preferred, pair.dispreferred) == (
        "Q: what is the moon ?\nA:",
        " no rock",
        " yes rock",
    )
    (question,) = truthful_questions(asked, "{question}")
    assert question.prompt == "what is the moon ?"
    assert (list(question.true), list(question.false)) == ([" no rock", " rock"], [" yes rock", " cheese"])
    assert question.best == 0
    with pytest.raises(MethodError, match=r'expected text with "\{question\}" in it'):
        truthful_pairs(asked, "Q:")


def test_the_protocol_is_fit_sweep_and_evaluate_on_three_parts(folder: Path) -> None:
    model: Any = named_model(str(folder)).model
    words = load_tokenizer(folder)
    run: dict[str, Any] = {"random_draws": 3, "budget": 1e9}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = truthfulqa(
            model, words, folder / "TruthfulQA.csv", "mean_diff", fit_questions=4, validation_questions=3,
            strengths=[0.2, 0.8], layers=[1], **run,
        )  # fmt: skip
        parts = [
            {each.question for each in part}
            for part in (found.split.fit, found.split.validation, found.split.test)
        ]
        assert list(map(len, parts)) == [4, 3, 5]
        assert len(set.union(*parts)) == 12
        pairs = truthful_pairs(found.split.fit)
        vector = fit(model, words, pairs, "mean_diff")
        assert vector.cosine(found.vector)[1] == pytest.approx(1.0, abs=1e-6)
        from pullback.datasets import neutral_sentences

        texts = neutral_sentences()
        chosen = sweep(
            model, words, vector, truthful_questions(found.split.validation), neutral=texts, strengths=[0.2, 0.8],
            layers=[1], budget=1e9,
        )  # fmt: skip
        assert chosen.points == found.sweep.points
        again = evaluate(
            model, words, vector, truthful_questions(found.split.test), setting=Setting(chosen.best.strength, (1,)),
            fit_pairs=pairs, neutral=texts, **run,
        )  # fmt: skip
    for measure in ("mc1", "mc2", "mc2_per_token", "margin_shift", "perplexity_ratio"):
        wanted = again.value("mean_diff (given)", measure)
        assert found.evaluation.value("mean_diff (given)", measure) == pytest.approx(wanted, abs=1e-6)
    assert found.evaluation.row("none", "mc1").count == 5
