"""Value targets: numbers of the whole output, for regression, reconstruction, embeddings and losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback.core.errors import TargetError
from pullback.core.target_outputs import (
    EMBEDDINGS,
    Resolved,
    TargetContext,
    check_range,
    check_rows,
    main_tensor,
    named_tensor,
    real,
)

__all__ = ["Loss", "Mean", "Norm", "Similarity"]


@dataclass(frozen=True)
class Mean:
    """The mean of an example's whole output, padding included.

    >>> resolved = Mean().resolve(torch.ones(1, 2, 2), TargetContext(batch=1))
    >>> resolved.score(torch.ones(1, 2, 2), torch.arange(1))
    tensor([1.])
    """

    def resolve(self, output: Any, context: TargetContext) -> Resolved:
        clean = check_rows(main_tensor(output), context.batch)

        def score(output: Any, rows: Tensor) -> Tensor:
            tensor = check_rows(main_tensor(output), rows.numel(), clean.shape[1:])
            return real(tensor).reshape(len(tensor), -1).mean(1)

        return Resolved(("mean of the output",) * context.batch, None, score)


def _embedding(output: Any) -> tuple[str, Tensor]:
    try:
        return named_tensor(output, EMBEDDINGS)
    except TargetError:
        return named_tensor(output)


@dataclass(frozen=True)
class Norm:
    """Half the squared norm of the output embedding, |z|^2 / 2, whose gradient is the embedding itself.

    A (B, T, D) output counts its real tokens only. Of an output with several parts, the embedding is read:
    pooler_output, image_embeds, text_embeds or last_hidden_state.

    >>> resolved = Norm().resolve(torch.tensor([[3.0, 4.0]]), TargetContext(batch=1))
    >>> resolved.score(torch.tensor([[3.0, 4.0]]), torch.arange(1))
    tensor([12.5000])
    """

    def resolve(self, output: Any, context: TargetContext) -> Resolved:
        name, clean = _embedding(output)
        check_rows(clean, context.batch)
        mask = context.attention_mask
        if mask is None or mask.ndim != 2 or clean.ndim != 3 or mask.shape[1] != clean.shape[1]:
            mask = None
        else:
            mask = (mask != 0).clone()

        def score(output: Any, rows: Tensor) -> Tensor:
            tensor = real(check_rows(_embedding(output)[1], rows.numel(), clean.shape[1:]))
            if mask is not None:
                tensor = torch.where(mask.to(tensor.device)[rows.to(tensor.device)][:, :, None], tensor, 0.0)
            return tensor.reshape(len(tensor), -1).square().sum(1) / 2

        return Resolved((f"half the squared norm of {name or 'the output'}",) * context.batch, None, score)


@dataclass(frozen=True, eq=False)
class Similarity:
    """Similarity of the output embedding (B, D) with a reference (D,) or (B, D): cosine, or the dot product.

    >>> target = Similarity(torch.tensor([1.0, 0.0]))
    >>> target.resolve(torch.ones(1, 2), TargetContext(batch=1)).score(torch.ones(1, 2), torch.arange(1))
    tensor([0.7071])
    """

    reference: Tensor = field(repr=False)
    kind: Literal["cosine", "dot"] = "cosine"

    def resolve(self, output: Any, context: TargetContext) -> Resolved:
        if self.kind not in ("cosine", "dot"):
            raise TargetError(f'no similarity "{self.kind}": use "cosine" or "dot".')
        name, clean = _embedding(output)
        shape = tuple(check_rows(clean, context.batch).shape)
        given = tuple(self.reference.shape)
        if clean.ndim != 2 or given not in (shape, shape[1:]):
            raise TargetError(
                f"Similarity compares (B, D) embeddings; output shape is {shape}, the reference's is "
                f"{given}. Pool the tokens in a callable, as in target=lambda output: output[0].mean(1) @ "
                "reference."
            )
        reference = self.reference.detach().to(clean.device).expand(shape).clone()

        def score(output: Any, rows: Tensor) -> Tensor:
            tensor = real(check_rows(_embedding(output)[1], rows.numel(), clean.shape[1:]))
            own = reference.to(tensor)[rows.to(tensor.device)]
            return F.cosine_similarity(tensor, own, 1) if self.kind == "cosine" else (tensor * own).sum(1)

        label = f"{self.kind} similarity of {name or 'the output'} with the reference"
        return Resolved((label,) * context.batch, None, score)


def _cross_entropy(values: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(values, labels, reduction="none", ignore_index=-100).reshape(len(values), -1)
    return losses.sum(1) / (labels != -100).reshape(len(values), -1).sum(1)


def _elementwise(loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def formula(values: Tensor, labels: Tensor) -> Tensor:
        return loss(values, labels.to(values.dtype), reduction="none").reshape(len(values), -1).mean(1)

    return formula


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": _cross_entropy,
    "mse": _elementwise(F.mse_loss),
    "l1": _elementwise(F.l1_loss),
    "binary_cross_entropy": _elementwise(F.binary_cross_entropy_with_logits),
}


@dataclass(frozen=True, eq=False)
class Loss:
    """The loss of each example, not its negative: what has positive attribution raises the loss.

    ``labels``: for "cross_entropy" integers, (B,) for (B, K) outputs, (B, T) for (B, T, V) (what column t
    predicts: shift them for a causal model), (B, *space) for (B, K, *space), -100 ignored; for "mse", "l1"
    and "binary_cross_entropy" (of logits) a tensor of the output's shape. Averaged over an example's
    entries.

    >>> Loss(torch.tensor([1])).resolve(torch.zeros(1, 2), TargetContext(batch=1)).labels
    ('cross_entropy loss',)
    """

    labels: Tensor = field(repr=False)
    function: str = "cross_entropy"

    def resolve(self, output: Any, context: TargetContext) -> Resolved:
        if self.function not in _LOSSES:
            raise TargetError(f'no loss "{self.function}": use one of {", ".join(_LOSSES)}, or a callable.')
        clean = check_rows(main_tensor(output), context.batch)
        labels = torch.as_tensor(self.labels).detach().to(clean.device).clone()
        class_axis = None
        if self.function == "cross_entropy":
            # Classes stand last over tokens and second over space; the labels' shape tells which.
            axes = [axis for axis in (clean.ndim - 1, 1) if labels.shape == _without(clean.shape, axis)]
            class_axis = axes[0] if axes and clean.ndim > 1 and not labels.is_floating_point() else None
            fits, expected = class_axis is not None, f"integers of shape {tuple(_without(clean.shape, -1))}"
        else:
            fits, expected = labels.shape == clean.shape, f"the output's shape {tuple(clean.shape)}"
        if not fits:
            raise TargetError(
                f"Loss({self.function!r}): labels are {labels.dtype} of shape {tuple(labels.shape)}, "
                f"expected {expected}."
            )
        if class_axis is not None:
            labels = labels.long()
            check_range(labels[labels != -100], clean.shape[class_axis], clean.shape)
        formula = _LOSSES[self.function]

        def score(output: Any, rows: Tensor) -> Tensor:
            values = real(check_rows(main_tensor(output), rows.numel(), clean.shape[1:]))
            values = values if class_axis is None else values.movedim(class_axis, 1)
            return formula(values, labels.to(values.device)[rows.to(values.device)])

        return Resolved((f"{self.function} loss",) * context.batch, None, score)


def _without(shape: torch.Size, axis: int) -> torch.Size:
    sizes = list(shape)
    if len(sizes) > 1:
        del sizes[axis]
    return torch.Size(sizes)
