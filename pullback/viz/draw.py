"""Which picture shows an attribution, by what it is attributed to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from pullback.core.errors import InputError
from pullback.viz.curves import bars
from pullback.viz.domain import DomainKind, domain_kind, draw_in_domain
from pullback.viz.image import heat_map
from pullback.viz.series import series
from pullback.viz.tokens import token_strip

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pullback.result import Attribution

__all__ = ["Kind", "draw", "kind_of", "point_of", "tokens_of"]

Kind = Literal["tokens", "image", "series", "bars"] | DomainKind
_MOST_BARS = 24
_MOST_CHANNELS = 16


def kind_of(attribution: Attribution, leaf: Tensor) -> Kind:
    """What a domain's coordinates call for; tokens where there is one for each place; images; series; else bars.

    (C, H, W) and (H, W) are images, (T,) and (C, T) series. Two dimensions are a series if the first is at most 16
    and under a quarter of the second; up to 24 numbers in one dimension are bars.
    """
    if (in_domain := domain_kind(attribution, leaf)) is not None:
        return in_domain
    if tokens_of(attribution, leaf) is not None:
        return "tokens"
    shape = leaf.shape[1:]
    if len(shape) == 3 and min(shape[1:]) > 1:
        return "image"
    if len(shape) == 2 and shape.numel() > _MOST_BARS:
        return "series" if shape[0] <= _MOST_CHANNELS and 4 * shape[0] < shape[1] else "image"
    if len(shape) == 2 and min(shape) > 1:
        return "image"
    return "series" if len(shape) == 1 and shape[0] > _MOST_BARS else "bars"


def tokens_of(attribution: Attribution, leaf: Tensor) -> list[list[str]] | None:
    """The tokens of each example, if ``leaf`` (B, T, ...) has exactly the places for the longest of them."""
    tokens = attribution.tokens
    if not tokens or leaf.ndim < 2 or len(tokens) != len(leaf) or max(map(len, tokens)) != leaf.shape[1]:
        return None
    return tokens


def point_of(attribution: Attribution, name: str) -> Tensor | None:
    """The real value at the site that belongs to a leaf; None for coefficients of a complex domain."""
    point = attribution.point if isinstance(attribution.point, Tensor) else attribution.point.get(name)
    return None if point is None or point.is_complex() else point


def draw(
    attribution: Attribution,
    ax: Axes | None = None,
    example: int = 0,
    leaf: str | None = None,
    bands: Any = None,
) -> Axes:
    """One example of one leaf on Axes; the leaf is named where there are several. Bands mark a frequency axis."""
    leaves = attribution.leaves()
    if leaf is None and len(leaves) > 1:
        raise InputError(
            f"Several leaves are explained; name one: leaf={' or leaf='.join(map(repr, leaves))}."
        )
    name = next(iter(leaves)) if leaf is None else leaf
    if name not in leaves:
        raise InputError(f"No values for leaf {name!r}; there are {', '.join(map(repr, leaves))}.")
    if not -len(attribution) <= example < len(attribution):
        raise InputError(f"No example {example}; there are {len(attribution)}, counted from 0.")
    values = leaves[name][example]
    kind = kind_of(attribution, leaves[name])
    if kind in ("spectrum", "time-frequency", "levels", "components"):
        named = getattr(bands, "bands", bands)  # a Bands object holds the mapping
        return draw_in_domain(attribution, kind, example, ax, named)
    if kind == "tokens":
        tokens = (tokens_of(attribution, leaves[name]) or [])[example]
        return token_strip(tokens, values[: len(tokens)], ax)
    if kind == "image":
        return heat_map(values, ax)
    if kind == "series":
        point = point_of(attribution, name)
        fits = point is not None and point.ndim in (2, 3) and point.shape[-1] == values.shape[-1]
        return series(values, point[example] if point is not None and fits else None, ax)
    flat = values.reshape(-1)
    shown = flat.abs().nan_to_num().topk(min(_MOST_BARS, flat.numel())).indices.sort().values
    names = (attribution.meta.get("coordinates") or {}).get("names") or ()
    named = names if len(names) == flat.numel() else [str(index) for index in range(flat.numel())]
    return bars([named[index] for index in shown.tolist()], flat[shown], ax=ax)
