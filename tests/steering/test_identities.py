"""What has to hold of fits and of steering in every architecture, whatever the weights."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from pullback import InputError, MethodError
from pullback.steering import SteeringVector, fit
from tests.steering.models import DECODERS, OTHERS, block_outputs, built, random_vector


def asked(name: str, inputs: dict[str, Tensor], swap: bool = False) -> list[Any]:
    """A pair for each row; answers of one and of two tokens, which an encoder's prompt does not take."""
    one = name in ("t5", "bart")
    pairs = []
    for row in range(2):
        rows = {
            key: leaf[row * len(leaf) // 2 : (row + 1) * len(leaf) // 2]
            for key, leaf in inputs.items()
            if not key.startswith("decoder")
        }
        yes, no = 21 + 3 * row, (22 + 3 * row if one else [22 + 3 * row, 23 + 3 * row])
        prompt = rows if len(rows) > 1 else rows["input_ids"][0].tolist()
        pairs.append((prompt, no, yes) if swap else (prompt, yes, no))
    return pairs


def fitted(model: Any, pairs: Any, **settings: Any) -> SteeringVector:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random models: gaps and pairs that disagree
        return fit(model, None, pairs, **{"k": 2, "steps": 4, **settings})


@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
def test_answers_swapped_turn_the_vector_round_and_batches_do_not_matter(name: str) -> None:
    model, inputs = built(name, double=True)
    for method in ("grains", "mean_grad"):
        vector = fitted(model, asked(name, inputs), method=method)
        swapped = fitted(model, asked(name, inputs, swap=True), method=method)
        single = fitted(model, asked(name, inputs), method=method, batch_size=1)
        for layer, direction in vector.directions.items():
            torch.testing.assert_close(swapped.directions[layer], -direction, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(single.directions[layer], direction, rtol=1e-5, atol=1e-5)
            assert direction.norm() == pytest.approx(1.0, abs=1e-6)


def test_integrated_gradients_are_complete_from_a_mask_token() -> None:
    model, inputs = built("llama", double=True)
    gaps = [
        fitted(model, asked("llama", inputs), baseline=31, steps=steps).provenance["completeness"][
            "relative_gap"
        ]
        for steps in (20, 128)
    ]
    assert gaps[0] <= 0.15
    assert gaps[1] <= 0.02


def test_scores_of_a_contrast_are_those_of_its_answers_subtracted() -> None:
    """Integrated gradients are linear in the score: log p(a) - log p(c) is (a - b) and (b - c) added up."""
    model, inputs = built("gpt2", double=True)
    prompt = inputs["input_ids"][0].tolist()
    assert prompt[2] == 31

    def scores(yes: int, no: int) -> dict[int, float]:
        settings: dict[str, Any] = {"k": 100, "steps": 8, "baseline": 31}
        (chosen,) = fitted(model, [(prompt, yes, no)], **settings).provenance["chosen"]
        return {place: score for place, score, _ in (*chosen["positive"], *chosen["negative"])}

    first, second, both = scores(21, 22), scores(22, 23), scores(21, 23)
    assert len(both) == 5  # the last token is none of them, and the masked one has no score
    for place, score in both.items():
        assert score == pytest.approx(first[place] + second[place], rel=1e-9)


def test_a_multiple_of_the_vector_is_a_multiple_of_the_strength() -> None:
    model, inputs = built("llama", double=True)
    vector = random_vector(model)
    with (2.5 * vector).apply(model, 0.3):
        scaled = block_outputs(model, **inputs)
    with vector.apply(model, 0.75):
        torch.testing.assert_close(block_outputs(model, **inputs), scaled, rtol=1e-6, atol=1e-6)
    with vector.apply(model, -0.75):
        assert (block_outputs(model, **inputs)[1] - scaled[1]).abs().max() > 0.01
    plain = block_outputs(model, **inputs)
    with (vector + (-vector)).apply(model, 0.75):
        torch.testing.assert_close(block_outputs(model, **inputs), plain, rtol=0, atol=0)


def test_in_the_last_block_steering_is_a_bias_on_the_logits() -> None:
    """log-odds by hand: the head on the final norm of the moved state, nothing else of the model."""
    model: Any
    model, inputs = built("llama", double=True)
    vector = random_vector(model, [1])
    h = block_outputs(model, **inputs)[1]
    norm = h.norm(dim=-1, keepdim=True)
    moved = h + 0.4 * norm * vector.directions[1].to(h)
    moved = moved / moved.norm(dim=-1, keepdim=True) * norm
    with torch.no_grad():
        with vector.apply(model, 0.4):
            steered = model(**inputs).logits
        torch.testing.assert_close(steered, model.lm_head(model.model.norm(moved)), rtol=1e-10, atol=1e-10)
        assert (steered - model(**inputs).logits).abs().max() > 0.01


def test_a_model_without_a_padding_token() -> None:
    """Prompts of unequal lengths are masked, so that any id will do; only a baseline of padding needs one."""
    model: Any
    model, inputs = built("gpt2", double=True)
    ids = inputs["input_ids"]
    pairs = [(ids[0].tolist(), 21, 22), (ids[1, 2:].tolist(), 23, 24)]
    model.config.pad_token_id = None
    vector, single = (fitted(model, pairs, batch_size=size, baseline=31) for size in (2, 1))
    for layer, direction in vector.directions.items():
        torch.testing.assert_close(direction, single.directions[layer], rtol=1e-5, atol=1e-5)
    with pytest.raises((InputError, MethodError), match="pad"):
        fitted(model, pairs, baseline="pad")
    with pytest.raises((InputError, MethodError), match="mask"):
        fitted(model, pairs, baseline="mask")
