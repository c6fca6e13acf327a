"""Methods as text: the dataclass repr, read back by a real parser (Python's ``ast``), never evaluated."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ..core.errors import MethodError, nearest
from . import ALIASES, BASELINES, DOMAINS, METHODS

__all__ = ["parse_baseline", "parse_method", "with_settings"]


def parse_method(text: str) -> Any:
    """Read a method from its text; case and underscores do not matter.

    >>> parse_method("smoothgrad(integrated_gradients(steps=32), samples=8)").method.steps
    32

    Raises:
        MethodError: the text is no call, the name or a parameter is unknown, or a value is out of range.
    """
    method = _Reader(text, {**METHODS, **BASELINES, **DOMAINS}).read()
    if type(method) not in METHODS.values():
        raise MethodError(f"{text!r} is not a method. Methods: {', '.join(METHODS)}.")
    return method


def parse_baseline(text: str) -> Any:
    """Read a baseline from its text, such as "zeros", "blur(sigma=5)" or "mask".

    >>> parse_baseline("blur(sigma=5.0)")
    Blur(sigma=5.0)
    """
    return _Reader(text, BASELINES).read()


def with_settings(method: Any, *, baseline: Any = None, seed: int | None = None) -> Any:
    """The method with its own baseline and seed replaced, also inside methods it wraps.

    Raises:
        MethodError: nothing in the method takes the setting.
    """
    for name, value in (("baseline", baseline), ("seed", seed)):
        if value is None:
            continue
        changed = _replaced(method, name, value)
        if changed is None:
            raise MethodError(
                f"{method!r} has no {name} to set; leave {name}= out, or choose a method that has one."
            )
        method = changed
    return method


def _replaced(method: Any, name: str, value: Any) -> Any:
    """The method with a field set at every level that has it, or None where none has."""
    if not hasattr(method, "__dataclass_fields__"):
        return None
    changes: dict[str, Any] = {}
    for each in fields(method):
        if each.name == name:
            changes[name] = value
        elif each.name == "method" and (inner := _replaced(method.method, name, value)) is not None:
            changes["method"] = inner
    return replace(method, **changes) if changes else None


_CONSTANTS = {"none": None, "true": True, "false": False}


class _Reader:
    """Turns one expression into an object: names of known classes, calls of them, and literals."""

    def __init__(self, text: str, known: Mapping[str, type[Any]]) -> None:
        self.text = text
        self.known = {_plain(name): cls for name, cls in known.items()}
        self.names = list(known)

    def read(self) -> Any:
        text = ALIASES.get(_plain(self.text), self.text) if isinstance(self.text, str) else ""
        if len(text) > 2000:
            raise MethodError(f"a method's text of {len(text)} characters is too long to be one.")
        try:
            expression = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise MethodError(
                f'{self.text!r} cannot be read. Write a name or a call: "smoothgrad(integrated_gradients(steps=32))".'
            ) from None
        return self._value(expression, top=True)

    def _value(self, node: ast.expr, top: bool = False) -> Any:
        if isinstance(node, ast.Name):
            if not top and node.id.lower() in _CONSTANTS:
                return _CONSTANTS[node.id.lower()]
            return self._call(node.id, [], [])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self._call(node.func.id, node.args, node.keywords)
        if not top:
            try:
                return ast.literal_eval(node)
            except (ValueError, TypeError, SyntaxError):
                if isinstance(node, ast.Tuple):
                    return tuple(self._value(part) for part in node.elts)
        raise MethodError(
            f"{ast.unparse(node)!r} in {self.text!r} is neither a method, a baseline, a domain nor a plain value."
        )

    def _call(self, name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Any:
        if _plain(name) in ALIASES:
            target = ast.parse(ALIASES[_plain(name)], mode="eval").body
            if isinstance(target, ast.Call):
                return self._value(target)
            assert isinstance(target, ast.Name)
            name = target.id
        cls = self.known.get(_plain(name))
        if cls is None:
            raise MethodError(
                f'"{name}" is unknown. Nearest: {nearest(name, self.names)}. Known: {", ".join(self.names)}.'
            )
        allowed = {_plain(each.name): each.name for each in fields(cls) if each.init}
        values: dict[str, Any] = {}
        if len(args) > len(allowed):
            raise MethodError(f"{cls.__name__} takes at most {len(allowed)} parameters, got {len(args)}.")
        for field_name, argument in zip(allowed.values(), args, strict=False):
            values[field_name] = self._value(argument)
        for keyword in keywords:
            if keyword.arg is None or _plain(keyword.arg) not in allowed:
                raise MethodError(
                    f"{cls.__name__} has no parameter {keyword.arg or '**'}. "
                    f"It has: {', '.join(allowed.values()) or 'none'}."
                )
            field_name = allowed[_plain(keyword.arg)]
            if field_name in values:
                raise MethodError(f"{cls.__name__} got {field_name} twice in {self.text!r}.")
            values[field_name] = self._value(keyword.value)
        try:
            return cls(**values)
        except TypeError as error:
            raise MethodError(f"{cls.__name__}: {error}.") from None


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "")
