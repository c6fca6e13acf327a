"""The page about a vector: flags first, every picture, no script and no request; texts escaped."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from pullback import InputError
from pullback.steering import evaluate, fit, sweep
from pullback.steering.report import write_steering_report
from tests.steering.tiny import llama, pairs

NEUTRAL = [[1, 5, 6, 7, 8], [1, 9, 10, 11]]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    model, given = llama(), pairs(4, 2)
    run: Any = {"neutral": NEUTRAL, "budget": 1e9}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vector = fit(model, None, given, k=2, steps=4)
        chosen = sweep(model, None, vector, pairs(4, 3), strengths=[0.1, 0.4], layers=[1, slice(0, 3)], **run)
        found = evaluate(
            model, None, vector, pairs(4, 1), setting=chosen, fit_pairs=given, random_draws=4, generations=2, tokens=4,
            samples=20, **run,
        )  # fmt: skip
    path = tmp_path_factory.mktemp("report") / "page.html"
    write_steering_report(path, found, vector, sweep=chosen, pairs=given, model=model, title="<vector>")
    return path.read_text()


def test_flags_come_before_everything_else(page: str) -> None:
    order = ["&lt;vector&gt;", "Failed:", "Reasons to distrust it", "All conditions", "How far each", "Strength on the",
             "Reliability by block", "What speaks for and against", "Greedy continuations"]  # fmt: skip
    places = [page.index(each) for each in order]
    assert places == sorted(places)
    assert "few_questions" in page


def test_the_page_stands_alone(page: str) -> None:
    assert page.count("data:image/png;base64,") == 3
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "<vector>" not in page


def test_the_chosen_tokens_carry_their_attribution(page: str) -> None:
    model, given = llama(), pairs(4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vector = fit(model, None, given, k=2, steps=4)
    titles = re.findall(r'class="token"[^>]*title="([^"]+)"', page)
    assert len(titles) == sum(len(pair.prompt) for pair in given)
    shown = [float(title) for title in titles if float(title) != 0]
    scores = [
        score
        for each in vector.provenance["chosen"]
        for _, score, _ in sorted([*each["positive"], *each["negative"]])
    ]
    assert shown == pytest.approx(scores, rel=1e-3)  # shown to four digits


def test_other_pairs_are_refused(tmp_path: Path) -> None:
    model = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vector = fit(model, None, pairs(3, 2), k=2, steps=2)
        found = evaluate(model, None, vector, pairs(2, 1), random_draws=0, samples=5)
    with pytest.raises(InputError, match="was not fitted on these pairs"):
        write_steering_report(tmp_path / "page.html", found, vector, pairs=pairs(3, 4), model=model)
    with pytest.raises(InputError, match="give model="):
        write_steering_report(tmp_path / "page.html", found, vector, pairs=pairs(3, 2))
    write_steering_report(tmp_path / "page.html", found, vector)
    assert "Greedy" not in (tmp_path / "page.html").read_text()
