"""Steering: moving a model's hidden states along a direction while it runs."""

from .blocks import Fingerprint, find_blocks, fingerprint
from .directions import fit
from .evaluate import evaluate
from .pairs import Pair
from .questions import Question
from .report import write_steering_report
from .results import Evaluation, Flag, Generation, Row
from .scoring import Setting
from .statistics import LayerStatistics, SteeringStatistics
from .sweep import Sweep, SweepPoint, sweep
from .truthfulqa import TruthfulQAResult, truthful_pairs, truthful_questions, truthfulqa
from .vector import SteeringVector, load

__all__ = [
    "Evaluation",
    "Fingerprint",
    "Flag",
    "Generation",
    "LayerStatistics",
    "Pair",
    "Question",
    "Row",
    "Setting",
    "SteeringStatistics",
    "SteeringVector",
    "Sweep",
    "SweepPoint",
    "TruthfulQAResult",
    "evaluate",
    "find_blocks",
    "fingerprint",
    "fit",
    "load",
    "sweep",
    "truthful_pairs",
    "truthful_questions",
    "truthfulqa",
    "write_steering_report",
]
