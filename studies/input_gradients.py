"""Do input gradients highlight what a network uses? Of standard nets and of robust ones, with controls and intervals.

After H. Shah, P. Jain, P. Netrapalli (NeurIPS 2021), on nets trained here. Three parts, each per base seed:

- diffroar: on Fashion-MNIST (14 x 14 pixels; left out where the files are not found) and BlockMNIST-10 (28 x 14), a
  standard and an l2-robust perceptron; small perceptrons are retrained on the top and on the bottom pixels by their
  gradients, under two mask values. Controls: random, an untrained net, the input's intensity, edges, the standard net's
  map blurred; and what the shape of the mask alone tells of the class.
- leakage: on BlockMNIST-10, the share of the gradient on the block that says nothing: a standard net, a robust one, and
  a standard one where the digit is always on top.
- theory: on the data of the paper's theorem, how much of the gradient is at the places where the signal may be.

Intervals resample base seeds, retraining seeds and images together.

    python -m studies.input_gradients [--quick] [--out DIRECTORY] [--seeds N]

Records are appended to ``results.jsonl``; what is there is not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pullback as pb
from pullback.datasets import block_mnist, fashion_mnist, signal_coordinates
from pullback.evaluation import (
    PGD,
    DiffROAR,
    RetrainingResult,
    TrainSpec,
    leakage,
    multilayer_perceptron,
    train,
)
from studies.input_gradients_report import packed, report
from studies.records import append, finished

RESULTS = Path(__file__).parent / "results" / "input_gradients"
FASHION, BLOCKS = "Fashion-MNIST", "BlockMNIST-10"
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of one record, besides its seed."""

    datasets: tuple[str, ...] = (FASHION, BLOCKS)
    training_images: int = 6000
    test_images: int = 1000
    hidden: int = 128
    epochs: int = 30
    robust_epochs: int = 30
    radius: float = 1.0
    levels: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    retrainings: int = 4
    retraining_hidden: int = 32
    # arms masked with the mean learn more slowly
    masks: tuple[tuple[str, int], ...] = (("zeros", 8), ("mean", 16))
    leakage_images: int = 4000
    leakage_test_images: int = 500
    theory_epochs: tuple[int, int] = (20, 60)


FULL = Settings()
QUICK = Settings(
    datasets=(BLOCKS,), training_images=1500, test_images=200, epochs=5, robust_epochs=8, levels=(0.05, 0.2),
    retrainings=2, masks=(("zeros", 8),), leakage_images=2000, leakage_test_images=100,
)  # fmt: skip


def data_folder() -> Path | None:
    """Where Fashion-MNIST is: PULLBACK_DATA or ../shared/data."""
    named = os.environ.get("PULLBACK_DATA")
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    for root in (Path(named) if named else None, beside):
        if root is not None and (root / "fashion-mnist").is_dir():
            return root
    return None


def images(name: str, settings: Settings) -> tuple[Pair, Pair]:
    """Training and test images with labels, area-averaged to half the height and width."""
    parts = []
    for split, count in (("train", settings.training_images), ("test", settings.test_images)):
        if name == FASHION:
            data: Any = fashion_mnist(data_folder(), split)  # type: ignore[arg-type]
        else:
            data = block_mnist(split=split, classes=range(10))  # type: ignore[arg-type]
        parts.append((F.avg_pool2d(data.x[:count], 2), data.y[:count]))
    return parts[0], parts[1]


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    """Of the predicted class's logit."""
    return maps(model, x, pb.Gradient())


def maps(model: nn.Module, x: Tensor, method: Any) -> Tensor:
    """A method's map of the predicted class."""
    (values,) = pb.explain(model, x, method=method).leaves().values()
    return values


def base_nets(
    x: Tensor,
    y: Tensor,
    test: Pair,
    settings: Settings,
    seed: int,
    radius: float,
    bounds: tuple[float, float],
) -> dict[str, Any]:
    """A standard and a robust perceptron, with their accuracies, plain and attacked."""
    classes = int(y.max()) + 1
    build = lambda: multilayer_perceptron(x[0].numel(), classes, (settings.hidden, settings.hidden))  # noqa: E731
    attack = PGD("l2", radius)
    found: dict[str, Any] = {"accuracy": {}, "attacked": {}, "collapsed": []}
    for name, epochs, against in (
        ("standard", settings.epochs, None),
        ("robust", settings.robust_epochs, attack),
    ):
        trained = train(
            build, x, y, TrainSpec(epochs=epochs, seed=seed, attack=against, bounds=bounds), validation=test
        )
        perturbed = attack.perturb(trained.model, *test, bounds=bounds)
        found[name] = trained.model
        found["accuracy"][name] = trained.accuracy
        found["attacked"][name] = float((trained.model(perturbed).argmax(1) == test[1]).double().mean())
        found["collapsed"] += [name] if trained.collapsed else []
    return found


def diffroar(name: str, seed: int, settings: Settings) -> dict[str, Any]:
    """One data set and base seed: which test images every retrained net gets right."""
    train_part, test_part = images(name, settings)
    nets = base_nets(*train_part, test_part, settings, seed, settings.radius, (0.0, 1.0))
    points = train_part[0], test_part[0]

    def both(of: Callable[[Tensor], Tensor]) -> Pair:
        return of(points[0]), of(points[1])

    compared = {
        f"gradient, {kind} net": both(lambda x, kind=kind: gradient(nets[kind], x))
        for kind in ("standard", "robust")
    }
    controls = {
        "edges": both(lambda x: maps(nets["standard"], x, pb.EdgeDetector())),
        "gradient, standard net, blurred": both(
            lambda x: F.avg_pool2d(gradient(nets["standard"], x).abs(), 3, stride=1, padding=1)
        ),
    }
    build = lambda: multilayer_perceptron(  # noqa: E731
        points[0][0].numel(), 10, (settings.retraining_hidden, settings.retraining_hidden)
    )
    measure = DiffROAR(
        levels=settings.levels, seeds=settings.retrainings, validation=0.0, vectorize="stack",
        training=TrainSpec(batch=128, learning_rate=2e-3, seed=1000 * (seed + 1)),
    )  # fmt: skip
    results = {}
    for mask, epochs in settings.masks:
        each = replace(measure, mask=mask, training=replace(measure.training, epochs=epochs))
        results[mask] = arms(each.run(train_part, test_part, compared, build, controls=controls))
    # the images are all ones, and what is masked is zero: only the shape of the mask is left
    blank = tuple((torch.ones_like(x), y) for x, y in (train_part, test_part))
    shape = replace(measure, mask="zeros", controls=(), training=replace(measure.training, epochs=8))
    results["mask shape alone"] = arms(shape.run(*blank, compared, build, controls=controls))
    return {
        "dataset": name,
        **{part: nets[part] for part in ("accuracy", "attacked", "collapsed")},
        "results": results,
    }


def arms(result: RetrainingResult) -> list[dict[str, Any]]:
    """For each method and level, who is right about what in both arms, (2, retrainings, images) as packed bits."""
    found = []
    for method in result.methods:
        for level in result.levels:
            own = [i for i, run in enumerate(result.runs) if (run.method, run.level) == (method, level)]
            sides = [[i for i in own if result.runs[i].side == side] for side in ("top", "bottom")]
            found.append(
                {
                    "method": method,
                    "control": result.runs[own[0]].control,
                    "level": level,
                    "right": packed(torch.stack([result.correct[side] for side in sides])),
                    "flagged": sum(not result.runs[i].converged for i in own),
                    "diverged": sum(result.runs[i].value != result.runs[i].value for i in own),
                }
            )
    return found


def leaked(seed: int, settings: Settings) -> dict[str, Any]:
    """One base seed: the share of each map on the null block, per image, and a few maps to look at."""
    values: dict[str, Any] = {}
    record: dict[str, Any] = {"accuracy": {}, "attacked": {}, "collapsed": [], "values": values, "maps": {}}
    for position in ("random", "top"):
        parts = [
            block_mnist(split=split, classes=range(10), position=position)[:count]  # type: ignore[arg-type]
            for split, count in (("train", settings.leakage_images), ("test", settings.leakage_test_images))
        ]
        data, test = parts
        some = settings if position == "random" else replace(settings, robust_epochs=1)
        nets = base_nets(data.x, data.y, (test.x, test.y), some, seed, 2 * settings.radius, (0.0, 1.0))
        with torch.random.fork_rng():
            torch.manual_seed(1000 + seed)
            untrained = multilayer_perceptron(1568, 10, (settings.hidden, settings.hidden)).eval()
        shown = {"standard net": gradient(nets["standard"], test.x)}
        if position == "random":
            shown["robust net"] = gradient(nets["robust"], test.x)
            shown["untrained net"] = gradient(untrained, test.x)
            shown["random"] = maps(untrained, test.x, pb.RandomAttribution(seed=seed))
            shown["edges"] = maps(untrained, test.x, pb.EdgeDetector())
            shown["input intensity"] = test.x
        for name, each in shown.items():
            place = name if position == "random" else f"{name}, signal always on top"
            found = leakage(None, None, each, signal_mask=test.signal_mask, fractions=(0.1,))
            values[place] = {
                "null mass": rounded(found.values),
                "null share of top 10 %": rounded(found.details["null_share@0.1"]),
            }
            if "net" in name and "untrained" not in name:
                size = each[:3].abs() / each[:3].abs().amax((1, 2, 3), keepdim=True)
                record["maps"][place] = {
                    "map": (255 * size[:, 0]).round().int().tolist(),
                    "image": (255 * test.x[:3, 0]).round().int().tolist(),
                }
        for kind in ("standard", "robust") if position == "random" else ("standard",):
            place = f"{kind} net" if position == "random" else f"{kind} net, signal always on top"
            record["accuracy"][place], record["attacked"][place] = (
                nets["accuracy"][kind],
                nets["attacked"][kind],
            )
    if seed:
        del record["maps"]
    return record


def theory(seed: int, settings: Settings) -> dict[str, Any]:
    """One base seed: sizes of the gradient at the signal, where it may be, and where it never is."""
    data, test = (signal_coordinates(1000, 10, relevant=5, seed=2 * seed + part) for part in (0, 1))
    attack = PGD("linf", radius=0.35, steps=8, step_size=0.25 * 0.35)
    values, accuracy = {}, {}
    for kind, epochs, against in zip(
        ("standard", "robust"), settings.theory_epochs, (None, attack), strict=True
    ):
        spec = TrainSpec(
            epochs=epochs, batch=250, learning_rate=1e-2, attack=against, bounds=(-1.0, 1.0), seed=seed
        )
        trained = train(
            lambda: multilayer_perceptron(10, 2, (512,)), data.x, data.y, spec, validation=(test.x, test.y)
        )
        model, x = trained.model, test.x[:200]
        mask, place = test.signal_mask[:200], test.position[:200, 0]
        size = gradient(model, x).abs()
        at_signal = size[mask]
        values[f"{kind} net"] = {
            "elsewhere it may be / at the signal": rounded((size[:, :5].sum(1) - at_signal) / 4 / at_signal),
            "where it never is / at the signal": rounded(size[:, 5:].mean(1) / at_signal),
            "largest at the signal": rounded((size.argmax(1) == place).double()),
        }
        perturbed = attack.perturb(model, test.x, test.y, bounds=(-1.0, 1.0))
        accuracy[kind] = {
            "plain": trained.accuracy,
            "attacked": float((model(perturbed).argmax(1) == test.y).double().mean()),
        }
    return {"accuracy": accuracy, "values": values}


def rounded(values: Tensor) -> list[float | None]:
    """As JSON; undefined is None."""
    return [None if value != value else round(value, 4) for value in values.tolist()]


def key(part: str, seed: int, settings: Settings) -> str:
    """What makes a record the same record."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:12]
    return f"{part}/{seed}/{pb.__version__}/{digest}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the tables and write them with the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few images and retrainings, for the test suite")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--seeds", type=int, default=None, help="base seeds, 5 (2 with --quick)")
    given = parser.parse_args(arguments)
    settings = QUICK if given.quick else FULL
    folder = given.out or (Path("runs") / "input_gradients-quick" if given.quick else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    warnings.simplefilter(
        "ignore"
    )  # maps that are the same everywhere and dead nets are counted in the records
    if FASHION in settings.datasets and data_folder() is None:
        print("Fashion-MNIST was not found (PULLBACK_DATA, ../shared/data): left out.")
        settings = replace(settings, datasets=(BLOCKS,))
    tasks: dict[str, Callable[[int], dict[str, Any]]] = {
        "theory": lambda seed: theory(seed, settings),
        "leakage": lambda seed: leaked(seed, settings),
    }
    for dataset in settings.datasets:
        tasks[f"diffroar {dataset}"] = lambda seed, dataset=dataset: diffroar(dataset, seed, settings)
    file = folder / "results.jsonl"
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in tasks}
    for seed in range(given.seeds if given.seeds is not None else 2 if given.quick else 5):
        for part, run in tasks.items():
            name, began = key(part, seed, settings), time.perf_counter()
            record = finished(file).get(name)
            if record is None:
                record = {"key": name, "part": part, "seed": seed, **run(seed)}
                append(file, {**record, "seconds": round(time.perf_counter() - began, 1)})
                print(f"{part}, base seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
            found[part].append(record)
    print(report(found, folder))


if __name__ == "__main__":
    main()
