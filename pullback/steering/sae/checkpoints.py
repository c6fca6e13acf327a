"""Checkpoints of a training run: whole or not there, whenever the process dies or the disk is full."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from torch import Tensor

from pullback.core.errors import FormatError

from .model import SparseAutoencoder
from .processes import Processes
from .store import read_json, save

__all__ = ["Checkpoint", "Checkpoints"]

_SCHEMA = 1
_KIND = "pullback sparse autoencoder training"
_DOCUMENT, _TRAINING, _AUTOENCODER, _LATEST = "checkpoint.json", "training.safetensors", "sae", "latest"
_NAME = re.compile(r"step_\d{8,}")
_EXPECTED = "expected a checkpoint written by train_sae"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What one was read from: tensors of the trainer and of this process's stream, and the document beside them."""

    path: Path
    training: Mapping[str, Tensor]
    stream: Mapping[str, Tensor]
    document: Mapping[str, Any]


class Checkpoints:
    """The checkpoints in a directory, ``step_00000100`` and so on, and ``latest``, which names one of them.

    A checkpoint is written beside its name, flushed to the disk and renamed; then ``latest`` is replaced; then old ones
    go. Each holds ``sae/``, which ``load`` reads, the trainer's tensors, each process's buffer, and digests of them.

    Args:
        directory: made when the first is saved.
        keep: how many.
        processes: the first writes what is common.
    """

    def __init__(self, directory: Path, keep: int, processes: Processes) -> None:
        self.directory = directory
        self.keep = keep
        self.processes = processes

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None. Raises FormatError where ``latest`` names none."""
        pointer = self.directory / _LATEST
        if not pointer.is_file():
            return None
        name = pointer.read_text(errors="replace").strip()
        found = self.directory / name
        if not _NAME.fullmatch(name) or not found.is_dir():
            raise FormatError(
                f"{pointer} names {name[:40]!r}, which is no checkpoint there. Write the name of one of "
                f"{[path.name for path in self.all()]} into it, or delete it to start anew."
            )
        return found

    def all(self) -> list[Path]:
        """Those whole, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if _NAME.fullmatch(path.name))

    def save(
        self,
        step: int,
        autoencoder: SparseAutoencoder,
        training: Mapping[str, Tensor],
        stream: Mapping[str, Tensor],
        document: Mapping[str, Any],
        metadata: Mapping[str, Any],
    ) -> Path:
        """Write one. Raises OSError, where the disk is full say, with the checkpoints before as they were."""
        final = self.directory / f"step_{step:08d}"
        staging = self.directory / f".{final.name}.part"
        try:
            if self.processes.first:
                self.directory.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir()
            self.processes.wait()
            _write_tensors(staging / _stream_name(self.processes.number), stream)
            self.processes.wait()
            if self.processes.first:
                save(autoencoder, staging / _AUTOENCODER, metadata=metadata)
                _write_tensors(staging / _TRAINING, training)
                files = [path for path in sorted(staging.rglob("*")) if path.is_file()]
                digests = {str(path.relative_to(staging)): _digest(path) for path in files}
                whole = {"kind": _KIND, "schema": _SCHEMA, **document, "digests": digests}
                _write(staging / _DOCUMENT, json.dumps(whole, indent=2, allow_nan=False).encode())
                _flush_directory(staging)
                shutil.rmtree(final, ignore_errors=True)  # of a run that was resumed from before it
                staging.rename(final)
                _flush_directory(self.directory)
                replace_file(self.directory / _LATEST, final.name.encode())
                for old in self.all()[: -self.keep]:
                    if old != final:
                        shutil.rmtree(old, ignore_errors=True)
            self.processes.wait()
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            kept = self.latest()
            before = f"{kept} is whole" if kept else "there is none before it"
            raise OSError(
                error.errno or errno.EIO,
                f"the checkpoint of step {step} was not saved ({error.strerror or error}); {before}. Make room in "
                f"{self.directory}, then call train_sae again, which goes on from there",
            ) from error
        return final

    def load(self, path: Path) -> Checkpoint:
        """Read one. Raises FormatError where a file is missing, foreign or damaged."""
        document = read_json(path / _DOCUMENT, _EXPECTED)
        if document.get("kind") != _KIND or document.get("schema") != _SCHEMA:
            raise FormatError(
                f"{path / _DOCUMENT} is {document.get('kind')!r}, schema {document.get('schema')!r}; {_EXPECTED}, "
                f"schema {_SCHEMA}."
            )
        if document.get("processes") != self.processes.count:
            raise FormatError(
                f"{path} was written by {document.get('processes')} processes, each with a buffer of its own; expected "
                f"{self.processes.count}, as many as now. Start as many, or choose another directory."
            )
        digests = document.get("digests")
        for name in (_TRAINING, _stream_name(self.processes.number)):
            if not isinstance(digests, dict) or name not in digests or not (path / name).is_file():
                raise FormatError(f"{path} has no {name}; {_EXPECTED}.{self._others(path)}")
            if digests[name] != _digest(path / name):
                raise FormatError(f"{path / name} is damaged: its digest is another.{self._others(path)}")
        from safetensors.torch import load_file

        try:
            training = load_file(path / _TRAINING)
            stream = load_file(path / _stream_name(self.processes.number))
        except Exception as error:  # the parser's errors are of many types
            raise FormatError(f"{path} is damaged ({error}).{self._others(path)}") from error
        return Checkpoint(path, training, stream, document)

    def _others(self, path: Path) -> str:
        others = [other for other in self.all() if other != path]
        return f' Another one is resume="{others[-1]}".' if others else ""


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file's content, at once and for good: a crash leaves the old or the new."""
    staging = path.with_name(f".{path.name}.part")
    _write(staging, data)
    os.replace(staging, path)
    _flush_directory(path.parent)


def _stream_name(process: int) -> str:
    return f"stream_{process}.safetensors"


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)
    except SafetensorError as error:
        full = "code: 28" in str(error) or "No space" in str(error)
        code = errno.ENOSPC if full else errno.EIO
        raise OSError(code, os.strerror(code) if full else str(error)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
