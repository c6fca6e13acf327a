"""What a latent fires on: how often, how strongly, and its strongest contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pullback.core.errors import InputError

from .model import SparseAutoencoder
from .prediction_loss import Loss
from .stream import ActivationGradientStream
from .substitution import read_batches

__all__ = ["Context", "LatentStatistics", "latent_statistics"]


class Context(NamedTuple):
    """Tokens around a place where a latent fires: ``tokens[place]`` is where, ``value`` how strongly."""

    tokens: list[int]
    place: int
    value: float


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """Statistics of n latents over ``count`` tokens.

    Attributes:
        frequency: (n,) share of tokens with a positive value.
        mean: (n,) mean positive value, ``largest`` (n,) the largest; 0 where a latent never fires.
        top_values: (n, m) the largest values, descending; ``top_places`` (n, m, 2) example and position, -1 where
            there are fewer.
        examples: token ids of each example; empty for a model without token ids.
    """

    frequency: Tensor
    mean: Tensor
    largest: Tensor
    top_values: Tensor
    top_places: Tensor
    examples: list[Tensor]
    count: int

    def contexts(self, latent: int, before: int = 10, after: int = 5) -> list[Context]:
        """The strongest contexts of a latent. Raises InputError for no such latent or a model without token ids."""
        if not 0 <= latent < len(self.frequency):
            raise InputError(f"there is no latent {latent}; expected 0 to {len(self.frequency) - 1}.")
        if not self.examples:
            raise InputError("the model takes no token ids, so there are no contexts to read.")
        found = []
        places = self.top_places[latent].tolist()
        for value, (example, position) in zip(self.top_values[latent].tolist(), places, strict=True):
            if value > 0:
                start = max(0, position - before)
                tokens = self.examples[example][start : position + after + 1].tolist()
                found.append(Context(tokens, position - start, value))
        return found


@torch.no_grad()
def latent_statistics(
    model: nn.Module,
    site: str,
    batches: Sequence[Any],
    autoencoder: SparseAutoencoder,
    *,
    contexts: int = 10,
    loss: Loss = "ce_sampled",
    skip_positions: Sequence[int] = (0,),
    seed: int = 0,
) -> LatentStatistics:
    """How latents fire on batches, selected as the autoencoder was trained to; ``loss`` gives a g-SAE its gradient.

    Args:
        model, site, batches, autoencoder, skip_positions, seed: as in ``evaluate_sae``.
        contexts: strongest places kept per latent, m.

    Raises InputError where no token counts, and what ``ActivationGradientStream`` raises.

    Cost: one forward to the site per batch (a g-SAE: a whole one and a backward more); tokens x latents values of a
    batch at once.

    Example:
        >>> from pullback.steering.sae import SparseAutoencoderConfig
        >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)).eval()
        >>> autoencoder = SparseAutoencoder(SparseAutoencoderConfig(4, latents=8, k=8))
        >>> found = latent_statistics(net, "0", [torch.arange(6).reshape(1, 6)], autoencoder)
        >>> found.count, found.top_values.shape
        (5, torch.Size([8, 10]))
    """
    stream = ActivationGradientStream(
        model, site, batches, loss=loss, skip_positions=skip_positions, seed=seed
    )
    n = autoencoder.config.latents
    fired, sums = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    values, places = torch.zeros(n, contexts), torch.full((n, contexts, 2), -1)
    examples: list[Tensor] = []
    count = first = 0
    wants = autoencoder.config.selection == "gradient" and autoencoder.config.beta > 0
    for number, (given, batch) in enumerate(zip(batches, read_batches(stream, batches), strict=True)):
        gradient = stream.of(given, draw=f"statistics/{number}").gradient if wants else None
        dense = autoencoder.encode(batch.x, gradient).dense().cpu()
        fired += (dense > 0).double().sum(0)
        sums += dense.double().sum(0)
        at = batch.kept.nonzero()
        at = torch.stack([at[:, 0] + first, at[:, 1] if at.shape[1] > 1 else torch.zeros_like(at[:, 0])], 1)
        every = torch.cat([values, dense.float().T], 1)
        where = torch.cat([places, at.cpu().expand(n, -1, -1)], 1)
        values, order = every.topk(contexts, dim=1)
        places = where.gather(1, order.unsqueeze(-1).expand(-1, -1, 2))
        tokens = batch.call.tokens
        if tokens is not None and tokens.dim() == 2:
            examples += list(tokens.cpu())
        count, first = count + len(dense), first + batch.call.batch
    if not count:
        raise InputError("no token counts: all are padding or skipped. Give longer texts.")
    places[values <= 0] = -1
    mean = torch.where(fired > 0, sums / fired.clamp_min(1), 0.0)
    return LatentStatistics(fired / count, mean, values[:, 0].clone(), values, places, examples, count)
