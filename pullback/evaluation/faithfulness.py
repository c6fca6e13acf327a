"""Does the score follow what the attribution calls important? Deletion and insertion of ranked parts of the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn

from pullback.core.errors import InputError
from pullback.core.points import Point, map_leaves
from pullback.core.problem import Domain
from pullback.evaluation.imputation import Mask
from pullback.evaluation.ranking import Granularity, Ranking
from pullback.evaluation.removal import Attributions, removal, require_choice, scores_at
from pullback.evaluation.results import Direction, MetricResult
from pullback.evaluation.statistics import Interval, bootstrap_interval

__all__ = ["curve_intervals", "deletion", "insertion"]

Order = Literal["descending", "ascending"]
LEVELS = tuple(step / 20 for step in range(21))


def deletion(
    model: nn.Module | Callable[..., Any],
    x: Any,
    attribution: Attributions,
    *,
    target: Any = None,
    site: str | None = None,
    levels: Sequence[float] = LEVELS,
    order: Order = "descending",
    mask: Mask = None,
    granularity: Granularity = "pixel",
    ranking: Ranking = "signed",
    seed: int = 0,
    domain: Domain | None = None,
    chunk: int | str = "auto",
) -> MetricResult:
    """Deletion (pixel flipping): the mean score while the most relevant parts are removed first. Lower is better.

    ``curve[:, i]`` is the score with the first round(levels[i] · d) of the d ranked parts replaced by the mask;
    ``values`` (n,) the area under it by trapezoids over the range of the levels, so the mean height, in units of the
    score; ``details["clean"]`` (n,) the score of x itself.

    ``attribution``: of the shape of x (1 where shared), an object with ``.values``, whose target and site then are
    the defaults, or a callable (x, target) giving either. ``target``: as in ``explain``, for example
    ``Probability(3)``; None is the predicted class's logit. ``order="ascending"`` removes the least relevant
    first, and higher is better.
    ``mask``: None (zeros; the mask token or the mean embedding for text), "zeros", "mean", "blur", "noisy_linear"
    (``NoisyLinear``), a tensor, or a baseline object. ``granularity="pixel"`` removes channels together, ranked by
    their sum; "element" does not. ``ranking="absolute"`` ranks by |a|. Ties are broken at random, named by ``seed``
    and each example's content, so batch mates never matter. Padding of texts is not ranked.

    ``domain``: the parts are the coefficients of x there, such as ``Fourier("one")``, and the attribution is one to
    coefficients, as ``InDomain`` gives it. The mask is still a value at the site, whose coefficients fill in.

    Zeros on a black background remove nothing there: compare with another mask and with a random attribution.

    Raises ``InputError`` for shapes, values, levels or settings that do not fit; see ``pose`` for models and targets.
    Source: W. Samek et al., 2017 (pixel flipping); V. Petsiuk et al., RISE, BMVC 2018 (both areas).

    >>> net = nn.Linear(2, 1, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
    >>> deletion(net, torch.ones(1, 2), net.weight.detach(), levels=(0, 0.5, 1)).curve
    tensor([[4., 1., 0.]], dtype=torch.float64)
    """
    steps = _Steps(False, tuple(map(float, levels)), order, mask, granularity, ranking, seed, domain)
    return steps.measured(model, x, attribution, target, site, chunk)


def insertion(
    model: nn.Module | Callable[..., Any],
    x: Any,
    attribution: Attributions,
    *,
    target: Any = None,
    site: str | None = None,
    levels: Sequence[float] = LEVELS,
    order: Order = "descending",
    mask: Mask = None,
    granularity: Granularity = "pixel",
    ranking: Ranking = "signed",
    seed: int = 0,
    domain: Domain | None = None,
    chunk: int | str = "auto",
) -> MetricResult:
    """Insertion: the mean score while the most relevant parts are restored first to a masked input. Higher is better.

    ``curve[:, i]`` is the score where only the first round(levels[i] · d) of the d ranked parts are the input's own
    and the rest is the mask's. Everything else is as in ``deletion``; with ``order="ascending"`` it is deletion run
    backwards.

    Raises ``InputError`` as ``deletion`` does.
    Source: V. Petsiuk et al., RISE, BMVC 2018.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
    >>> insertion(net, torch.ones(1, 2), net.weight.detach(), levels=(0, 0.5, 1)).curve
    tensor([[0., 3., 4.]], dtype=torch.float64)
    """
    steps = _Steps(True, tuple(map(float, levels)), order, mask, granularity, ranking, seed, domain)
    return steps.measured(model, x, attribution, target, site, chunk)


def curve_intervals(result: MetricResult, level: float = 0.95, seed: int = 0) -> list[Interval]:
    """The mean of a result's curve over examples at each step, with its bootstrap interval.

    >>> x = torch.arange(8.0).reshape(4, 2)
    >>> len(curve_intervals(deletion(nn.Linear(2, 1), x, x, levels=(0, 0.5, 1))))
    3
    """
    if result.curve is None:
        raise InputError(f"The result {result.name!r} has no curve. Expected one of deletion or insertion.")
    return [bootstrap_interval(step, level=level, seed=seed) for step in result.curve.unbind(1)]


@dataclass(frozen=True, eq=False)
class _Steps:
    """What is removed or restored at each level, and by what it is replaced."""

    restore: bool
    levels: tuple[float, ...]
    order: Order
    mask: Mask
    granularity: Granularity
    ranking: Ranking
    seed: int
    domain: Domain | None

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in pairwise(self.levels))
        if len(self.levels) < 2 or not rising or not 0 <= self.levels[0] < self.levels[-1] <= 1:
            raise InputError(
                f"levels={self.levels} was given. Expected at least two rising fractions in [0, 1], such as "
                "(0, 0.25, 0.5, 1)."
            )
        require_choice("order", self.order, ("descending", "ascending"))

    def measured(
        self,
        model: Callable[..., Any],
        x: Any,
        attribution: Attributions,
        target: Any,
        site: str | None,
        chunk: int | str,
    ) -> MetricResult:
        removed = removal(
            model,
            x,
            attribution,
            target=target,
            site=site,
            chunk=chunk,
            mask=self.mask,
            granularity=self.granularity,
            ranking=self.ranking,
            seed=self.seed,
            domain=self.domain,
        )
        problem = removed.problem

        def masked(level: float) -> Point:
            first = removed.parts.elements(level, self.order)
            return removed.fill(map_leaves(torch.logical_not, first) if self.restore else first)

        curve = scores_at(problem, map(masked, self.levels))
        at = torch.tensor(self.levels, dtype=curve.dtype, device=curve.device)
        higher: Direction = "higher" if self.restore == (self.order == "descending") else "lower"
        return MetricResult(
            name="insertion" if self.restore else "deletion",
            values=torch.trapezoid(curve, at, dim=1) / (at[-1] - at[0]),
            direction=higher,
            curve=curve,
            params={
                "levels": list(self.levels),
                "order": self.order,
                "mask": removed.mask,
                "granularity": self.granularity,
                "ranking": self.ranking,
                "seed": self.seed,
                "site": problem.site,
                **({} if self.domain is None else {"domain": repr(self.domain)}),
            },
            details={"clean": problem.score()},
        )
