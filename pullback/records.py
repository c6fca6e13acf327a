"""Records of finished work: one JSON object a line, by key; appended, never rewritten."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pullback.core.errors import FormatError, InputError

__all__ = ["Records", "as_json", "canonical", "locked", "read_json", "write_bytes", "write_json"]


class Records:
    """An append-only file of JSON objects by key, which crashes and other writers leave whole.

    A record is on disk when ``append`` returns. A last line torn by a crash is ended by the next writer and never read.
    Writers take turns by a lock file, and of two records with one key the first holds: a key is found once. Without a
    path the records are in memory.

    Raises ``FormatError`` for a file of other lines.

    >>> records = Records()
    >>> records.append("a", {"value": 1.0}), records.append("a", {"value": 2.0})
    (True, False)
    >>> records.read()["a"]
    {'key': 'a', 'value': 1.0}
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._found: dict[str, dict[str, Any]] = {}
        self._read = 0  # bytes of whole lines
        self._lines = 0
        self._turn = threading.RLock()

    def read(self) -> Mapping[str, dict[str, Any]]:
        """All records by key, in the order of the file; only what is new is read."""
        with self._turn:
            for line in self._new_lines():
                self._lines += 1
                try:
                    record = json.loads(line, object_hook=_with_odd_floats)
                except ValueError:
                    continue  # torn by a crash
                if not isinstance(record, dict) or not isinstance(record.get("key"), str):
                    raise FormatError(
                        f'{self.path} has a line {self._lines} without a "key"; expected records written by pullback.'
                    )
                self._found.setdefault(record["key"], record)
            return MappingProxyType(self._found)

    def append(self, key: str, record: Mapping[str, Any]) -> bool:
        """Add a record unless its key is there; whether it was added.

        Raises ``InputError`` for what JSON cannot hold; tuples become lists.
        """
        line = _text({"key": key, **as_json(record)})
        with self._turn:
            if self.path is None:
                added = key not in self._found
                self._found.setdefault(key, json.loads(line, object_hook=_with_odd_floats))
                return added
            with locked(self.path):
                self.read()
                if self.path.exists() and self.path.stat().st_size > self._read:
                    _append(self.path, b"\n")  # ends a torn line
                if key in self.read():
                    return False
                _append(self.path, f"{line}\n".encode())
                self.read()
        return True

    def _new_lines(self) -> Iterator[bytes]:
        if self.path is None or not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                yield line


def locked(path: Path) -> Any:
    """The turn of one writer among processes, for a ``with``; the system ends it when the process dies."""
    from filelock import FileLock

    return FileLock(path.with_name(f".{path.name}.lock"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one document and replace ``path`` at once."""
    write_bytes(path, (_text(as_json(value), indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """What ``write_json`` wrote. Raises ``OSError`` or ``ValueError`` for another file."""
    return json.loads(path.read_bytes(), object_hook=_with_odd_floats)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` at once: readers and crashes see the old content or the new."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces. Raises ``InputError`` for what JSON cannot hold."""
    return json.dumps(as_json(value, finite=True), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def as_json(value: Any, where: str = "value", finite: bool = False) -> Any:
    """A copy in JSON's types: tuples as lists, numbers of numpy as numbers.

    NaN and infinities stay (records tag them) unless ``finite``. Raises ``InputError`` for what JSON cannot hold, and
    says where it is.

    >>> as_json({"levels": (0.1, 0.5)})
    {'levels': [0.1, 0.5]}
    """
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float) and (not finite or math.isfinite(value)):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [as_json(item, f"{where}[{number}]", finite) for number, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: as_json(item, f"{where}[{key!r}]", finite) for key, item in value.items()}
    given = f"{value}" if isinstance(value, float) else f"a {type(value).__name__}"
    raise InputError(
        f"{where} is {given}. Expected what JSON holds: numbers, text, None, lists, and dicts with text keys. Write "
        "tensors with .tolist(), other objects by their name or their settings."
    )


def _text(value: Any, indent: int | None = None) -> str:
    return json.dumps(_without_odd_floats(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _without_odd_floats(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, list):
        return [_without_odd_floats(item) for item in value]
    return (
        {key: _without_odd_floats(item) for key, item in value.items()} if isinstance(value, dict) else value
    )


def _with_odd_floats(found: dict[str, Any]) -> Any:
    return float(found["$float"]) if found.keys() == {"$float"} else found


def _append(path: Path, data: bytes) -> None:
    new = not path.exists()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        while data:
            data = data[os.write(handle, data) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    if new and os.name == "posix":  # the file's name, too, has to survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
