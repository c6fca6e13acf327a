"""Noise that depends on the seed and on the number of the draw, and on nothing else.

Each draw has a generator of its own, seeded by a hash, so batch mates, order, chunk, dtype and device cannot change
it and the global random state is never consumed. A longer draw of PyTorch's does not begin with the shorter one, and
draws depend on the dtype, hence float32, on the CPU, in one example's full shape, then cast and moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

__all__ = ["generator", "normal", "uniform"]


def generator(seed: int, draw: int, stream: str = "") -> torch.Generator:
    """A CPU generator for one draw. ``stream`` separates nested methods that share a seed."""
    digest = blake2b(f"{seed}/{draw}/{stream}".encode(), digest_size=8).digest()
    # manual_seed takes a signed 64-bit range
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(shape: Sequence[int], seed: int, draw: int, stream: str = "") -> Tensor:
    """Standard normal noise of one example's shape, float32 on the CPU.

    >>> torch.equal(normal((3,), seed=0, draw=5), normal((3,), seed=0, draw=5))
    True
    """
    return torch.randn(tuple(shape), generator=generator(seed, draw, stream), dtype=torch.float32)


def uniform(shape: Sequence[int], seed: int, draw: int, stream: str = "") -> Tensor:
    """Uniform noise on [0, 1) of one example's shape, float32 on the CPU."""
    return torch.rand(tuple(shape), generator=generator(seed, draw, stream), dtype=torch.float32)
