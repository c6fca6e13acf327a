"""The IDX array format of the MNIST files, read with the standard library and numpy."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from pullback.core.errors import FormatError, InputError

__all__ = ["load_idx"]

_TYPES: dict[int, np.dtype[Any]] = {
    0x08: np.dtype(">u1"),
    0x09: np.dtype(">i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
_MOST_DIMENSIONS = 16
_GZIP_MAGIC = b"\x1f\x8b"


def load_idx(path: str | os.PathLike[str], *, limit: int = 2**30) -> Tensor:
    """The tensor stored in an IDX file, gzipped or raw (told apart by content, not by name).

    A file is two zero bytes, a type code, the number of dimensions, the dimensions as big-endian 32-bit
    integers, then the values. Result: the file's shape and type (uint8, int8, int16, int32, float32,
    float64). ``limit`` is the largest number of elements to accept, so that a damaged header cannot ask for
    all memory.

    Raises ``InputError`` when there is no such file and ``FormatError`` when it is not a whole IDX file.
    Format: Y. LeCun, C. Cortes, C. Burges, the MNIST database.

    >>> from pullback.datasets.mnist import EMBEDDED
    >>> tuple(load_idx(EMBEDDED / "mnist-test-1000-images-idx3-ubyte.gz").shape)
    (1000, 28, 28)
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f'There is no file "{path}". Expected an IDX file, such as train-images-idx3-ubyte.gz.'
        )
    with path.open("rb") as file:
        gzipped = file.read(2) == _GZIP_MAGIC
        file.seek(0)
        if not gzipped:
            return _read(file, path, limit)
        try:
            with gzip.GzipFile(fileobj=file) as stream:
                return _read(stream, path, limit)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FormatError(
                f'"{path}" is a damaged gzip file ({error}). Expected a whole IDX file; fetch it again.'
            ) from error


def _read(stream: IO[bytes] | gzip.GzipFile, path: Path, limit: int) -> Tensor:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\x00\x00":
        raise FormatError(
            f'"{path}" starts with {magic.hex(" ") or "nothing"}. Expected the IDX magic: 00 00, a type '
            "code, the number of dimensions. If it is another format (PNG, NumPy), convert it first."
        )
    code, rank = magic[2], magic[3]
    if code not in _TYPES:
        known = ", ".join(f"0x{known:02X} ({dtype.name})" for known, dtype in _TYPES.items())
        raise FormatError(f'"{path}" has the unknown IDX type code 0x{code:02X}. Expected one of {known}.')
    if not 1 <= rank <= _MOST_DIMENSIONS:
        raise FormatError(f'"{path}" says it has {rank} dimensions. Expected 1 to {_MOST_DIMENSIONS}.')
    header = stream.read(4 * rank)
    if len(header) < 4 * rank:
        raise FormatError(
            f'"{path}" is truncated in its header: {len(header)} of {4 * rank} bytes for {rank} dimensions. '
            "Fetch it again."
        )
    shape = struct.unpack(f">{rank}I", header)
    count = math.prod(shape)
    text = " x ".join(map(str, shape))
    if count > limit:
        raise FormatError(
            f'"{path}" says it holds {text} = {count:,} elements, over the limit of {limit:,}. '
            "If the file is right, pass a larger limit=."
        )
    dtype = _TYPES[code]
    expected = count * dtype.itemsize
    # One byte more than announced, so that trailing bytes show without reading all of them.
    payload = stream.read(expected + 1)
    if len(payload) < expected:
        raise FormatError(
            f'"{path}" is truncated: {len(payload):,} of the {expected:,} bytes that {text} values of type '
            f"{dtype.name} take. Fetch it again."
        )
    if len(payload) > expected:
        raise FormatError(
            f'"{path}" goes on after the {expected:,} bytes that {text} values of type {dtype.name} take. '
            "Expected the file to end there; its header or its content is wrong."
        )
    array = np.frombuffer(payload, dtype=dtype, count=count).reshape(shape)
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=True))
