"""The training loop of a stack: every step is one step of each of its members."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback.evaluation.retraining import (
    EVALUATION_BATCH,
    SAMPLE,
    Course,
    Trained,
    TrainSpec,
    constant,
    generators,
    optimizer_of,
)
from pullback.evaluation.stacking import Stack
from pullback.evaluation.views import Examples, View

__all__ = ["Finished", "Member", "trained_together"]

# Elements of input that an evaluation pass of a stack holds at once.
_EVALUATION_ELEMENTS = 2**22


@dataclass(frozen=True)
class Member:
    """One run of a grid: the seed of its weights, of the order of its data and of its attacks, and what it sees."""

    seed: int = 0
    view: View = field(default_factory=View)


@dataclass(frozen=True, eq=False)
class Finished:
    """A member that has been trained: its number in the grid, and the classes it predicts for the test data (n,)."""

    number: int
    trained: Trained
    predicted: Tensor | None


def trained_together(
    stack: Stack,
    examples: Examples,
    members: Sequence[Member],
    first: int,
    spec: TrainSpec,
    validation: Examples | None,
    test: Examples | None,
) -> Iterator[Finished]:
    """Train the members of a stack, each as it would train alone, and yield them in order."""
    start = time.perf_counter()
    device, count = examples.x.device, len(members)
    views = [member.view for member in members]
    seeds = list(dict.fromkeys(member.seed for member in members))
    whose = [seeds.index(member.seed) for member in members]
    own_order = torch.tensor(whose, device=device)
    shuffling = [generators(seed)[0] for seed in seeds]
    attacking = [generators(member.seed)[1] for member in members]
    courses = [Course(spec) for _ in members]
    optimizer = optimizer_of(spec, stack.parameters)
    kept = [value.detach().clone() for value in stack.state] if spec.patience is not None else None

    def attacked(points: Tensor, labels: Tensor) -> Tensor:
        def logits(flat: Tensor) -> Tensor:
            return stack.logits(flat.unflatten(0, labels.shape), training=False).flatten(0, 1)

        assert spec.attack is not None
        found = spec.attack.perturb(logits, points.flatten(0, 1), labels.flatten(), spec.bounds, attacking)
        perturbed: Tensor = found.unflatten(0, labels.shape)
        return perturbed

    held: Tensor | None = None
    for _ in range(spec.epochs):
        orders = torch.stack([torch.randperm(len(examples), generator=own) for own in shuffling]).to(device)
        loss_sum, hits = torch.zeros(count, device=device), torch.zeros(count, device=device)
        for batch in orders.split(spec.batch, dim=1):
            points, labels = examples.seen_by(batch, views, whose, held), examples.y[batch][own_order]
            held = points if held is None else held
            if spec.attack is not None:
                points = attacked(points, labels)
            logits = stack.logits(points, training=True)
            each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            losses = each.unflatten(0, (count, -1)).mean(1)
            optimizer.zero_grad(set_to_none=True)
            # the sum, not the mean, over members: each has the gradient it would have alone
            torch.autograd.backward(losses.sum())
            optimizer.step()
            loss_sum += losses.detach() * labels.shape[1]
            hits += (logits.argmax(2) == labels).sum(1)
        loss_list, hit_list = loss_sum.tolist(), hits.tolist()
        going = [not course.over for course in courses]
        for number, course in enumerate(courses):
            if going[number]:
                course.losses.append(loss_list[number] / len(examples))
                course.running.append(hit_list[number] / len(examples))
        if kept is not None and validation is not None:
            accuracies = _accuracies(stack, validation, views)
            better = [
                going[number] and course.improved(accuracies[number]) for number, course in enumerate(courses)
            ]
            _keep(kept, stack.state, torch.tensor(better, device=device))
            if all(course.over for course in courses):
                break
    if kept is not None:
        _keep(stack.state, kept, torch.ones(count, dtype=torch.bool, device=device))
    predicted = _stack_predictions(stack, examples, views)
    train_accuracies = (predicted == examples.y).double().mean(1).tolist()
    sees = _sees(stack, examples, views)
    one_class = constant(examples.y)
    validated = None if validation is None else _accuracies(stack, validation, views)
    tested = None if test is None else _stack_predictions(stack, test, views)
    seconds = (time.perf_counter() - start) / count
    for number, course in enumerate(courses):
        collapsed = (constant(predicted[number]) and not one_class) or not sees[number]
        trained = Trained(
            model=stack.module(number).eval(),
            train_accuracy=train_accuracies[number],
            accuracy=None if validated is None else validated[number],
            converged=course.settled() and not collapsed,
            collapsed=collapsed,
            seconds=seconds,
            losses=tuple(course.losses),
        )
        yield Finished(first + number, trained, None if tested is None else tested[number])


def _keep(into: Sequence[Tensor], values: Sequence[Tensor], which: Tensor) -> None:
    """Copy the chosen members' tensors."""
    with torch.no_grad():
        for old, new in zip(into, values, strict=True):
            old[which] = new[which]


def _stack_predictions(stack: Stack, examples: Examples, views: Sequence[View]) -> Tensor:
    at_once = max(1, min(EVALUATION_BATCH, _EVALUATION_ELEMENTS // (len(views) * examples.x[0].numel())))
    points: Tensor | None = None
    predicted = []
    with torch.no_grad():
        for rows in torch.arange(len(examples), device=examples.x.device).split(at_once):
            points = examples.seen_by(rows[None], views, [0] * len(views), points)
            predicted.append(stack.logits(points, training=False).argmax(2))
    return torch.cat(predicted, 1)


def _accuracies(stack: Stack, examples: Examples, views: Sequence[View]) -> list[float]:
    hits: list[float] = (_stack_predictions(stack, examples, views) == examples.y).double().mean(1).tolist()
    return hits


def _sees(stack: Stack, examples: Examples, views: Sequence[View]) -> list[bool]:
    """Per member: whether the score of the predicted class depends on any of the first inputs."""
    found = torch.zeros(len(views), dtype=torch.bool, device=examples.x.device)
    for rows in torch.arange(min(SAMPLE, len(examples)), device=found.device).split(32):
        points = examples.seen_by(rows[None], views, [0] * len(views)).requires_grad_()
        (gradient,) = torch.autograd.grad(stack.logits(points, training=False).amax(2).sum(), points)
        found |= gradient.flatten(1).any(1)
        if bool(found.all()):
            break
    sees: list[bool] = found.tolist()
    return sees
