"""How concentrated is an attribution? Entropy and the Gini index, which know nothing of the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pullback.evaluation.localization import Attributions, attribution_values
from pullback.evaluation.results import MetricResult, flagged

__all__ = ["entropy", "gini"]

_DEAD = "the attribution is zero everywhere; has the model collapsed?"


def entropy(
    model: nn.Module | Callable[[Tensor], Tensor] | None,
    x: Tensor | None,
    attribution: Attributions,
    *,
    target: Tensor | None = None,
) -> MetricResult:
    """Complexity: the entropy of the magnitudes, −Σ p ln p with p = |a| / Σ|a|, in nats. Lower is simpler.

    ``values`` (n,), from 0 (one element) to ln d (all alike). ``attribution``, ``x`` and ``model`` as in ``leakage``.
    NaN, and warned of, for an all-zero attribution. It says nothing of faithfulness: one random pixel scores best.

    Raises ``InputError`` for shapes that do not fit and values that are not finite.
    Source: U. Bhatt, A. Weller, J. Moura, Evaluating and Aggregating Feature-based Model Explanations, IJCAI 2020.

    >>> round(entropy(None, None, torch.tensor([[1.0, -1.0, 0.0, 0.0]])).mean(), 4)
    0.6931
    """
    size = attribution_values(model, x, attribution, target).detach().flatten(1).double().abs()
    share = size / size.sum(1, keepdim=True)
    values = -torch.special.xlogy(share, share).sum(1)
    return MetricResult("entropy", flagged("entropy", values, size.sum(1) == 0, _DEAD), "lower")


def gini(
    model: nn.Module | Callable[[Tensor], Tensor] | None,
    x: Tensor | None,
    attribution: Attributions,
    *,
    target: Tensor | None = None,
) -> MetricResult:
    """Sparseness: the Gini index of the magnitudes, Σ_i (2i − d − 1) |a|_(i) / (d Σ|a|). Higher is sparser.

    |a|_(i) are in rising order. ``values`` (n,), from 0 (all alike) to 1 − 1/d (one element). ``attribution``, ``x``
    and ``model`` as in ``leakage``. NaN, and warned of, for an all-zero attribution. It says nothing of faithfulness.

    Raises ``InputError`` for shapes that do not fit and values that are not finite.
    Source: P. Chalasani et al., Concise Explanations of Neural Networks using Adversarial Training, ICML 2020.

    >>> gini(None, None, torch.tensor([[0.0, 0.0, 0.0, -2.0]])).mean()
    0.75
    """
    size = attribution_values(model, x, attribution, target).detach().flatten(1).double().abs()
    count = size.shape[1]
    weight = 2 * torch.arange(1, count + 1, device=size.device) - count - 1
    values = (size.sort(1).values * weight).sum(1) / (count * size.sum(1))
    return MetricResult("gini", flagged("gini", values, size.sum(1) == 0, _DEAD), "higher")
