"""Where the tokens of a forward pass stand: absolute positions, prompt or generated, real or padding.

Read by pre-hooks before the blocks run. The offset is what the cache holds; where it does not tell (state spaces),
the attention mask does, and last an own count. Without a cache, generation runs the whole sequence again: a pass
that begins with the ids of the last prompt and is longer continues it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Chunk", "PositionTracker"]

_CACHES = ("past_key_values", "cache_params", "past_key_value", "layer_past", "state")


@dataclass(frozen=True)
class Chunk:
    """The tokens of one forward pass of the decoder.

    Attributes:
        offset: position of the first token, padding included.
        length: number of positions, None where the pass did not tell.
        prompt_length: positions from here on were generated.
        real: (batch, length) False at padding; None where there is none.
        fresh: it starts a new prompt.
        ambiguous: several tokens after a cached prompt, which may be a part of it, a new turn, or drafts to verify.
    """

    offset: int = 0
    length: int | None = None
    prompt_length: int | None = None
    real: Tensor | None = None
    fresh: bool = True
    ambiguous: bool = False


class PositionTracker:
    """Follows the passes of one thread through one decoder."""

    def __init__(self, encoder_decoder: bool) -> None:
        self.encoder_decoder = encoder_decoder
        self.chunk: Chunk | None = None
        self._names: dict[
            nn.Module, list[str]
        ] = {}  # reading a signature takes as long as steering eight blocks
        self.reset()

    def reset(self) -> None:
        """The next pass starts a new prompt."""
        self.prompt: Tensor | None = None
        self.prompt_length: int | None = None
        self.seen = 0
        self.pending: dict[str, Any] = {}

    def outer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the whole model, whose mask and ids do not always reach the decoder."""
        if not self.encoder_decoder:  # there they are the encoder's
            self.pending = self._named(module, args, kwargs)

    def inner(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the decoder: what this pass holds."""
        outer, self.pending = self.pending, {}
        given = self._named(module, args, kwargs)
        tokens = next(
            (
                value
                for value in (given.get("input_ids"), outer.get("input_ids"), given.get("inputs_embeds"))
                if isinstance(value, Tensor) and value.dim() >= 2
            ),
            None,
        )
        if tokens is None:
            self.chunk = None
            return
        length = tokens.shape[1]
        masks = [given.get("attention_mask"), outer.get("attention_mask")]
        mask = next((value for value in masks if isinstance(value, Tensor) and value.dim() == 2), None)
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        offset = self._offset(cache, mask, length)
        started = self.prompt_length is not None
        fresh = not started or offset == 0
        if started and offset == 0 and cache is None and self._continues(tokens):
            fresh = False
        elif fresh:
            self.prompt_length, self.prompt = offset + length, tokens.detach().clone()
        self.seen = offset + length
        self.chunk = Chunk(
            offset,
            length,
            self.prompt_length,
            _real(mask, offset, length),
            fresh,
            ambiguous=not fresh and offset > 0 and length > 1,
        )

    def _named(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        if not args:
            return kwargs
        if module not in self._names:
            self._names[module] = [*inspect.signature(module.forward).parameters]
        return {**dict(zip(self._names[module], args, strict=False)), **kwargs}

    def _offset(self, cache: Any, mask: Tensor | None, length: int) -> int:
        if cache is None:
            return 0
        try:
            return int(cache.get_seq_length())
        except (AttributeError, TypeError, ValueError, IndexError, NotImplementedError):
            pass
        try:
            if not cache.has_previous_state():
                return 0
        except (AttributeError, TypeError, ValueError, IndexError, NotImplementedError):
            pass
        if mask is not None and mask.shape[1] > length:
            return mask.shape[1] - length
        return self.seen if length == 1 else 0

    def _continues(self, tokens: Tensor) -> bool:
        prompt = self.prompt
        if prompt is None or tokens.dim() != prompt.dim() or tokens.shape[1] <= prompt.shape[1]:
            return False
        return torch.equal(tokens[:, : prompt.shape[1]], prompt)


def _real(mask: Tensor | None, offset: int, length: int) -> Tensor | None:
    if mask is None or (length == 1 and offset > 0):  # what is decoded is real
        return None
    part = mask[:, offset : offset + length] if mask.shape[1] >= offset + length else mask
    return part.bool() if part.shape[1] == length else None
