"""Pullbacks on a small BatchNorm CNN: deletion, insertion and alignment with the gradient of a robust copy.

Per training seed: a CNN (three blocks of convolution, batch norm, ReLU and max pooling) trained on Fashion-MNIST, or on
the embedded MNIST digits where the full data are not found; the same net trained against an l2 adversary; the same net
untrained. Maps of the predicted class's logit on test images are measured by deletion and insertion of pixels (the
probability of that class, under several masks) and by their cosine with the robust net's gradient of that class.
Controls: a random map, an edge detector, and the untrained net's maps measured on the trained net.

Intervals resample seeds and images together; differences are from the plain gradient on the same seeds and images.

    python -m studies.pullbacks [--quick] [--out DIR] [--seeds N]

Finished seeds are read back from DIR/seeds.jsonl, whose key is a hash of settings, data and version.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import pullback as pb
from pullback.datasets import fashion_mnist, mnist
from pullback.evaluation import PGD, TrainSpec, deletion, insertion, train
from studies.pullbacks_report import BASE, printed, table, written
from studies.records import append, finished

METRICS = {"deletion": deletion, "insertion": insertion}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of one seed."""

    training_images: int = 10_000
    test_images: int = 200
    epochs: int = 3
    adversarial_epochs: int = 3
    batch: int = 128
    learning_rate: float = 2e-3
    radius: float = 1.0
    attack_steps: int = 3
    channels: tuple[int, ...] = (12, 24, 32)
    smoothing_samples: int = 32
    steps: int = 32
    levels: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    protocols: tuple[tuple[str, str, Literal["signed", "absolute"]], ...] = (
        ("deletion", "mean", "signed"),
        ("insertion", "mean", "signed"),
        ("deletion", "zeros", "signed"),
        ("insertion", "zeros", "signed"),
        ("deletion", "noisy_linear", "absolute"),
    )


FULL = Settings()
QUICK = Settings(
    training_images=1000, test_images=16, epochs=4, adversarial_epochs=2, attack_steps=2, channels=(6, 8, 12),
    batch=32, smoothing_samples=4, steps=4, levels=(0.0, 0.25, 0.5, 1.0),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Images:
    """Training and test images (n, 1, 28, 28) in [0, 1] with labels, the test images the first of theirs."""

    name: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def images(settings: Settings) -> Images:
    """Fashion-MNIST from PULLBACK_DATA or ../shared/data, else the embedded digits."""
    named = os.environ.get("PULLBACK_DATA")
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    for root in (Path(named) if named else None, beside):
        if root is not None and (root / "fashion-mnist").is_dir():
            name, train_part, test_part = "Fashion-MNIST", fashion_mnist(root), fashion_mnist(root, "test")
            break
    else:
        name, train_part, test_part = "MNIST (embedded)", mnist(), mnist(split="test")
    first, test = train_part[: settings.training_images], test_part[: settings.test_images]
    return Images(name, first.x, first.y, test.x, test.y)


def network(channels: Sequence[int]) -> nn.Sequential:
    """Blocks of convolution, batch norm, ReLU and max pooling that leave 3 x 3 positions, then a linear layer."""
    layers: list[nn.Module] = []
    before = 1
    for width in channels:
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        before = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(9 * before, 10))


def methods(settings: Settings, seed: int) -> dict[str, Any]:
    """What is compared, by the name it has in the tables."""
    return {
        BASE: pb.Gradient(),
        "SmoothGrad": pb.SmoothGrad(samples=settings.smoothing_samples, seed=seed),
        "ExcitationPullback": pb.ExcitationPullback(temperature=0.3),
        "SemanticPullback": pb.SemanticPullback(),
        "IntegratedGradients": pb.IntegratedGradients(steps=settings.steps),
        "random": pb.RandomAttribution(seed=seed),
        "edges": pb.EdgeDetector(),
    }


def maps(
    model: nn.Module, untrained: nn.Module, x: Tensor, target: Tensor, settings: Settings, seed: int
) -> dict[str, Tensor]:
    """All maps (n, 1, 28, 28) by name; "x ·" are maps times the input, as integrated gradients from zero have it."""
    found = values_of(pb.compare(model, x, methods(settings, seed), target=target))
    for name in (BASE, "SmoothGrad", "ExcitationPullback", "SemanticPullback"):
        found[f"x · {name}"] = x * found[name]
    chosen = {name: methods(settings, seed)[name] for name in (BASE, "ExcitationPullback")}
    for name, values in values_of(pb.compare(untrained, x, chosen, target=target)).items():
        found[f"untrained {name}"] = values
    return found


def values_of(results: dict[str, pb.Attribution]) -> dict[str, Tensor]:
    """The maps of one-tensor inputs by name."""
    return {name: each.values for name, each in results.items() if isinstance(each.values, Tensor)}


def measured(seed: int, data: Images, settings: Settings) -> dict[str, Any]:
    """One seed's record: accuracies, and each method's values per image for every measure."""
    began = time.perf_counter()
    x, y = data.test_x, data.test_y
    build = partial(network, settings.channels)
    plain = TrainSpec(
        epochs=settings.epochs, batch=settings.batch, learning_rate=settings.learning_rate, seed=seed
    )
    attack = PGD("l2", settings.radius, steps=settings.attack_steps)
    hardened = TrainSpec(
        epochs=settings.adversarial_epochs,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        seed=seed,
        attack=attack,
    )
    standard = train(build, data.x, data.y, plain, validation=(x, y))
    robust = train(build, data.x, data.y, hardened, validation=(x, y))
    with torch.random.fork_rng():
        torch.manual_seed(1000 + seed)
        untrained = build().eval()
    with torch.no_grad():
        target = standard.model(x).argmax(1)
        attacked = {
            name: float(
                (model(PGD("l2", settings.radius, steps=10).perturb(model, x, y)).argmax(1) == y)
                .double()
                .mean()
            )
            for name, model in (("standard", standard.model), ("robust", robust.model))
        }
    (reference,) = pb.explain(robust.model, x, target=target, method=pb.Gradient()).leaves().values()
    values: dict[str, dict[str, list[float | None]]] = {}
    for name, each in maps(standard.model, untrained, x, target, settings, seed).items():
        row = {"alignment": _cosine(each, reference)}
        for metric, mask, ranking in settings.protocols:
            result = METRICS[metric](
                standard.model, x, each, target=pb.Probability(target), levels=settings.levels, mask=mask,
                ranking=ranking, seed=seed,
            )  # fmt: skip
            row[f"{metric}, {mask}, {ranking}"] = result.values
        values[name] = {measure: [_short(v) for v in found.tolist()] for measure, found in row.items()}
    return {
        "seed": seed,
        "data": data.name,
        "accuracy": {"standard": standard.accuracy, "robust": robust.accuracy},
        "attacked_accuracy": attacked,
        "collapsed": standard.collapsed or robust.collapsed,
        "seconds": round(time.perf_counter() - began, 1),
        "values": values,
    }


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines per row, NaN where a map is zero."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()


def _short(value: float) -> float | None:
    return None if value != value else round(value, 4)


def key(seed: int, data: Images, settings: Settings) -> str:
    """What a record is about: settings, data, version, seed."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for part in (data.x, data.y, data.test_x, data.test_y):
        digest.update(part.numpy().tobytes())
    digest.update(f"{data.name}/{pb.__version__}/{seed}".encode())
    return digest.hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the seeds that are missing, then print the table and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny nets and few images, under a minute")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder of the results; else studies/results/pullbacks, or runs/pullbacks-quick with --quick",
    )
    parser.add_argument("--seeds", type=int, default=None, help="training seeds, 3 (2 with --quick)")
    given = parser.parse_args(arguments)
    settings = QUICK if given.quick else FULL
    count = given.seeds if given.seeds is not None else 2 if given.quick else 3
    kept = Path(__file__).parent / "results" / "pullbacks"
    folder = given.out or (Path("runs") / "pullbacks-quick" if given.quick else kept)
    folder.mkdir(parents=True, exist_ok=True)
    data, file = images(settings), folder / "seeds.jsonl"
    records = []
    for seed in range(count):
        name = key(seed, data, settings)
        # read anew for each seed: another process may be at work on the same file
        record = finished(file).get(name)
        if record is None:
            record = {"key": name, **measured(seed, data, settings)}
            append(file, record)
        records.append(record)
        short = {
            part: records[-1][part] for part in ("accuracy", "attacked_accuracy", "collapsed", "seconds")
        }
        print(f"seed {seed}: {json.dumps(short)}", flush=True)
    rows = table(records)
    print(
        f"\n{data.name}: mean over seeds and images; + or - where the difference from {BASE} excludes zero (95%)"
    )
    printed(rows)
    written(rows, records, folder)


if __name__ == "__main__":
    main()
