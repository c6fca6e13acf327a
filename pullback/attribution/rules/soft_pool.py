"""Soft pooling backward: max pooling that shares its gradient over the window."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pullback.core.errors import MethodError
from pullback.core.overrides import PASS, Operation, with_gradient_of

from .soft_gates import at_least_float32, require_temperature

__all__ = ["SoftPool"]

_MAX_POOLS = frozenset(
    f"{kind}max_pool{rank}d{suffix}"
    for kind in ("", "adaptive_")
    for rank in (1, 2, 3)
    for suffix in ("", "_with_indices")
)
# where a place of a window lies, along one dimension
_INSIDE, _PADDING, _BEYOND = 0, 1, 2


@dataclass(frozen=True)
class SoftPool:
    """Backward through max pooling is that of Σ_j w_j u_j, w = softmax(u/T) over the window; forward is the hard max.

    Live weights: ∂/∂u_j = w_j (1 + (u_j - Σ w u)/T). Detached: w_j. Any rank, tuple kernels, stride, padding,
    dilation, ceil_mode, return_indices, and adaptive pools. Both sum to one over a window.

    Args:
        temperature: T > 0, in units of the pooled values. T → 0 gives max pooling's own derivative, large T that of
            average pooling over the window's places.
        weights: "live", the derivative through w too (v1 to v4), or "detached" (v5, v6).
        padding: "corrected": padding takes no share. "faithful": padding is 0 and absorbs a share, as in the official
            code, so that a border window passes on less than it receives. Places beyond the padding, which ceil_mode
            adds, take no share in either.
        within: fnmatch pattern on an enclosing module's path or class name; None is anywhere.

    Raises:
        MethodError: a parameter is out of range.

    Source: arXiv 2507.22832v4 (live); v5, eq. 15 and 16 (detached). Corrected padding, other ranks: ours.

    Example:
        >>> from pullback.core.overrides import overrides
        >>> u = torch.zeros(1, 1, 4, requires_grad=True)
        >>> with overrides(torch.nn.MaxPool1d(2), [SoftPool()]):
        ...     torch.autograd.grad(torch.nn.functional.max_pool1d(u, 2).sum(), u)
        (tensor([[[0.5000, 0.5000, 0.5000, 0.5000]]]),)
    """

    temperature: float = 0.3
    weights: Literal["live", "detached"] = "live"
    padding: Literal["corrected", "faithful"] = "corrected"
    within: str | None = None
    operations: frozenset[str] = field(default=_MAX_POOLS, init=False, repr=False)

    def __post_init__(self) -> None:
        require_temperature(self.temperature)
        if self.weights not in ("live", "detached"):
            raise MethodError(f'weights is "live" or "detached", got {self.weights!r}.')
        if self.padding not in ("corrected", "faithful"):
            raise MethodError(f'padding is "corrected" or "faithful", got {self.padding!r}.')

    def __call__(self, operation: Operation) -> Any:
        u = operation.args[0]
        if not u.is_floating_point():
            return PASS
        pooled = operation.function(u.detach(), *operation.args[1:], **operation.kwargs)
        hard, *indices = pooled if isinstance(pooled, (tuple, list)) else (pooled,)
        tables = _places(operation, u.shape, hard.shape)
        share = self._share(u.detach(), tables)
        # the product keeps only the share
        soft = with_gradient_of(hard, (share * _windows(u, tables)).sum([*range(-len(tables), 0)]))
        return (soft, *indices) if indices else soft

    def _share(self, u: Tensor, tables: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Each place's share of its window's gradient, shaped as the windows."""
        values = at_least_float32(_windows(u, tables))
        state = _joint_state([state for _, state in tables]).to(u.device)
        missing = state != _INSIDE
        if self.padding == "faithful":
            values = values.masked_fill(state == _PADDING, 0.0)
            missing = state == _BEYOND
        window = [*range(-len(tables), 0)]
        logits = (values / self.temperature).masked_fill(missing, -torch.inf).flatten(window[0])
        # a window of padding alone has nothing to share, and softmax of it is not a number
        weight = logits.softmax(-1).unflatten(-1, values.shape[window[0] :]).masked_fill(missing, 0.0)
        if self.weights == "live":
            values = values.masked_fill(weight == 0, 0.0)  # -inf has no share, and times zero is not a number
            mean = (weight * values).sum(window, keepdim=True)
            weight = weight * (1 + (values - mean) / self.temperature)
        share: Tensor = weight.masked_fill(state != _INSIDE, 0.0).to(u.dtype)
        return share


def _windows(u: Tensor, tables: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(..., *out, *window): the values of every window; places outside repeat an inside one."""
    first = u.dim() - len(tables)
    for dim, (index, _) in enumerate(tables, start=first):
        # out stays in place of the dimension, the window goes to the end
        u = u.index_select(dim, index.flatten().to(u.device)).unflatten(dim, index.shape).movedim(dim + 1, -1)
    return u


def _joint_state(states: list[Tensor]) -> Tensor:
    """(*out, *window): the worst state over dimensions, since a place is inside only where it is in all of them."""
    rank = len(states)
    joint = torch.zeros([1] * (2 * rank), dtype=torch.long)
    for number, state in enumerate(states):
        shape = [1] * (2 * rank)
        shape[number], shape[rank + number] = state.shape
        joint = torch.maximum(joint, state.reshape(shape))
    return joint


def _places(operation: Operation, given: torch.Size, pooled: torch.Size) -> list[tuple[Tensor, Tensor]]:
    """Per spatial dimension (out, window): the index each place reads, and its state."""
    rank = int(operation.name.partition("max_pool")[2][0])
    lengths, outs = given[-rank:], pooled[-rank:]
    if operation.name.startswith("adaptive"):
        return [_adaptive(length, out) for length, out in zip(lengths, outs, strict=True)]
    kernel = _each(operation.argument(1, "kernel_size"), rank)
    stride = _each(operation.argument(2, "stride"), rank) or kernel
    padding = _each(operation.argument(3, "padding", 0), rank) or [0] * rank
    dilation = _each(operation.argument(4, "dilation", 1), rank) or [1] * rank
    return [_regular(*each) for each in zip(lengths, outs, kernel, stride, padding, dilation, strict=True)]


def _regular(
    length: int, out: int, kernel: int, stride: int, padding: int, dilation: int
) -> tuple[Tensor, Tensor]:
    start = torch.arange(out)[:, None] * stride - padding
    place = start + torch.arange(kernel) * dilation
    state = torch.where((place < 0) | (place >= length), _PADDING, _INSIDE)
    state = torch.where(place >= length + padding, _BEYOND, state)
    return place.clamp(0, length - 1), state


def _adaptive(length: int, out: int) -> tuple[Tensor, Tensor]:
    cell = torch.arange(out)
    start, stop = cell * length // out, -(-(cell + 1) * length // out)
    place = start[:, None] + torch.arange(int((stop - start).max()) if out else 1)
    return place.clamp(max=length - 1), torch.where(place < stop[:, None], _INSIDE, _BEYOND)


def _each(value: Any, rank: int) -> list[int]:
    """One number per dimension; empty for None or an empty list."""
    if value is None:
        return []
    numbers = [int(each) for each in value] if isinstance(value, (tuple, list)) else [int(value)]
    return numbers * rank if len(numbers) == 1 else numbers
