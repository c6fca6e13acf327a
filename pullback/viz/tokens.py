"""Attributions to tokens: a wrapped strip of coloured words on Axes, or as HTML."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pullback.core.errors import InputError
from pullback.viz.drawing import NEGATIVE, POSITIVE, as_array, colour_map, new_axes, symmetric_scale

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

__all__ = ["html_spans", "readable", "token_strip"]

_POINTS_PER_COLUMN = 0.602  # the width of a DejaVu Sans Mono character, in units of the font size
_OPACITY = 0.6  # of the strongest colour behind HTML text: page text stays readable on it, light or dark


def readable(token: str) -> str:
    """A token as a person writes it: tokenisers' marks for space and newline replaced, controls visible.

    >>> readable("ĠParis"), readable("▁Rome"), readable("a\\n")
    (' Paris', ' Rome', 'a↵')
    """
    shown = token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "↵").replace("\n", "↵").replace("\t", "→")
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") else "�" for c in shown)


def token_strip(
    tokens: Sequence[str], values: Tensor | ArrayLike, ax: Axes | None = None, percentile: float = 99.0
) -> Axes:
    """Words in reading order, wrapped to the width of the Axes, each on the colour of its signed value.

    ``values`` (T,) or (T, D), summed over D.
    """
    array = _per_token(tokens, values)
    words = [readable(token) for token in tokens]
    size, owned = 11.0, ax is None
    if ax is None:
        columns = int(6.3 * 72 / (_POINTS_PER_COLUMN * size))
        ax = new_axes(6.5, 0.2 + 1.7 * size / 72 * (_wrap(words, columns)[-1][0] + 1 if words else 1))
    box = ax.get_window_extent()
    width, height = (extent / ax.get_figure(root=True).dpi * 72 for extent in (box.width, box.height))  # type: ignore[union-attr]
    columns = max(8, int(width / (_POINTS_PER_COLUMN * size)))
    places = _wrap(words, columns)
    while not owned and size > 4 and places and (places[-1][0] + 1) * 1.7 * size > height:
        size -= 0.5
        columns = max(8, int(width / (_POINTS_PER_COLUMN * size)))
        places = _wrap(words, columns)
    colours = colour_map(signed=True)(
        np.ma.masked_invalid(0.5 + 0.5 * np.clip(array / symmetric_scale(array, percentile), -1, 1))
    )
    for word, (row, column, cells), colour in zip(words, places, colours, strict=True):
        _draw_word(ax, _fit(word, cells), row, column, cells, colour, size)
    ax.set_xlim(0, columns)
    ax.set_ylim(places[-1][0] + 1 if places else 1, 0)
    ax.set_axis_off()
    return ax


def html_spans(tokens: Sequence[str], values: Tensor | ArrayLike, percentile: float = 99.0) -> Markup:
    """The same as HTML, one ``<span>`` a token, every text escaped by the template."""
    from markupsafe import Markup

    from pullback.viz.report import environment

    array = _per_token(tokens, values)
    scale = symmetric_scale(array, percentile)
    spans = []
    for token, value in zip(tokens, array, strict=True):
        red, green, blue = (128, 128, 128) if not np.isfinite(value) else POSITIVE if value > 0 else NEGATIVE
        opacity = _OPACITY * (min(1.0, abs(value) / scale) if np.isfinite(value) else 0.5)
        spans.append(
            {
                "text": readable(token),
                "colour": f"rgba({red},{green},{blue},{opacity:.3f})",
                "value": f"{value:+.4g}",
                "breaks": "\n" in token or "Ċ" in token,
            }
        )
    return Markup(environment().get_template("tokens.html.j2").render(spans=spans))


def _per_token(tokens: Sequence[str], values: Tensor | ArrayLike) -> NDArray[np.float64]:
    array = as_array(values)
    array = array.reshape(len(array), -1).sum(1) if array.ndim > 1 else array
    if array.ndim != 1 or len(array) != len(tokens):
        raise InputError(f"Expected one value for each of {len(tokens)} tokens; got values {array.shape}.")
    return array


def _cells(text: str) -> int:
    """Columns of a monospaced line: East Asian wide characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def _wrap(words: Sequence[str], columns: int) -> list[tuple[int, int, int]]:
    """(row, first column, columns) of each word."""
    places, row, column = [], 0, 0
    for word in words:
        cells = min(max(1, _cells(word)), columns)
        if column and column + cells > columns:
            row, column = row + 1, 0
        places.append((row, column, cells))
        column += cells
        if word.endswith("↵"):
            row, column = row + 1, 0
    return places


def _fit(word: str, cells: int) -> str:
    if _cells(word) <= cells:
        return word
    while word and _cells(word) > cells - 1:
        word = word[:-1]
    return word + "…"


def _draw_word(
    ax: Axes, word: str, row: int, column: int, cells: int, colour: NDArray[np.float64], size: float
) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(
        Rectangle((column, row + 0.08), cells, 0.84, facecolor=colour, edgecolor="white", linewidth=0.4)
    )
    dark = float(colour[:3] @ [0.299, 0.587, 0.114]) < 0.5
    ax.text(
        column,
        row + 0.5,
        word,
        color="white" if dark else "black",
        fontsize=size,
        family="DejaVu Sans Mono",
        va="center_baseline",
        clip_on=True,
        parse_math=False,  # a token "$" is a dollar, not mathematics
    )
