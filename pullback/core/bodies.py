"""Functions that torch wrote in Python, run so that a mode sees the calls inside them."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

__all__ = ["body_of"]


def body_of(function: types.FunctionType) -> Callable[..., Any]:
    """The function with its "is anybody overriding?" test answered no, so that its inner calls are seen."""
    tests = {name: lambda *_: False for name in function.__globals__ if name.startswith("has_torch_function")}
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **tests},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
