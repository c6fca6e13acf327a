"""Partly masked examples: ranks are stored once, and every mask is a comparison made per mini-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pullback.core.errors import InputError

__all__ = ["Examples", "Shown", "Side", "View"]

Side = Literal["top", "bottom"]


@dataclass(frozen=True)
class View:
    """What one model sees of each example: the first ("top") or last ("bottom") ``keep`` parts of an order.

    ``order``: a name in ``Examples.ranks``; None is the whole example.
    """

    order: str | None = None
    keep: int = 0
    side: Side = "top"


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples ``x`` (n, *S) with classes ``y`` (n,), orders of their parts, and what a masked part becomes.

    ``ranks``: by name, (n, P) with P parts in the order of x's elements, 0 the first; P divides the number of elements
    when channels (dimension 1) are masked together. ``fill``: a number, or a tensor that broadcasts to S.

    Raises ``InputError`` when shapes do not fit.

    >>> ranks = {"left first": torch.tensor([[0, 1, 2]])}
    >>> examples = Examples(torch.tensor([[5.0, 6.0, 7.0]]), torch.tensor([0]), ranks)
    >>> examples.seen(torch.tensor([0]), View("left first", keep=2))
    tensor([[5., 6., 0.]])
    """

    x: Tensor
    y: Tensor
    ranks: Mapping[str, Tensor] = field(default_factory=dict)
    fill: float | Tensor = 0.0

    def __post_init__(self) -> None:
        if not len(self.x) or self.y.shape != self.x.shape[:1]:
            raise InputError(
                f"x of shape {tuple(self.x.shape)} and y of shape {tuple(self.y.shape)} were given. Expected "
                "(n, ...), (n,)."
            )
        elements = self.x[0].numel()
        for name, rank in self.ranks.items():
            if rank.ndim != 2 or len(rank) != len(self.x) or rank.shape[1] not in (elements, self._pixels()):
                raise InputError(
                    f"Ranks {name!r} of shape {tuple(rank.shape)} were given. Expected ({len(self.x)}, {elements}), "
                    "or one rank per pixel."
                )

    def __len__(self) -> int:
        return len(self.x)

    def seen(self, rows: Tensor, view: View) -> Tensor:
        """These rows (B,) as one view shows them: (B, *S)."""
        points = self.x[rows]
        if view.order is None:
            return points
        return self._shown(points, self._gathered(view, rows), view, torch.empty_like(points))

    def seen_by(
        self, rows: Tensor, views: Sequence[View], whose: Sequence[int], out: Tensor | None = None
    ) -> Tensor:
        """What E views show, (E, B, *S): view e of the rows ``rows[whose[e]]``, of rows (R, B).

        ``out``: memory to write to, used where its shape fits; fresh pages cost more than the masks.
        """
        if self.x.device.type != "cpu":
            return self._seen_at_once(rows, views, whose)
        # one member after the other stays in the cache, which is several times faster than whole tensors
        shape = (len(views), rows.shape[1], *self.x.shape[1:])
        if out is None or out.shape != shape:
            out = self.x.new_empty(shape)
        points = [self.x.index_select(0, part) for part in rows]
        ranks: dict[tuple[str | None, int], Tensor] = {}
        for shown, view, number in zip(out, views, whose, strict=True):
            if view.order is None:
                shown.copy_(points[number])
                continue
            key = (view.order, number)
            if key not in ranks:
                ranks[key] = self._gathered(view, rows[number])
            self._shown(points[number], ranks[key], view, shown)
        return out

    def write(self, view: View, out: Tensor) -> None:
        """All examples as one view shows them, into ``out`` (n, *S)."""
        if view.order is None:
            out.copy_(self.x)
        else:
            self._shown(self.x, self._rank(view).float(), view, out)

    def part(self, rows: Tensor) -> Examples:
        """These rows alone."""
        ranks = {name: rank[rows] for name, rank in self.ranks.items()}
        return Examples(self.x[rows], self.y[rows], ranks, self.fill)

    def _seen_at_once(self, rows: Tensor, views: Sequence[View], whose: Sequence[int]) -> Tensor:
        each = rows[torch.tensor(whose, device=rows.device)]
        points = self.x[each]
        masked = [number for number, view in enumerate(views) if view.order is not None]
        if masked:
            ranks = [self._gathered(views[number], each[number]) for number in masked]
            # the bottom is the top of the order read backwards
            ahead = torch.stack(
                [
                    rank if views[number].side == "top" else rank.shape[1] - 1 - rank
                    for rank, number in zip(ranks, masked, strict=True)
                ]
            )
            keep = torch.tensor([views[number].keep for number in masked], device=rows.device)
            points[masked] = torch.where(
                self._spread(ahead < keep[:, None, None]), points[masked], self._fill()
            )
        return points

    def _gathered(self, view: View, rows: Tensor) -> Tensor:
        # comparisons of float32 vectorise; it holds every rank below 2^24 exactly
        return self._rank(view).index_select(0, rows).float()

    def _shown(self, points: Tensor, rank: Tensor, view: View, out: Tensor) -> Tensor:
        """Into ``out``: x where the view keeps it, the fill elsewhere.

        Products with 0 and 1 are as exact as a selection, and vectorise.
        """
        filled = isinstance(self.fill, Tensor) or self.fill != 0
        whole = rank.shape[1] == self.x[0].numel() and not filled
        kept = out.view(rank.shape) if whole else torch.empty(rank.shape, dtype=out.dtype, device=out.device)
        if view.side == "top":
            torch.lt(rank, view.keep, out=kept)
        else:
            torch.ge(rank, rank.shape[1] - view.keep, out=kept)
        if whole:
            return out.mul_(points)
        kept = self._spread(kept)
        torch.mul(points, kept, out=out)
        return out.addcmul_(kept.neg_().add_(1), self._fill()) if filled else out

    def _rank(self, view: View) -> Tensor:
        if view.order is None or view.order not in self.ranks:
            raise InputError(f"The order {view.order!r} was given. Expected one of {sorted(self.ranks)}.")
        return self.ranks[view.order]

    def _pixels(self) -> int:
        shape = self.x.shape[1:]
        return self.x[0].numel() // shape[0] if len(shape) > 1 and shape[0] else self.x[0].numel()

    def _spread(self, kept: Tensor) -> Tensor:
        shape = self.x.shape[1:]
        if kept.shape[-1] != self.x[0].numel():
            return kept.reshape(*kept.shape[:-1], 1, *shape[1:])
        return kept.reshape(*kept.shape[:-1], *shape)

    def _fill(self) -> Tensor:
        return torch.as_tensor(self.fill, dtype=self.x.dtype, device=self.x.device)


class Shown:
    """What each of E members sees of the examples, batch by batch.

    What every distinct view shows of all examples is written down once where that takes at most ``memory`` bytes; a
    batch is then one selection of rows, several times faster than masks made anew at every step.
    """

    def __init__(self, examples: Examples, views: Sequence[View], whose: Sequence[int], memory: int) -> None:
        device = examples.x.device
        distinct = list(dict.fromkeys(views))
        self._examples, self._views, self._whose = examples, views, whose
        self.count = len(views)
        self._row_of = torch.tensor(whose, device=device)
        self._first = torch.tensor([distinct.index(view) * len(examples) for view in views], device=device)
        self._written: Tensor | None = None
        self._held: Tensor | None = None
        self.bytes = len(distinct) * examples.x.numel() * examples.x.element_size()
        if self.bytes > memory:
            self.bytes = 0
            return
        self._written = examples.x.new_empty(len(distinct) * len(examples), *examples.x.shape[1:])
        for part, view in zip(self._written.split(len(examples)), distinct, strict=True):
            examples.write(view, part)

    def batch(self, rows: Tensor) -> Tensor:
        """(E, B, *S): member e sees ``rows[whose[e]]`` of (R, B), or all of (B,); the next call may overwrite it."""
        shape = (self.count, rows.shape[-1], *self._examples.x.shape[1:])
        # fresh pages cost more than the selection
        if self._held is None or self._held.shape != shape:
            self._held = self._examples.x.new_empty(shape)
        if self._written is None:
            whose = self._whose if rows.ndim == 2 else [0] * self.count
            return self._examples.seen_by(rows.view(-1, shape[1]), self._views, whose, self._held)
        places = self._first[:, None] + (rows[self._row_of] if rows.ndim == 2 else rows)
        torch.index_select(self._written, 0, places.flatten(), out=self._held.flatten(0, 1))
        return self._held
