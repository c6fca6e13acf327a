"""The table and the picture of the pullback study, from the records of its seeds."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pullback.evaluation import hierarchical_bootstrap

BASE = "Gradient"
COLUMNS = [
    "method",
    "measure",
    "mean",
    "low",
    "high",
    "difference",
    "difference_low",
    "difference_high",
    "undefined",
]


def table(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method and measure: mean, interval, and the difference from the plain gradient with its interval."""
    rows = []
    for method, measures in records[0]["values"].items():
        for measure in measures:
            own, base = _seeds(records, method, measure), _seeds(records, BASE, measure)
            mean, difference = hierarchical_bootstrap(own), hierarchical_bootstrap(own - base)
            numbers = [
                mean.estimate,
                mean.low,
                mean.high,
                difference.estimate,
                difference.low,
                difference.high,
            ]
            rounded = [round(number, 4) for number in numbers]
            rows.append(dict(zip(COLUMNS, [method, measure, *rounded, mean.undefined], strict=True)))
    return rows


def _seeds(records: Sequence[dict[str, Any]], method: str, measure: str) -> npt.NDArray[np.float64]:
    return np.array([each["values"][method][measure] for each in records], dtype=np.float64)


def printed(rows: Sequence[dict[str, Any]]) -> None:
    """Methods down, measures across; the mean, and a sign where the difference from the gradient excludes zero."""
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    for number, measure in enumerate(measures):
        print(f"  [{number}] {measure}" + (" (lower is better)" if measure.startswith("deletion") else ""))
    print(f"{'':30}" + "".join(f"{f'[{number}]':>10}" for number in range(len(measures))))
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for row in (row for row in rows if row["method"] == method):
            sign = "+" if row["difference_low"] > 0 else "-" if row["difference_high"] < 0 else " "
            cells.append(f"{row['mean']:9.3f}{sign}")
        print(f"{method:30}" + "".join(cells))


def written(rows: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]], folder: Path) -> None:
    """The table as CSV and as a picture."""
    import matplotlib.pyplot as plt

    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure, panels = plt.subplots(
        1, len(measures), figsize=(2.3 * len(measures) + 2, 3.6), sharey=True, layout="constrained"
    )
    controls = {"random", "edges", *(name for name in names if name.startswith("untrained"))}
    at = np.arange(len(names))
    for panel, measure in zip(panels, measures, strict=True):
        found = {row["method"]: row for row in rows if row["measure"] == measure}
        mean, low, high = (
            np.array([found[name][part] for name in names]) for part in ("mean", "low", "high")
        )
        colours = [
            "0.6" if name in controls else "#b2182b" if "Pullback" in name else "#2166ac" for name in names
        ]
        panel.hlines(at, low, high, color=colours, linewidth=1.6)
        panel.scatter(mean, at, color=colours, s=16, zorder=3)
        panel.axvline(found[BASE]["mean"], color="#2166ac", linewidth=0.6, linestyle=":")
        better = "lower is better" if measure.startswith("deletion") else "higher is better"
        panel.set_title(measure.replace(", ", "\n", 1) + f"\n({better})", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(at, names, fontsize=8, parse_math=False)
    panels[0].invert_yaxis()
    count = len(records[0]["values"][BASE]["alignment"])
    figure.suptitle(
        f"{records[0]['data']}: {len(records)} training seeds x {count} images, 95% over seeds and images; dotted: "
        "the gradient",
        fontsize=9,
    )
    figure.savefig(folder / "pullbacks.png", dpi=110)
    plt.close(figure)
