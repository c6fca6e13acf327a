"""How good an autoencoder is: what it reconstructs, and what the model still predicts from it.

A g-SAE is measured three ways: with the gradient of a loss whose label is drawn from the model ("fresh"), with that of
the data's own label, which may leak it, and without a gradient, as it is used where there is no loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pullback.core.errors import InputError, MethodError
from pullback.core.inputs import ModelInputs

from .model import SparseAutoencoder
from .prediction_loss import plan_prediction
from .stream import ActivationGradientStream

__all__ = ["SelectionMeasures", "SparseAutoencoderEvaluation", "evaluate_sae", "steering_effect"]

Way: TypeAlias = Literal["size", "gradient, fresh label", "gradient, data label"]
LARGEST_FALL = 0.1  # of the CE score without gradient, before it is warned of


@dataclass(frozen=True)
class SelectionMeasures:
    """One way of selecting latents.

    Attributes:
        fvu: Σ ||x - xhat||² / Σ ||x - mean||² over all tokens, mean over them: 1 for the mean, 0 for x.
        l0: latents with a value other than 0 per token.
        dead_share: latents without a positive value in all tokens.
        ce: cross-entropy per predicted token with xhat at the site, in nats; ``added_ce`` less the model's own.
        ce_score: (CE_ablated - ce) / (CE_ablated - CE), zero ablation; ``ce_score_mean`` with the mean of x instead.
        kl_score: (KL_ablated - KL) / KL_ablated from the model's own prediction, zero ablation.
    """

    fvu: float
    l0: float
    dead_share: float
    ce: float
    added_ce: float
    ce_score: float
    ce_score_mean: float
    kl_score: float


@dataclass(frozen=True)
class SparseAutoencoderEvaluation:
    """What ``evaluate_sae`` found.

    ``measures``: way of selecting -> ``SelectionMeasures``. ``ce``, ``ce_zero``, ``ce_mean``: of the model, and with
    zeros or the mean at the site. ``tokens``: that were counted.
    """

    measures: Mapping[str, SelectionMeasures]
    ce: float
    ce_zero: float
    ce_mean: float
    tokens: int

    def to_records(self) -> list[dict[str, Any]]:
        """One flat row per way of selecting."""
        shared = {
            "model_ce": self.ce,
            "ce_zero": self.ce_zero,
            "ce_mean": self.ce_mean,
            "tokens": self.tokens,
        }
        return [{"selection": name, **asdict(each), **shared} for name, each in self.measures.items()]

    def __str__(self) -> str:
        columns = ("fvu", "l0", "dead_share", "added_ce", "ce_score", "ce_score_mean", "kl_score")
        lines = [f"{'selection':<24}" + "".join(f"{name:>15}" for name in columns)]
        for name, each in self.measures.items():
            lines.append(f"{name:<24}" + "".join(f"{getattr(each, column):>15.4f}" for column in columns))
        lines.append(
            f"cross-entropy {self.ce:.4f}; with zeros {self.ce_zero:.4f}, with the mean {self.ce_mean:.4f} "
            f"({self.tokens} tokens)"
        )
        return "\n".join(lines)


def evaluate_sae(
    model: nn.Module,
    site: str,
    autoencoder: SparseAutoencoder,
    token_batches: Sequence[Any],
    *,
    skip_positions: Sequence[int] = (0,),
    ways: Sequence[Way] | None = None,
    seed: int = 0,
    logits_budget: int | float | str = "64MiB",
) -> SparseAutoencoderEvaluation:
    """Put the reconstruction at the site and measure what is lost.

    Padding and ``skip_positions`` keep their own activations and are not counted.

    Args:
        model: in eval mode.
        site: that the autoencoder was trained at.
        autoencoder: on raw activations, as ``train_sae`` and ``load`` give it.
        token_batches: a list of batches, as for ``train_sae``; not those trained on.
        ways: how to select; None is "size" alone for a TopK, all three for a g-SAE.
        seed: of the fresh labels.
        logits_budget: bytes of logits held at once for the gradients.

    Returns:
        a SparseAutoencoderEvaluation; print it, or take ``to_records()``.

    Raises InputError (no batches, another width), MethodError, ModelError, SiteError as ``ActivationGradientStream``.

    Warns where a g-SAE's CE score falls by more than 0.1 without the gradient: it must not be used so.

    Cost: three forwards per batch, and for each way another, with a backward to the site where it takes a gradient.

    Source: Gao et al. 2024 (FVU, downstream loss); Karvonen et al. 2025 (SAEBench: CE and KL scores).

    >>> from pullback.steering.sae import SparseAutoencoderConfig
    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)).eval()
    >>> sae = SparseAutoencoder(SparseAutoencoderConfig(4, 8, 2))
    >>> round(evaluate_sae(model, "0", sae, [torch.arange(6).reshape(1, 6)]).measures["size"].l0) <= 2
    True
    """
    token_batches = list(token_batches)
    if not token_batches:
        raise InputError("token_batches is empty; expected at least one batch that was not trained on.")
    chosen: Sequence[Way] = ways or (
        ("gradient, fresh label", "gradient, data label", "size")
        if autoencoder.config.selection == "gradient"
        else ("size",)
    )
    known = ("size", "gradient, fresh label", "gradient, data label")
    if unknown := [way for way in chosen if way not in known]:
        raise MethodError(f"ways has {unknown[0]!r}; expected some of {', '.join(map(repr, known))}.")
    streams = {
        loss: ActivationGradientStream(
            model,
            site,
            token_batches,
            loss=loss,
            skip_positions=skip_positions,
            seed=seed,
            logits_budget=logits_budget,
        )
        for loss in ("ce", "ce_sampled")
    }
    plain = streams["ce"]
    total, tokens = torch.zeros(plain.width, dtype=torch.float64), 0
    for batch in token_batches:
        x = plain.of(batch, gradient=False).x
        total += x.double().sum(0).cpu()
        tokens += len(x)
    mean = total / tokens
    sums: dict[str, _Sums] = {name: _Sums(autoencoder.config.latents) for name in ("zero", "mean", *chosen)}
    own = _Sums(0)
    for number, batch in enumerate(token_batches):
        inputs, labels = plain.read_batch(batch)
        found = plain.of(batch, gradient=False)
        value = plain.cut.value(inputs)
        reference = plain.cut.logits(inputs)
        own.predict(reference, reference, inputs, labels)
        ablated = {"zero": torch.zeros_like(found.x), "mean": mean.to(found.x).expand_as(found.x)}
        for name, rows in ablated.items():
            sums[name].predict(
                plain.cut.logits(inputs, _placed(value, found.kept, rows)), reference, inputs, labels
            )
        for way in chosen:
            gradient = None
            if way != "size":
                loss = "ce_sampled" if way == "gradient, fresh label" else "ce"
                gradient = streams[loss].of(batch, gradient=True, draw=f"evaluation/{number}").gradient
            with torch.no_grad():
                latents = autoencoder.encode(
                    found.x, gradient, selection="topk" if gradient is None else "gradient"
                )
                rows = autoencoder.decode(latents).to(found.x.dtype)
            sums[way].reconstruct(found.x, rows, mean, latents.values, latents.indices)
            sums[way].predict(
                plain.cut.logits(inputs, _placed(value, found.kept, rows)), reference, inputs, labels
            )
    measures: dict[str, SelectionMeasures] = {
        way: _measures(sums[way], own, sums["zero"], sums["mean"], tokens) for way in chosen
    }
    _warn_of_collapse(measures)
    return SparseAutoencoderEvaluation(measures, own.ce, sums["zero"].ce, sums["mean"].ce, tokens)


@torch.no_grad()
def steering_effect(
    model: nn.Module,
    site: str,
    autoencoder: SparseAutoencoder,
    token_batches: Iterable[Any],
    latents: Sequence[int],
    *,
    norm: float = 1.0,
    skip_positions: Sequence[int] = (0,),
) -> dict[int, dict[str, float]]:
    """What x + α w_i at every token does to the logits, for each latent, all with one α: equal norms compare.

    Args:
        latents: their numbers.
        norm: α in units of the mean norm of x over the tokens.

    Returns:
        latent -> "mean" and "largest" |change| of a logit centred over the vocabulary, means over predicted tokens; and
        "kl", of the steered prediction from the model's own.

    Cost: a forward per batch and latent, and one more.
    """
    batches = list(token_batches)
    stream = ActivationGradientStream(model, site, batches, skip_positions=skip_positions)
    xs = [stream.of(batch, gradient=False).x for batch in batches]
    count = sum(len(x) for x in xs)
    length = norm * sum(float(torch.linalg.vector_norm(x.double(), dim=1).sum()) for x in xs) / count
    directions = {latent: autoencoder.latent_direction(latent) for latent in latents}
    units = {latent: each / torch.linalg.vector_norm(each) for latent, each in directions.items()}
    found = {latent: {"mean": 0.0, "largest": 0.0, "kl": 0.0} for latent in latents}
    tokens = 0
    for batch in batches:
        inputs, _ = stream.read_batch(batch)
        kept = stream.of(batch, gradient=False).kept
        value, reference = stream.cut.value(inputs), stream.cut.logits(inputs)
        where = (
            kept if kept.shape == reference.shape[:-1] else torch.ones(reference.shape[:-1], dtype=torch.bool)
        )
        before = reference[where].double()
        tokens += len(before)
        for latent in latents:
            moved = torch.where(kept[..., None], value + length * units[latent].to(value), value)
            after = stream.cut.logits(inputs, moved)[where].double()
            change = (after - after.mean(1, keepdim=True) - before + before.mean(1, keepdim=True)).abs()
            log_p, log_q = before.log_softmax(1), after.log_softmax(1)
            found[latent]["mean"] += float(change.mean(1).sum())
            found[latent]["largest"] += float(change.amax(1).sum())
            found[latent]["kl"] += float((log_p.exp() * (log_p - log_q)).sum())
    return {
        latent: {name: each / tokens for name, each in values.items()} for latent, values in found.items()
    }


class _Sums:
    """Running sums over batches."""

    def __init__(self, latents: int) -> None:
        self.loss = self.divergence = self.error = self.variance = 0.0
        self.predicted = self.active = 0
        self.fired = torch.zeros(latents, dtype=torch.bool)

    @property
    def ce(self) -> float:
        return self.loss / self.predicted

    def predict(self, logits: Tensor, reference: Tensor, inputs: ModelInputs, labels: Tensor | None) -> None:
        named = inputs.leaf if labels is None else {**inputs.leaf, "labels": labels}
        plan = plan_prediction("ce", logits.shape, named, inputs.attention_mask, None)
        positions = plan.predicts.flatten().nonzero()[:, 0]
        rows = logits.reshape(-1, logits.shape[-1])[positions].double()
        before = reference.reshape(-1, logits.shape[-1])[positions].double().log_softmax(1)
        self.loss += float(plan.loss(rows, positions))
        self.divergence += float((before.exp() * (before - rows.log_softmax(1))).sum())
        self.predicted += len(positions)

    def reconstruct(self, x: Tensor, again: Tensor, mean: Tensor, values: Tensor, indices: Tensor) -> None:
        self.error += float((x.double() - again.double()).square().sum())
        self.variance += float((x.double().cpu() - mean).square().sum())
        self.active += int((values != 0).sum())
        self.fired[indices[values > 0].cpu()] = True


def _measures(found: _Sums, own: _Sums, zero: _Sums, mean: _Sums, tokens: int) -> SelectionMeasures:
    return SelectionMeasures(
        fvu=found.error / found.variance if found.variance else float("nan"),
        l0=found.active / tokens,
        dead_share=float((~found.fired).double().mean()),
        ce=found.ce,
        added_ce=found.ce - own.ce,
        ce_score=_score(zero.ce, found.ce, own.ce),
        ce_score_mean=_score(mean.ce, found.ce, own.ce),
        kl_score=_score(zero.divergence, found.divergence, 0.0),
    )


def _score(ablated: float, found: float, own: float) -> float:
    return (ablated - found) / (ablated - own) if ablated != own else float("nan")


def _placed(value: Tensor, kept: Tensor, rows: Tensor) -> Tensor:
    """The site's value with these rows at the kept positions."""
    placed = value.clone()
    placed[kept] = rows.to(value)
    return placed


def _warn_of_collapse(measures: Mapping[str, SelectionMeasures]) -> None:
    fresh, free = measures.get("gradient, fresh label"), measures.get("size")
    if fresh is not None and free is not None and free.ce_score < fresh.ce_score - LARGEST_FALL:
        warnings.warn(
            f"without the gradient the CE score falls from {fresh.ce_score:.3f} to {free.ce_score:.3f}: where there is "
            "no loss to select by, use an autoencoder that was trained to select by size.",
            stacklevel=3,
        )
