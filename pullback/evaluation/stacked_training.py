"""The training loop of a stack: every step is one step of each of its members."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pullback.evaluation.perceptron_stack import cross_entropy_gradient
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
from pullback.evaluation.views import Examples, Shown, View

__all__ = ["Finished", "Member", "trained_together"]

# Elements of input that an evaluation pass of a stack holds at once.
_EVALUATION_ELEMENTS = 2**20


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
    memory: int = 0,
) -> Iterator[Finished]:
    """Train the members of a stack, each as it would train alone, and yield them in order.

    ``memory``: bytes that what the members see may take, written down.
    """
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
    shown = Shown(examples, views, whose, memory)
    held_out = None
    if kept is not None and validation is not None:
        held_out = Shown(validation, views, [0] * count, memory - shown.bytes)

    for _ in range(spec.epochs):
        orders = torch.stack([torch.randperm(len(examples), generator=own) for own in shuffling]).to(device)
        loss_sum, hits = torch.zeros(count, device=device), torch.zeros(count, device=device)
        for batch in orders.split(spec.batch, dim=1):
            points, labels = shown.batch(batch), examples.y[batch].index_select(0, own_order)
            if spec.attack is not None:
                points = _attacked(stack, points, labels, spec, attacking)
            losses, logits = stack.learn(points, labels)
            optimizer.step()
            loss_sum += losses * labels.shape[1]
            hits += (logits.max(1).indices == labels).sum(1)
        loss_list, hit_list = loss_sum.tolist(), hits.tolist()
        going = [not course.over for course in courses]
        for number, course in enumerate(courses):
            if going[number]:
                course.losses.append(loss_list[number] / len(examples))
                course.running.append(hit_list[number] / len(examples))
        if kept is not None and validation is not None and held_out is not None:
            accuracies = _accuracies(stack, validation, held_out)
            better = [
                going[number] and course.improved(accuracies[number]) for number, course in enumerate(courses)
            ]
            _keep(kept, stack.state, torch.tensor(better, device=device))
            if all(course.over for course in courses):
                break
    if kept is not None:
        _keep(stack.state, kept, torch.ones(count, dtype=torch.bool, device=device))
    predicted = _stack_predictions(stack, examples, shown)
    train_accuracies = (predicted == examples.y).double().mean(1).tolist()
    sees = _sees(stack, examples, shown)
    one_class = constant(examples.y)
    validated = tested = None
    if validation is not None:
        validated = _accuracies(stack, validation, held_out or Shown(validation, views, [0] * count, 0))
    if test is not None:
        tested = _stack_predictions(stack, test, Shown(test, views, [0] * count, 0))
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


def _attacked(
    stack: Stack, points: Tensor, labels: Tensor, spec: TrainSpec, generators: Sequence[torch.Generator]
) -> Tensor:
    """The attacked batches (E, B, *S); each member's attack draws from its own generator."""
    assert spec.attack is not None

    def gradient(flat: Tensor) -> Tensor:
        stacked = flat.unflatten(0, labels.shape)
        return stack.input_gradient(stacked, lambda logits: cross_entropy_gradient(logits, labels)).flatten(
            0, 1
        )

    found: Tensor = spec.attack.ascend(gradient, points.flatten(0, 1), spec.bounds, generators)
    perturbed: Tensor = found.unflatten(0, labels.shape)
    return perturbed


def _stack_predictions(stack: Stack, examples: Examples, shown: Shown) -> Tensor:
    """The class each member predicts for each example, (E, n)."""
    at_once = max(1, min(EVALUATION_BATCH, _EVALUATION_ELEMENTS // (shown.count * examples.x[0].numel())))
    rows = torch.arange(len(examples), device=examples.x.device).split(at_once)
    return torch.cat([stack.logits(shown.batch(part)).max(1).indices for part in rows], 1)


def _accuracies(stack: Stack, examples: Examples, shown: Shown) -> list[float]:
    hits: list[float] = (_stack_predictions(stack, examples, shown) == examples.y).double().mean(1).tolist()
    return hits


def _sees(stack: Stack, examples: Examples, shown: Shown) -> list[bool]:
    """Per member: whether the score of the predicted class depends on any of the first inputs."""
    found = torch.zeros(shown.count, dtype=torch.bool, device=examples.x.device)
    for rows in torch.arange(min(SAMPLE, len(examples)), device=found.device).split(32):
        gradient = stack.input_gradient(shown.batch(rows), _of_the_highest)
        found |= gradient.flatten(1).any(1)
        if bool(found.all()):
            break
    sees: list[bool] = found.tolist()
    return sees


def _of_the_highest(logits: Tensor) -> Tensor:
    """The derivative of each example's highest logit by its logits; as autograd's, shared between equal ones."""
    highest = (logits == logits.amax(1, keepdim=True)).to(logits.dtype)
    return highest / highest.sum(1, keepdim=True)
