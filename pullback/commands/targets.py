"""Targets as text: a class index, several, a label, a token, or a preset's call read by Python's ``ast``."""

from __future__ import annotations

import ast
from typing import Any

from pullback.core import targets
from pullback.core.errors import TargetError, nearest

__all__ = ["parse_target"]

_PRESETS = (
    "Logit",
    "LogProb",
    "Probability",
    "Margin",
    "Contrast",
    "Mean",
    "Norm",
    "TokenAt",
    "MaskSum",
    "Detection",
)


def parse_target(text: str | None, tokenizer: Any = None, language_model: bool = False) -> Any:
    """A target from its text: None, "3", "3,7" (one per example), a label, or a call: ``Margin(1, 2)``.

    For a language model other text is a continuation: its log-probability is explained.

    >>> parse_target("3"), parse_target("3,7"), parse_target("tabby cat")
    (3, [3, 7], 'tabby cat')
    >>> parse_target("Mean()")
    Mean()

    Raises:
        TargetError: a preset is unknown or its arguments are no plain values.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if all(part.lstrip("-").isdecimal() for part in parts):
        numbers = [int(part) for part in parts]
        return numbers[0] if len(numbers) == 1 else numbers
    if (called := _call(text)) is not None:
        return _preset(called, tokenizer)
    return targets.LogProb(text, tokenizer=tokenizer) if language_model and tokenizer is not None else text


def _call(text: str) -> ast.Call | None:
    try:
        expression = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return expression if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Name) else None


def _preset(call: ast.Call, tokenizer: Any) -> Any:
    assert isinstance(call.func, ast.Name)
    name = next((known for known in _PRESETS if known.lower() == call.func.id.lower().replace("_", "")), None)
    if name is None:
        raise TargetError(f'"{call.func.id}" is no target. Nearest: {nearest(call.func.id, _PRESETS)}.')
    try:
        positional = [ast.literal_eval(each) for each in call.args]
        keywords = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
        cls = getattr(targets, name)
        if tokenizer is not None and "tokenizer" in getattr(cls, "__dataclass_fields__", {}):
            keywords.setdefault("tokenizer", tokenizer)
        return cls(*positional, **keywords)
    except TargetError:
        raise
    except (TypeError, ValueError) as error:
        raise TargetError(
            f'target "{ast.unparse(call)}" cannot be read: {error}. Give numbers or quoted text.'
        ) from None
