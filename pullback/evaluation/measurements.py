"""The table that suites give: what was measured on each image, and what it says about the methods."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pullback.core.errors import FormatError, InputError, nearest
from pullback.evaluation.ranks import Standing, standings
from pullback.evaluation.results import Direction
from pullback.evaluation.statistics import (
    Interval,
    PairedDifference,
    hierarchical_bootstrap,
    paired_difference,
)
from pullback.records import read_json, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

__all__ = ["Measurement", "Measurements", "Score"]

_FORMAT, _SCHEMA = "pullback.Measurements", 1


@dataclass(frozen=True)
class Measurement:
    """A metric of a method's maps of one trained model, for each image; NaN where it is undefined.

    ``flag``: why it says nothing, such as a collapsed model or a method that the model cannot have; "" for nothing.
    ``variant``: the map of another method, altered to test the metric, such as a blurred one.
    """

    data: str
    model: str
    method: str
    control: bool
    metric: str
    direction: Direction
    seed: int
    values: tuple[float, ...]
    flag: str = ""
    variant: bool = False

    @property
    def mean(self) -> float:
        known = [value for value in self.values if not math.isnan(value)]
        return math.fsum(known) / len(known) if known else math.nan


@dataclass(frozen=True)
class Score:
    """A method by one metric on one model, over seeds and images together; see ``Standing``.

    ``flags``: of its measurements, without repeats.
    """

    data: str
    model: str
    method: str
    control: bool
    metric: str
    direction: Direction
    seeds: int
    standing: Standing
    flags: tuple[str, ...]
    variant: bool = False

    @property
    def interval(self) -> Interval:
        return self.standing.interval

    def to_record(self) -> dict[str, object]:
        """One flat row."""
        interval, rank = self.interval, self.standing.rank
        return {
            "data": self.data, "model": self.model, "method": self.method, "control": self.control,
            "metric": self.metric, "direction": self.direction, "estimate": interval.estimate, "low": interval.low,
            "high": interval.high, "count": interval.count, "undefined": interval.undefined, "seeds": self.seeds,
            "variant": self.variant,
            "rank": rank.estimate, "rank_low": rank.low, "rank_high": rank.high, "tied_with_best": self.standing.tied,
            "beats_controls": self.standing.beats_controls, "flags": "; ".join(self.flags),
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Measurements:
    """All measurements of a suite, and the settings that decide them.

    >>> rows = [Measurement("d", "m", name, False, "gini", "higher", 0, (value, value)) for name, value in
    ...         (("a", 0.5), ("b", 0.25))]
    >>> [(score.method, score.standing.rank.estimate) for score in Measurements(rows).scores()]
    [('a', 1.0), ('b', 2.0)]
    """

    rows: Sequence[Measurement]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __add__(self, other: Measurements) -> Measurements:
        return Measurements((*self.rows, *other.rows), {**self.settings, **other.settings})

    @property
    def methods(self) -> tuple[str, ...]:
        """Their names, controls and variants last."""
        return tuple(
            dict.fromkeys(row.method for row in sorted(self.rows, key=lambda row: (row.control, row.variant)))
        )

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.metric for row in self.rows))

    def scores(self) -> list[Score]:
        """Every method by every metric on every model, with its rank among them."""
        return self._scores

    @cached_property
    def _scores(self) -> list[Score]:
        groups: dict[tuple[str, str, str], list[Measurement]] = {}
        for row in self.rows:
            groups.setdefault((row.data, row.model, row.metric), []).append(row)
        return [score for rows in groups.values() for score in _scored(rows)]

    def values(self, data: str, model: str, method: str, metric: str) -> Tensor:
        """(seeds, images), NaN where undefined. Raises InputError where nothing was measured."""
        asked = {"data": data, "model": model, "method": method, "metric": metric}
        rows = [row for row in self.rows if all(getattr(row, name) == each for name, each in asked.items())]
        if not rows:
            for name, each in asked.items():
                known = {getattr(row, name) for row in self.rows}
                if each not in known:
                    raise InputError(
                        f"{name}={each!r} was given. Expected one of those measured; nearest: {nearest(each, known)}."
                    )
            raise InputError(f"Nothing was measured for {asked}.")
        return _table(rows, sorted({row.seed for row in rows}))

    def compare(self, first: str, second: str, *, data: str, model: str, metric: str) -> PairedDifference:
        """first - second on the same seeds and images: hierarchical interval, and a permutation p-value over images.

        The p-value is of the means over seeds, image by image; it says nothing about another choice of seeds.
        """
        one, other = (self.values(data, model, name, metric) for name in (first, second))
        interval = hierarchical_bootstrap(one - other)
        return PairedDifference(interval, paired_difference(one.nanmean(0), other.nanmean(0)).p_value)

    # ------------------------------------------------------------------ as files and tables

    def to_records(self) -> list[dict[str, object]]:
        """One row per measurement: everything but the values of single images, which are summarised."""
        return [
            {
                **{name: value for name, value in asdict(row).items() if name != "values"},
                "mean": row.mean,
                "images": len(row.values),
                "undefined": sum(map(math.isnan, row.values)),
            }
            for row in self.rows
        ]

    def to_dataframe(self) -> DataFrame:
        """The records as a pandas table."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "to_dataframe() needs pandas, which pullback does not: pip install pandas"
            ) from error
        return pandas.DataFrame(self.to_records())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """The scores, one a line: means over seeds and images with intervals, ranks and flags."""
        rows = [score.to_record() for score in self.scores()]
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["data"])
            writer.writeheader()
            writer.writerows({name: _short(value) for name, value in row.items()} for row in rows)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Everything: settings, scores, and the values of single images; ``load`` reads it."""
        write_json(
            Path(path),
            {
                "format": _FORMAT,
                "schema": _SCHEMA,
                "settings": dict(self.settings),
                "scores": [score.to_record() for score in self.scores()],
                "measurements": [asdict(row) for row in self.rows],
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Measurements:
        """What ``to_json`` wrote. Raises FormatError for any other file."""
        try:
            document = read_json(Path(path))
            if (document["format"], document["schema"]) != (_FORMAT, _SCHEMA):
                raise KeyError(f"format {document['format']} {document['schema']}")
            names = {each.name for each in fields(Measurement)}
            rows = [
                Measurement(**{**{name: row[name] for name in names}, "values": tuple(row["values"])})
                for row in document["measurements"]
            ]
            return cls(rows, document["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"{path} cannot be read ({type(error).__name__}: {error}). Expected what Measurements.to_json() wrote."
            ) from error

    def to_markdown(self) -> str:
        """A table for each model: methods by metrics, means with 95 % intervals.

        Bold: the best, and what cannot be told from it. "†": no better than every control. "–": nothing to say, for the
        reason below the table.
        """
        parts = []
        for data, model in dict.fromkeys((row.data, row.model) for row in self.rows):
            scores = [each for each in self.scores() if (each.data, each.model) == (data, model)]
            parts.append(_markdown(f"{data}, {model}", scores, self.methods))
        return "\n\n".join(parts)

    def to_html(self, path: str | os.PathLike[str], title: str = "Methods compared") -> None:
        """A leaderboard page: a table and a chart of ranks for each model, with what the signs mean."""
        from pullback.viz.leaderboard import write_leaderboard

        write_leaderboard(path, [score.to_record() for score in self.scores()], dict(self.settings), title)

    def plot(
        self, metric: str, *, data: str | None = None, model: str | None = None, ax: Axes | None = None
    ) -> Axes:
        """Bars of one metric, a method each, with intervals; controls are hatched.

        Raises InputError for an unknown metric, or several models without ``data`` and ``model``.
        """
        from pullback.viz.leaderboard import metric_bars

        found = [
            each.to_record()
            for each in self.scores()
            if each.metric == metric and data in (None, each.data) and model in (None, each.model)
        ]
        if not found:
            raise InputError(f"metric={metric!r} was given. Expected one of {list(self.metrics)}.")
        places = sorted({(str(each["data"]), str(each["model"])) for each in found})
        if len(places) > 1:
            raise InputError(
                f"{metric!r} was measured on {places}. Expected data= and model= of one of them."
            )
        return metric_bars(found, ax)

    def plot_ranks(self, ax: Axes | None = None) -> Axes:
        """The ranks of the methods (rows) by data, model and metric (columns); dots are ties with the best."""
        from pullback.viz.leaderboard import rank_table

        return rank_table([score.to_record() for score in self.scores()], ax)


def _table(rows: Iterable[Measurement], seeds: Sequence[int]) -> Tensor:
    """(seeds, images), NaN where a seed or an image is missing."""
    rows = list(rows)
    longest = max(len(row.values) for row in rows)
    table = torch.full((len(seeds), max(longest, 1)), math.nan, dtype=torch.float64)
    for row in rows:
        table[seeds.index(row.seed), : len(row.values)] = torch.tensor(row.values, dtype=torch.float64)
    return table


def _scored(rows: Sequence[Measurement]) -> list[Score]:
    seeds = sorted({row.seed for row in rows})
    by_method: dict[str, list[Measurement]] = {}
    for row in rows:
        by_method.setdefault(row.method, []).append(row)
    tables = {name: _table(each, seeds) for name, each in by_method.items()}
    width = max(table.shape[1] for table in tables.values())
    # a flagged measurement may have no image at all
    tables = {
        name: torch.nn.functional.pad(table, (0, width - table.shape[1]), value=math.nan)
        for name, table in tables.items()
    }
    controls = frozenset(name for name, each in by_method.items() if each[0].control)
    variants = frozenset(name for name, each in by_method.items() if each[0].variant)
    found = standings(tables, rows[0].direction, controls - variants, variants)
    return [
        Score(
            data=each[0].data,
            model=each[0].model,
            method=name,
            control=each[0].control,
            metric=each[0].metric,
            direction=each[0].direction,
            seeds=len({row.seed for row in each}),
            standing=found[name],
            flags=tuple(dict.fromkeys(row.flag for row in each if row.flag)),
            variant=each[0].variant,
        )
        for name, each in by_method.items()
    ]


def _markdown(title: str, scores: Sequence[Score], methods: Sequence[str]) -> str:
    metrics = list(dict.fromkeys(score.metric for score in scores))
    arrows = {score.metric: "↑" if score.direction == "higher" else "↓" for score in scores}
    lines = [
        f"**{title}**",
        "",
        "| method | " + " | ".join(f"{each} {arrows[each]}" for each in metrics) + " |",
    ]
    lines.append("|---|" + "---|" * len(metrics))
    cells = {(score.method, score.metric): score for score in scores}
    notes: dict[str, dict[str, None]] = {}
    for method in methods:
        own = [cells.get((method, metric)) for metric in metrics]
        if all(each is None for each in own):
            continue
        mark = next(role_of(each.control, each.variant) for each in own if each is not None)
        lines.append(f"| {method}{mark} | " + " | ".join(map(_cell, own)) + " |")
        for flag in (flag for each in own if each is not None for flag in each.flags):
            notes.setdefault(flag, {})[method] = None
    listed = [f"- {', '.join(names)}: {flag}" for flag, names in notes.items()]
    return "\n".join([*lines, *([""] if notes else []), *listed])


def role_of(control: bool, variant: bool) -> str:
    """What a row of a table is marked with."""
    return " (variant)" if variant else " (control)" if control else ""


def _cell(score: Score | None) -> str:
    if score is None or math.isnan(score.interval.estimate):
        return "–"
    at = score.interval
    text = f"{at.estimate:.3g} [{at.low:.3g}, {at.high:.3g}]"
    return (f"**{text}**" if score.standing.tied else text) + "†" * (score.standing.beats_controls is False)


def _short(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
