"""Suites: named benchmarks of methods and controls on models trained for them, or on a model of one's own."""

from pullback.evaluation.suites.named_suites import SUITES, Suite, run_suites, suite
from pullback.evaluation.suites.retrainings import Retraining

__all__ = ["SUITES", "Retraining", "Suite", "run_suites", "suite"]
