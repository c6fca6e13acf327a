"""Fingerprints of tensors and models: what a result was computed from, as a short text that can be compared."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any

import torch
from torch import nn

from pullback.core.inputs import nested_tensors

__all__ = ["fingerprint", "model_fingerprint"]


def fingerprint(*values: Any) -> str:
    """SHA-256 of the tensors in these nests, in order: dtypes, shapes and bytes; other leaves are not read.

    >>> fingerprint(torch.zeros(2)) == fingerprint(torch.zeros(2)) != fingerprint(torch.zeros(2, 1))
    True
    """
    digest = sha256()
    for tensor in nested_tensors(values):
        whole = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(f"{whole.dtype}{tuple(whole.shape)};".encode())
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().data if whole.numel() else b"")
    return digest.hexdigest()


def model_fingerprint(model: Callable[..., Any]) -> str:
    """SHA-256 of a module's layers, parameters and buffers; of any other callable's name alone.

    The code of a ``forward`` is not read: two modules of the same layers and weights that call them differently have
    one fingerprint.
    """
    if not isinstance(model, nn.Module):
        name = getattr(model, "__qualname__", type(model).__qualname__)
        return sha256(f"{getattr(model, '__module__', '')}:{name}".encode()).hexdigest()
    state = [*model.named_parameters(), *model.named_buffers()]
    names = ",".join(name for name, _ in state)
    tensors = fingerprint([tensor for _, tensor in state])
    return sha256(f"{type(model).__qualname__};{model!r};{names};{tensors}".encode()).hexdigest()
