"""Training small models from a written-down specification, plain or against an adversary, repeatably."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.errors import InputError, MethodError
from pullback.evaluation.attack import PGD, Bounds

__all__ = ["PGD", "TrainSpec", "Trained", "multilayer_perceptron", "train"]

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
# The running accuracy has settled when the last epoch moved it by less than this, or above 1 minus this.
_SETTLED = 0.02
_EVALUATION_BATCH = 1024


@dataclass(frozen=True)
class TrainSpec:
    """How to train: everything that decides the result, so that equal specs give equal models.

    ``attack``: train on the examples this attack perturbs, within ``bounds`` (the range of the data).
    The defaults are those of the BlockMNIST experiments.
    """

    epochs: int = 5
    batch: int = 128
    learning_rate: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    seed: int = 0
    attack: PGD | None = None
    bounds: Bounds = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.optimizer not in _OPTIMIZERS:
            raise MethodError(f'optimizer={self.optimizer!r} was given. Expected "adam" or "sgd".')
        if self.epochs < 1 or self.batch < 1 or self.learning_rate <= 0:
            raise MethodError(
                f"epochs={self.epochs}, batch={self.batch}, learning_rate={self.learning_rate} was given. "
                "Expected at least 1 epoch, a batch of at least 1 and a positive learning rate."
            )


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model in eval mode, and whether to trust it.

    ``accuracy``: on the validation data, None without any. ``converged``: the running training accuracy
    settled (it moved by less than 0.02 in the last epoch, or is above 0.98) and the model has not collapsed.
    ``collapsed``: it predicts one class for all of the training data, or its input gradients are zero on all
    of a sample of it; report such a model, but do not score its attributions. ``losses``: the mean training
    loss of each epoch.
    """

    model: nn.Module
    train_accuracy: float
    accuracy: float | None
    converged: bool
    collapsed: bool
    seconds: float
    losses: tuple[float, ...]


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

    Raises ``InputError`` when x and y do not pair up.

    >>> x = torch.tensor([[0.0], [1.0]]).repeat(64, 1)
    >>> spec = TrainSpec(epochs=20, batch=16, learning_rate=0.05)
    >>> train(lambda: nn.Linear(1, 2), x, x[:, 0].long(), spec).train_accuracy
    1.0
    """
    if not len(x) or y.shape != x.shape[:1]:
        raise InputError(
            f"x of shape {tuple(x.shape)} and y of shape {tuple(y.shape)} were given. Expected (n, ...), "
            "(n,)."
        )
    start = time.perf_counter()
    losses: list[float] = []
    running = [0.0]
    shuffling, attacking = (torch.Generator().manual_seed(2 * spec.seed + stream) for stream in (0, 1))
    with _seeded(spec.seed, x.device):
        model = factory().to(x.device)
        optimizer = _OPTIMIZERS[spec.optimizer](model.parameters(), lr=spec.learning_rate)  # type: ignore[call-arg]
        for epoch in range(spec.epochs):
            loss_sum, hits = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
            for rows in torch.split(torch.randperm(len(x), generator=shuffling).to(x.device), spec.batch):
                points, labels = x[rows], y[rows]
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
            losses.append(float(loss_sum) / len(x))
            running.append(float(hits) / len(x))
            if progress is not None:
                progress(epoch + 1, losses[-1])
    model.eval()
    predicted = _predictions(model, x)
    collapsed = (_constant(predicted) and not _constant(y)) or not _sees(model, x[:256])
    settled = abs(running[-1] - running[-2]) < _SETTLED or running[-1] > 1 - _SETTLED
    return Trained(
        model=model,
        train_accuracy=float((predicted == y).double().mean()),
        accuracy=None
        if validation is None
        else float((_predictions(model, validation[0]) == validation[1]).double().mean()),
        converged=settled and not collapsed and losses[-1] == losses[-1],
        collapsed=collapsed,
        seconds=time.perf_counter() - start,
        losses=tuple(losses),
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


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        # Not torch.manual_seed, which would also seed devices that fork_rng does not restore here.
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _predictions(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in torch.split(x, _EVALUATION_BATCH)])


def _constant(labels: Tensor) -> bool:
    return bool((labels == labels[0]).all())


def _sees(model: nn.Module, x: Tensor) -> bool:
    """Whether the score of the predicted class depends on any of these inputs."""
    point = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(point).amax(1).sum(), point)
    return bool(gradient.any())
