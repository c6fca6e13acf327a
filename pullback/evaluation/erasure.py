"""Does the score fall as far as the attribution says? Single parts, sets of parts and tokens, removed or kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pullback.attribution.baselines import Uniform
from pullback.attribution.paths import require_count
from pullback.core import noise
from pullback.core.errors import InputError
from pullback.core.points import map_leaves
from pullback.evaluation.correlation import pearson, spearman
from pullback.evaluation.imputation import Mask
from pullback.evaluation.ranking import Granularity, Ranking
from pullback.evaluation.removal import Attributions, Removal, removal, scores_at
from pullback.evaluation.results import Direction, MetricResult, flagged

__all__ = [
    "comprehensiveness",
    "faithfulness_correlation",
    "faithfulness_estimate",
    "monotonicity",
    "sufficiency",
]

Definition = Literal["arya", "nguyen"]
Model = nn.Module | Callable[..., Any]

FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)
_INEFFECTIVE = "removing everything leaves the input as it is, so choose another mask"
_ORDERLESS = "the attribution is constant, so it ranks nothing; has the model collapsed?"
_CONSTANT = "the attribution, or the score whatever is removed, is constant; has the model collapsed?"


def comprehensiveness(
    model: Model,
    x: Any,
    attribution: Attributions,
    *,
    target: Any = None,
    site: str | None = None,
    fractions: Sequence[float] = FRACTIONS,
    mask: Mask = None,
    granularity: Granularity = "pixel",
    ranking: Ranking = "signed",
    seed: int = 0,
    chunk: int | str = "auto",
) -> MetricResult:
    """Comprehensiveness: how far the score falls without the most relevant parts (tokens). Higher is better.

    ``values`` (n,): the mean over fractions q of f(x) − f(x without the top q), each at least one part; ``curve``
    (n, fractions) the falls, in units of the score; ``details["clean"]`` (n,) f(x).

    Arguments as in ``deletion``; published with ``target=Probability()``. At tokens the mask token, or the mean
    embedding, stands for a removed one, since taking it out would move the rest. NaN, and warned of, where the mask
    is the input itself.

    Raises ``InputError`` for shapes, values, fractions or settings that do not fit.
    Source: J. DeYoung et al., ERASER, ACL 2020.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
    >>> comprehensiveness(net, torch.ones(1, 2), net.weight.detach(), fractions=(0.5,)).mean()
    3.0
    """
    removed = removal(model, x, attribution, target, site, chunk, mask, granularity, ranking, seed)
    return _erased(
        "comprehensiveness", removed, fractions, kept=False, granularity=granularity, ranking=ranking
    )


def sufficiency(
    model: Model,
    x: Any,
    attribution: Attributions,
    *,
    target: Any = None,
    site: str | None = None,
    fractions: Sequence[float] = FRACTIONS,
    mask: Mask = None,
    granularity: Granularity = "pixel",
    ranking: Ranking = "signed",
    seed: int = 0,
    chunk: int | str = "auto",
) -> MetricResult:
    """Sufficiency: how far the score falls when only the most relevant parts (tokens) are left. Lower is better.

    ``values`` (n,): the mean over fractions q of f(x) − f(the top q alone), each at least one part. Everything else is
    as in ``comprehensiveness``.

    Raises ``InputError`` as ``comprehensiveness`` does.
    Source: J. DeYoung et al., ERASER, ACL 2020.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
    >>> sufficiency(net, torch.ones(1, 2), net.weight.detach(), fractions=(0.5,)).mean()
    1.0
    """
    removed = removal(model, x, attribution, target, site, chunk, mask, granularity, ranking, seed)
    return _erased("sufficiency", removed, fractions, kept=True, granularity=granularity, ranking=ranking)


def faithfulness_correlation(
    model: Model,
    x: Any,
    attribution: Attributions,
    *,
    target: Any = None,
    site: str | None = None,
    subset: float = 0.2,
    samples: int = 100,
    mask: Mask = None,
    granularity: Granularity = "pixel",
    seed: int = 0,
    chunk: int | str = "auto",
) -> MetricResult:
    """Faithfulness correlation: of the relevance of random sets of parts with what they do to the score.

    ``values`` (n,): Pearson's correlation over random sets S of (Σ_S a, f(x) − f(x without S)), in [−1, 1]. Higher is
    better; noise gets 0. ``attribution`` is to be a contribution, such as gradient times input: a plain gradient is
    another quantity.

    ``subset``: the share of parts in each set (at least one). ``samples``: how many sets, one forward each per example.
    Sets are drawn by ``seed``; examples share them. Further arguments as in ``deletion``. NaN, and warned of, where
    either side is constant (a constant map, a dead model) or the mask is the input itself.

    Raises ``InputError`` for shapes, values or settings that do not fit.
    Source: U. Bhatt, A. Weller, J. Moura, Evaluating and Aggregating Feature-based Model Explanations, IJCAI 2020.

    >>> net, x = nn.Linear(4, 1), torch.arange(1.0, 5.0)[None]
    >>> round(faithfulness_correlation(net, x, net.weight.detach() * x).mean(), 4)
    1.0
    """
    if not 0 < subset < 1:
        raise InputError(f"subset={subset} was given. Expected a share of the parts between 0 and 1.")
    require_count("samples", samples)
    removed = removal(model, x, attribution, target, site, chunk, mask, granularity, "signed", seed)
    sums: list[Tensor] = []

    def sets() -> Iterator[Tensor]:
        size = (subset * removed.parts.count).round().clamp_min(1)[:, None]
        for draw in range(samples):
            order = _shuffled(removed, seed, draw).argsort(1).argsort(1)
            chosen = (order < size) & removed.parts.ranked()
            sums.append((removed.parts.relevance * chosen).sum(1))
            yield chosen

    falls = removed.problem.score()[:, None] - removed.scores_without(sets())
    params = {"subset": subset, "samples": samples, "seed": seed, **_record(removed, granularity)}
    return _correlated("faithfulness_correlation", torch.stack(sums, 1), falls, removed, params)


def faithfulness_estimate(
    model: Model,
    x: Any,
    attribution: Attributions,
    *,
    target: Any = None,
    site: str | None = None,
    groups: int | None = None,
    mask: Mask = None,
    granularity: Granularity = "pixel",
    seed: int = 0,
    chunk: int | str = "auto",
) -> MetricResult:
    """Faithfulness estimate: the correlation of each part's relevance with the fall of the score without it.

    ``values`` (n,): Pearson's correlation over parts i of (a_i, f(x) − f(x without i)), in [−1, 1]. Higher is better.
    ``groups``: remove parts in so many groups of neighbours in rank, compared by their mean relevance and mean fall;
    None is the published one, each part by itself, at one forward per part and example. Further arguments, and what is
    NaN, as in ``faithfulness_correlation``.

    Raises ``InputError`` for shapes, values or settings that do not fit.
    Source: D. Alvarez-Melis, T. Jaakkola, Towards Robust Interpretability with Self-Explaining Networks, NeurIPS 2018.

    >>> net, x = nn.Linear(4, 1), torch.arange(1.0, 5.0)[None]
    >>> round(faithfulness_estimate(net, x, -net.weight.detach() * x).mean(), 4)
    -1.0
    """
    if groups is not None:
        require_count("groups", groups)
    removed = removal(model, x, attribution, target, site, chunk, mask, granularity, "signed", seed)
    parts, count = removed.parts, removed.parts.count[:, None]
    number = parts.rank.shape[1] if groups is None else min(groups, parts.rank.shape[1])
    # ranks 0 ... count-1 in `number` groups that differ by one part at most
    group = (parts.rank * torch.clamp(count, max=number) / count).floor()
    members = [(group == each) & parts.ranked() for each in range(number)]
    sizes = torch.stack([each.sum(1) for each in members], 1)
    sums = torch.stack([(parts.relevance * each).sum(1) for each in members], 1)
    falls = removed.problem.score()[:, None] - removed.scores_without(members)
    params = {"groups": groups, "seed": seed, **_record(removed, granularity)}
    # an example shorter than its batch mates has fewer groups; the rest is empty
    several = sizes.clamp_min(1)
    return _correlated("faithfulness_estimate", sums / several, falls / several, removed, params, sizes > 0)


def monotonicity(
    model: Model,
    x: Any,
    attribution: Attributions,
    *,
    target: Any = None,
    site: str | None = None,
    definition: Definition = "arya",
    samples: int = 10,
    mask: Mask = None,
    granularity: Granularity = "pixel",
    seed: int = 0,
    chunk: int | str = "auto",
) -> MetricResult:
    """Monotonicity of the score in the parts, by one of two definitions. Higher is better.

    "arya": parts are restored to a masked input, the least relevant (signed) first; ``values`` (n,) is the share of
    steps that do not lower the score, ``details["monotone"]`` 1 where none does (the published one), ``curve``
    (n, parts + 1) the scores, NaN beyond an example's own parts.
    "nguyen": ``values`` (n,) is Spearman's correlation over parts of |a_i| with E[(f(x) − f(x with part i random))²],
    over ``samples`` uniform draws from each example's range; ``curve`` (n, parts) the expectations. No mask is used.

    Cost: one forward per part and example, for "nguyen" ``samples`` of them. Further arguments as in ``deletion``.
    NaN, and warned of, for a constant attribution, a score that nothing changes, or a mask that is the input itself.

    Raises ``InputError`` for shapes, values or settings that do not fit.
    Source: V. Arya et al., One Explanation Does Not Fit All, 2019; A. Nguyen, M. Martínez, On Quantitative Aspects of
    Model Interpretability, 2020.

    >>> net, x = nn.Linear(4, 1), torch.arange(1.0, 5.0)[None]
    >>> _ = net.weight.data.copy_(torch.ones(1, 4))
    >>> monotonicity(net, x, x).mean(), round(monotonicity(net, x, x**2, definition="nguyen").values.numel())
    (1.0, 1)
    """
    if definition not in ("arya", "nguyen"):
        raise InputError(f"definition={definition!r} was given. Expected 'arya' or 'nguyen'.")
    require_count("samples", samples)
    ranking: Ranking = "signed" if definition == "arya" else "absolute"
    removed = removal(model, x, attribution, target, site, chunk, mask, granularity, ranking, seed)
    parts, number = removed.parts, removed.parts.rank.shape[1]
    real = parts.ranked()
    params = {"definition": definition, "samples": samples, "seed": seed, **_record(removed, granularity)}
    if definition == "nguyen":
        changes = _changes(removed, samples, seed)
        return _correlated("monotonicity", parts.relevance, changes, removed, params, real, ranked=True)
    restored = (parts.ranked() & (parts.rank < parts.count[:, None] - step) for step in range(number + 1))
    curve = removed.scores_without(restored)
    steps = curve.diff(dim=1)
    own = torch.arange(number, device=curve.device) < parts.count[:, None]
    # sums of other lengths round differently; a NaN score is no step that does not lower it
    rounding = 1e-9 if curve.dtype == torch.float64 else 1e-6
    slack = rounding * curve.abs().amax(1, keepdim=True)
    share = ((steps >= -slack) & own).sum(1) / parts.count
    share = share.masked_fill(~curve.isfinite().all(1), torch.nan)
    dead = _constant(parts.relevance, real) | ~(steps.abs() > slack).any(1)
    values = flagged("monotonicity", share, dead, _CONSTANT)
    values = flagged("monotonicity", values, removed.ineffective(), _INEFFECTIVE)
    beyond = torch.arange(number + 1, device=curve.device) > parts.count[:, None]
    monotone = torch.where(values.isnan(), values, (values == 1).to(values))
    return MetricResult(
        "monotonicity", values, "higher", curve.masked_fill(beyond, torch.nan), params, {"monotone": monotone}
    )


def _record(removed: Removal, granularity: str) -> dict[str, object]:
    return {"mask": removed.mask, "granularity": granularity, "site": removed.problem.site}


def _erased(
    name: str, removed: Removal, fractions: Sequence[float], *, kept: bool, granularity: str, ranking: str
) -> MetricResult:
    fractions = tuple(map(float, fractions))
    if not fractions or not all(0 < each <= 1 for each in fractions):
        raise InputError(f"fractions={fractions} was given. Expected shares of the parts in (0, 1].")
    top = [removed.parts.elements(each, "descending", at_least=1) for each in fractions]
    gone = [map_leaves(torch.logical_not, each) for each in top] if kept else top
    clean = removed.problem.score()
    falls = clean[:, None] - scores_at(removed.problem, map(removed.fill, gone))
    direction: Direction = "lower" if kept else "higher"
    params = {"fractions": list(fractions), "ranking": ranking, **_record(removed, granularity)}
    parts = removed.parts
    orderless = _constant(parts.relevance, parts.ranked()) & (parts.count > 1)
    values = flagged(name, falls.mean(1), orderless, _ORDERLESS, stacklevel=4)
    values = flagged(name, values, removed.ineffective(), _INEFFECTIVE, stacklevel=4)
    return MetricResult(name, values, direction, falls, params, {"clean": clean})


def _shuffled(removed: Removal, seed: int, draw: int) -> Tensor:
    """Uniform numbers for the parts (B, P), the same for each example whatever its padding, which comes last."""
    rank = removed.parts.rank
    if removed.problem.free is None:
        return noise.uniform(rank.shape[1:], seed, draw, "subsets").expand(rank.shape).to(rank.device)
    drawn = torch.full(rank.shape, torch.inf)
    for row, real in zip(drawn, removed.parts.ranked().cpu(), strict=True):
        row[real] = noise.uniform((int(real.sum()),), seed, draw, "subsets")
    return drawn.to(rank.device)


def _changes(removed: Removal, samples: int, seed: int) -> Tensor:
    """E[(f(x) − f(x with part i random))²] of each part: (B, P)."""
    problem, rank = removed.problem, removed.parts.rank
    clean = problem.score()[:, None]
    changes = torch.zeros(rank.shape, dtype=clean.dtype, device=clean.device)
    part = torch.arange(rank.shape[1], device=rank.device)
    for draw in range(samples):
        random = Uniform(seed=seed)(problem, draw)
        points = (
            map_leaves(
                torch.where, removed.parts.spread((part == each).expand(rank.shape)), random, problem.point
            )
            for each in part
        )
        changes += (clean - scores_at(problem, points)).square() / samples
    return changes


def _correlated(
    name: str,
    relevance: Tensor,
    falls: Tensor,
    removed: Removal,
    params: dict[str, object],
    where: Tensor | None = None,
    ranked: bool = False,
) -> MetricResult:
    values = (spearman if ranked else pearson)(relevance, falls, where)
    ineffective = removed.ineffective()
    if not ranked:
        values = flagged(name, values, ineffective, _INEFFECTIVE, stacklevel=4)
    real = torch.ones_like(falls, dtype=torch.bool) if where is None else where
    dead = (_constant(relevance, real) | _constant(falls, real)) & (ranked | ~ineffective)
    values = flagged(name, values, dead, _CONSTANT, stacklevel=4)
    return MetricResult(
        name, values, "higher", falls if where is None else falls.masked_fill(~where, torch.nan), params
    )


def _constant(values: Tensor, where: Tensor) -> Tensor:
    """(n,) whether there is but one value where it is true (or none)."""
    return values.masked_fill(~where, -torch.inf).amax(1) <= values.masked_fill(~where, torch.inf).amin(1)
