"""Tiny Shakespeare: the excerpt is the file's beginning, splits join to the whole, mistakes say where to look."""

from __future__ import annotations

from pathlib import Path

import pytest

from pullback.core.errors import FormatError, InputError
from pullback.datasets import Characters, shakespeare


def test_splits_and_alphabet() -> None:
    whole = shakespeare()
    assert whole.startswith("First Citizen:\nBefore we proceed any further")
    assert shakespeare(split="train") + shakespeare(split="test") == whole
    assert len(shakespeare(split="test")) == int(0.1 * len(whole))
    characters = Characters(whole)
    assert characters.decode(characters.encode(whole)) == whole
    assert characters.encode(characters.alphabet).tolist() == list(range(len(characters)))
    with pytest.raises(InputError, match="'~'"):
        characters.encode("a~b")


def test_a_file_a_folder_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tinyshakespeare" / "input.txt"
    file.parent.mkdir()
    file.write_text("abcdefghij" * 2)
    monkeypatch.setenv("PULLBACK_DATA", str(tmp_path))
    assert shakespeare(file) == shakespeare(tmp_path) == shakespeare(file.parent) == shakespeare("env")
    assert shakespeare(file, split="test") == "ij"
    monkeypatch.delenv("PULLBACK_DATA")
    with pytest.raises(InputError, match="PULLBACK_DATA, which is not set"):
        shakespeare("env")
    with pytest.raises(InputError, match="leave root out for the embedded excerpt"):
        shakespeare(tmp_path / "nowhere")
    with pytest.raises(InputError, match='"train", "test" or "all"'):
        shakespeare(split="valid")  # type: ignore[arg-type]
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(FormatError, match="no UTF-8 text"):
        shakespeare(file)
