"""BlockMNIST: a digit next to a block that says nothing, at a place that varies from image to image."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback.core.errors import InputError
from pullback.datasets.examples import chosen, count
from pullback.datasets.mnist import Digits, Split, mnist

__all__ = ["BlockMNIST", "block_mnist"]

Position = Literal["random", "top", "bottom"]
Null = Literal["box", "zeros", "mean", "noise", "scramble", "digit"]
Layout = Literal["vertical", "horizontal"]
Source: TypeAlias = str | os.PathLike[str] | Digits | tuple[Tensor, Tensor] | None

_SIZE = 28
_BOX_FIRST, _BOX_LAST = 4, 23


@dataclass(frozen=True, eq=False)
class BlockMNIST:
    """Images of a signal block and a null block, with the ground truth of where the signal is.

    ``x`` (n, 1, 56, 28) float32 in [0, 1]; ``y`` (n,) int64, the index into the chosen classes; ``position``
    (n,) int64, 0 where the signal is on top (left), 1 at the bottom (right); ``signal_mask`` bool in the
    shape of ``x``, True on the signal block; ``meta`` the source's sha256, the seed and the parameters.
    ``data[3]`` is a pair (x, y), ``data[:100]`` or a mask or index tensor gives ``BlockMNIST`` again.
    """

    x: Tensor
    y: Tensor
    position: Tensor
    signal_mask: Tensor
    meta: dict[str, object] = field(default_factory=dict)

    __len__ = count
    __getitem__ = chosen


def block_mnist(
    root_or_arrays: Source = None,
    split: Split = "train",
    classes: Sequence[int] = (0, 1),
    n: int | None = None,
    position: Position = "random",
    null: Null = "box",
    block: tuple[int, int] = (_SIZE, _SIZE),
    layout: Layout = "vertical",
    seed: int = 0,
) -> BlockMNIST:
    """BlockMNIST: every image is a digit (signal) and a null block, in an order drawn by a fair coin.

    ``root_or_arrays``: as ``root`` of ``mnist`` (None = the embedded digits), or ``Digits`` (Fashion-MNIST,
    say), or a pair (x (n, 28, 28) or (n, 1, 28, 28), uint8 or in [0, 1]; y (n,)). ``n``: the first n digits
    of the chosen ``classes`` in the order of the source; None = all. ``position``: "random", or the signal
    always first ("top", on the left in a horizontal layout) or second ("bottom"). ``block``: the size
    (height, width) of a block; other sizes than (28, 28) are area-averaged.

    ``null``: "box", the paper's: a square outline with corners (4, 4) and (23, 23) and its diagonals, one
    pixel wide (the published description gives no size); "zeros"; "mean", the pixel mean of the training
    images of these classes; "noise", uniform per image; "scramble", a random digit under one fixed
    permutation of pixels; "digit", a random digit of the classes left out (of any class, with a warning,
    where none is left out).

    Whether a digit goes on top depends on ``seed``, ``split`` and its place in the source only: another
    choice of classes, ``n`` or ``null`` leaves it there.

    Raises ``InputError`` for parameters out of range, and what ``mnist`` raises.
    Source: H. Shah, P. Jain, P. Netrapalli, Do input gradients highlight discriminative features?, NeurIPS
    2021.

    >>> data = block_mnist(split="test", classes=range(10))
    >>> tuple(data.x.shape), data.y[:4].tolist(), data.signal_mask.float().mean().item()
    ((1000, 1, 56, 28), [7, 2, 1, 0], 0.5)
    """
    classes = tuple(int(label) for label in classes)
    _check(classes, position, null, block, layout)
    source = _digits(root_or_arrays, split)
    index = torch.isin(source.y, torch.tensor(classes)).nonzero().squeeze(1)
    present = sorted(set(source.y.tolist()))
    absent = sorted(set(classes) - set(present))
    if absent:
        raise InputError(
            f"classes={classes} was given, but the source has no {absent}. Expected labels among {present}."
        )
    if n is not None:
        if not 1 <= n <= len(index):
            raise InputError(
                f"n={n} was given, but the {split} split of this source has {len(index)} digits of the "
                f"classes {classes}. Pass 1 to {len(index)}, more classes, or a root= with the full MNIST "
                '("env" or a path).'
            )
        index = index[:n]

    second = {"random": _coins(len(source), seed, split)[index], "top": 0, "bottom": 1}[position]
    second = torch.as_tensor(second).expand(len(index)).clone()
    signal = _resize(source.x[index], block)
    nothing = _null_blocks(null, source, root_or_arrays, split, classes, len(index), block, seed)
    flip = second.bool()[:, None, None, None]
    parts = (torch.where(flip, nothing, signal), torch.where(flip, signal, nothing))
    here = torch.ones_like(signal, dtype=torch.bool)
    dimension = 2 if layout == "vertical" else 3
    labels = (source.y[index, None] == torch.tensor(classes)).int().argmax(1)
    parameters: dict[str, object] = {
        "split": split, "classes": classes, "n": len(index), "position": position, "null": null,
        "block": block, "layout": layout,
    }  # fmt: skip
    meta = {"source": source.meta, "sha256": source.meta["sha256"], "seed": seed, "parameters": parameters}
    return BlockMNIST(
        x=torch.cat(parts, dimension),
        y=labels,
        position=second,
        signal_mask=torch.cat((here & ~flip, here & flip), dimension),
        meta=meta,
    )


def _null_blocks(
    null: Null,
    source: Digits,
    root_or_arrays: Source,
    split: Split,
    classes: tuple[int, ...],
    n: int,
    block: tuple[int, int],
    seed: int,
) -> Tensor:
    """The null blocks, (n, 1, height, width), or (1, 1, height, width) where all are the same."""
    if null == "zeros":
        return torch.zeros(1, 1, *block)
    if null == "box":
        return _resize(_box(), block)
    if null == "mean":
        loaded = isinstance(root_or_arrays, (Digits, tuple))
        train = source if loaded or split == "train" else _digits(root_or_arrays, "train")
        chosen = train.x[torch.isin(train.y, torch.tensor(classes))]
        return _resize(chosen.double().mean(0, keepdim=True).float(), block)
    generator = _generator(seed, null, split)
    if null == "noise":
        return torch.rand(n, 1, *block, generator=generator)
    pool = source.x
    if null == "digit":
        others = source.x[~torch.isin(source.y, torch.tensor(classes))]
        if len(others):
            pool = others
        else:
            warnings.warn(
                'null="digit" with every class of the source chosen: the null block may hold any of them, '
                'so with position="random" the label cannot be told from the image. Leave classes out, or '
                "fix "
                "position=.",
                UserWarning,
                stacklevel=3,
            )
    partners = _resize(pool[torch.randint(len(pool), (n,), generator=generator)], block)
    if null == "digit":
        return partners
    # One permutation for both splits: the test images must be scrambled as the training images were.
    order = torch.randperm(block[0] * block[1], generator=_generator(seed, "permutation", ""))
    return partners.flatten(1)[:, order].reshape(partners.shape)


def _box() -> Tensor:
    """A square outline and both its diagonals, in strokes of one pixel, (1, 1, 28, 28)."""
    image = torch.zeros(_SIZE, _SIZE)
    run = torch.arange(_BOX_FIRST, _BOX_LAST + 1)
    for edge in (_BOX_FIRST, _BOX_LAST):
        image[edge, run] = 1
        image[run, edge] = 1
    image[run, run] = 1
    image[run, run.flip(0)] = 1
    return image[None, None]


def _resize(images: Tensor, block: tuple[int, int]) -> Tensor:
    return images if tuple(images.shape[2:]) == block else F.interpolate(images, size=block, mode="area")


def _coins(count: int, seed: int, split: Split) -> Tensor:
    # Uniform numbers are drawn one after another, so the first k are the same for every count >= k.
    return (torch.rand(count, generator=_generator(seed, "position", split)) < 0.5).long()


def _generator(seed: int, stream: str, split: str) -> torch.Generator:
    digest = hashlib.sha256(f"block_mnist:{seed}:{stream}:{split}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _digits(root_or_arrays: Source, split: Split) -> Digits:
    if isinstance(root_or_arrays, Digits):
        x, y, meta = root_or_arrays.x, root_or_arrays.y, root_or_arrays.meta
    elif isinstance(root_or_arrays, tuple):
        (x, y), meta = root_or_arrays, {}
    else:
        return mnist(root_or_arrays, split)
    x = x.unsqueeze(1) if x.ndim == 3 else x
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    if x.ndim != 4 or tuple(x.shape[1:]) != (1, _SIZE, _SIZE) or y.shape != x.shape[:1] or not len(x):
        raise InputError(
            f"Images of shape {tuple(x.shape)} with labels of shape {tuple(y.shape)} were given. Expected "
            "(n, 28, 28) or (n, 1, 28, 28) with (n,)."
        )
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise InputError(
            f"Images with values from {x.min():g} to {x.max():g} were given. Expected [0, 1], or uint8; "
            "rescale them."
        )
    if "sha256" not in meta:
        meta = {**meta, "sha256": hashlib.sha256(x.detach().cpu().contiguous().numpy().tobytes()).hexdigest()}
    return Digits(x.detach().cpu(), y.long().cpu(), meta)


def _check(
    classes: tuple[int, ...], position: Position, null: Null, block: tuple[int, int], layout: Layout
) -> None:
    if not classes or len(set(classes)) < len(classes):
        raise InputError(
            f"classes={classes} was given. Expected distinct labels, such as (0, 1) or range(10)."
        )
    for name, value, allowed in (
        ("position", position, get_args(Position)),
        ("null", null, get_args(Null)),
        ("layout", layout, get_args(Layout)),
    ):
        if value not in allowed:
            raise InputError(f"{name}={value!r} was given. Expected one of {', '.join(map(repr, allowed))}.")
    if len(block) != 2 or min(block) < 1:
        raise InputError(f"block={block} was given. Expected (height, width) of one block, such as (28, 28).")
