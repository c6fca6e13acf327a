"""Items given to a Ray cluster."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch

from pullback.workers import ATTEMPTS, Outcome, installed_ray, outcome_of, packed, sendable

__all__ = ["each_by_ray"]


def each_by_ray(
    function: Callable[[Any, Any], Any], shared: Any, items: Iterable[Any], workers: int, threads: int
) -> Generator[Outcome, None, None]:
    """As ``pullback.workers.each_outcome``; on a local cluster for the duration where none was joined."""
    import logging
    import sys

    ray = installed_ray()
    own = not ray.is_initialized()
    if own:
        paths = os.pathsep.join(path for path in sys.path if path)
        ray.init(
            num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
        )  # fmt: skip
    flying: dict[Any, int] = {}
    source = enumerate(items)
    try:
        # Ray itself gives the task of a worker that died to another
        task = ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1)(_there)
        kept = ray.put((function, shared))
        exhausted = False
        while flying or not exhausted:
            while len(flying) < workers and not exhausted:
                following = next(source, None)
                if following is None:
                    exhausted = True
                else:
                    flying[task.remote(kept, packed(following), threads)] = following[0]
            if not flying:
                return
            (done, *_), _ = ray.wait(list(flying), num_returns=1)
            number = flying.pop(done)
            try:
                yield pickle.loads(ray.get(done))
            except ray.exceptions.RayError as error:
                yield Outcome(number, error=RuntimeError(f"{type(error).__name__}: {error}"))
    finally:
        for reference in flying:
            ray.cancel(reference, force=True)
        if own:
            ray.shutdown()


def _there(kept: Any, packed: bytes, threads: int) -> bytes:
    torch.set_num_threads(threads)
    function, shared = kept
    number, item = pickle.loads(packed)
    return sendable(outcome_of(number, function, shared, item))
