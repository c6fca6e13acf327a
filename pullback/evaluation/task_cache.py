"""Attributions that several tasks of a sweep need, computed once and kept beside its results."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from pullback.core.errors import FormatError, InputError
from pullback.records import as_json, canonical
from pullback.storage import read, write
from pullback.version import __version__

__all__ = ["cached", "keeping"]

_FORMAT, _SCHEMA = "pullback.cached", 1
_IN_MEMORY = 8  # how many are kept by a process whose sweep has no folder

_folder: ContextVar[Path | None] = ContextVar("folder", default=None)
_kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()


@contextmanager
def keeping(folder: Path | None) -> Iterator[None]:
    """``cached`` keeps files in this sweep's folder for the duration, or the latest few in memory."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def cached(content: Mapping[str, Any], compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name from the running sweep's cache, or computed and put there; for use in task functions.

    ``content``: JSON that says all that decides them (method, seed, fingerprints of model and data); its hash with the
    package's version is the key. Files are safetensors in ``attributions/``, replaced at once; a damaged one is
    computed again.

    Raises ``InputError`` for content that JSON cannot hold, and for other results than tensors by name.

    >>> cached({"method": "gradient", "seed": 0}, lambda: {"values": Tensor([1.0])})
    {'values': tensor([1.])}
    """
    known = {"content": as_json(content, "content", finite=True), "version": __version__}
    key = sha256(canonical(known).encode()).hexdigest()
    folder = _folder.get()
    if folder is None:
        if key not in _kept:
            _kept[key] = _computed(compute)
        _kept.move_to_end(key)
        while len(_kept) > _IN_MEMORY:
            _kept.popitem(last=False)
        return dict(_kept[key])
    file = folder / "attributions" / f"{key}.safetensors"
    if file.exists():
        try:
            fields = read(file, _FORMAT, _SCHEMA, "pullback.evaluation.cached")
            if fields["known"] == known:
                return dict(fields["tensors"])
        except FormatError:
            pass  # a crash of the machine tore it
    found = _computed(compute)
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, _FORMAT, _SCHEMA, {"known": known, "tensors": found})
    return found


def _computed(compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    found = compute()
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"A {type(found).__name__} was computed. Expected a dict of tensors by name.")
    return {name: value.detach().cpu() for name, value in found.items()}
