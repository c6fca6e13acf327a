"""The embedded signals are the published ones; windows of different splits share nothing; errors say the way out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pullback.core.errors import FormatError, InputError
from pullback.datasets import cut_windows, ecg5000, ecg_noise_stress, ppg
from pullback.datasets.traces import EMBEDDED_SERIES, SCALES, sha256, trace_at
from tests.data_root import data_root

ROOT = data_root()
needs_data = pytest.mark.skipif(
    ROOT is None, reason="the full data: neither PULLBACK_DATA nor ../shared/data exists"
)


def test_the_embedded_traces_are_the_documented_ones() -> None:
    licence = (EMBEDDED_SERIES.parent / "LICENSE-SERIES.md").read_text()
    assert "ODC-BY 1.0" in licence
    assert "Paul van Gent" in licence
    assert EMBEDDED_SERIES.stat().st_size < 300_000
    for name in SCALES:
        assert f"{name} |" in licence
        assert sha256(name, trace_at(name, None)[0]) in licence


@needs_data
@pytest.mark.parametrize("name", SCALES)
def test_the_embedded_traces_are_the_published_files(name: str) -> None:
    trace, source = trace_at(name, ROOT)
    assert source == str(Path(str(ROOT)) / "heartpy-signals")
    # published in steps of 0.005: equal to the rounding of the decimal text
    np.testing.assert_allclose(trace_at(name, None)[0], trace, rtol=0, atol=1e-12)


@needs_data
def test_the_script_writes_the_embedded_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).parents[2] / "tools" / "embed_series.py"
    specification = importlib.util.spec_from_file_location("embed_series", script)
    assert specification is not None
    assert specification.loader is not None
    embed = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(embed)
    monkeypatch.setattr(embed, "EMBEDDED_SERIES", tmp_path / "series.npz")
    embed.main(Path(str(ROOT)) / "heartpy-signals")
    with np.load(tmp_path / "series.npz") as written, np.load(EMBEDDED_SERIES) as kept:
        assert sorted(written) == sorted(kept) == sorted(SCALES)
        assert all(np.array_equal(written[name], kept[name]) for name in SCALES)


@needs_data
def test_the_same_windows_from_the_package_and_from_a_folder() -> None:
    embedded, full = ecg_noise_stress(sample_rate=120), ecg_noise_stress(ROOT, sample_rate=120)
    assert torch.equal(embedded.x, full.x)
    assert embedded.meta["sha256"] == full.meta["sha256"]
    assert torch.equal(ppg(recording="timer").x, ppg(ROOT, "timer").x)


def test_splits_share_no_sample_and_leave_the_onset_out() -> None:
    reach = {}
    for split in ("before", "train", "test"):
        windows = ecg_noise_stress(split=split, seconds=3, step=0.7)
        first, last = windows.start.min().item(), windows.start.max().item() + 3
        reach[split] = (first, last)
        for label in range(2):  # the same seconds for every class
            assert torch.equal(windows.start[windows.y == label], windows.start[windows.y == 0])
    assert reach["before"][1] <= 40 < 45 <= reach["train"][0]
    assert reach["train"][1] <= 95 <= reach["test"][0]
    assert reach["test"][1] <= 120


@pytest.mark.parametrize("rate", [360.0, 120.0, 100.0])
def test_train_windows_do_not_depend_on_what_comes_later(
    rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = ecg_noise_stress(sample_rate=rate).x
    monkeypatch.setattr(
        "pullback.datasets.series.trace_at",
        lambda name, root: (np.where(np.arange(43_200) < 95 * 360, trace_at(name, root)[0], 1e6), "changed"),
    )
    assert torch.equal(ecg_noise_stress(sample_rate=rate).x, clean)


def test_noise_sets_in_after_forty_seconds_and_grows_with_the_level() -> None:
    """Before: heart beats of half a millivolt, the very same at three levels. After: several times that at 0 dB."""
    levels = (24, 12, 6, 0)
    before, train = ecg_noise_stress(split="before", snr=levels), ecg_noise_stress(snr=levels)
    quiet = torch.stack([before.x[before.y == label].std() for label in range(4)])
    noisy = torch.stack([train.x[train.y == label].std() for label in range(4)])
    assert quiet.max() < 0.55
    torch.testing.assert_close(before.x[before.y == 1], before.x[before.y == 3], rtol=0, atol=2e-6)
    assert (noisy.diff() > 0).all()
    assert noisy[0] < 0.65 < 2 < noisy[3]


def test_only_the_uncentred_mean_gives_the_recording_away() -> None:
    raw, centred = ecg_noise_stress(center=False), ecg_noise_stress()
    mean = raw.x.mean(-1)[:, 0]
    assert mean[raw.y == 0].min() > mean[raw.y == 1].max() + 1
    assert centred.x.mean(-1).abs().max() < 1e-5
    torch.testing.assert_close(raw.x - raw.x.mean(-1, keepdim=True), centred.x, rtol=0, atol=2e-5)


def test_windows_are_slices_of_the_trace() -> None:
    windows = ecg_noise_stress(split="test", snr=(6, 24), seconds=2, step=0.5, center=False)
    for number in (0, 5, len(windows) - 1):
        trace = trace_at("118e06" if windows.y[number] == 0 else "118e24", None)[0]
        first = round(windows.start[number].item() * 360)
        expected = torch.from_numpy(trace[first : first + 720]).float()
        assert torch.equal(windows.x[number, 0], expected)


def test_resampling_keeps_a_sinusoid_and_removes_what_would_alias() -> None:
    time = np.arange(3600) / 360
    low, high = 50 + np.sin(2 * np.pi * 3 * time), np.sin(2 * np.pi * 70 * time)
    x, start = cut_windows(low + high, 360, 2, begin=2, end=8, resample=100, center=False)
    moments = start[:, None] + torch.arange(200) / 100
    expected = 50 + (2 * torch.pi * 3 * moments).sin()
    # the Kaiser filter passes 3 Hz to a part in a hundred and stops 70 Hz; outer half seconds see the section's end
    torch.testing.assert_close(x[1, 0].double(), expected[1], rtol=0, atol=0.01)
    torch.testing.assert_close(x[:, 0, 50:-50].double(), expected[:, 50:-50], rtol=0, atol=0.01)
    assert (x - 50).abs().max() < 2.1  # no ringing by the offset at the ends


def test_heart_rates_are_those_of_the_trace() -> None:
    """Against autocorrelation, which knows nothing of peaks: the same rate to two beats a minute."""
    windows = ppg(recording="100hz", seconds=8, step=4)
    for (row,), rate in zip(windows.x.double(), windows.y, strict=True):
        spectrum = torch.fft.rfft(row, n=2 * len(row)).abs().square()
        similarity = torch.fft.irfft(spectrum)[: len(row)] / torch.arange(len(row), 0, -1)
        lag = 60 + int(similarity[60:150].argmax())  # 0.6 to 1.5 s
        assert abs(60 * 100 / lag - float(rate)) < 2


def test_windows_behave_like_the_other_data_sets() -> None:
    windows = ecg_noise_stress(snr=(24, 6))
    some = windows[windows.y == 1]
    assert len(some) == 12
    assert some.sample_rate == 360
    assert torch.equal(some.start, windows.start[windows.y == 1])
    x, y = next(iter(DataLoader(windows, batch_size=5)))
    assert x.shape == (5, 1, 1440)
    assert y.tolist() == [0] * 5


@needs_data
def test_ecg5000() -> None:
    beats = ecg5000(str(ROOT))
    assert beats.x.shape == (500, 1, 140)
    assert beats.y.bincount().tolist() == [292, 177, 10, 19, 2]
    assert len(beats.labels) == 5
    assert beats.sample_rate is None
    assert beats.start.isnan().all()
    # standard score: each beat of mean 0 and variance 1
    assert beats.x.mean(-1).abs().max() < 1e-5
    assert (beats.x.std(-1) - 1).abs().max() < 1e-3
    assert torch.equal(ecg5000(Path(str(ROOT)) / "ecg5000-train" / "ECG5000_TRAIN.arff").x, beats.x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ecg_noise_stress("nowhere"), r"no 118e24.csv in .nowhere.*heartrate_analysis_python.*leave root out"),
        (lambda: ppg("nowhere", "timer"), r"no ppg_timer_ms.csv .*data2.csv, saved as ppg_timer_ms.csv"),
        (lambda: ecg5000("nowhere"), r"fda-ecg5000"),
        (lambda: ecg_noise_stress(split="all"), r'"before", "train" or "test"'),
        (lambda: ecg_noise_stress(snr=(24, 18)), r"snr=\(24, 18\) was given. Expected different ones of \(24, 12, 6, 0\)"),
        (lambda: ecg_noise_stress(snr=(24, 24)), r"different ones"),
        (lambda: ecg_noise_stress(sample_rate=500), r"500 Hz was asked for, but the trace has 360 Hz"),
        (lambda: ecg_noise_stress(sample_rate=0), r"resample=0 was given. Expected a positive number"),
        (lambda: ecg_noise_stress(sample_rate=float("nan")), r"resample=nan"),
        (lambda: ecg_noise_stress(seconds=51), r"51 s were asked for in a section of 50 s"),
        (lambda: ecg_noise_stress(seconds=-1), r"seconds=-1"),
        (lambda: ppg(recording="finger"), r'Expected "100hz" or "timer"'),
        (lambda: ppg(seconds=2), r"holds . beats. Expected at least three"),
        (lambda: cut_windows(torch.zeros(2, 9), 1, 3), r"shape \(2, 9\).*each channel"),
        (lambda: cut_windows([0.0, float("nan")], 1, 1), r"with NaN or infinity"),
        (lambda: cut_windows(torch.zeros(9), 1, 3, begin=5, end=11), r"ends at 9 s"),
        (lambda: cut_windows(torch.zeros(9000), 1000, 3, resample=0.01), r"ratio of integers"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1.0\n2.0\n", "has 2 samples. Expected the 43,200"),
        ("1.0\ntext\n", "is damaged"),
        ("1.0\nnan\n", "NaN or infinite"),
        ("", "no numbers"),
    ],
)
def test_damaged_files(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "118e24.csv").write_text(content)
    with pytest.raises(FormatError, match=message):
        ecg_noise_stress(tmp_path)


def test_damaged_ecg5000(tmp_path: Path) -> None:
    (tmp_path / "ECG5000_TRAIN.arff").write_text("1,2,3\n")
    with pytest.raises(FormatError, match=r"shape \(1, 3\). Expected rows of 140 samples"):
        ecg5000(tmp_path)
