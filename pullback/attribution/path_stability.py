"""Path stability: do strongly excited units keep their gates, between checkpoints and under input noise? (ours)"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core import noise as draws
from ..core.errors import InputError, MethodError, ModelError
from ..core.overrides import Operation, overrides
from ..core.posed import gradients_enabled
from ..core.shadow import shadow
from .paths import require_count
from .pullback_ascent import require_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PathStability", "path_stability"]

_GATES = frozenset(["relu", "relu6", "leaky_relu", "prelu"])


@dataclass(frozen=True, eq=False)
class PathStability:
    """How stable the gates 1[z > 0] are, per call of an activation and over all of them.

    Attributes:
        layers: module path of each call, in order of execution.
        units: (L,) units times inputs of each call.
        stability: (L,) share of gates equal in both checkpoints.
        overall: the same over all units.
        edges: (K,) left edges of the bins of |z|/T at the late checkpoint; the last bin is open.
        bin_units: (K,) units in each bin. bin_stability: (K,) share of equal gates there, NaN where there are none.
        auc: (L,) probability that of two draws of the layer, one whose gate stayed under input noise and one whose
            gate flipped, the one that stayed has the larger |z|; 0.5 is chance, NaN where none or all flipped.
        overall_auc: the same over all units.
    """

    layers: tuple[str, ...]
    units: Tensor
    stability: Tensor
    overall: float
    edges: Tensor
    bin_units: Tensor
    bin_stability: Tensor
    auc: Tensor
    overall_auc: float
    temperature: float
    noise: float

    def to_rows(self) -> list[dict[str, Any]]:
        """One record per layer, then per bin, then one for all; plain numbers."""
        layers = [
            {"part": "layer", "name": name, "units": int(n), "stability": float(s), "auc": float(a)}
            for name, n, s, a in zip(self.layers, self.units, self.stability, self.auc, strict=True)
        ]
        stops = [*(f"{float(edge):g}" for edge in self.edges[1:]), "inf"]
        bins = [
            {"part": "bin", "name": f"[{float(start):g}, {stop})", "units": int(n), "stability": float(s)}
            for start, stop, n, s in zip(self.edges, stops, self.bin_units, self.bin_stability, strict=True)
        ]
        whole = {"part": "all", "name": "all", "units": int(self.units.sum()), "stability": self.overall}
        return [*layers, *bins, {**whole, "auc": self.overall_auc}]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Share of equal gates over |z|/T, one point per bin that has units."""
        from pullback.viz import curve

        kept = self.bin_units > 0
        axes = curve(self.edges[kept], self.bin_stability[kept], ax=ax)
        axes.set_xlabel("|z| / T, left edge of bin")
        axes.set_ylabel("share of equal gates")
        return axes


@dataclass(frozen=True, eq=False)
class _Recorder:
    """Keeps the pre-activation of every rectifier, in order of execution; derivatives stay as they are."""

    calls: list[tuple[str, Tensor]] = field(default_factory=list)
    within: str | None = None
    operations: frozenset[str] = field(default=_GATES, init=False, repr=False)
    preserves_gradient: bool = field(default=True, init=False, repr=False)

    def __call__(self, operation: Operation) -> Any:
        z = operation.args[0].detach()
        self.calls.append((operation.module_path, z.clone()))
        return operation.value()


def path_stability(
    early: nn.Module | Mapping[str, Tensor],
    late: nn.Module,
    x: Tensor,
    *,
    temperature: float = 0.3,
    noise: float = 0.05,
    samples: int = 4,
    edges: Sequence[float] = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    seed: int = 0,
) -> PathStability:
    """Whether excitation |z| predicts that a gate stays: between two checkpoints, and under noise at the input.

    Our own measure for the path-stability claim of arXiv 2507.22832v3; the paper's statistic is not published. Gates
    are 1[z > 0] of relu, relu6, leaky_relu and prelu, however they are called.

    Args:
        early: an earlier checkpoint: a model, or a state dict for ``late``'s architecture.
        late: the later one, in eval mode; its |z| is what is binned.
        x: (B, *S) floating-point inputs.
        temperature: T, the unit of the bins, as in ``ExcitationPullback``.
        noise: standard deviation of the input noise as a fraction of each example's range.
        samples: noisy copies of each input.
        edges: left edges of the bins of |z|/T, from 0 upwards.
        seed: names the draws.

    Returns:
        a PathStability with ``to_rows()`` and ``plot()``.

    Raises:
        InputError: the inputs are no batch of floating-point values, or contain NaN.
        ModelError: the checkpoints do not run the same rectifiers, or none.
        MethodError: a parameter is out of range.

    Cost: 2 + ``samples`` forward passes, all pre-activations of one pass held at a time (twice).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU()).eval()
        >>> path_stability(net, net, torch.ones(3, 2)).overall
        1.0
    """
    require_length("temperature", temperature)
    require_length("noise", noise)
    require_count("samples", samples)
    bounds = _edges(edges)
    if x.dim() < 2 or not len(x) or not x.is_floating_point() or not bool(x.isfinite().all()):
        raise InputError(
            f"path_stability needs finite floating-point inputs (B, ...), got {tuple(x.shape)} {x.dtype}."
        )
    if isinstance(early, Mapping):
        state, early = early, copy.deepcopy(late)
        early.load_state_dict(state)
    now, before = _pre_activations(late, x), _pre_activations(early, x)
    _require_same(before, now)
    same = [((a > 0) == (b > 0)) for (_, a), (_, b) in zip(before, now, strict=True)]
    size = [z.abs().double() for _, z in now]
    stayed = [torch.zeros_like(each) for each in size]
    spread = x.flatten(1).amax(1) - x.flatten(1).amin(1)
    for number in range(samples):
        unit = torch.stack([draws.normal(x.shape[1:], seed, number, f"paths/{row}") for row in range(len(x))])
        scale = (noise * spread).reshape(-1, *[1] * (x.dim() - 1))
        noisy = _pre_activations(late, x + unit.to(x) * scale)
        for total, (_, z), (_, moved) in zip(stayed, now, noisy, strict=True):
            total += (z > 0) == (moved > 0)
    everything = torch.cat([each.flatten() for each in size])
    equal = torch.cat([each.flatten() for each in same]).double()
    place = torch.bucketize(everything / temperature, bounds.to(everything.device), right=True) - 1
    bin_units = torch.bincount(place, minlength=len(bounds))
    bin_equal = torch.bincount(place, weights=equal, minlength=len(bounds))
    return PathStability(
        layers=tuple(path for path, _ in now),
        units=torch.tensor([each.numel() for each in size]),
        stability=torch.stack([each.double().mean() for each in same]).cpu(),
        overall=float(equal.mean()),
        edges=bounds,
        bin_units=bin_units.cpu(),
        bin_stability=(bin_equal / bin_units).cpu(),
        auc=torch.tensor(
            [_auc(s.flatten(), k.flatten(), samples) for s, k in zip(size, stayed, strict=True)],
            dtype=torch.float64,
        ),
        overall_auc=_auc(everything, torch.cat([each.flatten() for each in stayed]), samples),
        temperature=temperature,
        noise=noise,
    )


def _pre_activations(model: nn.Module, x: Tensor) -> list[tuple[str, Tensor]]:
    recorder = _Recorder()
    module = shadow(model).module
    with gradients_enabled(), overrides(module, [recorder]):
        # rules act where something is differentiated
        module(x.detach().clone().requires_grad_() * 1)
    return recorder.calls


def _require_same(before: list[tuple[str, Tensor]], now: list[tuple[str, Tensor]]) -> None:
    shapes = [[(path, tuple(z.shape)) for path, z in calls] for calls in (before, now)]
    if not now or shapes[0] != shapes[1]:
        raise ModelError(
            f"the checkpoints ran {len(before)} and {len(now)} rectifiers (relu, relu6, leaky_relu, prelu)"
            + (", not the same ones. " if now else ". ")
            + "Path stability compares the gates of two checkpoints of one ReLU architecture."
        )


def _edges(edges: Sequence[float]) -> Tensor:
    bounds = torch.tensor([float(edge) for edge in edges], dtype=torch.float64)
    if (
        not len(bounds)
        or bounds[0] != 0
        or not bool(bounds.isfinite().all())
        or bool((bounds.diff() <= 0).any())
    ):
        raise MethodError(f"edges rise from 0, for example (0.0, 0.5, 1.0, 2.0); got {tuple(edges)}.")
    return bounds


def _auc(score: Tensor, positive: Tensor, trials: int) -> float:
    """P(score of a positive > score of a negative) + half the ties, each unit weighing its positives and negatives."""
    values, group = score.unique(return_inverse=True)
    wins = torch.zeros_like(values).index_add_(0, group, positive.to(values))
    losses = torch.zeros_like(values).index_add_(0, group, trials - positive.to(values))
    below = losses.cumsum(0) - losses
    pairs = float(wins.sum() * losses.sum())
    return float((wins * (below + losses / 2)).sum()) / pairs if pairs else math.nan
