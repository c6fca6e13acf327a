"""What a training run reports: metrics.csv, timing.csv, TensorBoard, and a progress bar on a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoints import replace_file

__all__ = ["COLUMNS", "Records"]

COLUMNS = (
    "step", "tokens", "loss", "fvu", "auxiliary", "l0", "dead_share", "gradient_norm", "gradient_scale",
    "selection_changed", "beta", "learning_rate",
)  # fmt: skip
_TIMING = ("step", "seconds", "tokens_per_second")


class Records:
    """Writes a row per so many steps, the same bytes for the same run: times are in a file of their own.

    Args:
        directory: of the files; None keeps the rows in memory only.
        steps: of the whole run, for the progress bar.
        start: the step to go on from; rows after it are dropped.
        tensorboard: whether to write events too, if TensorBoard can be imported.

    Attributes:
        rows: all of them, by column.
    """

    def __init__(self, directory: Path | None, steps: int, start: int, tensorboard: bool) -> None:
        self.directory = directory
        self.rows: list[dict[str, float]] = []
        self._began = self._before = time.perf_counter()
        self._tokens: float | None = None
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            lines = _continued(directory / "metrics.csv", COLUMNS, start)
            _continued(directory / "timing.csv", _TIMING, start)
            self.rows = [
                {name: float(cell) for name, cell in zip(COLUMNS, line.split(","), strict=True) if cell}
                for line in lines
            ]
            self._tokens = self.rows[-1]["tokens"] if self.rows else 0.0
        self._events = _events(directory, start) if tensorboard and directory is not None else None
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start, desc="sparse autoencoder", unit="step")

    def step(self) -> None:
        """Move the progress bar by one."""
        if self._bar is not None:
            self._bar.update(1)

    def row(self, values: Mapping[str, float | None]) -> None:
        """Write the values of ``COLUMNS``; None leaves a cell empty."""
        known = {name: float(_cell(value)) for name, value in values.items() if value is not None}
        self.rows.append(known)
        now = time.perf_counter()
        speed = (known["tokens"] - (self._tokens or 0.0)) / max(now - self._before, 1e-9)
        self._before, self._tokens = now, known["tokens"]
        if self.directory is not None:
            _append(self.directory / "metrics.csv", [_cell(known.get(name)) for name in COLUMNS])
            _append(
                self.directory / "timing.csv",
                [_cell(known["step"]), f"{now - self._began:.3f}", f"{speed:.1f}"],
            )
        if self._events is not None:
            for name, value in known.items():
                self._events.add_scalar(name, value, int(known["step"]))
            self._events.add_scalar("tokens_per_second", speed, int(known["step"]))
        if self._bar is not None:
            changed = f", {known['selection_changed']:.1%} changed" if "selection_changed" in known else ""
            self._bar.set_postfix_str(f"FVU {known['fvu']:.3f}, {speed:,.0f} tokens/s{changed}")

    def flush(self) -> None:
        """Rows written so far survive a crash of the machine."""
        for name in ("metrics.csv", "timing.csv") if self.directory is not None else ():
            assert self.directory is not None
            with (self.directory / name).open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """End the progress bar and the events."""
        if self._events is not None:
            self._events.close()
        if self._bar is not None:
            self._bar.close()


def _continued(path: Path, columns: tuple[str, ...], start: int) -> list[str]:
    """The rows of a file up to a step; the file is cut to them, or begun."""
    header = ",".join(columns)
    lines = path.read_text().split("\n") if path.exists() else []
    kept = []
    for line in lines[1:-1]:  # the last piece has no line end: empty, or half a row
        number = line.split(",")[0]
        if line.count(",") == len(columns) - 1 and number.isdigit() and int(number) <= start:
            kept.append(line)
    text = "".join(f"{line}\n" for line in [header, *kept])
    if not path.exists() or path.read_text() != text:
        replace_file(path, text.encode())
    return kept


def _append(path: Path, cells: list[str]) -> None:
    with path.open("a") as file:
        file.write(",".join(cells) + "\n")


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else f"{value:.9g}"


def _events(directory: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
