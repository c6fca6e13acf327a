"""The metrics of the suites by name, and how each is asked of a method's maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.errors import InputError, nearest
from pullback.core.targets import Probability
from pullback.evaluation.complexity import entropy, gini
from pullback.evaluation.erasure import (
    comprehensiveness,
    faithfulness_correlation,
    faithfulness_estimate,
    monotonicity,
    sufficiency,
)
from pullback.evaluation.faithfulness import deletion, insertion
from pullback.evaluation.localization import leakage, pointing_game, relevance_mass, relevance_rank
from pullback.evaluation.randomization import parameter_randomization, random_logit
from pullback.evaluation.results import Direction, MetricResult
from pullback.evaluation.robustness import infidelity, sensitivity_max
from pullback.evaluation.suites.compared import Kind

__all__ = ["METRICS", "NEED_A_SIGNAL", "RETRAINING", "Maps", "measures", "names_of", "require_known"]

LEVELS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
NEED_A_SIGNAL = ("leakage", "null_share@0.1", "relevance_mass", "relevance_rank", "pointing_game")
# measured by training models anew on what maps keep, for all methods together
RETRAINING = ("diffroar", "roar", "mask_shape")
_MOST_PARTS = 64  # of a metric that asks the model for each part by itself


@dataclass(frozen=True, eq=False)
class Maps:
    """What a metric is given: maps of the predicted classes' logits, and the method that makes them again."""

    model: nn.Module
    x: Tensor
    target: Tensor
    values: Tensor
    method: Any
    kind: Kind
    signal: Tensor | None
    masks: tuple[str, ...]
    seed: int

    @property
    def ranking(self) -> Any:
        return "signed" if self.kind == "contribution" else "absolute"

    def contributions(self, mask: str) -> Tensor:
        """Rates as contributions of leaving the mask's value: a · (x - mask)."""
        if self.kind == "contribution":
            return self.values
        # at a mean mask it is the mean over places, for each channel
        gone = self.x.flatten(2).mean(2) if mask == "mean" and self.x.ndim > 2 else torch.zeros(())
        gone = gone.reshape(*gone.shape, *[1] * (self.x.ndim - gone.ndim)) if gone.ndim else gone
        return self.values * (self.x - gone)


Measured = Iterator[tuple[str, MetricResult]]


def _localized(metric: Callable[..., MetricResult], name: str) -> Callable[[Maps], Measured]:
    def measured(maps: Maps) -> Measured:
        assert maps.signal is not None
        yield name, metric(None, None, maps.values, signal_mask=maps.signal, reduce="abs")

    return measured


def _leakage(maps: Maps) -> Measured:
    assert maps.signal is not None
    found = leakage(None, None, maps.values, signal_mask=maps.signal)
    yield "leakage", found
    share = found.details["null_share@0.1"]
    yield "null_share@0.1", MetricResult("null_share@0.1", share, "lower")


def _removed(metric: Callable[..., MetricResult], name: str) -> Callable[[Maps], Measured]:
    def measured(maps: Maps) -> Measured:
        for mask in maps.masks:
            yield (
                f"{name}, {mask}",
                metric(
                    maps.model, maps.x, maps.values, target=Probability(maps.target), levels=LEVELS, mask=mask,
                    ranking=maps.ranking, seed=maps.seed,
                ),
            )  # fmt: skip

    return measured


def _road(maps: Maps) -> Measured:
    yield (
        "ROAD",
        deletion(
            maps.model, maps.x, maps.values, target=Probability(maps.target), levels=LEVELS, mask="noisy_linear",
            ranking=maps.ranking, seed=maps.seed,
        ),
    )  # fmt: skip


def _erased(metric: Callable[..., MetricResult], name: str) -> Callable[[Maps], Measured]:
    def measured(maps: Maps) -> Measured:
        for mask in maps.masks:
            yield (
                f"{name}, {mask}",
                metric(
                    maps.model, maps.x, maps.values, target=Probability(maps.target), mask=mask, ranking=maps.ranking,
                    seed=maps.seed,
                ),
            )  # fmt: skip

    return measured


def _correlation(maps: Maps) -> Measured:
    for mask in maps.masks:
        yield (
            f"faithfulness correlation, {mask}",
            faithfulness_correlation(
                maps.model,
                maps.x,
                maps.contributions(mask),
                target=maps.target,
                mask=mask,
                samples=50,
                seed=maps.seed,
            ),
        )


def _estimate(maps: Maps) -> Measured:
    for mask in maps.masks:
        yield (
            f"faithfulness estimate, {mask}",
            faithfulness_estimate(
                maps.model,
                maps.x,
                maps.contributions(mask),
                target=maps.target,
                mask=mask,
                groups=20,
                seed=maps.seed,
            ),
        )


def _monotonicity(maps: Maps) -> Measured:
    if maps.x[0].numel() > _MOST_PARTS:
        return
    yield (
        "monotonicity",
        monotonicity(
            maps.model, maps.x, maps.contributions("zeros"), target=maps.target, mask="zeros", seed=maps.seed
        ),
    )


def _infidelity(maps: Maps) -> Measured:
    units: Any = "gradient" if maps.kind == "rate" else "contribution"
    values = maps.values.expand_as(maps.x) / (maps.x.shape[1] if maps.values.shape != maps.x.shape else 1)
    found = infidelity(
        maps.model, maps.x, values, target=maps.target, perturbation="square", units=units, samples=50, scaled=True,
        seed=maps.seed,
    )  # fmt: skip
    # relative to a map of zeros, so that images with larger logits do not decide
    zero = found.details["zero"]
    share = torch.where(zero > 0, found.values / zero, torch.nan)
    yield "infidelity", MetricResult("infidelity", share, "lower")


def _sensitivity(maps: Maps) -> Measured:
    yield (
        "sensitivity",
        sensitivity_max(
            maps.model, maps.x, method=maps.method, target=maps.target, samples=4, seed=maps.seed
        ),
    )


def _randomization(maps: Maps) -> Measured:
    found = parameter_randomization(
        maps.model, maps.x, method=maps.method, target=maps.target, ranking=maps.ranking, seed=maps.seed
    )
    yield "parameter randomization", _size_of(found, found.values)
    # black pixels tie the ranks of whatever is multiplied by the input
    elsewhere = found.details["spearman_nonzero"][:, -1]
    yield "parameter randomization, x ≠ 0", _size_of(found, elsewhere)


def _size_of(found: MetricResult, values: Tensor) -> MetricResult:
    """A map that turns into its negative has not lost its dependence: the size of the correlation counts."""
    return MetricResult(found.name, values.abs(), "lower")


def _logit(maps: Maps) -> Measured:
    found = random_logit(
        maps.model, maps.x, method=maps.method, target=maps.target, ranking="signed", seed=maps.seed
    )
    yield "random logit", _size_of(found, found.values)


def _complexity(metric: Callable[..., MetricResult], name: str) -> Callable[[Maps], Measured]:
    def measured(maps: Maps) -> Measured:
        yield name, metric(None, None, maps.values)

    return measured


METRICS: Mapping[str, Callable[[Maps], Measured]] = {
    "leakage": _leakage,
    "relevance_mass": _localized(relevance_mass, "relevance mass"),
    "relevance_rank": _localized(relevance_rank, "relevance rank"),
    "pointing_game": _localized(pointing_game, "pointing game"),
    "deletion": _removed(deletion, "deletion"),
    "insertion": _removed(insertion, "insertion"),
    "road": _road,
    "comprehensiveness": _erased(comprehensiveness, "comprehensiveness"),
    "sufficiency": _erased(sufficiency, "sufficiency"),
    "faithfulness_correlation": _correlation,
    "faithfulness_estimate": _estimate,
    "monotonicity": _monotonicity,
    "infidelity": _infidelity,
    "sensitivity_max": _sensitivity,
    "parameter_randomization": _randomization,
    "random_logit": _logit,
    "entropy": _complexity(entropy, "entropy"),
    "gini": _complexity(gini, "Gini"),
}

_NAMES: Mapping[str, tuple[tuple[str, Direction], ...]] = {
    "leakage": (("leakage", "lower"), ("null_share@0.1", "lower")),
    "relevance_mass": (("relevance mass", "higher"),),
    "relevance_rank": (("relevance rank", "higher"),),
    "pointing_game": (("pointing game", "higher"),),
    "deletion": (("deletion, {mask}", "lower"),),
    "insertion": (("insertion, {mask}", "higher"),),
    "road": (("ROAD", "lower"),),
    "comprehensiveness": (("comprehensiveness, {mask}", "higher"),),
    "sufficiency": (("sufficiency, {mask}", "lower"),),
    "faithfulness_correlation": (("faithfulness correlation, {mask}", "higher"),),
    "faithfulness_estimate": (("faithfulness estimate, {mask}", "higher"),),
    "monotonicity": (("monotonicity", "higher"),),
    "infidelity": (("infidelity", "lower"),),
    "sensitivity_max": (("sensitivity", "lower"),),
    "parameter_randomization": (
        ("parameter randomization", "lower"),
        ("parameter randomization, x ≠ 0", "lower"),
    ),
    "random_logit": (("random logit", "lower"),),
    "entropy": (("entropy", "lower"),),
    "gini": (("Gini", "higher"),),
}


def measures(metric: str, maps: Maps) -> Measured:
    """The results of a metric, by the names they have in tables; none where it does not apply to the data."""
    return METRICS[metric](maps)


def names_of(metric: str, masks: tuple[str, ...], parts: int) -> list[tuple[str, Direction]]:
    """What ``measures`` would name, for the rows of a method that gave no maps."""
    if metric == "monotonicity" and parts > _MOST_PARTS:
        return []
    return [
        (name.format(mask=mask), direction)
        for name, direction in _NAMES[metric]
        for mask in (masks if "{mask}" in name else masks[:1])
    ]


def require_known(metrics: tuple[str, ...]) -> None:
    """Raises InputError for an unknown metric."""
    known = [*METRICS, *RETRAINING]
    unknown = [name for name in metrics if name not in known]
    if unknown:
        raise InputError(
            f"The metric {unknown[0]!r} was given. Expected some of {known}; nearest: {nearest(unknown[0], known)}."
        )
