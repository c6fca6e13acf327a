"""Activations at a site, and the gradient of the model's loss there: what sparse autoencoders are trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pullback.core.errors import InputError, ModelError
from pullback.core.inputs import ModelInputs, read_inputs
from pullback.core.resources import parse_bytes

from .cut_model import CutModel
from .prediction_loss import Loss, check_loss
from .token_batches import TokenBatches

__all__ = ["ActivationGradientStream", "SiteActivations"]


class SiteActivations(NamedTuple):
    """What a batch gives at the site, one row per token that is neither padding nor skipped.

    ``x`` and ``gradient`` (tokens, width), ``gradient`` None where it was not asked for; ``kept`` bool, of the value's
    shape without the width, says which positions these are; ``loss`` is the summed loss, None without gradient.
    """

    x: Tensor
    gradient: Tensor | None
    kept: Tensor
    loss: Tensor | None


class ActivationGradientStream:
    """Batch after batch of tokens, as activations at a site with the gradient of the loss there.

    g_t = d (sum of the losses) / d x_t. The loss is a sum, so that g does not depend on the batch. Without gradients
    the forward ends at the site and nothing is recorded. Runs on a private shadow of the model.

    Args:
        model: any ``nn.Module`` in eval mode.
        site: where, such as "transformer.h.8"; its value has the width last, (B, T, width) or (B, width).
        token_batches: a tensor, tuple or dict per batch, see ``TokenBatches``. ``labels`` are taken out of a dict.
        loss: "ce", cross-entropy of the next token (or of ``labels``); "ce_sampled", of a label drawn from the model's
            softmax; or (logits, inputs by name) -> differentiable losses, which are summed.
        skip_positions: positions left out, counted from the first real token: 0 is BOS, whose norm is an outlier.
        seed: of the drawn labels.
        logits_budget: bytes of logits held at once, or text such as "64MiB".
        process, processes: see ``TokenBatches``.

    Raises InputError, ModelError, SiteError: no such value, not finite, nothing to predict, a model in train mode.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    >>> batches = [{"input": torch.ones(5, 3), "labels": torch.zeros(5, dtype=torch.long)}]
    >>> ActivationGradientStream(model, "0", batches).read().gradient.shape
    torch.Size([5, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        site: str,
        token_batches: Iterable[Any],
        *,
        loss: Loss = "ce",
        skip_positions: Sequence[int] = (0,),
        seed: int = 0,
        logits_budget: int | float | str = "64MiB",
        process: int = 0,
        processes: int = 1,
    ) -> None:
        check_loss(loss)
        if not isinstance(model, nn.Module):
            raise ModelError(f"the model is a {type(model).__name__}; expected a torch.nn.Module.")
        self._model = model
        self.seed = seed
        self.skip_positions = tuple(skip_positions)
        self.batches = TokenBatches(token_batches, seed, process, processes)
        first, _ = self.split(next(TokenBatches(token_batches, seed)))
        self.cut = CutModel(model, first, site, loss, parse_bytes(logits_budget))

    @property
    def width(self) -> int:
        """Of the activations."""
        return self.cut.width

    def read(self, gradient: bool = True) -> SiteActivations:
        """The next batch. Cost: a forward up to the site; with ``gradient`` a whole one, and a backward to the site."""
        place = f"{self.batches.epoch}/{self.batches.number + self.batches.process}"
        return self.of(next(self.batches), gradient, place)

    def of(self, batch: Any, gradient: bool = True, draw: str = "") -> SiteActivations:
        """As ``read``, of a batch of the caller's; ``draw`` names the draws of "ce_sampled"."""
        inputs, labels = self.split(batch)
        found = loss = None
        if gradient:
            value, found, loss = self.cut.gradient(inputs, labels, (self.seed, draw))
        else:
            value = self.cut.value(inputs)
        kept = _kept(value.shape[:-1], inputs, self.skip_positions).to(value.device)
        x, g = value[kept], None if found is None else found[kept]
        for name, rows in (("activations", x), ("gradients of the loss", g)):
            if rows is not None and not bool(rows.isfinite().all()):
                bad = int((~rows.isfinite()).any(1).sum())
                raise InputError(
                    f'the {name} at "{self.cut.asked_site}" are NaN or infinite at {bad} of {len(rows)} tokens; '
                    "expected finite ones. Check the model in its dtype, and that attention_mask marks the padding."
                )
        return SiteActivations(x, g, kept, loss)

    def split(self, batch: Any) -> tuple[ModelInputs, Tensor | None]:
        """The call, and the labels taken out of it: the model would only compute its own mean loss from them."""
        labels = None
        if isinstance(batch, Mapping):
            batch = dict(batch)
            labels = batch.pop("labels", None)
        return read_inputs(batch, self._model), labels


def _kept(places: torch.Size, inputs: ModelInputs, skipped: Sequence[int]) -> Tensor:
    """Which places of the value count: real tokens that are not skipped. Values without positions count all."""
    tokens = inputs.tokens
    masks = [inputs.attention_mask, inputs.leaf.get("decoder_attention_mask")]
    flat = len(places) == 1
    real = next(
        (
            mask != 0
            for mask in masks
            if mask is not None and (mask.numel() == places[0] if flat else mask.shape == places[:2])
        ),
        None,
    )
    if real is None and not flat:
        real = torch.ones(places[:2], dtype=torch.bool)
    elif real is None and tokens is not None and tokens.dim() == 2 and tokens.numel() == places[0]:
        real = torch.ones(
            tokens.shape, dtype=torch.bool
        )  # tokens of all examples in one row, as in a mixture
    if real is None:
        return torch.ones(places, dtype=torch.bool)
    kept = real.clone()
    position = real.long().cumsum(1) - 1
    for number in skipped:
        kept &= position != number
    if flat:
        return kept.flatten()
    return kept.reshape(*kept.shape, *[1] * (len(places) - 2)).expand(places)
