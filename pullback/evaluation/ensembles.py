"""Training a grid of small models at once: each member as it would train alone, in one stack of weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from pullback.core.errors import InputError, MethodError
from pullback.evaluation.perceptron_stack import perceptron_stack, why_no_perceptron
from pullback.evaluation.retraining import (
    Trained,
    TrainSpec,
    predictions,
    require_validation,
    seeded,
    train_view,
)
from pullback.evaluation.stacked_training import Finished, Member, trained_together
from pullback.evaluation.stacking import Stack, vmapped_stack, why_not_vmap
from pullback.evaluation.views import Examples

__all__ = ["Ensemble", "Finished", "Member", "Vectorize", "each_trained", "fastest", "train_ensemble"]

Vectorize = Literal["auto", "stack", "vmap", "loop"]
_WAYS = ("auto", "stack", "vmap", "loop")
# "auto" times so many steps, of as many members, as are below a hundredth of the work: a way that turns out four times
# slower than the loop then costs less than 5 %.
_PROBE_STEPS, _PROBE_REPEATS, _PROBE_MEMBERS = 3, 2, 16
_PROBED_SHARE = 0.01
# Where that leaves nothing to time, perceptrons below so many weights are stacked: ten times fewer than where the loop,
# whose weights stay in a core's own cache, catches up.
_SMALL = 2**15
# On a CPU a stack that stays in the cache is up to a third faster; below so many members, overheads show.
_CACHE = 2**25
_FEW_MEMBERS = 16


@dataclass(frozen=True, eq=False)
class Ensemble:
    """The trained members in the order of the grid, and the classes they predict for the test data, (E, n) or None."""

    runs: tuple[Trained, ...]
    predicted: Tensor | None


def train_ensemble(
    factory: Callable[[], nn.Module],
    examples: Examples,
    members: Sequence[Member],
    spec: TrainSpec,
    *,
    validation: Examples | None = None,
    test: Examples | None = None,
    vectorize: Vectorize = "auto",
    chunk: int | None = None,
    memory_budget: int = 2**30,
) -> Ensemble:
    """Train one ``factory()`` per member, many at a time; each as ``train`` with the member's seed would alone.

    Each member's weights, order of data and attacks are drawn from its own seed (``spec.seed`` is not used), and the
    losses are summed over members, so that no member feels another: the result does not depend on who trains together,
    on ``chunk`` or on ``vectorize``, beyond the rounding of sums.

    ``vectorize``: "stack" for perceptrons (batched matrix products), "vmap" for any functional module, "loop" one
    member after the other, "auto" the fastest of them here, by timing a few steps. ``chunk``: members trained at once;
    None as many as half of ``memory_budget`` bytes allow, on a CPU no more than fit its cache; the other half may hold
    what their views show. ``test``: data to predict after training, seen through each member's view. ``spec.attack``
    trains robust models.

    Raises ``MethodError`` for a model that the way asked for cannot train, ``InputError`` for no members.

    >>> x = torch.rand(64, 6, generator=torch.Generator().manual_seed(0))
    >>> members = [Member(seed) for seed in range(4)]
    >>> net = lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> spec = TrainSpec(epochs=30, batch=16, learning_rate=0.02)
    >>> runs = train_ensemble(net, Examples(x, (x[:, 0] > 0.5).long()), members, spec).runs
    >>> min(run.train_accuracy for run in runs) > 0.9
    True
    """
    done = list(
        each_trained(
            factory, examples, members, spec, validation=validation, test=test, vectorize=vectorize, chunk=chunk,
            memory_budget=memory_budget,
        )
    )  # fmt: skip
    found = [run.predicted for run in done if run.predicted is not None]
    return Ensemble(tuple(run.trained for run in done), torch.stack(found) if found else None)


def each_trained(
    factory: Callable[[], nn.Module],
    examples: Examples,
    members: Sequence[Member],
    spec: TrainSpec,
    *,
    validation: Examples | None = None,
    test: Examples | None = None,
    vectorize: Vectorize = "auto",
    chunk: int | None = None,
    memory_budget: int = 2**30,
) -> Iterator[Finished]:
    """The members of ``train_ensemble`` as they finish, in order, so that no more models live than train at once."""
    if vectorize not in _WAYS:
        raise MethodError(f'vectorize={vectorize!r} was given. Expected "auto", "stack", "vmap" or "loop".')
    if not members or (chunk is not None and chunk < 1):
        raise InputError(f"{len(members)} members, chunk={chunk} was given. Expected at least 1 of each.")
    require_validation(spec, validation)
    for data in (
        examples,
        *(() if validation is None else (validation,)),
        *(() if test is None else (test,)),
    ):
        unknown = {member.view.order for member in members} - {None, *data.ranks}
        if unknown:
            raise InputError(
                f"Views of {sorted(map(str, unknown))} were given. Expected orders of every data set."
            )
    with seeded(members[0].seed, examples.x.device):
        model = factory().to(examples.x.device)
    size = chunk or _members_at_once(_footprint(model, examples, spec), memory_budget, examples.x.device)
    way = vectorize
    if way == "auto":
        way = fastest(factory, model, examples, members, spec, size)
    room = memory_budget // 2
    for start in range(0, len(members), size if way != "loop" else 1):
        if way == "loop":
            yield _alone(factory, examples, members[start], start, spec, validation, test)
        else:
            part = members[start : start + size]
            stack = _stacked(factory, part, way, examples.x.device)
            yield from trained_together(stack, examples, part, start, spec, validation, test, room)


def _members_at_once(footprint: int, memory_budget: int, device: torch.device) -> int:
    """Half of the memory is for members, half for what they see."""
    most = max(1, memory_budget // 2 // footprint)
    return min(most, max(_FEW_MEMBERS, _CACHE // footprint)) if device.type == "cpu" else most


def _alone(
    factory: Callable[[], nn.Module],
    examples: Examples,
    member: Member,
    number: int,
    spec: TrainSpec,
    validation: Examples | None,
    test: Examples | None,
) -> Finished:
    trained = train_view(factory, examples, member.view, replace(spec, seed=member.seed), validation)
    predicted = None if test is None else predictions(trained.model, test, member.view)
    return Finished(number, trained, predicted)


def _stacked(
    factory: Callable[[], nn.Module], members: Sequence[Member], way: Vectorize, device: torch.device
) -> Stack:
    models = []
    for member in members:
        with seeded(member.seed, device):
            models.append(factory().to(device))
    return perceptron_stack(models) if way == "stack" else vmapped_stack(models)


def _footprint(model: nn.Module, examples: Examples, spec: TrainSpec) -> int:
    """About how many bytes one more member takes: weights, gradients, moments, best weights, inputs, activations."""
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    outputs = 0

    def note(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal outputs
        outputs += output.numel() if isinstance(output, Tensor) else 0

    hooks = [part.register_forward_hook(note) for part in model.modules()]
    was_training = model.training
    with torch.no_grad():
        model.eval()(examples.x[:1])
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    batch = min(spec.batch, len(examples))
    weights = int(weights)
    return 5 * weights + batch * examples.x.element_size() * (3 * examples.x[0].numel() + 3 * outputs)


def fastest(
    factory: Callable[[], nn.Module],
    model: nn.Module,
    examples: Examples,
    members: Sequence[Member],
    spec: TrainSpec,
    size: int | None = None,
) -> Vectorize:
    """What ``vectorize="auto"`` is here: the way that needs the least time per member, over a few steps.

    ``model``: one of ``factory()``; ``size``: members that would train at once, all by default.
    """
    way: Vectorize
    size = len(members) if size is None else size
    if len(members) == 1 or size == 1:
        return "loop"
    if why_no_perceptron(model) is None:
        way = "stack"
    elif why_not_vmap(model) is None:
        way = "vmap"
    else:
        return "loop"
    steps = spec.epochs * math.ceil(len(examples) / spec.batch)
    # one warm-up step for each way, then the timed ones
    affordable = int(_PROBED_SHARE * len(members) * steps / (1 + _PROBE_STEPS * _PROBE_REPEATS)) - 1
    some = members[: max(0, min(size, _PROBE_MEMBERS, affordable))]
    if len(some) < 2:
        small = sum(value.numel() for value in model.parameters()) < _SMALL
        return "stack" if way == "stack" and small else "loop"
    try:
        _probed_seconds(way, factory, examples, some, spec, 1)
    except MethodError:
        return "loop"
    _probed_seconds("loop", factory, examples, some[:1], spec, 1)
    stacked, looped = math.inf, math.inf
    for _ in range(_PROBE_REPEATS):
        stacked = min(stacked, _probed_seconds(way, factory, examples, some, spec, _PROBE_STEPS) / len(some))
        looped = min(looped, _probed_seconds("loop", factory, examples, some[:1], spec, _PROBE_STEPS))
        if stacked > 1.2 * looped:
            break
    return way if stacked < looped else "loop"


def _probed_seconds(
    way: Vectorize,
    factory: Callable[[], nn.Module],
    examples: Examples,
    members: Sequence[Member],
    spec: TrainSpec,
    steps: int,
) -> float:
    """How long some members take for a few steps."""
    few, device = replace(spec, epochs=1, patience=None), examples.x.device
    some = examples.part(torch.arange(min(len(examples), steps * spec.batch), device=device))
    began = time.perf_counter()
    if way == "loop":
        _alone(factory, some, members[0], 0, few, None, None)
    else:
        stack = _stacked(factory, members, way, device)
        list(trained_together(stack, some, members, 0, few, None, None, 2**30))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
