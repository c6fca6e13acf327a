"""Toy texts in two registers, in which it is known which tokens speak for which register."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pullback.core.errors import InputError
from pullback.datasets.examples import chosen, count

__all__ = ["Registers", "answers_of", "register_documents", "vocabulary_size"]

PAD, BOS, EOS, MASK = range(4)
FILLERS, CUES, KEYS = 8, 4, 24  # kinds of fillers, of cues of each register, of keys
FIRST_FILLER = 4
FIRST_CUE = FIRST_FILLER + FILLERS
FIRST_KEY = FIRST_CUE + 2 * CUES
FIRST_ANSWER = FIRST_KEY + KEYS
SHIFT = 5  # of the second register's answers, where both share their words


@dataclass(frozen=True, eq=False)
class Registers:
    """Documents: a beginning, a header of cues and fillers, and keys with their answers.

    ``x`` (n, 1 + header + 2 · queries) int64 tokens; ``y`` (n,) the register, 0 or 1; ``cues`` (n, length) +1 at cues
    of register 0, -1 at those of register 1, 0 elsewhere; ``answers`` (n, queries, 2) the answers to the keys in either
    register; ``meta`` the parameters and seed. Tokens 0 to 3 are padding, beginning, end and mask.
    """

    x: Tensor
    y: Tensor
    cues: Tensor
    answers: Tensor
    meta: dict[str, object] = field(default_factory=dict)

    __len__ = count
    __getitem__ = chosen

    @property
    def prompts(self) -> Tensor:
        """(n, 2 + header): the documents up to their first key."""
        return self.x[:, : self.x.shape[1] - 2 * self.answers.shape[1] + 1]


def vocabulary_size(shared_answers: bool = False) -> int:
    """How many tokens there are."""
    return FIRST_ANSWER + (1 if shared_answers else 2) * KEYS


def answers_of(keys: Tensor, shared_answers: bool = False) -> Tensor:
    """(..., 2): the answer tokens to keys (...,), numbered from 0, in either register.

    With ``shared_answers`` both registers use the same words: register 1 answers key i as register 0 does key i + 5.
    """
    second = (keys + SHIFT) % KEYS if shared_answers else keys + KEYS
    return FIRST_ANSWER + torch.stack([keys, second], -1)


def register_documents(
    n: int,
    header: int = 8,
    queries: int = 4,
    agreement: float = 0.8,
    register: int | None = None,
    keys: Sequence[int] = tuple(range(KEYS)),
    shared_answers: bool = False,
    seed: int = 0,
) -> Registers:
    """Documents whose answers depend on a register that only cues tell.

    Each document has a register y, a fair coin or ``register``. Each of ``header`` words is a filler or a cue with even
    odds; a cue is of the document's register with probability ``agreement``. Then come ``queries`` keys, each followed
    by its answer in the register.

    Raises ``InputError`` for parameters out of range.

    >>> data = register_documents(100, agreement=1.0, register=1)
    >>> tuple(data.x.shape), sorted(data.cues.unique().tolist())
    ((100, 17), [-1, 0])
    """
    if n < 1 or header < 1 or queries < 1 or not 0 <= agreement <= 1:
        raise InputError(
            f"n={n}, header={header}, queries={queries}, agreement={agreement} was given. Expected n, header and "
            "queries of at least 1 and an agreement from 0 to 1."
        )
    if register not in (None, 0, 1) or not keys or not all(0 <= key < KEYS for key in keys):
        raise InputError(
            f"register={register!r}, keys={list(keys)} was given. Expected None, 0 or 1, and keys from 0 to {KEYS - 1}."
        )
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=generator)
    if register is not None:
        y = torch.full_like(y, register)
    words, signs = header_words(y, header, agreement, generator)
    asked = torch.tensor(keys)[torch.randint(len(keys), (n, queries), generator=generator)]
    answers = answers_of(asked, shared_answers)
    given = answers.gather(2, y[:, None, None].expand(n, queries, 1))[..., 0]
    pairs = torch.stack([FIRST_KEY + asked, given], 2).flatten(1)
    x = torch.cat([torch.full((n, 1), BOS), words, pairs], 1)
    cues = torch.zeros_like(x)
    cues[:, 1 : 1 + header] = signs
    meta: dict[str, object] = {
        "n": n, "header": header, "queries": queries, "agreement": agreement, "register": register,
        "keys": list(keys), "shared_answers": shared_answers, "seed": seed,
    }  # fmt: skip
    return Registers(x, y, cues, answers, meta)


def header_words(
    y: Tensor, length: int, agreement: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(n, length) tokens of headers in the registers y (n,), and +1 or -1 where they are cues of register 0 or 1."""
    shape = (len(y), length)
    is_cue = torch.rand(shape, generator=generator) < 0.5
    agrees = torch.rand(shape, generator=generator) < agreement
    of = torch.where(agrees, y[:, None], 1 - y[:, None])
    cue = FIRST_CUE + CUES * of + torch.randint(CUES, shape, generator=generator)
    filler = FIRST_FILLER + torch.randint(FILLERS, shape, generator=generator)
    return torch.where(is_cue, cue, filler), (1 - 2 * of) * is_cue
