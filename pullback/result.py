"""What an explanation is: signed values at a site, the question they answer, and how far to trust them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from pullback.core.errors import FormatError, InputError
from pullback.storage import read, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

__all__ = ["SCHEMA_VERSION", "Attribution", "chosen_rows", "load"]

SCHEMA_VERSION = 1
_FORMAT = "pullback.Attribution"
_SEEN_BESIDE = frozenset({"signal", "parts"})  # what a domain's pictures show, whatever the values

Leaves = Tensor | dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Attribution:
    """The attribution of one score per example to the values at a site.

    ``values`` (B, *S) real, signed and raw: never abs-ed, clipped or scaled; ``point`` the value at the
    site (complex in some domains); ``target`` (B,) indices, or labels; ``score`` (B,); ``method`` as spelled
    on the command line. ``diagnostics``: ``gap`` (B,) in units of the score, ``converged``, ``evaluations``,
    ``coverage``, ``notes``; a tensor in it whose first dimension is B is per example. ``meta``: JSON-able
    (model, versions, labels, tokens).

    >>> one = torch.tensor([[1.0, -2.0]])
    >>> a = Attribution(one, one, torch.tensor([0]), one.sum(1), "Gradient()", "input", None, {}, {})
    >>> a.sum(1).values
    tensor([-1.])
    """

    values: Leaves
    point: Leaves
    target: Tensor | tuple[str, ...]
    score: Tensor
    method: str
    site: str
    domain: str | None
    diagnostics: Mapping[str, Any]
    meta: Mapping[str, Any]

    def __post_init__(self) -> None:
        leaves = self.leaves()
        if not leaves:
            raise InputError("An Attribution needs at least one tensor of values; got an empty dict.")
        for name, leaf in leaves.items():
            if leaf.is_complex():
                raise InputError(f"Values {name!r} are {leaf.dtype}; attribution values are real.")
            if leaf.ndim == 0 or leaf.shape[0] != len(self.score):
                raise InputError(
                    f"Values {name!r} have shape {tuple(leaf.shape)}, but there are {len(self.score)} "
                    f"scores; expected ({len(self.score)}, ...): the first dimension counts examples."
                )
        if self.score.ndim != 1 or len(self.target) != len(self.score):
            raise InputError(
                f"Expected one score and one target per example; got scores {tuple(self.score.shape)} "
                f"and {len(self.target)} targets."
            )

    def __len__(self) -> int:
        return len(self.score)

    def __iter__(self) -> Iterator[Attribution]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Attribution:
        """The examples at ``index`` (int, slice, bool or long tensor), everything per-example cut along."""
        rows = chosen_rows(index, len(self))
        chosen = rows.tolist()
        target = self.target
        meta = dict(self.meta)
        for name in ("labels", "tokens"):
            listed = meta.get(name)
            if isinstance(listed, list | tuple) and len(listed) == len(self):
                meta[name] = [listed[row] for row in chosen]
        return replace(
            self,
            values=_cut(self.values, rows, len(self)),
            point=_cut(self.point, rows, len(self)),
            target=_cut(target, rows, len(self))
            if isinstance(target, Tensor)
            else tuple(target[row] for row in chosen),
            score=_cut(self.score, rows, len(self)),
            diagnostics=_cut(dict(self.diagnostics), rows, len(self)),
            meta=meta,
        )

    def leaves(self) -> dict[str, Tensor]:
        """The values by leaf name; a single tensor goes by the name of the site."""
        return dict(self.values) if isinstance(self.values, Mapping) else {self.site: self.values}

    @property
    def tokens(self) -> list[list[str]] | None:
        """The tokens of each example, where the input was text."""
        return self.meta.get("tokens")

    @property
    def labels(self) -> list[str]:
        """What is explained, one text per example: the recorded label, else the target."""
        recorded = self.meta.get("labels")
        if isinstance(recorded, list | tuple) and len(recorded) == len(self):
            return [str(label) for label in recorded]
        return [
            str(target)
            for target in (self.target.tolist() if isinstance(self.target, Tensor) else self.target)
        ]

    # ------------------------------------------------------------------ views

    def sum(self, dim: int | tuple[int, ...], keepdim: bool = False) -> Attribution:
        """Σ over ``dim``, counted in ``values`` with the batch as 0; 1 is an image's channels."""
        dims = (dim,) if isinstance(dim, int) else tuple(dim)
        for leaf in self.leaves().values():
            if wrong := [d for d in dims if not -leaf.ndim <= d < leaf.ndim or d % leaf.ndim == 0]:
                raise InputError(
                    f"Cannot sum values of shape {tuple(leaf.shape)} over {wrong[0]}: dimension 0 counts "
                    f"examples, which have different scores. Expected dimensions in 1..{leaf.ndim - 1}."
                )
        return self._view(lambda leaf: leaf.sum(dims, keepdim) if dims else leaf, None)

    def abs(self) -> Attribution:
        """|a|: how much each element matters, whichever way. No longer adds up to the score."""
        return self._view(torch.abs, "values are |a|: they do not add up to the score")

    def positive(self) -> Attribution:
        """max(a, 0): what speaks for the target. No longer adds up to the score."""
        return self._view(
            lambda leaf: leaf.clamp(min=0), "values are max(a, 0): they do not add up to the score"
        )

    def upsample(self, size: int | tuple[int, int], conserve: bool = False) -> Attribution:
        """Bilinear enlargement of (B, C, H, W) or (B, H, W) maps to ``size`` (pixels; an int is both sides).

        With ``conserve`` each value is spread over the pixels it reaches, so that every map keeps its sum;
        without, colours keep their level and the sum grows with the area.
        """
        height, width = (size, size) if isinstance(size, int) else size
        note = (
            None
            if conserve
            else "upsampled: values no longer add up to the score (conserve=True keeps the sum)"
        )
        return self._view(lambda leaf: _enlarge(leaf, height, width, conserve), note)

    def superpixels(
        self, image: Tensor | None = None, segments: int = 100, compactness: float = 10.0
    ) -> Attribution:
        """Σ a over the SLIC segment of each pixel; segments of ``image`` (B, C, H, W), ``point`` by default.

        Values become (B, H, W); ``diagnostics["segments"]`` holds the labels (B, H, W), from 0 per image.
        """
        values, point = self.values, self.point if image is None else image
        if not isinstance(values, Tensor) or not isinstance(point, Tensor):
            raise InputError(
                "superpixels needs one tensor of image values; this attribution has several leaves."
            )
        from pullback.viz.superpixels import superpixel_sums

        painted, labels = superpixel_sums(values, point, segments, compactness)
        view = self._view(lambda _: painted, "values are sums over superpixels, repeated at each pixel")
        return replace(view, diagnostics={**view.diagnostics, "segments": labels})

    def _view(self, change: Callable[[Tensor], Tensor], broken_sum: str | None) -> Attribution:
        """Changed values, without the diagnostics of the old ones: those of their shape, or of their sum."""
        stale = {"gap", "converged"} if broken_sum else set()
        shapes = {leaf.shape for leaf in self.leaves().values() if leaf.ndim > 1}
        kept: dict[str, Any] = {}
        for name, entry in self.diagnostics.items():
            held = entry.values() if isinstance(entry, Mapping) else (entry,)
            old = any(isinstance(one, Tensor) and one.shape in shapes for one in held)
            if name in _SEEN_BESIDE or (name not in stale and not old):
                kept[name] = entry
        if broken_sum:
            kept["notes"] = [*kept.get("notes", ()), broken_sum]
        return replace(self, values=_map(self.values, change), diagnostics=kept)

    def to_dataframe(self) -> DataFrame:
        """A pandas table: a row per (example, element), or per (example, token) with the token's sum."""
        from pullback.viz.table import dataframe

        return dataframe(self)

    # ------------------------------------------------------------------ seeing

    def plot(
        self,
        ax: Axes | None = None,
        example: int = 0,
        leaf: str | None = None,
        bands: Any = None,
    ) -> Axes:
        """One example on matplotlib Axes: a token strip, a heat map, a series or bars, by what it is.

        Coefficients of a domain are drawn as spectrum, time-frequency map, levels or components, without ``ax`` below
        their signal; ``bands`` (a ``Bands``, or name -> (low, high)) are marked on their frequency axis, in its unit.
        """
        from pullback.viz.draw import draw

        return draw(self, ax, example, leaf, bands)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """One self-contained offline HTML page."""
        from pullback.viz.report import Attributions, write_report

        write_report(path, [Attributions("", {self.method: self})], title=self.method)

    def _repr_html_(self) -> str:
        from pullback.viz.report import fragment

        return fragment(self)

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in self.leaves().values())
        return f"<Attribution {shapes} at {self.site!r} by {self.method}>"

    def __str__(self) -> str:
        shapes = "; ".join(
            (f"{name} " if isinstance(self.values, Mapping) else "")
            + f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
            for name, leaf in self.leaves().items()
        )
        targets = self.target.tolist() if isinstance(self.target, Tensor) else list(self.target)
        named = [
            label if str(target) == label else f'{target} "{label}"'
            for target, label in zip(targets, self.labels, strict=True)
        ]
        more = f", ... ({len(self)} examples)" if len(self) > 3 else ""
        scores = ", ".join(f"{score:.5g}" for score in self.score[:3].tolist())
        return (
            f"values {shapes} at {self.site!r}" + (f" in {self.domain}" if self.domain else "") + "\n"
            f"target {', '.join(named[:3])}{more}; score {scores}{more and ', ...'}\n"
            f"method {self.method}" + "".join(f"; {part}" for part in _trust(self))
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """One safetensors file: tensors and a JSON document, no code. Replaces ``path`` at once."""
        write(path, _FORMAT, SCHEMA_VERSION, {name: getattr(self, name) for name in _FIELDS})


_FIELDS = ("values", "point", "target", "score", "method", "site", "domain", "diagnostics", "meta")


def load(path: str | os.PathLike[str]) -> Attribution:
    """What ``Attribution.save`` wrote to ``path``, on the CPU; ``FormatError`` for any other file."""
    fields = read(path, _FORMAT, SCHEMA_VERSION, "Attribution.save()")
    try:
        return _checked({name: fields[name] for name in _FIELDS})
    except (KeyError, InputError, FormatError) as error:
        raise FormatError(
            f"{path} is damaged: {error}; expected a file written by Attribution.save()."
        ) from error


def _checked(fields: dict[str, Any]) -> Attribution:
    def is_leaves(value: object) -> bool:
        return isinstance(value, Tensor) or (
            isinstance(value, dict) and all(isinstance(leaf, Tensor) for leaf in value.values())
        )

    target, domain = fields["target"], fields["domain"]
    sound = {
        "values": is_leaves(fields["values"]),
        "point": is_leaves(fields["point"]),
        "target": isinstance(target, Tensor)
        or (isinstance(target, tuple) and all(isinstance(label, str) for label in target)),
        "score": isinstance(fields["score"], Tensor) and fields["score"].ndim == 1,
        "method": isinstance(fields["method"], str),
        "site": isinstance(fields["site"], str),
        "domain": domain is None or isinstance(domain, str),
        "diagnostics": isinstance(fields["diagnostics"], dict),
        "meta": isinstance(fields["meta"], dict),
    }
    if wrong := [name for name, right in sound.items() if not right]:
        raise FormatError(f"field {wrong[0]!r} has the wrong type {type(fields[wrong[0]]).__name__}")
    return Attribution(**fields)


def _map(leaves: Leaves, change: Callable[[Tensor], Tensor]) -> Leaves:
    return (
        {name: change(leaf) for name, leaf in leaves.items()}
        if isinstance(leaves, Mapping)
        else change(leaves)
    )


def chosen_rows(index: int | slice | list[int] | Tensor, count: int) -> Tensor:
    """The rows (n,) of ``count`` that an index means, which is an int, a slice, a list, or a bool or long tensor."""
    if isinstance(index, int) and not isinstance(index, bool):
        if not -count <= index < count:
            raise IndexError(f"example {index} of {count}")
        return torch.tensor([index % count])
    if isinstance(index, slice):
        return torch.tensor(range(count)[index], dtype=torch.long)
    chosen = torch.as_tensor(index).cpu()
    chosen = chosen.long() if chosen.numel() == 0 and chosen.dtype != torch.bool else chosen
    if chosen.ndim != 1 or chosen.dtype not in (torch.bool, torch.int64, torch.int32):
        raise InputError(
            f"Cannot index {count} examples with {chosen.dtype} of shape {tuple(chosen.shape)}; expected an "
            f"int, a slice, a bool tensor ({count},) or a long tensor (n,)."
        )
    return torch.arange(count)[chosen if chosen.dtype == torch.bool else chosen.long()]


def _cut(value: Any, rows: Tensor, count: int) -> Any:
    """Tensors with ``count`` rows, at any depth of dicts, cut to ``rows``; everything else as it is."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim and value.shape[0] == count else value
    if isinstance(value, Mapping):
        return {key: _cut(item, rows, count) for key, item in value.items()}
    return value


def _enlarge(maps: Tensor, height: int, width: int, conserve: bool) -> Tensor:
    if maps.ndim not in (3, 4) or height < maps.shape[-2] or width < maps.shape[-1]:
        raise InputError(
            f"Cannot upsample values {tuple(maps.shape)} to {(height, width)}; expected (B, C, H, W) or "
            f"(B, H, W) and a size at least as large."
        )
    channels = maps if maps.ndim == 4 else maps[:, None]
    if conserve:
        for axis, size in ((-2, height), (-1, width)):
            # how much of the result each row (column) reaches: the column sums of the interpolation matrix
            spread = torch.eye(maps.shape[axis], dtype=maps.dtype, device=maps.device)[None]
            reach = functional.interpolate(spread, size=size, mode="linear", align_corners=False).sum(-1)[0]
            channels = channels / (reach[:, None] if axis == -2 else reach)
    large = functional.interpolate(channels, size=(height, width), mode="bilinear", align_corners=False)
    return large if maps.ndim == 4 else large[:, 0]


def _trust(attribution: Attribution) -> list[str]:
    """The parts of the third line: completeness gap, evaluations, notes."""
    diagnostics, parts = attribution.diagnostics, []
    gap = diagnostics.get("gap")
    if isinstance(gap, Tensor) and gap.is_floating_point() and gap.shape == (len(attribution),) and len(gap):
        worst = int(gap.abs().argmax())
        text = f"gap {gap.abs()[worst].item():.2g}"
        rows = [leaf[worst].double() for leaf in attribution.leaves().values()]
        total, mass = abs(sum(float(row.sum()) for row in rows)), sum(float(row.abs().sum()) for row in rows)
        # relative to a sum that all but cancels, any gap looks huge: then only the absolute one is shown
        parts.append(
            text + (f" ({gap.abs()[worst].item() / total:.2g} of the sum)" if total > 1e-3 * mass else "")
        )
    evaluations = diagnostics.get("evaluations")
    if isinstance(evaluations, Tensor) and evaluations.numel():
        low, high = int(evaluations.min()), int(evaluations.max())
        parts.append(f"{low} to {high} evaluations" if low != high else f"{low} evaluations")
    elif isinstance(evaluations, int):
        parts.append(f"{evaluations} evaluations")
    notes = diagnostics.get("notes")
    notes = notes if isinstance(notes, list | tuple) else []
    return parts + ([f"{len(notes)} note{'s' if len(notes) > 1 else ''}"] if notes else [])
