"""Similarity of two maps per example: Pearson, Spearman, cosine, SSIM, on rows of a batch at once."""

from __future__ import annotations

import torch
from torch import Tensor

from pullback.core.errors import InputError

__all__ = ["average_ranks", "cosine", "pearson", "spearman", "structural_similarity"]

_WINDOW = 7


def pearson(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """Pearson's correlation of rows (n, d), over the entries where it is true: (n,); NaN where either is constant.

    >>> round(float(pearson(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[6.0, 4.0, 2.0]]))), 9)
    -1.0
    """
    a, b = a.double(), b.double()
    keep = torch.ones_like(a, dtype=torch.bool) if where is None else where
    count = keep.sum(1, keepdim=True)
    a, b = (torch.where(keep, each, 0.0) for each in (a, b))
    flat = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    centred = []
    for each in (a, b):
        mean = each.sum(1, keepdim=True) / count
        off = torch.where(keep, each - mean, 0.0)
        # what is left of equal numbers after subtracting their mean is rounding, not variation
        flat = flat | (off.abs().amax(1) <= 1e-12 * each.abs().amax(1))
        centred.append(off)
    a, b = centred
    correlation: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return correlation.masked_fill(flat, torch.nan).clamp(-1, 1)


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along rows (n, d), ties sharing the mean of theirs.

    >>> average_ranks(torch.tensor([[3.0, 1.0, 3.0]]))
    tensor([[2.5000, 1.0000, 2.5000]], dtype=torch.float64)
    """
    values = values.contiguous()
    ordered = values.sort(1).values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to + 1).double() / 2


def spearman(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """Spearman's rank correlation of rows (n, d), over the entries where it is true: (n,); NaN where constant."""
    if where is not None:
        # behind all others, the ones left out do not change their ranks
        a, b = (each.masked_fill(~where, torch.inf) for each in (a, b))
    return pearson(average_ranks(a), average_ranks(b), where)


def cosine(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """The cosine of the angle between rows (n, d): (n,); NaN where either is zero."""
    a, b = a.double(), b.double()
    if where is not None:
        a, b = (torch.where(where, each, 0.0) for each in (a, b))
    # scaled first, so that squares of tiny gradients do not vanish
    a, b = (each / each.abs().amax(1, keepdim=True) for each in (a, b))
    angle: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return angle.clamp(-1, 1)


def structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of maps (n, C, H, W), each first divided by its largest magnitude: (n,); NaN where one is constant.

    scikit-image with its window of 7 pixels, the mean over channels. Raises InputError for smaller or other maps.
    """
    from skimage.metrics import structural_similarity as ssim

    if a.ndim != 4 or min(a.shape[2:]) < _WINDOW:
        raise InputError(
            f'similarity="ssim" was given for attributions of shape {tuple(a.shape)}. Expected images (n, C, H, W) of '
            f'at least {_WINDOW} x {_WINDOW} pixels; use similarity="spearman".'
        )
    found = []
    for pair in zip(a, b, strict=True):
        maps = [each.detach().cpu().double() for each in pair]
        if any(float(each.max()) == float(each.min()) for each in maps):
            found.append(torch.nan)
            continue
        first, second = ((each / each.abs().max()).numpy() for each in maps)
        span = max(first.max(), second.max()) - min(first.min(), second.min())
        found.append(float(ssim(first, second, channel_axis=0, data_range=float(span))))
    return torch.tensor(found, dtype=torch.float64, device=a.device)
