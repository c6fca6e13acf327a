"""Rules: the derivative of matching operations is replaced while a context is open, their value never."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch.overrides import TorchFunctionMode

from pullback.core.audit import GRADIENT, Coverage, Mark, flattened, is_opaque, write_mark, written
from pullback.core.bodies import body_of
from pullback.core.errors import MethodError
from pullback.core.operations import LINEAR, NONLINEAR, is_nonlinear
from pullback.core.rule import (
    PASS,
    Operation,
    Rule,
    are_paused,
    rules_paused,
    rules_resumed,
    with_gradient_of,
)
from pullback.core.running import ROOT, Frame, RunningModules
from pullback.core.spellings import Spelling, canonical, canonical_call

__all__ = [
    "PASS",
    "Coverage",
    "Operation",
    "Rule",
    "overrides",
    "rules_paused",
    "rules_resumed",
    "with_gradient_of",
]

OPAQUE: Final = "opaque_module"
"""The operation that a childless module without parameters is, when what it did cannot be seen."""


def _any_tensor(values: Any, test: Callable[[Tensor], bool]) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if test(value):
                return True
        elif isinstance(value, (list, tuple)) and _any_tensor(value, test):
            return True
    return False


def _differentiable(values: Any) -> bool:
    return _any_tensor(values, lambda tensor: tensor.requires_grad)


def _is_stray(tensor: Tensor) -> bool:
    if tensor.requires_grad and tensor.is_leaf and isinstance(tensor, nn.Parameter):
        return True
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


def _constant(value: Any) -> Any:
    """The value with trainable parameters detached and inference tensors re-aliased, sharing storage."""
    if isinstance(value, Tensor):
        if not _is_stray(value):
            return value
        if not value.is_inference():
            return value.detach()
        if value.layout is not torch.strided or value.is_conj() or value.is_neg():
            return value.clone()
        ordinary = torch.empty(0, dtype=value.dtype, device=value.device)
        return ordinary.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())
    if type(value) in (list, tuple):
        return type(value)(map(_constant, value))
    return value


@dataclass(frozen=True)
class _Plan:
    spelling: Spelling
    rules: tuple[tuple[Rule, str], ...]
    starts_backward: bool = False


_UNTOUCHED: Final = (
    object()
)  # stands for functions whose arguments are left alone, such as reading an attribute
_MISSING: Final = object()
_TENSOR_ATTRIBUTES = frozenset(["T", "mT", "H", "mH", "real", "imag", "data"])


class _RuleMode(TorchFunctionMode):
    def __init__(
        self, modules: RunningModules, rules: Sequence[Rule], coverage: Coverage, detach: bool
    ) -> None:
        super().__init__()
        self._modules, self._coverage, self._detach = modules, coverage, detach
        self._rules: dict[str, list[tuple[Rule, str]]] = {}
        for rule in rules:
            for name in rule.operations:
                self._rules.setdefault(name, []).append((rule, repr(rule)))
        self._plans: dict[Any, Any] = {}
        if OPAQUE in self._rules:
            modules.replace = self._opaque
        self._expanding = threading.local()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        plan = self._plans.get(function, _MISSING)
        if plan is _MISSING:
            plan = self._plans[function] = self._plan(function)
        if plan is _UNTOUCHED:
            return function(*args, **kwargs)
        if plan is not None and plan.starts_backward:
            return self._inside(function, args, kwargs)
        if self._detach and (
            _any_tensor(args, _is_stray) or (kwargs and _any_tensor(kwargs.values(), _is_stray))
        ):
            args, kwargs = (
                tuple(map(_constant, args)),
                {key: _constant(value) for key, value in kwargs.items()},
            )
        if (
            plan is None
            or not torch.is_grad_enabled()  # no derivative to replace, and rules keep values
            or are_paused()
        ):
            return function(*args, **kwargs)
        return self._differentiated(plan, function, args, kwargs)

    def _differentiated(
        self, plan: _Plan, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        spelling = plan.spelling
        transformed = torch._C._are_functorch_transforms_active()
        if not (transformed or _differentiable(args) or _differentiable(kwargs.values())):
            return function(*args, **kwargs)
        stack = self._modules.stack
        frame = stack[-1][0] if stack else ROOT
        begin = _get_sequence_nr()
        if plan.rules and spelling.function is not None:
            result, rule = self._ruled(plan, frame, function, args, kwargs)
            if rule is not None:
                preserved = getattr(rule[0], "preserves_gradient", False)
                # a linear operation that keeps its gradient needs no rule, so it is not counted either
                linear = preserved and not is_nonlinear(
                    spelling.name, *canonical_call(spelling, args, kwargs)[1:]
                )
                covers = linear or not preserved
                if not linear:
                    self._coverage.count(spelling.name, frame.path, GRADIENT if preserved else rule[1])
                if not transformed:
                    write_mark(written(result), Mark(spelling.name, frame.path, covers), begin)
                return result
        if spelling.composite:
            return self._inside(function, args, kwargs)
        seen = canonical_call(spelling, args, kwargs)[1:] if kwargs or spelling.swapped else (args, kwargs)
        nonlinear = is_nonlinear(spelling.name, *seen)
        result = function(*args, **kwargs)
        if transformed:
            return result
        if nonlinear and _differentiable(flattened(result)):
            self._coverage.count(spelling.name, frame.path, GRADIENT)
            write_mark(written(result), Mark(spelling.name, frame.path, False), begin)
        elif not nonlinear and spelling.in_place and spelling.name in LINEAR | NONLINEAR and args:
            # a write through a view hides its node in CopySlices: say that it was seen and is linear
            write_mark(written(args[0]), Mark(spelling.name, frame.path, True), begin)
        return result

    def _ruled(
        self, plan: _Plan, frame: Frame, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[Rule, str] | None]:
        spelling = plan.spelling
        here = self._modules.matches
        matching = [r for r in plan.rules if r[0].within is None or here(r[0].within, spelling.name)]
        if not matching:
            return None, None
        if kwargs.get("out") is not None:
            raise MethodError(
                f"{spelling.name}(out=...) in module {frame.path!r} writes to a tensor with no derivative; "
                f"the rule {matching[0][1]} needs its result: call {spelling.name} without out="
            )
        in_place, given, named = canonical_call(spelling, args, kwargs)
        target = given[0] if in_place else None
        if in_place:
            # the rule may save its input, which the write below would invalidate
            before = given[0].clone()
            given = tuple(before if value is target else value for value in given)
            named = {key: before if value is target else value for key, value in named.items()}
        assert spelling.function is not None
        operation = Operation(spelling.name, spelling.function, given, named, frame.path, frame.class_name)
        for rule in matching:
            with rules_paused():
                result = rule[0](operation)
            if result is PASS:
                continue
            if target is None:
                return result, rule
            if result.shape != target.shape or not torch.can_cast(result.dtype, target.dtype):
                return function(*args, **kwargs), rule  # raises torch's own error
            target.copy_(result)
            return target, rule
        return None, None

    def _opaque(self, frame: Frame, module: nn.Module, args: Any, output: Any) -> Any:
        """What rules make of an activation module whose inside no handler saw; None leaves its output as it is."""
        if are_paused() or len(args) != 1 or not torch.is_grad_enabled() or not is_opaque(output, args[0]):
            return None
        plan = _Plan(Spelling(OPAQUE, function=module.forward), tuple(self._rules[OPAQUE]))
        begin = _get_sequence_nr()
        result, rule = self._ruled(plan, frame, module.forward, args, {})
        if rule is None:
            return None
        self._coverage.count(OPAQUE, frame.path, rule[1])
        write_mark(written(result), Mark(OPAQUE, frame.path, True), begin)
        return result

    def _plan(self, function: Any) -> Any:
        spelling = canonical(function)
        if spelling is None:
            attribute = getattr(getattr(function, "__self__", None), "__name__", "")
            return None if attribute in _TENSOR_ATTRIBUTES else _UNTOUCHED
        if isinstance(function, types.FunctionType) and spelling.name in ("grad", "backward"):
            return _Plan(spelling, (), starts_backward=True) if spelling.composite else _UNTOUCHED
        rules = tuple(self._rules.get(spelling.name, ()))
        if rules or spelling.name in NONLINEAR or spelling.composite or spelling.in_place:
            return _Plan(spelling, rules)
        return None

    def _inside(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function written in Python with this mode on, so that the operations it hides are seen."""
        running: list[Any] = self._expanding.__dict__.setdefault("running", [])
        if function in running or are_paused():
            return function(*args, **kwargs)
        running.append(function)
        try:
            with self:
                return body_of(function)(*args, **kwargs)
        finally:
            running.remove(function)


@contextmanager
def overrides(
    module: nn.Module, rules: Sequence[Rule], *, detach: bool = True, coverage: Coverage | None = None
) -> Iterator[Coverage]:
    """While open, matching operations in this thread take the derivative of the first rule to handle them.

    ``module`` is a private (shadow) tree: its hooks, removed on exit, tell where operations run. ``detach``
    makes stray trainable parameters constants. Values stay those without rules, bit for bit. Keep it open for
    the backward pass, or checkpointed blocks are recomputed without rules; or open it again with the ``coverage`` it
    gave, which then goes on counting. Contexts nest, innermost first.

    >>> with overrides(nn.ReLU(), []) as coverage:
    ...     _ = nn.ReLU()(torch.ones(2, requires_grad=True))
    >>> coverage.summary()
    [{'operation': 'relu', 'module': '', 'rule': 'gradient', 'count': 1}]
    """
    coverage = Coverage() if coverage is None else coverage
    modules = RunningModules(module, coverage)
    try:
        with _RuleMode(modules, rules, coverage, detach):
            yield coverage
    finally:
        modules.remove()
