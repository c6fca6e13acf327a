"""The table of a steering evaluation: conditions by metrics, intervals, and flags that speak against the vector."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pullback import records
from pullback.evaluation.statistics import Interval

from .vector import SteeringVector

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Condition", "SteeringEvaluation", "flags_of"]

_FORMAT, _SCHEMA = "pullback.SteeringEvaluation", 1
# what is flagged: more items moved the wrong way, a larger completeness gap, less agreement of the fitting pairs
MOST_ANTI_STEERABLE, LARGEST_GAP, SMALLEST_AGREEMENT = 0.3, 0.1, 0.1
SHOWN = ("mc1", "mc2", "log_prob_shift", "margin_shift", "win_rate", "anti_steerable")


@dataclass(frozen=True, eq=False)
class Condition:
    """One row of the table.

    ``values``: metric -> (items,). ``draws``: metric -> (draws,) means, for random directions. ``facts``: the setting,
    and "perplexity_ratio" and "kl" on neutral text. ``continuations``: ids generated after each prompt;
    ``degeneration``: of them.
    """

    values: Mapping[str, Tensor]
    draws: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    continuations: Sequence[Sequence[int]] = ()
    degeneration: Mapping[str, float] = field(default_factory=dict)

    def band(self, metric: str, level: float = 0.95) -> tuple[float, float]:
        """What so many of the random directions lie in."""
        draws = self.draws[metric].double()
        low, high = draws.quantile(
            torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        ).tolist()
        return low, high


@dataclass(frozen=True, eq=False)
class SteeringEvaluation:
    """What ``evaluate`` found.

    Attributes:
        conditions: name -> ``Condition``: "none", the vectors, the controls.
        intervals: condition -> metric -> mean over items with its bootstrap interval; paired by item for shifts.
        names: of the vectors that were asked about.
        settings: what was run.
        flags: sentences that speak against a vector; none is the only good news.
    """

    conditions: Mapping[str, Condition]
    intervals: Mapping[str, Mapping[str, Interval]]
    names: tuple[str, ...]
    settings: Mapping[str, Any]
    flags: tuple[str, ...] = ()

    def with_flags(self, flags: Sequence[str]) -> SteeringEvaluation:
        """The same, flagged."""
        return replace(self, flags=tuple(flags))

    def mean(self, condition: str, metric: str) -> float:
        """The mean over items."""
        return float(self.conditions[condition].values[metric].mean())

    def to_records(self) -> list[dict[str, Any]]:
        """One flat row per condition and metric; for random directions low and high are the band of 95 % of them."""
        rows = []
        for name, condition in self.conditions.items():
            for metric, interval in self.intervals[name].items():
                low, high = condition.band(metric) if condition.draws else (interval.low, interval.high)
                rows.append(
                    {"condition": name, "metric": metric, "estimate": interval.estimate, "low": low, "high": high,
                     "items": interval.count, "bounds": "draws" if condition.draws else "bootstrap"}
                )  # fmt: skip
            for metric, value in {**condition.facts, **condition.degeneration}.items():
                if isinstance(value, float):
                    rows.append(
                        {"condition": name, "metric": metric, "estimate": value, "low": None, "high": None,
                         "items": None, "bounds": ""}
                    )  # fmt: skip
        return rows

    def to_dataframe(self) -> DataFrame:
        """The records as a pandas table."""
        import pandas

        return pandas.DataFrame(self.to_records())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the records."""
        rows = self.to_records()
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        Path(path).write_text(text.getvalue(), encoding="utf-8")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write records, flags, settings and every item's values as JSON."""
        document = {
            "format": _FORMAT,
            "schema": _SCHEMA,
            "settings": dict(self.settings),
            "names": list(self.names),
            "flags": list(self.flags),
            "records": self.to_records(),
            "values": {
                name: {metric: values.tolist() for metric, values in condition.values.items()}
                for name, condition in self.conditions.items()
            },
        }
        records.write_json(Path(path), document)

    def to_markdown(self) -> str:
        """The table, with the flags above it."""
        lines = [f"**{flag}**" for flag in self.flags]
        lines += [
            "",
            "| condition | " + " | ".join(SHOWN) + " | perplexity ratio |",
            "|---" * (len(SHOWN) + 2) + "|",
        ]
        for row in self.cells():
            lines.append("| " + " | ".join(row) + " |")
        return "\n".join(lines).strip()

    def cells(self) -> list[list[str]]:
        """The rows of the table that is shown, as text."""
        found = []
        for name, condition in self.conditions.items():
            row = [name]
            for metric in SHOWN:
                interval = self.intervals[name][metric]
                low, high = condition.band(metric) if condition.draws else (interval.low, interval.high)
                row.append(f"{interval.estimate:.3f} [{low:.3f}, {high:.3f}]")
            ratio = condition.facts.get("perplexity_ratio")
            found.append([*row, "" if ratio is None else f"{ratio:.3f}"])
        return found

    def __str__(self) -> str:
        head = ["condition", *SHOWN, "perplexity ratio"]
        cells = [head, *self.cells()]
        widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        return "\n".join([*(f"FLAG {flag}" for flag in self.flags), *lines])


def flags_of(
    result: SteeringEvaluation, vectors: Mapping[str, SteeringVector], budget: float, controls: bool
) -> list[str]:
    """Everything found that speaks against each vector."""
    flags = []
    drawn = result.conditions["random directions"]
    low, high = drawn.band("margin_shift")
    for name, vector in vectors.items():
        shift = result.intervals[name]["margin_shift"]
        if not shift.estimate > high:
            flags.append(
                f"{name} is not better than random directions: it moves the margin by {shift.estimate:.3f}, and 95 % "
                f"of {len(drawn.draws['margin_shift'])} of these by {low:.3f} to {high:.3f}."
            )
        if not shift.low > 0:
            flags.append(
                f"{name} may do nothing: the interval of its margin shift is [{shift.low:.3f}, {shift.high:.3f}]."
            )
        wrong = result.mean(name, "anti_steerable")
        if wrong > MOST_ANTI_STEERABLE:
            flags.append(f"{name} moves {wrong:.0%} of the items the wrong way.")
        ratio = result.conditions[name].facts.get("perplexity_ratio")
        if ratio is not None and not ratio <= budget:
            flags.append(
                f"{name} multiplies the perplexity of neutral text by {ratio:.3f}; the budget is {budget:g}."
            )
        for control in ("random_tokens", "mean_diff", "mean_grad"):
            if control in result.conditions and result.mean(control, "margin_shift") >= shift.estimate:
                flags.append(
                    f"{name} is not better than {control}, which moves the margin by "
                    f"{result.mean(control, 'margin_shift'):.3f}."
                )
        flags += _of_the_fit(name, vector)
    if not controls:
        flags.append(
            "random_tokens, mean_diff and mean_grad are missing: give fit_pairs, and they are fitted on these."
        )
    return flags


def _of_the_fit(name: str, vector: SteeringVector) -> list[str]:
    flags = []
    gap = vector.provenance.get("completeness", {}).get("relative_gap")
    if gap is not None and not gap <= LARGEST_GAP:
        flags.append(
            f"{name} was fitted with attributions whose completeness gap is {gap:.2f} of the change of score."
        )
    agreement = [each["pairwise"] for each in vector.provenance.get("agreement", ())]
    if agreement and max(agreement) < SMALLEST_AGREEMENT:
        flags.append(
            f"{name} is one direction for fitting pairs that hardly agree (mean cosine at most {max(agreement):.2f})."
        )
    return flags
