"""Steering: moving a model's hidden states along a direction while it runs."""

from .blocks import Fingerprint, find_blocks, fingerprint
from .statistics import LayerStatistics, SteeringStatistics
from .vector import SteeringVector, load

__all__ = [
    "Fingerprint",
    "LayerStatistics",
    "SteeringStatistics",
    "SteeringVector",
    "find_blocks",
    "fingerprint",
    "load",
]
