"""Files of ``pullback steer``: pairs, questions and texts, and a saved configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pullback.core.errors import InputError, nearest

__all__ = ["configured", "parse_layers", "read_pairs", "read_questions", "read_texts", "save_configuration"]


def read_pairs(path: Path) -> list[Any]:
    """Pairs from JSON lines with "prompt", "preferred" and "dispreferred"."""
    from pullback.steering import Pair

    return [Pair(*_fields(path, number, line, Pair)) for number, line in _lines(path)]


def read_questions(path: Path) -> list[Any]:
    """Questions from JSON lines with "prompt", "true" and "false" (lists) and perhaps "best"; or pairs."""
    from pullback.steering import Pair, Question

    found: list[Any] = []
    for number, line in _lines(path):
        if "preferred" in line:
            found.append(Pair(*_fields(path, number, line, Pair)))
            continue
        prompt, true, false = _fields(path, number, line, Question)
        found.append(Question(prompt, true, false, line.get("best")))
    return found


def read_texts(path: Path) -> list[str]:
    """One text a line."""
    texts = [line.strip() for line in _text(path).splitlines() if line.strip()]
    if not texts:
        raise InputError(f"{path} is empty; expected one text a line.")
    return texts


def parse_layers(text: str | None) -> Any:
    """Blocks as typed: "2", "-1", "0.5", "4:8", or several with commas; None stays None.

    >>> parse_layers("4:8"), parse_layers("2,-1"), parse_layers("0.5")
    (slice(4, 8, None), [2, -1], [0.5])
    """
    if text is None:
        return None
    try:
        if ":" in text:
            return slice(*(int(part) if part.strip() else None for part in text.split(":")))
        return [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f'--layers is "{text}"; expected blocks such as "4", "4,5", "4:8" or "0.5".'
        ) from None


def configured(
    command: str, given: Mapping[str, Any], config: Path | None, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of a command: what was typed, else what the configuration says, else the defaults.

    Raises InputError for a file that is no configuration, or has options that the command does not.
    """
    saved: dict[str, Any] = {}
    if config is not None:
        document = _document(config)
        saved = document.get(command, {})
        if not isinstance(saved, dict):
            raise InputError(f'{config} has {saved!r} under "{command}"; expected options by name.')
        unknown = sorted(set(saved) - set(given))
        if unknown:
            raise InputError(
                f'{config} has the option "{unknown[0]}" for {command}, which there is not. Nearest: '
                f"{nearest(unknown[0], given)}."
            )
    return {
        name: value
        if value is not None
        else saved[name]
        if saved.get(name) is not None
        else defaults.get(name)
        for name, value in given.items()
    }


def save_configuration(path: Path | None, command: str, options: Mapping[str, Any]) -> None:
    """Write the options under the command's name, beside what the file says of other commands."""
    from pullback.records import write_json

    if path is None:
        return
    document = _document(path) if path.exists() else {}
    plain = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in options.items()
        if value is not None
    }
    write_json(path, {**document, command: plain})


def _document(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}. Write it with --save-config.") from None
    if not isinstance(found, dict):
        raise InputError(
            f'{path} is no configuration; expected {{"fit": {{...}}}}, as --save-config writes it.'
        )
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from None


def _lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    found = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{path}, line {number} is not JSON: {error}. Expected one object a line."
            ) from None
        if not isinstance(value, dict):
            raise InputError(f"{path}, line {number} is {value!r}; expected an object.")
        found.append((number, value))
    if not found:
        raise InputError(f"{path} is empty; expected one JSON object a line.")
    return found


def _fields(path: Path, number: int, line: Mapping[str, Any], kind: type) -> list[Any]:
    names = (
        ("prompt", "preferred", "dispreferred") if kind.__name__ == "Pair" else ("prompt", "true", "false")
    )
    missing = [name for name in names if name not in line]
    if missing:
        raise InputError(
            f'{path}, line {number} has no "{missing[0]}"; expected {", ".join(names)}'
            + ("." if kind.__name__ == "Pair" else ", or prompt, preferred, dispreferred.")
        )
    return [line[name] for name in names]
