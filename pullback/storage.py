"""One file format: named fields as tensors plus one JSON document in a safetensors header. No code."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from pullback.core.errors import FormatError

__all__ = ["read", "write"]

_LONGEST_DOCUMENT = 64 * 2**20  # characters of JSON in a file's header
_DEEPEST_NESTING = 32


def write(path: str | os.PathLike[str], kind: str, schema: int, fields: Mapping[str, Any]) -> None:
    """Write ``fields`` (tensors, numbers, text, None, lists, tuples, dicts) and replace ``path`` at once."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    encoded = {name: _encode(value, tensors, name) for name, value in fields.items()}
    data = save(tensors, {"pullback": json.dumps({"format": kind, "schema": schema, "fields": encoded})})
    final = Path(path)
    temporary = final.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name without the content
        temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], kind: str, schema: int, writer: str) -> dict[str, Any]:
    """The fields of a file of this kind and schema, tensors on the CPU; ``FormatError`` for any other."""
    from safetensors.torch import load

    expected = f"expected a file written by {writer}"
    data = Path(path).read_bytes()
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        text = (header.get("__metadata__") or {}).get("pullback")
    except Exception as error:  # the parser's errors for a damaged file are of many types
        raise FormatError(
            f"{path} is not a safetensors file, or is damaged ({error}); {expected}."
        ) from error
    if text is None:
        raise FormatError(f"{path} is a safetensors file without a pullback document; {expected}.")
    if len(text) > _LONGEST_DOCUMENT:
        raise FormatError(
            f"{path} has a document of {len(text)} characters; the limit is {_LONGEST_DOCUMENT}."
        )
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} has a document that is not JSON ({error}); {expected}.") from error
    if not isinstance(document, dict) or document.get("format") != kind:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise FormatError(f"{path} holds {str(found)[:80]!r}, not {kind!r}; {expected}.")
    if type(document.get("schema")) is not int or document["schema"] != schema:
        raise FormatError(
            f"{path} has schema version {str(document.get('schema'))[:80]}; this pullback reads version "
            f"{schema}. Try: pip install --upgrade pullback"
        )
    try:
        return {name: _decode(value, tensors, 0) for name, value in document["fields"].items()}
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError, AttributeError) as error:
        raise FormatError(f"{path} is damaged ({type(error).__name__}: {error}); {expected}.") from error


def _encode(value: Any, tensors: dict[str, Tensor], where: str, depth: int = 0) -> Any:
    """JSON with tensors moved out: ``{"$tensor": name}``; tuples, odd floats and keys are tagged likewise."""
    if depth > _DEEPEST_NESTING:
        raise FormatError(
            f"{where[:80]}... is nested more than {_DEEPEST_NESTING} deep; flatten it to save it."
        )
    if isinstance(value, Tensor):
        whole = value.detach().cpu().resolve_conj().resolve_neg()
        name = str(len(tensors))
        tensors[name] = (torch.view_as_real(whole) if whole.is_complex() else whole).contiguous().clone()
        return {"$tensor": name, "complex": whole.is_complex()}
    if isinstance(value, numpy.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_encode(item, tensors, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        pairs = {key: _encode(item, tensors, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
        return {"$dict": list(pairs.items())} if any(key.startswith("$") for key in pairs) else pairs
    raise FormatError(
        f"{where} is a {type(value).__name__}, which a file of tensors and JSON cannot hold; expected "
        f"tensors, numbers, text, None, lists, tuples and dicts with text keys. Try str(...) of it."
    )


def _decode(value: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    if depth > 2 * _DEEPEST_NESTING:
        raise FormatError(f"the document is nested more than {2 * _DEEPEST_NESTING} deep")
    if isinstance(value, list):
        return [_decode(item, tensors, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return (
            torch.view_as_complex(tensors[value["$tensor"]])
            if value["complex"]
            else tensors[value["$tensor"]]
        )
    if "$float" in value:
        return float(value["$float"])
    if "$tuple" in value:
        return tuple(_decode(item, tensors, depth + 1) for item in value["$tuple"])
    if "$dict" in value:
        return {str(key): _decode(item, tensors, depth + 1) for key, item in value["$dict"]}
    return {key: _decode(item, tensors, depth + 1) for key, item in value.items()}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"bare {name}")
