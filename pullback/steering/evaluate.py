"""What a steering vector does to questions that it was not fitted on, beside every control."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core import noise
from pullback.core.errors import InputError, MethodError
from pullback.evaluation.statistics import Interval, bootstrap_interval

from .agreement import unit
from .answers import Answered, Questions, Setting, answered, prompts_of, require_setting
from .directions import fit
from .evaluation_result import Condition, SteeringEvaluation, flags_of
from .text_quality import degeneration, generated_ids, neutral_text, token_batches
from .vector import SteeringVector

__all__ = ["evaluate", "random_directions"]

CONTROLS = ("random_tokens", "mean_diff", "mean_grad")


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    vectors: SteeringVector | Mapping[str, SteeringVector],
    items: Sequence[Any],
    *,
    setting: Setting | Mapping[str, Setting] | None = None,
    fit_pairs: Sequence[Any] | None = None,
    neutral: Sequence[Any] = (),
    budget: float = 1.05,
    instruction: str | None = None,
    generate: int = 0,
    draws: int = 20,
    batch_size: int = 16,
    blocks: str | None = None,
    seed: int = 0,
) -> SteeringEvaluation:
    """Measure steering vectors on held-out questions, with controls, intervals and flags.

    For each question, of the answer to prefer y+ and the wrong ones y-: "log_prob" log p(y+); "margin" log p(y+) -
    max log p(y-); "mc1" 1 where the margin is positive; "mc2" ``Σ_right p / Σ p``; both also per token;
    "log_prob_shift" and "margin_shift" what steering adds; "win_rate" 1 where the margin grows, 1/2 where it stays;
    "anti_steerable" 1 where it shrinks. On neutral text: the ratio of
    perplexities, and KL(unsteered || steered) per token.

    Conditions that are always there: "none", and "random directions" (the mean over draws, and the band of 95 % of
    them). With ``fit_pairs`` also "random_tokens", "mean_diff" and "mean_grad", fitted on these; with ``instruction``
    also "prompt", which puts it before each prompt instead of steering.

    Args:
        vectors: one vector, or several by name.
        items: ``Question``, ``Pair`` or tuples of a pair, none of which was fitted on.
        setting: strength, blocks and scope, for all vectors or by name; ``sweep`` finds one. Controls take that of
            the first vector, at its blocks.
        fit_pairs: what the vectors were fitted on; a prompt that is also among the items raises.
        neutral: texts, or their token ids, on which nothing should change.
        budget: the most that the perplexity on them may be multiplied by before it is flagged.
        instruction: text for the control "prompt".
        generate: tokens of greedy continuations of each prompt, shown and searched for repetition; 0 for none.
        draws: random directions.
        batch_size: answers at once; results do not depend on it.
        blocks: dotted path of the list of blocks, where it is not found.
        seed: of the random directions and of the bootstrap.

    Returns:
        a SteeringEvaluation; print it, or take ``to_records()``, ``save``, ``to_csv``, ``to_markdown``. ``flags`` say
        what speaks against the vector.

    Raises:
        InputError: no items, items that were fitted on, text without a tokenizer. MethodError: parameters out of range.
        ModelError: train mode, or a vector for another model.

    Cost: one forward per answer, condition and draw; two per neutral text and condition.

    Source: MC1 and MC2: Lin et al. 2022 (TruthfulQA); anti-steerable examples: Tan et al. 2024.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    >>> vector = SteeringVector({0: torch.eye(8)[0]})
    >>> found = evaluate(model, None, vector, [([5, 6], 7, 8), ([6, 5], 7, 8)], draws=2)
    >>> list(found.conditions)
    ['none', 'vector', 'random directions']
    """
    named = {"vector": vectors} if isinstance(vectors, SteeringVector) else dict(vectors)
    if not named or set(named) & {"none", "prompt", "random directions", *CONTROLS}:
        raise InputError(
            f"vectors are named {list(named)}; expected at least one, and none of the controls' names "
            f"{['none', 'prompt', 'random directions', *CONTROLS]}."
        )
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 2:
        raise MethodError(f"draws={draws!r}; expected at least 2 random directions, better 20.")
    if not budget > 1:
        raise MethodError(f"budget={budget!r}; expected a ratio of perplexities above 1, such as 1.05.")
    settings = _settings(named, setting)
    questions = Questions.encoded(model, tokenizer, items)
    if fit_pairs is not None:
        _require_apart(questions, Questions.encoded(model, tokenizer, fit_pairs))
    texts = token_batches(tokenizer, neutral)
    first = next(iter(named))
    chosen = _selected(named[first], settings[first])
    tried = {**named, **_fitted_controls(model, tokenizer, fit_pairs, chosen, blocks, seed)}
    options: dict[str, Any] = {"blocks": blocks}

    base = answered(model, tokenizer, questions, batch_size=batch_size)
    plain = neutral_text(model, texts, **options) if texts else None
    conditions = {
        "none": Condition(
            _measured(base, base), **_continued(model, questions, generate, None, None, options)
        )
    }
    if instruction is not None:
        with_words = Questions.encoded(model, tokenizer, [_instructed(item, instruction) for item in items])
        told = answered(model, tokenizer, with_words, batch_size=batch_size)
        conditions["prompt"] = Condition(_measured(told, base))
    for name, vector in tried.items():
        own = settings.get(name, settings[first])
        found = answered(model, tokenizer, questions, vector, own, batch_size=batch_size, blocks=blocks)
        facts: dict[str, Any] = {"setting": str(own)}
        if plain is not None:
            after = neutral_text(model, texts, vector, own, **options)
            facts |= {"perplexity_ratio": after.perplexity / plain.perplexity, "kl": after.divergence}
        conditions[name] = Condition(
            _measured(found, base),
            facts=facts,
            **_continued(model, questions, generate, vector, own, options),
        )
    spread = [
        _measured(
            answered(
                model, tokenizer, questions, vector, settings[first], batch_size=batch_size, blocks=blocks
            ),
            base,
        )
        for vector in random_directions(chosen, draws, seed)
    ]
    conditions["random directions"] = Condition(
        {name: torch.stack([each[name] for each in spread]).mean(0) for name in spread[0]},
        draws={name: torch.stack([each[name].mean() for each in spread]) for name in spread[0]},
    )
    found_intervals: dict[str, dict[str, Interval]] = {
        name: {metric: bootstrap_interval(values, seed=seed) for metric, values in condition.values.items()}
        for name, condition in conditions.items()
    }
    result = SteeringEvaluation(
        conditions=conditions,
        intervals=found_intervals,
        names=tuple(named),
        settings={
            "items": len(questions),
            "settings": {name: str(each) for name, each in settings.items()},
            "budget": budget,
            "draws": draws,
            "seed": seed,
            "neutral texts": len(texts),
        },
    )
    return result.with_flags(flags_of(result, named, budget, fit_pairs is not None))


def random_directions(vector: SteeringVector, draws: int, seed: int = 0) -> list[SteeringVector]:
    """Unit directions drawn at random at a vector's blocks, with its scales."""
    made = []
    for draw in range(draws):
        directions = {}
        for layer, direction in vector.directions.items():
            generator = noise.generator(seed, draw, f"random direction/{layer}")
            drawn = torch.randn(len(direction), generator=generator)
            directions[layer] = unit(drawn) * torch.linalg.vector_norm(direction)
        made.append(
            SteeringVector(directions, vector.scales, vector.fingerprint, {"method": "random", "draw": draw})
        )
    return made


def _settings(
    named: Mapping[str, SteeringVector], setting: Setting | Mapping[str, Setting] | None
) -> dict[str, Setting]:
    given = setting if isinstance(setting, Mapping) else dict.fromkeys(named, setting or Setting())
    if missing := sorted(set(named) - set(given)):
        raise MethodError(f"setting has none for {missing}; expected one for each of {list(named)}.")
    for each in given.values():
        require_setting(each)
    return {name: given[name] for name in given}


def _selected(vector: SteeringVector, setting: Setting) -> SteeringVector:
    return vector if setting.layers is None else vector.select(setting.layers)


def _fitted_controls(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Any] | None,
    like: SteeringVector,
    blocks: str | None,
    seed: int,
) -> dict[str, SteeringVector]:
    """The baselines that learn from the same pairs, with what the vector's settings say of how to."""
    if pairs is None:
        return {}
    told = like.provenance.get("settings", {})
    known = {name: told[name] for name in ("k", "baseline", "image_baseline") if told.get(name) is not None}
    skipped = ("mean_diff",) if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else ()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of controls nobody need hear
        for name in CONTROLS:
            if name not in skipped:
                given = known if name == "random_tokens" else {}
                method: Any = name
                found[name] = fit(
                    model,
                    tokenizer,
                    pairs,
                    method,
                    layers=list(like.layers),
                    blocks=blocks,
                    seed=seed,
                    **given,
                )
    return found


def _require_apart(items: Questions, fitted: Questions) -> None:
    known = prompts_of(fitted)
    if both := [(number, known[prompt]) for number, prompt in enumerate(items.prompts) if prompt in known]:
        number, other = both[0]
        raise InputError(
            f"{len(both)} items were fitted on: item {number} has the prompt of fitting pair {other}. A vector always "
            "does well there; evaluate on items that it has not seen, as split_questions gives them."
        )


def _measured(found: Answered, base: Answered) -> dict[str, Tensor]:
    """(questions,) of each metric."""
    margin, before = found.margins(), base.margins()
    grown = margin - before
    return {
        "mc1": found.mc1(),
        "mc2": found.mc2(),
        "mc1_per_token": found.mc1(per_token=True),
        "mc2_per_token": found.mc2(per_token=True),
        "log_prob": found.preferred(),
        "margin": margin,
        "log_prob_shift": found.preferred() - base.preferred(),
        "margin_shift": grown,
        "win_rate": (grown > 0).double() + 0.5 * (grown == 0).double(),
        "anti_steerable": (grown < 0).double(),
    }


def _continued(
    model: nn.Module,
    questions: Questions,
    tokens: int,
    vector: SteeringVector | None,
    setting: Setting | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    if not tokens:
        return {}
    ids = generated_ids(model, questions.prompts, tokens, vector, setting, **options)
    return {"continuations": ids, "degeneration": degeneration(ids)}


def _instructed(item: Any, instruction: str) -> Any:
    """The item with an instruction before its prompt."""
    if isinstance(item, tuple):
        prompt, *others = item
        return (_after(prompt, instruction), *others)
    return replace(item, prompt=_after(item.prompt, instruction))


def _after(prompt: Any, instruction: str) -> str:
    if not isinstance(prompt, str):
        raise InputError(
            f"instruction is text and a prompt is a {type(prompt).__name__}; expected prompts that are text."
        )
    return f"{instruction}\n{prompt}"
