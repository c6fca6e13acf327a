"""Weights of signals that each example brings along and that stay as they are: the mixture's domain."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...core.errors import InputError
from ...core.points import widest

__all__ = ["FixedParts", "require_kept"]


@dataclass(frozen=True, eq=False, repr=False)
class FixedParts:
    """How strongly each of an example's own parts is in it: ``x[t] = Σ_k weight[k] · part[k, t]``.

    Linear in the weights. Another value at the same example, such as a baseline, has the weights of least squares,
    and must be such a mixture: a value that is not is refused rather than explained as another.

    Args:
        name: the domain these parts come from, for texts.
        parts: (B, ..., K, T) the signals, one set per example.
        example: (B, ..., T) the values they come from, and ``weights`` (B, ..., K) how.
        names: (K) what the parts are called.

    Raises:
        InputError: a value is no mixture of the parts, or has another number of rows.
    """

    name: str
    parts: Tensor
    example: Tensor
    weights: Tensor
    names: tuple[str, ...]
    linear: ClassVar[bool] = True

    def analysis(self, x: Tensor) -> Tensor:
        if x.shape != self.example.shape:
            raise InputError(
                f"{self.name} holds the parts of values of shape {tuple(self.example.shape)}, got {tuple(x.shape)}."
            )
        found = least_squares(widest(x), widest(self.parts)).to(x.dtype)
        # what the parts were made from has the weights they came with, however alike the parts are
        same = (x == self.example).flatten(1).all(1).reshape(-1, *[1] * (x.dim() - 1))
        weights = torch.where(same, self.weights, found)
        require_kept(
            x,
            self.synthesis(weights),
            self.example,
            f"{self.name} sees a value as weights of the example's own {', '.join(self.names)}, and this one, "
            "such as a baseline, is no such mixture: {lost} of it would be lost. Take zeros, the example's own "
            "parts, or the domain with parts of full length, which represents every signal.",
        )
        return weights

    def synthesis(self, coefficients: Tensor) -> Tensor:
        return torch.einsum("...k,...kt->...t", coefficients, self.parts.to(coefficients.dtype))

    def rows(self, index: Tensor) -> FixedParts:
        """The same for these rows of the examples, repeated or left out."""
        at = index.to(self.parts.device)
        return replace(self, parts=self.parts[at], example=self.example[at], weights=self.weights[at])

    def labels(self, shape: torch.Size) -> list[str]:
        return list(self.names)

    def __repr__(self) -> str:
        return self.name


def least_squares(x: Tensor, parts: Tensor) -> Tensor:
    """The weights (..., K) for which Σ_k weight · part is nearest to x (..., T); the smallest where parts agree."""
    size = parts.norm(dim=-1, keepdim=True)
    size = torch.where(size > 0, size, torch.ones_like(size))
    inverse: Tensor = torch.linalg.pinv(parts / size)  # (..., T, K)
    return torch.einsum("...t,...tk->...k", x, inverse) / size.squeeze(-1)


def require_kept(x: Tensor, again: Tensor, scale: Tensor, text: str) -> None:
    """Raise InputError with ``text``, {lost} filled in, where synthesis does not give an example's value back.

    The bound is √eps of the largest element of the example and of ``scale`` (B or 1, ...), since errors of least
    squares grow with the parts' likeness.
    """
    lost = _largest(x - again)
    largest = torch.maximum(torch.maximum(_largest(x), _largest(again)), _largest(scale))
    wrong = lost > torch.finfo(x.dtype).eps ** 0.5 * largest
    if bool(wrong.any()):
        raise InputError(text.format(lost=f"{100 * float((lost / largest)[wrong].max()):.2g} %"))


def _largest(x: Tensor) -> Tensor:
    return x.abs().flatten(1).amax(1)
