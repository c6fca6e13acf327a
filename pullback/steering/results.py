"""What an evaluation of steering vectors found: one row per condition and measure, flags first."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pullback.core.errors import InputError, nearest
from pullback.records import write_bytes, write_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pandas import DataFrame

__all__ = ["Evaluation", "Flag", "Generation", "Row"]


@dataclass(frozen=True)
class Row:
    """One measure under one condition.

    Attributes:
        condition: "none", "prompt", the vector's name, "random", "random_tokens", "mean_diff", "mean_grad".
        setting: "same" (the strength and blocks of the vector) or "validated" (chosen for this condition).
        measure: as in ``Evaluation``.
        estimate, low, high: the mean over questions with its bootstrap interval; for "random" the mean over draws with
            the percentiles of the draws. None where it was not measured or has no interval.
        count: questions, draws, tokens or texts.
        strength, layers: of the condition; None where nothing is steered.
    """

    condition: str
    setting: str
    measure: str
    estimate: float | None
    low: float | None
    high: float | None
    count: int
    strength: float | None = None
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Flag:
    """A reason to distrust the vector: a "failure" is one to discard it for."""

    name: str
    condition: str
    severity: Literal["failure", "caution"]
    text: str


@dataclass(frozen=True)
class Generation:
    """What was generated after a prompt under a condition, as text where there is a tokenizer, else as token ids."""

    condition: str
    prompt: str
    text: str


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The table of an evaluation, its flags and what it was made of.

    Measures: "mc1", "mc2", "mc2_per_token", "log_prob", "margin" (see ``AnswerMeasures``); "log_prob_shift" and
    "margin_shift", their paired change against the unsteered model; "win_rate", the share of questions whose margin
    grew, ties counted half; "anti_steerable", the share whose margin shrank; "perplexity_ratio" and "divergence" on
    neutral text; "distinct_1", "distinct_2", "repetition" and "length" of what was generated.

    Attributes:
        rows: in the order of the conditions.
        flags: failures first.
        questions: by condition and measure, one value per question.
        generations: before and after.
        settings: what was asked for, as JSON holds it.
    """

    rows: tuple[Row, ...]
    flags: tuple[Flag, ...] = ()
    questions: Mapping[str, Mapping[str, NDArray[np.float64]]] = field(default_factory=dict)
    generations: tuple[Generation, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether a flag is a failure."""
        return any(flag.severity == "failure" for flag in self.flags)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions in order."""
        return tuple(dict.fromkeys(row.condition for row in self.rows))

    def row(self, condition: str, measure: str, setting: str = "same") -> Row:
        """The row of a condition and a measure. Raises InputError where there is none, with the nearest names."""
        for row in self.rows:
            if (row.condition, row.measure, row.setting) == (condition, measure, setting):
                return row
        known = {f"{row.condition}/{row.measure}/{row.setting}" for row in self.rows}
        raise InputError(
            f'there is no row "{condition}/{measure}/{setting}". Nearest: '
            f"{nearest(f'{condition}/{measure}/{setting}', sorted(known))}."
        )

    def value(self, condition: str, measure: str, setting: str = "same") -> float:
        """The estimate of a row; NaN where it was not measured."""
        found = self.row(condition, measure, setting).estimate
        return math.nan if found is None else found

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """The rows as CSV, written to ``path`` where one is given; blocks are joined by spaces."""
        stream = io.StringIO()
        names = [each.name for each in fields(Row)]
        writer = csv.DictWriter(stream, names, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            layers = None if row.layers is None else " ".join(map(str, row.layers))
            writer.writerow({**asdict(row), "layers": layers})
        if path is not None:
            write_bytes(Path(path), stream.getvalue().encode())
        return stream.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Everything in types JSON knows."""
        return {
            "failed": self.failed,
            "flags": [asdict(flag) for flag in self.flags],
            "settings": dict(self.settings),
            "rows": [asdict(row) for row in self.rows],
            "questions": {
                condition: {name: values.tolist() for name, values in measures.items()}
                for condition, measures in self.questions.items()
            },
            "generations": [asdict(each) for each in self.generations],
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything as one JSON document."""
        write_json(Path(path), self.to_dict())

    def to_markdown(self, measures: Sequence[str] = ()) -> str:
        """Flags, then a table with a line per condition; ``measures`` are its columns, by default the main ones."""
        lines = [f"- **{flag.severity}** {flag.name} ({flag.condition}): {flag.text}" for flag in self.flags]
        columns, table = self.table(measures)
        lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(each.replace("|", "\\|") for each in line) + " |" for line in table]
        return "\n".join(lines).strip() + "\n"

    def table(self, measures: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
        """Column names, and a line per condition and setting."""
        chosen = list(measures) or [name for name in _MAIN if any(row.measure == name for row in self.rows)]
        found: dict[tuple[str, str], dict[str, Row]] = {}
        for row in self.rows:
            found.setdefault((row.condition, row.setting), {})[row.measure] = row
        lines = []
        for (condition, setting), by_measure in found.items():
            one = next(iter(by_measure.values()))
            where = "" if one.layers is None else f"{one.strength:g} at {', '.join(map(str, one.layers))}"
            label = condition if setting == "same" else f"{condition} ({setting})"
            lines.append([label, where, *(_cell(by_measure.get(name)) for name in chosen)])
        return ["condition", "strength and blocks", *chosen], lines

    def to_dataframe(self) -> DataFrame:
        """The rows as a pandas table. Raises ImportError without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "to_dataframe() needs pandas, which pullback does not: pip install pandas"
            ) from error
        return pandas.DataFrame([asdict(row) for row in self.rows])

    def __str__(self) -> str:
        return self.to_markdown()


_MAIN = (
    "mc1", "mc2", "margin_shift", "log_prob_shift", "win_rate", "anti_steerable", "perplexity_ratio", "divergence",
    "repetition",
)  # fmt: skip


def _cell(row: Row | None) -> str:
    if row is None or row.estimate is None:
        return "–"
    if row.low is None or row.high is None or math.isnan(row.low):
        return f"{row.estimate:.3g}"
    return f"{row.estimate:.3g} [{row.low:.3g}, {row.high:.3g}]"
