"""The retrainings of DiffROAR and ROAR as a sweep: the members of one attribution are one task, trained together."""

from __future__ import annotations

import base64
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pullback.core.errors import FormatError
from pullback.evaluation.ensembles import Member, Vectorize, each_trained, fastest
from pullback.evaluation.retraining import Trained, TrainSpec, seeded
from pullback.evaluation.sweep import Sweep, Task
from pullback.evaluation.views import Examples, View
from pullback.fingerprints import fingerprint, model_fingerprint
from pullback.records import Records
from pullback.workers import Backend, peak_memory, worker_count

__all__ = ["GridTraining", "RetrainingPlan", "Running"]

_PROBE_STEPS = 4


@dataclass(frozen=True)
class Running:
    """Where and how a grid runs; nothing of it changes the result.

    ``out``: a folder that keeps what is finished; ``resume``, ``backend``, ``workers``, ``threads`` as in
    ``Sweep.run``; ``progress`` is called with the number of finished runs and of all.
    """

    out: str | os.PathLike[str] | None = None
    resume: bool = True
    backend: Backend = "serial"
    workers: int | None = None
    threads: int | None = None
    progress: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class RetrainingPlan:
    """What a benchmark would train, and about how long it takes: ``seconds`` on all workers, ``memory`` in bytes."""

    members: int
    tasks: int
    steps: int
    workers: int
    seconds: float
    memory: int

    def __str__(self) -> str:
        minutes = self.seconds / 60
        length = f"{minutes:.2g} min" if minutes >= 1.5 else f"{self.seconds:.2g} s"
        return (
            f"{self.members} retrainings of {self.steps} steps in {self.tasks} task{'s' * (self.tasks > 1)}: about "
            f"{length} on {self.workers} worker{'s' * (self.workers > 1)} and {self.memory / 2**30:.2g} GiB (from "
            f"{_PROBE_STEPS} steps; attributions not counted)"
        )


@dataclass(frozen=True, eq=False)
class GridTraining:
    """A grid's data and recipe: what a worker needs to train some of its members.

    ``chunk``: members of a task; None is all that see one attribution.
    """

    factory: Callable[[], nn.Module]
    examples: Examples
    validation: Examples | None
    test: Examples
    spec: TrainSpec
    vectorize: Vectorize
    chunk: int | None

    def trained(self, members: Sequence[Member], running: Running) -> dict[Member, tuple[Trained, Tensor]]:
        """Each member's course, without its weights, and whether it is right about each test example (n,)."""
        tasks = self.tasks(members)
        own = self if self.vectorize != "auto" else replace(self, vectorize=self._way(members, running.out))
        sweep = Sweep(tasks, running.out, work=own._work)
        counts = [len(task.arguments["members"]) for task in tasks]

        def advance(done: int, total: int) -> None:
            if running.progress is not None:
                # tasks are about of one size: the count is exact at the end
                running.progress(len(members) if done == total else sum(counts[:done]), len(members))

        rows = sweep.run(
            running.backend, running.workers, threads=running.threads, resume=running.resume, on_failure="stop",
            advance=advance,
        )  # fmt: skip
        seconds = [
            sweep.seconds.get(task.key, math.nan) / len(task.arguments["members"])
            for task in tasks
            for _ in task.arguments["members"]
        ]
        return {
            Member(row["seed"], View(row["order"], row["keep"], row["side"])): (
                _course(row, each),
                _unpacked(row["correct"], len(self.test)),
            )
            for row, each in zip(rows, seconds, strict=True)
        }

    def tasks(self, members: Sequence[Member]) -> list[Task]:
        """One task for the members of each attribution, or for ``chunk`` of them."""
        groups: dict[str | None, list[Member]] = {}
        for member in members:
            # attributions that are drawn anew for each seed belong together
            name = None if member.view.order is None else member.view.order.rsplit("/", 1)[0]
            groups.setdefault(name, []).append(member)
        shared = {
            "training": fingerprint(self.examples.x, self.examples.y),
            "fill": fingerprint(torch.as_tensor(self.examples.fill, dtype=self.examples.x.dtype)),
            "validation": ""
            if self.validation is None
            else fingerprint(self.validation.x, self.validation.y),
            "test": fingerprint(self.test.x, self.test.y),
            "architecture": self._architecture(),
        }
        ranks = {
            name: fingerprint(*(data.ranks[name] for data in self._data())) for name in self.examples.ranks
        }
        tasks = []
        for group in groups.values():
            size = self.chunk or len(group)
            for start in range(0, len(group), size):
                some = group[start : start + size]
                content = {
                    "members": [
                        [each.view.order, each.view.keep, each.view.side, each.seed] for each in some
                    ],
                    "training": asdict(replace(self.spec, seed=0)),
                }
                orders = sorted({each.view.order for each in some if each.view.order is not None})
                used = {f"order {name}": ranks[name] for name in orders}
                tasks.append(Task("pullback.evaluation:train_ensemble", content, {**shared, **used}))
        return tasks

    def plan(self, members: Sequence[Member], running: Running) -> RetrainingPlan:
        """Train a few members for a few steps, and multiply."""
        steps = self.spec.epochs * math.ceil(len(self.examples) / self.spec.batch)
        few = max(self.tasks(members), key=lambda task: len(task.arguments["members"]))
        some = [_member(each) for each in few.arguments["members"]]
        way = self._way(some, None) if self.vectorize == "auto" else self.vectorize
        short = replace(self.spec, epochs=1, patience=None)

        def seconds(count: int) -> float:
            rows = torch.arange(
                min(len(self.examples), count * self.spec.batch), device=self.examples.x.device
            )
            began = time.perf_counter()
            list(
                each_trained(
                    self.factory, self.examples.part(rows), some, short, vectorize=way, chunk=self.chunk
                )
            )
            return time.perf_counter() - began

        seconds(1)
        fixed, longer = seconds(1), seconds(_PROBE_STEPS + 1)
        each = max(longer - fixed, 0.0) / _PROBE_STEPS / len(some)
        workers = worker_count(running.backend, running.workers)
        total = len(members) * (each * steps + fixed / len(some))
        tasks = len(self.tasks(members))
        return RetrainingPlan(
            len(members), tasks, steps, workers, total / min(workers, tasks), workers * peak_memory()
        )

    def _work(self, packs: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        return [self._rows([_member(each) for each in pack["members"]]) for pack in packs]

    def _rows(self, members: Sequence[Member]) -> list[dict[str, Any]]:
        rows = []
        finished = each_trained(
            self.factory, self.examples, members, self.spec, validation=self.validation, test=self.test,
            vectorize=self.vectorize, chunk=self.chunk,
        )  # fmt: skip
        for member, run in zip(members, finished, strict=True):
            assert run.predicted is not None
            right = (run.predicted == self.test.y).cpu()
            view, course = member.view, run.trained
            rows.append(
                {
                    "order": view.order, "keep": view.keep, "side": view.side, "seed": member.seed,
                    "train_accuracy": course.train_accuracy, "accuracy": course.accuracy,
                    "converged": course.converged, "collapsed": course.collapsed, "losses": list(course.losses),
                    "test_accuracy": float(right.double().mean()), "correct": _packed(right),
                }
            )  # fmt: skip
        return rows

    def _data(self) -> tuple[Examples, ...]:
        return tuple(data for data in (self.examples, self.validation, self.test) if data is not None)

    def _architecture(self) -> str:
        with seeded(self.spec.seed, self.examples.x.device):
            return model_fingerprint(self.factory())

    def _way(self, members: Sequence[Member], out: str | os.PathLike[str] | None) -> Vectorize:
        """The fastest way to train, timed once for a folder: ways round differently, and a timing is never the same."""
        kept = Records(None if out is None else Path(out) / "vectorize.jsonl")
        key = f"{self._architecture()}/{asdict(self.spec)}"
        if key not in kept.read():
            with seeded(members[0].seed, self.examples.x.device):
                model = self.factory().to(self.examples.x.device)
            way = fastest(self.factory, model, self.examples, members, self.spec)
            if out is not None:
                Path(out).mkdir(parents=True, exist_ok=True)
            kept.append(key, {"way": way})
        found: Vectorize = kept.read()[key]["way"]
        return found


def _member(content: Sequence[Any]) -> Member:
    order, keep, side, seed = content
    return Member(seed, View(order, keep, side))


def _course(row: Mapping[str, Any], seconds: float) -> Trained:
    return Trained(
        model=nn.Identity(),  # a grid may hold hundreds of models: none is kept
        train_accuracy=row["train_accuracy"],
        accuracy=row["accuracy"],
        converged=row["converged"],
        collapsed=row["collapsed"],
        seconds=seconds,
        losses=tuple(row["losses"]),
    )


def _packed(right: Tensor) -> str:
    return base64.b64encode(np.packbits(right.numpy()).tobytes()).decode("ascii")


def _unpacked(text: str, count: int) -> Tensor:
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8))
    if not count <= len(bits) < count + 8:
        raise FormatError(
            f"A result about {len(bits)} test examples was found. Expected {count}; was it changed by hand?"
        )
    return torch.from_numpy(bits[:count].astype(bool))
