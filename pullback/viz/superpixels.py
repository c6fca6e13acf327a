"""Attributions summed over SLIC segments of the image."""

from __future__ import annotations

import torch
from torch import Tensor

from pullback.core.errors import InputError
from pullback.viz.drawing import as_array

__all__ = ["superpixel_sums"]


def superpixel_sums(
    values: Tensor, image: Tensor, segments: int, compactness: float
) -> tuple[Tensor, Tensor]:
    """Σ a over each pixel's segment (B, H, W), and the segments' labels (B, H, W), counted from 0 per image.

    ``values`` (B, C, H, W) or (B, H, W), ``image`` (B, C, H, W). SLIC: Achanta et al., TPAMI 2012.
    """
    if values.ndim not in (3, 4) or image.ndim != 4 or image.is_complex():
        raise InputError(
            f"superpixels needs values (B, C, H, W) or (B, H, W) and a real image (B, C, H, W); got values "
            f"{tuple(values.shape)} and image {tuple(image.shape)} {image.dtype}. Pass image=... ."
        )
    if image.shape[0] != values.shape[0] or image.shape[-2:] != values.shape[-2:]:
        raise InputError(
            f"Values {tuple(values.shape)} and image {tuple(image.shape)} differ in examples or size. "
            f"Try .upsample({tuple(image.shape[-2:])}, conserve=True) first."
        )
    maps = values.sum(1) if values.ndim == 4 else values
    labels = torch.stack([_slic(one, segments, compactness) for one in image]).to(values.device)
    flat = labels.flatten(1)
    totals = maps.new_zeros(len(maps), int(flat.max()) + 1).scatter_add(1, flat, maps.flatten(1))
    return totals.gather(1, flat).view_as(maps), labels


def _slic(image: Tensor, segments: int, compactness: float) -> Tensor:
    from skimage.segmentation import slic

    array = as_array(image)
    low, high = array.min(), array.max()
    unit = (
        (array - low) / (high - low) if high > low else array * 0
    )  # SLIC's compactness assumes a range of 1
    found = slic(
        unit,
        n_segments=segments,
        compactness=compactness,
        channel_axis=0,
        start_label=0,
        convert2lab=len(unit) == 3,
    )
    return torch.as_tensor(found, dtype=torch.long)
