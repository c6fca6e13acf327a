"""FullGrad: input gradients and bias gradients of every layer as one map (Srinivas and Fleuret 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from ..core.errors import MethodError
from ..core.points import Point, widest
from ..core.problem import Problem
from .fullgrad_grids import channel_sum, on_grid, on_tokens, resized
from .fullgrad_terms import FullGradTerms, fullgrad_terms
from .implicit_bias.recorder import Contribution, Keep
from .implicit_bias.recording import Grids, Keeping, Recording, joined, record
from .noisy_points import NoisyPoints, require_noise

__all__ = ["FullGrad", "FullGradTerms", "fullgrad_terms"]


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
        samples: 0, the point itself; else Smooth FullGrad: every term is averaged over so many noisy copies of the
            point before ψ, ``Σ_c ψ(E[x ⊙ ∇f]) + Σ_v U Σ_c ψ(E[δ_v ⊙ b_v])``. (``SmoothGrad(FullGrad())`` averages
            after ψ: with "abs", what changes sign from draw to draw adds up there and cancels here.)
        noise: standard deviation as a fraction of each example's range at the site, with ``samples``.
        seed: names the draws, which are SmoothGrad's.

    Call:
        problem -> (B, 1, ...), or (B, T, 1) for tokens, at the point's resolution; (B, F) for a flat point,
        which has no places for biases. Results shaped (B, C, h, w) or (B, h, w, C) on a grid that some
        convolution gave count as places, and tokens of such a grid behind at most five prefix tokens; for
        token points, results with a dimension of T. With ``psi="identity", upsample="area"`` the map sums to
        ``score - outside - residual``, both in the diagnostics as ``fullgrad_outside`` and
        ``fullgrad_residual``: (B,), the terms without places and what no term explains. With ``samples`` all three
        are means over the noisy points; the mean score is ``fullgrad_score``.

    Raises:
        MethodError: an unknown option, several explained input leaves, a domain, or a plain callable.

    Cost: one forward and one backward pass, and a term for each operation; ``samples`` times that, and all terms held
    at once, where it is smooth. Deterministic.

    Source: Srinivas and Fleuret 2019, eq. 6; the general theorem is in docs of ``fullgrad_terms``; the smooth and
    simple variants: the authors' code (25 samples, there with the noise scaled by the range of the whole batch).

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
    samples: int = 0
    noise: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        options = {
            "psi": ("abs", "minmax", "identity"), "upsample": ("bilinear", "area"), "biases": ("full", "simple")
        }  # fmt: skip
        for name, known in options.items():
            if getattr(self, name) not in known:
                listed = ", ".join(f'"{each}"' for each in known[:-1]) + f' or "{known[-1]}"'
                raise MethodError(f"{name} is {listed}, got {getattr(self, name)!r}.")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 0:
            raise MethodError(
                f"samples is a whole number, 0 for the point itself or 25 for Smooth FullGrad, got {self.samples!r}."
            )
        require_noise(self.noise)

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
        total = self._average(problem, size, channel) if self.samples else self._once(problem, size, channel)
        free = problem.free if channel == 2 else None
        if free is not None:
            # padding never moves, so it is no place
            total = total * free.to(total.device)
        total = total.to(point.dtype)
        return total if channel is None else total.unsqueeze(channel)

    def _once(self, problem: Problem, size: tuple[int, ...], channel: int | None) -> Tensor:
        """The map of the point itself."""
        recordings = record(problem, self._keeping(size, channel))
        gradient = joined([each.gradient for each in recordings])
        assert isinstance(problem.point, Tensor)
        assert isinstance(gradient, Tensor)
        total = channel_sum(problem.point * gradient, self.psi, channel)
        total = total + torch.cat([self._drawn(self._images(each), total[each.index]) for each in recordings])
        free = problem.free if channel == 2 else None
        problem.record(
            fullgrad_residual=torch.cat([each.residual() for each in recordings]),
            fullgrad_outside=torch.cat([_outside(each, free) for each in recordings]),
        )
        _name_unknown(problem, recordings)
        return total

    def _average(self, problem: Problem, size: tuple[int, ...], channel: int | None) -> Tensor:
        """The map of the terms' means over noisy points."""
        places = NoisyPoints(problem, self.noise, self.seed)
        if places.constant:
            problem.note(
                "an example is constant at the site: its noise is zero, so its result is the plain FullGrad"
            )
        everyone, free = torch.arange(problem.batch), problem.free if channel == 2 else None
        unreduced = replace(self, psi="identity", samples=0)
        terms: dict[str, Tensor] = {}
        facts = {
            name: torch.zeros(problem.batch, dtype=torch.float64) for name in ("score", "residual", "outside")
        }
        for draw in range(self.samples):
            moved = problem.at(places(torch.full_like(everyone, draw), everyone))
            recordings = record(moved, unreduced._keeping(size, channel, channels=True))
            gradient = joined([each.gradient for each in recordings])
            assert isinstance(moved.point, Tensor)
            assert isinstance(gradient, Tensor)
            _add(terms, "", everyone, moved.point * gradient / self.samples, problem.batch)
            for each in recordings:
                for name, image in self._images(each):
                    _add(terms, name, each.index, image.values / self.samples, problem.batch)
                found = {"score": each.score, "residual": each.residual(), "outside": _outside(each, free)}
                for name, values in found.items():
                    facts[name][each.index] += values.double().cpu() / self.samples
            _name_unknown(problem, recordings)
        total = channel_sum(terms.pop(""), self.psi, channel)
        problem.record(**{f"fullgrad_{name}": values for name, values in facts.items()})
        images = ((name, _Image(channel_sum(each, self.psi, 1), each)) for name, each in terms.items())
        return total + self._drawn(images, total)

    def _keeping(self, size: tuple[int, ...], channel: int | None, channels: bool = False) -> Keeping:
        """What to keep of each operation: its image on its own grid, channels summed unless asked for."""

        def keeping(rows: int, grids: Grids) -> Keep | None:
            if channel is None:
                return None

            def keep(delta: Tensor | None, product: Tensor) -> _Image | None:
                if self.biases == "simple":
                    if delta is None:
                        return None
                    product = delta.real if delta.is_complex() else delta
                if product.dim() < 3 or len(product) != rows:
                    return None
                if channel == 1:
                    placed = on_grid(product, [size, *grids])
                else:
                    placed = on_tokens(product, size)
                if placed is None:
                    return None
                signed = channel_sum(placed, "identity", 1)
                if channels:
                    return _Image(placed.real if placed.is_complex() else placed, signed)
                return _Image(signed if self.psi == "identity" else channel_sum(placed, self.psi, 1), signed)

            return keep

        return keeping

    def _counts(self, each: Contribution) -> bool:
        return self.biases == "full" or (each.operation in _SIMPLE and each.has_constant)

    def _images(self, recording: Recording) -> Iterator[tuple[str, _Image]]:
        for each in recording.contributions:
            if each.kept is not None and self._counts(each):
                yield each.name, each.kept

    def _drawn(self, images: Iterable[tuple[str, _Image]], like: Tensor) -> Tensor:
        """Every image of one part, summed grid by grid and then brought to one size."""
        by_grid: dict[tuple[int, ...], Tensor] = {}
        for _, each in images:
            image = each.values
            grid = tuple(image.shape[1:])
            by_grid[grid] = by_grid[grid] + image if grid in by_grid else image
        total = torch.zeros_like(like)
        for image in by_grid.values():
            image = resized(image, tuple(like.shape[1:]), self.upsample, self.align_corners)
            total += image.to(total.dtype)
        return total


@dataclass(frozen=True, eq=False)
class _Image:
    """One operation on its own grid: as the map wants it, (B, *grid), or with channels; and its signed channel sum."""

    values: Tensor
    signed: Tensor


def _add(terms: dict[str, Tensor], name: str, rows: Tensor, values: Tensor, batch: int) -> None:
    """Add rows to the term of that name, in the accumulation dtype."""
    values = widest(values)
    if name not in terms:
        terms[name] = values.new_zeros(batch, *values.shape[1:])
    terms[name].index_add_(0, rows.to(values.device), values)


def _name_unknown(problem: Problem, recordings: Sequence[Recording]) -> None:
    if uncovered := sorted({name for each in recordings for name in each.uncovered}):
        problem.note(f"the implicit bias of {', '.join(uncovered)} is unknown and missing from the map")


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
