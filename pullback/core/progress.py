"""Progress of long evaluations: a tqdm bar after one second, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["track"]


@contextmanager
def track(total: int, label: str | None) -> Iterator[Callable[[int], None]]:
    """Report progress through ``advance(count)``; silent off a terminal, without a label, or under one second."""
    if label is None or not sys.stderr.isatty():
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="row", delay=1.0, leave=False) as bar:
        yield lambda count: bar.update(count) and None
