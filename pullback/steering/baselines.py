"""What a steering vector has to beat: other directions moved as far, and words in the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core import noise
from pullback.core.errors import MethodError

from .agreement import unit
from .directions import fit
from .pairs import EncodedPair, encode_answer, encode_pairs, most_tokens
from .questions import EncodedQuestion
from .vector import SteeringVector

__all__ = ["fitted_baselines", "instructed", "random_directions"]

DEMONSTRATIONS = 3


def random_directions(vector: SteeringVector, draws: int, seed: int) -> list[SteeringVector]:
    """Directions uniform on the sphere, at the vector's blocks and as long as its own; a draw depends on its number.

    >>> random_directions(SteeringVector({1: torch.tensor([3.0, 4.0])}), 2, seed=0)[1].directions[1].norm().item()
    5.0
    """
    return [
        _as_long(
            {layer: noise.normal((vector.width,), seed, draw, f"random/{layer}") for layer in vector.layers},
            vector,
            {"method": "random", "settings": {"seed": seed, "draw": draw}},
        )
        for draw in range(draws)
    ]


def fitted_baselines(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Any],
    vector: SteeringVector,
    *,
    batch_size: int,
    blocks: str | None,
    seed: int,
) -> dict[str, SteeringVector]:
    """ "random_tokens", "mean_diff" and "mean_grad" of the same pairs, at the vector's blocks and as long as its own.

    "random_tokens" takes the vector's own number of tokens and baseline. What cannot be fitted here is left out.
    """
    own = vector.provenance.get("settings") or {}
    kept = ("k", "image_baseline", "protect", "aggregate", "combine")
    masking = {name: own[name] for name in kept if own.get(name) is not None}
    if isinstance(own.get("baseline"), str | int) and not str(own["baseline"]).endswith(")"):
        masking["baseline"] = own["baseline"]
    found: dict[str, SteeringVector] = {}
    for method in ("random_tokens", "mean_diff", "mean_grad"):
        settings = masking if method == "random_tokens" else {}
        try:
            one = fit(
                model, tokenizer, pairs, method,
                layers=list(vector.layers), blocks=blocks, batch_size=batch_size, seed=seed, **settings,
            )  # fmt: skip
        except MethodError:
            continue  # no answers after the prompt, or nothing that moves
        found[method] = _as_long(one.directions, vector, dict(one.provenance))
    return found


def instructed(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[EncodedQuestion],
    instruction: Any = None,
    pairs: Sequence[Any] | None = None,
) -> list[EncodedQuestion] | None:
    """The questions with an instruction before them, or after up to three pairs' prompts with their preferred answers.

    It follows the token that begins a prompt. None where there is neither, where images are in the way, or where the
    prompts become too long for the model.
    """
    if any(question.prompt.others for question in questions):
        return None
    if instruction is not None:
        ids = encode_answer("the instruction", "prompt's", instruction, tokenizer)
        return _fitting(model, questions, [list(ids)], tokenizer)
    if not pairs:
        return None
    encoded = encode_pairs(model, tokenizer, pairs[:DEMONSTRATIONS])
    if any(pair.others for pair in encoded):
        return None
    begins = _begins(tokenizer, model)
    shown = [[*_after_begin(pair.ids.tolist(), begins), *pair.preferred] for pair in encoded]
    return _fitting(model, questions, shown, tokenizer)


def _fitting(
    model: nn.Module, questions: Sequence[EncodedQuestion], shown: list[list[int]], tokenizer: Any
) -> list[EncodedQuestion] | None:
    begins = _begins(tokenizer, model)
    most = most_tokens(model)
    longest = max(len(q.prompt.ids) + max(map(len, q.answers)) for q in questions)
    while shown and most is not None and sum(map(len, shown)) + longest > most:
        shown = shown[:-1]
    if not shown:
        return None
    before = [token for each in shown for token in each]
    found = []
    for question in questions:
        ids = question.prompt.ids.tolist()
        rest = _after_begin(ids, begins)
        longer = torch.tensor([*ids[: len(ids) - len(rest)], *before, *rest])
        found.append(replace(question, prompt=EncodedPair(question.prompt.number, longer, (), (), {})))
    return found


def _as_long(
    directions: Mapping[int, Tensor], vector: SteeringVector, provenance: Mapping[str, Any]
) -> SteeringVector:
    moved = {
        layer: unit(direction.double()) * float(vector.directions[layer].double().norm())
        for layer, direction in directions.items()
    }
    return SteeringVector(moved, dict(vector.scales), vector.fingerprint, provenance)


def _begins(tokenizer: Any, model: nn.Module) -> set[Any]:
    sources = (tokenizer, getattr(tokenizer, "tokenizer", None), getattr(model, "config", None))
    found = {getattr(source, name, None) for source in sources for name in ("bos_token_id", "cls_token_id")}
    return found - {None}


def _after_begin(ids: list[int], begins: set[Any]) -> list[int]:
    return ids[1:] if len(ids) > 1 and ids[0] in begins else ids
