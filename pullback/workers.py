"""One function over many items: in this process, in several, or on a Ray cluster, with the same outcomes."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pullback.core.errors import InputError

__all__ = ["BACKENDS", "Backend", "Outcome", "each_outcome", "imported", "peak_memory", "worker_count"]

Backend = Literal["serial", "process", "ray"]
BACKENDS = ("serial", "process", "ray")
ATTEMPTS = 3  # how often an item is tried whose worker dies


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of an item: a value, or the error it raised with its trace.

    ``seconds``: how long it took; ``peak``: the most bytes its process had ever held by then (0 where unknown).
    """

    number: int
    value: Any = None
    error: Exception | None = None
    trace: str = ""
    seconds: float = 0.0
    peak: int = 0


def each_outcome(
    function: Callable[[Any, Any], Any],
    shared: Any,
    items: Iterable[Any],
    *,
    backend: Backend = "serial",
    workers: int | None = None,
    threads: int | None = None,
) -> Generator[Outcome, None, None]:
    """``function(shared, item)`` of every item, as they finish; an error becomes an outcome and the rest goes on.

    Items are taken one at a time when a worker is free, so that no more of them live than work goes on. An item whose
    worker dies (out of memory, killed) is given to another, three times at most. Closing the generator ends
    the workers.

    Args:
        function: a module-level function. It and ``shared`` go to every worker once, by pickle in memory.
        backend: "serial", "process" (spawned processes), or "ray" (the cluster that ``ray.init`` joined, else a local
            one for the duration).
        workers: processes at work at once; None is one per core, or all of a Ray cluster's CPUs.
        threads: of torch in each worker; None is cores/workers, and in serial those there are.

    Raises ``InputError`` for an unknown backend, where Ray is not installed, and for what cannot be sent to a worker.
    """
    workers = worker_count(backend, workers)
    if threads is not None and threads < 1:
        raise InputError(f"threads={threads} was given. Expected at least 1, or None.")
    if backend == "serial":
        return _serial(function, shared, items, threads)
    each = threads or max(1, _cores() // workers)
    if backend == "process":
        from pullback.process_workers import each_by_processes

        return each_by_processes(function, shared, items, workers, each)
    from pullback.ray_workers import each_by_ray

    return each_by_ray(function, shared, items, workers, each)


def imported(path: str) -> Any:
    """What "package.module:name" names. Raises ``InputError`` for another form, or where it cannot be imported."""
    module, _, name = str(path).partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise InputError(f'{path!r} was given. Expected "package.module:name".')
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{path!r} cannot be imported: {error}. Expected something in a module that Python finds, in worker "
            "processes too."
        ) from error
    if not callable(found):
        raise InputError(f"{path!r} is a {type(found).__name__}. Expected a function.")
    return found


def worker_count(backend: str, workers: int | None) -> int:
    """How many items are at work at once. Raises ``InputError`` for an unknown backend or fewer than one worker."""
    if backend not in BACKENDS:
        raise InputError(f'backend={backend!r} was given. Expected "serial", "process" or "ray".')
    if workers is not None and workers < 1:
        raise InputError(f"workers={workers} was given. Expected at least 1, or None for one per core.")
    if backend == "serial":
        return 1
    if backend == "ray":
        ray = installed_ray()
        if workers is None and ray.is_initialized():
            return max(1, int(ray.cluster_resources().get("CPU", 1)))
    return workers or _cores()


def _serial(
    function: Callable[[Any, Any], Any], shared: Any, items: Iterable[Any], threads: int | None
) -> Generator[Outcome, None, None]:
    before = torch.get_num_threads()
    for number, item in enumerate(items):
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            outcome = outcome_of(number, function, shared, item)
        finally:
            torch.set_num_threads(before)
        yield outcome


def outcome_of(number: int, function: Callable[[Any, Any], Any], shared: Any, item: Any) -> Outcome:
    """Do one item here."""
    began = time.perf_counter()
    value, error, trace = None, None, ""
    try:
        value = function(shared, item)
    except Exception as raised:
        error, trace = raised, traceback.format_exc()
    return Outcome(number, value, error, trace, time.perf_counter() - began, peak_memory())


def peak_memory() -> int:
    """The most bytes that this process has held so far; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Pickler(pickle.Pickler):
    """Tensors go without the rest of the storage they are a view of."""

    def reducer_override(self, value: Any) -> Any:
        plain = type(value) is torch.Tensor and value.layout is torch.strided
        if plain and value.untyped_storage().nbytes() > value.numel() * value.element_size():
            return value.clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def packed(value: Any) -> bytes:
    """An item on its way to a worker."""
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def sendable(outcome: Outcome) -> bytes:
    """An outcome on its way back; an error that cannot travel as its text."""
    try:
        data = pickle.dumps(outcome)
        pickle.loads(data)
    except Exception as failed:  # an error with arguments of its own, or a value that is no data
        error = outcome.error or failed
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        data = pickle.dumps(
            Outcome(outcome.number, None, plain, outcome.trace, outcome.seconds, outcome.peak)
        )
    return data


def installed_ray() -> Any:
    """The package. Raises ``InputError`` where it is not installed."""
    try:
        import ray
    except ImportError:
        raise InputError(
            'backend="ray" was given and Ray is not installed. Try: pip install "pullback[ray]", or backend="process".'
        ) from None
    return ray
