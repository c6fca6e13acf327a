"""FullGrad: input gradients and bias gradients of every layer as one map (Srinivas and Fleuret 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from ..core.errors import MethodError
from ..core.points import Point
from ..core.problem import Problem
from .fullgrad_terms import FullGradTerms, Grids, Keeping, Recording, fullgrad_terms, joined, record
from .implicit_bias.parts import ImplicitBias
from .implicit_bias.recorder import Contribution, Keep
from .implicit_bias.sums import real_product

__all__ = ["FullGrad", "FullGradTerms", "area_weights", "fullgrad_terms"]


@dataclass(frozen=True)
class FullGrad:
    """Input gradients and the gradients of every implicit bias, brought to the input's resolution and summed.

    ``S = Σ_c ψ(x ⊙ ∇f) + Σ_v U Σ_c ψ(δ_v ⊙ b_v)`` over operations v whose result has places: ``b = y - J x`` is
    the bias of linear layers and what smooth operations, norms and attention leave to it elsewhere. U resizes.

    Args:
        psi: "abs", the default, keeps the size of each term; "minmax" scales each term of each example to
            [0, 1] (the paper's code; a map of many small operations then shows noise as large as signal);
            "identity" keeps the sign, so that the map adds up.
        upsample: "bilinear" (the paper's code), or "area", which shares every value evenly over the pixels it
            covers and so preserves its sum.
        align_corners: how bilinear places the corners.
        biases: "full", or "simple": δ in place of δ ⊙ b, at convolutions, linear layers and batch norms that
            have a bias (Simple FullGrad; nothing adds up).
        channel_dim: which dimension of the point holds channels; None is 1, and -1 at token embeddings.

    Call:
        problem -> (B, 1, ...), or (B, T, 1) for tokens, at the point's resolution; (B, F) for a flat point,
        which has no places for biases. Results shaped (B, C, h, w) or (B, h, w, C) on a grid that some
        convolution gave count as places, and tokens of such a grid behind at most five prefix tokens; for
        token points, results with a dimension of T. With ``psi="identity", upsample="area"`` the map sums to
        ``score - outside - residual``, both in the diagnostics as ``fullgrad_outside`` and
        ``fullgrad_residual``: (B,), the terms without places and what no term explains.

    Raises:
        MethodError: an unknown option, several explained input leaves, a domain, or a plain callable.

    Cost: one forward and one backward pass, 1.1 to 1.5 times the plain ones. Deterministic. ``SmoothGrad(FullGrad())``
    averages maps.

    Source: Srinivas and Fleuret 2019, eq. 6; the general theorem is in docs of ``fullgrad_terms``.

    Example:
        >>> import torch, pullback as pb
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> pb.explain(net, torch.ones(1, 3, 4, 4), method=FullGrad()).values.shape
        torch.Size([1, 1, 4, 4])
    """

    psi: str = "abs"
    upsample: str = "bilinear"
    align_corners: bool = True
    biases: str = "full"
    channel_dim: int | None = None

    def __post_init__(self) -> None:
        options = {
            "psi": ("abs", "minmax", "identity"), "upsample": ("bilinear", "area"), "biases": ("full", "simple")
        }  # fmt: skip
        for name, known in options.items():
            if getattr(self, name) not in known:
                listed = ", ".join(f'"{each}"' for each in known[:-1]) + f' or "{known[-1]}"'
                raise MethodError(f"{name} is {listed}, got {getattr(self, name)!r}.")

    def __call__(self, problem: Problem) -> Point:
        point = problem.point
        if not isinstance(point, Tensor):
            raise MethodError(
                f"FullGrad makes one map, but {len(point)} input leaves are explained: {', '.join(point)}. "
                f'Choose one, for example site="input:{next(iter(point))}".'
            )
        if self.biases == "simple" and problem.rules:
            raise MethodError(
                'biases="simple" takes plain gradients: use it without rules, or biases="full".'
            )
        channel = _channel(problem, self.channel_dim)
        size = tuple(extent for dim, extent in enumerate(point.shape) if dim not in (0, channel))
        recordings = record(problem, self._keeping(size, channel))
        gradient = joined([each.gradient for each in recordings])
        assert isinstance(gradient, Tensor)
        total = channel_sum(point * gradient, self.psi, channel)
        total = total + torch.cat([self._drawn(each, total[each.index]) for each in recordings])
        free = problem.free if channel == 2 else None
        if free is not None:
            # padding never moves, so it is no place
            total = total * free.to(total.device)
        problem.record(
            fullgrad_residual=torch.cat([each.residual() for each in recordings]),
            fullgrad_outside=torch.cat([_outside(each, free) for each in recordings]),
        )
        if uncovered := sorted({name for each in recordings for name in each.uncovered}):
            problem.note(f"the implicit bias of {', '.join(uncovered)} is unknown and missing from the map")
        return total if channel is None else total.unsqueeze(channel)

    def _keeping(self, size: tuple[int, ...], channel: int | None) -> Keeping:
        """What to keep of each operation: its image on its own grid, channels summed."""

        def keeping(rows: int, grids: Grids) -> Keep | None:
            if channel is None:
                return None

            def keep(delta: Tensor, bias: ImplicitBias) -> _Image | None:
                factor = bias.total() if self.biases == "full" else torch.ones_like(delta)
                if factor is None or delta.dim() < 3 or len(delta) != rows:
                    return None
                product = real_product(delta, factor)
                if channel == 1:
                    placed = on_grid(product, [size, *grids])
                else:
                    placed = on_tokens(product, size)
                if placed is None:
                    return None
                signed = channel_sum(placed, "identity", 1)
                return _Image(signed if self.psi == "identity" else channel_sum(placed, self.psi, 1), signed)

            return keep

        return keeping

    def _counts(self, each: Contribution) -> bool:
        return self.biases == "full" or (each.operation in _SIMPLE and each.constant is not None)

    def _drawn(self, recording: Recording, like: Tensor) -> Tensor:
        """Every image of one part, summed grid by grid and then brought to one size."""
        by_grid: dict[tuple[int, ...], Tensor] = {}
        for each in recording.contributions:
            if each.kept is not None and self._counts(each):
                image = each.kept.values
                grid = tuple(image.shape[1:])
                by_grid[grid] = by_grid[grid] + image if grid in by_grid else image
        total = torch.zeros_like(like)
        for image in by_grid.values():
            total += self._resized(image, tuple(like.shape[1:])).to(total.dtype)
        return total

    def _resized(self, image: Tensor, size: tuple[int, ...]) -> Tensor:
        if tuple(image.shape[1:]) == size:
            return image
        if self.upsample == "area":
            for dim, (before, after) in enumerate(zip(image.shape[1:], size, strict=True), 1):
                weights = area_weights(before, after).to(image)
                image = torch.tensordot(image, weights, ([dim], [1])).movedim(-1, dim)
            return image
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
        resized = functional.interpolate(image[:, None], size, mode=mode, align_corners=self.align_corners)
        return resized[:, 0]


@dataclass(frozen=True, eq=False)
class _Image:
    """One operation on its own grid, channels summed: as the map wants it, and with its sign; (B, *grid)."""

    values: Tensor
    signed: Tensor


def _outside(recording: Recording, free: Tensor | None) -> Tensor:
    """The signed sum, for each example, of what the map leaves out."""
    total = recording.score - recording.residual() - recording.input_sum
    for each in recording.contributions:
        if each.kept is not None:
            signed = (
                each.kept.signed
                if free is None
                else each.kept.signed * free[recording.index].to(total.device)
            )
            total = total - signed.flatten(1).sum(1).to(total)
    return total


_SIMPLE: Final = frozenset(["linear", "batch_norm", "conv1d", "conv2d", "conv3d"])
_PREFIX_TOKENS: Final = 5


def _channel(problem: Problem, chosen: int | None) -> int | None:
    point = problem.point
    assert isinstance(point, Tensor)
    if point.dim() < 3:
        return None
    if chosen is None:
        chosen = -1 if problem.posed.token_site else 1
    channel = chosen % point.dim()
    if channel != 1 and (channel, point.dim()) != (2, 3):
        raise MethodError(
            f"channel_dim is 1, or -1 for tokens (B, T, D), got {chosen} for a point of shape {tuple(point.shape)}."
        )
    return channel


def channel_sum(product: Tensor, psi: str, channel: int | None) -> Tensor:
    """``Σ_c ψ(product)``; "minmax" scales over all entries of one example."""
    product = product.real if product.is_complex() else product
    if psi != "identity":
        product = product.abs()
    if psi == "minmax":
        flat = product.flatten(1)
        flat = flat - flat.amin(1, keepdim=True)
        product = (flat / (flat.amax(1, keepdim=True) + 1e-6)).reshape(product.shape)
    return product if channel is None else product.sum(channel)


def on_grid(product: Tensor, grids: Sequence[tuple[int, ...]]) -> Tensor | None:
    """(B, C, *grid) if some dimensions are a known grid, also where it lies flat behind prefix tokens."""
    if tuple(product.shape[2:]) in grids:
        return product
    if tuple(product.shape[1:-1]) in grids:
        return product.movedim(-1, 1)
    for grid in reversed(grids):
        places = math.prod(grid)
        for prefix in range(_PREFIX_TOKENS + 1):
            flat = on_tokens(product, (places + prefix,))
            if flat is not None:
                placed: Tensor = flat[:, :, prefix:].unflatten(2, grid)
                return placed
    return None


def on_tokens(product: Tensor, size: tuple[int, ...]) -> Tensor | None:
    """(B, everything else, T), T being the dimension of that length; of heads before or after it, before."""
    (tokens,) = size
    order = (2, 1, 3) if product.dim() == 4 else range(1, product.dim())
    for dim in order:
        if product.shape[dim] == tokens:
            return product.movedim(dim, -1).flatten(1, -2)
    return None


def area_weights(before: int, after: int) -> Tensor:
    """(after, before): the share of each of ``before`` equal intervals that lies in each of ``after``.

    >>> area_weights(1, 2).tolist()
    [[0.5], [0.5]]
    """
    edges = torch.arange(after + 1, dtype=torch.float64) / after * before
    cells = torch.arange(before, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], cells + 1) - torch.maximum(edges[:-1, None], cells)
    return overlap.clamp_min(0)
