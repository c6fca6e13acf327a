"""Does steering by attribution move a model's answers to another register, and when does it fail?

Small Llamas learn to answer keys in the register that the cues of a header tell (``studies.register``). Vectors are
fitted on prompts of register 1 to prefer the answer of register 0, on twelve keys; block and strength are chosen on six
others and reported on the last six.

A: the registers have answers of their own. B, the control: both use the same words, so that no constant direction
stands for a register at a key that was not fitted.

    python -m studies.steering_register [--quick] [--out DIRECTORY]

Results are appended model by model to ``results.jsonl``; what is there is not done again. Checkpoints stay beside it.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from pullback.datasets import Registers, register_documents
from pullback.steering import SteeringVector, fit
from studies.records import append, finished
from studies.register import Tokenizer, split_keys, trained
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

RESULTS = Path(__file__).parent / "results" / "steering_register"
K = 3
# name -> arguments of fit
METHODS: dict[str, dict[str, Any]] = {
    "grains": {},
    "grains, mean": {"aggregate": "mean"},
    "grains, RelP": {"attribution": "relp"},
    "grains, gradient": {"attribution": "gradient"},
    "grains, zero baseline": {"baseline": "zero"},
    "mean_grad": {"method": "mean_grad"},
    "mean_diff": {"method": "mean_diff"},
    "mean_diff, last token": {"method": "mean_diff"},
}


def questions_of(documents: Registers) -> Questions:
    """The documents' first keys: the answer of register 0 is preferred, though they are of register 1."""
    return Questions({"input_ids": documents.prompts}, documents.answers[:, 0])


def fitted(
    model: nn.Module, documents: Registers, settings: Mapping[str, Any]
) -> tuple[SteeringVector, float, bool]:
    """A vector, the seconds that it took, and whether its integrated gradients were warned of."""
    asked = questions_of(documents)
    rows = zip(asked.inputs["input_ids"], asked.answers.tolist(), strict=True)
    pairs = [(prompt.tolist(), yes, no) for prompt, (yes, no) in rows]
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vector = fit(
            model,
            Tokenizer(),
            pairs,
            **{"method": "grains", "k": K, "steps": 16, "batch_size": 50, **settings},
        )
    return (
        vector,
        time.perf_counter() - began,
        any("completeness gap" in str(each.message) for each in caught),
    )


def recovery(vector: SteeringVector, cues: Tensor) -> dict[str, float]:
    """The share of the cues of register 0 found among the tokens chosen for it, and of register 1 against it.

    No more than ``K`` tokens of a sign are chosen, so that of more cues ``K`` are all that can be found. By chance it
    is the share of a header's tokens that is chosen.
    """
    chosen = vector.provenance["chosen"]
    found = {"chance": K / (cues.shape[1] - 2)}
    for name, sign in (("positive", 1), ("negative", -1)):
        shares = []
        for row, each in enumerate(chosen):
            planted = {place for place, cue in enumerate(cues[row].tolist()) if cue == sign}
            if planted:
                shares.append(len(planted & {place for place, *_ in each[name]}) / min(K, len(planted)))
        found[name] = mean(shares)
    return found


def measured(variant: str, seed: int, settings: Mapping[str, int], checkpoint: Path) -> dict[str, Any]:
    """Train one model (or load it), fit every vector, choose, and report."""
    shared = variant == "B"
    steps = settings["steps"] + (settings["steps"] // 2 if shared else 0)
    model = trained(seed, shared, steps, checkpoint)
    sets = []
    for number, (keys, size) in enumerate(
        zip(split_keys(seed), ("pairs", "choices", "prompts"), strict=True)
    ):
        sets.append(
            register_documents(
                settings[size], queries=1, agreement=0.65, register=1, keys=keys, shared_answers=shared,
                seed=10_000_000 + 3 * seed + number,
            )
        )  # fmt: skip
    select, report = (questions_of(documents) for documents in sets[1:])
    bases = answered(model, select), answered(model, report)

    def result(vector: SteeringVector, last_only: bool = False) -> dict[str, Any]:
        setting = choose(model, vector, select, bases[0], last_only)
        return effect(model, vector, setting, report, bases[1])

    methods, vectors, warned, seconds = {}, {}, {}, {}
    for name, given in METHODS.items():
        vectors[name], seconds[name], warned[name] = fitted(model, sets[0], given)
        methods[name] = result(vectors[name], last_only=name.endswith("last token"))
    grains = [name for name in METHODS if name.startswith("grains")]
    return {
        "variant": variant,
        "seed": seed,
        **settings,
        "solved": solved(model, shared, seed),
        "base": facts(bases[1]),
        "methods": methods,
        "random tokens": [
            result(fitted(model, sets[0], {"method": "random_tokens", "seed": draw})[0])
            for draw in range(settings["token draws"])
        ],
        "random": [
            result(fitted(model, sets[0], {"method": "random", "seed": draw})[0]) for draw in range(settings["draws"])
        ],
        "recovery": {name: recovery(vectors[name], sets[0].cues) for name in grains},
        "gap": {
            name: {**vectors[name].provenance["completeness"], "warned": warned[name]} for name in grains
        },
        "agreement": {
            name: max(each["pairwise"] for each in vectors[name].provenance["agreement"]) for name in METHODS
        },
        "seconds": seconds,
    }  # fmt: skip


def solved(model: nn.Module, shared: bool, seed: int) -> float:
    """How often the model gives the answer of the document's register, where all cues agree."""
    documents = register_documents(
        500, queries=1, agreement=1.0, shared_answers=shared, seed=20_000_000 + seed
    )
    told = documents.cues.any(1)
    with torch.no_grad():
        found = model(documents.prompts).logits[:, -1].argmax(-1)
    return float((found == documents.x[:, -1])[told].double().mean())


def facts(base: Answered) -> dict[str, float]:
    return {"accuracy": base.accuracy, "log p": float(base.log_probs[:, 0].mean()), "mass": base.mass}


def key_of(variant: str, seed: int, settings: Mapping[str, int]) -> str:
    """What makes a result the same result."""
    return json.dumps({"variant": variant, "seed": seed, **settings}, sort_keys=True)


def per_seed(entries: Sequence[Mapping[str, Any]], name: str, value: str) -> list[float]:
    """One number for each seed: of a method, or the mean or the 95th percentile over draws."""
    if name == "no steering":
        return [entry["base"]["accuracy"] if value == "accuracy" else 0.0 for entry in entries]
    if name in ("random tokens", "random"):
        return [mean(each[value] for each in entry[name]) for entry in entries]
    if name == "random, 95th percentile":
        return [quantile([each[value] for each in entry["random"]], 0.95) for entry in entries]
    return [entry["methods"][name][value] for entry in entries]


NAMES = ("no steering", *METHODS, "random tokens", "random", "random, 95th percentile")


def table(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per variant and method: accuracy and gain over seeds, and what is gained on it by "grains"."""
    rows = []
    for variant in dict.fromkeys(entry["variant"] for entry in entries):
        every = [entry for entry in entries if entry["variant"] == variant]
        for name in NAMES:
            values = {value: per_seed(every, name, value) for value in ("accuracy", "gain")}
            ours = {value: per_seed(every, "grains", value) for value in ("accuracy", "gain")}
            apart = {
                value: [a - b for a, b in zip(ours[value], values[value], strict=True)] for value in values
            }
            rows.append(
                {
                    "variant": variant,
                    "method": name,
                    "seeds": len(every),
                    "accuracy": interval(values["accuracy"]),
                    "worst seed": f"{min(values['accuracy']):.3f}",
                    "best seed": f"{max(values['accuracy']):.3f}",
                    "gain of log p": interval(values["gain"]),
                    "grains better by": interval(apart["accuracy"]),
                    "seeds where better": sum(each > 0 for each in apart["accuracy"]),
                }
            )
    return rows


def picture(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy on held-out keys: a dot for each seed, the interval of the mean, the band of random directions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from pullback.evaluation import student_interval

    variants = list(dict.fromkeys(entry["variant"] for entry in entries))
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(variants), squeeze=False, sharey=True, sharex=True)[0]
    names = [name for name in NAMES if not name.startswith("random,")]
    for axes, variant in zip(panels, variants, strict=True):
        every = [entry for entry in entries if entry["variant"] == variant]
        for place, name in enumerate(reversed(names)):
            values = per_seed(every, name, "accuracy")
            colour = "C3" if name == "grains" else "0.25"
            axes.plot(values, [place + 0.18] * len(values), "o", color=colour, markersize=3, alpha=0.5)
            found = student_interval(values)
            axes.plot([found.low, found.high], [place - 0.12] * 2, color=colour, linewidth=1.5)
            axes.plot([found.estimate], [place - 0.12], "|", color=colour, markersize=9)
        axes.axvline(
            mean(per_seed(every, "random, 95th percentile", "accuracy")), color="C0", linewidth=0.9, linestyle=":",
            label="95th percentile of random directions",
        )  # fmt: skip
        title = {"A": "A: answers of their own", "B": "B, the control: shared answers"}[variant]
        axes.set(xlabel="accuracy on held-out keys", xlim=(-0.03, 1.03), title=title)
        axes.set_yticks(range(len(names)), names[::-1], fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=7, loc="lower right")
    figure.savefig(path, dpi=110)


def summary(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not in the table: evidence found, completeness, agreement, cost."""
    lines = []
    for variant in dict.fromkeys(entry["variant"] for entry in entries):
        every = [entry for entry in entries if entry["variant"] == variant]
        lines.append(
            f"{variant}: the model answers right where all cues agree: {interval([e['solved'] for e in every])}"
        )
        for name in every[0]["recovery"]:
            sides = [
                interval([entry["recovery"][name][side] for entry in every])
                for side in ("positive", "negative")
            ]
            gaps = [entry["gap"][name]["relative_gap"] for entry in every]
            warned = sum(entry["gap"][name]["warned"] for entry in every)
            lines.append(
                f"   {name}: cues found {sides[0]} for, {sides[1]} against; gap {interval(gaps)}, warned of "
                f"in {warned} of {len(every)}"
            )
        chance = mean(entry["recovery"]["grains"]["chance"] for entry in every)
        lines.append(f"   by chance {chance:.3f} of either")
        for name in ("grains", "mean_grad", "mean_diff"):
            agree = interval([entry["agreement"][name] for entry in every])
            wrong = interval([entry["methods"][name]["moved the wrong way"] for entry in every])
            other = interval([entry["methods"][name]["accuracy the other way"] for entry in every])
            lines.append(
                f"   {name}: pairs agree {agree}; prompts moved the wrong way {wrong}; accuracy with -s {other}"
            )
        ratio = [entry["seconds"]["grains"] / entry["seconds"]["grains, RelP"] for entry in every]
        lines.append(f"   fitting by integrated gradients takes {interval(ratio)} times as long as by RelP")
    return lines


def write(entries: Sequence[Mapping[str, Any]], out: Path) -> str:
    """The table as CSV and as text, and the picture."""
    rows = table(entries)
    picture(entries, out / "steering_register.png")
    lines = [f"{'':<3}{'method':<26}{'accuracy':<24}{'gain of log p':<25}{'grains better by':<26}in seeds"]
    for row in rows:
        lines.append(
            f"{row['variant']:<3}{row['method']:<26}{row['accuracy']:<24}{row['gain of log p']:<25}"
            f"{row['grains better by']:<26}{row['seeds where better']} of {row['seeds']}"
        )
    return write_table(rows, [*lines, "", *summary(entries)], out)


def main() -> None:
    """Train, fit, steer; print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one model of each kind, hardly trained, for the tests"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--variants", default="AB", help='"A", "B" or both; others that are there are kept')
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    settings = {"steps": 300, "pairs": 50, "choices": 200, "prompts": 500, "draws": 20, "token draws": 3}
    models = [(variant, seed) for seed in range(5) for variant in arguments.variants]
    if arguments.quick:
        settings = {"steps": 10, "pairs": 4, "choices": 8, "prompts": 8, "draws": 1, "token draws": 1}
        models = [("A", 0), ("B", 0)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "results.jsonl"
    for variant, seed in models:
        key = key_of(variant, seed, settings)
        if key not in finished(log):
            name = f"{variant}-{seed}-{settings['steps']}.safetensors"
            entry = measured(variant, seed, settings, arguments.out / "checkpoints" / name)
            append(log, {"key": key, **entry})
    wanted = [key_of(variant, seed, settings) for variant in "AB" for seed in range(5)]
    entries = sorted(
        (entry for key, entry in finished(log).items() if key in wanted),
        key=lambda entry: (entry["variant"], entry["seed"]),
    )
    print(write(entries, arguments.out))


if __name__ == "__main__":
    main()
