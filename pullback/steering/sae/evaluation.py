"""How good a sparse autoencoder is: reconstruction, sparsity, and what the model loses with it in place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.errors import InputError

from .model import SparseAutoencoder
from .prediction_loss import Loss
from .stream import ActivationGradientStream
from .substitution import Substitution, TokenBatch, read_batches

__all__ = [
    "Evaluation",
    "ParetoPoint",
    "SelectionEvaluation",
    "evaluate_sae",
    "pareto_curve",
    "pareto_table",
]

_COLLAPSE = 0.1  # loss of the CE score without gradient from which a reader is warned
FREE, FRESH, DATA = "gradient-free", "fresh label", "data label"


@dataclass(frozen=True)
class SelectionEvaluation:
    """One way of selecting latents, over all tokens of the evaluation set.

    Attributes:
        fvu: sum ||x - xhat||^2 / sum ||x - mean||^2, mean over the set; of no unit, the mean has 1.
        l0: mean number of values that are not 0.
        dead_share: of latents without a positive value on the set.
        ce: cross-entropy per predicted token in nats, with xhat in place of x.
        added_ce: ce - the model's own.
        ce_score_zero, ce_score_mean: (CE_ablated - ce) / (CE_ablated - CE_own), activations ablated to 0 or the mean.
        kl: of the model's predictions from those with xhat, per predicted token in nats.
        kl_score_zero, kl_score_mean: (KL_ablated - kl) / KL_ablated.
    """

    fvu: float
    l0: float
    dead_share: float
    ce: float
    added_ce: float
    ce_score_zero: float
    ce_score_mean: float
    kl: float
    kl_score_zero: float
    kl_score_mean: float


@dataclass(frozen=True)
class Evaluation:
    """An autoencoder under each selection it has: "gradient-free"; of a g-SAE also "fresh label" and "data label".

    ``tokens`` were reconstructed, ``predicted`` have a loss; ``ce``, ``ce_zero``, ``ce_mean`` in nats per predicted
    token, of the model and with ablated activations; ``warnings`` say what a reader must not overlook.
    """

    selections: dict[str, SelectionEvaluation]
    tokens: int
    predicted: int
    ce: float
    ce_zero: float
    ce_mean: float
    warnings: tuple[str, ...]

    def rows(self) -> list[dict[str, str | float]]:
        """One row per selection, for a table."""
        return [{"selection": name, **asdict(each)} for name, each in self.selections.items()]


def evaluate_sae(
    model: nn.Module,
    site: str,
    batches: Sequence[Any],
    autoencoder: SparseAutoencoder,
    *,
    loss: Loss = "ce",
    skip_positions: Sequence[int] = (0,),
    seed: int = 0,
) -> Evaluation:
    """Evaluate on batches that the autoencoder was not trained on.

    A gradient selection is measured three ways: by the gradient of a label drawn from the model ("fresh label"), of the
    data's own label, whose selection peeks at what is then measured, and by size ("gradient-free"). Padding and
    skipped positions keep their activations and are counted nowhere.

    Args:
        model, site, loss, skip_positions: as in training.
        batches: token ids (B, T), or dicts, with ``labels`` where those are not the next tokens; a list, read twice.
        seed: of the drawn labels.

    Raises InputError (no batches, nothing to predict), and what ``ActivationGradientStream`` raises. Warns where the
    gradient-free CE score falls by more than 0.1, and where an FVU is above 1.

    Cost: per batch 4 forwards and one more per selection; for a g-SAE two forwards and backwards more.

    Source: Gao et al. 2024 (arXiv 2406.04093), section 2.3 and 4.1, for the measures; fresh labels are ours.

    Example:
        >>> from pullback.steering.sae import SparseAutoencoderConfig
        >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)).eval()
        >>> autoencoder = SparseAutoencoder(SparseAutoencoderConfig(4, latents=8, k=2))
        >>> list(evaluate_sae(net, "0", [torch.arange(6).reshape(1, 6)], autoencoder).selections)
        ['gradient-free']
    """
    batches = _listed(batches)
    gradients: dict[str, ActivationGradientStream] = {}
    settings: dict[str, Any] = {"skip_positions": skip_positions, "seed": seed}
    plain = ActivationGradientStream(model, site, batches, loss=loss, **settings)
    if autoencoder.config.selection == "gradient" and autoencoder.config.beta > 0:
        gradients[FRESH] = ActivationGradientStream(model, site, batches, loss="ce_sampled", **settings)
        gradients[DATA] = plain
    mean = _mean(plain, batches)
    sums = {name: _Sums(autoencoder.config.latents) for name in (*gradients, FREE)}
    tokens = predicted = 0
    variance = own = 0.0
    ablated = {"zero": [0.0, 0.0], "mean": [0.0, 0.0]}
    for number, batch in enumerate(read_batches(plain, batches)):
        there = Substitution(plain, batch)
        tokens, predicted, own = tokens + len(batch.x), predicted + there.tokens, own + there.loss
        variance += float((batch.x.double() - mean).square().sum())
        for name, value in (("zero", torch.zeros_like(batch.x)), ("mean", mean.expand_as(batch.x))):
            for place, found in enumerate(there.with_activations(value)):
                ablated[name][place] += found
        for name, total in sums.items():
            gradient = None
            if name in gradients:
                # labels of the evaluation, that training has not drawn
                gradient = gradients[name].of(batches[number], draw=f"evaluation/{number}").gradient
            total.add(autoencoder, batch, gradient, there)
    if not predicted or variance == 0:
        raise InputError("the activations do not vary; expected an evaluation set with more than one token.")
    ce, (ce_zero, kl_zero), (ce_mean, kl_mean) = own, ablated["zero"], ablated["mean"]

    def finished(total: _Sums) -> SelectionEvaluation:
        return SelectionEvaluation(
            fvu=total.error / variance,
            l0=total.active / tokens,
            dead_share=float((~total.fired).double().mean()),
            ce=total.ce / predicted,
            added_ce=(total.ce - ce) / predicted,
            ce_score_zero=_share(ce_zero - total.ce, ce_zero - ce),
            ce_score_mean=_share(ce_mean - total.ce, ce_mean - ce),
            kl=total.kl / predicted,
            kl_score_zero=_share(kl_zero - total.kl, kl_zero),
            kl_score_mean=_share(kl_mean - total.kl, kl_mean),
        )

    selections = {name: finished(total) for name, total in sums.items()}
    texts = _cautions(selections)
    for text in texts:
        warnings.warn(text, stacklevel=2)
    return Evaluation(
        selections, tokens, predicted, ce / predicted, ce_zero / predicted, ce_mean / predicted, texts
    )


@dataclass(frozen=True)
class ParetoPoint:
    """One measure at one k, of one kind of autoencoder: mean over seeds with its 95 % Student interval."""

    kind: str
    k: int
    measure: str
    mean: float
    low: float
    high: float
    seeds: int


def pareto_curve(
    evaluated: Callable[[str, int, int], dict[str, Any]],
    kinds: Sequence[str],
    ks: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2),
) -> list[dict[str, Any]]:
    """Measures for every kind, k and seed: ``evaluated(kind, k, seed)`` trains, evaluates and returns numbers by name.

    Returns one row per combination, with "kind", "k", "seed" and the measures; see ``pareto_table``.

    Raises InputError for fewer than three seeds or two k: neither says where a frontier is.
    """
    if len(set(seeds)) < 3 or len(set(ks)) < 2:
        raise InputError(
            f"{len(set(ks))} values of k and {len(set(seeds))} seeds given; expected at least two k and three seeds, "
            "such as ks=(4, 8, 16), seeds=(0, 1, 2): fewer show no frontier."
        )
    return [
        {"kind": kind, "k": k, "seed": seed, **evaluated(kind, k, seed)}
        for kind in kinds
        for k in ks
        for seed in seeds
    ]


def pareto_table(rows: Iterable[dict[str, Any]], level: float = 0.95) -> list[ParetoPoint]:
    """Means over seeds with Student's t intervals, for every measure in ``pareto_curve``'s rows.

    >>> rows = [{"kind": "topk", "k": 4, "seed": s, "fvu": v} for s, v in enumerate((1.0, 2.0, 3.0))]
    >>> point = pareto_table(rows)[0]
    >>> round(point.low, 3), point.mean, round(point.high, 3)
    (-0.484, 2.0, 4.484)
    """
    from scipy.stats import t

    grouped: dict[tuple[str, int, str], list[float]] = {}
    for row in rows:
        for measure, value in row.items():
            if measure not in ("kind", "k", "seed"):
                grouped.setdefault((row["kind"], row["k"], measure), []).append(float(value))
    points = []
    for (kind, k, measure), values in grouped.items():
        found = torch.tensor(values, dtype=torch.float64)
        mean, half = float(found.mean()), math.nan
        if len(values) > 1:
            half = float(t.ppf((1 + level) / 2, len(values) - 1) * found.std() / math.sqrt(len(values)))
        points.append(ParetoPoint(kind, k, measure, mean, mean - half, mean + half, len(values)))
    return points


class _Sums:
    """What is added up over batches for one selection."""

    def __init__(self, latents: int) -> None:
        self.error = self.ce = self.kl = 0.0
        self.active = 0
        self.fired = torch.zeros(latents, dtype=torch.bool)

    def add(
        self,
        autoencoder: SparseAutoencoder,
        batch: TokenBatch,
        gradient: Tensor | None,
        there: Substitution,
    ) -> None:
        with torch.no_grad():
            latents = autoencoder.encode(batch.x, gradient, selection="topk" if gradient is None else None)
            output = autoencoder.decode(latents)
        self.error += float((batch.x.double() - output.double()).square().sum())
        positive = latents.values > 0
        self.active += int(positive.sum())
        self.fired[latents.indices[positive].cpu()] = True
        ce, kl = there.with_activations(output)
        self.ce, self.kl = self.ce + ce, self.kl + kl


def _mean(stream: ActivationGradientStream, batches: Sequence[Any]) -> Tensor:
    total, count = torch.zeros(stream.width, dtype=torch.float64, device=stream.cut.device), 0
    for batch in read_batches(stream, batches):
        total += batch.x.double().sum(0)
        count += len(batch.x)
    if not count:
        raise InputError(
            "no token of the evaluation set counts: all are padding or skipped. Give longer texts."
        )
    return total / count


def _share(part: float, whole: float) -> float:
    """NaN where there is nothing to recover."""
    return part / whole if whole else math.nan


def _listed(batches: Sequence[Any]) -> list[Any]:
    if isinstance(batches, (Tensor, str, dict)) or not isinstance(batches, Sequence) or not len(batches):
        raise InputError(
            "batches is a list of batches that is read twice, such as [tokens]; got "
            f"{'an empty one' if isinstance(batches, (list, tuple)) else type(batches).__name__}."
        )
    return list(batches)


def _cautions(selections: dict[str, SelectionEvaluation]) -> tuple[str, ...]:
    texts = []
    if FRESH in selections:
        free, fresh = selections[FREE].ce_score_mean, selections[FRESH].ce_score_mean
        if fresh - free > _COLLAPSE:
            texts.append(
                f"without gradient this autoencoder recovers {free:.3g} of the loss, with it {fresh:.3g} (fresh label, "
                "mean ablation): gradient-free inference loses what the gradient selection gained. Use it with "
                "gradients, or a TopK autoencoder."
            )
    texts += [
        f'the FVU is {each.fvu:.3g} under "{name}": worse than the mean of the activations. Is it another site?'
        for name, each in selections.items()
        if each.fvu > 1
    ]
    return tuple(texts)
