"""Write pullback/datasets/data/series.npz, the embedded traces, from the published text files.

python tools/embed_series.py FOLDER, with FOLDER holding the .csv files that pullback.datasets.traces names.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from pullback.datasets.traces import EMBEDDED_SERIES, SCALES, read_trace


def main(folder: Path) -> None:
    """Whole numbers, as differences because they compress to a quarter less; nothing is rounded away."""
    traces = {}
    for name, scale in SCALES.items():
        units = read_trace(folder / f"{name}.csv") * scale
        whole = np.round(units).astype(np.int64)
        assert np.abs(whole - units).max() < 1e-6, name
        differences = np.diff(whole, prepend=0)
        assert np.abs(differences).max() < 2**15, name
        traces[name] = differences.astype("<i2")
    np.savez_compressed(EMBEDDED_SERIES, allow_pickle=False, **traces)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
