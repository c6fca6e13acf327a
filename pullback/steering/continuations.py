"""Greedy continuations, many prompts at once, steered or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.errors import InputError, ModelError

from .pairs import EncodedPair, padded_inputs, takes
from .scoring import Setting, steered
from .vector import SteeringVector

__all__ = ["continuations", "text_of"]


@torch.no_grad()
def continuations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[EncodedPair],
    vector: SteeringVector | None = None,
    setting: Setting | None = None,
    *,
    tokens: int = 32,
    batch_size: int = 8,
    blocks: str | None = None,
) -> list[list[int]]:
    """The likeliest next tokens of each prompt, one after another, up to the end token or ``tokens``.

    Prompts are padded on the left where the model takes a mask, else run one at a time. Raises ModelError for a model
    without ``generate``.
    """
    if not callable(getattr(model, "generate", None)):
        raise ModelError(
            f"{type(model).__name__} has no generate; expected a transformers model, or generations=0."
        )
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise InputError(f"tokens={tokens!r}; expected a number of tokens to generate, at least 1.")
    setting = setting or Setting()
    ends = _ends(model)
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place].ids))
    found: list[list[int]] = [[] for _ in prompts]
    paddable = takes(model, "attention_mask") and not any(prompt.others for prompt in prompts)
    size = batch_size if paddable else 1
    pad = next(
        (token for token in (getattr(tokenizer, "pad_token_id", None), *ends) if isinstance(token, int)), 0
    )
    for start in range(0, len(order), size):
        places = order[start : start + size]
        inputs = padded_inputs(model, tokenizer, [prompts[place] for place in places])
        if paddable:
            inputs = _left(inputs)
        begin = inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]
        with steered(model, vector, setting, setting.scope, blocks):
            out: Tensor = model.generate(  # type: ignore[operator]
                **inputs, max_new_tokens=tokens, do_sample=False, num_beams=1, pad_token_id=pad
            )
        for place, row in zip(places, out[:, begin:].tolist(), strict=True):
            end = next((at for at, token in enumerate(row) if token in ends), len(row))
            found[place] = row[:end]
    return found


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Token ids as text where there is a tokenizer that decodes, else as numbers."""
    decode = getattr(getattr(tokenizer, "tokenizer", None) or tokenizer, "decode", None)
    return str(decode(list(ids))) if callable(decode) else " ".join(map(str, ids))


def _ends(model: nn.Module) -> set[int]:
    config = getattr(model, "generation_config", None)
    end = getattr(config, "eos_token_id", None)
    return set(end) if isinstance(end, list | tuple) else set() if end is None else {end}


def _left(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows with their padding on the left."""
    mask = inputs["attention_mask"]
    length = mask.shape[1]
    # row by row, so that the real tokens keep their order
    places = (torch.arange(length, device=mask.device) + mask.sum(1, keepdim=True)) % length
    return {
        name: leaf.gather(1, places) if leaf.shape == mask.shape and name != "decoder_input_ids" else leaf
        for name, leaf in inputs.items()
    }
