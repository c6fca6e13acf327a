"""Evaluating steering vectors on questions that they were not fitted on, beside the controls that they have to beat."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pullback.attribution.paths import require_count
from pullback.core.errors import InputError, MethodError, ModelError

from .baselines import fitted_baselines, instructed, random_directions
from .blocks import find_blocks
from .continuations import continuations, text_of
from .flags import BASELINES, flags_of
from .measures import AnswerMeasures, NeutralText, answer_measures, degeneration, neutral_text
from .pairs import EncodedPair, encode_pairs, prompt_digest
from .questions import EncodedQuestion, encode_questions, require_disjoint
from .results import Evaluation, Flag, Generation, Row
from .scoring import Setting, answer_log_probs, require_eval
from .sweep import STRENGTHS, Sweep, require_budget, sweep
from .vector import SteeringVector

__all__ = ["evaluate"]

_RESERVED = ("none", "random", *BASELINES)


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    vectors: SteeringVector | Mapping[str, SteeringVector],
    questions: Sequence[Any],
    *,
    setting: Setting | Sweep | None = None,
    fit_pairs: Sequence[Any] | None = None,
    neutral: Sequence[Any] | None = None,
    validation: Sequence[Any] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    budget: float = 1.05,
    instruction: Any = None,
    random_draws: int = 20,
    generations: int = 0,
    tokens: int = 32,
    samples: int = 2000,
    seed: int = 0,
    batch_size: int = 16,
    blocks: str | None = None,
) -> Evaluation:
    """Whether vectors steer towards the true answers of new questions, and more than chance and simpler ways do.

    With m = log Σ_true p - log Σ_false p of a question, the margin shift is the mean of ``m(steered) - m(unsteered)``.
    Every other direction is applied at the same blocks and as far as the vector, so at the same angle.

    Args:
        model: in eval mode.
        tokenizer: of the model, or its processor; None where prompts and answers are token ids.
        vectors: one, or several by name.
        questions: ``Question(prompt, true, false)`` or pairs; none may share its prompt with a fitted pair or with
            what a strength was chosen on.
        setting: strength, blocks and scope, or the sweep that chose them; None is ``Setting()``.
        fit_pairs: what the vectors were fitted on, for "random_tokens", "mean_diff" and "mean_grad", which are applied
            at the blocks of the first vector.
        neutral: texts that steering should leave alone, for perplexity and divergence.
        validation: questions on which a strength is chosen for each vector and each fitted baseline, reported in rows
            of the setting "validated"; needs ``neutral``.
        strengths, budget: for ``validation``; ``budget`` also is the largest perplexity ratio that is not flagged.
        instruction: text put before the prompts for the baseline "prompt"; None shows fitted pairs there.
        random_draws: random directions for the 95 % band; 0 for none.
        generations, tokens: how many of the prompts are continued, before and after, and how far.
        samples, seed: of the bootstrap over questions; the seed also is that of the random baselines.
        batch_size: rows per forward; results do not depend on it.
        blocks: dotted path of the list of blocks, where it is not found.

    Raises InputError for no questions, or ones that were fitted or chosen on; MethodError for parameters out of range;
    ModelError for a model in train mode, of another vector, or whose own log-probabilities are not finite.

    Cost: the questions' answers once for each of 1 + vectors + 4 baselines + ``random_draws`` (per distinct choice of
    blocks), and neutral texts as often.

    Source: Tan et al. 2024 (arXiv:2407.12404) for anti-steerable examples; Wu et al. 2025 (AxBench) for the prompt as
    a baseline.

    >>> import torch; from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    >>> vector = SteeringVector({1: torch.eye(8)[0]})
    >>> evaluate(model, None, vector, [([5, 6], 8, 9)], random_draws=2).value("none", "margin_shift")
    0.0
    """
    require_eval(model)
    for name, value, least in (
        ("random_draws", random_draws, 0),
        ("generations", generations, 0),
        ("samples", samples, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise MethodError(f"{name}={value!r}; expected a whole number of at least {least}.")
    require_count("batch_size", batch_size)
    require_budget(budget)
    if validation is not None and neutral is None:
        raise InputError("validation chooses strengths under a perplexity budget; give neutral=[texts] too.")
    named = _named(vectors)
    encoded = encode_questions(model, tokenizer, questions)
    _require_unseen(model, tokenizer, encoded, named, fit_pairs, setting, validation)
    where = setting.best if isinstance(setting, Sweep) else setting or Setting()
    chosen = {name: _at(vector, where) for name, vector in named.items()}
    for vector in chosen.values():
        vector.check(model, blocks=blocks)
    compared = dict(chosen)
    if fit_pairs is not None:
        first = next(iter(chosen.values()))
        compared |= fitted_baselines(
            model, tokenizer, fit_pairs, first, batch_size=batch_size, blocks=blocks, seed=seed
        )
    bands, draws = _bands(chosen, random_draws, seed)
    plain = replace(where, layers=None)  # the vectors are at these blocks already
    run: dict[str, Any] = {"batch_size": batch_size, "blocks": blocks}

    def measured(
        vector: SteeringVector | None, at: Setting = plain, asked: Sequence[EncodedQuestion] = encoded
    ) -> AnswerMeasures:
        return answer_measures(asked, answer_log_probs(model, tokenizer, asked, vector, at, **run))

    base = measured(None)
    if not bool(np.isfinite(base.margin).all()):
        wrong = int(np.flatnonzero(~np.isfinite(base.margin))[0])
        raise ModelError(
            f"without steering the answers of question {wrong} have log-probabilities that are not finite; check the "
            "model's weights and dtype on it."
        )
    values = {"none": _values(base, base)}
    rows = _summary("none", "same", values["none"], None, None, samples, seed)
    for name, vector in compared.items():
        values[name] = _values(measured(vector), base)
        rows += _summary(name, "same", values[name], where.strength, vector.layers, samples, seed)
    for name, each in draws.items():
        every = [_values(measured(vector), base) for vector in each]
        rows += _band(name, every, where.strength, each[0].layers)
    asked = instructed(model, tokenizer, encoded, instruction, fit_pairs)
    if asked is not None:
        values["prompt"] = _values(measured(None, plain, asked), base)
        rows += _summary("prompt", "same", values["prompt"], None, None, samples, seed)
    without = [name for name in BASELINES if name not in values]
    rows += [Row(name, "same", "margin_shift", None, None, None, 0) for name in without]
    if not random_draws:
        without.append("random")
    if neutral is not None:
        every_one: dict[str, list[SteeringVector | None]] = {"none": [None]}
        every_one |= {name: [vector] for name, vector in compared.items()}
        every_one |= {name: [*each] for name, each in draws.items()}
        steerings = [(vector, plain) for each in every_one.values() for vector in each]
        texts = iter(neutral_text(model, tokenizer, neutral, steerings, **run))
        for name, own in every_one.items():
            rows += _neutral_rows(name, own, [next(texts) for _ in own], where.strength)
    shown: list[Generation] = []
    if generations:
        prompts = [question.prompt for question in encoded[:generations]]
        more, shown = _continued(model, tokenizer, prompts, {"none": None, **chosen}, plain, tokens, run)
        rows += more
    flags: list[Flag] = []
    for name, vector in chosen.items():
        band = bands.get(name, "random")
        flags += flags_of(name, vector, rows, len(find_blocks(model, blocks)), budget, without, band)
    for name, vector in compared.items() if validation is not None else ():
        assert validation is not None
        assert neutral is not None
        found = sweep(
            model, tokenizer, vector, validation, neutral=neutral, strengths=strengths, layers=[vector.layers],
            budget=budget, setting=plain, **run,
        )  # fmt: skip
        best = _values(measured(vector, replace(found.best, layers=None)), base)
        rows += _summary(name, "validated", best, found.best.strength, vector.layers, samples, seed)
        rows += _swept_rows(name, found, vector.layers, len(neutral))
    settings = {
        "setting": asdict(where), "questions": len(encoded), "random_draws": random_draws, "budget": budget,
        "samples": samples, "seed": seed, "vectors": {name: str(vector) for name, vector in chosen.items()},
        "fit_pairs": None if fit_pairs is None else len(fit_pairs),
        "neutral": None if neutral is None else len(neutral),
        "validation": None if validation is None else len(validation),
    }  # fmt: skip
    order = list(dict.fromkeys(["none", *chosen, "prompt", *draws, *BASELINES]))
    rows.sort(key=lambda row: (order.index(row.condition), row.setting))
    flags.sort(key=lambda flag: flag.severity != "failure")
    return Evaluation(tuple(rows), tuple(flags), values, tuple(shown), settings)


def _named(vectors: SteeringVector | Mapping[str, SteeringVector]) -> dict[str, SteeringVector]:
    if isinstance(vectors, SteeringVector):
        method = str(vectors.provenance.get("method", "vector"))
        return {f"{method} (given)" if method in _RESERVED else method: vectors}
    if not isinstance(vectors, Mapping) or not vectors:
        raise InputError(f"vectors is {vectors!r}; expected a SteeringVector, or several by name.")
    for name, vector in vectors.items():
        if name in _RESERVED or not isinstance(vector, SteeringVector):
            raise InputError(
                f"{name!r} is {type(vector).__name__}; expected SteeringVectors by names other than "
                f"{', '.join(_RESERVED)}, which are those of the baselines."
            )
    return dict(vectors)


def _require_unseen(
    model: nn.Module,
    tokenizer: Any,
    encoded: Sequence[EncodedQuestion],
    vectors: Mapping[str, SteeringVector],
    fit_pairs: Sequence[Any] | None,
    setting: Setting | Sweep | None,
    validation: Sequence[Any] | None,
) -> None:
    for name, vector in vectors.items():
        require_disjoint(
            encoded, vector.provenance.get("prompts") or (), f'are prompts that "{name}" was fitted on'
        )
    if fit_pairs is not None:
        seen = [prompt_digest(pair.ids, pair.others) for pair in encode_pairs(model, tokenizer, fit_pairs)]
        require_disjoint(encoded, seen, "are prompts of fit_pairs")
    if isinstance(setting, Sweep):
        require_disjoint(encoded, setting.prompts, "are prompts that the strength was chosen on")
    if validation is not None:
        seen = [question.digest for question in encode_questions(model, tokenizer, validation)]
        require_disjoint(encoded, seen, "are prompts of validation")


def _at(vector: SteeringVector, setting: Setting) -> SteeringVector:
    return vector if setting.layers is None else vector.select(list(setting.layers))


def _bands(
    chosen: Mapping[str, SteeringVector], draws: int, seed: int
) -> tuple[dict[str, str], dict[str, list[SteeringVector]]]:
    """Which random condition belongs to which vector: one for all that move the same blocks as far."""
    found: dict[str, list[SteeringVector]] = {}
    names: dict[Any, str] = {}
    owners: dict[str, str] = {}
    for name, vector in chosen.items() if draws else ():
        key = tuple(
            (layer, round(float(one.norm()), 5), vector.scales[layer])
            for layer, one in vector.directions.items()
        )
        if key not in names:
            names[key] = f"random for {name}" if names else "random"
            found[names[key]] = random_directions(vector, draws, seed)
        owners[name] = names[key]
    return owners, found


def _values(found: AnswerMeasures, base: AnswerMeasures) -> dict[str, NDArray[np.float64]]:
    shift = found.margin - base.margin
    return {
        "mc1": found.mc1, "mc2": found.mc2, "mc2_per_token": found.mc2_per_token, "log_prob": found.log_prob,
        "margin": found.margin, "log_prob_shift": found.log_prob - base.log_prob, "margin_shift": shift,
        "win_rate": np.where(np.isnan(shift), np.nan, (1.0 + np.sign(shift)) / 2.0),
        "anti_steerable": np.where(np.isnan(shift), np.nan, shift < 0),
    }  # fmt: skip


def _summary(
    condition: str,
    setting: str,
    values: Mapping[str, NDArray[np.float64]],
    strength: float | None,
    layers: tuple[int, ...] | None,
    samples: int,
    seed: int,
) -> list[Row]:
    """Means over questions; one seed, so that every condition and measure is resampled alike."""
    from pullback.evaluation import bootstrap_interval

    rows = []
    for measure, each in values.items():
        found = bootstrap_interval(each, samples=samples, seed=seed)
        estimate, low, high = (
            None if math.isnan(number) else number for number in (found.estimate, found.low, found.high)
        )
        rows.append(Row(condition, setting, measure, estimate, low, high, found.count, strength, layers))
    return rows


def _band(
    condition: str,
    draws: Sequence[Mapping[str, NDArray[np.float64]]],
    strength: float,
    layers: tuple[int, ...],
) -> list[Row]:
    """Mean, 2.5th and 97.5th percentile over draws of each measure's mean."""
    return [
        _band_row(condition, measure, [float(each[measure].mean()) for each in draws], strength, layers)
        for measure in draws[0]
    ]


def _band_row(
    condition: str, measure: str, means: Sequence[float], strength: float, layers: tuple[int, ...]
) -> Row:
    low, high = np.percentile(means, [2.5, 97.5])
    mean = float(np.mean(means))
    return Row(condition, "same", measure, mean, float(low), float(high), len(means), strength, layers)


def _neutral_rows(
    condition: str, vectors: Sequence[SteeringVector | None], texts: Sequence[NeutralText], strength: float
) -> list[Row]:
    rows = []
    first = vectors[0]
    for measure, name in (("perplexity_ratio", "ratio"), ("divergence", "divergence")):
        found = [float(getattr(text, name)) for text in texts]
        if first is None:
            rows.append(Row(condition, "same", measure, found[0], None, None, texts[0].tokens))
        elif len(found) > 1:
            rows.append(_band_row(condition, measure, found, strength, first.layers))
        else:
            rows.append(
                Row(condition, "same", measure, found[0], None, None, texts[0].tokens, strength, first.layers)
            )
    return rows


def _swept_rows(condition: str, found: Sweep, layers: tuple[int, ...], texts: int) -> list[Row]:
    """What the sweep measured on neutral text at the strength that it chose."""
    return [
        Row(condition, "validated", measure, value, None, None, texts, point.strength, layers)
        for point in found.points
        if point.strength == found.best.strength
        for measure, value in (
            ("perplexity_ratio", point.perplexity_ratio),
            ("divergence", point.divergence),
        )
    ]


def _continued(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[EncodedPair],
    vectors: Mapping[str, SteeringVector | None],
    setting: Setting,
    tokens: int,
    run: Mapping[str, Any],
) -> tuple[list[Row], list[Generation]]:
    rows, shown = [], []
    for name, vector in vectors.items():
        texts = continuations(model, tokenizer, prompts, vector, setting, tokens=tokens, **run)
        at = (None, None) if vector is None else (setting.strength, vector.layers)
        for measure, value in asdict(degeneration(texts)).items():
            rows.append(Row(name, "same", measure, value, None, None, len(texts), *at))
        shown += [
            Generation(name, text_of(tokenizer, prompt.ids.tolist()), text_of(tokenizer, text))
            for prompt, text in zip(prompts, texts, strict=True)
        ]
    return rows, shown
