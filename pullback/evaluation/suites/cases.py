"""The data and the models of the suites: small nets trained on embedded or full data, or a model of the user's."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pullback.core import noise
from pullback.core.errors import InputError, MethodError, nearest
from pullback.core.shadow import shadow
from pullback.evaluation.attack import PGD
from pullback.evaluation.retraining import TrainSpec, constant, multilayer_perceptron, seeded, train
from pullback.evaluation.task_cache import cached
from pullback.fingerprints import fingerprint, model_fingerprint
from pullback.workers import imported

__all__ = [
    "ARCHITECTURES",
    "DATA",
    "TRAININGS",
    "Case",
    "Loaded",
    "Net",
    "content_of",
    "convolutional",
    "loaded",
    "net_of",
    "trained_net",
]

DATA = ("mnist", "fashion-mnist", "cifar10", "block_mnist", "block_mnist_top", "block_signal")
TRAININGS = ("standard", "robust", "given")
ARCHITECTURES = ("perceptron", "convolutional")
_TEST = 1000  # test examples that accuracy is measured on, and that retrained models are scored on


@dataclass(frozen=True, eq=False)
class Loaded:
    """Training and test data; ``signal`` (n_test, ...) bool, where it is known which parts carry the label."""

    name: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    signal: Tensor | None

    @property
    def classes(self) -> int:
        return int(torch.maximum(self.y.max(), self.test_y.max())) + 1

    def to(self, device: str) -> Loaded:
        """The same on a device."""
        signal = None if self.signal is None else self.signal.to(device)
        x, y, test_x, test_y = (each.to(device) for each in (self.x, self.y, self.test_x, self.test_y))
        return Loaded(self.name, x, y, test_x, test_y, signal)

    @property
    def key(self) -> str:
        return fingerprint(self.x, self.y, self.test_x, self.test_y, self.signal)


@dataclass(frozen=True)
class Case:
    """A model by how it comes about: everything that decides it, in JSON's types.

    ``pool``: averages images over squares of so many pixels. ``radius``, ``norm``: of the attack that "robust" training
    resists, in units of the input. ``device``: where everything but the order of draws happens.
    """

    data: str
    training: str
    seed: int = 0
    root: str | None = None
    architecture: str = "convolutional"
    training_images: int | None = None
    epochs: int = 4
    radius: float = 2.0
    norm: Literal["l2", "linf"] = "l2"
    pool: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.data not in DATA and not self.data.endswith(".npz"):
            raise InputError(
                f"data={self.data!r} was given. Expected one of {list(DATA)}, or a .npz file; nearest: "
                f"{nearest(self.data, DATA)}."
            )
        if self.training not in TRAININGS:
            raise InputError(f"training={self.training!r} was given. Expected one of {list(TRAININGS)}.")
        if self.architecture not in ARCHITECTURES and ":" not in self.architecture:
            raise InputError(
                f"architecture={self.architecture!r} was given. Expected one of {list(ARCHITECTURES)}, or "
                '"module:factory".'
            )

    def content(self) -> dict[str, Any]:
        """The case as JSON; the device only where it is not the processor, which all share."""
        return {name: value for name, value in vars(self).items() if (name, value) != ("device", "cpu")}

    def loaded(self) -> Loaded:
        """The case's data, on its device."""
        data = loaded(self.data, self.root, self.training_images, self.pool)
        return data if self.device == "cpu" else data.to(self.device)

    @property
    def name(self) -> str:
        """What tables call the model."""
        return self.training if self.training != "given" else self.architecture


@dataclass(frozen=True, eq=False)
class Net:
    """A model in eval mode, how well it does on the test data, and whether to trust it."""

    model: nn.Module
    untrained: Callable[[], nn.Module]
    accuracy: float
    converged: bool
    collapsed: bool


def loaded(
    name: str, root: str | None = None, training_images: int | None = None, pool: int = 1, seed: int = 0
) -> Loaded:
    """The data of a name; positions and noise of synthetic data are drawn by the seed.

    Raises InputError for unknown names, and what the data sets raise.
    """
    # a file of the user's may be written anew between two calls
    written = Path(name).stat().st_mtime_ns if name.endswith(".npz") and Path(name).is_file() else 0
    return _loaded(name, root, training_images, pool, seed, written)


@lru_cache(maxsize=4)
def _loaded(
    name: str, root: str | None, training_images: int | None, pool: int, seed: int, written: int
) -> Loaded:
    if name.endswith(".npz"):
        data = _from_file(Path(name))
    elif name == "block_signal":
        data = _theory(seed)
    else:
        data = _images(name, root, seed)
    if training_images is not None:
        data = Loaded(
            data.name,
            data.x[:training_images],
            data.y[:training_images],
            data.test_x,
            data.test_y,
            data.signal,
        )
    if pool > 1 and data.x.ndim == 4:
        shrink = partial(torch.nn.functional.avg_pool2d, kernel_size=pool)
        signal = None if data.signal is None else shrink(data.signal.float()) > 0.5
        data = Loaded(data.name, shrink(data.x), data.y, shrink(data.test_x), data.test_y, signal)
    return data


def convolutional(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Three convolutions with ReLU, two of them pooled, and a linear layer, for images of ``shape`` (C, H, W).

    >>> convolutional((1, 28, 28), 10)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * (height // 4) * (width // 4), classes),
    )  # fmt: skip


def factory_of(case: Case, data: Loaded) -> Callable[[], nn.Module]:
    """What builds the model anew. Raises InputError where the architecture does not fit the data."""
    if ":" in case.architecture:
        return _module(case.architecture)
    shape = tuple(data.x.shape[1:])
    if case.architecture == "perceptron" or len(shape) < 3:
        # nothing to convolve in a vector
        return partial(multilayer_perceptron, data.x[0].numel(), data.classes)
    return partial(convolutional, shape, data.classes)


def content_of(case: Case) -> dict[str, str]:
    """Fingerprints of what a case reads: its data, and a model that comes from a factory."""
    data = case.loaded()
    if case.training != "given":
        return {"data": data.key}
    return {"data": data.key, "model": model_fingerprint(factory_of(case, data)().eval())}


def trained_net(case: Case) -> Net:
    """Train the case's model, or find it in the cache of the running sweep."""
    data = case.loaded()
    if case.training == "given":
        return _given(factory_of(case, data)().to(case.device).eval(), data)
    return _net(case, data.key)


def _given(model: nn.Module, data: Loaded) -> Net:
    test_x, test_y = data.test_x[:_TEST], data.test_y[:_TEST]
    predicted = _predicted(model, test_x)
    collapsed = constant(predicted) and not constant(test_y)
    return Net(model, redrawn(model), float((predicted == test_y).double().mean()), True, collapsed)


@lru_cache(maxsize=4)
def _net(case: Case, key: str) -> Net:
    data = case.loaded()
    build = factory_of(case, data)
    test_x, test_y = data.test_x[:_TEST], data.test_y[:_TEST]

    def untrained() -> nn.Module:
        with seeded(1000 + case.seed, data.x.device):
            return build().to(case.device).eval()

    def compute() -> dict[str, Tensor]:
        spec = TrainSpec(
            epochs=case.epochs, batch=64, learning_rate=2e-3, seed=case.seed,
            attack=PGD(case.norm, case.radius) if case.training == "robust" else None,
            bounds=(-1.0, 1.0) if case.data == "block_signal" else (0.0, 1.0),
        )  # fmt: skip
        trained = train(build, data.x, data.y, spec)
        facts = torch.tensor([trained.converged, trained.collapsed])
        return {
            "facts": facts,
            **{f"state.{name}": value for name, value in trained.model.state_dict().items()},
        }

    found = cached({"trained": case.content(), "data": key}, compute)
    model = untrained()
    model.load_state_dict(
        {name.removeprefix("state."): value for name, value in found.items() if name.startswith("state.")}
    )
    converged, collapsed = found["facts"].tolist()
    accuracy = float((_predicted(model, test_x) == test_y).double().mean())
    return Net(model, untrained, accuracy, converged, collapsed)


def redrawn(model: nn.Module) -> Callable[[], nn.Module]:
    """Makes a copy of which every parameter tensor is normal, with its own mean and standard deviation."""

    def untrained() -> nn.Module:
        copy = shadow(model, private=True).module
        for number, parameter in enumerate(copy.parameters()):
            if parameter.is_floating_point():
                drawn = noise.normal(parameter.shape, 0, number, "untrained").to(parameter)
                spread = parameter.detach().std(correction=0)
                parameter.data.copy_(parameter.detach().mean() + spread * drawn)
        return copy

    return untrained


def net_of(model: nn.Module, x: Tensor) -> Net:
    """A model of the user's, whose accuracy is not known; its control is a copy with every parameter drawn anew."""
    predicted = _predicted(model, x)
    collapsed = len(x) > 1 and constant(predicted)
    with torch.no_grad():
        scores = model(x[:2])
    # one class for all of a few images is no collapse; one answer is
    return Net(model, redrawn(model), math.nan, True, collapsed and bool((scores == scores[:1]).all()))


def _predicted(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(256)])


def _module(path: str) -> Callable[[], nn.Module]:
    found = imported(path)
    if isinstance(found, nn.Module):
        return lambda: found
    if not isinstance(made := found(), nn.Module):
        raise MethodError(
            f"{path!r} gave a {type(made).__name__}. Expected a function that returns an nn.Module."
        )
    return found  # type: ignore[no-any-return]


def _images(name: str, root: str | None, seed: int) -> Loaded:
    from pullback.datasets import block_mnist, cifar10, fashion_mnist, mnist

    if name.startswith("block_mnist"):
        position: Any = "top" if name.endswith("_top") else "random"
        fitted, tested = (
            block_mnist(root, split, classes=range(10), position=position, seed=seed)
            for split in ("train", "test")
        )
        return Loaded(name, fitted.x, fitted.y, tested.x, tested.y, tested.signal_mask)
    if name == "cifar10" and root is None:
        raise InputError(
            "CIFAR-10 does not come with pullback. Expected root=: a folder with its binary version."
        )
    read: Any = {"mnist": mnist, "fashion-mnist": fashion_mnist, "cifar10": cifar10}[name]
    first, second = read(root, "train"), read(root, "test")
    return Loaded(name, first.x, first.y, second.x, second.y, None)


def _theory(seed: int) -> Loaded:
    from pullback.datasets import block_signal

    data = block_signal(3000, blocks=10, block_size=1, noise=0.01, seed=seed)
    return Loaded(
        "block_signal", data.x[:2000], data.y[:2000], data.x[2000:], data.y[2000:], data.signal_mask[2000:]
    )


def _from_file(path: Path) -> Loaded:
    """Arrays x_train, y_train, x_test, y_test, and signal_mask of the test data where it is known."""
    import numpy

    if not os.path.isfile(path):
        raise InputError(f'There is no file "{path}". Expected a .npz with x_train, y_train, x_test, y_test.')
    try:
        with numpy.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
        x, y, test_x, test_y = (arrays[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InputError(
            f'"{path}" cannot be used ({error}). Expected a .npz with floating x_train, x_test (n, ...) and integer '
            "y_train, y_test (n,)."
        ) from error
    signal = arrays.get("signal_mask")
    return Loaded(path.stem, x, y.long(), test_x, test_y.long(), None if signal is None else signal.bool())
