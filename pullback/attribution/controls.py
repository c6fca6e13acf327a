"""Controls: maps that know nothing of the model. A method that does not beat them says nothing."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from ..core import noise
from ..core.errors import MethodError
from ..core.points import Point, map_leaves
from ..core.problem import Problem

__all__ = ["EdgeDetector", "RandomAttribution"]


@dataclass(frozen=True)
class RandomAttribution:
    """Standard normal noise that has nothing to do with the model.

    Keyed by the seed and each example's own content, so that examples differ and their order does not matter.

    Call:
        problem -> (B, *S), no units.

    Cost: none; the model is not run.

    Example:
        >>> import torch, pullback as pb
        >>> pb.explain(torch.nn.Linear(2, 1), torch.ones(1, 2), method=RandomAttribution()).values.shape
        torch.Size([1, 2])
    """

    seed: int = 0

    def __call__(self, problem: Problem) -> Point:
        free = problem.free

        def random(leaf: Tensor) -> Tensor:
            values = torch.zeros(leaf.shape, dtype=leaf.real.dtype, device=leaf.device)
            for number, row in enumerate(leaf):
                # padding neither receives attribution nor takes part in the key
                where = slice(None) if free is None else free[number].to(leaf.device)
                kept = row[where]
                values[number, where] = noise.normal(kept.shape, self.seed, 0, f"random/{content(kept)}").to(
                    values
                )
            return values

        return map_leaves(random, problem.point)


@dataclass(frozen=True)
class EdgeDetector:
    """The Sobel edge strength of the image itself (scikit-image), the same for every model and target.

    Call:
        problem -> (B, C, H, W) at an image input, or (B, C, T) for series; non-negative, units of the input.

    Raises:
        MethodError: the site has no spatial dimension.

    Cost: none; the model is not run.

    Source: Adebayo et al. 2018, section 4, where edge detectors pass for explanations.

    Example:
        >>> import torch, pullback as pb
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
        >>> float(pb.explain(net, torch.ones(1, 1, 4, 4), method=EdgeDetector()).values.max())
        0.0
    """

    def __call__(self, problem: Problem) -> Point:
        from skimage.filters import sobel

        def edges(leaf: Tensor) -> Tensor:
            if leaf.dim() < 3 or leaf.is_complex():
                raise MethodError(
                    f"EdgeDetector needs an image (B, C, H, W) or a series (B, C, T); {problem.site!r} is "
                    f"{tuple(leaf.shape)}."
                )
            planes = leaf.detach().flatten(0, 1).double().cpu().numpy()
            found = torch.stack([torch.as_tensor(sobel(plane)) for plane in planes])
            return found.reshape(leaf.shape).to(leaf)

        return map_leaves(edges, problem.point)


def content(row: Tensor) -> str:
    """A hash of one example's values, independent of its place in the batch and of its device."""
    data = row.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return blake2b(data, digest_size=8).hexdigest()
