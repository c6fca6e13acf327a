"""Does the score follow what the attribution calls important? Deletion and insertion of ranked parts of the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pullback.attribution.baselines import Baseline, Given, baseline_point, default_baseline
from pullback.attribution.spelling import parse_baseline
from pullback.core.errors import InputError, MethodError
from pullback.core.points import Point, map_leaves
from pullback.core.pose import pose
from pullback.core.problem import Domain, Problem
from pullback.evaluation.imputation import NoisyLinear
from pullback.evaluation.ranking import Granularity, Ranking, ranked_parts, relevance_at
from pullback.evaluation.results import Direction, MetricResult
from pullback.evaluation.statistics import Interval, bootstrap_interval

__all__ = ["curve_intervals", "deletion", "insertion"]

Order = Literal["descending", "ascending"]
# A tensor, a dict of tensors by input leaf, a result with .values, or a callable (x, target) giving one of these.
Attributions: TypeAlias = Any
Mask: TypeAlias = "str | Tensor | float | Baseline | NoisyLinear | None"

_CHOICES = {
    "order": ("descending", "ascending"),
    "granularity": ("pixel", "element"),
    "ranking": ("signed", "absolute"),
}
LEVELS = tuple(step / 20 for step in range(21))
# Levels are scored together up to about this many rows, so that a few examples do not mean many small forwards.
_ROWS = 256


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
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name}={getattr(self, name)!r} was given. Expected {' or '.join(map(repr, known))}."
                )

    def measured(
        self,
        model: Callable[..., Any],
        x: Any,
        attribution: Attributions,
        target: Any,
        site: str | None,
        chunk: int | str,
    ) -> MetricResult:
        _require_domain(attribution, self.domain)
        mask = _imputation(self.mask)
        if isinstance(mask, NoisyLinear) and self.domain is not None:
            raise InputError(
                'mask="noisy_linear" was given with a domain. It fills in pixels from their neighbours; take another '
                'mask, such as "zeros".'
            )
        problem = pose(
            model,
            x,
            target=_explained(attribution) if target is None else target,
            site=getattr(attribution, "site", None) if site is None else site,
            chunk=chunk,
        )
        mask = default_baseline(problem) if mask is None else mask
        if self.domain is not None:
            problem = problem.in_domain(self.domain)
        relevance = relevance_at(attribution, x, problem)
        parts = ranked_parts(relevance, problem, self.granularity, self.ranking, self.seed)
        fill = _filling(mask, problem)

        def masked(level: float) -> Point:
            first = parts.elements(level, self.order)
            return fill(map_leaves(torch.logical_not, first) if self.restore else first)

        together = max(1, _ROWS // problem.batch)
        scores = []
        for start in range(0, len(self.levels), together):
            points = [masked(level) for level in self.levels[start : start + together]]
            rows = map_leaves(lambda *each: torch.cat(each), *points)
            scores.append(problem.score(rows).reshape(len(points), problem.batch))
        curve = torch.cat(scores).T.contiguous()
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
                "mask": repr(mask),
                "granularity": self.granularity,
                "ranking": self.ranking,
                "seed": self.seed,
                "site": problem.site,
                **({} if self.domain is None else {"domain": repr(self.domain)}),
            },
            details={"clean": problem.score()},
        )


def _explained(attribution: Attributions) -> Tensor | None:
    """The class indices that a result says it explains."""
    target = getattr(attribution, "target", None)
    if target is None or isinstance(target, Tensor):
        return target
    raise InputError(
        f"The attribution explains {target[0]!r}, which is no class index. Expected the target it was made for: "
        "target=..."
    )


def _require_domain(attribution: Attributions, domain: Domain | None) -> None:
    """A result knows the domain of its values; tensors and callables are taken at their shape."""
    if not hasattr(attribution, "domain"):
        return
    have, want = attribution.domain, None if domain is None else repr(domain)
    if have != want:
        values = "at the site itself" if have is None else f"in the domain {have}"
        raise InputError(
            f"An attribution {values} was given, with domain={want}. Expected one in the domain that is named: explain "
            "with InDomain(domain, method) and pass the same domain here, or neither."
        )


def _imputation(mask: Mask) -> Baseline | NoisyLinear | None:
    if isinstance(mask, str):
        if mask.strip().lower() == "noisy_linear":
            return NoisyLinear()
        try:
            return parse_baseline(mask)  # type: ignore[no-any-return]
        except MethodError as error:
            raise MethodError(f'{error} Or "noisy_linear".') from None
    if isinstance(mask, (Tensor, int, float)):
        return Given(torch.as_tensor(mask))
    if mask is None or isinstance(mask, NoisyLinear) or (callable(mask) and not isinstance(mask, type)):
        return mask
    raise InputError(
        f'A mask of type {type(mask).__name__} was given. Expected "zeros", "mean", "blur", "noisy_linear", a tensor, '
        "or a baseline object such as Blur(5.0)."
    )


def _filling(mask: Baseline | NoisyLinear, problem: Problem) -> Callable[[Point], Point]:
    """What gives the point with the removed elements, True in its argument, replaced."""
    if isinstance(mask, NoisyLinear):
        return lambda removed: map_leaves(mask.fill, problem.point, removed)
    reference = baseline_point(mask, problem)
    return lambda removed: map_leaves(torch.where, removed, reference, problem.point)
