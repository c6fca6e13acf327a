"""Is the attribution true to the score under perturbations, and does it stay put under small ones?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pullback.attribution.paths import require_count
from pullback.core.errors import InputError
from pullback.core.points import Point, contract, map_leaves, total
from pullback.evaluation.perturbations import Perturbation, parsed_perturbation, row_uniform
from pullback.evaluation.ranking import relevance_at
from pullback.evaluation.removal import Attributions, posed, rows_together, scores_at
from pullback.evaluation.rerun import rerun
from pullback.evaluation.results import MetricResult, flagged

__all__ = ["infidelity", "sensitivity_max"]

Units = Literal["gradient", "contribution"]


def infidelity(
    model: nn.Module | Callable[..., Any],
    x: Any,
    attribution: Attributions,
    *,
    target: Any = None,
    site: str | None = None,
    perturbation: str | Perturbation = "square",
    units: Units = "gradient",
    scaled: bool = False,
    samples: int = 100,
    seed: int = 0,
    chunk: int | str = "auto",
) -> MetricResult:
    """Infidelity: E[(⟨I, a⟩ − (f(x) − f(x − I)))²] over perturbations I. Lower is better.

    ``values`` (n,), in squared units of the score. ``scaled=True`` takes β a for a, β the least squares factor
    E[⟨I, a⟩ Δ] / E[⟨I, a⟩²], Δ = f(x) − f(x − I), since many methods have no scale. ``details``, (n,) each: "zero",
    E[Δ²], what an all-zero attribution gets (compare with it); "scale", β; "scaled", the value with β.

    ``attribution``: in units of the score per unit of the input, as a gradient. For ``units="contribution"``, in units
    of the score, as of gradient times input, integrated gradients, relevance: ⟨I, a⟩ is then the sum of a over what
    is removed. ``perturbation``: "square" (``SquareRemoval``), "noisy_baseline" (``NoisyBaseline``), "gaussian"
    (``GaussianNoise``), an object of these, or a callable (problem, draw, seed) -> (I, removed or None).
    ``samples``: forwards per example; draws are named by ``seed`` and shared by examples. Further arguments as in
    ``deletion``. NaN, and warned of, where no perturbation changes the score or the input: black pixels are not
    removed by black squares. ``scaled`` is NaN where ⟨I, a⟩ is always 0.

    Raises ``InputError`` for shapes, values or settings that do not fit.
    Source: C.-K. Yeh et al., On the (In)fidelity and Sensitivity of Explanations, NeurIPS 2019.

    >>> net, x = nn.Linear(3, 1).double(), torch.arange(3.0).double()[None]
    >>> round(infidelity(net, x, net.weight.detach(), perturbation="gaussian").mean(), 9)
    0.0
    """
    if units not in ("gradient", "contribution"):
        raise InputError(f"units={units!r} was given. Expected 'gradient' or 'contribution'.")
    require_count("samples", samples)
    draw_perturbation = parsed_perturbation(perturbation)
    problem = posed(model, x, attribution, target=target, site=site, chunk=chunk)
    relevance = relevance_at(attribution, x, problem)
    predicted: list[Tensor] = []
    moved = torch.zeros(problem.batch, dtype=torch.bool, device=problem.device)

    def points() -> Iterator[Point]:
        nonlocal moved
        for draw in range(samples):
            change, removed = draw_perturbation(problem, draw, seed)
            weight: Point = change
            if units == "contribution":
                if removed is None:
                    raise InputError(
                        f"units='contribution' was given with {draw_perturbation!r}, which removes nothing. Expected "
                        'a removal, such as perturbation="square", or units="gradient".'
                    )
                weight = map_leaves(lambda leaf, like: leaf.to(like.real.dtype), removed, relevance)
            predicted.append(total(map_leaves(contract, weight, relevance)))
            moved = moved | (total(map_leaves(torch.abs, change)).to(moved.device) > 0)
            yield map_leaves(torch.sub, problem.point, change)

    actual = problem.score()[:, None] - scores_at(problem, points())
    expected = torch.stack(predicted, 1).to(actual)
    square = expected.square().mean(1)
    scale = (expected * actual).mean(1) / square
    plain = (expected - actual).square().mean(1)
    fitted = (scale[:, None] * expected - actual).square().mean(1)
    values = fitted if scaled else plain
    values = flagged("infidelity", values, ~moved, "no perturbation changes the input; choose another")
    dead = moved & (actual == 0).all(1)
    values = flagged(
        "infidelity", values, dead, "no perturbation changes the score; has the model collapsed?"
    )
    if scaled:
        values = flagged("infidelity", values, square == 0, "⟨I, a⟩ is 0 for all perturbations")
    return MetricResult(
        name="infidelity",
        values=values,
        direction="lower",
        params={
            "perturbation": repr(draw_perturbation),
            "units": units,
            "scaled": scaled,
            "samples": samples,
            "seed": seed,
            "site": problem.site,
        },
        details={"zero": actual.square().mean(1), "scale": scale, "scaled": fitted},
    )


def sensitivity_max(
    model: nn.Module | Callable[..., Any],
    x: Any,
    attribution: Attributions = None,
    *,
    method: Any = None,
    target: Any = None,
    site: str | None = None,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
    chunk: int | str = "auto",
) -> MetricResult:
    """Max-sensitivity: max over ‖u‖∞ ≤ radius of ‖a(x + u) − a(x)‖ / ‖a(x)‖, sampled. Lower is more stable.

    ``values`` (n,), no units; ``curve`` (n, samples) each draw's; ``details["mean"]`` (n,) their mean.

    ``method``: what is run again at x + u with the target of x; by default that of a result of ``explain``, or
    ``attribution`` itself where it is a callable (x, target). A map given along with it must be the method's own.
    ``radius``: in units of the input; u is uniform in [−radius, radius] for each element, shared by examples, named by
    ``seed``. Stochastic methods use the same draws at every point. NaN, and warned of, for an all-zero attribution.
    A map that never depends on the input scores 0, the best: read it with a measure of faithfulness.

    Raises ``InputError`` for shapes, values or settings that do not fit, or if nothing can be run again.
    Source: C.-K. Yeh et al., On the (In)fidelity and Sensitivity of Explanations, NeurIPS 2019.

    >>> sensitivity_max(nn.Linear(3, 1), torch.ones(1, 3), method="gradient").mean()
    0.0
    """
    require_count("samples", samples)
    if not 0 < radius < float("inf"):
        raise InputError(f"radius={radius} was given. Expected a distance above 0, in units of the input.")
    problem = posed(model, x, attribution, target=target, site=site, chunk=chunk)
    again = rerun(problem, x, attribution, method)

    def near(leaf: Tensor, draw: int) -> Tensor:
        unit = row_uniform(leaf.real if leaf.is_complex() else leaf, problem, draw, seed, "sensitivity")
        return leaf + radius * (2 * unit - 1)

    together = rows_together(problem)
    found = []
    for first in range(0, samples, together):
        draws = range(first, min(first + together, samples))
        points = [map_leaves(lambda leaf, draw=draw: near(leaf, draw), problem.point) for draw in draws]
        everyone = torch.arange(problem.batch).repeat(len(points))
        maps = again.maps(problem.rows(everyone, map_leaves(lambda *each: torch.cat(each), *points)))
        apart = maps.reshape(len(points), problem.batch, -1) - again.clean
        found.append(apart.norm(dim=2))
    size = again.clean.norm(dim=1)
    curve = torch.cat(found).T / size[:, None]
    curve = flagged(
        "sensitivity_max", curve, size == 0, "the attribution is zero everywhere; has the model collapsed?"
    )
    return MetricResult(
        name="sensitivity_max",
        values=curve.amax(1),
        direction="lower",
        curve=curve,
        params={
            "method": again.name,
            "radius": radius,
            "samples": samples,
            "seed": seed,
            "site": problem.site,
        },
        details={"mean": curve.mean(1)},
    )
