"""MNIST and Fashion-MNIST from IDX files; 5,000 real MNIST digits come with the package."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pullback.core.errors import FormatError, InputError
from pullback.datasets.examples import chosen, count
from pullback.datasets.idx import load_idx

__all__ = ["EMBEDDED", "Digits", "Split", "fashion_mnist", "mnist"]

Split = Literal["train", "test"]

EMBEDDED = Path(__file__).parent / "data"
"""The folder of the digits that come with the package: the first 4,000 of train, the first 1,000 of test."""

_EMBEDDED_COUNT = {"train": 4000, "test": 1000}
_STANDARD_PREFIX = {"train": "train", "test": "t10k"}
_ENVIRONMENT_VARIABLE = "PULLBACK_DATA"


@dataclass(frozen=True, eq=False)
class Digits:
    """Labelled images: ``x`` (n, 1, 28, 28) float32 in [0, 1], ``y`` (n,) int64, ``meta`` their origin.

    ``digits[3]`` is the pair (x, y) of one example, as a PyTorch ``DataLoader`` wants it; ``digits[:100]`` or
    a mask or index tensor gives ``Digits`` again.

    >>> digits = mnist(split="test")
    >>> len(digits), len(digits[:100]), int(digits[0][1])
    (1000, 100, 7)
    """

    x: Tensor
    y: Tensor
    meta: dict[str, object] = field(default_factory=dict)

    __len__ = count
    __getitem__ = chosen


def mnist(root: str | os.PathLike[str] | None = None, split: Split = "train") -> Digits:
    """Handwritten digits: 4,000 + 1,000 embedded ones, or the full 60,000 + 10,000 from IDX files.

    ``root=None``: the first 4,000 training or first 1,000 test images, which come with the package.
    ``root=path``: the four standard files, ``.gz`` or raw, in that folder, its ``mnist/`` or ``MNIST/raw/``.
    ``root="env"``: the folder named by the environment variable ``PULLBACK_DATA``.

    Raises ``InputError`` when the folder or the files are not there, ``FormatError`` when they are damaged.
    Source: Y. LeCun, C. Cortes, C. Burges, the MNIST database (CC BY-SA 3.0, see ``data/LICENSE-MNIST.md``).

    >>> digits = mnist()
    >>> tuple(digits.x.shape), digits.y[:5].tolist()
    ((4000, 1, 28, 28), [5, 0, 4, 1, 9])
    """
    _check_split(split)
    if root is None:
        stem = f"mnist-{split}-{_EMBEDDED_COUNT[split]}"
        return _digits(
            EMBEDDED / f"{stem}-images-idx3-ubyte.gz",
            EMBEDDED / f"{stem}-labels-idx1-ubyte.gz",
            {"dataset": "mnist", "split": split, "source": "embedded"},
        )
    way_out = "or leave root out for the embedded 4,000 + 1,000 digits"
    return _from_folder(root, split, "mnist", ("mnist", "MNIST/raw", "."), way_out)


def fashion_mnist(root: str | os.PathLike[str] | None = None, split: Split = "train") -> Digits:
    """Fashion-MNIST, ten kinds of clothing in the format of MNIST: 60,000 + 10,000 images from IDX files.

    ``root``: a folder with the four standard files, ``.gz`` or raw, directly, in its ``fashion-mnist/`` or in
    ``FashionMNIST/raw/``; ``"env"`` reads the environment variable ``PULLBACK_DATA``. None of it is embedded.

    Raises ``InputError`` when the folder or the files are not there, ``FormatError`` when they are damaged.
    Source: H. Xiao, K. Rasul, R. Vollgraf, arXiv 1708.07747 (MIT).

    >>> try:
    ...     fashion_mnist()
    ... except ValueError as error:
    ...     print(str(error)[:42])
    Fashion-MNIST does not come with pullback.
    """
    _check_split(split)
    way_out = "or use mnist(), which has embedded digits"
    if root is None:
        raise InputError(
            "Fashion-MNIST does not come with pullback. Expected root=: a folder with the four IDX files of "
            'github.com/zalandoresearch/fashion-mnist (data/fashion), or "env" to read it from '
            f"{_ENVIRONMENT_VARIABLE}; {way_out}."
        )
    return _from_folder(root, split, "fashion-mnist", ("fashion-mnist", "FashionMNIST/raw", "."), way_out)


def _check_split(split: str) -> None:
    if split not in _STANDARD_PREFIX:
        raise InputError(f'split={split!r} was given. Expected "train" or "test".')


def _from_folder(
    root: str | os.PathLike[str], split: Split, dataset: str, subfolders: tuple[str, ...], way_out: str
) -> Digits:
    if root == "env":
        value = os.environ.get(_ENVIRONMENT_VARIABLE)
        if not value:
            raise InputError(
                f'root="env" reads the environment variable {_ENVIRONMENT_VARIABLE}, which is not set. Set '
                f"it to the folder that holds {dataset}/, pass root=path, {way_out}."
            )
        root, origin = value, f"the environment variable {_ENVIRONMENT_VARIABLE}"
    else:
        origin = "root="
    folder = Path(root)
    if not folder.is_dir():
        raise InputError(
            f'"{folder}" (from {origin}) is not a folder. Expected the folder with the IDX files of '
            f"{dataset}; pass another root=, {way_out}."
        )
    prefix = _STANDARD_PREFIX[split]
    for subfolder in subfolders:
        images = _either(folder / subfolder / f"{prefix}-images-idx3-ubyte")
        labels = _either(folder / subfolder / f"{prefix}-labels-idx1-ubyte")
        if images is not None and labels is not None:
            return _digits(images, labels, {"dataset": dataset, "split": split, "source": str(images.parent)})
    places = ", ".join(f'"{folder / subfolder}"' for subfolder in subfolders)
    raise InputError(
        f"No {prefix}-images-idx3-ubyte and {prefix}-labels-idx1-ubyte (.gz or raw) in {places} (from "
        f"{origin}). Put the files there, pass another root=, {way_out}."
    )


def _either(raw: Path) -> Path | None:
    gzipped = raw.with_name(raw.name + ".gz")
    return next((path for path in (gzipped, raw) if path.is_file()), None)


def _digits(images: Path, labels: Path, meta: dict[str, object]) -> Digits:
    pixels, classes = load_idx(images), load_idx(labels)
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or tuple(pixels.shape[1:]) != (28, 28):
        raise FormatError(
            f'"{images}" holds {tuple(pixels.shape)} values of type {pixels.dtype}. Expected (n, 28, 28) of '
            "uint8."
        )
    if classes.ndim != 1 or classes.shape[0] != pixels.shape[0]:
        raise FormatError(
            f'"{labels}" holds {tuple(classes.shape)} labels for {pixels.shape[0]} images. Expected one per '
            "image; take both files from the same place."
        )
    sha256 = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    x = (pixels.to(torch.float32) / 255).unsqueeze(1)
    return Digits(x, classes.to(torch.int64), {**meta, "sha256": sha256})
