"""Is evidence found in images when and only when it matters, and does steering by it raise held-out accuracy?

Small LLaVAs answer questions that name where to look: at the colours of an image or at the words of a header, each of
which is in a register of its own (``studies.coloured_patches``). Vectors are fitted on prompts whose side in question
is of register 1 to prefer the answer of register 0, half of them about the image and half about the words, on twelve
keys; block and strength are chosen on six others and reported on the last six.

    python -m studies.steering_images [--quick] [--out DIRECTORY]

Results are appended model by model to ``results.jsonl``; what is there is not done again. Checkpoints stay beside it.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from pullback.datasets import PatchDocuments, coloured_patches
from pullback.steering import SteeringVector, fit
from studies.coloured_patches import trained
from studies.records import append, finished
from studies.register import Tokenizer, split_keys
from studies.steering_protocol import (
    Answered,
    Questions,
    answered,
    choose,
    effect,
    interval,
    quantile,
    write_table,
)

RESULTS = Path(__file__).parent / "results" / "steering_images"
SOURCES = ("image", "words")
BOTH = {"text": 3, "image": 3}
# name -> arguments of fit
METHODS: dict[str, dict[str, Any]] = {
    "grains": {"k": BOTH},
    "grains, words only": {"k": {"text": 3}},
    "grains, patches only": {"k": {"image": 3}},
    "grains, RelP": {"k": BOTH, "attribution": "relp"},
    "mean_grad": {"method": "mean_grad"},
    "mean_diff": {"method": "mean_diff"},
}
# name -> arguments of fit, drawn several times
DRAWN: dict[str, dict[str, Any]] = {
    "random patches": {"method": "random_tokens", "k": {"image": 3}},
    "random words": {"method": "random_tokens", "k": {"text": 3}},
    "random directions": {"method": "random"},
}


def inputs_of(documents: PatchDocuments) -> Questions:
    """The documents' first questions: the answer of register 0 is preferred, though they are of register 1."""
    asked = {"input_ids": documents.prompts, "pixel_values": documents.pixels}
    return Questions(asked, documents.answers[:, 0])


def questions(count: int, keys: Sequence[int], seed: int) -> tuple[dict[str, PatchDocuments], Questions]:
    """Documents by the side that they ask about, ``count`` of each, and all together."""
    each = {
        name: coloured_patches(
            count, queries=1, agreement=0.65, register=1, source=source, keys=keys, seed=2 * seed + source
        )
        for source, name in enumerate(SOURCES)
    }
    found = [inputs_of(documents) for documents in each.values()]
    together = {name: torch.cat([one.inputs[name] for one in found]) for name in found[0].inputs}
    return each, Questions(together, torch.cat([one.answers for one in found]))


def fitted(model: nn.Module, asked: Questions, settings: Mapping[str, Any]) -> SteeringVector:
    pairs = [
        ({name: leaf[row : row + 1] for name, leaf in asked.inputs.items()}, int(yes), int(no))
        for row, (yes, no) in enumerate(asked.answers)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(
            model, Tokenizer(), pairs, **{"method": "grains", "steps": 20, "batch_size": 16, **settings}
        )


def evidence(vector: SteeringVector, documents: Mapping[str, PatchDocuments]) -> dict[str, dict[str, float]]:
    """By side asked about: how many of the cues were found among the three chosen of either sign and modality (of more
    than three, three can be), and how much of the chosen tokens' scores, in absolute value, is on patches."""
    chosen = iter(vector.provenance["chosen"])
    found = {}
    for name, each in documents.items():
        shares, on_patches = {"patches": [], "words": []}, []
        for row in range(len(each.x)):
            pair = next(chosen)
            entries = [entry for side in ("positive", "negative") for entry in pair[side]]
            total = sum(abs(score) for _, score, _ in entries)
            on_patches.append(sum(abs(score) for _, score, kind in entries if kind == "image") / total)
            for sign, side in ((1, "positive"), (-1, "negative")):
                for kind, group in (("image", "patches"), ("text", "words")):
                    places = range(1, 17) if kind == "image" else range(17, each.prompts.shape[1])
                    planted = {place for place in places if int(each.cues[row, place]) == sign}
                    got = {place for place, _, of in pair[side] if of == kind}
                    if planted:
                        shares[group].append(len(planted & got) / min(3, len(planted)))
        found[name] = {
            "cue patches found": mean(shares["patches"]),
            "cue words found": mean(shares["words"]),
            "score on patches": mean(on_patches),
        }
    return found


def measured(seed: int, settings: Mapping[str, int], checkpoint: Path) -> dict[str, Any]:
    """Train one model (or load it), fit every vector, choose, and report."""
    model = trained(seed, settings["steps"], checkpoint)
    keys = split_keys(seed)
    pairs, to_fit = questions(settings["pairs"] // 2, keys[0], 10_000_000 + 3 * seed)
    _, select = questions(settings["prompts"], keys[1], 10_000_001 + 3 * seed)
    report = {
        name: inputs_of(each)
        for name, each in questions(settings["prompts"], keys[2], 10_000_002 + 3 * seed)[0].items()
    }
    before = answered(model, select)
    bases: dict[str, Answered] = {name: answered(model, each) for name, each in report.items()}

    def result(vector: SteeringVector) -> dict[str, Any]:
        setting = choose(model, vector, select, before)
        return {name: effect(model, vector, setting, each, bases[name]) for name, each in report.items()}

    vectors = {name: fitted(model, to_fit, given) for name, given in METHODS.items()}
    draws = {name: settings["draws" if name == "random directions" else "token draws"] for name in DRAWN}
    return {
        "seed": seed,
        **settings,
        "solved": solved(model, seed),
        "base": {name: {"accuracy": base.accuracy} for name, base in bases.items()},
        "methods": {name: result(vector) for name, vector in vectors.items()},
        "drawn": {
            name: [result(fitted(model, to_fit, {**given, "seed": draw})) for draw in range(draws[name])]
            for name, given in DRAWN.items()
        },
        "evidence": {name: evidence(vectors[name], pairs) for name in ("grains", "grains, RelP")},
        "gap": vectors["grains"].provenance["completeness"]["relative_gap"],
        "vision once": vectors["grains"].provenance["vision_once"],
        "agreement": {
            name: max(each["pairwise"] for each in vector.provenance["agreement"]) for name, vector in vectors.items()
        },
    }  # fmt: skip


@torch.no_grad()
def solved(model: nn.Module, seed: int) -> dict[str, float]:
    """How often the model answers in the register of the side asked about, where all cues of that side agree."""
    found = {}
    for source, name in enumerate(SOURCES):
        documents = coloured_patches(300, queries=1, agreement=1.0, source=source, seed=20_000_000 + seed)
        asked = inputs_of(documents)
        side = documents.cues[:, 1:17] if source == 0 else documents.cues[:, 17:]
        told = side.any(1)
        answers = model(**asked.inputs).logits[:, -1].argmax(-1)
        found[name] = float((answers == documents.x[:, -1])[told].double().mean())
    return found


def key_of(seed: int, settings: Mapping[str, int]) -> str:
    """What makes a result the same result."""
    return json.dumps({"seed": seed, **settings}, sort_keys=True)


NAMES = ("no steering", *METHODS, *DRAWN, "random directions, 95th percentile")


def per_seed(entries: Sequence[Mapping[str, Any]], name: str, source: str) -> list[float]:
    """Accuracy for each seed: of a method, or the mean or the 95th percentile over draws."""
    if name == "no steering":
        return [entry["base"][source]["accuracy"] for entry in entries]
    if name in METHODS:
        return [entry["methods"][name][source]["accuracy"] for entry in entries]
    drawn, _, percentile = name.partition(", ")
    values = [[each[source]["accuracy"] for each in entry["drawn"][drawn]] for entry in entries]
    return [quantile(each, 0.95) if percentile else mean(each) for each in values]


def table(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per method: accuracy over seeds on questions about the image, about the words, and about both."""
    rows = []
    for name in NAMES:
        row: dict[str, Any] = {"method": name, "seeds": len(entries)}
        values = {source: per_seed(entries, name, source) for source in SOURCES}
        ours = {source: per_seed(entries, "grains", source) for source in SOURCES}
        for source in SOURCES:
            row[f"about the {source}"] = interval(values[source])
        both = [mean(pair) for pair in zip(*values.values(), strict=True)]
        row["both"] = interval(both)
        better = [mean(pair) for pair in zip(*ours.values(), strict=True)]
        row["grains better by"] = interval([a - b for a, b in zip(better, both, strict=True)])
        rows.append(row)
    return rows


def picture(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Where the evidence is found, and what steering does, for questions about the image and about the words."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1, 2])
    bars = (("cue patches found", "C0"), ("cue words found", "C1"), ("score on patches", "C3"))
    for place, source in enumerate(SOURCES):
        for shift, (name, colour) in enumerate(bars):
            values = [entry["evidence"]["grains"][source][name] for entry in entries]
            x = place + 0.26 * (shift - 1)
            left.bar(x, mean(values), 0.22, color=colour, alpha=0.35, label=name if place == 0 else None)
            left.plot([x] * len(values), values, "o", color=colour, markersize=3)
    left.set_xticks(range(2), [f"asked about the {source}" for source in SOURCES], fontsize=8)
    left.set(ylim=(0, 1.25), ylabel="share")
    left.legend(frameon=False, fontsize=7, loc="upper right")
    names = [name for name in NAMES if not name.endswith("percentile")]
    for place, name in enumerate(reversed(names)):
        for shift, (source, colour) in enumerate(zip(SOURCES, ("C0", "C1"), strict=True)):
            values = per_seed(entries, name, source)
            y = place + 0.16 * (0.5 - shift)
            right.plot(values, [y] * len(values), "o", color=colour, markersize=3, alpha=0.6)
            right.plot(
                [mean(values)], [y], "|", color=colour, markersize=9, label=source if place == 0 else None
            )
    right.set_yticks(range(len(names)), names[::-1], fontsize=8)
    right.set(xlim=(-0.03, 1.03), xlabel="accuracy on held-out keys")
    right.legend(title="asked about", frameon=False, fontsize=7, title_fontsize=7, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def summary(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the evidence was found."""
    lines = []
    for source in SOURCES:
        right = interval([entry["solved"][source] for entry in entries])
        lines.append(f"asked about the {source}; right where all its cues agree {right}")
        for name in entries[0]["evidence"]:
            each = entries[0]["evidence"][name][source]
            shares = {
                what: interval([entry["evidence"][name][source][what] for entry in entries]) for what in each
            }
            lines.append(f"   {name}: " + ", ".join(f"{what} {share}" for what, share in shares.items()))
    lines.append(f"completeness gap {interval([entry['gap'] for entry in entries])}")
    lines.append(f"vision tower once in {sum(entry['vision once'] for entry in entries)} of {len(entries)}")
    for name in entries[0]["agreement"]:
        lines.append(f"pairs agree, {name}: {interval([entry['agreement'][name] for entry in entries])}")
    return lines


def write(entries: Sequence[Mapping[str, Any]], out: Path) -> str:
    """The table as CSV and as text, and the picture."""
    rows = table(entries)
    picture(entries, out / "steering_images.png")
    lines = [f"{'method':<37}{'about the image':<24}{'about the words':<24}{'both':<24}grains better by"]
    for row in rows:
        lines.append(
            f"{row['method']:<37}{row['about the image']:<24}{row['about the words']:<24}{row['both']:<24}"
            f"{row['grains better by']}"
        )
    return write_table(rows, [*lines, "", *summary(entries)], out)


def main() -> None:
    """Train, fit, steer; print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one model, hardly trained, for the test suite")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    settings = {"steps": 1500, "pairs": 48, "prompts": 150, "draws": 20, "token draws": 3}
    seeds = range(5)
    if arguments.quick:
        settings = {"steps": 30, "pairs": 4, "prompts": 8, "draws": 1, "token draws": 1}
        seeds = range(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "results.jsonl"
    for seed in seeds:
        key = key_of(seed, settings)
        if key not in finished(log):
            checkpoint = arguments.out / "checkpoints" / f"{seed}-{settings['steps']}.safetensors"
            append(log, {"key": key, **measured(seed, settings, checkpoint)})
    wanted = [key_of(seed, settings) for seed in seeds]
    entries = [entry for key, entry in finished(log).items() if key in wanted]
    print(write(entries, arguments.out))


if __name__ == "__main__":
    main()
