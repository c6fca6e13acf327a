"""Steering by latents: a latent's direction as a steering vector, clamped latents, and what each direction does."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pullback.core.edits import edit
from pullback.core.errors import InputError, MethodError, SiteError
from pullback.core.sites import Site
from pullback.steering.blocks import find_blocks
from pullback.steering.vector import SteeringVector

from .latent_statistics import LatentStatistics
from .model import SparseAutoencoder
from .stream import ActivationGradientStream
from .substitution import Substitution, read_batches

__all__ = ["SteeringEffects", "clamped", "latent_vector", "steering_effects"]


def latent_vector(
    autoencoder: SparseAutoencoder,
    latent: int,
    model: nn.Module,
    site: str,
    *,
    statistics: LatentStatistics | None = None,
    scale: Literal["mean", "largest"] = "mean",
) -> SteeringVector:
    """The direction w_i that latent i writes, as a steering vector at the block whose output the site is.

    With ``statistics`` the vector's scale is the latent's mean positive (or largest) value, so that
    ``vector.apply(model, s, scale="fit", preserve_norm=False)`` adds s times that value: h + s m_i w_i.

    Args:
        autoencoder, latent: which direction (width,).
        model, site: such as "transformer.h.8", the output of a block.
        statistics: of ``latent_statistics``; without, the scale is 1.
        scale: which of its values.

    Raises SiteError where the site is no block's output, InputError for no such latent or one that never fires.

    >>> from pullback.steering.sae import SparseAutoencoderConfig
    >>> blocks = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])})
    >>> autoencoder = SparseAutoencoder(SparseAutoencoderConfig(4, latents=8, k=2))
    >>> latent_vector(autoencoder, 3, blocks, "layers.1").layers
    (1,)
    """
    direction = autoencoder.latent_direction(latent)
    place, found = Site.parse(site), find_blocks(model)
    named = {f"{found.path}.{number}": number for number in range(len(found))}
    if place.path not in named or place.side != "output" or place.call is not None:
        raise SiteError(
            f'"{site}" is not the output of a block, which steering vectors are added to; expected one of '
            f'"{found.path}.0" to "{found.path}.{len(found) - 1}". Elsewhere use clamped(...).'
        )
    length = 1.0
    if statistics is not None:
        length = float((statistics.mean if scale == "mean" else statistics.largest)[latent])
        if not length > 0:
            raise InputError(
                f"latent {latent} never fires in these statistics, so it has no scale; leave statistics out."
            )
    made = SteeringVector.from_displacements(
        {named[place.path]: direction}, model, method="sae_latent", latent=latent, site=str(site)
    )
    return SteeringVector(made.directions, {named[place.path]: length}, made.fingerprint, made.provenance)


@contextmanager
def clamped(
    model: nn.Module,
    site: str,
    autoencoder: SparseAutoencoder,
    values: Mapping[int, float],
    *,
    selection: Literal["topk", "gradient"] | None = "topk",
) -> Iterator[None]:
    """Run ``model`` with latents held at values, everything else at the site kept: x + sum_i (v_i - a_i) w_i.

    The error stays, so that a latent clamped to what it has changes nothing. Acts in this thread only; the model is as
    before afterwards.

    Args:
        model, site, autoencoder: where the latents are; values (..., width).
        values: v_i by latent number; 0 ablates it.
        selection: how a_i are found; there is no gradient here, so "topk" by default.

    Raises InputError for no such latent or a value that is not finite, MethodError under row normalisation.

    Source: Templeton et al. 2024 (Scaling Monosemanticity), feature steering.
    """
    if autoencoder.config.normalization == "row":
        raise MethodError(
            'clamped does not take autoencoders with normalization="row": values have no fixed unit.'
        )
    for latent, value in values.items():
        autoencoder.latent_direction(latent)
        if not math.isfinite(value):
            raise InputError(f"latent {latent} is to be {value!r}; expected a finite number.")
    index = torch.tensor(list(values), dtype=torch.long)
    wanted = torch.tensor(list(values.values()), dtype=torch.float64)
    owner = threading.get_ident()

    def change(value: Tensor, call: int) -> Tensor | None:
        if threading.get_ident() != owner:
            return None
        with torch.no_grad():
            now = autoencoder.encode(value, selection=selection).dense()[..., index.to(value.device)]
            move = (wanted.to(now) - now) @ autoencoder.decoder[index.to(value.device)]
        if autoencoder.config.normalization == "mean_norm":
            move = move / autoencoder.input_scale
        return value + move.to(value.dtype)

    with edit(model, [(Site.parse(site), change)]):
        yield


@dataclass(frozen=True, eq=False)
class SteeringEffects:
    """What adding a multiple of w_i at every token does to the predictions, for L latents.

    Attributes:
        latents: their numbers.
        strength: (L,) length of what is added, in the activations' unit.
        mean_change, largest_change: (L,) mean over tokens of the mean and of the largest |change| of a logit, logits
            centred over the vocabulary.
        kl: (L,) KL(before || after) per token in nats.
        logits: (L, V) mean signed change of each logit: what the latent promotes and suppresses.
    """

    latents: list[int]
    strength: Tensor
    mean_change: Tensor
    largest_change: Tensor
    kl: Tensor
    logits: Tensor


@torch.no_grad()
def steering_effects(
    model: nn.Module,
    site: str,
    batches: Sequence[Any],
    autoencoder: SparseAutoencoder,
    latents: Sequence[int],
    *,
    norm: float | None = None,
    statistics: LatentStatistics | None = None,
    skip_positions: Sequence[int] = (0,),
) -> SteeringEffects:
    """The effect of each latent's direction on the predictions, at equal norm or at its own mean value.

    Args:
        model, site, batches, autoencoder, skip_positions: as in ``evaluate_sae``; any contexts will do.
        latents: whose directions.
        norm: of what is added, the same for all; compare two autoencoders at the same norm.
        statistics: in place of it, each latent's mean positive value is the length.

    Raises MethodError unless one of norm and statistics is given, InputError for no such latent.

    Cost: one forward per batch and latent, and one per batch.

    Source: Olmo et al. 2024 (arXiv 2411.10397), steering experiments as the abstract describes them.
    """
    if (norm is None) == (statistics is None):
        raise MethodError(
            "give norm=..., one length for all latents, or statistics=..., each at its own mean value."
        )
    directions = torch.stack([autoencoder.latent_direction(latent) for latent in latents])
    lengths = directions.norm(dim=1).clamp_min(1e-30)
    if statistics is not None:
        strength = statistics.mean[torch.tensor(list(latents))].to(directions) * lengths
    else:
        strength = torch.full_like(lengths, float(norm or 0.0))
    moves = directions * (strength / lengths).unsqueeze(1)
    stream = ActivationGradientStream(model, site, batches, skip_positions=skip_positions)
    totals: list[Tensor] = []
    count = 0
    for batch in read_batches(stream, batches):
        there = Substitution(stream, batch)
        before = _centred(there.logits)
        count += there.tokens
        parts = []
        for move in moves:
            after = there.rows(there.changed_logits(batch.x + move.to(batch.x)))
            change = _centred(after) - before
            chance = before.log_softmax(-1)
            kl = (chance.exp() * (chance - after.double().log_softmax(-1))).sum()
            size = change.abs()
            scalars = torch.stack([size.mean(1).sum(), size.amax(1).sum(), kl])
            parts.append(torch.cat([scalars, change.sum(0)]).cpu())
        totals.append(torch.stack(parts))
    found = torch.stack(totals).sum(0) / count
    return SteeringEffects(list(latents), strength.cpu(), found[:, 0], found[:, 1], found[:, 2], found[:, 3:])


def _centred(logits: Tensor) -> Tensor:
    logits = logits.double()
    return logits - logits.mean(-1, keepdim=True)
