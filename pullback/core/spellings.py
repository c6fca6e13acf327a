"""The spelling table: every way of writing one operation has one canonical name and one way to call it."""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from .operations import ALIASES, LINEAR, NONLINEAR

__all__ = ["Spelling", "canonical", "canonical_call"]

_OPERATORS: dict[str, str] = {
    **{f"__{name}__": name for name in ("add", "sub", "mul", "matmul", "pow", "neg", "abs", "getitem")},
    **{f"__i{name}__": f"{name}_" for name in ["add", "sub", "mul", "pow"]},
    "__radd__": "add",
    "__rmul__": "mul",
    "__pos__": "positive",
    "__imatmul__": "matmul_",
    "__setitem__": "setitem_",
    **dict.fromkeys(("__div__", "__truediv__"), "div"),
    **dict.fromkeys(("__idiv__", "__itruediv__"), "div_"),
    "__mod__": "remainder",
    "__imod__": "remainder_",
}
# x.__rsub__(y) is y - x: the arguments change places
_SWAPPED: dict[str, tuple[str, Callable[..., Any]]] = {
    "__rsub__": ("sub", operator.sub),
    "__rdiv__": ("div", operator.truediv),
    "__rtruediv__": ("div", operator.truediv),
    "__rpow__": ("pow", operator.pow),
    "__rmatmul__": ("matmul", torch.matmul),
    "__rmod__": ("remainder", operator.mod),
}
_HIDING_MODULES = (
    "torch.nn.functional",
    "torch.functional",
    "torch.autograd",
    "torch._lowrank",
    "torch._lobpcg",
)


@dataclass(frozen=True)
class Spelling:
    """One way of writing an operation: its canonical name and how to call it out of place.

    ``function`` is the out-of-place callable (None where there is none), ``inplace_position`` the position of
    an ``inplace`` argument, ``swapped`` true for reflected operators (``c - x``) and ``composite`` true for
    functions written in Python that hide other operations.
    """

    name: str
    in_place: bool = False
    function: Callable[..., Any] | None = None
    inplace_position: int | None = None
    swapped: bool = False
    composite: bool = False


_SPELLINGS: dict[Any, Spelling | None] = {}


def canonical(function: Callable[..., Any]) -> Spelling | None:
    """The canonical spelling of a torch function, method, operator method or ``torch.ops`` entry.

    None if it is no operation (reading an attribute, for instance).

    >>> import torch
    >>> canonical(torch.ops.aten.relu_.default).name, canonical(torch.Tensor.relu_).in_place
    ('relu', True)
    """
    try:
        return _SPELLINGS[function]
    except KeyError:
        spelling = _SPELLINGS[function] = _resolve(function)
        return spelling


def _resolve(function: Callable[..., Any]) -> Spelling | None:
    if isinstance(function, (OpOverload, OpOverloadPacket)):
        return _resolve_registered(function)
    if isinstance(function, HigherOrderOperator):
        return Spelling(str(function.__name__), function=function)
    written: str = getattr(function, "__name__", "")
    if not written or written in ("__get__", "__set__", "__delete__"):
        return None
    python = isinstance(function, types.FunctionType)
    if python and not (function.__module__ or "").startswith("torch"):
        # somebody else's overridable function: its name says nothing about what it computes, so look inside
        return Spelling(f"{function.__module__}.{written}", function=function, composite=True)
    if written in _SWAPPED:
        name, call = _SWAPPED[written]
        return Spelling(name, function=call, swapped=True)
    if written == "rsub":
        return Spelling("sub", function=_subtract, swapped=True)
    plain = _OPERATORS.get(written, written)
    in_place = _is_in_place(plain)
    name = _name(plain.removesuffix("_") if in_place else plain)
    position = None
    if python:
        try:
            position = [*inspect.signature(function).parameters].index("inplace")
        except ValueError:
            position = None
    hides = python and (function.__module__ in _HIDING_MODULES or written == "backward")
    return Spelling(
        name,
        in_place,
        _out_of_place(plain.removesuffix("_")) if in_place else function,
        position,
        composite=hides and name not in LINEAR and name not in NONLINEAR,
    )


def _resolve_registered(function: OpOverload[Any, Any] | OpOverloadPacket[Any, Any]) -> Spelling:
    packet = function.overloadpacket if isinstance(function, OpOverload) else function
    namespace, written = packet._qualified_op_name.split("::")
    if namespace != "aten":
        return Spelling(f"{namespace}.{written}", function=function)
    if not _is_in_place(written):
        if written == "rsub":
            return Spelling("sub", function=_subtract, swapped=True)
        return Spelling(_name(written), function=function)
    plain = getattr(torch.ops.aten, written[:-1], None)
    if plain is not None and isinstance(function, OpOverload):
        plain = getattr(plain, function._overloadname, plain)
    return Spelling(_name(written[:-1]), True, plain)


def _subtract(left: Any, right: Any, *, alpha: float = 1) -> Tensor:
    return torch.rsub(right, left, alpha=alpha)


def _is_in_place(written: str) -> bool:
    return (
        written.endswith("_")
        and not written.endswith("__")
        and written not in ("requires_grad_", "retain_grad_")
    )


def _name(written: str) -> str:
    bare = written.removeprefix("special_")
    return ALIASES.get(bare, bare)


def _out_of_place(name: str) -> Callable[..., Any] | None:
    for home in (torch.Tensor, torch, getattr(torch._C, "_nn", None), torch.nn.functional):
        found: Callable[..., Any] | None = getattr(home, name, None)
        if found is not None:
            return found
    return None


_BINARY = ("input", "other")
_LEADING: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("add", "sub", "mul", "div", "matmul", "maximum", "minimum", "remainder", "atan2", "outer"), _BINARY
    ),
    **dict.fromkeys(("mm", "bmm"), ("input", "mat2")),
    "pow": ("input", "exponent"),
    "linear": ("input", "weight", "bias"),
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], ("input", "weight", "bias")),
    "addmm": ("input", "mat1", "mat2"),
    "baddbmm": ("input", "batch1", "batch2"),
    "addcmul": ("input", "tensor1", "tensor2"),
    "scaled_dot_product_attention": ("query", "key", "value"),
    "cat": ("tensors",),
    "stack": ("tensors",),
    "where": ("condition", "input", "other"),
}


def _by_position(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if kwargs:
        if "self" in kwargs:
            kwargs = {"input" if key == "self" else key: value for key, value in kwargs.items()}
        for key in _LEADING.get(name, ("input",))[len(args) :]:
            if key not in kwargs:
                break
            args, kwargs = (*args, kwargs[key]), {k: v for k, v in kwargs.items() if k != key}
    return args, kwargs


def canonical_call(
    spelling: Spelling, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bool, tuple[Any, ...], dict[str, Any]]:
    """Whether the call is in place, and its arguments as the out-of-place callable takes them."""
    args, kwargs = _by_position(spelling.name, args, kwargs)
    in_place, position = spelling.in_place, spelling.inplace_position
    if position is not None:
        in_place = bool(args[position] if position < len(args) else kwargs.get("inplace", False))
        kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
        args = tuple(False if index == position else value for index, value in enumerate(args))
    if spelling.swapped:
        args = (args[1], args[0], *args[2:]) if len(args) > 1 else (kwargs.pop("other"), args[0])
    return in_place, args, kwargs
