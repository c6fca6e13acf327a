"""Work that is killed at a moment: what a crash, the out-of-memory killer or a power button leaves behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

__all__ = ["kill_after", "needs_fork", "started"]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")


def kill_after(seconds: float, work: Callable[[], Any], begun: Callable[[], bool] = lambda: True) -> bool:
    """Do it in a forked process and kill -9 that; whether it was killed before it had finished.

    The seconds count from the moment when ``begun``, so that a busy machine changes nothing.
    """
    pid = started(work)
    patience = time.monotonic() + 60
    while not begun() and time.monotonic() < patience:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.WIFSIGNALED(status)
        time.sleep(0.0005)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def started(work: Callable[[], Any]) -> int:
    """The id of a forked process that does it; its exit code is 0 if it did not raise."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        # the threads of torch do not survive a fork
        torch.set_num_threads(1)
        work()
        code = 0
    finally:
        os._exit(code)
