"""Sweeps: the best allowed point is chosen, the budget holds, and validation stays apart."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pullback import InputError, MethodError
from pullback.core.errors import SiteError
from pullback.steering import Setting, SteeringVector, Sweep, fit, sweep
from tests.steering.models import random_vector
from tests.steering.test_evaluate import NEUTRAL, margins
from tests.steering.tiny import BAD, GOOD, llama, pairs, towards

STRENGTHS = [0.05, 0.4, 1.6]


def swept(**settings: Any) -> Sweep:
    model = llama()
    run = {"neutral": NEUTRAL, "strengths": STRENGTHS, "layers": [2], **settings}
    return sweep(model, None, run.pop("vector", towards(model)), pairs(6, 1), **run)


def both(model: Any, asked: Any, strength: float) -> float:
    """The mean probability of GOOD and BAD together."""
    found = []
    for pair in asked:
        with torch.no_grad(), towards(model).apply(model, strength):
            p = model(torch.tensor([pair.prompt])).logits[0, -1].softmax(-1)
        found.append(float(p[GOOD] + p[BAD]))
    return float(np.mean(found))


def test_points_are_the_model_at_their_settings() -> None:
    model, asked = llama(), pairs(6, 1)
    base = np.array(margins(model, asked))
    for point in swept(budget=1e9).points:
        shift = np.array(margins(model, asked, towards(model), point.strength)) - base
        assert point.margin_shift == pytest.approx(shift.mean(), abs=1e-9)
        assert point.mc1 == ((base + shift) > 0).mean()
        assert point.anti_steerable == (shift < 0).mean()
        assert point.mass == pytest.approx(
            both(model, asked, point.strength) / both(model, asked, 0.0), rel=1e-9
        )


def test_the_largest_shift_within_the_budget_is_chosen() -> None:
    # what the model itself says is likely, and less so the further it is steered
    model = llama()
    own = model.generate(
        torch.tensor([[1, 5]]), max_new_tokens=14, min_new_tokens=14, do_sample=False
    ).tolist()
    free = swept(budget=1e9, neutral=own)
    assert [point.strength for point in free.points] == STRENGTHS
    assert free.best == Setting(1.6, (2,))
    ratios = [point.perplexity_ratio for point in free.points]
    assert ratios[0] < ratios[1] < ratios[2]
    bound = swept(budget=(ratios[1] + ratios[2]) / 2, neutral=own)
    assert bound.best == Setting(0.4, (2,))
    assert [point.allowed for point in bound.points] == [True, True, False]
    nothing = swept(budget=min(ratios) / 2, neutral=own)
    assert nothing.best.strength == 0.0


def test_the_default_is_the_middle_third_and_all_blocks() -> None:
    model = llama(layers=6)
    vector = random_vector(model, range(6), width=16)
    found = sweep(model, None, vector, pairs(2, 1), neutral=NEUTRAL, strengths=[0.1])
    assert [point.layers for point in found.points] == [(2,), (3,), (0, 1, 2, 3, 4, 5)]


def test_a_weaker_setting_is_preferred_where_nothing_is_gained() -> None:
    still = SteeringVector({2: torch.zeros(16)})
    assert swept(vector=still).best.strength == 0.05


def test_settings_that_make_all_answers_unlikely_are_not_chosen() -> None:
    """Away from both answers: the margin moves as before, and their probability falls."""
    model = llama()
    weights = model.lm_head.weight.detach()
    away = towards(model).directions[2].double() - 2 * weights[GOOD] - 2 * weights[BAD]
    vector = SteeringVector.from_displacements({2: away}, model)
    points = swept(vector=vector, budget=1e9).points
    least = min(point.mass for point in points)
    assert least < 0.9
    bound = swept(vector=vector, budget=1e9, smallest_mass=0.9)
    assert [point.allowed for point in bound.points] == [point.mass >= 0.9 for point in points]


def test_it_is_json() -> None:
    found = swept(budget=2.0)
    document = json.loads(json.dumps(found.to_dict()))
    assert document["best"]["strength"] == found.best.strength
    assert len(document["prompts"]) == 6


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"strengths": []}, MethodError, "strengths=[]; expected a list"),
        ({"strengths": [float("nan")]}, MethodError, "strength=nan; expected a finite number"),
        ({"budget": 0.0}, MethodError, "budget=0.0"),
        ({"budget": float("nan")}, MethodError, "budget=nan"),
        ({"smallest_mass": float("nan")}, MethodError, "smallest_mass=nan"),
        ({"measure": "accuracy"}, MethodError, "measure='accuracy'"),
        ({"neutral": None}, InputError, "neutral is None"),
        ({"layers": [1]}, SiteError, "no direction at block 1"),
        ({"layers": []}, MethodError, "layers is empty"),
    ],
)
def test_refusals(settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        swept(**settings)
    assert message in str(caught.value)


def test_a_sweep_on_fitted_pairs_is_refused() -> None:
    model = llama()
    vector = fit(model, None, pairs(3, 1), "mean_grad")
    with pytest.raises(InputError, match=r"3 of the 6 questions.*that the vector was fitted on"):
        sweep(model, None, vector, pairs(6, 1), neutral=NEUTRAL)
    assert swept(vector=replace(vector, provenance={})).prompts
