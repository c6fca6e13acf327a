"""One self-contained offline HTML5 page: prose, tables, figures and attributions side by side.

Every text goes through Jinja with autoescape on; the page has no script and its policy forbids any request.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pullback.viz.draw import draw, kind_of, point_of, tokens_of
from pullback.viz.drawing import as_array
from pullback.viz.image import displayable, heat_colours
from pullback.viz.tokens import html_spans

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure as MatplotlibFigure

    from pullback.result import Attribution

__all__ = [
    "Attributions",
    "Figure",
    "Prose",
    "Section",
    "Table",
    "Tokens",
    "environment",
    "fragment",
    "write_report",
]

_LARGEST_PICTURE = 320  # pixels a side: larger maps are averaged down for the page


@dataclass(frozen=True)
class Prose:
    """Paragraphs, separated by empty lines."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows under column names; numbers are shown to four digits, None as a dash."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A matplotlib figure, embedded as a picture that the caption describes."""

    caption: str
    figure: MatplotlibFigure


@dataclass(frozen=True)
class Attributions:
    """The same examples under several methods, side by side, with what each method cost and guarantees."""

    caption: str
    attributions: Mapping[str, Attribution]
    examples: int = 16
    bands: Any = None  # marked on frequency axes: a Bands, or name -> (low, high)


@dataclass(frozen=True)
class Tokens:
    """Strips of tokens on the colours of their signed values, each strip under its name."""

    caption: str
    strips: Sequence[tuple[str, Sequence[str], Sequence[float]]]
    note: str = ""


Section = Prose | Table | Figure | Attributions | Tokens


def write_report(
    path: str | os.PathLike[str], sections: Sequence[Section], title: str = "pullback report"
) -> None:
    """Write ``sections`` as one HTML file that needs nothing else, network included."""
    page = (
        environment()
        .get_template("report.html.j2")
        .render(title=title, sections=[_prepared(s) for s in sections])
    )
    Path(path).write_text(page, encoding="utf-8", errors="backslashreplace", newline="\n")


def fragment(attribution: Attribution) -> str:
    """HTML for a notebook cell: up to four examples of one attribution."""
    section = _prepared(Attributions("", {attribution.method: attribution}, examples=4))
    return environment().get_template("attribution.html.j2").render(section=section)


@lru_cache(maxsize=1)
def environment() -> Environment:
    """The templates of the package, autoescaped whatever their name; an unknown variable is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("pullback.viz"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


# ---------------------------------------------------------------------- what the templates are given


def _prepared(section: Section) -> dict[str, Any]:
    if isinstance(section, Prose):
        return {"kind": "prose", "paragraphs": [part for part in section.text.split("\n\n") if part.strip()]}
    if isinstance(section, Table):
        return {"kind": "table", **_table(section)}
    if isinstance(section, Figure):
        return {"kind": "figure", "caption": section.caption, "picture": _figure_png(section.figure)}
    if isinstance(section, Tokens):
        strips = [
            {"name": name, "spans": html_spans(tokens, values, percentile=100.0)}
            for name, tokens, values in section.strips
        ]
        return {"kind": "tokens", "caption": section.caption, "note": section.note, "strips": strips}
    return {"kind": "attributions", **_attributions(section)}


def _table(table: Table) -> dict[str, Any]:
    numeric = [
        all(isinstance(row[i], int | float) or row[i] is None for row in table.rows) and bool(table.rows)
        for i in range(len(table.columns))
    ]
    rows = [[_cell(value) for value in row] for row in table.rows]
    columns = list(zip(map(str, table.columns), numeric, strict=True))
    return {"caption": table.caption, "columns": columns, "rows": rows, "note": table.note}


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _attributions(section: Attributions) -> dict[str, Any]:
    methods = section.attributions
    shown = min([section.examples, *map(len, methods.values())]) if methods else 0
    columns: tuple[str, ...] = ("name", "method", "score", "gap", "evaluations", "converged", "seconds")
    rows: list[tuple[object, ...]] = [
        (
            name,
            attribution.method,
            _range(attribution.score),
            _range(attribution.diagnostics.get("gap")),
            _range(attribution.diagnostics.get("evaluations")),
            _converged(attribution.diagnostics.get("converged")),
            attribution.diagnostics.get("seconds", attribution.meta.get("seconds")),
        )
        for name, attribution in methods.items()
    ]
    if all(name == attribution.method for name, attribution in methods.items()):
        columns, rows = columns[1:], [row[1:] for row in rows]
    notes = [
        (name, str(note))
        for name, attribution in methods.items()
        for note in attribution.diagnostics.get("notes") or ()
    ]
    return {
        "caption": section.caption,
        "examples": [_example(methods, row, section.bands) for row in range(shown)],
        "left_out": max([0, *map(len, methods.values())]) - shown,
        "table": _table(Table("", columns, rows)),
        "notes": notes,
        "coverage": _coverage(methods),
        "sites": sorted({f"{a.site} in {a.domain}" if a.domain else a.site for a in methods.values()}),
    }


def _example(methods: Mapping[str, Attribution], row: int, bands: Any) -> dict[str, Any]:
    first = next(iter(methods.values()))
    pictures: list[dict[str, Any]] = []
    strips: list[dict[str, Any]] = []
    for name, attribution in methods.items():
        leaves = attribution.leaves()
        for leaf, values in leaves.items():
            label = f"{name} · {leaf}" if len(leaves) > 1 else name
            kind = kind_of(attribution, values)
            if kind == "tokens":
                tokens = (tokens_of(attribution, values) or [])[row]
                strips.append({"name": label, "spans": html_spans(tokens, values[row][: len(tokens)])})
                continue
            if kind == "image":
                colours = _shrunk(heat_colours(values[row]))
                pictures.append({"name": label, "wide": False, "data": _png(colours)})
                continue
            axes = draw(attribution, None, row, leaf, bands)
            pictures.append({"name": label, "wide": True, "data": _figure_png(axes.get_figure(root=True))})
    inputs = [
        {"name": f"input · {leaf}" if len(first.leaves()) > 1 else "input", "wide": False, "data": data}
        for leaf, values in first.leaves().items()
        if kind_of(first, values) == "image" and (data := _input_png(first, leaf, row)) is not None
    ]
    labels = list(dict.fromkeys(attribution.labels[row] for attribution in methods.values()))
    scores = float(first.score[row])
    return {
        "number": row,
        "label": "; ".join(labels),
        "score": f"{scores:.5g}",
        "pictures": inputs + pictures,
        "strips": strips,
    }


def _input_png(attribution: Attribution, leaf: str, row: int) -> str | None:
    point = point_of(attribution, leaf)
    if point is None or point.ndim not in (3, 4) or (point.ndim == 4 and point.shape[1] not in (1, 3)):
        return None
    return _png(_shrunk(displayable(point[row])))


def _range(values: object) -> object:
    """One number as it is; several as their range."""
    if not isinstance(values, Tensor):
        return values
    numbers = as_array(values).reshape(-1)
    if not numbers.size:
        return None
    low, high = f"{numbers.min():.4g}", f"{numbers.max():.4g}"
    return low if low == high else f"{low} to {high}"


def _converged(value: object) -> object:
    if isinstance(value, Tensor):
        count = int(value.sum())
        return bool(count) if value.numel() == 1 else f"{count} of {value.numel()}"
    return value


def _coverage(methods: Mapping[str, Attribution]) -> list[tuple[str, str, str]]:
    found = []
    for name, attribution in methods.items():
        coverage = attribution.diagnostics.get("coverage")
        if isinstance(coverage, Mapping):
            found += [(name, str(key), str(value)) for key, value in coverage.items()]
    return found


def _shrunk(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    height, width = colours.shape[:2]
    if max(height, width) <= _LARGEST_PICTURE:
        return colours
    factor = _LARGEST_PICTURE / max(height, width)
    channels = torch.from_numpy(np.ascontiguousarray(colours)).permute(2, 0, 1)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return np.asarray(torch.nn.functional.adaptive_avg_pool2d(channels, size).permute(1, 2, 0).numpy())


def _png(colours: NDArray[np.float64]) -> str:
    from matplotlib.image import imsave

    stream = io.BytesIO()
    imsave(stream, np.clip(colours, 0.0, 1.0), format="png", metadata={"Software": ""})
    return base64.b64encode(stream.getvalue()).decode("ascii")


def _figure_png(figure: object) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=144, facecolor="white", metadata={"Software": None})  # type: ignore[attr-defined]
    return base64.b64encode(stream.getvalue()).decode("ascii")
