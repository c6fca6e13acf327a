"""How well do first-order estimates agree with exact activation patching? Correlations by group of sites."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pullback.attribution.patching import Direction, Method, patching_scores
from pullback.core.errors import InputError, MethodError
from pullback.core.inputs import read_inputs
from pullback.evaluation.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Agreement", "PatchingReport", "patching_report"]

Floats = npt.NDArray[np.float64]
Pool = Literal["entries", "mean"]


@dataclass(frozen=True)
class Agreement:
    """A correlation of one method's scores with exact patching, over the points of one group of sites.

    ``interval`` resamples examples; NaN where the scores are constant. ``statistic`` is "pearson" or "spearman", the
    latter with scores that differ by rounding only as ties.
    """

    group: str
    method: str
    statistic: str
    interval: Interval
    points: int

    def __str__(self) -> str:
        i = self.interval
        return f"{self.group:<12} {self.method:<6} {self.statistic:<9} {i.estimate:6.3f} [{i.low:.3f}, {i.high:.3f}]"


@dataclass(frozen=True, eq=False)
class PatchingReport:
    """Patching scores by method and site, and how each estimate agrees with "exact".

    ``scores[method][site]`` is as from ``patching_scores``; ``groups`` maps a name to its sites; ``agreements`` has one
    entry for each group, method and statistic; ``settings`` is what was asked for. ``real`` (B, T) marks real tokens:
    padding is no point of a correlation.
    """

    scores: Mapping[str, Mapping[str, Tensor]]
    groups: Mapping[str, tuple[str, ...]]
    agreements: tuple[Agreement, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    real: Tensor | None = None

    def agreement(self, group: str, method: str, statistic: str = "pearson") -> Interval:
        """The correlation of one method in one group. Raises MethodError for names that the report does not have."""
        for each in self.agreements:
            if (each.group, each.method, each.statistic) == (group, method, statistic):
                return each.interval
        raise MethodError(
            f"the report has no {statistic} of {method!r} in {group!r}: its groups are {', '.join(self.groups)}, its "
            f"methods {', '.join(name for name in self.scores if name != 'exact')}, its statistics pearson, spearman."
        )

    def points(self, group: str, method: str) -> Floats:
        """The scores that a correlation compares, flattened in the order of sites, examples and positions."""
        return np.concatenate(
            _pooled(_by_example(self.scores[method], self.groups[group], self.real), self.pool)
        )

    @property
    def pool(self) -> str:
        return str(self.settings.get("pool", "entries"))

    def to_rows(self) -> list[dict[str, Any]]:
        """A flat record for each agreement: group, method, statistic, estimate, low, high, level, examples, points."""
        return [
            {
                "group": each.group,
                "method": each.method,
                "statistic": each.statistic,
                "estimate": _plain(each.interval.estimate),
                "low": _plain(each.interval.low),
                "high": _plain(each.interval.high),
                "level": each.interval.level,
                "examples": each.interval.count,
                "points": each.points,
            }
            for each in self.agreements
        ]

    def save(self, path: str | Path) -> Path:
        """Write the rows as CSV, or rows, scores and settings as JSON, by the ending. Raises InputError for another."""
        path = Path(path)
        if path.suffix == ".csv":
            rows = self.to_rows()
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        elif path.suffix == ".json":
            content = {
                "agreements": self.to_rows(),
                "groups": {name: list(sites) for name, sites in self.groups.items()},
                "settings": dict(self.settings),
                "scores": {
                    method: {site: value.cpu().tolist() for site, value in found.items()}
                    for method, found in self.scores.items()
                },
            }
            path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        else:
            raise InputError(f'a report is saved as "name.json" or "name.csv", got "{path.name}".')
        return path

    def plot(self) -> Figure:
        """Exact scores (across) against each method's (up), one picture for each group and method."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        methods = [method for method in self.scores if method != "exact"]
        figure = Figure(figsize=(2.6 * len(methods), 2.5 * len(self.groups)), layout="constrained")
        FigureCanvasAgg(figure)
        every = figure.subplots(len(self.groups), len(methods), squeeze=False)
        for row, group in zip(every, self.groups, strict=True):
            exact = self.points(group, "exact")
            for axes, method in zip(row, methods, strict=True):
                axes.axline((0, 0), slope=1, color="0.8", linewidth=0.8, zorder=0)
                axes.scatter(exact, self.points(group, method), s=5, alpha=0.5, linewidths=0)
                estimate = self.agreement(group, method).estimate
                axes.set_title(f"{group}: {method}, r = {estimate:.3f}".replace("$", r"\$"), fontsize=8)
                axes.tick_params(labelsize=7)
                axes.spines[["top", "right"]].set_visible(False)
        return figure

    def __str__(self) -> str:
        return "\n".join(str(each) for each in self.agreements)


def patching_report(
    model: Callable[..., Any],
    clean: Any,
    corrupted: Any,
    metric: Any,
    sites: Mapping[str, Sequence[str]] | Sequence[str],
    methods: Sequence[Method] = ("atp", "relp", "ig"),
    direction: Direction = "denoise",
    *,
    normalised: bool = False,
    pool: Pool = "entries",
    attention: str | None = None,
    steps: int = 10,
    chunk: int | str = "auto",
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> PatchingReport:
    """Compare estimates of activation patching with the exact scores, in groups of sites.

    Args:
        sites: site names, or groups of them, for example ``{"residual": [...], "attention": [...], "mlp": [...]}``.
        methods: of ``patching_scores``; "exact" is always computed, and the rest compared with it.
        pool: "entries" correlates over every example, site and position; "mean" averages the examples first, which
            asks for prompts of one template, as the RelP paper has them.
        attention: for "relp" only. normalised, direction, steps, chunk: as in ``patching_scores``.
        level, samples, seed: of the percentile bootstrap over examples.

    Returns:
        a PatchingReport: Pearson and Spearman correlation by group and method, the scores, and a plot.

    Raises:
        InputError, MethodError, SiteError, TargetError, CoverageError: as ``patching_scores``.

    Cost: that of each method; the exact scores take one forward for each site, position and example.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 1))
        >>> x = torch.eye(3)
        >>> report = patching_report(model, x, -x, 0, ["0", "1"], methods=["atp"])
        >>> -1 <= report.agreement("all", "atp").estimate <= 1
        True
    """
    grouped = sites if isinstance(sites, Mapping) else {"all": sites}
    groups = {str(name): tuple(str(site) for site in each) for name, each in grouped.items()}
    if not groups or not all(groups.values()):
        raise InputError(
            'sites is a list of sites, or groups of them such as {"mlp": ["model.layers.0.mlp"]}.'
        )
    if pool not in ("entries", "mean"):
        raise MethodError(f'pool is "entries" or "mean", got {pool!r}.')
    if not 0 < level < 1 or samples < 1:
        raise InputError(f"level is between 0 and 1 and samples at least 1; got {level} and {samples}.")
    every = list(dict.fromkeys(site for each in groups.values() for site in each))
    named: list[Method] = ["exact", *(method for method in methods if method != "exact")]
    scores: dict[str, dict[str, Tensor]] = {
        method: patching_scores(
            model, clean, corrupted, metric, every, method, direction, normalised=normalised, steps=steps, chunk=chunk,
            attention=attention if method == "relp" else None,
        )
        for method in named
    }  # fmt: skip
    mask = read_inputs(clean, model).attention_mask
    real = None if mask is None else mask != 0
    # a difference of two metrics of about this size carries their rounding
    rounding = 128 * torch.finfo(scores["exact"][every[0]].dtype).eps
    agreements: list[Agreement] = []
    for group, members in groups.items():
        exact = _by_example(scores["exact"], members, real)
        for method in named[1:]:
            estimated = _by_example(scores[method], members, real)
            agreements += _agreements(group, method, exact, estimated, pool, level, samples, seed, rounding)
    settings = {
        "direction": direction, "normalised": normalised, "pool": pool, "attention": attention, "steps": steps,
        "level": level, "samples": samples, "seed": seed,
    }  # fmt: skip
    return PatchingReport(scores, groups, tuple(agreements), settings, real)


def _by_example(found: Mapping[str, Tensor], sites: Sequence[str], real: Tensor | None) -> list[Floats]:
    """Each example's scores at all sites, flattened; padding is NaN."""
    parts = []
    for site in sites:
        value = found[site].detach().cpu().double()
        if real is not None and value.shape == real.shape:
            value = torch.where(real.cpu(), value, torch.nan)
        parts.append(value.flatten(1))
    return list(torch.cat(parts, 1).numpy())


def _pooled(rows: Sequence[Floats], pool: str) -> list[Floats]:
    """The points of a correlation in parts: the real entries of each row, or the means over the rows that have one."""
    if pool == "entries":
        return [row[~np.isnan(row)] for row in rows]
    table = np.stack(rows)
    count = (~np.isnan(table)).sum(0)
    return [np.nansum(table, 0)[count > 0] / count[count > 0]]


def _agreements(
    group: str,
    method: str,
    exact: list[Floats],
    estimated: list[Floats],
    pool: str,
    level: float,
    samples: int,
    seed: int,
    rounding: float,
) -> Iterator[Agreement]:
    generator = np.random.default_rng(seed)
    examples = len(exact)
    picks = [generator.integers(examples, size=examples) for _ in range(samples if examples > 1 else 0)]

    def points(index: Iterable[int]) -> tuple[Floats, Floats]:
        chosen = list(index)
        first, second = (_pooled([rows[i] for i in chosen], pool) for rows in (exact, estimated))
        return np.concatenate(first), np.concatenate(second)

    whole = points(range(examples))
    drawn = [points(pick.tolist()) for pick in picks]
    for statistic in ("pearson", "spearman"):

        def of(pair: tuple[Floats, Floats], ranked: bool = statistic == "spearman") -> float:
            return _pearson(*(_ranks(each, rounding) for each in pair)) if ranked else _pearson(*pair)

        draws = np.array([of(pair) for pair in drawn])
        defined = draws[~np.isnan(draws)]
        low, high = (
            np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]) if len(defined) else (math.nan, math.nan)
        )
        interval = Interval(
            float(low), of(whole), float(high), level, examples, int(len(draws) - len(defined))
        )
        yield Agreement(group, method, statistic, interval, len(whole[0]))


def _ranks(values: Floats, rounding: float) -> Floats:
    """Ranks, those that differ by rounding only tied: many sites have no effect, and their order is noise."""
    from scipy.stats import rankdata

    order = np.argsort(values)
    apart = np.diff(values[order], prepend=-math.inf) > rounding * np.abs(values).max(initial=0.0)
    level = np.empty(len(values))
    level[order] = np.cumsum(apart)
    ranks: Floats = rankdata(level)
    return ranks


def _pearson(a: Floats, b: Floats) -> float:
    """Pearson's correlation; NaN where either is constant."""
    if len(a) < 2:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else math.nan


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
