"""Retraining a grid of small models: one stack of weights against one model after the other.

    OMP_NUM_THREADS=1 python -m benchmarks.retraining

90 members (6 orders, 3 views of each, 5 seeds) of 392-32-32-10, batch 64 by default. The loop trains 10 of them and is
scaled: its time is proportional to the members. Both ways use the same fused Adam and make masks per mini-batch, so the
smaller the matrix products, the more the stack gains: try --hidden 16 --batch 32.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.alternating import alternate, ratio
from pullback.evaluation import Examples, Member, TrainSpec, View, multilayer_perceptron, train_ensemble
from pullback.evaluation.ensembles import Vectorize

DIMENSIONS = 392
LOOPED = 10


def grid(examples: int) -> tuple[Examples, list[Member]]:
    """Random data with six random orders, and the 90 members that see them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(examples, DIMENSIONS, generator=generator)
    y = (x[:, : DIMENSIONS // 2].sum(1) > DIMENSIONS / 4).long()
    ranks = {
        str(number): torch.rand(x.shape, generator=generator).argsort(1).argsort(1).to(torch.int16)
        for number in range(6)
    }
    views = [view for name in ranks for view in (View(name, 20), View(name, 20, "bottom"), View(name, 39))]
    return Examples(x, y, ranks), [Member(seed, view) for view in views for seed in range(5)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=1280)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=32, help="width of the two hidden layers")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    examples, members = grid(options.examples)
    spec = TrainSpec(epochs=options.epochs, batch=options.batch)

    def run(way: Vectorize, some: list[Member]) -> None:
        train_ensemble(
            lambda: multilayer_perceptron(DIMENSIONS, 10, (options.hidden, options.hidden)),
            examples,
            some,
            spec,
            vectorize=way,
        )

    began = time.perf_counter()
    seconds = alternate(
        {
            "stack": lambda: run("stack", members),
            "auto": lambda: run("auto", members),
            "loop": lambda: run("loop", members[:LOOPED]),
        },
        options.pairs,
    )
    seconds["loop"] = [value * len(members) / LOOPED for value in seconds["loop"]]
    for name, values in seconds.items():
        print(f"{name}: best {min(values):.2f} s")
    print(ratio(seconds, "loop", "stack"))
    print(ratio(seconds, "loop", "auto"))
    print(f"measured in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
