"""One direction from the displacements of many pairs, and how well these agree on it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["agreement_of", "displacement", "principal_direction", "unit", "warn_of_disagreement"]

SMALLEST_AGREEMENT = 0.05


def principal_direction(rows: Tensor) -> tuple[Tensor, float]:
    """The unit vector that explains most of the rows' squares, turned towards their mean, and the share it explains.

    The first right singular vector of the (N, width) rows as they are: centring them would remove their mean, which is
    what the pairs have in common. Zeros for rows of zeros.

    >>> direction, explained = principal_direction(torch.tensor([[-2.0, 0.0], [-1.0, 0.0]]))
    >>> direction.tolist(), round(explained, 6)
    ([-1.0, 0.0], 1.0)
    """
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    if not bool(sizes[0] > 0):
        return torch.zeros_like(rows[0]), 0.0
    direction = directions[0]
    towards = rows.mean(0) @ direction
    if float(towards) < 0 or (float(towards) == 0 and float(direction[direction.abs().argmax()]) < 0):
        direction = -direction
    return direction + 0.0, float(sizes[0].square() / sizes.square().sum())


def displacement(rows: Tensor, halves: Sequence[Tensor], layer: int, aggregate: str) -> Tensor:
    """The direction at a block, as long as the mean displacement."""
    mean = rows[:, layer].mean(0)
    if not halves or aggregate == "mean":
        return mean
    principal = torch.stack([principal_direction(half[:, layer])[0] for half in halves]).sum(0)
    found: Tensor = unit(principal) * torch.linalg.vector_norm(mean)
    return found


def agreement_of(rows: Tensor, move: Tensor, layer: int) -> dict[str, float]:
    """How well the pairs agree at a block.

    "to_direction" is their mean cosine to the direction, "pairwise" to each other, "explained" the share of their
    squares along their first principal direction, "length" that of their mean, "alone" their mean length.
    """
    lengths = torch.linalg.vector_norm(rows, dim=1)
    moved = lengths > 0
    units = rows[moved] / lengths[moved, None]
    count = len(units)
    pairwise = float((units.sum(0).square().sum() - count) / (count * (count - 1))) if count > 1 else 1.0
    return {
        "block": layer,
        "to_direction": float((units @ unit(move)).mean()) if count else 0.0,
        "pairwise": pairwise,
        "explained": principal_direction(rows)[1],
        "length": float(torch.linalg.vector_norm(rows.mean(0))),
        "alone": float(lengths.mean()),
    }


def warn_of_disagreement(agreement: Sequence[Mapping[str, float]], count: int) -> None:
    best = max((each["pairwise"] for each in agreement), default=1.0)
    if count > 1 and best < SMALLEST_AGREEMENT:
        warnings.warn(
            f"the displacements of the {count} pairs hardly agree (mean cosine between them at most {best:.2f} in any "
            'block), so one direction will not do for all: look at provenance["agreement"], and evaluate on other '
            "pairs than these.",
            stacklevel=3,
        )


def unit(vector: Tensor) -> Tensor:
    """The vector at length 1; zeros stay zeros."""
    found: Tensor = vector / torch.linalg.vector_norm(vector).clamp_min(1e-300)
    return found
