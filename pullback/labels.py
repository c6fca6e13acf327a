"""Readable tokens for the positions of a text, from whatever the inputs or the target bring along."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .core.problem import Problem

__all__ = ["token_labels"]


def token_labels(problem: Problem, inputs: Any) -> list[list[str]] | None:
    """One list of tokens per row at token sites, else None: from a BatchEncoding, the target's tokenizer, or as ids."""
    ids = problem.posed.inputs.tokens
    point = problem.point
    if (
        ids is None
        or not isinstance(point, Tensor)
        or point.dim() < 2
        or ids.dim() != 2
        or point.shape[1] != ids.shape[1]
    ):
        return None
    every = [_tokens(row, number, inputs, problem.posed.tokenizer) for number, row in enumerate(ids)]
    return [every[example] for example in problem.examples.tolist()]


def _tokens(row: Tensor, number: int, inputs: Any, tokenizer: Any) -> list[str]:
    numbers = [int(token) for token in row]
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return [str(token) for token in tokenizer.convert_ids_to_tokens(numbers)]
    if hasattr(tokenizer, "decode"):
        return [str(tokenizer.decode([token])) for token in numbers]
    encodings = getattr(inputs, "encodings", None)
    if encodings is not None and len(encodings[number].tokens) == len(numbers):
        return [str(token) for token in encodings[number].tokens]
    return [str(token) for token in numbers]
