"""Closed forms of the implicit bias of normalisations, softmax and attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from ...core.overrides import Operation
from ..rules.surrogate import carries_signal
from .parts import NOT_CLOSED, ZERO, ClosedForm, ImplicitBias, finite, only_first

__all__ = ["NORMALISATIONS"]


def _batch_norm(operation: Operation, y: Tensor) -> ImplicitBias | None:
    x = operation.args[0]
    if not only_first(operation):
        return NOT_CLOSED
    if operation.argument(5, "training", False):
        return NOT_CLOSED
    origin = x.new_zeros(1, x.shape[1], *[1] * (x.dim() - 2))
    at_zero: Tensor = replace(operation, args=(origin, *operation.args[1:])).value()
    return ImplicitBias(at_zero)


def _normalized(y: Tensor, share: Tensor, bias: Tensor | None) -> ImplicitBias:
    """``(y - β) s + β`` with the share ``s = v / (v + ε)`` of the variance v."""
    if bias is None:
        return ImplicitBias(curvature=y * share)
    return ImplicitBias(bias, whole=torch.lerp(bias.to(y.dtype), y, share.to(y.dtype)))


def _layer_norm(operation: Operation, y: Tensor) -> ImplicitBias | None:
    if not only_first(operation):
        return NOT_CLOSED
    shape = operation.argument(1, "normalized_shape")
    shape = [shape] if isinstance(shape, int) else list(shape)
    eps = operation.argument(4, "eps", 1e-5)
    # the kernel's 1 / √(v + ε) costs a tenth of what var does
    deviation = torch.native_layer_norm(operation.args[0], shape, None, None, eps)[2]
    return _normalized(y, 1 - eps * deviation.square(), operation.argument(3, "bias"))


def _group_norm(operation: Operation, y: Tensor) -> ImplicitBias | None:
    if not only_first(operation):
        return NOT_CLOSED
    x, groups = operation.args[0], operation.argument(1, "num_groups")
    variance = x.reshape(len(x), groups, -1).var(2, unbiased=False)
    ones = [1] * (x.dim() - 2)
    variance = variance.repeat_interleave(x.shape[1] // groups, 1).reshape(len(x), -1, *ones)
    share = variance / (variance + operation.argument(4, "eps", 1e-5))
    bias = operation.argument(3, "bias")
    return _normalized(y, share, None if bias is None else bias.reshape(-1, *ones))


def _rms_norm(operation: Operation, y: Tensor) -> ImplicitBias | None:
    if not only_first(operation):
        return NOT_CLOSED
    x, shape, eps = operation.args[0], operation.argument(1, "normalized_shape"), operation.argument(3, "eps")
    square = x.square().mean(list(range(-len(shape), 0)), keepdim=True)
    return _normalized(y, square / (square + (torch.finfo(x.dtype).eps if eps is None else eps)), None)


def _softmax(operation: Operation, y: Tensor) -> ImplicitBias | None:
    """``p (1 - s + p·s)``, which does not change when s is shifted."""
    dim = operation.argument(1, "dim")
    if not isinstance(dim, int):
        return NOT_CLOSED
    s = operation.args[0].to(y.dtype)
    # a removed entry (p = 0) must not bring in its infinity
    s = (s - s.amax(dim, keepdim=True)).masked_fill_(y == 0, 0)
    mean = (y * s).sum(dim, keepdim=True)
    return ImplicitBias(curvature=finite(s.neg_().add_(mean).add_(1).mul_(y)))


def _log_softmax(operation: Operation, y: Tensor) -> ImplicitBias | None:
    """``-H(p)`` for every entry."""
    dim = operation.argument(1, "dim")
    if not isinstance(dim, int):
        return NOT_CLOSED
    p = y.exp()
    return ImplicitBias(curvature=(p * y.masked_fill(p == 0, 0)).sum(dim, keepdim=True))


def _logsumexp(operation: Operation, y: Tensor) -> ImplicitBias | None:
    """``H(p)``."""
    dim, x = operation.argument(1, "dim"), operation.args[0]
    keep = operation.argument(2, "keepdim", False)
    log = torch.log_softmax(x, dim) if isinstance(dim, int) else None
    if log is None:
        return NOT_CLOSED
    p = log.exp()
    return ImplicitBias(curvature=-(p * log.masked_fill(p == 0, 0)).sum(dim, keepdim=bool(keep)))


def _attention(operation: Operation, y: Tensor) -> ImplicitBias | None:
    """``y - [v] y - (A ⊙ (n L - Σ A ⊙ n L)) v``, L the scaled logits without mask, n of q and k with signal."""
    q, k, v = operation.args[:3]
    mask = operation.argument(3, "attn_mask")
    if operation.argument(4, "dropout_p", 0.0) or carries_signal(mask):
        return NOT_CLOSED
    live = [carries_signal(each) for each in (q, k, v)]
    n = live[0] + live[1]
    kept = None if live[2] else y
    if n == 0:
        return ZERO if kept is None else ImplicitBias(curvature=kept.clone())
    if k.shape[-3:-2] != q.shape[-3:-2] and operation.kwargs.get("enable_gqa", False):
        k, v = (each.repeat_interleave(q.shape[-3] // each.shape[-3], -3) for each in (k, v))
    scale = operation.kwargs.get("scale")
    logits = torch.matmul(q, k.transpose(-2, -1)).mul_(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    masked = logits
    if operation.argument(5, "is_causal", False):
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=y.device).tril()
        masked = masked.masked_fill(~seen, -math.inf)
    if mask is not None:
        masked = masked.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else masked + mask
    weight = torch.nan_to_num(masked.softmax(-1), 0.0)  # a row with nothing to attend to gives 0
    logits = logits.expand(weight.shape)
    change = weight * (logits - (weight * logits).sum(-1, keepdim=True)).mul_(-n)
    bias = torch.matmul(change, v)
    return ImplicitBias(curvature=bias if kept is None else bias + kept)


NORMALISATIONS: Final[Mapping[str, ClosedForm]] = {
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "rms_norm": _rms_norm,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "scaled_dot_product_attention": _attention,
}
