"""Writes docs/coverage.md from a run over the zoo: ``python -m tests.zoo.coverage_table``, about two minutes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from tests.zoo.architectures import FLOAT32_INSIDE
from tests.zoo.architectures.audio_and_multimodal import AUDIO_AND_MULTIMODAL
from tests.zoo.architectures.convolutional import CONVOLUTIONAL
from tests.zoo.architectures.decoders import DECODERS
from tests.zoo.architectures.encoders import ENCODERS
from tests.zoo.architectures.mixtures import MIXTURES
from tests.zoo.architectures.recurrent import RECURRENT
from tests.zoo.architectures.sequence_layers import SEQUENCE_LAYERS
from tests.zoo.architectures.sequence_to_sequence import SEQUENCE_TO_SEQUENCE
from tests.zoo.architectures.vision import VISION
from tests.zoo.measuring import EXCEPTIONS, Measurement, measure

__all__ = ["FAMILIES", "PAGE", "page", "row"]

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"

FAMILIES: dict[str, Iterable[str]] = {
    "Decoders with attention": DECODERS,
    "Recurrent and hybrid decoders": RECURRENT,
    "Mixtures of experts": MIXTURES,
    "Encoders of text": ENCODERS,
    "Encoders with decoders": SEQUENCE_TO_SEQUENCE,
    "Vision": VISION,
    "Sound, video, series, several modalities": AUDIO_AND_MULTIMODAL,
    "Convolutional networks": CONVOLUTIONAL,
    "Layers of torch.nn for sequences": SEQUENCE_LAYERS,
}

# what is no exception, but good to know
NOTES = {"gpt_oss": "constants of 1 in its gates absorb relevance, as biases do"}

# below, figures are rounding, which differs between machines
SMALLEST = 1e-15

HEADER = """\
# Which architectures are covered

One tiny model of each architecture, with random weights, biases and statistics, in float64, two examples. Nothing here
names an architecture to the rules: they act on operations. Made by `python -m tests.zoo.coverage_table`;
`tests/zoo/test_rules_zoo.py` holds every model to it, and also requires that all outputs are bit for bit those without
rules and that methods leave the model untouched.

- **relp**: how far relevance at the site and what additive constants absorb are from the score, relative to it: with the
  model as built (fused attention, SDPA, where the class has the choice) and with eager attention (– where there is no
  choice). An upper bound, 1e-15 or more. To be 1e-12 at most.
- **gradient**: the same for input times plain gradient. A lower bound. Where it is small, relp's figure says little.
- **FullGrad**: the residual of `fullgrad_terms`, relative to the sum of absolute terms. An upper bound.
- **rules that acted**: calls that each rule of the preset handled in one forward pass. "Identity" is `IdentityRule`, and
  so on.

Models that compute parts in float32 even so (see remarks) are measured with these casts left out.
"""

COLUMNS = """\
| architecture | relp | relp, eager | gradient | FullGrad | rules that acted | remarks |
|---|---|---|---|---|---|---|
"""


def row(found: Measurement) -> str:
    """One line of the table."""
    rules = () if found.built is None else found.built.rules
    remarks = [EXCEPTIONS[found.name][1]] if found.name in EXCEPTIONS else []
    if found.name in NOTES:
        remarks.append(NOTES[found.name])
    if found.name in FLOAT32_INSIDE:
        remarks.append(f"float32 in {FLOAT32_INSIDE[found.name]}")
    cells = (
        found.name,
        "raises" if found.built is None else at_most(found.built.error),
        "–" if found.eager is None else at_most(found.eager.error),
        at_least(found.gradient),
        at_most(found.fullgrad),
        ", ".join(f"{rule.removesuffix('Rule')} {count}" for rule, count in rules) or "–",
        "; ".join(remarks),
    )
    return f"| {' | '.join(cells)} |"


def at_most(value: float) -> str:
    """The next power of ten above."""
    return f"1e{math.ceil(math.log10(max(value, SMALLEST)) - 1e-9):+03d}"


def at_least(value: float) -> str:
    """The next power of ten below."""
    return f"1e{math.floor(math.log10(max(value, SMALLEST)) + 1e-9):+03d}"


def page(rows: Mapping[str, str]) -> str:
    """The whole page from the line of each architecture."""
    tables = [
        f"\n## {family}\n\n{COLUMNS}" + "".join(f"{rows[name]}\n" for name in sorted(names))
        for family, names in FAMILIES.items()
    ]
    return HEADER + "".join(tables)


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = {name: row(measure(name)) for names in FAMILIES.values() for name in names}
    PAGE.write_text(page(rows), encoding="utf-8")
