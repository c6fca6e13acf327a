"""CIFAR-10 and data in its binary format: small colour photographs of ten classes, read from files."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pullback.core.errors import FormatError, InputError
from pullback.datasets.examples import chosen, count
from pullback.datasets.mnist import Split

__all__ = ["Photographs", "cifar10"]

_SIDE, _CHANNELS = 32, 3
_RECORD = 1 + _CHANNELS * _SIDE * _SIDE  # a label, then the red, the green and the blue plane, row by row
_FILES = {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)}
_CLASSES = 10
_ENVIRONMENT_VARIABLE = "PULLBACK_DATA"


@dataclass(frozen=True, eq=False)
class Photographs:
    """Labelled colour images: ``x`` (n, 3, 32, 32) float32 in [0, 1], ``y`` (n,) int64, ``meta`` their origin.

    ``data[3]`` is the pair (x, y) of one example, ``data[:100]`` or a mask or index tensor gives ``Photographs`` again.
    """

    x: Tensor
    y: Tensor
    meta: dict[str, object] = field(default_factory=dict)

    __len__ = count
    __getitem__ = chosen


def cifar10(root: str | os.PathLike[str], split: Split = "train") -> Photographs:
    """CIFAR-10 in its binary format, 50,000 + 10,000 photographs; or other data in files of that format.

    ``root``: the folder with ``data_batch_1.bin`` ... ``data_batch_5.bin`` and ``test_batch.bin``, or one that has it
    as ``cifar-10-batches-bin/`` or ``cifar10/``; ``"env"`` reads the environment variable ``PULLBACK_DATA``. Of the
    training files those that are there are read, in order. None of it is embedded or downloaded.

    Raises ``InputError`` when the folder or the files are not there, ``FormatError`` when a file is damaged.
    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    >>> try:
    ...     cifar10("nowhere")
    ... except ValueError as error:
    ...     print(str(error)[:22])
    "nowhere" has no files
    """
    if split not in _FILES:
        raise InputError(f'split={split!r} was given. Expected "train" or "test".')
    if root == "env":
        root = os.environ.get(_ENVIRONMENT_VARIABLE) or root
    folder = Path(root)
    for place in (folder, folder / "cifar-10-batches-bin", folder / "cifar10"):
        files = [place / name for name in _FILES[split] if (place / name).is_file()]
        if files:
            break
    else:
        raise InputError(
            f'"{folder}" has no files {", ".join(_FILES[split])}, nor has its cifar-10-batches-bin/. Expected root=: '
            'the folder of CIFAR-10\'s binary version, or "env" to read it from '
            f"{_ENVIRONMENT_VARIABLE}; or use mnist(), which has embedded digits."
        )
    digest = hashlib.sha256()
    images, labels = [], []
    for file in files:
        data = np.frombuffer(file.read_bytes(), dtype=np.uint8)
        if not data.size or data.size % _RECORD:
            raise FormatError(
                f'"{file}" has {data.size} bytes. Expected a multiple of {_RECORD}: a label and 3 x 32 x 32 bytes for '
                "each image; fetch it again."
            )
        records = data.reshape(-1, _RECORD)
        if int(records[:, 0].max()) >= _CLASSES:
            raise FormatError(
                f'"{file}" has the label {int(records[:, 0].max())}. Expected 0 to {_CLASSES - 1}; is it CIFAR-100, '
                "which has two labels for each image?"
            )
        digest.update(data.tobytes())
        labels.append(torch.from_numpy(records[:, 0].astype(np.int64)))
        images.append(
            torch.from_numpy(records[:, 1:].reshape(-1, _CHANNELS, _SIDE, _SIDE).astype(np.float32) / 255)
        )
    meta: dict[str, object] = {
        "dataset": "cifar10",
        "split": split,
        "source": str(files[0].parent),
        "sha256": digest.hexdigest(),
    }
    return Photographs(torch.cat(images), torch.cat(labels), meta)
