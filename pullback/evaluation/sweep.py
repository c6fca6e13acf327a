"""A grid of measurements as tasks: done once each, in any order, on any backend, across interruptions."""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pullback.core.errors import FormatError, InputError, TaskError
from pullback.core.progress import track
from pullback.evaluation.sweep_folder import SweepFolder
from pullback.evaluation.task_cache import keeping
from pullback.records import as_json, canonical
from pullback.version import __version__
from pullback.workers import Backend, Outcome, each_outcome, imported, worker_count

__all__ = ["Failure", "Row", "Sweep", "SweepPlan", "Task", "Work"]

Row = dict[str, Any]
# Packs of arguments -> the row or rows of each.
Work = Callable[[Sequence[Mapping[str, Any]]], Sequence[Any]]


@dataclass(frozen=True)
class Task:
    """One measurement: a function by its import path, and its keyword arguments as JSON.

    The function returns a row (a dict of JSON values) or a list of rows. ``key`` is the SHA-256 of the canonical JSON
    of all fields, the package's version among them: what has one key is the same result.

    Args:
        function: "package.module:name".
        arguments: numbers, text, None, lists and dicts; tuples become lists.
        fingerprints: of what the function reads beside its arguments, such as data or a model; see
            ``pullback.fingerprints``.

    Raises:
        InputError: a path of another form, or arguments that JSON cannot hold.

    >>> task = Task("operator:add", {"seed": 0})
    >>> task.key == Task("operator:add", {"seed": 0}).key != Task("operator:add", {"seed": 1}).key
    True
    """

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    version: str = __version__

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", str(self.function)):
            raise InputError(f'The function {self.function!r} was given. Expected "package.module:name".')
        if not isinstance(self.arguments, Mapping):
            raise InputError(
                f"Arguments of type {type(self.arguments).__name__} were given. Expected a dict of keyword arguments."
            )
        # a copy in JSON's types: what the caller changes later cannot change the key
        object.__setattr__(self, "arguments", as_json(self.arguments, "arguments", finite=True))
        object.__setattr__(self, "fingerprints", as_json(self.fingerprints, "fingerprints", finite=True))

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        return f"{self.function} {canonical(self.arguments)}"

    @cached_property
    def key(self) -> str:
        return sha256(canonical(self.content()).encode()).hexdigest()

    def content(self) -> dict[str, Any]:
        """All that decides the result, as JSON."""
        return {
            "function": self.function,
            "arguments": self.arguments,
            "fingerprints": self.fingerprints,
            "version": self.version,
        }

    def resolved(self) -> Callable[..., Any]:
        """The function itself. Raises ``InputError`` where it cannot be imported."""
        return imported(self.function)  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Failure:
    """A task that raised: the error, and its trace as text."""

    task: Task
    error: Exception
    trace: str

    def __str__(self) -> str:
        return f"{self.task} raised {type(self.error).__name__}: {self.error}"


@dataclass(frozen=True)
class SweepPlan:
    """What running would take. ``seconds``: of all that is missing, None where unknown; ``memory``: bytes, likewise."""

    tasks: int
    finished: int
    workers: int
    seconds: float | None
    memory: int | None
    basis: str

    def __str__(self) -> str:
        missing = self.tasks - self.finished
        text = f"{self.tasks} tasks: {self.finished} finished, {missing} missing"
        if missing and self.seconds is not None:
            text += f"; about {_duration(self.seconds)} on {self.workers} worker{'s' * (self.workers > 1)}"
            if self.memory:
                text += f" and {self.memory / 2**30:.2g} GiB"
        return f"{text} ({self.basis})" if self.basis else text


class Sweep:
    """Tasks and their results, in a folder or in memory. Each is done once; what is there is not done again.

    The folder holds ``sweep.json`` (the tasks), ``results.jsonl`` (a line per finished task, on disk before the next
    begins), ``times.jsonl``, ``failures.jsonl``, ``attributions/`` (see ``cached``) and, when all is done,
    ``table.csv``. Several processes may run the same folder at once, each with some or all of the tasks.

    Args:
        tasks: in the order of the table; equal ones are done once.
        out: the folder, made where it is missing; None keeps results in memory.
        work: does several tasks at once, a list of arguments -> a list of their rows; by default each task's function
            is called.
        pack: how many tasks ``work`` is given.

    Raises:
        InputError: no tasks. FormatError: the folder holds another sweep, whose functions are others.

    >>> Sweep([Task("fractions:Fraction", {"numerator": 1})]).plan(probe=False)
    SweepPlan(tasks=1, finished=0, workers=1, seconds=None, memory=None, basis='')
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        out: str | os.PathLike[str] | None = None,
        *,
        work: Work | None = None,
        pack: int = 1,
    ) -> None:
        if not tasks or pack < 1 or (work is None and pack > 1):
            raise InputError(
                f"{len(tasks)} tasks, pack={pack} were given. Expected at least one of each, and work= for more."
            )
        content: dict[str, dict[str, Any]] = {}
        for task in tasks:
            if content.setdefault(task.key, task.content()) != task.content():
                raise InputError(
                    f"Two tasks have the key {task.key[:12]}... and differ: {content[task.key]} and {task.content()}. "
                    "Expected keys that follow from the content, as Task makes them."
                )
        self.tasks = tuple(tasks)
        self.failures: tuple[Failure, ...] = ()
        self._work, self._pack = work, pack
        self._folder = SweepFolder(None if out is None else Path(out), content)

    @classmethod
    def load(cls, out: str | os.PathLike[str]) -> Sweep:
        """The sweep of a folder, with the tasks of all its runs. Raises ``FormatError`` where there is none."""
        return cls([Task(**content) for content in SweepFolder.contents(Path(out))], out)

    @property
    def missing(self) -> tuple[Task, ...]:
        """Tasks without a result, each once, in order."""
        done = self._folder.results()
        return tuple(task for task in dict.fromkeys(self.tasks) if task.key not in done)

    @property
    def seconds(self) -> dict[str, float]:
        """How long each finished task took, by key; of a pack, its share."""
        return {key: time["seconds"] for key, time in self._folder.times.read().items()}

    def rows(self) -> list[Row]:
        """The rows of the finished tasks, in the order of the tasks."""
        done = self._folder.results()
        return [row for task in self.tasks if task.key in done for row in done[task.key]]

    def plan(self, backend: Backend = "serial", workers: int | None = None, probe: bool = True) -> SweepPlan:
        """How much there is to do, and how long it should take by the finished tasks; prints in a line.

        Where none is finished and ``probe`` is set, a first pack is done, and kept.
        """
        count = worker_count(backend, workers)
        basis = ""
        if probe and self.missing and not self.seconds:
            self._run(list(self.missing[: self._pack]), "serial", None, None, None)
            basis = "from a probe, which is kept"
        times = self._folder.times.read()
        missing = self.missing
        own = [times[task.key] for task in self.tasks if task.key in times]
        seconds = memory = None
        if own:
            basis = basis or f"from {len(own)} finished"
            seconds = statistics.fmean(time["seconds"] for time in own) * len(missing) / count
            memory = count * max(time["peak"] for time in own)
        elif self.failures:
            basis = f"the probe failed: {self.failures[0]}"
        return SweepPlan(
            len(set(self.tasks)), len(set(self.tasks)) - len(missing), count, seconds, memory, basis
        )

    def run(
        self,
        backend: Backend = "serial",
        workers: int | None = None,
        *,
        threads: int | None = None,
        progress: bool = True,
        resume: bool = True,
        on_failure: Literal["raise", "warn", "stop"] = "raise",
        advance: Callable[[int, int], None] | None = None,
    ) -> list[Row]:
        """Do what is missing, and give all rows in the order of the tasks.

        Rows are the same on every backend and after every interruption, byte by byte where each worker has as many
        threads (sums over threads round differently).

        Args:
            backend, workers, threads: as in ``pullback.workers.each_outcome``.
            progress: a bar on a terminal.
            resume: go on from the results that are there; False expects none.
            on_failure: of a task: "raise" a TaskError when the others are done, "warn" and give the others' rows, or
                "stop" at once with the task's own error. Failed tasks are tried again by the next run.
            advance: called with the numbers of finished tasks and of all.

        Raises:
            InputError: an unknown backend, a function that cannot be imported. TaskError: tasks failed.
            FormatError: there are results and ``resume`` is False.
        """
        if on_failure not in ("raise", "warn", "stop"):
            raise InputError(f'on_failure={on_failure!r} was given. Expected "raise", "warn" or "stop".')
        missing = self.missing
        total = len(set(self.tasks))
        if not resume and len(missing) < total:
            raise FormatError(
                f"{self._folder.path} holds {total - len(missing)} results of this sweep and resume=False was given. "
                "Expected none; resume=True goes on from them, and another folder starts anew."
            )
        worker_count(backend, workers)

        def finished(count: int) -> None:
            if advance is not None:
                advance(count, total)

        self._run(
            list(missing), backend, workers, threads, "sweep" if progress else None, on_failure, finished
        )
        rows = self.rows()
        if not self.failures:
            self._folder.write_table(rows)
            return rows
        report = (
            f"{len(self.failures)} of {total} tasks failed; the results of the other {total - len(self.failures)} are "
            f"kept. The first: {self.failures[0]}. Run again to try them again"
            + (f"; traces are in {self._folder.failures.path}." if self._folder.path else ".")
        )
        if on_failure == "warn":
            warnings.warn(report, UserWarning, stacklevel=2)
            return rows
        raise TaskError(f'{report} on_failure="warn" gives the rows of the others.')

    def _run(
        self,
        missing: list[Task],
        backend: Backend,
        workers: int | None,
        threads: int | None,
        label: str | None,
        on_failure: str = "raise",
        finished: Callable[[int], None] = lambda count: None,
    ) -> None:
        if self._work is None:
            for task in {task.function: task for task in missing}.values():
                task.resolved()
        self._folder.open()
        failures: list[Failure] = []
        given: list[list[Task]] = []
        left = {task.key for task in missing}
        total = len(set(self.tasks))

        def packs() -> Iterator[list[Task]]:
            """What is still missing when a worker is free: other processes may be at work on the folder."""
            for start in range(0, len(missing), self._pack):
                done = self._folder.results()
                pack = [task for task in missing[start : start + self._pack] if task.key not in done]
                left.difference_update(
                    task.key for task in missing[start : start + self._pack] if task.key in done
                )
                if pack:
                    given.append(pack)
                    yield pack

        shared = self._work, self._folder.path
        outcomes = each_outcome(_done, shared, packs(), backend=backend, workers=workers, threads=threads)
        with contextlib.closing(outcomes), track(total, label) as advance:
            shown = total - len(left)
            advance(shown)
            for outcome in outcomes:
                pack = given[outcome.number]
                failures += self._noted(pack, outcome)
                if failures and on_failure == "stop":
                    self.failures = tuple(failures)
                    raise failures[0].error
                left.difference_update(task.key for task in pack)
                advance(total - len(left) - shown)
                shown = total - len(left)
                finished(shown)
        self.failures = tuple(failures)

    def _noted(self, pack: list[Task], outcome: Outcome) -> list[Failure]:
        failures = []
        for place, task in enumerate(pack):
            if outcome.error is None:
                seconds = outcome.seconds / len(pack)
                self._folder.keep(task.key, task.content(), outcome.value[place], seconds, outcome.peak)
            else:
                self._folder.keep_failure(task.key, task.content(), outcome.error, outcome.trace)
                failures.append(Failure(task, outcome.error, outcome.trace))
        return failures


def _done(shared: tuple[Work | None, Path | None], pack: list[Task]) -> list[list[Row]]:
    """The rows of each task of a pack, in this process."""
    work, folder = shared
    with keeping(folder):
        if work is None:
            found: Sequence[Any] = [task.resolved()(**task.arguments) for task in pack]
        else:
            found = work([task.arguments for task in pack])
    if len(found) != len(pack):
        raise InputError(f"{len(found)} results were given for {len(pack)} tasks. Expected one each.")
    return [_as_rows(each, task) for each, task in zip(found, pack, strict=True)]


def _as_rows(found: Any, task: Task) -> list[Row]:
    rows = [found] if isinstance(found, Mapping) else found
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, Mapping) for row in rows):
        raise InputError(
            f"{task.function} gave a {type(found).__name__}. Expected a row (a dict of JSON values) or a list of rows."
        )
    return [as_json(row, f"row {number}") for number, row in enumerate(rows)]


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.2g} s"
