"""How good is an attribution? Metrics per example, statistics over examples and seeds, retraining."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pullback.evaluation.agreement import PatchingReport, patching_report
    from pullback.evaluation.attack import PGD
    from pullback.evaluation.faithfulness import curve_intervals, deletion, insertion
    from pullback.evaluation.imputation import NoisyLinear
    from pullback.evaluation.localization import leakage
    from pullback.evaluation.results import MetricResult
    from pullback.evaluation.retraining import Trained, TrainSpec, multilayer_perceptron, train
    from pullback.evaluation.statistics import (
        Interval,
        PairedDifference,
        bootstrap_interval,
        hierarchical_bootstrap,
        paired_difference,
        student_interval,
    )

__all__ = [
    "PGD",
    "Interval",
    "MetricResult",
    "NoisyLinear",
    "PairedDifference",
    "PatchingReport",
    "TrainSpec",
    "Trained",
    "bootstrap_interval",
    "curve_intervals",
    "deletion",
    "hierarchical_bootstrap",
    "insertion",
    "leakage",
    "multilayer_perceptron",
    "paired_difference",
    "patching_report",
    "student_interval",
    "train",
]

# Public name -> file. Add a metric here, in __all__, and above for the type checker.
_FILES = {
    "leakage": "localization",
    "NoisyLinear": "imputation",
    "curve_intervals": "faithfulness",
    "deletion": "faithfulness",
    "insertion": "faithfulness",
    "MetricResult": "results",
    "PatchingReport": "agreement",
    "patching_report": "agreement",
    "PGD": "attack",
    "TrainSpec": "retraining",
    "Trained": "retraining",
    "multilayer_perceptron": "retraining",
    "train": "retraining",
    "Interval": "statistics",
    "PairedDifference": "statistics",
    "bootstrap_interval": "statistics",
    "hierarchical_bootstrap": "statistics",
    "paired_difference": "statistics",
    "student_interval": "statistics",
}


def __getattr__(name: str) -> object:
    if name not in _FILES:
        raise AttributeError(f'pullback.evaluation has no "{name}".')
    value: object = getattr(import_module(f"pullback.evaluation.{_FILES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
