"""What steering does to neutral text: perplexity, divergence, and how degenerate the generated text is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.errors import InputError

from .answers import Setting
from .vector import SteeringVector

__all__ = ["NeutralText", "degeneration", "generated_ids", "neutral_text", "token_batches"]


@dataclass(frozen=True, eq=False)
class NeutralText:
    """``losses``: (texts,) -log p summed over tokens. ``tokens``: (texts,). ``divergences``: (texts,) KL(unsteered ||
    steered) summed over tokens; 0 for the model as it is."""

    losses: Tensor
    tokens: Tensor
    divergences: Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a token."""
        return float((self.losses.sum() / self.tokens.sum()).exp())

    @property
    def divergence(self) -> float:
        """The mean over tokens, in nats."""
        return float(self.divergences.sum() / self.tokens.sum())


@torch.no_grad()
def neutral_text(
    model: nn.Module,
    texts: Sequence[Tensor],
    vector: SteeringVector | None = None,
    setting: Setting | None = None,
    *,
    blocks: str | None = None,
) -> NeutralText:
    """Next-token losses on texts, one at a time, and with a vector the divergence from the model without it."""
    setting = Setting() if setting is None else setting
    device = next(model.parameters()).device
    losses, tokens, divergences = [], [], []
    for ids in texts:
        inputs = {"input_ids": ids[None].to(device)}
        plain = model(**inputs).logits[0, :-1].float().log_softmax(-1)
        steered = plain
        if vector is not None:
            with vector.apply(
                model, setting.strength, scale=setting.scale, preserve_norm=setting.preserve_norm,
                layers=setting.layers, blocks=blocks,
            ):  # fmt: skip
                steered = model(**inputs).logits[0, :-1].float().log_softmax(-1)
        targets = ids[1:].to(device)
        losses.append(-steered.gather(1, targets[:, None]).double().sum().cpu())
        tokens.append(len(targets))
        divergences.append((plain.exp() * (plain - steered)).double().sum().cpu())
    return NeutralText(
        torch.stack(losses), torch.tensor(tokens, dtype=torch.float64), torch.stack(divergences)
    )


def token_batches(tokenizer: Any, texts: Sequence[Any]) -> list[Tensor]:
    """Texts as token ids. Raises InputError for text without a tokenizer, and for texts of fewer than two tokens."""
    found = []
    for number, text in enumerate(texts):
        if isinstance(text, str):
            words = getattr(tokenizer, "tokenizer", tokenizer)
            if not callable(words):
                raise InputError(f"neutral text {number} is text; give the model's tokenizer, or token ids.")
            text = words(text)["input_ids"]
        ids = torch.as_tensor(text).flatten().long()
        if len(ids) < 2:
            raise InputError(f"neutral text {number} has {len(ids)} tokens; expected at least two.")
        found.append(ids)
    return found


@torch.no_grad()
def generated_ids(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    vector: SteeringVector | None = None,
    setting: Setting | None = None,
    *,
    blocks: str | None = None,
) -> list[list[int]]:
    """Greedy continuations, prompt by prompt; the end token may come sooner."""
    setting = Setting() if setting is None else setting
    device = next(model.parameters()).device
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=device)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        options = {"max_new_tokens": tokens, "do_sample": False, "disable_compile": True}
        if vector is None:
            out = model.generate(**given, **options)  # type: ignore[operator]
        else:
            with vector.apply(
                model, setting.strength, scale=setting.scale, scope=setting.scope,
                preserve_norm=setting.preserve_norm, layers=setting.layers, blocks=blocks,
            ):  # fmt: skip
                out = model.generate(**given, **options)  # type: ignore[operator]
        decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        found.append(out[0, 1 if decoder else ids.shape[1] :].tolist())
    return found


def degeneration(continuations: Sequence[Sequence[int]]) -> dict[str, float]:
    """How much generated text repeats itself, means over texts; NaN where none has two tokens.

    "distinct_2": different pairs of neighbours per pair (Li et al. 2016). "repeated": share of tokens that are the
    most frequent one of their text. "length": tokens.

    >>> degeneration([[5, 5, 5, 5], [1, 2, 3, 4]])
    {'distinct_2': 0.6666666666666666, 'repeated': 0.625, 'length': 4.0}
    """
    distinct, repeated = [], []
    for ids in continuations:
        if len(ids) > 1:
            pairs = list(pairwise(ids))
            distinct.append(len(set(pairs)) / len(pairs))
            repeated.append(Counter(ids).most_common(1)[0][1] / len(ids))
    return {
        "distinct_2": _mean(distinct),
        "repeated": _mean(repeated),
        "length": _mean([float(len(ids)) for ids in continuations]),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
