"""Tables and pictures of the study of input gradients, from its records, beside the paper's own curves."""

from __future__ import annotations

import base64
import csv
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pullback.evaluation import Interval, hierarchical_bootstrap

__all__ = ["PAPER", "packed", "report", "unpacked"]

Records = Mapping[str, Sequence[Mapping[str, Any]]]
# DiffROAR of the gradient by the fraction kept, read off the vector plots in the authors' repository
# (harshays/inputgradients, 3770469): the mean over pairings of runs.
PAPER_LEVELS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
PAPER = {
    "CIFAR-10 ResNet50": {
        "standard": (-0.056, -0.048, -0.030, -0.006, 0.010, 0.012, 0.010),
        "l2 0.25": (0.086, 0.088, 0.094, 0.075, 0.062, 0.053, 0.052),
        "l2 0.5": (0.121, 0.137, 0.128, 0.121, 0.101, 0.067, 0.051),
        "linf 8/255": (0.232, 0.228, 0.188, 0.149, 0.094, 0.045, 0.015),
    },
    "ImageNet-10 ResNet18": {
        "standard": (-0.053, -0.046, -0.037, 0.007, 0.051, 0.011, 0.039),
        "l2 1": (0.066, 0.069, 0.030, 0.035, 0.046, 0.018, 0.040),
        "linf 2/255": (0.152, 0.107, 0.085, 0.056, 0.025, 0.034, 0.018),
        "linf 4/255": (0.149, 0.111, 0.088, 0.076, 0.051, 0.032, 0.018),
    },
}
SHAPE = "mask shape alone"
DIFFERENCE = "robust minus standard net"
COLOURS = {
    "gradient, standard net": "#2166ac",
    "gradient, robust net": "#b2182b",
    "gradient, standard net, blurred": "#67a9cf",
    "edges": "#1b7837",
    "untrained": "#e08214",
    "input": "0.2",
}


def packed(bits: Tensor) -> dict[str, Any]:
    """A bool tensor as text: its bits, compressed."""
    raw = np.packbits(bits.cpu().numpy().astype(bool).reshape(-1))
    return {"shape": list(bits.shape), "bits": base64.b64encode(zlib.compress(raw.tobytes(), 9)).decode()}


def unpacked(text: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """The tensor of ``packed``, as 0.0 and 1.0."""
    raw = np.frombuffer(zlib.decompress(base64.b64decode(text["bits"])), dtype=np.uint8)
    count = int(np.prod(text["shape"]))
    return np.unpackbits(raw, count=count).reshape(text["shape"]).astype(np.float64)


def diffroar_rows(records: Records) -> list[dict[str, Any]]:
    """One row per data set, mask, method and level: DiffROAR with its interval, and the accuracy of both arms."""
    rows = []
    for part, bases in records.items():
        if not part.startswith("diffroar"):
            continue
        dataset = bases[0]["dataset"]
        for mask in bases[0]["results"]:
            hits: dict[tuple[str, float], npt.NDArray[np.float64]] = {}
            for number, first in enumerate(bases[0]["results"][mask]):
                every = [base["results"][mask][number] for base in bases]
                assert all(
                    (each["method"], each["level"]) == (first["method"], first["level"]) for each in every
                )
                # (bases, sides, retrainings, images)
                right = np.stack([unpacked(each["right"]) for each in every])
                known = {part: first[part] for part in ("method", "control", "level")}
                hits[first["method"], first["level"]] = right[:, 0] - right[:, 1]
                counts = {
                    "top": round(float(right[:, 0].mean()), 4),
                    "bottom": round(float(right[:, 1].mean()), 4),
                    "not converged": sum(each["flagged"] for each in every),
                    "diverged": sum(each["diverged"] for each in every),
                    "retrainings": right[:, :, :, 0].size,
                }
                bounds = _bounds(hierarchical_bootstrap(right[:, 0] - right[:, 1], samples=1000))
                rows.append({"dataset": dataset, "mask": mask, **known, **bounds, **counts})
            for level in dict.fromkeys(level for _, level in hits):
                robust, standard = (hits[f"gradient, {net} net", level] for net in ("robust", "standard"))
                bounds = _bounds(hierarchical_bootstrap(robust - standard, samples=1000))
                known = {"method": DIFFERENCE, "control": False, "level": level}
                empty = dict.fromkeys(counts, "")
                rows.append({"dataset": dataset, "mask": mask, **known, **bounds, **empty})
    return rows


def value_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per map and measure of the leakage or the theory part, over base seeds and images."""
    rows = []
    for name, measures in records[0]["values"].items():
        for measure in measures:
            table = np.array([record["values"][name][measure] for record in records], dtype=np.float64)
            found = hierarchical_bootstrap(table)
            rows.append({"map": name, "measure": measure, **_bounds(found), "undefined": found.undefined})
    return rows


def _bounds(found: Interval) -> dict[str, float]:
    return {
        "mean": round(found.estimate, 4),
        "low": round(found.low, 4),
        "high": round(found.high, 4),
    }


def report(records: Records, folder: Path) -> str:
    """Write the tables and pictures; the same as text."""
    diffroar, leak, theory = (
        diffroar_rows(records),
        value_rows(records["leakage"]),
        value_rows(records["theory"]),
    )
    for name, rows in (("diffroar", diffroar), ("leakage", leak), ("theory", theory)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    curves(diffroar, folder / "diffroar.png")
    shares(leak, theory, folder / "leakage.png")
    heat(records["leakage"][0]["maps"], folder / "maps.png")
    return "\n".join(
        [*_accuracies(records), *_tables(diffroar), *_values("leakage", leak), *_values("theory", theory)]
    )


def _accuracies(records: Records) -> list[str]:
    lines = ["accuracy of the base nets, plain and attacked, mean over base seeds"]
    for part, bases in records.items():
        if part == "theory":
            for kind in bases[0]["accuracy"]:
                plain, attacked = (
                    np.mean([b["accuracy"][kind][each] for b in bases]) for each in ("plain", "attacked")
                )
                lines.append(f"  {part}, {kind}: {plain:.3f} {attacked:.3f}")
        else:
            for kind in bases[0]["accuracy"]:
                plain, attacked = (
                    np.mean([b[each][kind] for b in bases]) for each in ("accuracy", "attacked")
                )
                lines.append(f"  {part}, {kind}: {plain:.3f} {attacked:.3f}")
        collapsed = sum(len(base.get("collapsed", ())) for base in bases)
        lines += [f"  {part}: {collapsed} nets collapsed"] if collapsed else []
    return lines


def _tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for dataset, mask in dict.fromkeys((row["dataset"], row["mask"]) for row in rows):
        here = [row for row in rows if (row["dataset"], row["mask"]) == (dataset, mask)]
        levels = list(dict.fromkeys(row["level"] for row in here))
        title = f"{dataset}, {mask}: DiffROAR [95 %] (accuracy of top / bottom), by fraction kept"
        lines += ["", title, f"{'':36}" + "".join(f"{level:<38g}" for level in levels)]
        for method in dict.fromkeys(row["method"] for row in here):
            own = [row for row in here if row["method"] == method]
            cells = [
                f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
                + (f" ({row['top']:.2f} / {row['bottom']:.2f})" if row["top"] != "" else "")
                for row in own
            ]
            name = f"{method} *" if own[0]["control"] else method
            lines.append(f"{name:<36}" + "".join(f"{cell:<38}" for cell in cells))
    lines += [
        "* control",
        "",
        "the paper's own curves (as plotted in the authors' repository), by fraction kept",
    ]
    lines.append(f"{'':36}" + "".join(f"{level:<8g}" for level in PAPER_LEVELS))
    for data, nets in PAPER.items():
        for net, values in nets.items():
            lines.append(f"{f'{data}, {net}':<36}" + "".join(f"{value:<+8.3f}" for value in values))
    return lines


def _values(title: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["", f"{title}: mean [95 %]"]
    return lines + [
        f"{row['map']:<40}{row['measure']:<38}{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        + (f" ({row['undefined']} undefined)" if row["undefined"] else "")
        for row in rows
    ]


def curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """DiffROAR by the fraction kept: data sets across, masks down, the paper's curves beside them."""
    import matplotlib.pyplot as plt

    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    masks = [mask for mask in dict.fromkeys(row["mask"] for row in rows) if mask != SHAPE]
    columns = len(datasets) + 1
    lines = max(2, len(masks))
    figure, panels = plt.subplots(
        lines, columns, figsize=(4.1 * columns, 3.4 * lines), layout="constrained", squeeze=False
    )
    for across, dataset in enumerate(datasets):
        for down in range(lines):
            panel = panels[down][across]
            if down >= len(masks):
                panel.set_axis_off()
                continue
            here = [row for row in rows if (row["dataset"], row["mask"]) == (dataset, masks[down])]
            here = [row for row in here if row["method"] != DIFFERENCE]
            _panel(panel, here)
            panel.set_title(f"{dataset}, masked with {masks[down]}", fontsize=9)
    for panel, (name, nets) in zip(panels[:, -1], PAPER.items(), strict=False):
        for number, (net, values) in enumerate(nets.items()):
            colour = COLOURS["gradient, standard net"] if net == "standard" else f"C{number + 2}"
            panel.plot(PAPER_LEVELS, values, color=colour, marker="o", markersize=3, label=net)
        panel.set_title(f"the paper's: {name}", fontsize=9)
        panel.legend(fontsize=7, frameon=False)
    for panel in panels.flat:
        panel.axhline(0, color="0.5", linewidth=0.7, zorder=0)
        panel.set_xlabel("fraction of pixels kept", fontsize=8)
        panel.set_ylabel("DiffROAR", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0][0].get_legend_handles_labels(),
        loc="outside lower left",
        ncols=4,
        fontsize=8,
        frameon=False,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(panel: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        levels, mean, low, high = ([row[part] for row in own] for part in ("level", "mean", "low", "high"))
        if method == "random":
            panel.fill_between(levels, low, high, color="0.8", label=method)
            continue
        colour = COLOURS[method]
        control = own[0]["control"]
        panel.plot(
            levels, mean, color=colour, linestyle="--" if control else "-", marker="o", markersize=2.5,
            linewidth=1.0 if control else 1.8, label=f"{method} (control)" if control else method,
        )  # fmt: skip
        if control:
            panel.vlines(levels, low, high, color=colour, linewidth=0.8)
        else:
            panel.fill_between(levels, low, high, color=colour, alpha=0.2, linewidth=0)


def shares(leak: Sequence[Mapping[str, Any]], theory: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Leakage into the null block, and the sizes of the gradient on the theory's data."""
    import matplotlib.pyplot as plt

    measures = [
        *((measure, leak) for measure in dict.fromkeys(row["measure"] for row in leak)),
        *((measure, theory) for measure in dict.fromkeys(row["measure"] for row in theory)),
    ]
    figure, panels = plt.subplots(1, len(measures), figsize=(3.1 * len(measures), 3.0), layout="constrained")
    for panel, (measure, rows) in zip(panels, measures, strict=True):
        own = [row for row in rows if row["measure"] == measure]
        names = [row["map"].replace(", signal", ",\nsignal") for row in own]
        colours = [
            "#b2182b" if "robust" in name else "#2166ac" if "standard" in name else "0.6" for name in names
        ]
        at = np.arange(len(own))
        mean = np.array([row["mean"] for row in own])
        bounds = [mean - [row["low"] for row in own], [row["high"] for row in own] - mean]
        panel.barh(at, mean, xerr=np.maximum(bounds, 0), color=colours, height=0.7, error_kw={"linewidth": 1})
        panel.set_yticks(at, names, fontsize=7)
        panel.invert_yaxis()
        panel.set_title(measure if rows is leak else f"theory: {measure}", fontsize=7.5, wrap=True)
        panel.tick_params(axis="x", labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
        if rows is leak:
            panel.axvline(0.5, color="0.4", linewidth=0.7, linestyle=":")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def heat(maps: Mapping[str, Any], path: Path) -> None:
    """Three images and the absolute gradients of each net, beside one another."""
    import matplotlib.pyplot as plt

    names = list(maps)
    count = len(maps[names[0]]["map"])
    figure, panels = plt.subplots(
        count,
        2 * len(names),
        figsize=(1.25 * 2 * len(names), 2.3 * count),
        layout="constrained",
        squeeze=False,
    )
    for across, name in enumerate(names):
        for down in range(count):
            panels[down][2 * across].imshow(maps[name]["image"][down], cmap="gray", vmin=0, vmax=255)
            panels[down][2 * across + 1].imshow(maps[name]["map"][down], cmap="magma", vmin=0, vmax=255)
        panels[0][2 * across + 1].set_title(name.replace(", ", ",\n"), fontsize=8, loc="right")
    for panel in panels.flat:
        panel.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)
