"""Toy images with toy texts, and questions about the one or the other, with the evidence for each answer known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pullback.core.errors import InputError
from pullback.datasets.examples import chosen, count
from pullback.datasets.registers import BOS, FIRST_KEY, KEYS, answers_of, header_words, vocabulary_size

__all__ = ["PatchDocuments", "coloured_patches"]

IMAGE, LOOK, READ = range(vocabulary_size(), vocabulary_size() + 3)
VOCABULARY = vocabulary_size() + 3
GRID, SIDE = 4, 6  # patches along an edge, pixels along a patch
PATCHES = GRID * GRID
# red, green, blue: two colours that speak for register 0, two for register 1, four for neither
COLOURS = torch.tensor(
    [[0.9, 0.1, 0.1], [0.9, 0.5, 0.1], [0.1, 0.2, 0.9], [0.1, 0.7, 0.9],
     [0.5, 0.5, 0.5], [0.2, 0.7, 0.2], [0.9, 0.9, 0.3], [0.6, 0.2, 0.6]]
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class PatchDocuments:
    """Images of coloured patches, a header of words, and questions of which each says where to look.

    ``x`` (n, 1 + 16 + header + 3 · queries) int64 tokens: a beginning, sixteen image tokens, the header, and for each
    query its source, a key and the answer. ``pixels`` (n, 3, 24, 24) in [0, 1]; ``registers`` (n, 2) that of the image
    and that of the header; ``y`` (n,) that of the source that the first query names; ``sources`` (n, queries) 0 for
    the image, 1 for the header; ``cues`` (n, length) +1 at patches and words that speak for register 0, -1 at those
    for register 1, 0 elsewhere; ``answers`` (n, queries, 2) in either register; ``meta`` the parameters and seed.
    """

    x: Tensor
    pixels: Tensor
    registers: Tensor
    y: Tensor
    sources: Tensor
    cues: Tensor
    answers: Tensor
    meta: dict[str, object] = field(default_factory=dict)

    __len__ = count
    __getitem__ = chosen

    @property
    def prompts(self) -> Tensor:
        """(n, 1 + 16 + header + 2): the documents up to their first key."""
        return self.x[:, : self.x.shape[1] - 3 * self.answers.shape[1] + 2]


def coloured_patches(
    n: int,
    header: int = 6,
    queries: int = 3,
    agreement: float = 0.85,
    register: int | None = None,
    source: int | None = None,
    keys: Sequence[int] = tuple(range(KEYS)),
    seed: int = 0,
) -> PatchDocuments:
    """Documents whose answers depend on the colours of an image or on words, whichever the question names.

    Image and header have a register each, fair coins apart from each other. Half of the patches and of the words are
    cues, each of its own side's register with probability ``agreement``. ``register`` fixes that of the side which the
    first query names, ``source`` what all queries name: 0 the image, 1 the header.

    Raises ``InputError`` for parameters out of range.

    >>> data = coloured_patches(50, agreement=1.0, source=0, register=1)
    >>> tuple(data.pixels.shape), sorted(data.cues[:, 1:17].unique().tolist())
    ((50, 3, 24, 24), [-1, 0])
    """
    if n < 1 or header < 1 or queries < 1 or not 0 <= agreement <= 1:
        raise InputError(
            f"n={n}, header={header}, queries={queries}, agreement={agreement} was given. Expected n, header and "
            "queries of at least 1 and an agreement from 0 to 1."
        )
    if register not in (None, 0, 1) or source not in (None, 0, 1):
        raise InputError(f"register={register!r}, source={source!r} was given. Expected None, 0 or 1.")
    if not keys or not all(0 <= key < KEYS for key in keys):
        raise InputError(f"keys={list(keys)} was given. Expected some from 0 to {KEYS - 1}.")
    generator = torch.Generator().manual_seed(seed)
    registers = torch.randint(2, (n, 2), generator=generator)
    sources = torch.randint(2, (n, queries), generator=generator)
    if source is not None:
        sources = torch.full_like(sources, source)
    if register is not None:
        registers[torch.arange(n), sources[:, 0]] = register
    words, word_cues = header_words(registers[:, 1], header, agreement, generator)
    pixels, patch_cues = _painted(registers[:, 0], agreement, generator)
    asked = torch.tensor(keys)[torch.randint(len(keys), (n, queries), generator=generator)]
    answers = answers_of(asked)
    given = answers.gather(2, registers.gather(1, sources)[..., None])[..., 0]
    asking = torch.stack([LOOK + sources, FIRST_KEY + asked, given], 2).flatten(1)
    x = torch.cat([torch.full((n, 1), BOS), torch.full((n, PATCHES), IMAGE), words, asking], 1)
    cues = torch.zeros_like(x)
    cues[:, 1 : 1 + PATCHES + header] = torch.cat([patch_cues, word_cues], 1)
    y = registers[torch.arange(n), sources[:, 0]]
    meta: dict[str, object] = {
        "n": n, "header": header, "queries": queries, "agreement": agreement, "register": register, "source": source,
        "keys": list(keys), "seed": seed,
    }  # fmt: skip
    return PatchDocuments(x, pixels, registers, y, sources, cues, answers, meta)


def _painted(y: Tensor, agreement: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pixels (n, 3, 24, 24), and (n, 16) +1 or -1 where a patch is a cue of register 0 or 1."""
    shape = (len(y), PATCHES)
    is_cue = torch.rand(shape, generator=generator) < 0.5
    agrees = torch.rand(shape, generator=generator) < agreement
    of = torch.where(agrees, y[:, None], 1 - y[:, None])
    cue = 2 * of + torch.randint(2, shape, generator=generator)
    colour = torch.where(is_cue, cue, 4 + torch.randint(4, shape, generator=generator))
    painted = COLOURS[colour].reshape(len(y), GRID, GRID, 3).permute(0, 3, 1, 2)
    pixels = painted.repeat_interleave(SIDE, 2).repeat_interleave(SIDE, 3)
    pixels = pixels + 0.05 * torch.randn(pixels.shape, generator=generator)
    return pixels.clamp(0, 1), (1 - 2 * of) * is_cue
