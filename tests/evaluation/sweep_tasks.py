"""Tasks for tests of sweeps, by import path; each call leaves a line in the file ``log``, where one is given."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pullback.evaluation import cached


def square(value: int, log: str | None = None, sleep: float = 0.0) -> dict[str, Any]:
    """One row."""
    noted(log, value)
    time.sleep(sleep)
    return {"value": value, "square": value * value, "root": value**0.5}


def powers(value: int) -> list[dict[str, Any]]:
    """Several rows, one of them with a number that JSON has no word for."""
    return [{"value": value, "power": n, "result": value**n, "log": float("nan")} for n in (1, 2)]


def inverse(value: int, log: str | None = None) -> dict[str, Any]:
    """Fails at zero."""
    noted(log, value)
    return {"value": value, "inverse": 1 / value}


def mended(value: int, flag: str) -> dict[str, Any]:
    """Fails until the file ``flag`` is there."""
    if not Path(flag).exists():
        raise OSError("not yet")
    return {"value": value}


def deadly(value: int, once: str | None = None) -> dict[str, Any]:
    """Kills its process: always, or the first time only."""
    if value == 1 and (once is None or not Path(once).exists()):
        if once is not None:
            Path(once).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"value": value}


def no_row(value: int) -> Any:
    """Gives a tensor, which is no row."""
    return torch.ones(value)


def total_of_cached(value: int, metric: str, log: str) -> dict[str, Any]:
    """A measure of tensors that all metrics share."""

    def compute() -> dict[str, Tensor]:
        noted(log, value)
        return {"values": torch.full((3,), float(value))}

    values = cached({"value": value}, compute)["values"]
    return {"value": value, metric: float(getattr(values, metric)())}


def noted(log: str | None, value: int) -> None:
    if log is not None:
        with open(log, "a") as file:
            file.write(f"{value}\n")
