"""Attributions of a data set as orders of its pixels, with the controls that tell an order from a guess."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pullback.attribution.spelling import parse_method
from pullback.core import noise
from pullback.core.errors import InputError, MethodError
from pullback.core.pose import pose
from pullback.evaluation.ranking import Granularity, Ranking, ranked_parts, relevance_at
from pullback.evaluation.retraining import seeded
from pullback.evaluation.task_cache import cached
from pullback.fingerprints import fingerprint, model_fingerprint

__all__ = ["CONTROLS", "Data", "Source", "attributed", "checked", "control_source", "mean_fill", "orders"]

Data: TypeAlias = "tuple[Tensor, Tensor]"
# A method's text, a function (x, target) -> attribution, or the attributions of the training and of the test data.
Source: TypeAlias = "str | Callable[[Tensor, Tensor], Any] | tuple[Any, Any]"

CONTROLS = ("random", "untrained", "input")
_BATCH = 256


def attributed(
    source: Source, model: nn.Module | None, data: Sequence[Data], true_labels: bool, name: str
) -> list[Any]:
    """The attributions of each data set: as given, or by the function, of the class that ``model`` predicts.

    Those of a method's text are kept by the running sweep (``cached``); a function is called anew, since nobody can
    tell whether it is still the same.

    Raises ``InputError`` for a function without a model to say which class it explains.
    """
    if isinstance(source, tuple):
        if len(source) != len(data):
            raise InputError(
                f"{len(source)} attributions were given for {name!r}. Expected (training, test) or a function."
            )
        return list(source)
    if not callable(source) and not isinstance(source, str):
        raise InputError(
            f"A {type(source).__name__} was given for {name!r}. Expected a method's text such as "
            '"integrated_gradients", a function (x, target) -> attribution, or a tuple (training, test) of tensors.'
        )
    if isinstance(source, str):
        if model is None:
            raise InputError(
                f"The method {source!r} was given without a model. Expected model=, which it explains."
            )
        method = parse_method(source)
        return [_explained(method, model, x, y if true_labels else None) for x, y in data]
    if model is None and not true_labels:
        raise InputError(
            f"The function {name!r} was given without a model. Expected model=, whose predicted class is explained, or "
            "attributions as tensors."
        )
    found = []
    for x, y in data:
        parts = []
        for rows in torch.arange(len(x), device=x.device).split(_BATCH):
            target = y[rows] if true_labels or model is None else _predicted(model, x[rows])
            part = source(x[rows], target)
            part = part if isinstance(part, Tensor) else getattr(part, "values", part)
            if not isinstance(part, Tensor):
                raise InputError(f"{name!r} gave a {type(part).__name__}. Expected a tensor (n, ...).")
            parts.append(part.detach())
        found.append(torch.cat(parts))
    return found


def _explained(method: Any, model: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
    def compute() -> dict[str, Tensor]:
        parts = []
        for rows in torch.arange(len(x), device=x.device).split(_BATCH):
            values = method(pose(model, x[rows], target=None if y is None else y[rows]))
            if not isinstance(values, Tensor):
                raise InputError(f"{method!r} gave a {type(values).__name__}. Expected a tensor (n, ...).")
            parts.append(values.detach().cpu())
        return {"values": torch.cat(parts)}

    content = {
        "method": repr(method),
        "model": model_fingerprint(model),
        "x": fingerprint(x),
        "target": None if y is None else fingerprint(y),
    }
    return cached(content, compute)["values"].to(x.device)


def orders(attribution: Any, x: Tensor, granularity: Granularity, ranking: Ranking, seed: int) -> Tensor:
    """The rank of every part of every example, 0 the most relevant: (n, parts), int16 where it fits."""
    found = []
    for rows in torch.arange(len(x), device=x.device).split(_BATCH):
        problem = pose(_total, x[rows])
        values = attribution[rows] if isinstance(attribution, Tensor) else attribution
        relevance = relevance_at(values, x[rows], problem)
        found.append(ranked_parts(relevance, problem, granularity, ranking, seed).rank)
    ranks = torch.cat(found).to(x.device)
    return ranks.to(torch.int16 if ranks.shape[1] <= 2**15 else torch.int32)


def control_source(name: str, factory: Callable[[], nn.Module], data: Sequence[Data], seed: int) -> Source:
    """A control: noise, |gradient| of an untrained model's predicted class, or the intensity of the input itself."""
    if name == "random":
        first, second = (
            noise.normal(x.shape, seed, 0, f"control/{part}").to(x) for part, (x, _) in enumerate(data)
        )
        return first, second
    if name == "input":
        return data[0][0], data[1][0]
    if name != "untrained":
        raise MethodError(f"The control {name!r} was given. Expected some of {list(CONTROLS)}.")
    with seeded(seed, data[0][0].device):
        model = factory().to(data[0][0].device).eval()
    first, second = (_gradients(model, x) for x, _ in data)
    return first, second


def _gradients(model: nn.Module, x: Tensor) -> Tensor:
    found = []
    for part in x.split(_BATCH):
        point = part.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(point).amax(1).sum(), point)
        found.append(gradient)
    return torch.cat(found)


def _predicted(model: nn.Module, x: Tensor) -> Tensor:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        predicted: Tensor = model(x).argmax(1)
    model.train(was_training)
    return predicted


def _total(x: Tensor) -> Tensor:
    """A score for ``pose``, which only the shape of the point is taken from."""
    return x.flatten(1).sum(1)


def mean_fill(x: Tensor, kind: str | float) -> Tensor | float:
    """What a masked part becomes: the training data's mean at its place, its channel's mean, zero, or a number."""
    if kind == "mean":
        return x.mean(0)
    if kind == "channel_mean":
        return x.transpose(0, 1).flatten(1).mean(1).reshape(-1, *[1] * (x.ndim - 2))
    if kind == "zeros":
        return 0.0
    if isinstance(kind, (int, float)):
        return float(kind)
    raise MethodError(f'mask={kind!r} was given. Expected "mean", "channel_mean", "zeros" or a number.')


def checked(data: Mapping[str, Data]) -> None:
    """Finite floating x (n, ...) of one shape with classes y (n,)."""
    shapes = {tuple(x.shape[1:]) for x, _ in data.values()}
    for name, (x, y) in data.items():
        fits = x.ndim > 1 and len(x) and y.shape == x.shape[:1] and not y.is_floating_point()
        if not fits or len(shapes) > 1 or not x.is_floating_point() or not bool(x.isfinite().all()):
            raise InputError(
                f"{name} data of shapes {tuple(x.shape)} and {tuple(y.shape)} ({x.dtype}, {y.dtype}) were given. "
                "Expected finite floating x (n, ...) and integer classes y (n,), of one shape for training and test."
            )
