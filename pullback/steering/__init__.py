"""Steering: moving a model's hidden states along a direction while it runs."""

from .blocks import Fingerprint, find_blocks, fingerprint
from .directions import fit
from .pairs import Pair
from .statistics import LayerStatistics, SteeringStatistics
from .vector import SteeringVector, load

__all__ = [
    "Fingerprint",
    "LayerStatistics",
    "Pair",
    "SteeringStatistics",
    "SteeringVector",
    "find_blocks",
    "fingerprint",
    "fit",
    "load",
]
