"""Evaluation: against loops over the model, flags that fire when and only when they should, and refusals."""

from __future__ import annotations

import csv
import io
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pullback import InputError, MethodError, ModelError
from pullback.steering import Evaluation, Question, Setting, SteeringVector, evaluate, fit, sweep
from pullback.steering.baselines import random_directions
from pullback.steering.results import Row
from tests.steering.models import built, hooks, random_vector
from tests.steering.tiny import BAD, GOOD, llama, pairs, prompts, towards

NEUTRAL = [[1, 5, 6, 7, 8], [1, 9, 10, 11]]
LAST = Setting(0.8, (2,))


def margins(model: Any, asked: Any, vector: Any = None, strength: float = 0.0) -> list[float]:
    """log p(GOOD) - log p(BAD), one prompt at a time."""
    found = []
    for pair in asked:
        with torch.no_grad():
            if vector is None:
                logits = model(torch.tensor([pair.prompt])).logits[0, -1]
            else:
                with vector.apply(model, strength):
                    logits = model(torch.tensor([pair.prompt])).logits[0, -1]
        found.append(float(logits[GOOD] - logits[BAD]))
    return found


@pytest.fixture(scope="module")
def found() -> Evaluation:
    model = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return evaluate(
            model, None, {"good": towards(model), "bad": towards(model, sign=-1.0)}, pairs(24, 1), setting=LAST,
            fit_pairs=pairs(4, 2), neutral=NEUTRAL, budget=1e9, generations=2, tokens=6, samples=300,
        )  # fmt: skip


def test_margins_and_shares_by_a_loop(found: Evaluation) -> None:
    model, asked = llama(), pairs(24, 1)
    base = np.array(margins(model, asked))
    for name, sign in (("good", 1.0), ("bad", -1.0)):
        shift = np.array(margins(model, asked, towards(model, sign=sign), 0.8)) - base
        # float32 directions, float64 model
        np.testing.assert_allclose(found.questions[name]["margin_shift"], shift, atol=1e-9)
        assert found.value(name, "margin_shift") == pytest.approx(shift.mean(), abs=1e-9)
        assert found.value(name, "anti_steerable") == (shift < 0).mean()
        assert found.value(name, "win_rate") == (shift > 0).mean()
        assert found.value(name, "mc1") == (base + shift > 0).mean()
        assert found.value(name, "mc2") == pytest.approx((1 / (1 + np.exp(-base - shift))).mean(), abs=1e-9)
    assert found.value("good", "margin_shift") > 0 > found.value("bad", "margin_shift")


def test_without_steering_it_is_the_plain_model(found: Evaluation) -> None:
    base = np.array(margins(llama(), pairs(24, 1)))
    np.testing.assert_allclose(found.questions["none"]["margin"], base, atol=1e-12)
    for measure, value in (
        ("margin_shift", 0), ("log_prob_shift", 0), ("win_rate", 0.5), ("anti_steerable", 0),
        ("perplexity_ratio", 1), ("divergence", 0),
    ):  # fmt: skip
        assert found.value("none", measure) == value
    zero = evaluate(llama(), None, towards(llama()), pairs(4, 1), setting=Setting(0.0), random_draws=2)
    assert zero.value("given", "margin_shift") == 0.0
    np.testing.assert_array_equal(zero.questions["given"]["margin"], zero.questions["none"]["margin"])


def test_the_random_band_is_the_percentiles_of_its_draws(found: Evaluation) -> None:
    """Drawn anew and applied by hand, at the vector's block and length."""
    model, asked = llama(), pairs(24, 1)
    base = np.mean(margins(model, asked))
    draws = random_directions(towards(model), 20, seed=0)
    assert all(draw.layers == (2,) and draw.directions[2].norm() == pytest.approx(1.0) for draw in draws)
    shifts = [np.mean(margins(model, asked, draw, 0.8)) - base for draw in draws]
    row = found.row("random", "margin_shift")
    np.testing.assert_allclose([row.low, row.high], np.percentile(shifts, [2.5, 97.5]), atol=1e-9)
    assert (row.estimate, row.count) == (pytest.approx(np.mean(shifts), abs=1e-9), 20)
    assert len({round(shift, 9) for shift in shifts}) == 20


def test_intervals_resample_questions_in_pairs(found: Evaluation) -> None:
    """As scipy resamples them, up to the noise of 300 resamples: a tenth of the interval is four times that."""
    from scipy.stats import bootstrap

    shift = found.questions["good"]["margin_shift"]
    wanted = bootstrap((shift,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    row = found.row("good", "margin_shift")
    assert row.low is not None
    assert row.high is not None
    np.testing.assert_allclose([row.low, row.high], wanted, atol=0.15 * (wanted.high - wanted.low))


def test_every_baseline_is_in_the_table_at_the_same_angle(found: Evaluation) -> None:
    model, asked = llama(), pairs(24, 1)
    assert found.conditions == (
        "none", "good", "bad", "prompt", "random", "random_tokens", "mean_diff", "mean_grad",
    )  # fmt: skip
    gradient = fit(model, None, pairs(4, 2), "mean_grad", layers=[2])
    base = np.mean(margins(model, asked))
    shift = np.mean(margins(model, asked, gradient, 0.8)) - base
    assert found.value("mean_grad", "margin_shift") == pytest.approx(shift, abs=1e-9)
    # three fitted prompts with their answers, then the question, behind one begin token
    shown = [token for pair in pairs(4, 2)[:3] for token in [*pair.prompt[1:], GOOD]]
    longer = [replace(pair, prompt=[1, *shown, *pair.prompt[1:]]) for pair in asked]
    wanted = np.mean(margins(model, longer)) - base
    assert found.value("prompt", "margin_shift") == pytest.approx(wanted, abs=1e-9)


def test_an_instruction_stands_in_for_the_pairs() -> None:
    model, asked = llama(), pairs(3, 1)
    found = evaluate(model, None, towards(model), asked, instruction=[20, 21], random_draws=0)
    longer = [replace(pair, prompt=[1, 20, 21, *pair.prompt[1:]]) for pair in asked]
    wanted = np.mean(margins(model, longer)) - np.mean(margins(model, asked))
    assert found.value("prompt", "margin_shift") == pytest.approx(wanted, abs=1e-9)
    assert found.row("mean_diff", "margin_shift").estimate is None
    assert {flag.name: flag for flag in found.flags}["not_compared"].text.endswith(
        "random_tokens, mean_diff, mean_grad, random."
    )


def test_generations_before_and_after(found: Evaluation) -> None:
    model = llama()
    every = [each for each in found.generations if each.condition == "good"]
    assert len(every) == 2
    for each, prompt in zip(every, prompts(2, 1), strict=True):
        assert each.prompt == " ".join(map(str, prompt))
        ids = torch.tensor([prompt])
        with torch.no_grad(), towards(model).apply(model, 0.8):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        new = out[0, len(prompt) :].tolist()
        new = new[: new.index(2)] if 2 in new else new
        assert each.text == " ".join(map(str, new))
    assert found.row("good", "length").count == 2


def names(found: Evaluation, condition: str, severity: str = "failure") -> set[str]:
    return {flag.name for flag in found.flags if (flag.condition, flag.severity) == (condition, severity)}


def test_a_vector_that_steers_passes_and_its_opposite_fails(found: Evaluation) -> None:
    assert names(found, "good") == set()
    assert names(found, "bad") == {"within_random_band", "no_gain", "anti_steerable"}
    assert found.failed
    assert [flag.severity for flag in found.flags][:3] == ["failure"] * 3
    assert "last_block" in names(found, "good", "caution")
    assert "no_better_than_baseline" in names(found, "bad", "caution")


def test_a_random_direction_is_flagged() -> None:
    """The negative control: one more draw is within the band of the others."""
    model = llama()
    vector = random_vector(model, [1], seed=3, width=16)
    found = evaluate(model, None, vector, pairs(24, 1), setting=Setting(0.2), samples=200)
    assert "within_random_band" in names(found, "random (given)")


def test_perplexity_over_the_budget_is_flagged() -> None:
    model = llama()
    run: Any = {"neutral": NEUTRAL, "random_draws": 0, "samples": 10}
    ratio = evaluate(model, None, towards(model), pairs(4, 1), setting=LAST, **run).value(
        "given", "perplexity_ratio"
    )
    over = evaluate(model, None, towards(model), pairs(4, 1), setting=LAST, budget=0.99 * ratio, **run)
    within = evaluate(model, None, towards(model), pairs(4, 1), setting=LAST, budget=1.01 * ratio, **run)
    assert "perplexity" in names(over, "given")
    assert "perplexity" not in names(within, "given")
    assert "few_questions" in names(within, "given", "caution")
    # the caution about divergence follows its own number
    for strength in (0.02, 8.0):
        found = evaluate(model, None, towards(model), pairs(4, 1), setting=Setting(strength), **run)
        far = found.value("given", "divergence") > 0.5
        assert ("divergence" in names(found, "given", "caution")) == far == (strength == 8.0)


@pytest.mark.parametrize(
    ("provenance", "flag"),
    [
        (
            {"settings": {"attribution": "ig"}, "completeness": {"relative_gap": 0.2}},
            "incomplete_attribution",
        ),
        ({"settings": {"attribution": "ig"}, "completeness": {"relative_gap": 0.05}}, None),
        ({"settings": {"attribution": "relp"}, "completeness": {"relative_gap": 0.2}}, None),
        ({"pairs": 5, "agreement": [{"block": 2, "pairwise": 0.01}]}, "pairs_disagree"),
        ({"pairs": 5, "agreement": [{"block": 2, "pairwise": 0.5}]}, None),
        (
            {"pairs": 5, "agreement": [{"block": 1, "pairwise": 0.5}, {"block": 2, "pairwise": 0.0}]},
            "pairs_disagree",
        ),
    ],
)
def test_what_fitting_found_is_flagged(provenance: Any, flag: str | None) -> None:
    model = llama()
    vector = replace(towards(model), provenance=provenance)
    found = evaluate(model, None, vector, pairs(3, 1), setting=LAST, random_draws=0, samples=10)
    assert names(found, "vector") & {"incomplete_attribution", "pairs_disagree"} == (
        {flag} if flag else set()
    )


def test_repetition_is_flagged() -> None:
    """A direction that makes one token the likeliest everywhere runs in circles."""
    model = llama()
    weights = model.lm_head.weight.detach()
    vector = SteeringVector.from_displacements({2: weights[GOOD]}, model)
    found = evaluate(
        model,
        None,
        vector,
        pairs(3, 1),
        setting=Setting(50.0),
        random_draws=0,
        generations=3,
        tokens=16,
        samples=10,
    )
    assert found.value("vector", "repetition") > found.value("none", "repetition") + 0.2
    assert "degenerate" in names(found, "vector")


def test_what_is_not_finite_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that overflows where it is steered, at the questions that hold token 20."""
    model, asked = llama(), [([1, 5], GOOD, BAD), ([1, 20], GOOD, BAD), ([1, 6], GOOD, BAD)]
    forward, steering = model.forward, {"on": False}

    def overflowing(input_ids: torch.Tensor, attention_mask: Any = None, **rest: Any) -> Any:
        out = forward(input_ids=input_ids, attention_mask=attention_mask, **rest)
        if steering["on"]:
            out.logits = out.logits.masked_fill((input_ids == 20).any(1)[:, None, None], torch.nan)
        return out

    monkeypatch.setattr(model, "forward", overflowing)
    vector = towards(model)
    apply = SteeringVector.apply
    monkeypatch.setattr(SteeringVector, "apply", lambda *a, **k: steering.update(on=True) or apply(*a, **k))
    with pytest.raises(ModelError, match="answers of question 1 have log-probabilities that are not finite"):
        steering["on"] = True
        evaluate(model, None, vector, asked, random_draws=0)
    steering["on"] = False
    found = evaluate(model, None, vector, asked, neutral=[[1, 20, 5], [1, 6, 7]], random_draws=0, samples=10)
    assert names(found, "given") >= {"not_finite", "perplexity"}
    assert found.row("given", "margin_shift").count == 2
    assert found.row("given", "mc1").count == 2
    assert np.isnan(found.questions["given"]["anti_steerable"]).tolist() == [False, True, False]
    assert found.value("given", "perplexity_ratio") == float("inf")


def test_batch_mates_change_nothing_and_the_model_is_as_before() -> None:
    model = llama()
    vector, run = (
        random_vector(model, [0, 1], width=16),
        {"random_draws": 2, "neutral": NEUTRAL, "samples": 10},
    )
    before, state = hooks(model), torch.random.get_rng_state()
    one = evaluate(model, None, vector, pairs(7, 1), batch_size=1, **run)  # type: ignore[arg-type]
    many = evaluate(model, None, vector, pairs(7, 1), batch_size=16, **run)  # type: ignore[arg-type]
    for a, b in zip(one.rows, many.rows, strict=True):
        assert (a.condition, a.measure) == (b.condition, b.measure)
        assert a.estimate == pytest.approx(b.estimate, abs=1e-10)
    assert hooks(model) == before
    assert torch.equal(state, torch.random.get_rng_state())


def test_strengths_are_chosen_for_every_method_on_validation() -> None:
    model = llama()
    vector, strengths = towards(model), [0.1, 0.6]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate(
            model, None, vector, pairs(5, 1), fit_pairs=pairs(3, 2), validation=pairs(5, 3), neutral=NEUTRAL,
            strengths=strengths, budget=1e9, random_draws=0, samples=10,
        )  # fmt: skip
    chosen = sweep(
        model, None, vector, pairs(5, 3), neutral=NEUTRAL, strengths=strengths, layers=[2], budget=1e9
    )
    row = found.row("given", "margin_shift", "validated")
    assert (row.strength, row.layers) == (chosen.best.strength, (2,)) == (0.6, (2,))
    shift = np.mean(margins(model, pairs(5, 1), vector, 0.6)) - np.mean(margins(model, pairs(5, 1)))
    assert row.estimate == pytest.approx(shift, abs=1e-9)
    assert found.row("mean_diff", "margin_shift", "validated").count == 5
    (point,) = [point for point in chosen.points if point.strength == 0.6]
    assert found.value("given", "perplexity_ratio", "validated") == point.perplexity_ratio


def test_tables_hold_the_same_numbers(found: Evaluation, tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(found.to_csv(tmp_path / "rows.csv"))))
    assert (tmp_path / "rows.csv").read_text() == found.to_csv()
    found.to_json(tmp_path / "found.json")
    document = json.loads((tmp_path / "found.json").read_text())
    frame = found.to_dataframe()
    assert len(rows) == len(document["rows"]) == len(frame) == len(found.rows)
    for row, line, entry in zip(found.rows, rows, document["rows"], strict=True):
        assert (row.condition, row.measure) == (line["condition"], line["measure"])
        assert row.estimate == pytest.approx(float(line["estimate"]), abs=0)
        assert row.estimate == entry["estimate"]
    assert document["failed"] is True
    assert document["questions"]["good"]["margin"] == found.questions["good"]["margin"].tolist()
    markdown = found.to_markdown(["margin_shift"])
    assert markdown.startswith("- **failure** within_random_band (bad): its margin shift")
    row = found.row("good", "margin_shift")
    assert f"| good | 0.8 at 2 | {row.estimate:.3g} [{row.low:.3g}, {row.high:.3g}] |" in markdown
    with pytest.raises(InputError, match='Nearest: "good/mc1/same"'):
        found.row("god", "mc1")
    assert isinstance(found.rows[0], Row)


def fitted(model: Any) -> SteeringVector:
    return fit(model, None, pairs(3, 1), "mean_grad", layers=[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"questions": []}, "questions is empty"),
        ({"questions": pairs(4, 1)}, '3 of the 4 questions, number 0 first, are prompts that "mean_grad (given)" was fitted'),
        ({"fit_pairs": pairs(2, 4)}, "2 of the 3 questions, number 0 first, are prompts of fit_pairs"),
        ({"validation": pairs(1, 4), "neutral": NEUTRAL}, "1 of the 3 questions, number 0 first, are prompts of validation"),
        ({"validation": pairs(1, 5)}, "give neutral=[texts] too"),
        ({"vectors": {}}, "expected a SteeringVector, or several by name"),
        ({"vectors": {"random": None}}, "by names other than"),
        ({"neutral": []}, "neutral is []"),
        ({"random_draws": -1}, "random_draws=-1; expected a whole number"),
        ({"samples": 0}, "samples=0"),
        ({"budget": float("nan")}, "budget=nan; expected a ratio"),
        ({"batch_size": 0}, "batch_size"),
    ],
)  # fmt: skip
def test_refusals(settings: Any, message: str) -> None:
    model = llama()
    settings = {"questions": pairs(3, 4), "vectors": fitted(model), **settings}
    with pytest.raises((InputError, MethodError)) as caught:
        evaluate(model, None, settings.pop("vectors"), settings.pop("questions"), **settings)
    assert message in str(caught.value)


def test_a_test_on_the_questions_of_a_sweep_is_refused() -> None:
    model = llama()
    vector = towards(model)
    chosen = sweep(model, None, vector, pairs(3, 1), neutral=NEUTRAL, strengths=[0.2], layers=[2], budget=9.0)
    with pytest.raises(
        InputError, match="1 of the 2 questions, number 1 first, are prompts that the strength"
    ):
        evaluate(model, None, vector, [*pairs(1, 2), *pairs(1, 1)], setting=chosen)
    found = evaluate(model, None, vector, pairs(2, 2), setting=chosen, random_draws=0, samples=10)
    assert found.row("given", "mc1").strength == 0.2


def test_a_model_in_train_mode_or_of_another_width_is_refused() -> None:
    model = llama()
    with pytest.raises(ModelError, match=r"call model\.eval\(\)"):
        evaluate(llama().train(), None, towards(model), pairs(2, 1))
    with pytest.raises(ModelError, match="width 32"):
        evaluate(model, None, random_vector(None, [1], width=32), pairs(2, 1))


def test_questions_that_differ_by_their_image_are_not_the_same() -> None:
    from pullback.steering.pairs import prompt_digest

    ids = torch.tensor([1, 2])
    pixels = torch.zeros(1, 3, 2, 2)
    assert prompt_digest(ids, {"pixel_values": pixels}) != prompt_digest(ids, {"pixel_values": pixels + 1})
    assert prompt_digest(ids, {"pixel_values": pixels}) == prompt_digest(
        ids, {"pixel_values": pixels.clone()}
    )


def test_vectors_at_other_blocks_have_a_band_of_their_own() -> None:
    model = llama()
    vectors = {
        "last": towards(model),
        "first": random_vector(model, [0], width=16),
        "also": towards(model, sign=-1.0),
    }
    found = evaluate(model, None, vectors, pairs(4, 1), random_draws=4, samples=10)
    assert found.conditions[:7] == ("none", "last", "first", "also", "prompt", "random", "random for first")
    bands = {name: found.row(name, "margin_shift") for name in ("random", "random for first")}
    assert (bands["random"].layers, bands["random for first"].layers) == ((2,), (0,))
    high = bands["random for first"].high
    assert high is not None
    assert ("within_random_band" in names(found, "first")) == (found.value("first", "margin_shift") <= high)


def test_an_encoder_decoder_is_evaluated_without_what_it_has_not() -> None:
    model, _ = built("t5", double=True)
    vector = random_vector(model, [1])
    asked, given = [([5, 6, 7], 8, 9), ([5, 10], 8, 9)], [([5, 11, 7], 8, 9), ([12, 6, 4], 8, 9)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate(model, None, vector, asked, fit_pairs=given, random_draws=2, samples=10)
    assert found.row("mean_diff", "margin_shift").estimate is None
    assert found.row("mean_grad", "margin_shift").estimate is not None
    with pytest.raises(InputError, match="this one is an encoder-decoder: neutral=None"):
        evaluate(model, None, vector, asked, neutral=[[5, 6, 7]])


def test_long_demonstrations_are_left_out_where_the_model_is_short() -> None:
    model = llama(positions=12)
    asked = [Question([1, 5, 6], [7], [8])]
    given = [([1, *range(3, 11)], GOOD, BAD), ([1, 4, 3], GOOD, BAD)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate(model, None, towards(model), asked, fit_pairs=given, random_draws=0, samples=10)
    assert found.row("prompt", "margin_shift").estimate is None
