"""Where the full data sets are, for tests that want more than the embedded digits."""

from __future__ import annotations

import os
from pathlib import Path


def data_root() -> Path | None:
    """The folder named by PULLBACK_DATA, else ../shared/data next to the repository, else None."""
    named = os.environ.get("PULLBACK_DATA")
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    for folder in (Path(named) if named else None, beside):
        if folder is not None and (folder / "mnist").is_dir():
            return folder
    return None
