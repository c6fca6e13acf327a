"""The runs of a retraining benchmark as tidy rows, with intervals over seeds and test examples together."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from pullback.core.errors import InputError
from pullback.evaluation.measurements import Measurement, Measurements
from pullback.evaluation.statistics import (
    Interval,
    PairedDifference,
    hierarchical_bootstrap,
    paired_difference,
    student_interval,
)
from pullback.records import write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

__all__ = ["RetrainingResult", "RetrainingRun", "RetrainingScore"]


@dataclass(frozen=True)
class RetrainingRun:
    """One retrained model. ``value``: its accuracy on the masked test data, NaN where training diverged.

    ``level``: the fraction kept (DiffROAR) or removed (ROAR); ``side``: "top" or "bottom", the part that was kept.
    """

    method: str
    control: bool
    metric: str
    level: float
    side: str
    base_seed: int
    retrain_seed: int
    value: float
    train_accuracy: float
    validation_accuracy: float
    converged: bool
    collapsed: bool
    seconds: float


@dataclass(frozen=True)
class RetrainingScore:
    """A method's score at a level. ``interval`` resamples seeds and test examples; ``over_seeds`` is Student's t.

    Where a method has several base models, these are resampled in place of the retraining seeds.

    ``accuracies``: the mean of each arm. ``flagged``: how many of its runs had not converged, or collapsed.
    """

    method: str
    control: bool
    level: float
    interval: Interval
    over_seeds: Interval
    accuracies: Mapping[str, float]
    flagged: int


@dataclass(frozen=True, eq=False)
class RetrainingResult:
    """All runs of a DiffROAR or ROAR, and what they say. Higher scores are better.

    ``correct`` (runs, n) bool: whether each run is right about each test example. ``settings``: all that decides it.
    """

    metric: Literal["diffroar", "roar"]
    runs: tuple[RetrainingRun, ...]
    correct: Tensor
    settings: Mapping[str, object]

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.method for run in self.runs if run.method != "none"))

    @property
    def levels(self) -> tuple[float, ...]:
        return tuple(sorted({run.level for run in self.runs if run.method != "none"}))

    def differences(self, method: str, level: float) -> Tensor:
        """Right in one arm minus right in the other, (pairs of equal seeds, n): -1, 0 or 1; NaN where one diverged.

        DiffROAR: top minus bottom kept. ROAR: everything kept minus the top removed.
        """
        above, below = self._arms(method, level)
        return torch.stack([self._hits(a) - self._hits(b) for a, b in zip(above, below, strict=True)])

    def score(self, method: str, level: float, seed: int = 0) -> RetrainingScore:
        """The mean difference between the arms over seeds and test examples, with its intervals."""
        above, below = self._arms(method, level)
        # with several base models those are what was drawn; the seeds of one are averaged
        table = self._per_base(
            self.differences(method, level), [self.runs[number].base_seed for number in below]
        )
        names = ("top", "bottom") if self.metric == "diffroar" else ("whole", "removed")
        arms = [self.runs[number] for number in (*above, *below)]
        return RetrainingScore(
            method=method,
            control=self.runs[below[0]].control,
            level=level,
            interval=hierarchical_bootstrap(table, samples=500, seed=seed),
            over_seeds=student_interval(table.mean(1)),
            accuracies={
                name: sum(self.runs[number].value for number in numbers) / len(numbers)
                for name, numbers in zip(names, (above, below), strict=True)
            },
            flagged=len({(run.side, run.base_seed, run.retrain_seed) for run in arms if not run.converged}),
        )

    def value(self, method: str, level: float) -> float:
        """The score alone."""
        return float(self.differences(method, level).nanmean())

    def summary(self) -> tuple[RetrainingScore, ...]:
        """Every method at every level."""
        return tuple(self.score(method, level) for method in self.methods for level in self.levels)

    def area(self, method: str) -> float:
        """The mean height of the score over the range of the levels, by trapezoids."""
        values = np.array([self.value(method, level) for level in self.levels])
        if len(values) < 2:
            return float(values[0])
        steps = np.diff(self.levels)
        return float(((values[1:] + values[:-1]) / 2 * steps).sum() / steps.sum())

    def compare(self, first: str, second: str, level: float) -> PairedDifference:
        """first - second over the seeds, with a permutation p-value; with five seeds it is never below 0.0625.

        Seeds are the units: test examples share models, so a test over them would claim too much.
        """
        return paired_difference(
            self.differences(first, level).mean(1), self.differences(second, level).mean(1)
        )

    def to_records(self) -> list[dict[str, object]]:
        """The runs as dictionaries of plain types."""
        return [asdict(run) for run in self.runs]

    def to_csv(self, path: str | Path) -> None:
        """Write the runs, one a line."""
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(RetrainingRun)])
            writer.writeheader()
            writer.writerows(self.to_records())

    def to_markdown(self) -> str:
        """The scores as a table: methods by levels, with 95 % intervals; controls are marked, flagged runs counted."""
        scores = self.summary()
        lines = [
            "| method | " + " | ".join(f"{level:g}" for level in self.levels) + " | flagged |",
            "|---|" + "---|" * (len(self.levels) + 1),
        ]
        for method in self.methods:
            own = [score for score in scores if score.method == method]
            cells = [
                f"{score.interval.estimate:+.3f} [{score.interval.low:+.3f}, {score.interval.high:+.3f}]"
                for score in own
            ]
            name = f"{method} (control)" if own[0].control else method
            lines.append(f"| {name} | {' | '.join(cells)} | {sum(score.flagged for score in own)} |")
        return "\n".join(lines)

    def to_measurements(self, data: str, model: str) -> Measurements:
        """The scores as rows of a suite's table: metric "diffroar@0.1", per retraining seed and test example.

        A method with several base models has its seeds counted on through all of them.
        """
        rows = []
        for method in self.methods:
            own = [run for run in self.runs if run.method == method]
            for level in self.levels:
                flagged = any(not run.converged for run in own if math.isclose(run.level, level))
                rows += [
                    Measurement(
                        data, model, method, own[0].control, f"{self.metric}@{level:g}", "higher", number,
                        tuple(difference.tolist()),
                        flag="some of its retrainings had not converged" * flagged,
                    )
                    for number, difference in enumerate(self.differences(method, level))
                ]  # fmt: skip
        return Measurements(rows, {self.metric: dict(self.settings)})

    def plot(self, ax: Axes | None = None) -> Axes:
        """The score over the level, a curve for each method with its interval, on the random control's band."""
        from pullback.viz.leaderboard import level_curves

        rows = [
            {
                "method": score.method, "control": score.control, "level": score.level,
                "estimate": score.interval.estimate, "low": score.interval.low, "high": score.interval.high,
            }
            for score in self.summary()
        ]  # fmt: skip
        return level_curves(rows, ax)

    def to_dataframe(self) -> DataFrame:
        """The runs as a pandas table."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "to_dataframe() needs pandas, which pullback does not: pip install pandas"
            ) from error
        return pandas.DataFrame(self.to_records())

    def to_json(self, path: str | Path) -> None:
        """Settings, scores with their intervals, and runs."""
        scores = [asdict(score) for score in self.summary()]
        write_json(
            Path(path),
            {
                "metric": self.metric,
                "settings": dict(self.settings),
                "scores": scores,
                "runs": self.to_records(),
            },
        )

    @staticmethod
    def _per_base(table: Tensor, bases: list[int]) -> Tensor:
        if len(set(bases)) == 1:
            return table
        own = torch.tensor(bases)
        return torch.stack([table[own == base].nanmean(0) for base in dict.fromkeys(bases)])

    def _hits(self, number: int) -> Tensor:
        hits = self.correct[number].double()
        return hits if math.isfinite(self.runs[number].value) else torch.full_like(hits, math.nan)

    def _arms(self, method: str, level: float) -> tuple[list[int], list[int]]:
        found: dict[tuple[str, int, int], int] = {}
        whole: dict[int, int] = {}
        for number, run in enumerate(self.runs):
            if run.method == "none":
                whole[run.retrain_seed] = number
            elif run.method == method and math.isclose(run.level, level):
                found[run.side, run.base_seed, run.retrain_seed] = number
        if not found:
            raise InputError(
                f"method={method!r}, level={level} was given. Expected one of {list(self.methods)} at "
                f"{list(self.levels)}."
            )
        below = {key[1:]: number for key, number in found.items() if key[0] == "bottom"}
        if self.metric == "roar":
            return [whole[seed] for _, seed in below], list(below.values())
        return [found["top", key[0], key[1]] for key in below], list(below.values())
