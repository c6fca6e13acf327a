"""Tables and pictures of the studies of sparse autoencoders, from the records of their runs."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pullback.evaluation import student_interval

COLOURS = ("#1b6ca8", "#c1440e", "#4d9221", "#7b4173", "#777777", "#e08214", "#35978f", "#b2182b")


def table(records: Sequence[dict[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """One row per group and measure: mean over seeds, 95 % Student interval, number of seeds."""
    grouped: dict[tuple[Any, ...], list[float]] = {}
    for record in records:
        for measure, value in record["values"].items():
            grouped.setdefault((*(record[name] for name in by), measure), []).append(value)
    rows = []
    for group, values in grouped.items():
        found = student_interval(values)
        row = dict(zip((*by, "measure"), group, strict=True))
        bounds = {"mean": found.estimate, "low": found.low, "high": found.high}
        rows.append(row | {name: round(value, 5) for name, value in bounds.items()} | {"seeds": len(values)})
    return rows


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _errors(row: dict[str, Any]) -> tuple[float, float]:
    low, high = row["mean"] - row["low"], row["high"] - row["mean"]
    return (low, high) if low == low else (0.0, 0.0)


def whisper_figure(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Bars of loss recovered and FVU by case and arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    measures = ("loss recovered", "loss recovered, gradient-free", "FVU")
    for axes, measure in zip(figure.subplots(1, 3), measures, strict=True):
        shown = [row for row in rows if row["measure"] == measure]
        names = [f"{row['case']}\n{'TopK' if row['arm'] == 'topk' else 'g-SAE'}" for row in shown]
        errors = list(zip(*[_errors(row) for row in shown], strict=True))
        colours = [COLOURS[row["arm"] != "topk"] for row in shown]
        axes.bar(names, [row["mean"] for row in shown], yerr=errors, color=colours, capsize=3)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(measure, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=144, metadata={"Software": None})


def pareto_figure(path: Path, rows: Sequence[dict[str, Any]], measures: Sequence[str]) -> None:
    """Each measure over L0, one line per kind, with intervals over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(measures), 3.6), layout="constrained")
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    level = {(row["kind"], row["k"]): row["mean"] for row in rows if row["measure"] == "L0"}
    for axes, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        for kind, colour in zip(kinds, COLOURS, strict=False):
            shown = [row for row in rows if (row["kind"], row["measure"]) == (kind, measure)]
            across = [level[(kind, row["k"])] for row in shown]
            errors = list(zip(*[_errors(row) for row in shown], strict=True))
            axes.errorbar(
                across,
                [row["mean"] for row in shown],
                yerr=errors,
                color=colour,
                marker="o",
                capsize=3,
                label=kind,
            )
        axes.set_xlabel("L0, latents active per token")
        axes.set_ylabel(measure)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=144, metadata={"Software": None})
