"""Training small models from a written-down specification, plain or against an adversary, repeatably."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.errors import MethodError
from pullback.evaluation.attack import PGD, Bounds
from pullback.evaluation.views import Examples, View

__all__ = ["PGD", "TrainSpec", "Trained", "multilayer_perceptron", "train"]

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
# The running accuracy has settled when the last epoch moved it by less than this, or above 1 minus this.
_SETTLED = 0.02
EVALUATION_BATCH = 1024
# Input gradients are checked on so many of the first examples.
SAMPLE = 256


@dataclass(frozen=True)
class TrainSpec:
    """How to train: everything that decides the result, so that equal specs give equal models.

    ``attack``: train on the examples this attack perturbs, within ``bounds`` (the range of the data).
    ``patience``: stop after this many epochs in a row without a better validation accuracy, and keep the weights of
    the best epoch; None trains all epochs and keeps the last weights. The defaults are those of the BlockMNIST
    experiments.
    """

    epochs: int = 5
    batch: int = 128
    learning_rate: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    seed: int = 0
    attack: PGD | None = None
    bounds: Bounds = (0.0, 1.0)
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in _OPTIMIZERS:
            raise MethodError(f'optimizer={self.optimizer!r} was given. Expected "adam" or "sgd".')
        if self.epochs < 1 or self.batch < 1 or self.learning_rate <= 0:
            raise MethodError(
                f"epochs={self.epochs}, batch={self.batch}, learning_rate={self.learning_rate} was given. "
                "Expected at least 1 epoch, a batch of at least 1 and a positive learning rate."
            )
        if self.patience is not None and self.patience < 1:
            raise MethodError(f"patience={self.patience} was given. Expected at least 1 epoch, or None.")


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model in eval mode, and whether to trust it.

    ``accuracy``: on the validation data, None without any. ``converged``: the running training accuracy
    settled (it moved by less than 0.02 in the last epoch, is above 0.98, or training stopped early) and the model has
    not collapsed. ``collapsed``: it predicts one class for all of the training data, or its input gradients are zero on
    all of a sample of it; report such a model, but do not score its attributions. ``losses``: the mean training
    loss of each epoch.
    """

    model: nn.Module
    train_accuracy: float
    accuracy: float | None
    converged: bool
    collapsed: bool
    seconds: float
    losses: tuple[float, ...]


@dataclass
class Course:
    """How one training went so far, epoch by epoch, and whether it is over."""

    spec: TrainSpec
    losses: list[float] = field(default_factory=list)
    running: list[float] = field(default_factory=lambda: [0.0])
    best: float = -1.0
    since: int = 0

    @property
    def over(self) -> bool:
        return self.spec.patience is not None and self.since >= self.spec.patience

    def improved(self, accuracy: float) -> bool:
        """Note the validation accuracy of an epoch; whether its weights are the best so far."""
        better = accuracy > self.best
        self.best, self.since = max(accuracy, self.best), 0 if better else self.since + 1
        return better

    def settled(self) -> bool:
        moved = abs(self.running[-1] - self.running[-2])
        finite = self.losses[-1] == self.losses[-1]
        return finite and (self.over or moved < _SETTLED or self.running[-1] > 1 - _SETTLED)


def train(
    factory: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    spec: TrainSpec,
    *,
    validation: tuple[Tensor, Tensor] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train a fresh ``factory()`` on ``x`` (n, ...) and ``y`` (n,) as ``spec`` says, on the device of ``x``.

    The result depends on the arguments alone: initialisation and dropout draw from the global generator,
    which is seeded for the duration and put back after (other threads that draw from it meanwhile would see
    the seed); shuffling and attacks have their own. One thread (``torch.set_num_threads(1)``) is fastest for
    small models on a CPU. ``progress`` is called with the epoch, from 1, and its mean loss.

    Raises ``InputError`` when x and y do not pair up, ``MethodError`` for ``patience`` without validation data.

    >>> x = torch.tensor([[0.0], [1.0]]).repeat(64, 1)
    >>> spec = TrainSpec(epochs=20, batch=16, learning_rate=0.05)
    >>> train(lambda: nn.Linear(1, 2), x, x[:, 0].long(), spec).train_accuracy
    1.0
    """
    held_out = None if validation is None else Examples(*validation)
    return train_view(factory, Examples(x, y), View(), spec, held_out, progress)


def train_view(
    factory: Callable[[], nn.Module],
    examples: Examples,
    view: View,
    spec: TrainSpec,
    validation: Examples | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train one model on what a view shows of the examples; ``train`` is the case of the whole view."""
    require_validation(spec, validation)
    start = time.perf_counter()
    device = examples.x.device
    course = Course(spec)
    shuffling, attacking = generators(spec.seed)
    kept: dict[str, Tensor] | None = None
    with seeded(spec.seed, device):
        model = factory().to(device)
        optimizer = optimizer_of(spec, list(model.parameters()))
        for epoch in range(spec.epochs):
            loss_sum, hits = torch.zeros((), device=device), torch.zeros((), device=device)
            for rows in torch.split(
                torch.randperm(len(examples), generator=shuffling).to(device), spec.batch
            ):
                points, labels = examples.seen(rows, view), examples.y[rows]
                if spec.attack is not None:
                    model.eval()
                    points = spec.attack.perturb(model, points, labels, spec.bounds, attacking)
                model.train()
                logits = model(points)
                loss = F.cross_entropy(logits, labels)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimizer.step()
                loss_sum += loss.detach() * len(rows)
                hits += (logits.argmax(1) == labels).sum()
            course.losses.append(float(loss_sum) / len(examples))
            course.running.append(float(hits) / len(examples))
            if progress is not None:
                progress(epoch + 1, course.losses[-1])
            if spec.patience is not None and validation is not None:
                if course.improved(_accuracy(model.eval(), validation, view)):
                    kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
                if course.over:
                    break
    if kept is not None:
        model.load_state_dict(kept)
    model.eval()
    predicted = predictions(model, examples, view)
    sample = examples.seen(torch.arange(min(SAMPLE, len(examples)), device=device), view)
    collapsed = (constant(predicted) and not constant(examples.y)) or not _sees(model, sample)
    return Trained(
        model=model,
        train_accuracy=float((predicted == examples.y).double().mean()),
        accuracy=None if validation is None else _accuracy(model, validation, view),
        converged=course.settled() and not collapsed,
        collapsed=collapsed,
        seconds=time.perf_counter() - start,
        losses=tuple(course.losses),
    )


def multilayer_perceptron(inputs: int, classes: int, hidden: Sequence[int] = (128, 128)) -> nn.Sequential:
    """Flatten, then linear layers with ReLU between: the MLP of the BlockMNIST experiments.

    >>> multilayer_perceptron(1568, 10)(torch.rand(2, 1, 56, 28)).shape
    torch.Size([2, 10])
    """
    widths = [inputs, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def predictions(model: nn.Module, examples: Examples, view: View) -> Tensor:
    """The class the model predicts for each example (n,), as the view shows it."""
    rows = torch.arange(len(examples), device=examples.x.device)
    with torch.no_grad():
        parts = [model(examples.seen(part, view)).argmax(1) for part in torch.split(rows, EVALUATION_BATCH)]
    return torch.cat(parts)


def generators(seed: int) -> tuple[torch.Generator, torch.Generator]:
    """The generators of the order of the data and of the starts of attacks."""
    shuffling, attacking = (torch.Generator().manual_seed(2 * seed + stream) for stream in (0, 1))
    return shuffling, attacking


def optimizer_of(spec: TrainSpec, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """The optimizer a spec names."""
    fused = all(value.is_floating_point() and value.device.type in ("cpu", "cuda") for value in parameters)
    return _OPTIMIZERS[spec.optimizer](parameters, lr=spec.learning_rate, fused=fused)  # type: ignore[call-arg]


def require_validation(spec: TrainSpec, validation: Examples | None) -> None:
    """Early stopping needs validation data."""
    if spec.patience is not None and validation is None:
        raise MethodError(
            f"patience={spec.patience} was given without validation data. Expected validation=(x, y), which decides "
            "when to stop, or patience=None."
        )


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global generators seeded for the duration, and put back after."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        # Not torch.manual_seed, which would also seed devices that fork_rng does not restore here.
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def constant(labels: Tensor) -> bool:
    """Whether all labels are the same."""
    return bool((labels == labels[0]).all())


def _accuracy(model: nn.Module, examples: Examples, view: View) -> float:
    return float((predictions(model, examples, view) == examples.y).double().mean())


def _sees(model: nn.Module, x: Tensor) -> bool:
    """Whether the score of the predicted class depends on any of these inputs."""
    point = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(point).amax(1).sum(), point)
    return bool(gradient.any())
