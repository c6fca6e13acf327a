"""Tiny Shakespeare, a text for small character models: an embedded excerpt, or the full file from a path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pullback.core.errors import FormatError, InputError

__all__ = ["Characters", "shakespeare"]

EXCERPT = Path(__file__).parent / "data" / "shakespeare-excerpt.txt"
_PLACES = ("tinyshakespeare/input.txt", "input.txt")
_TEST_SHARE = 0.1


def shakespeare(
    root: str | os.PathLike[str] | None = None, split: Literal["train", "test", "all"] = "all"
) -> str:
    """Lines from Shakespeare's plays: about 60,000 embedded characters, or the full 1.1 million from a file.

    Args:
        root: None for the embedded excerpt; the file ``input.txt``, a folder with it or with
            ``tinyshakespeare/input.txt``; "env" for the folder that the environment variable ``PULLBACK_DATA`` names.
        split: "train" is the first 90 % of the characters, "test" the rest.

    Raises InputError for an unknown split or no such file, FormatError where it is no text.

    Source: A. Karpathy, char-rnn, data/tinyshakespeare (public domain, see ``data/LICENSE-SHAKESPEARE.md``).

    >>> shakespeare()[:14]
    'First Citizen:'
    >>> len(shakespeare(split="train")) + len(shakespeare(split="test")) == len(shakespeare())
    True
    """
    if split not in ("train", "test", "all"):
        raise InputError(f'split={split!r} was given. Expected "train", "test" or "all".')
    path = EXCERPT if root is None else _found(root)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path} is no UTF-8 text ({error}); expected Tiny Shakespeare's input.txt."
        ) from None
    edge = len(text) - int(_TEST_SHARE * len(text))
    return {"train": text[:edge], "test": text[edge:], "all": text}[split]


class Characters:
    """The characters of a text as token ids: 0, 1, ... in the order of their code points.

    >>> characters = Characters("abracadabra")
    >>> characters.encode("cab").tolist(), characters.decode([3, 0, 1])
    ([2, 0, 1], 'dab')
    """

    def __init__(self, text: str) -> None:
        self.alphabet = "".join(sorted(set(text)))
        self._ids = {character: number for number, character in enumerate(self.alphabet)}

    def __len__(self) -> int:
        return len(self.alphabet)

    def encode(self, text: str) -> Tensor:
        """Token ids (length,) int64. Raises InputError for a character that the alphabet has not."""
        missing = sorted(set(text) - set(self.alphabet))
        if missing:
            raise InputError(f"the alphabet has no {missing[0]!r}; expected characters of {self.alphabet!r}.")
        return torch.tensor([self._ids[character] for character in text], dtype=torch.long)

    def decode(self, ids: Tensor | list[int]) -> str:
        """The text of token ids."""
        return "".join(self.alphabet[int(number)] for number in ids)


def _found(root: str | os.PathLike[str]) -> Path:
    if root == "env":
        named = os.environ.get("PULLBACK_DATA")
        if not named:
            raise InputError(
                'root="env" reads the environment variable PULLBACK_DATA, which is not set. Set it to the folder with '
                "tinyshakespeare/input.txt, or leave root out for the embedded excerpt."
            )
        root = named
    folder = Path(root)
    candidates = [folder] if folder.is_file() else [folder / place for place in _PLACES]
    for path in candidates:
        if path.is_file():
            return path
    raise InputError(
        f"no Tiny Shakespeare in {folder}. Expected input.txt there or in its tinyshakespeare/, as in "
        "github.com/karpathy/char-rnn (data/tinyshakespeare), or leave root out for the embedded excerpt."
    )
