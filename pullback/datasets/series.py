"""Real signals: an ECG at four levels of added noise and two pulse waves come with the package, all of them short."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pullback.core.errors import FormatError, InputError
from pullback.datasets.examples import chosen, count
from pullback.datasets.traces import find_file, read_numbers, sha256, trace_at
from pullback.datasets.windowing import cut_windows

__all__ = ["Recording", "Section", "Windows", "ecg5000", "ecg_noise_stress", "ppg"]

Section = Literal["before", "train", "test"]
Recording = Literal["100hz", "timer"]

_ECG_RATE = 360.0
_ECG_SAMPLES = 43_200
_LEVELS = (24, 12, 6, 0)
# Seconds. The noise sets in at 40 s; train and test touch but share no sample, at the same place for all levels,
# because 12, 6 and 0 dB are the same heart beats with the same noise, scaled.
_SECTIONS = {"before": (0.0, 40.0), "train": (45.0, 95.0), "test": (95.0, 120.0)}
_PPG_NAMES = {"100hz": "ppg_100hz", "timer": "ppg_timer_ms"}
# Hz; the second file's timer advances by this many milliseconds per sample.
_PPG_RATES = {"100hz": 100.0, "timer": 1000 / 8.547903193546237}
# Seconds at which the sensor is in place.
_PPG_BEGIN = {"100hz": 0.0, "timer": 55.0}
_ECG5000_CLASSES = (
    "normal",
    "R-on-T premature ventricular contraction",
    "premature ventricular contraction",
    "supraventricular premature or ectopic beat",
    "unclassified beat",
)


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of one or more recordings, with what it takes to speak of them in seconds and Hz.

    ``x`` (n, 1, T) float32 in ``units``; ``y`` (n,) int64 classes, named by ``labels``, or float32 values where
    ``labels`` is empty; ``start`` (n,) float64, where each window begins in its recording, in seconds (NaN: unknown);
    ``sample_rate`` in Hz, None where samples are not evenly spaced in time; ``meta`` the origin. ``windows[3]`` is a
    pair (x, y), ``windows[:100]`` or a mask or index tensor gives ``Windows`` again.

    >>> windows = ecg_noise_stress(seconds=4)
    >>> windows.x.shape, windows.sample_rate, windows.units, windows.labels
    (torch.Size([24, 1, 1440]), 360.0, 'mV', ('24 dB', '0 dB'))
    """

    x: Tensor
    y: Tensor
    start: Tensor
    sample_rate: float | None
    units: str
    labels: tuple[str, ...] = ()
    meta: dict[str, object] = field(default_factory=dict)

    __len__ = count
    __getitem__ = chosen


def ecg_noise_stress(
    root: str | os.PathLike[str] | None = None,
    split: Section = "train",
    *,
    snr: Sequence[int] = (24, 0),
    seconds: float = 4.0,
    step: float | None = None,
    sample_rate: float = _ECG_RATE,
    center: bool = True,
) -> Windows:
    """Windows of one patient's ECG under electrode-motion noise of known strength; y is the index into ``snr``.

    ``snr``: signal-to-noise ratios in dB among 24 (next to clean), 12, 6 and 0. ``split``: "train" is 45 to 95 s of
    each recording, "test" 95 to 120 s, "before" the first 40 s, which are clean at every level because the noise has
    not set in. ``seconds`` and ``step`` of the windows as in ``cut_windows``; ``sample_rate`` in Hz, up to 360.
    ``center=False`` keeps each window's mean, which tells the recordings apart by itself: their offsets differ.
    ``root=None`` reads what comes with the package, a path the folder with 118e24.csv, ..., 118e00.csv.

    Raises ``InputError`` for missing files and settings out of range, ``FormatError`` for damaged files.
    Source: G. B. Moody, W. K. Muldrow, R. G. Mark, A noise stress test for arrhythmia detectors, Computers in
    Cardiology 1984 (MIT-BIH Noise Stress Test Database, record 118; ODC-BY, see ``data/LICENSE-SERIES.md``).

    >>> test = ecg_noise_stress(split="test", sample_rate=120)
    >>> test.x.shape, test.y.bincount().tolist(), float(test.start.min())
    (torch.Size([12, 1, 480]), [6, 6], 95.0)
    """
    if split not in _SECTIONS:
        raise InputError(f'split={split!r} was given. Expected "before", "train" or "test".')
    if not snr or any(level not in _LEVELS for level in snr) or len(set(snr)) < len(snr):
        raise InputError(
            f"snr={tuple(snr)} was given. Expected different ones of {_LEVELS} dB, such as (24, 0)."
        )
    begin, end = _SECTIONS[split]
    x, y, start, digests, source = [], [], [], {}, ""
    for number, level in enumerate(snr):
        name = f"118e{level:02d}"
        trace, source = trace_at(name, root)
        if len(trace) != _ECG_SAMPLES:
            raise FormatError(
                f"{name}.csv in {source} has {len(trace):,} samples. Expected the {_ECG_SAMPLES:,} of two minutes at "
                "360 Hz: where the noise sets in is known for those alone. For other parts of the record use "
                "cut_windows."
            )
        windows, begins = cut_windows(
            trace, _ECG_RATE, seconds, step=step, begin=begin, end=end, resample=sample_rate, center=center
        )
        x.append(windows)
        y.append(torch.full((len(windows),), number))
        start.append(begins)
        digests[name] = sha256(name, trace)
    labels = tuple(f"{level} dB" for level in snr)
    meta: dict[str, object] = {
        "dataset": "MIT-BIH noise stress",
        "split": split,
        "source": source,
        "sha256": digests,
    }
    return Windows(torch.cat(x), torch.cat(y), torch.cat(start), float(sample_rate), "mV", labels, meta)


def ppg(
    root: str | os.PathLike[str] | None = None,
    recording: Recording = "100hz",
    *,
    seconds: float = 8.0,
    step: float | None = None,
    sample_rate: float | None = None,
    center: bool = True,
) -> Windows:
    """Windows of a pulse wave (photoplethysmogram); y is the heart rate in beats per minute, read off the trace.

    ``recording``: "100hz", 25 s of a quiet finger, or "timer", 73 s at 117 Hz with some movement (the first 55 s,
    in which the sensor is put on, are left out). y is 60 over the median interval between the systolic peaks in the
    window, so it is a measurement of the trace itself and not an independent one. Values are those of a 10-bit
    converter. ``root=None`` reads what comes with the package, a path the folder with ppg_100hz.csv and
    ppg_timer_ms.csv; the rest is as in ``ecg_noise_stress``.

    Raises ``InputError`` for missing files, settings out of range and windows with fewer than three beats,
    ``FormatError`` for damaged files.
    Source: P. van Gent et al., HeartPy, Transportation Research Part F 66 (2019), example data (MIT licence, see
    ``data/LICENSE-SERIES.md``).

    >>> windows = ppg(seconds=8)
    >>> windows.x.shape, [round(rate) for rate in windows.y.tolist()]
    (torch.Size([3, 1, 800]), [60, 57, 59])
    """
    if recording not in _PPG_NAMES:
        raise InputError(f'recording={recording!r} was given. Expected "100hz" or "timer".')
    name, rate, begin = _PPG_NAMES[recording], _PPG_RATES[recording], _PPG_BEGIN[recording]
    trace, source = trace_at(name, root)
    x, start = cut_windows(trace, rate, seconds, step=step, begin=begin, resample=sample_rate, center=center)
    peaks = begin + _systolic_peaks(trace[round(begin * rate) :], rate)
    rates = []
    for first in start.tolist():
        inside = peaks[(peaks >= first) & (peaks < first + seconds)]
        if len(inside) < 3:
            raise InputError(
                f"The window from {first:g} s holds {len(inside)} beats. Expected at least three to read a heart rate "
                "from; pass longer seconds=."
            )
        rates.append(60 / float(np.median(np.diff(inside))))
    meta: dict[str, object] = {
        "dataset": "HeartPy pulse wave", "recording": recording, "source": source,
        "sha256": {name: sha256(name, trace)},
    }  # fmt: skip
    y = torch.tensor(rates, dtype=torch.float32)
    return Windows(
        x, y, start, rate if sample_rate is None else float(sample_rate), "converter units", (), meta
    )


def ecg5000(path: str | os.PathLike[str]) -> Windows:
    """The 500 training heart beats of ECG5000, each brought to 140 samples and standard score; y in 0 to 4.

    ``path``: the file ECG5000_TRAIN.arff (rows of 140 values and a label 1 to 5, no header), or its folder. The
    classes are very uneven (292, 177, 10, 19, 2). Beats were stretched to one length, so there is no sampling rate.

    Raises ``InputError`` when the file is not there, ``FormatError`` when it is damaged.
    Source: PhysioNet BIDMC congestive heart failure database, record chf07 (ODC-BY); UCR archive, Y. Chen et al., 2015.

    >>> try:
    ...     ecg5000("nowhere")
    ... except ValueError as error:
    ...     print(str(error)[:35])
    There is no "ECG5000_TRAIN.arff" at
    """
    given = Path(path)
    file = given if given.is_file() else find_file(given, "ECG5000_TRAIN.arff", "ecg5000-train")
    if file is None:
        raise InputError(
            f'There is no "ECG5000_TRAIN.arff" at "{given}". Take it from github.com/reese3222/fda-ecg5000 and pass '
            "the file or its folder."
        )
    rows = read_numbers(file)
    if rows.shape[1] != 141 or not np.isin(rows[:, -1], (1, 2, 3, 4, 5)).all():
        raise FormatError(
            f'"{file}" holds values of shape {rows.shape}. Expected rows of 140 samples and a label from 1 to 5; take '
            "the headerless training file of ECG5000."
        )
    x, y = torch.from_numpy(rows[:, None, :-1]).float(), torch.from_numpy(rows[:, -1]).long() - 1
    start = torch.full((len(x),), torch.nan, dtype=torch.float64)
    meta: dict[str, object] = {"dataset": "ECG5000", "split": "train", "source": str(file)}
    return Windows(x, y, start, None, "standard score", _ECG5000_CLASSES, meta)


def _systolic_peaks(trace: np.ndarray[Any, Any], sample_rate: float) -> np.ndarray[Any, Any]:
    """When the beats are, in seconds: peaks at least 0.4 s apart that stand out by 0.4 of the usual range."""
    from scipy.signal import find_peaks

    low, high = np.percentile(trace, (1, 99))
    peaks, _ = find_peaks(trace, distance=round(0.4 * sample_rate), prominence=0.4 * (high - low))
    return np.asarray(peaks, dtype=np.float64) / sample_rate
