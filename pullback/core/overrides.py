"""Rules: the derivative of matching operations is replaced while a context is open, their value never."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch.overrides import TorchFunctionMode

from pullback.core.audit import GRADIENT, Coverage, Mark, flattened, write_mark, written
from pullback.core.errors import CoverageError, MethodError
from pullback.core.operations import LINEAR, NONLINEAR, Spelling, canonical, canonical_call, is_nonlinear

__all__ = ["PASS", "Coverage", "Operation", "Rule", "overrides", "rules_paused", "with_gradient_of"]


class _Pass:
    def __repr__(self) -> str:
        return "PASS"


PASS: Final = _Pass()
"""What a rule returns to leave this call to the next rule, or to plain autograd."""


@dataclass(frozen=True)
class Operation:
    """One call of an operation in canonical form: out of place, not reflected, first arguments by position.

    ``function`` is the native out-of-place callable, ``module_path`` the dotted path of the innermost module
    that is running ("" at the root), ``module_class`` its class name.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module_path: str = ""
    module_class: str = ""

    def value(self) -> Any:
        """The operation's native result with the ordinary derivative."""
        return self.function(*self.args, **self.kwargs)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given either by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


class Rule(Protocol):
    """Replaces the derivative of ``operations``: returns their native value, bit for bit, or :data:`PASS`.

    ``within`` is an fnmatch pattern on the path or class name of any enclosing module; None matches anywhere.
    A rule with a true attribute ``preserves_gradient`` (a leaner kernel, say) covers nothing: it counts as
    gradient.
    """

    @property
    def operations(self) -> frozenset[str] | tuple[str, ...]: ...
    @property
    def within(self) -> str | None: ...
    def __call__(self, operation: Operation, /) -> Any: ...


class _GradientOf(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, surrogate: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.dtypes = inputs[0].dtype, inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, grads[0].to(ctx.dtypes[1])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[1].to(ctx.dtypes[0], copy=True)


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """``value`` forward, bit for bit, with the derivative of ``surrogate`` (same shape).

    Works under vmap, forward-mode AD and in double backward where ``surrogate`` does. Raises MethodError for
    unequal shapes.

    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> torch.autograd.grad(with_gradient_of(x.exp(), 3 * x), x)
    (tensor(3.),)
    """
    if value.shape != surrogate.shape:
        raise MethodError(
            f"a value of shape {tuple(value.shape)} cannot take the gradient of a surrogate of shape "
            f"{tuple(surrogate.shape)}; expand or sum the surrogate to the value's shape"
        )
    result: Tensor = _GradientOf.apply(value, surrogate)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class _Frame:
    path: str
    class_name: str
    enclosing: tuple[str, ...]  # paths and class names of the module and its ancestors in the tree


class _Modules:
    """Which modules are running, per thread, by paired hooks on a private module tree."""

    def __init__(self, module: nn.Module, coverage: Coverage) -> None:
        self._local = threading.local()
        self._coverage = coverage
        self._handles: list[Any] = []
        names = dict(module.named_modules(remove_duplicate=False))
        seen: set[int] = set()
        for path, child in names.items():
            if id(child) in seen or isinstance(child, torch.jit.ScriptModule):
                continue
            seen.add(id(child))
            parts = path.split(".") if path else []
            ancestors = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
            enclosing = tuple(text for name in ancestors for text in (name, type(names[name]).__name__))
            frame = _Frame(path, type(child).__name__, enclosing)
            self._handles += [
                child.register_forward_pre_hook(partial(self._enter, frame), prepend=True),
                child.register_forward_hook(partial(self._leave, frame), always_call=True),
            ]

    @property
    def stack(self) -> list[tuple[_Frame, int]]:
        stack: list[tuple[_Frame, int]] = self._local.__dict__.setdefault("stack", [])
        return stack

    def _enter(self, frame: _Frame, module: nn.Module, args: Any) -> None:
        self.stack.append((frame, _get_sequence_nr()))

    def _leave(self, frame: _Frame, module: nn.Module, args: Any, output: Any) -> None:
        stack = self.stack
        while stack:
            innermost, begin = stack.pop()
            if innermost is frame:
                self._coverage.intervals.append((begin, _get_sequence_nr(), frame.path))
                break

    def matches(self, pattern: str, operation: str) -> bool:
        stack = self.stack
        if not stack and torch._C._current_autograd_node() is not None:
            raise CoverageError(
                f"{operation} is recomputed in the backward outside any module, so within={pattern!r} "
                "cannot be decided: checkpoint whole modules, not functions, or a rule with within=None"
            )
        return any(fnmatchcase(text, pattern) for frame, _ in stack for text in frame.enclosing)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


_ROOT: Final = _Frame("", "", ())
_thread = threading.local()


@contextmanager
def rules_paused() -> Iterator[None]:
    """No rule applies in this thread while open: for the backward of a rule's own autograd.Function."""
    before = getattr(_thread, "paused", False)
    _thread.paused = True
    try:
        yield
    finally:
        _thread.paused = before


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


def _body(function: types.FunctionType) -> Callable[..., Any]:
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
    def __init__(self, modules: _Modules, rules: Sequence[Rule], coverage: Coverage, detach: bool) -> None:
        super().__init__()
        self._modules, self._coverage, self._detach = modules, coverage, detach
        self._rules: dict[str, list[tuple[Rule, str]]] = {}
        for rule in rules:
            for name in rule.operations:
                self._rules.setdefault(name, []).append((rule, repr(rule)))
        self._plans: dict[Any, Any] = {}
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
            or getattr(_thread, "paused", False)
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
        frame = stack[-1][0] if stack else _ROOT
        begin = _get_sequence_nr()
        if plan.rules and spelling.function is not None:
            result, rule = self._ruled(plan, frame, function, args, kwargs)
            if rule is not None:
                covers = not getattr(rule[0], "preserves_gradient", False)
                self._coverage.count(spelling.name, frame.path, rule[1] if covers else GRADIENT)
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
        self, plan: _Plan, frame: _Frame, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
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
        if function in running or getattr(_thread, "paused", False):
            return function(*args, **kwargs)
        running.append(function)
        try:
            with self:
                return _body(function)(*args, **kwargs)
        finally:
            running.remove(function)


@contextmanager
def overrides(module: nn.Module, rules: Sequence[Rule], *, detach: bool = True) -> Iterator[Coverage]:
    """While open, matching operations in this thread take the derivative of the first rule to handle them.

    ``module`` is a private (shadow) tree: its hooks, removed on exit, tell where operations run. ``detach``
    makes stray trainable parameters constants. Values stay those without rules, bit for bit. Keep it open for
    the backward pass, or checkpointed blocks are recomputed without rules. Contexts nest, innermost first.

    >>> with overrides(nn.ReLU(), []) as coverage:
    ...     _ = nn.ReLU()(torch.ones(2, requires_grad=True))
    >>> coverage.summary()
    [{'operation': 'relu', 'module': '', 'rule': 'gradient', 'count': 1}]
    """
    coverage = Coverage()
    modules = _Modules(module, coverage)
    try:
        with _RuleMode(modules, rules, coverage, detach):
            yield coverage
    finally:
        modules.remove()
