"""Constants that meet signal by assignment, which no rule sees: an operation without an out-of-place form."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..rules.surrogate import carries_signal
from .parts import ImplicitBias, finite
from .recorder import BiasRecorder

__all__ = ["WriteRecorder"]


class WriteRecorder(TorchFunctionMode):
    """Records constants that meet signal by assignment: ``buffer[:, 1:] = x`` or ``x[:, 0] = 1``."""

    def __init__(self, recorder: BiasRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function not in _WRITES or not torch.is_grad_enabled() or kwargs:
            return function(*args, **kwargs)
        target, value = args[0], args[-1]
        if carries_signal(target) == carries_signal(value):
            return function(*args)
        base = target._base if target._is_view() else target
        with torch.no_grad():
            constant = torch.zeros_like(base) if base.requires_grad else base.clone()
            if constant.stride() == base.stride():
                offset = target.storage_offset() - base.storage_offset()
                region = constant.as_strided(target.shape, target.stride(), offset)
                left = 0 if carries_signal(value) else value
                function(region, *args[1:-1], left) if len(args) > 2 else region.copy_(torch.as_tensor(left))
        result = function(*args)
        if constant.stride() == base.stride():
            if bool(constant.any()):
                name = "copy" if len(args) == 2 else "setitem"
                self._recorder.add(name, "", base, ImplicitBias(finite(constant)))
        else:
            self._recorder.unknown.append("setitem")
        return result


_WRITES: Final = frozenset([Tensor.__setitem__, Tensor.copy_])
