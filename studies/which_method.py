"""Which method? All of the package and their controls, by every metric, on data whose signal is and is not known.

Small nets on BlockMNIST (averaged over squares of two pixels: 28 x 14), Fashion-MNIST and the theory's data set,
trained plainly and against an adversary, several seeds each. The suites of ``pullback.evaluation.suites`` measure the
maps of the predicted class; intervals resample seeds and images together. Without the files of Fashion-MNIST the
embedded MNIST digits stand in for it, and the tables say so.

    python -m studies.which_method [--quick] [--out DIR]

writes the table, the figure of ranks and, from the full run, docs/which-method.md. What is finished is read back from
DIR, also after kill -9.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pullback.evaluation import Measurements
from pullback.evaluation.suites import Retraining, Suite
from pullback.evaluation.suites.compared import METHODS
from pullback.viz import rank_table
from studies.which_method_page import mean_ranks, page, summary

ROOT = Path(__file__).parents[1]
FAITHFUL = ("deletion", "insertion", "road", "faithfulness_correlation", "infidelity")
SANITY = ("sensitivity_max", "parameter_randomization", "random_logit")
LOCAL = ("leakage", "relevance_rank", "pointing_game")


def clothes() -> tuple[str, str | None]:
    """Fashion-MNIST from the folder PULLBACK_DATA names, else ../shared/data; else the embedded digits.

    Tasks say "env" and not the folder, so that finished ones are found on every machine.
    """
    beside = ROOT.parent / "shared" / "data"
    if "PULLBACK_DATA" not in os.environ and (beside / "fashion-mnist").is_dir():
        os.environ["PULLBACK_DATA"] = str(beside)
    if (Path(os.environ.get("PULLBACK_DATA", ".")) / "fashion-mnist").is_dir():
        return "fashion-mnist", "env"
    return "mnist", None


def suites(quick: bool) -> list[Suite]:
    """The measurements: maps on blocks, clothes and the theory's vectors, and retrainings on what maps keep."""
    name, root = clothes()
    blocks = (("block_mnist", "standard"), ("block_mnist", "robust"))
    images = 4 if quick else 64
    few = {"images": images, "seeds": 1 if quick else 3}
    blocks_settings = {"pool": 2, "radius": 1.0, "architecture": "perceptron", "epochs": 2 if quick else 10}
    trained_on = 300 if quick else None
    cloth = {
        "root": root,
        "radius": 1.0,
        "epochs": 2 if quick else 6,
        "training_images": 300 if quick else 6000,
    }
    how = Retraining(seeds=2, epochs=2 if quick else 6)
    some = ("gradient", "integrated gradients") if quick else tuple(METHODS)
    return [
        Suite("blocks", blocks, (*LOCAL, *FAITHFUL, *SANITY), training_images=trained_on, **few, **blocks_settings),
        Suite(
            "blocks_convolutional", blocks, (*LOCAL, *FAITHFUL, *SANITY),
            training_images=trained_on, **few, **{**blocks_settings, "architecture": "convolutional", "radius": 0.5},
        ),
        Suite("top", (("block_mnist_top", "standard"),), LOCAL, training_images=trained_on, **few, **blocks_settings),
        Suite(
            "clothes", ((name, "standard"), (name, "robust")), (*FAITHFUL, *SANITY), pool=2 if quick else 1, **few,
            **cloth,
        ),
        Suite(
            "theory", (("block_signal", "standard"), ("block_signal", "robust")),
            (*LOCAL, *(name for name in FAITHFUL if name != "road"), "monotonicity", *SANITY),
            architecture="perceptron", radius=0.35, norm="linf", epochs=4 if quick else 20, **few,
        ),
        Suite(
            "retraining_blocks", blocks, ("diffroar", "mask_shape"), methods=some, retraining=how,
            training_images=trained_on, seeds=1 if quick else 2, **blocks_settings,
        ),
        Suite(
            "retraining_clothes", ((name, "standard"), (name, "robust")), ("diffroar", "mask_shape"), methods=some,
            retraining=how, pool=2, seeds=1 if quick else 2,
            **{**cloth, "radius": 0.5, "training_images": 300 if quick else 4000},
        ),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write the table, the figure and the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few images and tiny trainings, about a minute")
    parser.add_argument(
        "--out", type=Path, default=None, help="else studies/results/which_method, or runs/ with --quick"
    )
    given = parser.parse_args(arguments)
    kept = ROOT / "studies" / "results" / "which_method"
    folder = given.out or (Path("runs") / "which-method-quick" if given.quick else kept)
    torch.set_num_threads(1)
    whole, models = Measurements([]), {}
    for each in suites(given.quick):
        began = time.perf_counter()
        found = each.run(out=folder / each.name, threads=1)
        print(f"{each.name}: {len(found.rows)} measurements, {time.perf_counter() - began:.0f} s", flush=True)
        models |= {
            f"{name} ({each.architecture})": facts for name, facts in found.settings.get("models", {}).items()
        }
        rows = found.rows
        if each.name == "blocks_convolutional":
            rows = [replace(row, model=f"{row.model}, convolutional") for row in rows]
        whole += Measurements(rows)
    whole.to_csv(folder / "table.csv")
    (folder / "tables.md").write_text(whole.to_markdown() + "\n", encoding="utf-8")
    figure = rank_table(mean_ranks(whole)).get_figure(root=True)
    assert figure is not None
    figure.savefig(folder / "ranks.png", dpi=110, facecolor="white", metadata={"Software": None})
    print(summary(whole))
    text = page(whole, models)
    (folder / "which-method.md").write_text(text, encoding="utf-8")
    if folder == kept:
        (ROOT / "docs" / "which-method.md").write_text(text, encoding="utf-8")
        (ROOT / "docs" / "images" / "ranks.png").write_bytes((folder / "ranks.png").read_bytes())


if __name__ == "__main__":
    main()
