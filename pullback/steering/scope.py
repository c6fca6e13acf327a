"""Which tokens are steered: all, the prompt's, the generated ones or a mask, and the rows of a gate."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pullback.core.errors import InputError, MethodError

from .positions import Chunk

__all__ = ["Scope", "check_rows", "check_scope", "for_batch", "in_scope"]

Scope: TypeAlias = "Literal['all', 'prompt', 'generated'] | Tensor"


def check_scope(scope: Any) -> None:
    if isinstance(scope, Tensor):
        if scope.dtype != torch.bool or scope.dim() not in (1, 2):
            raise InputError(
                f"the scope is a {scope.dtype} tensor {tuple(scope.shape)}; expected bool (length,) or (batch, length)."
            )
    elif scope not in ("all", "prompt", "generated"):
        raise MethodError(f"scope={scope!r}; expected 'all', 'prompt', 'generated' or a bool mask.")


def check_rows(answer: Any, batch: int | None = None) -> Tensor:
    fits = isinstance(answer, Tensor) and answer.dtype == torch.bool and answer.dim() == 1
    if not fits or (batch is not None and len(answer) != batch):
        given = (
            f"{answer.dtype} {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        )
        raise InputError(f"the gate gave {given}; expected a bool tensor ({batch or 'batch'},).")
    rows: Tensor = answer
    return rows


def for_batch(rows: Tensor, batch: int, what: str) -> Tensor:
    """Rows repeated for beams and several sequences per prompt, as ``generate`` does."""
    if batch % len(rows):
        raise InputError(f"{what} is for {len(rows)} examples, and the model runs {batch}.")
    return rows.repeat_interleave(batch // len(rows), 0)


def in_scope(scope: Scope, chunk: Chunk, batch: int, length: int, device: torch.device) -> Tensor | bool:
    start, stop = chunk.offset, chunk.offset + length
    if isinstance(scope, Tensor):
        mask = scope.expand(1, -1) if scope.dim() == 1 else scope
        part = torch.zeros(len(mask), length, dtype=torch.bool)
        covered = mask[:, start:stop]
        part[:, : covered.shape[1]] = covered
        return for_batch(part, batch, "the scope").to(device) if bool(part.any()) else False
    if scope == "all":
        return True
    if chunk.ambiguous:
        raise MethodError(
            f"{length} tokens come after {start} cached ones: a part of the prompt, a new turn or drafts "
            f'of assisted generation, so scope="{scope}" has no meaning. Call steering.reset() before a new turn; '
            'otherwise use scope="all" or a mask.'
        )
    end = chunk.prompt_length if chunk.prompt_length is not None else stop
    if end >= stop:
        return scope == "prompt"
    if end <= start:
        return scope == "generated"
    in_prompt = torch.arange(start, stop, device=device) < end
    return (in_prompt if scope == "prompt" else ~in_prompt).expand(batch, length)
