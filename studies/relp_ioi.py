"""Does RelP agree better with activation patching than attribution patching does? On models trained here.

Small GPT-2s and Llamas of eight layers learn indirect-object identification (``studies.ioi``) until they solve pairs of
names and templates that training never shows. Then every layer's residual stream, attention output and MLP output is
patched at every position, from a prompt in which the other name gives to the clean one, and the estimates (attribution
patching, RelP, RelP without its attention rule, integrated gradients) are correlated with the exact effect.

    python -m studies.relp_ioi [--quick] [--out DIRECTORY]

Results are appended model by model to ``results.jsonl``; what is there is not done again. Checkpoints stay beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from pullback.evaluation.agreement import patching_report
from studies import ioi
from studies.records import append, finished

RESULTS = Path(__file__).parent / "results" / "relp_ioi"
METHODS = ("atp", "relp", "relp without attention", "ig")
GROUPS = ("residual", "attention", "mlp")


def groups_of(kind: str, layers: int) -> dict[str, list[str]]:
    """The sites of each group."""
    block, attention = ("transformer.h", "attn") if kind == "gpt2" else ("model.layers", "self_attn")
    return {
        "residual": [f"{block}.{number}" for number in range(layers)],
        "attention": [f"{block}.{number}.{attention}" for number in range(layers)],
        "mlp": [f"{block}.{number}.mlp" for number in range(layers)],
    }


def inputs(sentences: ioi.Sentences) -> dict[str, Tensor]:
    """What both kinds of model take."""
    places = (sentences.mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": sentences.tokens, "attention_mask": sentences.mask, "position_ids": places}


def measured(kind: str, seed: int, settings: Mapping[str, int], checkpoint: Path) -> dict[str, Any]:
    """Train one model (or load it), and correlate every estimate with exact patching."""
    layers = settings["layers"]
    model, accuracies = ioi.trained(
        kind, seed, layers=layers, width=settings["width"], steps=settings["steps"], checkpoint=checkpoint
    )
    clean, corrupted = ioi.held_out(settings["prompts"], ioi.HELD_OUT_TEMPLATES)
    rows = torch.arange(settings["prompts"])

    def difference(output: Any) -> Tensor:
        last: Tensor = output.logits[:, -1]
        return last[rows, clean.answer] - last[rows, clean.wrong]

    both = inputs(clean), inputs(corrupted)
    groups = groups_of(kind, layers)
    report = patching_report(model, *both, difference, groups, ("atp", "relp", "ig"))
    without = patching_report(model, *both, difference, groups, ("relp",), attention="gradient")
    correlations = []
    for group in GROUPS:
        for method, name, source in (
            ("atp", "atp", report),
            ("relp", "relp", report),
            ("relp without attention", "relp", without),
            ("ig", "ig", report),
        ):
            pearson, spearman = (source.agreement(group, name, each) for each in ("pearson", "spearman"))
            correlations.append(
                {
                    "group": group,
                    "method": method,
                    "pearson": pearson.estimate,
                    "low": pearson.low,
                    "high": pearson.high,
                    "spearman": spearman.estimate,
                }
            )
    return {"model": kind, "seed": seed, **settings, "accuracies": accuracies, "correlations": correlations}


def key_of(kind: str, seed: int, settings: Mapping[str, int]) -> str:
    """What makes a result the same result."""
    return json.dumps({"model": kind, "seed": seed, **settings}, sort_keys=True)


def table(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per model, group and method: the mean correlation over seeds, its range, and the worst interval."""
    rows = []
    for kind in dict.fromkeys(entry["model"] for entry in entries):
        every = [entry for entry in entries if entry["model"] == kind]
        for group in GROUPS:
            for method in METHODS:
                seen = [
                    each
                    for entry in every
                    for each in entry["correlations"]
                    if (each["group"], each["method"]) == (group, method)
                ]
                pearson = [each["pearson"] for each in seen]
                rows.append(
                    {
                        "model": kind,
                        "group": group,
                        "method": method,
                        "seeds": len(seen),
                        "pearson": mean(pearson),
                        "lowest seed": min(pearson),
                        "highest seed": max(pearson),
                        "low": min(each["low"] for each in seen),
                        "high": max(each["high"] for each in seen),
                        "spearman": mean(each["spearman"] for each in seen),
                    }
                )
    return rows


def picture(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A dot for each seed, with its interval over prompts: models side by side, a panel for each group."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(entry["model"] for entry in entries))
    figure = Figure(figsize=(9, 2.6 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(kinds), len(GROUPS), squeeze=False, sharey=True)
    for line, kind in zip(panels, kinds, strict=True):
        every = [entry for entry in entries if entry["model"] == kind]
        for axes, group in zip(line, GROUPS, strict=True):
            for number, entry in enumerate(every):
                for place, method in enumerate(METHODS):
                    (each,) = (
                        each
                        for each in entry["correlations"]
                        if (each["group"], each["method"]) == (group, method)
                    )
                    x = place + 0.15 * (number - (len(every) - 1) / 2)
                    axes.plot([x, x], [each["low"], each["high"]], color="0.6", linewidth=1)
                    axes.plot([x], [each["pearson"]], "o", color=f"C{place}", markersize=4)
            axes.set_title(f"{kind}, {group}", fontsize=9)
            axes.set_xticks(
                range(len(METHODS)), [m.replace(" without", "\nwithout") for m in METHODS], fontsize=7
            )
            axes.axhline(1, color="0.85", linewidth=0.8, zorder=0)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("Pearson with exact patching", fontsize=8)
    figure.savefig(path, dpi=110)


def write(entries: Sequence[Mapping[str, Any]], out: Path) -> str:
    """The table as CSV and as text, and the picture."""
    rows = table(entries)
    with (out / "correlations.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    picture(entries, out / "correlations.png")
    lines = [
        f"{'model':<7}{'site':<11}{'method':<24}{'Pearson over seeds':<24}{'intervals over prompts':<24}Spearman"
    ]
    for row in rows:
        seeds = f"{row['pearson']:.3f} [{row['lowest seed']:.3f}, {row['highest seed']:.3f}]"
        prompts = f"[{row['low']:.3f}, {row['high']:.3f}]"
        lines.append(
            f"{row['model']:<7}{row['group']:<11}{row['method']:<24}{seeds:<24}{prompts:<24}{row['spearman']:.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Train, patch, correlate; print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one shallow Llama, for the test suite")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    warnings.simplefilter("ignore")
    settings = {"layers": 8, "width": 64, "steps": 2000, "prompts": 32}
    models = [(kind, seed) for seed in range(3) for kind in ("llama", "gpt2")]
    if arguments.quick:
        settings = {"layers": 2, "width": 32, "steps": 150, "prompts": 4}
        models = [("llama", 0)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "results.jsonl"
    for kind, seed in models:
        key = key_of(kind, seed, settings)
        if key in finished(log):
            continue
        name = f"{kind}-{seed}-{settings['layers']}x{settings['width']}.safetensors"
        entry = measured(kind, seed, settings, arguments.out / "checkpoints" / name)
        append(log, {"key": key, **entry})
    wanted = [key_of(kind, seed, settings) for kind, seed in models]
    entries = [entry for key, entry in finished(log).items() if key in wanted]
    print(write(entries, arguments.out))


if __name__ == "__main__":
    main()
