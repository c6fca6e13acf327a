"""Parts of a point, removed: what deletion, insertion and the correlations of faithfulness have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pullback.attribution.baselines import default_baseline
from pullback.core.errors import InputError
from pullback.core.points import Point, leaves, map_leaves
from pullback.core.pose import pose
from pullback.core.problem import Domain, Problem
from pullback.evaluation.imputation import Mask, NoisyLinear, filling, parsed_mask
from pullback.evaluation.ranking import Granularity, PartRanks, Ranking, ranked_parts, relevance_at

__all__ = ["Attributions", "Removal", "posed", "removal", "rows_together", "scores_at"]

# A tensor, a dict of tensors by input leaf, a result with .values, or a callable (x, target) giving one of these.
Attributions: TypeAlias = Any
# Points are scored together up to about this many rows, so that a few examples do not mean many small forwards.
_ROWS = 256


@dataclass(frozen=True, eq=False)
class Removal:
    """A problem whose parts are ranked by an attribution, and what a removed part becomes."""

    problem: Problem
    parts: PartRanks
    fill: Callable[[Point], Point]
    mask: str

    def scores_without(self, removed: Iterable[Tensor]) -> Tensor:
        """The scores with each of the given sets of parts, bool (B, P), removed: (B, sets)."""
        return scores_at(self.problem, (self.fill(self.parts.spread(each)) for each in removed))

    def ineffective(self) -> Tensor:
        """(B,) where there is nothing to remove: no parts, or a mask that says what the input says already."""
        everything = torch.ones_like(self.parts.rank, dtype=torch.bool)
        masked, point = self.fill(self.parts.spread(everything)), self.problem.point
        same = [(a == b).reshape(len(a), -1) for a, b in zip(leaves(masked), leaves(point), strict=True)]
        free = leaves(self.parts.spread(self.parts.ranked()))
        kept = [each | ~which.reshape(len(which), -1) for each, which in zip(same, free, strict=True)]
        return torch.stack([each.all(1).to(self.problem.device) for each in kept]).all(0)


def require_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise InputError where a setting is not one of the known words."""
    if value not in known:
        raise InputError(f"{name}={value!r} was given. Expected {' or '.join(map(repr, known))}.")


def removal(
    model: Callable[..., Any],
    x: Any,
    attribution: Attributions,
    target: Any,
    site: str | None,
    chunk: int | str,
    mask: Mask,
    granularity: Granularity,
    ranking: Ranking,
    seed: int,
    domain: Domain | None = None,
) -> Removal:
    """Pose the problem, rank the parts, and prepare the mask. Raises InputError for what does not fit."""
    require_choice("granularity", granularity, ("pixel", "element"))
    require_choice("ranking", ranking, ("signed", "absolute"))
    _require_domain(attribution, domain)
    filler = parsed_mask(mask)
    if isinstance(filler, NoisyLinear) and domain is not None:
        raise InputError(
            'mask="noisy_linear" was given with a domain. It fills in pixels from their neighbours; take another '
            'mask, such as "zeros".'
        )
    problem = posed(model, x, attribution, target=target, site=site, chunk=chunk)
    filler = default_baseline(problem) if filler is None else filler
    if domain is not None:
        problem = problem.in_domain(domain)
    parts = ranked_parts(relevance_at(attribution, x, problem), problem, granularity, ranking, seed)
    return Removal(problem, parts, filling(filler, problem), repr(filler))


def posed(
    model: Callable[..., Any],
    x: Any,
    attribution: Attributions,
    *,
    target: Any,
    site: str | None,
    chunk: int | str,
) -> Problem:
    """The problem that an attribution is about: its own target and site where none are given."""
    return pose(
        model,
        x,
        target=_explained(attribution) if target is None else target,
        site=getattr(attribution, "site", None) if site is None else site,
        chunk=chunk,
    )


def rows_together(problem: Problem) -> int:
    """How many points of the problem's batch are worth evaluating at once; the chunk of the problem divides them."""
    return max(1, _ROWS // problem.batch)


def scores_at(problem: Problem, points: Iterable[Point]) -> Tensor:
    """The scores at several points, each of the problem's batch: (B, points)."""
    together, waiting = rows_together(problem), iter(points)
    scores = []
    while some := list(islice(waiting, together)):
        rows = map_leaves(lambda *each: torch.cat(each), *some)
        scores.append(problem.score(rows).reshape(len(some), problem.batch))
    return torch.cat(scores).T.contiguous()


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
