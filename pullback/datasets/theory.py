"""Synthetic data in which it is known, example by example, which coordinates carry the label."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pullback.core.errors import InputError
from pullback.datasets.examples import chosen, count

__all__ = ["Signals", "block_signal", "signal_coordinates"]


@dataclass(frozen=True, eq=False)
class Signals:
    """Vectors with a signal at a known place.

    ``x`` (n, d) float32; ``y`` (n,) int64 in {0, 1}, for the signs -1 and +1; ``position`` (n, signals)
    int64, the signal's coordinates, or (n,) the signal's block; ``signal_mask`` (n, d) bool; ``meta`` the
    parameters and seed. ``signals[3]`` is a pair (x, y), ``signals[:100]`` or a mask or index tensor gives
    ``Signals`` again.
    """

    x: Tensor
    y: Tensor
    position: Tensor
    signal_mask: Tensor
    meta: dict[str, object] = field(default_factory=dict)

    __len__ = count
    __getitem__ = chosen


def block_signal(
    n: int,
    blocks: int = 10,
    block_size: int = 1,
    noise: float = 0.0,
    signal: Tensor | None = None,
    seed: int = 0,
) -> Signals:
    """The simplified BlockMNIST of the theory: blocks of numbers, one of which holds the signal.

    x is ``blocks`` blocks of ``block_size`` numbers. With s = ±1 a fair sign and j* uniform over the first
    half of the blocks: block j* is s·u + noise·g, every other block is noise·g, each g uniform in the unit
    ball. ``signal`` is u (block_size,), by default of norm 1. The second half of the blocks never carries the
    signal. For noise < 1 / (10·blocks) there is a max-margin network whose input gradient has the same norm
    on all blocks of the first half, wherever the signal is.

    Raises ``InputError`` for an odd number of blocks or parameters out of range.
    Source: H. Shah, P. Jain, P. Netrapalli, Do input gradients highlight discriminative features?, NeurIPS
    2021.

    >>> data = block_signal(100, blocks=10, block_size=3)
    >>> tuple(data.x.shape), int(data.position.max()), int(data.signal_mask.sum(1).unique())
    ((100, 30), 4, 3)
    """
    if n < 1 or block_size < 1 or noise < 0:
        raise InputError(
            f"n={n}, block_size={block_size}, noise={noise} was given. Expected n and block_size of at "
            "least 1 and noise of at least 0."
        )
    if blocks < 2 or blocks % 2:
        raise InputError(f"blocks={blocks} was given. Expected an even number, such as 10.")
    if signal is None:
        signal = torch.full((block_size,), 1 / math.sqrt(block_size))
    if signal.shape != (block_size,):
        raise InputError(
            f"A signal of shape {tuple(signal.shape)} was given. Expected ({block_size},), one block."
        )
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=generator)
    position = torch.randint(blocks // 2, (n,), generator=generator)
    direction = torch.randn(n, blocks, block_size, generator=generator)
    direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    radius = torch.rand(n, blocks, 1, generator=generator) ** (1 / block_size)
    carries = torch.arange(blocks) == position[:, None]
    sign = (2 * y - 1).float()
    x = noise * radius * direction + (sign[:, None] * carries)[:, :, None] * signal.float()
    mask = carries[:, :, None].expand(n, blocks, block_size)
    meta: dict[str, object] = {
        "n": n, "blocks": blocks, "block_size": block_size, "noise": noise, "signal": signal.tolist(),
        "seed": seed,
    }  # fmt: skip
    return Signals(x.flatten(1), y, position, mask.flatten(1).clone(), meta)


def signal_coordinates(
    n: int,
    dimensions: int,
    signals: int = 1,
    relevant: int | None = None,
    low: float = 1.0,
    high: float = 1.0,
    noise: float = 0.0,
    bias: float | None = None,
    seed: int = 0,
) -> Signals:
    """Vectors of ``dimensions`` numbers, a few of which, drawn anew for each example, carry the label.

    With s = ±1 a fair sign: ``signals`` coordinates, drawn without replacement among the first ``relevant``
    (all, by default), hold s times a size uniform in [low, high]; the rest is zero. Uniform noise in [-noise,
    noise] is added everywhere. ``bias``: with this probability coordinate 0 is among the carriers, else it is
    not; None draws evenly. ``relevant=dimensions // 2`` gives the theory's set, ``block_signal`` with blocks
    of one number.

    Raises ``InputError`` for parameters out of range.
    Source: the synthetic data of H. Shah, P. Jain, P. Netrapalli, NeurIPS 2021.

    >>> data = signal_coordinates(100, 10, relevant=5)
    >>> bool((data.x.abs().argmax(1) == data.position[:, 0]).all()), int(data.position.max())
    (True, 4)
    """
    relevant = dimensions if relevant is None else relevant
    if n < 1 or not 1 <= signals <= relevant <= dimensions:
        raise InputError(
            f"n={n}, signals={signals}, relevant={relevant}, dimensions={dimensions} was given. Expected n "
            "of at least 1 and 1 <= signals <= relevant <= dimensions."
        )
    if not 0 < low <= high or noise < 0:
        raise InputError(
            f"low={low}, high={high}, noise={noise} was given. Expected 0 < low <= high and noise of at "
            "least 0."
        )
    if bias is not None and (not 0 <= bias <= 1 or signals == relevant):
        raise InputError(
            f"bias={bias} with {signals} of {relevant} coordinates was given. Expected a probability, and "
            "at least one more relevant coordinate than signals; leave bias out to draw evenly."
        )
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=generator)
    # The places of the largest of independent uniform numbers are a draw without replacement.
    keys = torch.rand(n, relevant, generator=generator)
    if bias is not None:
        first = torch.rand(n, generator=generator) < bias
        keys[:, 0] = torch.where(first, 2.0, -1.0)
    position = keys.topk(signals, dim=1).indices.sort(dim=1).values
    size = low + (high - low) * torch.rand(n, signals, generator=generator)
    x = noise * (2 * torch.rand(n, dimensions, generator=generator) - 1)
    x = x.scatter_add(1, position, (2 * y - 1).float()[:, None] * size)
    mask = torch.zeros(n, dimensions, dtype=torch.bool).scatter(1, position, True)
    meta: dict[str, object] = {
        "n": n, "dimensions": dimensions, "signals": signals, "relevant": relevant, "low": low, "high": high,
        "noise": noise, "bias": bias, "seed": seed,
    }  # fmt: skip
    return Signals(x, y, position, mask, meta)
