"""Composites of layer-wise relevance propagation for convolutional networks: their linear part, as tuples of rules.

ReLU, max pooling, average pooling and sums need no rule here: in coefficient form their derivative is their rule
(winner takes all at a maximum, shares in proportion at a sum).

The rules z^B (ZBox), flat and w² for a first layer are left out on purpose. They give relevance to inputs that are
exactly zero, and no coefficient times zero does: relevance would be lost without a word wherever a pixel is black.
"""

from __future__ import annotations

from typing import Final

from ...core.overrides import Rule
from .linear import AlphaBeta, Epsilon, Gamma, MergedBatchNorm, ZPlus

__all__ = ["EPSILON", "EPSILON_ALPHA2_BETA1", "EPSILON_GAMMA", "EPSILON_PLUS"]

EPSILON: Final[tuple[Rule, ...]] = (Epsilon(), MergedBatchNorm())
"""The ε-rule in every linear layer (Bach et al. 2015)."""

EPSILON_PLUS: Final[tuple[Rule, ...]] = (
    ZPlus(applies_to="convolution"),
    Epsilon(applies_to="dense"),
    MergedBatchNorm(),
)
"""z⁺ in convolutions, ε in dense layers: LRP-CMP (Kohlbrenner et al. 2020)."""

EPSILON_ALPHA2_BETA1: Final[tuple[Rule, ...]] = (
    AlphaBeta(alpha=2.0, beta=1.0, applies_to="convolution"),
    Epsilon(applies_to="dense"),
    MergedBatchNorm(),
)
"""α2β1 in convolutions, ε in dense layers (Kohlbrenner et al. 2020)."""

EPSILON_GAMMA: Final[tuple[Rule, ...]] = (
    Gamma(gamma=0.25, applies_to="convolution"),
    Epsilon(applies_to="dense"),
    MergedBatchNorm(),
)
"""γ = 0.25 in convolutions, ε in dense layers (Montavon et al. 2019)."""
