"""Retraining a grid of small models: one stack of weights against one model after the other.

    OMP_NUM_THREADS=1 python -m benchmarks.retraining [--hidden 16 --batch 32] [--net cnn] [--attack]

90 members (6 orders, 3 views of each, 5 seeds) of 392-32-32-10, batch 64 by default. The loop trains 10 of them and is
scaled: its time is proportional to the members, up to the noise of a shared machine (--looped 90 trains all). All ways
use the same fused Adam. "floor" is what no way of stacking can do without: the matrix products and the optimizer of 30
members at a time, on data already masked, and nothing else.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from benchmarks.alternating import alternate, ratio
from pullback.evaluation import PGD, Examples, Member, TrainSpec, View, multilayer_perceptron, train_ensemble
from pullback.evaluation.ensembles import Vectorize

DIMENSIONS = 392
AT_ONCE = 30


def grid(examples: int) -> tuple[Examples, list[Member]]:
    """Random images of 28 x 14 with six random orders, and the 90 members that see them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(examples, DIMENSIONS, generator=generator)
    y = (x[:, : DIMENSIONS // 2].sum(1) > DIMENSIONS / 4).long()
    ranks = {
        str(number): torch.rand(x.shape, generator=generator).argsort(1).argsort(1).to(torch.int16)
        for number in range(6)
    }
    views = [view for name in ranks for view in (View(name, 20), View(name, 20, "bottom"), View(name, 39))]
    members = [Member(seed, view) for view in views for seed in range(5)]
    return Examples(x.reshape(-1, 1, 28, 14), y, ranks), members


def convolutional(channels: int) -> nn.Module:
    """Two convolutions, each followed by ReLU, with pooling between and after."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(2 * channels, 10),
    )  # fmt: skip


def floor(hidden: int, batch: int, steps: int, members: int) -> Callable[[], None]:
    """The products of forward and backward, as batched as they can be, and Adam."""
    widths = [DIMENSIONS, hidden, hidden, 10]
    weights = [torch.rand(AT_ONCE, n, m) for m, n in pairwise(widths)]
    values = [torch.rand(AT_ONCE, n, batch) for n in widths]
    values[0] = torch.rand(AT_ONCE, batch, DIMENSIONS).mT
    vector = torch.zeros(sum(weight.numel() for weight in weights))
    vector.grad = torch.zeros_like(vector)
    parts = vector.grad.split([weight.numel() for weight in weights])
    gradients = [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]
    optimizer = torch.optim.Adam([vector], fused=True)

    def run() -> None:
        for _ in range(steps * members // AT_ONCE):
            for number, weight in enumerate(weights):
                torch.bmm(weight, values[number])
                torch.bmm(values[number + 1], values[number].mT, out=gradients[number])
                if number:
                    torch.bmm(weight.mT, values[number + 1])
            optimizer.step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=1280)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=32, help="width of the two hidden layers, or channels")
    parser.add_argument("--net", choices=("perceptron", "cnn"), default="perceptron")
    parser.add_argument("--attack", action="store_true", help="train against 7 steps of an l2 adversary")
    parser.add_argument("--looped", type=int, default=10, help="members that the loop trains")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    examples, members = grid(options.examples)
    attack = PGD("l2", 1.0) if options.attack else None
    spec = TrainSpec(epochs=options.epochs, batch=options.batch, attack=attack)
    flat = options.net == "perceptron"

    def net() -> nn.Module:
        if flat:
            return multilayer_perceptron(DIMENSIONS, 10, (options.hidden, options.hidden))
        return convolutional(options.hidden)

    def run(way: Vectorize, some: list[Member]) -> None:
        train_ensemble(net, examples, some, spec, vectorize=way)

    together: Vectorize = "stack" if flat else "vmap"
    ways: dict[str, Callable[[], object]] = {
        together: lambda: run(together, members),
        "auto": lambda: run("auto", members),
        "loop": lambda: run("loop", members[: options.looped]),
    }
    if flat and not options.attack:
        steps = options.epochs * -(-options.examples // options.batch)
        ways["floor"] = floor(options.hidden, options.batch, steps, len(members))
    began = time.perf_counter()
    seconds = alternate(ways, options.pairs)
    seconds["loop"] = [value * len(members) / options.looped for value in seconds["loop"]]
    for name, values in seconds.items():
        print(f"{name}: best {min(values):.2f} s")
    for name in ways:
        if name != "loop":
            print(ratio(seconds, "loop", name))
    print(f"measured in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
