"""Attributions of a whole data set: batch by batch into files, resumable, in this process or in several."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .api import as_method, explain
from .core.errors import FormatError, InputError, TaskError
from .core.inputs import nested_tensors
from .core.progress import track
from .dataset_result import BATCHES, FORMAT, MANIFEST, SCHEMA, TIMES, DatasetAttribution, shard_name
from .fingerprints import fingerprint, model_fingerprint
from .records import Records, canonical, locked, write_json
from .version import __version__
from .workers import Backend, each_outcome, worker_count

__all__ = ["explain_dataset"]

_END = "end"


def explain_dataset(
    model: Callable[..., Any],
    loader: Iterable[Any],
    method: Any = "auto",
    *,
    out: str | os.PathLike[str],
    resume: bool = True,
    backend: Backend = "serial",
    workers: int | None = None,
    threads: int | None = None,
    target: Any = None,
    inputs_of: Callable[[Any], Any] | None = None,
    target_of: Callable[[Any], Any] | None = None,
    site: str | None = None,
    baseline: Any = None,
    chunk: int | str = "auto",
    memory_budget: int | float | str | None = None,
    seed: int | None = None,
    allow_train: bool = False,
    progress: bool = True,
) -> DatasetAttribution:
    """Explain every batch of a loader into a folder, a file for each; what is there already is not done again.

    File i is ``explain(model, batch i, ...)``, whatever the backend and however often the run was interrupted; times
    are kept apart. No more batches live at once than workers work on. Several processes may write to one folder.

    Args:
        loader: batches in the same order each time (``shuffle=False``): what ``explain`` takes as inputs, or the list
            [x (B, ...), labels (B,)] that a DataLoader makes of pairs, whose labels are left out.
        out: the folder, made where it is missing.
        resume: go on from the batches that are there; False expects none.
        backend, workers, threads: as in ``pullback.workers.each_outcome``: "serial", "process" or "ray".
        inputs_of, target_of: batch -> inputs, batch -> target, where the batch says more. They run in this process.
        model, method, target, site, baseline, chunk, memory_budget, seed, allow_train: as in ``explain``; one target
            for all batches.
        progress: a bar on a terminal.

    Returns:
        a DatasetAttribution, which reads the files when it is asked.

    Raises:
        FormatError: the folder is of another run, or its batches are not those of the loader. InputError: an unknown
        backend, a batch of no known form, no batches. TaskError: a batch failed; those before it are kept.

    Cost: that of ``explain`` for each batch; a second run reads the batches and computes their hashes.

    Example:
        >>> import tempfile
        >>> net, x = torch.nn.Linear(4, 2), torch.rand(6, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(len(explain_dataset(net, x.split(2), "gradient", out=folder)))
        6
    """
    worker_count(backend, workers)
    chosen = as_method(method, baseline=baseline, seed=seed)
    folder = Path(out)
    settings = {
        "method": _text(chosen),
        "model": model_fingerprint(_module(model)),
        "site": site,
        "target": "of each batch" if target_of is not None else _text(target),
        "allow_train": allow_train,
        "version": __version__,
    }
    batches = _opened(folder, settings, resume)
    times = Records(folder / TIMES)
    options = {
        "site": site,
        "chunk": chunk,
        "memory_budget": memory_budget,
        "allow_train": allow_train,
    }
    counted = 0
    given: list[int] = []

    def missing() -> Iterator[tuple[int, Any, Any, str]]:
        nonlocal counted
        for number, batch in enumerate(loader):
            inputs = _inputs(batch) if inputs_of is None else inputs_of(batch)
            asked = target if target_of is None else target_of(batch)
            content = _content(inputs, None if target_of is None else asked)
            counted = number + 1
            if not _there(batches, folder, number, content):
                given.append(number)
                yield number, inputs, asked, content

    shared = model, chosen, options, folder
    total = len(loader) if isinstance(loader, Sized) else 0
    # a DataLoader draws a seed for its workers from the global generator
    with torch.random.fork_rng(devices=[]), track(total, "batches" if progress else None) as advance:
        outcomes = each_outcome(_done, shared, missing(), backend=backend, workers=workers, threads=threads)
        shown = 0
        with contextlib.closing(outcomes):
            for outcome in outcomes:
                if outcome.error is not None:
                    raise TaskError(
                        f"Batch {given[outcome.number]} failed ({type(outcome.error).__name__}: {outcome.error}). The "
                        f"{len(batches.read())} finished ones are kept in {folder}; run again to go on from them."
                    ) from outcome.error
                number, record = outcome.value
                batches.append(str(number), record)
                times.append(str(number), {"seconds": outcome.seconds, "peak": outcome.peak})
                advance(counted - shown)
                shown = counted
        advance(counted - shown)
    _ended(batches, folder, counted)
    return DatasetAttribution(folder)


def _done(shared: tuple[Any, Any, dict[str, Any], Path], item: tuple[int, Any, Any, str]) -> Any:
    """Explain one batch into its file; the number of the batch, and its record."""
    model, method, options, folder = shared
    number, inputs, target, content = item
    found = explain(model, inputs, target=target, method=method, **options)
    # how long it took and in which chunks is no part of the result, which is the same in every run
    meta = {name: value for name, value in found.meta.items() if name not in ("seconds", "chunk")}
    replace(found, meta=meta).save(folder / shard_name(number))
    return number, {"rows": len(found), "content": content}


def _opened(folder: Path, settings: Mapping[str, Any], resume: bool) -> Records:
    """The records of the folder's batches. Raises FormatError where it is of another run, or not empty and asked to."""
    folder.mkdir(parents=True, exist_ok=True)
    batches = Records(folder / BATCHES)
    manifest = folder / MANIFEST
    with locked(manifest):
        if manifest.exists():
            before = DatasetAttribution.manifest(folder)
            changed = [name for name in settings if before.get(name) != settings[name]]
            if changed:
                name = changed[0]
                raise FormatError(
                    f"{folder} holds attributions whose {name} is {before.get(name)!r}; {settings[name]!r} was given. "
                    "Expected the same for all batches of a folder; give another out=."
                )
        elif batches.read():
            raise FormatError(
                f"{folder} holds a {BATCHES} without a {MANIFEST}: it is of something else. Expected an empty folder."
            )
        else:
            write_json(manifest, {"format": FORMAT, "schema": SCHEMA, "settings": dict(settings)})
    if not resume and batches.read():
        raise FormatError(
            f"{folder} holds {len(batches.read())} batches of this run and resume=False was given. Expected none; "
            "resume=True goes on from them, and another folder starts anew."
        )
    return batches


def _there(batches: Records, folder: Path, number: int, content: str) -> bool:
    """Whether a batch is done. Raises FormatError where the folder holds another batch of this number."""
    records = batches.read()
    record = records.get(str(number))
    if record is None:
        if _END in records:
            raise FormatError(
                f"The loader has more batches than {folder}, which is finished with {records[_END]['batches']}. "
                "Expected the same batches each time; give another out= for more."
            )
        return False
    if record.get("content") != content:
        raise FormatError(
            f"Batch {number} of the loader is not the batch {number} that {folder} holds. Expected the same batches in "
            "the same order each time: a loader with shuffle=False and the same batch size; or give another out=."
        )
    return (folder / shard_name(number)).exists()


def _ended(batches: Records, folder: Path, count: int) -> None:
    if not count:
        raise InputError("The loader has no batches. Expected at least one.")
    records = batches.read()
    held = max((int(key) + 1 for key in records if key != _END), default=0)
    if held > count:
        raise FormatError(
            f"The loader has {count} batches, and {folder} holds {held}. Expected the same batches each time; give "
            "another out= for fewer."
        )
    batches.append(_END, {"batches": count})


def _inputs(batch: Any) -> Any:
    """What ``explain`` takes, of a batch as loaders give it. Raises InputError."""
    if not isinstance(batch, list) or not any(isinstance(part, Tensor) for part in batch):
        return batch
    first, *others = batch
    if not others:
        return first
    labels = others[0]
    plain = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
    if len(others) == 1 and isinstance(first, Tensor) and plain and len(labels) == len(first):
        return first
    raise InputError(
        f"A batch is a list of {len(batch)}. Expected inputs as explain takes them, or [x (B, ...), labels (B,)]. Say "
        "what the model takes: inputs_of=lambda batch: (batch[0], batch[1])."
    )


def _content(inputs: Any, target: Any) -> str:
    """SHA-256 of all that a batch holds: tensors by their bytes, text and numbers as JSON, pictures as arrays."""
    digest = sha256(fingerprint(inputs, target).encode())
    for leaf in _other_leaves((inputs, target)):
        digest.update(leaf)
    return digest.hexdigest()


def _other_leaves(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        return
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield f"{name}:".encode()
            yield from _other_leaves(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _other_leaves(part)
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield (value if isinstance(value, str) else repr(value)).encode()
    elif hasattr(value, "__array_interface__"):
        import numpy

        yield numpy.ascontiguousarray(value).tobytes()
    else:
        yield str(_text(value)).encode()


def _text(value: Any) -> str | None:
    """A setting as text that is the same in every process."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return canonical(value)
    tensors = list(nested_tensors(value))
    if tensors:
        return f"{type(value).__name__} {fingerprint(value)[:16]}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _module(model: Callable[..., Any]) -> Callable[..., Any]:
    """The network inside a transformers pipeline; any other model is itself."""
    inner = getattr(model, "model", None)
    return model if isinstance(model, nn.Module) or not isinstance(inner, nn.Module) else inner
