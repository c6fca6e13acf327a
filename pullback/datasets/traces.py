"""Single traces: the embedded ones, and those in text files with one number per line."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from pullback.core.errors import FormatError, InputError

__all__ = ["EMBEDDED_SERIES", "SCALES", "find_file", "read_numbers", "read_trace", "sha256", "trace_at"]

EMBEDDED_SERIES = Path(__file__).parent / "data" / "series.npz"
"""First differences, int16, of the embedded traces: the file that tools/embed_series.py writes."""

SCALES = {
    # the converter's 200 units per millivolt
    **dict.fromkeys(("118e24", "118e12", "118e06", "118e00"), 200.0),
    **dict.fromkeys(("ppg_100hz", "ppg_timer_ms"), 1.0),
}
"""What makes whole numbers of the published values, by the name of the trace."""

_REPOSITORY = "github.com/paulvangentcom/heartrate_analysis_python"
_PUBLISHED = {
    **{name: f"examples/5_noisy_ECG/{name}.csv" for name in ("118e24", "118e12", "118e06")},
    "118e00": "examples/noisy_ECG/118e00.csv (older commits)",
    "ppg_100hz": "data.csv, saved as ppg_100hz.csv",
    "ppg_timer_ms": "data2.csv, saved as ppg_timer_ms.csv",
}


def trace_at(name: str, root: str | os.PathLike[str] | None) -> tuple[np.ndarray[Any, Any], str]:
    """A trace (T,) float64 in published units and where it came from: "embedded" or the folder.

    ``root``: None for the embedded trace, or a folder that holds it, directly or in ``heartpy-signals/``.

    Raises ``InputError`` when it is not there, ``FormatError`` when the file is damaged.

    >>> trace, source = trace_at("ppg_100hz", None)
    >>> trace.shape, source, trace[:3].tolist()
    ((2483,), 'embedded', [530.0, 518.0, 506.0])
    """
    if root is None:
        with np.load(EMBEDDED_SERIES, allow_pickle=False) as file:
            return np.cumsum(file[name], dtype=np.int64) / SCALES[name], "embedded"
    path = find_file(root, f"{name}.csv", "heartpy-signals")
    if path is None:
        raise InputError(
            f'There is no {name}.csv in "{root}" or its heartpy-signals/. Take it from {_REPOSITORY}, '
            f"{_PUBLISHED[name]}, or leave root out for the embedded copy."
        )
    return read_trace(path), str(path.parent)


def find_file(root: str | os.PathLike[str], name: str, subfolder: str) -> Path | None:
    """The file of that name in a folder or in a subfolder of it; None where it is not."""
    return next((path for path in (Path(root) / name, Path(root) / subfolder / name) if path.is_file()), None)


def read_trace(path: Path) -> np.ndarray[Any, Any]:
    """The samples (T,) float64 of a file with one per line, or in the last column below a header.

    Raises ``FormatError`` for anything else.
    """
    with path.open(encoding="utf-8", errors="replace") as lines:
        header = int("," in lines.readline())
    return read_numbers(path, header)[:, -1]


def read_numbers(path: Path, header: int = 0) -> np.ndarray[Any, Any]:
    """The rows (n, columns) float64 of a text file of numbers, after ``header`` lines.

    Raises ``FormatError`` when it holds anything but equally long rows of finite numbers.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty file is an error below, not a warning
            values = np.loadtxt(path, delimiter=",", skiprows=header, ndmin=2, encoding="utf-8")
    except ValueError as error:
        raise FormatError(
            f'"{path}" is damaged: {error}. Expected rows of numbers; fetch it again.'
        ) from None
    if values.size == 0 or not np.isfinite(values).all():
        found = "no numbers" if values.size == 0 else "NaN or infinite values"
        raise FormatError(f'"{path}" holds {found}. Expected rows of finite numbers; fetch it again.')
    return values


def sha256(name: str, trace: np.ndarray[Any, Any]) -> str:
    """The digest of a trace as little-endian int16 in converter units, as data/LICENSE-SERIES.md lists it."""
    return hashlib.sha256(np.round(trace * SCALES[name]).astype("<i2").tobytes()).hexdigest()
