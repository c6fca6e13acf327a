"""Steering with latents: a latent's direction as a vector, and a latent held at a value."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pullback.core.errors import InputError, MethodError, ModelError, SiteError
from pullback.steering.vector import SteeringVector

from .model import SparseAutoencoder
from .stream import ActivationGradientStream

__all__ = ["LatentStatistics", "clamp", "latent_statistics", "latent_vector"]

Scale = Literal["unit", "mean", "largest"]


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """How a dictionary is used on some text.

    Attributes:
        frequency: (latents,) share of tokens where it is positive.
        mean, largest: (latents,) of the positive values; 0 where there is none.
        contexts: latent -> its tokens with the largest values, as (value, batch, example, position), largest first.
        tokens: that were counted.
    """

    frequency: Tensor
    mean: Tensor
    largest: Tensor
    contexts: Mapping[int, Sequence[tuple[float, int, int, int]]]
    tokens: int


@torch.no_grad()
def latent_statistics(
    model: nn.Module,
    site: str,
    autoencoder: SparseAutoencoder,
    token_batches: Sequence[Any],
    *,
    contexts: int = 10,
    skip_positions: Sequence[int] = (0,),
) -> LatentStatistics:
    """How often and how strongly each latent is active, and where most, selected by size.

    Args:
        token_batches: a list of batches, as for ``train_sae``.
        contexts: tokens kept for each latent.

    Cost: a forward up to the site per batch; ``contexts`` tokens of every latent are held.

    >>> from pullback.steering.sae import SparseAutoencoderConfig
    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)).eval()
    >>> sae = SparseAutoencoder(SparseAutoencoderConfig(4, 8, 2))
    >>> latent_statistics(model, "0", sae, [torch.arange(6).reshape(1, 6)]).tokens
    5
    """
    batches = list(token_batches)
    if not batches:
        raise InputError("token_batches is empty; expected at least one batch.")
    stream = ActivationGradientStream(model, site, batches, skip_positions=skip_positions)
    count = autoencoder.config.latents
    active, total = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.float64)
    best = torch.zeros(count, 0)
    places = torch.zeros(count, 0, 3, dtype=torch.int64)
    tokens = 0
    for number, batch in enumerate(batches):
        found = stream.of(batch, gradient=False)
        dense = autoencoder.encode(found.x, selection="topk").dense().cpu()
        where = found.kept.nonzero().cpu()
        if where.shape[1] == 1:  # no positions
            where = torch.cat([where, torch.zeros_like(where)], 1)
        tokens += len(dense)
        active += (dense > 0).sum(0)
        total += dense.double().sum(0)
        values, rows = dense.t().topk(min(contexts, len(dense)), 1)
        here = torch.cat([torch.full((*rows.shape, 1), number), where[rows][..., :2]], 2)
        every, places = torch.cat([best, values.to(best)], 1), torch.cat([places, here], 1)
        best, order = every.topk(min(contexts, every.shape[1]), 1)
        places = places.gather(1, order[..., None].expand(-1, -1, 3))
    listed = {latent: _listed(best[latent], places[latent]) for latent in range(count)}
    mean = torch.where(active > 0, total / active.clamp_min(1), 0.0)
    largest = best[:, 0].double() if best.shape[1] else torch.zeros(count, dtype=torch.float64)
    return LatentStatistics(active.double() / tokens, mean, largest, listed, tokens)


def _listed(values: Tensor, places: Tensor) -> list[tuple[float, int, int, int]]:
    """Positive values with their places."""
    found = []
    for value, (batch, example, position) in zip(values.tolist(), places.tolist(), strict=True):
        if value > 0:
            found.append((value, batch, example, position))
    return found


def latent_vector(
    autoencoder: SparseAutoencoder,
    latent: int,
    block: int,
    model: nn.Module | None = None,
    *,
    scale: Scale = "unit",
    statistics: LatentStatistics | None = None,
) -> SteeringVector:
    """A latent's direction w_i as a steering vector at a block.

    With ``vector.apply(model, s, scale="fit", preserve_norm=False)`` the state becomes h + s r w_i: r is 1 ("unit"), or
    the latent's "mean" or "largest" positive value, so that s = 1 is as strong as the latent is by itself.

    Args:
        block: whose output the autoencoder was trained at.
        model: whose fingerprint the vector takes.
        statistics: from ``latent_statistics``, for "mean" and "largest".

    Raises InputError for an unknown latent, or one that never was active; MethodError without statistics.

    >>> from pullback.steering.sae import SparseAutoencoderConfig
    >>> latent_vector(SparseAutoencoder(SparseAutoencoderConfig(4, 8, 2)), 3, block=1).layers
    (1,)
    """
    if scale not in get_args(Scale):
        raise MethodError(f'scale={scale!r}; expected "unit", "mean" or "largest".')
    direction = autoencoder.latent_direction(latent).float().cpu()
    length = 1.0
    if scale != "unit":
        if statistics is None:
            raise MethodError(
                f'scale="{scale}" needs statistics=latent_statistics(model, site, autoencoder, batches).'
            )
        length = float(getattr(statistics, scale)[latent])
        if not length > 0:
            raise InputError(
                f"latent {latent} was never active on the {statistics.tokens} tokens of the statistics, so that it has "
                f'no {scale} value; take scale="unit" or another latent.'
            )
    return SteeringVector.from_displacements(
        {block: direction * length}, model, method="latent", settings={"latent": latent, "scale": scale}
    )


class clamp:
    """A context in which latents are held at values: h becomes h + Σ_i (value_i - a_i) w_i at every token.

    What the autoencoder does not explain of h stays, and so do the other latents. The user's own model is run, with a
    hook that is removed on exit; passes of other threads run as they are.

    Args:
        model: to run inside.
        module: dotted path of the module whose output the autoencoder was trained on, such as "model.layers.8".
        values: latent -> value, in the units of its activation; 0 switches it off.

    Raises SiteError for an unknown path; InputError for an unknown latent, or an output of another width.

    >>> from pullback.steering.sae import SparseAutoencoderConfig
    >>> model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    >>> with clamp(model, "0", SparseAutoencoder(SparseAutoencoderConfig(4, 8, 2)), {3: 2.0}):
    ...     model(torch.ones(1, 2)).shape
    torch.Size([1, 1])
    """

    def __init__(
        self, model: nn.Module, module: str, autoencoder: SparseAutoencoder, values: Mapping[int, float]
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(f"the model is a {type(model).__name__}; expected a torch.nn.Module.")
        modules = dict(model.named_modules())
        if module not in modules:
            raise SiteError(
                f'the model has no module "{module}"; expected a path such as "{list(modules)[-1]}".'
            )
        if not values:
            raise InputError("values is empty; expected latent -> value, such as {3: 2.0}.")
        self._module, self._autoencoder = modules[module], autoencoder
        self._numbers = torch.tensor(list(values))
        for latent in values:
            autoencoder.latent_direction(latent)
        self._values = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
        if not bool(self._values.isfinite().all()):
            raise InputError(f"values are {dict(values)}; expected finite numbers.")
        self._handle: Any = None

    def __enter__(self) -> clamp:
        if self._handle is not None:
            raise MethodError("this context is open already; call clamp(...) again to nest another.")
        self._owner = threading.get_ident()
        self._handle = self._module.register_forward_hook(self._hold)
        return self

    def __exit__(self, *_: object) -> None:
        handle, self._handle = self._handle, None
        handle.remove()

    def _hold(self, module: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != self._owner:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor):
            raise InputError(
                f"the module returns a {type(hidden).__name__}; expected a tensor or a tuple with one."
            )
        latents = self._autoencoder.encode(hidden, selection="topk").dense()
        numbers = self._numbers.to(latents.device)
        change = self._values.to(latents) - latents[..., numbers]
        step = change @ self._autoencoder.decoder.detach()[numbers]
        if latents.shape[:-1] and self._autoencoder.config.normalization == "mean_norm":
            step = step / self._autoencoder.input_scale
        moved = hidden + step.to(hidden)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved
