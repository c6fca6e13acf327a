"""A run's batches of tokens: read again from any place, in the same order, and shared among processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from pullback.core.errors import InputError
from pullback.core.noise import generator
from pullback.core.posed import kept_random_state

__all__ = ["TokenBatches"]


class TokenBatches:
    """Batches one after another, pass after pass, from a source that can be read again.

    The global random state is seeded by seed, pass and number while the source is read, and put back, so that a
    DataLoader with ``shuffle=True`` gives the same order again and nothing of the caller's is drawn.

    Args:
        source: a list, a DataLoader, or anything else whose ``iter`` starts over; with ``skip(n)``, which returns an
            iterable without the first n, a resumed run does not read those again.
        process, processes: this process takes every ``processes``-th batch.

    Attributes:
        epoch, number: the pass and the number within it of the next batch that any process takes.

    Raises InputError for a generator, and for a source without batches.

    >>> batches = TokenBatches(["a", "b"])
    >>> [next(batches) for _ in range(3)]
    ['a', 'b', 'a']
    """

    def __init__(self, source: Iterable[Any], seed: int = 0, process: int = 0, processes: int = 1) -> None:
        if not hasattr(source, "__iter__") or hasattr(source, "__next__"):
            raise InputError(
                f"token_batches is a {type(source).__name__}, which can be read only once; expected a list, a "
                "DataLoader, or another iterable that starts over, so that a run can go on. Try list(token_batches)."
            )
        self.source = source
        self.seed = seed
        self.process, self.processes = process, processes
        self.epoch = self.number = 0
        self._reading: Iterator[Any] | None = None
        self._next = 0  # number of what _reading gives next

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        wanted = self.number + self.process
        while True:
            try:
                if self._reading is None:
                    self._open()
                for _ in range(wanted - self._next):
                    self._read()
                found = self._read()
            except StopIteration:
                if self.number == 0:
                    raise InputError(
                        f"token_batches has {self._next} batches; expected at least one for each of the "
                        f"{self.processes} processes."
                    ) from None
                self.epoch, self.number, self._reading, wanted = self.epoch + 1, 0, None, self.process
                continue
            self.number += self.processes
            return found

    def seek(self, epoch: int, number: int) -> None:
        """Continue from this place, as ``epoch`` and ``number`` said."""
        self.epoch, self.number, self._reading = epoch, number, None

    def _open(self) -> None:
        with self._seeded("open", 0):
            skip = getattr(self.source, "skip", None)
            if callable(skip) and self.number:
                self._reading, self._next = iter(skip(self.number)), self.number
            elif isinstance(self.source, list | tuple):
                self._reading, self._next = islice(self.source, self.number, None), self.number
            else:
                self._reading, self._next = iter(self.source), 0

    def _read(self) -> Any:
        assert self._reading is not None
        with self._seeded("read", self._next):
            found = next(self._reading)
        self._next += 1
        return found

    def _seeded(self, purpose: str, number: int) -> Any:
        if isinstance(self.source, list | tuple):
            return torch.no_grad()  # nothing is drawn: spare the copies of the random state
        return kept_random_state(generator(self.seed, number, f"{purpose}/{self.epoch}").initial_seed())
