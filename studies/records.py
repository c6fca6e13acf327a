"""Records of finished work, one JSON line each, by a key: appended, never rewritten, a torn last line survived."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["append", "finished"]


def finished(file: Path) -> dict[str, dict[str, Any]]:
    """Records by key; a last line that was torn by a crash is ignored."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[record["key"]] = record
    return found


def append(file: Path, record: dict[str, Any]) -> None:
    """Add one line, on disk when this returns; a torn line before it is ended first."""
    torn = file.exists() and not file.read_bytes().endswith(b"\n") and file.stat().st_size > 0
    with file.open("a", encoding="utf-8") as stream:
        stream.write(("\n" if torn else "") + json.dumps(record, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
