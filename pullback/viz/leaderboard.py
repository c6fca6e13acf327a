"""Methods compared: bars of one metric, a table of ranks, and the leaderboard page. Rows are plain dictionaries."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pullback.core.errors import InputError
from pullback.viz.drawing import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["level_curves", "metric_bars", "rank_table", "write_leaderboard"]

Row = Mapping[str, Any]

_HOW_TO_READ = """\
How to read it. A number is the mean over training seeds and images, in brackets its 95 % interval, which resamples \
both together. Methods marked "best" cannot be told from the best one: the interval of their difference on the same \
seeds and images holds 0. A dagger marks a method that is not better than every control, which knows nothing of this \
model: whatever its number, it has not shown that it explains anything by this metric. A variant is another method's \
map, altered to test the metric: where a blurred map wins, smoothness does. A dash means that nothing can \
be said, for the reason noted below the table.

No correction is made for the number of comparisons: with many metrics and methods, a few differences are chance. \
Metrics ask different questions, so there is no total."""


def metric_bars(rows: Sequence[Row], ax: Axes | None = None) -> Axes:
    """One horizontal bar a method with a whisker for its interval, first on top; controls are grey and hatched.

    Args:
        rows: of one metric and one model, each with "method", "control", "estimate", "low", "high", "direction".
    """
    if not rows:
        raise InputError("No rows were given. Expected at least one method.")
    ax = ax or new_axes(5.0, 0.7 + 0.28 * len(rows))
    rows = sorted(rows, key=lambda row: bool(row["control"]))
    places = np.arange(len(rows))
    middle = np.array([float(row["estimate"]) for row in rows])
    bars = ax.barh(places, np.nan_to_num(middle), height=0.62, color="#2166ac")
    for bar, row in zip(bars, rows, strict=True):
        if row["control"]:
            bar.set(facecolor="0.85", edgecolor="0.5", hatch="///")
    low, high = (np.array([float(row[name]) for row in rows]) for name in ("low", "high"))
    ax.hlines(places, low, high, color="0.15", linewidth=1.2)
    for row, place, value in zip(rows, places, middle, strict=True):
        if math.isnan(value):
            ax.text(0, float(place), " –", va="center", fontsize=8)
        elif row.get("tied_with_best"):
            bars[place].set_facecolor("#b2182b")
    ax.axvline(0, color="0.5", linewidth=0.6)
    ax.set_yticks(places, [str(row["method"]) for row in rows], fontsize=8, parse_math=False)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    first = rows[0]
    ax.set_xlabel(
        f"{first.get('metric', '')} ({first['direction']} is better; red: tied with the best)",
        fontsize=8,
        parse_math=False,
    )
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelsize=8)
    return ax


def rank_table(rows: Sequence[Row], ax: Axes | None = None) -> Axes:
    """Ranks as colours, methods by (data, model, metric): 1 is best, a dot a tie with the best, empty undefined."""
    if not rows:
        raise InputError("No rows were given. Expected at least one score.")
    methods = list(
        dict.fromkeys(str(row["method"]) for row in sorted(rows, key=lambda row: bool(row["control"])))
    )
    columns = list(dict.fromkeys((str(row["data"]), str(row["model"]), str(row["metric"])) for row in rows))
    ranks = np.full((len(methods), len(columns)), np.nan)
    ax = ax or new_axes(2.4 + 0.34 * len(columns), 1.8 + 0.26 * len(methods))
    for row in rows:
        place = (
            methods.index(str(row["method"])),
            columns.index((str(row["data"]), str(row["model"]), str(row["metric"]))),
        )
        ranks[place] = float(row["rank"])
        if row["tied_with_best"]:
            ax.plot(place[1], place[0], marker="o", markersize=4, color="white", markeredgecolor="0.2")
    from matplotlib import colormaps

    worst = float(np.nanmax(np.append(ranks, 2.0)))
    ax.imshow(ranks, cmap=colormaps["viridis_r"], vmin=1, vmax=worst, aspect="auto")
    ax.set_yticks(range(len(methods)), methods, fontsize=7, parse_math=False)
    several = len({column[:2] for column in columns}) > 1
    names = [", ".join(column) if several else column[2] for column in columns]
    ax.set_xticks(range(len(columns)), names, fontsize=6, rotation=90, parse_math=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return ax


def level_curves(rows: Sequence[Row], ax: Axes | None = None) -> Axes:
    """A score over the level, a curve with its band for each method; the random control's band is grey.

    Args:
        rows: each with "method", "control", "level", "estimate", "low", "high".
    """
    if not rows:
        raise InputError("No rows were given. Expected at least one score.")
    ax = ax or new_axes(5.2, 3.4)
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: float(row["level"]))
        at, middle, low, high = (
            [float(row[name]) for row in own] for name in ("level", "estimate", "low", "high")
        )
        if method == "random":
            ax.fill_between(at, low, high, color="0.8", linewidth=0, label="random (control)", zorder=0)
            continue
        style = "--" if own[0]["control"] else "-"
        (line,) = ax.plot(at, middle, style, marker=".", markersize=4, linewidth=1.3)
        line.set_label((f"{method} (control)" if own[0]["control"] else method).replace("$", r"\$"))
        ax.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    ax.axhline(0, color="0.5", linewidth=0.6)
    ax.set_xlabel("level", fontsize=8)
    ax.legend(frameon=False, fontsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    return ax


def write_leaderboard(
    path: str | os.PathLike[str], rows: Sequence[Row], settings: Mapping[str, Any], title: str
) -> None:
    """One offline HTML page: for each data set and model a table of all methods and metrics, and the ranks."""
    from pullback.viz.report import Figure, Prose, Table, write_report

    sections: list[Any] = [Prose(_HOW_TO_READ)]
    for data, model in dict.fromkeys((str(row["data"]), str(row["model"])) for row in rows):
        own = [row for row in rows if (row["data"], row["model"]) == (data, model)]
        sections.append(_table(f"{data}, {model}", own))
        figure = rank_table(own).get_figure(root=True)
        assert figure is not None
        sections.append(
            Figure(f"Ranks on {data}, {model}: dark is worse, a dot is a tie with the best", figure)
        )
    sections.append(
        Table("Settings", ("name", "value"), [(name, str(value)) for name, value in settings.items()])
    )
    write_report(path, sections, title=title)


def _table(caption: str, rows: Sequence[Row]) -> Any:
    from pullback.viz.report import Table

    metrics = list(dict.fromkeys(str(row["metric"]) for row in rows))
    arrows = {str(row["metric"]): "↑" if row["direction"] == "higher" else "↓" for row in rows}
    cells = {(str(row["method"]), str(row["metric"])): row for row in rows}
    methods = dict.fromkeys(str(row["method"]) for row in sorted(rows, key=lambda row: bool(row["control"])))
    lines: list[list[object]] = []
    notes: dict[str, dict[str, None]] = {}
    for method in methods:
        own = [cells.get((method, metric)) for metric in metrics]
        first = next(row for row in own if row is not None)
        mark = " (variant)" if first.get("variant") else " (control)" if first["control"] else ""
        lines.append([method + mark, *map(_cell, own)])
        for flag in (str(row["flags"]) for row in own if row is not None and row["flags"]):
            notes.setdefault(flag, {})[method] = None
    listed = [f"{', '.join(names)}: {flag}" for flag, names in notes.items()]
    return Table(
        caption,
        ("method", *(f"{metric} {arrows[metric]}" for metric in metrics)),
        lines,
        note=" · ".join(listed),
    )


def _cell(row: Row | None) -> object:
    if row is None or math.isnan(float(row["estimate"])):
        return None
    text = f"{row['estimate']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"
    return text + " best" * bool(row["tied_with_best"]) + " †" * (row["beats_controls"] is False)
