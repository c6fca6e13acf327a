"""Items given to spawned processes, one at a time each; the item of a process that dies goes to another."""

from __future__ import annotations

import contextlib
import pickle
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, cast

import torch

from pullback.core.errors import InputError
from pullback.workers import ATTEMPTS, Outcome, outcome_of, packed, sendable

__all__ = ["each_by_processes"]


def each_by_processes(
    function: Callable[[Any, Any], Any], shared: Any, items: Iterable[Any], workers: int, threads: int
) -> Generator[Outcome, None, None]:
    """As ``pullback.workers.each_outcome``."""
    from multiprocessing.connection import Connection, wait

    try:
        payload = pickle.dumps((function, shared))
    except Exception as error:
        raise InputError(
            f"This cannot be sent to another process: {error}. Expected functions and classes that are defined in a "
            'module rather than inside another function. Define it there, or use backend="serial" or "ray".'
        ) from error
    source = enumerate(items)
    again: deque[tuple[int, Any, int]] = deque()
    exhausted = False
    pool: dict[Connection, _Worker] = {}
    try:
        while True:
            idle = [worker for worker in pool.values() if worker.work is None]
            while not exhausted or again:
                if not idle and len(pool) >= workers:
                    break
                if again:
                    work = again.popleft()
                else:
                    following = next(source, None)
                    if following is None:
                        exhausted = True
                        break
                    work = (*following, 0)
                worker = idle.pop() if idle else _Worker.started(payload, threads)
                pool[worker.connection] = worker
                worker.give(work)
            if all(worker.work is None for worker in pool.values()):
                return
            for ready in wait([each.connection for each in pool.values() if each.work is not None]):
                worker = pool[cast(Connection, ready)]
                outcome = worker.received()
                if outcome is not None:
                    yield outcome
                elif worker.work is not None and worker.died:
                    del pool[worker.connection]
                    worker.connection.close()
                    number, item, attempts = worker.work
                    if attempts + 1 < ATTEMPTS:
                        again.append((number, item, attempts + 1))
                    else:
                        yield Outcome(number, error=_death(worker.process.exitcode))
    finally:
        for worker in pool.values():
            worker.end()


class _Worker:
    """A spawned process that does one item at a time."""

    def __init__(self, process: Any, connection: Any) -> None:
        self.process, self.connection = process, connection
        self.work: tuple[int, Any, int] | None = None
        self.ready = self.died = False

    @classmethod
    def started(cls, payload: bytes, threads: int) -> _Worker:
        import multiprocessing

        # spawned, not forked: a fork of a process with torch's threads can hang
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, payload, threads))
        process.start()
        theirs.close()
        return cls(process, ours)

    def give(self, work: tuple[int, Any, int]) -> None:
        self.work = work
        number, item, _ = work
        try:
            data = packed((number, item))
        except Exception as error:
            raise InputError(
                f"Item {number} cannot be sent to another process: {error}. Use backend='serial'."
            ) from error
        with contextlib.suppress(OSError):  # it is dead, which is noticed when its answer is awaited
            self.connection.send_bytes(data)

    def received(self) -> Outcome | None:
        """The outcome that has arrived; None after other news."""
        try:
            news = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self.process.join()
            self.died = True
            if not self.ready and (self.process.exitcode or 0) >= 0:
                raise InputError(
                    f"A worker process ended before its first task (exit code {self.process.exitcode}); what it wrote "
                    'is above. A script that uses backend="process" has to do so under if __name__ == "__main__":.'
                ) from None
            return None
        if news == "ready":
            self.ready = True
            return None
        if isinstance(news, str):
            raise InputError(news)
        self.work = None
        return cast(Outcome, news)

    def end(self) -> None:
        """Let it go; kill it if it is at work."""
        self.connection.close()
        if self.work is None:
            self.process.join(5)
        self.process.kill()
        self.process.join()


def _death(code: int | None) -> RuntimeError:
    why = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
    return RuntimeError(
        f"its worker process {why}, {ATTEMPTS} times; out of memory is the usual cause; fewer workers need less."
    )


def _serve(connection: Any, payload: bytes, threads: int) -> None:
    """The life of a worker process."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and ends its workers
    torch.set_num_threads(threads)
    try:
        function, shared = pickle.loads(payload)
    except Exception as error:
        refusal = (
            f"A worker process cannot load what it is to do: {type(error).__name__}: {error}. Expected functions and "
            'classes of modules that it can import. Use backend="serial", or move them to such a module.'
        )
        connection.send_bytes(pickle.dumps(refusal))
        return
    connection.send_bytes(pickle.dumps("ready"))
    while True:
        try:
            number, item = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        outcome = outcome_of(number, function, shared, item)
        try:
            connection.send_bytes(sendable(outcome))
        except OSError:
            return  # the parent is gone
