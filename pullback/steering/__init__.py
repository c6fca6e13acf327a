"""Steering: moving a model's hidden states along a direction while it runs."""

from .answers import Question, Setting
from .blocks import Fingerprint, find_blocks, fingerprint
from .directions import fit
from .evaluate import evaluate
from .evaluation_result import Condition, SteeringEvaluation
from .pairs import Pair
from .statistics import LayerStatistics, SteeringStatistics
from .sweep import SteeringSweep, sweep
from .truthfulqa import contrastive_pairs, load_truthfulqa, split_questions
from .vector import SteeringVector, load

__all__ = [
    "Condition",
    "Fingerprint",
    "LayerStatistics",
    "Pair",
    "Question",
    "Setting",
    "SteeringEvaluation",
    "SteeringStatistics",
    "SteeringSweep",
    "SteeringVector",
    "contrastive_pairs",
    "evaluate",
    "find_blocks",
    "fingerprint",
    "fit",
    "load",
    "load_truthfulqa",
    "split_questions",
    "sweep",
]
