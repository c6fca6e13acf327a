"""What ``explain_dataset`` wrote, read from its files when it is asked for."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .core.errors import FormatError, InputError
from .records import Records
from .result import Attribution, chosen_rows, load

__all__ = ["BATCHES", "FORMAT", "MANIFEST", "SCHEMA", "TIMES", "DatasetAttribution", "joined", "shard_name"]

FORMAT, SCHEMA = "pullback.DatasetAttribution", 1
MANIFEST, BATCHES, TIMES = "dataset.json", "batches.jsonl", "times.jsonl"


class DatasetAttribution:
    """The attributions of a data set in a folder, in the order of its batches; read one batch at a time.

    ``len(a)`` counts examples. ``a[i]`` is an Attribution of one, ``a[10:20]``, a list or a tensor of several; these
    have to have one shape. Iterating gives one example after the other, ``batches()`` one file. Each file alone is an
    Attribution, which ``pullback.load`` reads. Of an interrupted run, the batches before the first gap are there and
    ``complete`` is False.

    Args:
        path: the ``out`` of ``explain_dataset``.

    Raises:
        FormatError: the folder holds something else, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.settings: Mapping[str, Any] = self.manifest(self.path)
        records = Records(self.path / BATCHES).read()
        rows: list[int] = []
        while (record := records.get(str(len(rows)))) is not None:
            rows.append(record["rows"])
        self.complete = records.get("end", {}).get("batches") == len(rows)
        self._ends = list(accumulate(rows))
        self._latest: tuple[int, Attribution] | None = None

    @staticmethod
    def manifest(path: Path) -> dict[str, Any]:
        """What all files of a folder have in common: method, model, site, target, version."""
        file = path / MANIFEST
        if not file.is_file():
            raise FormatError(f"{path} has no {MANIFEST}. Expected the out= of explain_dataset.")
        try:
            document = json.loads(file.read_bytes())
            if (document["format"], document["schema"]) != (FORMAT, SCHEMA):
                raise KeyError(f"format {document['format']} {document['schema']}")
            settings: dict[str, Any] = document["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"{file} is damaged, or of another version ({error}). Expected a file of {FORMAT} {SCHEMA}."
            ) from error
        return settings

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __repr__(self) -> str:
        batches = f"{len(self._ends)} batch{'es' * (len(self._ends) != 1)}"
        part = "" if self.complete else ", interrupted"
        return (
            f"<DatasetAttribution of {len(self)} examples in {batches} by {self.settings['method']} in "
            f"{str(self.path)!r}{part}>"
        )

    def __iter__(self) -> Iterator[Attribution]:
        for batch in self.batches():
            yield from batch

    def batches(self) -> Iterator[Attribution]:
        """One file after the other."""
        return (self._batch(number) for number in range(len(self._ends)))

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Attribution:
        """The examples at ``index``, in its order. Raises InputError where their shapes differ."""
        rows: list[int] = chosen_rows(index, len(self)).tolist()
        if not rows:
            raise InputError(f"No examples were asked for. Expected at least one of {len(self)}.")
        places: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(bisect_right(self._ends, row), []).append(place)
        parts, order = [], []
        for number, wanted in sorted(places.items()):
            start = self._ends[number - 1] if number else 0
            parts.append(self._batch(number)[[rows[place] - start for place in wanted]])
            order += wanted
        whole = parts[0] if len(parts) == 1 else joined(parts)
        return whole if order == sorted(order) else whole[torch.tensor(order).argsort()]

    def _batch(self, number: int) -> Attribution:
        if self._latest is None or self._latest[0] != number:
            file = self.path / shard_name(number)
            if not file.exists():
                raise FormatError(
                    f"{file} is missing. Run explain_dataset again with this folder, which makes it anew."
                )
            self._latest = number, load(file)
        return self._latest[1]


def shard_name(number: int) -> str:
    """The file of a batch.

    >>> shard_name(12)
    'batch-000012.safetensors'
    """
    return f"batch-{number:06d}.safetensors"


def joined(parts: Sequence[Attribution]) -> Attribution:
    """Attributions of several batches as one. Raises InputError where their shapes differ.

    What is measured per example is joined; a number that differs becomes one per example; other diagnostics and
    ``meta`` stay where all batches agree, and a note names those that do not.

    >>> one = torch.ones(2, 3)
    >>> a = Attribution(one, one, torch.tensor([0, 1]), one.sum(1), "Gradient()", "input", None, {}, {})
    >>> joined([a, a]).values.shape
    torch.Size([4, 3])
    """
    sizes = [len(part) for part in parts]
    tensors = all(isinstance(part.target, Tensor) for part in parts)
    target = (
        torch.cat([torch.as_tensor(part.target) for part in parts])
        if tensors
        else tuple(label for part in parts for label in part.labels)
    )
    left_out: list[str] = []
    diagnostics = _joined_entries([part.diagnostics for part in parts], sizes, left_out)
    if left_out:
        note = f"diagnostics that differ between batches are left out: {', '.join(left_out)}"
        diagnostics["notes"] = [*diagnostics.get("notes", ()), note]
    return Attribution(
        values=_joined_leaves([part.values for part in parts]),
        point=_joined_leaves([part.point for part in parts]),
        target=target,
        score=torch.cat([part.score for part in parts]),
        method=parts[0].method,
        site=parts[0].site,
        domain=parts[0].domain,
        diagnostics=diagnostics,
        meta=_joined_entries([part.meta for part in parts], sizes, []),
    )


def _joined_leaves(leaves: Sequence[Any]) -> Any:
    if isinstance(leaves[0], Mapping):
        return {name: _joined_leaves([each[name] for each in leaves]) for name in leaves[0]}
    shapes = sorted({tuple(leaf.shape[1:]) for leaf in leaves})
    if len(shapes) > 1:
        raise InputError(
            f"Batches with values of shapes {shapes[0]} and {shapes[1]} were asked for together. Expected one shape; "
            "read them one at a time, with batches()."
        )
    return torch.cat(list(leaves))


def _joined_entries(found: Sequence[Mapping[str, Any]], sizes: Sequence[int], left_out: list[str]) -> Any:
    whole: dict[str, Any] = {}
    for name in dict.fromkeys(name for each in found for name in each):
        entries = [each.get(name) for each in found]
        pairs = list(zip(entries, sizes, strict=True))
        if all(isinstance(entry, Tensor) and entry.ndim and len(entry) == size for entry, size in pairs):
            if len({entry.shape[1:] for entry in entries}) == 1:  # type: ignore[union-attr]
                whole[name] = torch.cat(entries)  # type: ignore[arg-type]
            else:
                left_out.append(name)
        elif all(isinstance(entry, Mapping) for entry in entries):
            whole[name] = _joined_entries(entries, sizes, left_out)  # type: ignore[arg-type]
        elif name in ("labels", "tokens") and all(
            isinstance(entry, list) and len(entry) == size for entry, size in pairs
        ):
            whole[name] = [item for entry in entries for item in entry]  # type: ignore[union-attr]
        elif name == "notes":
            whole[name] = list(dict.fromkeys(note for entry in entries for note in entry or ()))
        elif all(_same(entry, entries[0]) for entry in entries):
            whole[name] = entries[0]
        elif all(isinstance(entry, (bool, int, float)) for entry in entries):
            whole[name] = torch.cat([torch.full((size,), entry) for entry, size in pairs])  # type: ignore[arg-type]
        else:
            left_out.append(name)
    return whole


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)
