"""A model whose activations at a site are exchanged, and how far its predictions move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pullback.core.edits import edit
from pullback.core.errors import InputError
from pullback.core.inputs import ModelInputs
from pullback.core.posed import kept_random_state
from pullback.core.target_outputs import main_tensor

from .prediction_loss import plan_prediction
from .stream import ActivationGradientStream

__all__ = ["Substitution", "TokenBatch", "read_batches"]


class TokenBatch(NamedTuple):
    """A batch: what the model is called with, and which of its tokens count (all positions of the site's value)."""

    call: ModelInputs
    labels: Tensor | None
    kept: Tensor
    x: Tensor


class Substitution:
    """A batch's predictions, and those with other activations at the tokens that count; the others stay.

    Positions with a loss are those of the next token, or of ``labels``.

    Raises InputError where nothing of the batch says what to predict.
    """

    def __init__(self, stream: ActivationGradientStream, batch: TokenBatch) -> None:
        self.stream, self.batch = stream, batch
        logits = self._logits(None)
        named = dict(batch.call.leaf)
        if batch.labels is not None:
            named["labels"] = batch.labels
        plan = plan_prediction("ce", logits.shape, named, batch.call.attention_mask, None)
        self.positions = plan.predicts.flatten().nonzero().squeeze(1)
        if not len(self.positions):
            raise InputError(
                "a batch has no token to predict; expected at least two real tokens per example."
            )
        self._plan = plan
        self.logits = self.rows(logits)
        self.tokens = len(self.positions)
        self.loss = self._loss(self.logits)

    def with_activations(self, x: Tensor) -> tuple[float, float]:
        """Summed cross-entropy, and summed KL(as it was || exchanged), with x (tokens, width) at the site."""
        rows = self.rows(self.changed_logits(x))
        before = self.logits.double().log_softmax(-1)
        divergence = (before.exp() * (before - rows.double().log_softmax(-1))).sum()
        return self._loss(rows), float(divergence)

    def changed_logits(self, x: Tensor) -> Tensor:
        """The logits with x (tokens, width) at the site's tokens that count."""

        def change(value: Tensor) -> Tensor:
            changed = value.clone()
            changed[self.batch.kept.to(value.device)] = x.to(value)
            return changed

        return self._logits(change)

    def rows(self, logits: Tensor) -> Tensor:
        """Those of logits (..., classes) that predict, (tokens, classes)."""
        return logits.flatten(0, -2)[self.positions.to(logits.device)]

    def _loss(self, rows: Tensor) -> float:
        return float(self._plan.loss(rows.double(), self.positions))

    def _logits(self, change: Callable[[Tensor], Tensor] | None) -> Tensor:
        cut, inputs = self.stream.cut, self.batch.call
        edits: list[Any] = []
        leaves: dict[str, Tensor] = {}
        if change is not None and cut.site.kind == "input":
            name = str(cut.site.leaf or inputs.explained[0])
            leaves = {name: change(inputs.leaf[name].detach().clone())}
        elif change is not None:
            edits = [(cut.site, lambda value, call: change(value))]
        with torch.inference_mode(False), torch.no_grad(), kept_random_state(0), edit(cut.module, edits):
            args, kwargs = inputs.rows(None, leaves)
            return main_tensor(cut.module(*args, **kwargs)).detach()


def read_batches(stream: ActivationGradientStream, batches: Sequence[Any]) -> Iterator[TokenBatch]:
    """The batches as the model takes them, with the activations at the site."""
    for batch in batches:
        call, labels = stream.split(batch)
        found = stream.of(batch, gradient=False)
        yield TokenBatch(call, labels, found.kept, found.x)
