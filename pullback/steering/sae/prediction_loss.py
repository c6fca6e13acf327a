"""The model's loss whose gradient an autoencoder sees: cross-entropy summed over tokens, with logits in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pullback.core.errors import InputError, MethodError

__all__ = ["LOSSES", "Loss", "Prediction", "check_loss", "chunked_loss", "plan_prediction", "summed_loss"]

LOSSES = ("ce", "ce_sampled")
Loss: TypeAlias = "str | Callable[[Tensor, Mapping[str, Tensor]], Tensor]"
"""``"ce"``, ``"ce_sampled"``, or (logits, inputs of these examples by name) -> a loss per token or example."""

_IGNORED = -100  # the label that transformers' losses leave out


def check_loss(loss: Any) -> None:
    """Raise MethodError unless it is a loss."""
    if not callable(loss) and loss not in LOSSES:
        raise MethodError(
            f'loss is {loss!r}; expected "ce", "ce_sampled", or a callable (logits, inputs) -> loss per token.'
        )


@dataclass(frozen=True, eq=False)
class Prediction:
    """Which positions of the logits (B, T) or (B,) predict, and what: a label, or a draw from the model.

    Attributes:
        predicts: bool, the positions with a loss.
        labels: int64; None where labels are drawn.
        draws: one uniform number per position, by which the label is drawn; None where labels are given.
    """

    predicts: Tensor
    labels: Tensor | None
    draws: Tensor | None

    def rows(self, examples: slice) -> Prediction:
        """The same for some of the examples."""
        kept = (None if part is None else part[examples] for part in (self.predicts, self.labels, self.draws))
        return Prediction(*kept)  # type: ignore[arg-type]

    def loss(self, logits: Tensor, positions: Tensor) -> Tensor:
        """The summed cross-entropy (scalar) of logits (P, classes) at positions (P,), counted over the flat shape."""
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        if self.labels is not None:
            return cross_entropy(logits, self.labels.flatten()[positions], reduction="sum")
        assert self.draws is not None
        chances = logits.detach().softmax(1).cumsum(1)
        drawn = self.draws.flatten()[positions].to(chances).unsqueeze(1) * chances[:, -1:]
        labels = torch.searchsorted(chances, drawn, right=True).clamp(max=logits.shape[1] - 1)
        return cross_entropy(logits, labels.squeeze(1), reduction="sum")


def plan_prediction(
    loss: str, shape: torch.Size, inputs: Mapping[str, Tensor], real: Tensor | None, draws: Tensor | None
) -> Prediction:
    """What logits of shape (B, T, classes) or (B, classes) are compared with.

    "ce": the next token (``labels`` where given, else the token ids, both one step ahead of the logits), or of (B,
    classes) the ``labels`` (B,). "ce_sampled": at every real position a label drawn from the model's own softmax.

    Args:
        inputs: tensors of the call by name, with ``labels`` if there are any.
        real: (B, T) bool, False at padding.
        draws: (B, T) or (B,) uniform numbers, for "ce_sampled".

    Raises InputError where there is nothing of the logits' shape to predict.
    """
    places = shape[:-1]
    fits = real is not None and real.shape == places
    if loss == "ce_sampled":
        assert draws is not None
        everywhere = torch.ones(places, dtype=torch.bool, device=draws.device)
        return Prediction(real.bool() if fits and real is not None else everywhere, None, draws)
    names = ("labels", "decoder_input_ids", "input_ids", *inputs)
    found = next(
        (
            (name, inputs[name])
            for name in names
            if name in inputs and inputs[name].shape == places and not inputs[name].is_floating_point()
            if not name.endswith(("mask", "token_type_ids", "position_ids"))
        ),
        None,
    )
    if found is None or (found[0] != "labels" and len(places) < 2):
        raise InputError(
            f"the model's output is {tuple(shape)}, and no input of shape {tuple(places)} says what to predict; "
            'expected token ids, or "labels". Try loss="ce_sampled", which needs none.'
        )
    labels = found[1].long()
    predicts = labels != _IGNORED
    if len(places) < 2:
        return Prediction(predicts, labels.clamp(min=0), None)
    if fits and real is not None:
        predicts = predicts & real.bool()
    ahead = torch.zeros_like(predicts)
    ahead[:, :-1] = predicts[:, 1:]  # the last position predicts nothing
    if fits and real is not None:
        ahead &= real.bool()
    following = torch.zeros_like(labels)
    following[:, :-1] = labels[:, 1:].clamp(min=0)
    return Prediction(ahead, following, None)


def summed_loss(
    loss: Loss, logits: Tensor, inputs: Mapping[str, Tensor], prediction: Prediction | None
) -> Tensor:
    """The loss of whole logits, summed over tokens (a mean would make beta depend on the batch)."""
    if prediction is not None:
        positions = prediction.predicts.flatten().nonzero().squeeze(1)
        return prediction.loss(logits.flatten(0, -2)[positions], positions)
    assert callable(loss)
    value = loss(logits, inputs)
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.requires_grad:
        raise MethodError(
            f"the loss returned a {type(value).__name__} without derivative; "
            "expected a differentiable tensor of losses per token or example, as in lambda logits, inputs: ..."
        )
    return value.sum()


def chunked_loss(
    head: Callable[[Tensor], Tensor], hidden: Tensor, prediction: Prediction, chunk: int
) -> tuple[Tensor, Tensor]:
    """The summed loss and its gradient in the head's input, with the logits of ``chunk`` tokens at once.

    Args:
        head: (P, width) -> (P, classes).
        hidden: (B, T, width).

    Returns the loss (scalar) and the gradient, (B, T, width).
    """
    flat = hidden.detach().flatten(0, -2)
    gradient = torch.zeros_like(flat)
    total = flat.new_zeros((), dtype=torch.float32 if flat.dtype != torch.float64 else flat.dtype)
    for positions in _pieces(prediction.predicts, chunk):
        part = flat[positions].requires_grad_()
        value = prediction.loss(head(part), positions)
        gradient[positions] = torch.autograd.grad(value, part)[0]
        total += value.detach()
    return total, gradient.reshape(hidden.shape)


def _pieces(predicts: Tensor, chunk: int) -> Iterator[Tensor]:
    yield from predicts.flatten().nonzero().squeeze(1).split(chunk)
