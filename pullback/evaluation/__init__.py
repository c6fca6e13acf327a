"""How good is an attribution? Metrics per example, statistics over examples and seeds, retraining."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pullback.evaluation.agreement import PatchingReport, patching_report
    from pullback.evaluation.attack import PGD
    from pullback.evaluation.complexity import entropy, gini
    from pullback.evaluation.diffroar import ROAR, DiffROAR
    from pullback.evaluation.ensembles import Ensemble, Member, train_ensemble
    from pullback.evaluation.erasure import (
        comprehensiveness,
        faithfulness_correlation,
        faithfulness_estimate,
        monotonicity,
        sufficiency,
    )
    from pullback.evaluation.faithfulness import curve_intervals, deletion, insertion
    from pullback.evaluation.grid_sweep import RetrainingPlan
    from pullback.evaluation.imputation import NoisyLinear
    from pullback.evaluation.localization import leakage, pointing_game, relevance_mass, relevance_rank
    from pullback.evaluation.measurements import Measurement, Measurements, Score
    from pullback.evaluation.perturbations import GaussianNoise, NoisyBaseline, SquareRemoval
    from pullback.evaluation.randomization import parameter_randomization, random_logit
    from pullback.evaluation.ranks import Standing, standings
    from pullback.evaluation.results import MetricResult
    from pullback.evaluation.retraining import Trained, TrainSpec, multilayer_perceptron, train
    from pullback.evaluation.retraining_results import RetrainingResult, RetrainingRun, RetrainingScore
    from pullback.evaluation.robustness import infidelity, sensitivity_max
    from pullback.evaluation.statistics import (
        Interval,
        PairedDifference,
        bootstrap_interval,
        hierarchical_bootstrap,
        paired_difference,
        student_interval,
    )
    from pullback.evaluation.sweep import Sweep, SweepPlan, Task
    from pullback.evaluation.task_cache import cached
    from pullback.evaluation.views import Examples, View

__all__ = [
    "PGD",
    "ROAR",
    "DiffROAR",
    "Ensemble",
    "Examples",
    "GaussianNoise",
    "Interval",
    "Measurement",
    "Measurements",
    "Member",
    "MetricResult",
    "NoisyBaseline",
    "NoisyLinear",
    "PairedDifference",
    "PatchingReport",
    "RetrainingPlan",
    "RetrainingResult",
    "RetrainingRun",
    "RetrainingScore",
    "Score",
    "SquareRemoval",
    "Standing",
    "Sweep",
    "SweepPlan",
    "Task",
    "TrainSpec",
    "Trained",
    "View",
    "bootstrap_interval",
    "cached",
    "comprehensiveness",
    "curve_intervals",
    "deletion",
    "entropy",
    "faithfulness_correlation",
    "faithfulness_estimate",
    "gini",
    "hierarchical_bootstrap",
    "infidelity",
    "insertion",
    "leakage",
    "monotonicity",
    "multilayer_perceptron",
    "paired_difference",
    "parameter_randomization",
    "patching_report",
    "pointing_game",
    "random_logit",
    "relevance_mass",
    "relevance_rank",
    "sensitivity_max",
    "standings",
    "student_interval",
    "sufficiency",
    "train",
    "train_ensemble",
]

# Public name -> file. Add a metric here, in __all__, and above for the type checker.
_FILES = {
    "DiffROAR": "diffroar",
    "ROAR": "diffroar",
    "Ensemble": "ensembles",
    "Member": "ensembles",
    "train_ensemble": "ensembles",
    "RetrainingPlan": "grid_sweep",
    "RetrainingResult": "retraining_results",
    "RetrainingRun": "retraining_results",
    "RetrainingScore": "retraining_results",
    "Measurement": "measurements",
    "Measurements": "measurements",
    "Score": "measurements",
    "Standing": "ranks",
    "standings": "ranks",
    "Sweep": "sweep",
    "SweepPlan": "sweep",
    "Task": "sweep",
    "cached": "task_cache",
    "Examples": "views",
    "View": "views",
    "entropy": "complexity",
    "gini": "complexity",
    "comprehensiveness": "erasure",
    "faithfulness_correlation": "erasure",
    "faithfulness_estimate": "erasure",
    "monotonicity": "erasure",
    "sufficiency": "erasure",
    "leakage": "localization",
    "pointing_game": "localization",
    "relevance_mass": "localization",
    "relevance_rank": "localization",
    "GaussianNoise": "perturbations",
    "NoisyBaseline": "perturbations",
    "SquareRemoval": "perturbations",
    "parameter_randomization": "randomization",
    "random_logit": "randomization",
    "infidelity": "robustness",
    "sensitivity_max": "robustness",
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
