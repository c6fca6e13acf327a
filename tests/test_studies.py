"""Every study runs in its quick form, prints a table, writes its files and does not measure a finished seed twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# module -> what its quick run leaves in the folder given by --out
STUDIES = {
    "pullbacks": ("seeds.jsonl", "table.csv", "pullbacks.png"),
    "relp_ioi": ("results.jsonl", "correlations.csv", "correlations.png"),
    "steering_images": ("results.jsonl", "table.csv", "table.txt", "steering_images.png"),
    "steering_register": ("results.jsonl", "table.csv", "table.txt", "steering_register.png"),
}


def run(study: str, out: Path) -> str:
    environment = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-m", f"studies.{study}", "--quick", "--out", str(out)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("study", sorted(STUDIES))
def test_study_runs_and_resumes(study: str, tmp_path: Path) -> None:
    """The second run starts from a torn last line, which it measures again; a third one only reads."""
    printed = run(study, tmp_path)
    assert len(printed.splitlines()) > 3
    for name in STUDIES[study]:
        assert (tmp_path / name).stat().st_size > 0, name
    (records,) = tmp_path.glob("*.jsonl")
    lines = records.read_text().splitlines()
    records.write_text("\n".join(lines)[:-40])
    table = {path: path.read_bytes() for path in tmp_path.glob("*.csv")}
    run(study, tmp_path)
    again = records.read_text().splitlines()
    assert again[: len(lines) - 1] == lines[:-1]
    assert len(again) == len(lines) + 1
    assert {path: path.read_bytes() for path in tmp_path.glob("*.csv")} == table
    run(study, tmp_path)
    assert records.read_text().splitlines() == again
