"""Where a sweep's results lie: in a folder that crashes and other processes leave whole, or in memory."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pullback.core.errors import FormatError
from pullback.records import Records, locked, write_bytes, write_json

__all__ = ["SweepFolder"]

_FORMAT, _SCHEMA = "pullback.Sweep", 1


class SweepFolder:
    """The files of a sweep; ``content``: its tasks by key."""

    def __init__(self, path: Path | None, content: Mapping[str, Mapping[str, Any]]) -> None:
        self.path, self._content = path, content
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._results = Records(None if path is None else path / "results.jsonl")
        self.times = Records(None if path is None else path / "times.jsonl")
        self.failures = Records(None if path is None else path / "failures.jsonl")
        self._merged()

    @staticmethod
    def contents(path: Path) -> list[dict[str, Any]]:
        """The tasks that ``sweep.json`` lists. Raises ``FormatError`` where it lists none."""
        file = path / "sweep.json"
        if not file.is_file():
            raise FormatError(f"{path} is no sweep: {file.name} is missing. Expected the out= of a Sweep.")
        try:
            document = json.loads(file.read_bytes())
            if (document["format"], document["schema"]) != (_FORMAT, _SCHEMA):
                raise KeyError(f"format {document['format']} {document['schema']}")
            tasks: list[dict[str, Any]] = document["tasks"]
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"{file} is damaged, or of another version ({error}). Expected a file of {_FORMAT} {_SCHEMA}."
            ) from error
        return tasks

    def open(self) -> None:
        """Make the folder, and list the tasks in it."""
        if self.path is None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path / "sweep.json"):
            tasks = self._merged()
            if tasks is not None:
                write_json(self.path / "sweep.json", {"format": _FORMAT, "schema": _SCHEMA, "tasks": tasks})

    def results(self) -> Mapping[str, list[dict[str, Any]]]:
        """The rows of every finished task by key. Raises ``FormatError`` for a result of another task."""
        for key, record in islice(self._results.read().items(), len(self._rows), None):
            expected = self._content.get(key)
            if "rows" not in record or (expected is not None and record.get("task") != expected):
                raise FormatError(
                    f"{self._results.path} has a result of the key {key[:12]}... for {record.get('task')}, not for "
                    f"{expected}: it was changed by hand. Expected a file written by a Sweep; delete that line."
                )
            self._rows[key] = record["rows"]
        return self._rows

    def keep(self, key: str, content: Any, rows: Any, seconds: float, peak: int) -> None:
        """Note a result; the first of a key holds."""
        if self._results.append(key, {"task": content, "rows": rows}):
            self.times.append(key, {"seconds": seconds, "peak": peak})

    def keep_failure(self, key: str, content: Any, error: Exception, trace: str) -> None:
        """Note a failure; a task may fail more than once."""
        before = sum(other.startswith(key) for other in self.failures.read())
        self.failures.append(
            f"{key}/{before + 1}",
            {"task": content, "error": type(error).__name__, "message": str(error), "trace": trace},
        )

    def write_table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """All rows as ``table.csv``, in the order of the tasks."""
        if self.path is None:
            return
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
        write_bytes(self.path / "table.csv", file.getvalue().encode())

    def _merged(self) -> list[Any] | None:
        """The tasks of the folder and these, None if all of these are listed already."""
        if self.path is None:
            return None
        if not (self.path / "sweep.json").exists():
            if (self.path / "results.jsonl").exists():
                raise FormatError(
                    f"{self.path} holds results of something else: there is a results.jsonl without a sweep.json. "
                    "Expected an empty folder, or the out= of this sweep."
                )
            return list(self._content.values())
        listed = self.contents(self.path)
        known, own = ({task["function"] for task in tasks} for tasks in (listed, self._content.values()))
        if not known & own:
            raise FormatError(
                f"{self.path} holds a sweep of {sorted(known)}; these tasks are of {sorted(own)}. Expected its own "
                "folder for every sweep."
            )
        new = [task for task in self._content.values() if task not in listed]
        return [*listed, *new] if new else None


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value
