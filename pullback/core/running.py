"""Which modules are running, so that an operation knows where it is."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch._C._autograd import _get_sequence_nr

from pullback.core.audit import Coverage
from pullback.core.errors import CoverageError

__all__ = ["ROOT", "Frame", "RunningModules", "looks_like_activation"]


@dataclass(frozen=True)
class Frame:
    path: str
    class_name: str
    enclosing: tuple[str, ...]  # paths and class names of the module and its ancestors in the tree
    activation: bool = False  # called one, without parameters and children


def looks_like_activation(module: nn.Module) -> bool:
    """Called an activation, without parameters and children."""
    named = re.search("act|[ei]lu|swish|mish|tanh|soft", type(module).__name__, re.IGNORECASE)
    return bool(named) and not module._modules and not module._parameters


class RunningModules:
    """Which modules are running, per thread, by paired hooks on a private module tree."""

    def __init__(self, module: nn.Module, coverage: Coverage) -> None:
        self._local = threading.local()
        self._coverage = coverage
        self._handles: list[Any] = []
        self.replace: Callable[[Frame, nn.Module, Any, Any], Any] | None = None
        names = dict(module.named_modules(remove_duplicate=False))
        seen: set[int] = set()
        for path, child in names.items():
            if id(child) in seen or isinstance(child, torch.jit.ScriptModule):
                continue
            seen.add(id(child))
            parts = path.split(".") if path else []
            ancestors = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
            enclosing = tuple(text for name in ancestors for text in (name, type(names[name]).__name__))
            frame = Frame(path, type(child).__name__, enclosing, looks_like_activation(child))
            self._handles += [
                child.register_forward_pre_hook(partial(self._enter, frame), prepend=True),
                child.register_forward_hook(partial(self._leave, frame), always_call=True),
            ]

    @property
    def stack(self) -> list[tuple[Frame, int]]:
        stack: list[tuple[Frame, int]] = self._local.__dict__.setdefault("stack", [])
        return stack

    def _enter(self, frame: Frame, module: nn.Module, args: Any) -> None:
        self.stack.append((frame, _get_sequence_nr()))

    def _leave(self, frame: Frame, module: nn.Module, args: Any, output: Any) -> Any:
        if frame.activation and self.replace is not None and isinstance(output, torch.Tensor):
            replaced = self.replace(frame, module, args, output)
        else:
            replaced = None
        stack = self.stack
        while stack:
            innermost, begin = stack.pop()
            if innermost is frame:
                self._coverage.intervals.append((begin, _get_sequence_nr(), frame.path))
                break
        return replaced

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


ROOT: Final = Frame("", "", ())
