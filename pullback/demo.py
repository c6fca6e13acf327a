"""The demo: three small nets on BlockMNIST, every method on each, and how much lands on the empty block.

Half of every image says nothing about its class. What an explanation puts there has leaked (Shah et al.
2021): standard nets leak, adversarially robust ones and ones whose empty half never moves do not.
"""

from __future__ import annotations

import csv
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pullback.api import compare
from pullback.attribution import METHODS
from pullback.attribution.baselines import Dataset
from pullback.attribution.captum_adapter import Captum
from pullback.attribution.controls import RandomAttribution
from pullback.attribution.expected_gradients import ExpectedGradients
from pullback.core.pose import pose
from pullback.core.problem import Problem
from pullback.core.progress import track
from pullback.datasets import BlockMNIST, block_mnist
from pullback.evaluation import PGD, Interval, Trained, TrainSpec, bootstrap_interval, leakage, train
from pullback.evaluation import multilayer_perceptron as perceptron
from pullback.result import Attribution

__all__ = ["CONTROLS", "METRICS", "DemoResult", "Network", "RandomTimesInput", "run_demo", "usable_methods"]

METRICS = ("null_share@0.1", "null_mass")
CONTROLS = ("random", "random × input", "edges")
CLASSES = range(10)


@dataclass(frozen=True)
class RandomTimesInput:
    """A control for methods that multiply by the input: noise times the value, zero on black pixels."""

    seed: int = 0

    def __call__(self, problem: Problem) -> Tensor:
        noise = RandomAttribution(self.seed)(problem)
        assert isinstance(noise, Tensor)
        assert isinstance(problem.point, Tensor)
        return noise * problem.point


@dataclass(frozen=True, eq=False)
class Network:
    """One trained net, its test images, and its explanations by method; none where it has collapsed."""

    name: str
    trained: Trained
    images: BlockMNIST
    attributions: Mapping[str, Attribution]
    leaks: Mapping[str, Mapping[str, Interval]]


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What the demo measured, and where it wrote."""

    networks: tuple[Network, ...]
    left_out: Mapping[str, str]
    report: Path
    seconds: float
    settings: Mapping[str, Any]

    def table(self) -> str:
        """The leakage of every method on every net as text: null share of the top 10 % [95 % interval]."""
        scored = [network for network in self.networks if network.leaks]
        names = list(dict.fromkeys(name for network in scored for name in network.leaks))
        width = max([len("accuracy"), *map(len, names)]) + 2
        lines = [
            "share of the top 10 % of |attribution| on the empty block (0.5: chance) [95 % interval]",
            "",
        ]
        lines.append(" " * width + "".join(f"{network.name:<22}" for network in self.networks))
        lines.append(
            f"{'accuracy':<{width}}" + "".join(f"{n.trained.accuracy or 0:<22.3f}" for n in self.networks)
        )
        for name in names:
            cells = [_cell(network.leaks.get(name, {}).get(METRICS[0])) for network in self.networks]
            lines.append(f"{name:<{width}}" + "".join(f"{cell:<22}" for cell in cells))
        return "\n".join(line.rstrip() for line in lines)


def run_demo(
    out: str | Path = "demo",
    *,
    images: int = 500,
    seed: int = 0,
    threads: int = 1,
    train_images: int | None = None,
) -> DemoResult:
    """Train, explain, measure, and write ``report.html``, ``leakage.csv`` and figures into ``out``.

    Args:
        images: test images to explain, of 1,000.
        seed: of the data's positions, the training and the methods.
        threads: CPU threads while it runs; the results are those of this number.
        train_images: training digits, all 4,000 if None.

    Returns:
        a DemoResult; the same arguments give the same numbers.

    Cost: about half a minute.

    Source: Shah, Jain, Netrapalli, NeurIPS 2021, section 4: the data, the nets and the effect.
    """
    from pullback.demo_report import write_demo

    began = time.perf_counter()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    recipes: dict[str, dict[str, Any]] = {
        "standard": {},
        "robust": {"attack": PGD("l2", radius=2.0)},
        "top": {"position": "top"},
    }
    networks: list[Network] = []
    left_out: Mapping[str, str] = {}
    with _threads(threads), track(2 * len(recipes), "demo") as advance:
        for name, recipe in recipes.items():
            data, trained = trained_network(seed=seed, images=images, train_images=train_images, **recipe)
            advance(1)
            attributions: dict[str, Attribution] = {}
            if not trained.collapsed:
                methods, left_out = usable_methods(trained.model, data.x, seed)
                attributions = compare(trained.model, data.x, methods)
            leaks = {method: leaks_of(each, data) for method, each in attributions.items()}
            networks.append(Network(name, trained, data, attributions, leaks))
            advance(1)
    settings = {"images": images, "seed": seed, "threads": threads, "train_images": train_images or 4000}
    result = DemoResult(
        tuple(networks), left_out, folder / "report.html", time.perf_counter() - began, settings
    )
    write_rows(folder / "leakage.csv", result)
    write_demo(folder, result)
    return result


def trained_network(
    *, seed: int, images: int, train_images: int | None, attack: PGD | None = None, position: Any = "random"
) -> tuple[BlockMNIST, Trained]:
    """The test images to explain and an MLP 1568-128-128-10 trained on digits placed alike."""
    learn = block_mnist(classes=CLASSES, n=train_images, position=position, seed=seed)
    test = block_mnist(split="test", classes=CLASSES, position=position, seed=seed)
    build: Callable[[], torch.nn.Module] = partial(perceptron, learn.x[0].numel(), len(CLASSES))
    spec = TrainSpec(seed=seed, attack=attack)
    return test[:images], train(build, learn.x, learn.y, spec, validation=(test.x, test.y))


def usable_methods(model: torch.nn.Module, x: Tensor, seed: int = 0) -> tuple[dict[str, Any], dict[str, str]]:
    """Every method of METHODS that runs at the input, by a readable name, and why the others do not.

    Controls come last. Expected gradients use the images themselves as baselines.
    """
    problem = pose(model, x[:1])
    usable: dict[str, Any] = {}
    refused: dict[str, str] = {}
    made: dict[str, Callable[[], Any]] = {
        **METHODS,
        "ExpectedGradients": lambda: ExpectedGradients(Dataset(x, seed)),
        "Captum": lambda: Captum("DeepLift"),
    }
    for name, make in made.items():
        try:
            method = make()
            if any(field.name == "seed" for field in dataclasses.fields(method)):
                method = dataclasses.replace(method, seed=seed)
            cheap = {each.name: 2 for each in dataclasses.fields(method) if each.name in ("steps", "samples")}
            dataclasses.replace(method, **cheap)(problem.fresh())
        except (TypeError, ValueError, NotImplementedError, ImportError) as error:
            refused[name] = " ".join(str(error).split())
            continue
        usable[_NAMES.get(name, name)] = method
    usable["random × input"] = RandomTimesInput(seed)
    order = sorted(usable, key=lambda name: name in CONTROLS)
    return {name: usable[name] for name in order}, refused


_NAMES = {
    "Gradient": "gradient",
    "InputXGradient": "input × gradient",
    "IntegratedGradients": "integrated gradients",
    "SmoothGrad": "SmoothGrad",
    "ExpectedGradients": "expected gradients",
    "Captum": "DeepLift (captum)",
    "RandomAttribution": "random",
    "EdgeDetector": "edges",
}


def leaks_of(attribution: Attribution, data: BlockMNIST) -> dict[str, Interval]:
    """The two leakage metrics of one method as means over images with bootstrap intervals."""
    found = leakage(None, None, attribution.values, signal_mask=data.signal_mask)  # type: ignore[arg-type]
    return {
        "null_share@0.1": bootstrap_interval(found.details["null_share@0.1"]),
        "null_mass": found.interval(),
    }


def write_rows(path: Path, result: DemoResult) -> None:
    """One row per (network, method, metric); a collapsed net has one row that says so."""
    columns = [
        "network",
        "method",
        "metric",
        "mean",
        "low",
        "high",
        "images",
        "accuracy",
        "collapsed",
        "spelling",
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for network in result.networks:
            facts = [network.trained.accuracy, network.trained.collapsed]
            if not network.leaks:
                writer.writerow([network.name, "", "", "", "", "", 0, *facts, ""])
            for method, metrics in network.leaks.items():
                for metric, at in metrics.items():
                    numbers = [f"{value:.6f}" for value in (at.estimate, at.low, at.high)]
                    spelling = network.attributions[method].method
                    writer.writerow([network.name, method, metric, *numbers, at.count, *facts, spelling])


def _cell(at: Interval | None) -> str:
    return "collapsed" if at is None else f"{at.estimate:.3f} [{at.low:.3f}, {at.high:.3f}]"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
