"""The memory-lean backward: operations keep only what the gradient of their input needs, to the bit.

Parameters are constants here, yet autograd keeps the input of every convolution, batch norm and pooling for them. The
functions below run the native kernels, forward and backward, and keep a byte per element or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from .bodies import body_of
from .rule import PASS, Operation
from .spellings import Spelling, canonical, canonical_call

__all__ = ["BATCH_NORMS", "KERNELS", "SMALLEST", "Lean", "lean_backward"]

SMALLEST: Final = 65_536
"""Elements of an input below which the native operation is faster and small anyway (measured)."""

aten = torch.ops.aten
BATCH_NORMS: Final = frozenset(
    {
        aten.native_batch_norm.default,
        aten._native_batch_norm_legit_no_training.default,
        aten.cudnn_batch_norm.default,
        aten.miopen_batch_norm.default,
    }
)
KERNELS: Final = BATCH_NORMS | frozenset(
    {
        aten.convolution.default,
        aten.relu.default,
        aten.relu_.default,
        aten.max_pool2d_with_indices.default,
        aten.max_pool3d_with_indices.default,
    }
)
"""What a forward pass runs where a lean operation would let go of a tensor of the input's size."""


class _Convolution(torch.autograd.Function):
    """Keeps the weight, which exists anyway, and the layout of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, operation: Operation, geometry: tuple[Any, ...]) -> Any:
        ctx.save_for_backward(weight)
        ctx.layout, ctx.geometry = _layout(x), geometry
        return operation.value()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (weight,) = ctx.saved_tensors
        # the kernel reads the layout of the input, never its values
        found = aten.convolution_backward(
            grads[0], _empty(ctx.layout), weight, None, *ctx.geometry, (True, False, False)
        )
        return found[0], None, None, None


class _BatchNorm(torch.autograd.Function):
    """Keeps the running statistics and the weight, which exist anyway."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, operation: Operation
    ) -> Any:
        ctx.save_for_backward(mean, variance, weight)
        ctx.layout = _layout(x)
        ctx.eps = operation.argument(7, "eps", 1e-5)
        return operation.value()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        mean, variance, weight = ctx.saved_tensors
        (grad,) = grads
        # in eval mode the input matters to the gradients of the parameters only; its layout chooses the kernel
        same = grad.stride() == ctx.layout[1] and grad.dtype == ctx.layout[2]
        like = grad.detach() if same else _empty(ctx.layout)
        none = mean.new_empty(0)
        found = aten.native_batch_norm_backward(
            grad, like, weight, mean, variance, none, none, False, ctx.eps, (True, False, False)
        )
        return found[0], None, None, None, None


class _ReLU(torch.autograd.Function):
    """Keeps a bool per element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, in_place: bool) -> Tensor:
        if in_place:
            ctx.mark_dirty(x)
        value = x.relu_() if in_place else x.relu()
        # a NaN is true and lets the gradient pass, as natively; a comparison would take six times as long
        ctx.save_for_backward(value.to(torch.bool))
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (passes,) = ctx.saved_tensors
        (grad,) = grads
        factor = passes.view(torch.uint8).to(grad.dtype)
        if torch.is_grad_enabled() or factor.stride() != grad.stride():
            return aten.threshold_backward(grad, factor, 0), None
        return aten.threshold_backward.grad_input(grad, factor, 0, grad_input=factor), None


class _MaxPool(torch.autograd.Function):
    """Keeps where in its window each maximum is, mostly in a byte."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: _Window) -> Tensor:
        pool = aten.max_pool2d_with_indices if window.dimensions == 2 else aten.max_pool3d_with_indices
        value, index = pool(x, *window.arguments)
        ctx.layout, ctx.window = _layout(x), window
        ctx.save_for_backward(window.encoded(index, x.shape))
        result: Tensor = value
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        window: _Window = ctx.window
        (code,) = ctx.saved_tensors
        index = window.decoded(code, ctx.layout[0])
        undo = (
            aten.max_pool2d_with_indices_backward
            if window.dimensions == 2
            else aten.max_pool3d_with_indices_backward
        )
        return undo(grads[0], _empty(ctx.layout), *window.arguments, index), None


@dataclass(frozen=True)
class _Window:
    """The geometry of a pooling, and its positions as numbers within the window."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool

    @property
    def dimensions(self) -> int:
        return len(self.kernel)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode

    def encoded(self, index: Tensor, shape: Sequence[int]) -> Tensor:
        """Positions in the flat input as numbers within the window; overwrites ``index``."""
        steps = self._steps(shape, index.device)
        count = len(steps)
        dtype = torch.uint8 if count <= 256 else torch.int16 if count <= 2**15 else torch.int32
        number_of = torch.zeros(int(steps[-1]) + 1, dtype=dtype, device=index.device)
        number_of[steps] = torch.arange(count, dtype=dtype, device=index.device)
        return number_of.take(index.sub_(self._corners(index, shape)))

    def decoded(self, code: Tensor, shape: Sequence[int]) -> Tensor:
        """The positions in the flat input again."""
        steps = self._steps(shape, code.device)
        return steps.take(code.long()).add_(self._corners(code, shape))

    def _steps(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """From the first element of a window to each of its elements, in the flat input."""
        ranges = [torch.arange(size) * apart for size, apart in zip(self.kernel, self.dilation, strict=True)]
        return _flat(ranges, shape).flatten().to(device)

    def _corners(self, pooled: Tensor, shape: Sequence[int]) -> Tensor:
        """Where each window begins in the flat input, padding included."""
        sizes = pooled.shape[-self.dimensions :]
        ranges = [
            torch.arange(size, device=pooled.device) * apart - before
            for size, apart, before in zip(sizes, self.stride, self.padding, strict=True)
        ]
        return _flat(ranges, shape)


def _flat(ranges: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Every combination of coordinates as a position in a flat input of this shape."""
    total = ranges[0]
    for coordinates, size in zip(ranges[1:], shape[-len(ranges) + 1 :], strict=True):
        total = (total * size).unsqueeze(-1) + coordinates
    return total


def _layout(x: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]:
    return x.shape, x.stride(), x.dtype, x.device


def _empty(layout: tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]) -> Tensor:
    shape, stride, dtype, device = layout
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _each(value: Any, count: int) -> tuple[int, ...]:
    """One number per dimension, from one for all or one for each."""
    given = (value,) if isinstance(value, int) else tuple(value)
    return given * count if len(given) == 1 else given


def _is_constant(tensor: Any) -> bool:
    """Whether a parameter is absent, or a plain tensor without a gradient."""
    return tensor is None or (type(tensor) in (Tensor, nn.Parameter) and not tensor.requires_grad)


def _convolution(operation: Operation, in_place: bool) -> Any:
    x, weight, *_ = operation.args
    dimensions = x.dim() - 2
    argument = operation.argument
    if weight.dim() != x.dim() or not _is_constant(weight) or not _is_constant(argument(2, "bias")):
        return PASS
    transposed = operation.name.startswith("conv_transpose")
    after, groups, dilation = argument(5, "output_padding", 0), argument(6, "groups", 1), 1
    padding = argument(4, "padding", 0)
    if transposed:
        dilation = argument(7, "dilation", 1)
    else:
        after, dilation = 0, argument(5, "dilation", 1)
    apart = _each(dilation, dimensions)
    if isinstance(padding, str):
        total = [step * (size - 1) for step, size in zip(apart, weight.shape[2:], strict=True)]
        if padding == "same" and any(each % 2 for each in total):
            return PASS  # pads the input on one side first
        padding = tuple(each // 2 for each in total) if padding == "same" else 0
    stride = _each(argument(3, "stride", 1), dimensions)
    geometry = (stride, _each(padding, dimensions), apart, transposed, _each(after, dimensions), groups)
    return _Convolution.apply(x, weight, operation, geometry)  # type: ignore[no-untyped-call]


def _batch_norm(operation: Operation, in_place: bool) -> Any:
    if operation.function is not nn.functional.batch_norm or operation.argument(5, "training", False):
        return PASS
    mean, variance = operation.argument(1, "running_mean"), operation.argument(2, "running_var")
    weight, bias = operation.argument(3, "weight"), operation.argument(4, "bias")
    if mean is None or variance is None or not all(map(_is_constant, (mean, variance, weight, bias))):
        return PASS
    return _BatchNorm.apply(operation.args[0], mean, variance, weight, operation)  # type: ignore[no-untyped-call]


def _relu(operation: Operation, in_place: bool) -> Any:
    x = operation.args[0]
    if in_place and (x.is_leaf or x._is_view()):
        return PASS
    return _ReLU.apply(x, in_place)  # type: ignore[no-untyped-call]


def _max_pool(operation: Operation, in_place: bool) -> Any:
    x = operation.args[0]
    dimensions = int(operation.name[-2])
    if x.dim() != dimensions + 2:
        return PASS
    kernel = _each(operation.argument(1, "kernel_size"), dimensions)
    stride = _each(operation.argument(2, "stride") or kernel, dimensions)
    padding = _each(operation.argument(3, "padding", 0), dimensions)
    dilation = _each(operation.argument(4, "dilation", 1), dimensions)
    ceil_mode = bool(operation.argument(5, "ceil_mode", False))
    if dimensions == 1:
        # pooled as an image of one row, as natively
        window = _Window((1, *kernel), (1, *stride), (0, *padding), (1, *dilation), ceil_mode)
        return _MaxPool.apply(x.unsqueeze(-2), window).squeeze(-2)  # type: ignore[no-untyped-call]
    return _MaxPool.apply(x, _Window(kernel, stride, padding, dilation, ceil_mode))  # type: ignore[no-untyped-call]


_LEAN: Final[dict[str, Callable[[Operation, bool], Any]]] = {
    **{f"{name}{n}d": _convolution for name in ("conv", "conv_transpose") for n in (1, 2, 3)},
    **{f"max_pool{n}d": _max_pool for n in (1, 2, 3)},
    "batch_norm": _batch_norm,
    "relu": _relu,
}


def _applies(x: Any, smallest: int) -> bool:
    """Whether a lean operation on x pays, and nothing is at work that its functions do not know."""
    return (
        type(x) is Tensor
        and x.numel() >= smallest
        and x.requires_grad
        and x.is_floating_point()
        and torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_any_autocast_enabled()
        and not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
    )


@dataclass(frozen=True)
class Lean:
    """The derivative as it is, from less memory: convolution, eval-mode batch norm, ReLU and max pooling.

    Values and gradients are torch.equal to the native ones. Operations on fewer than ``smallest`` elements, on
    parameters that require grad, under transforms or autocast are left alone.
    """

    smallest: int = SMALLEST
    operations: frozenset[str] = field(default=frozenset(_LEAN), repr=False)
    preserves_gradient: bool = field(default=True, repr=False)
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        if not _applies(operation.args[0], self.smallest):
            return PASS
        return _LEAN[operation.name](operation, False)


@lru_cache(maxsize=4096)
def _lean_spelling(function: Any) -> Spelling | None:
    spelling = canonical(function)
    return spelling if spelling is not None and spelling.name in _LEAN and spelling.function else None


_STARTS_BACKWARD: Final = frozenset({torch.autograd.grad, torch.autograd.backward, Tensor.backward})


class _LeanMode(TorchFunctionMode):
    """Applies lean functions and nothing else: no marks, no record of modules, so a call costs a microsecond."""

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self._smallest = smallest

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _STARTS_BACKWARD:
            # the mode is off in here, but what the backward recomputes must be lean as in the forward
            with self:
                return body_of(function)(*args, **(kwargs or {}))
        spelling = _lean_spelling(function)
        if spelling is not None and _applies(
            args[0] if args else (kwargs or {}).get("input"), self._smallest
        ):
            in_place, given, named = canonical_call(spelling, args, kwargs or {})
            operation = Operation(spelling.name, spelling.function, given, named)  # type: ignore[arg-type]
            result = _LEAN[spelling.name](operation, in_place) if named.get("out") is None else PASS
            if result is not PASS:
                return result
        return function(*args, **kwargs) if kwargs else function(*args)


@contextmanager
def lean_backward(smallest: int = SMALLEST) -> Iterator[None]:
    """While open, operations in this thread keep little for the backward, which runs inside too.

    >>> x = torch.randn(1, 3, 300, 300, requires_grad=True)
    >>> with lean_backward():
    ...     type(torch.relu(x).grad_fn).__name__
    '_ReLUBackward'
    """
    with _LeanMode(smallest):
        yield
