"""Class targets: a class's or a token's logit, probability or margin, and the reader they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import TargetError
from pullback.core.target_outputs import (
    LOGITS,
    Resolved,
    TargetContext,
    check_range,
    check_rows,
    class_name,
    label_index,
    main_tensor,
    named_tensor,
    per_example,
    real,
)

__all__ = ["ClassScores", "Index", "Logit", "Margin", "Probability", "is_tokens", "pick"]

# A class or label for all examples, or one per example; None is the predicted class.
Index = int | str | Tensor | Sequence[int] | Sequence[str] | None


def is_tokens(name: str, tensor: Tensor, context: TargetContext) -> bool:
    """Whether a 3-D output is (batch, token, class) rather than (batch, channel, step)."""
    known = context.input_ids is not None or context.attention_mask is not None
    return tensor.ndim == 3 and (known or name in LOGITS or hasattr(context.config, "vocab_size"))


def token_positions(tensor: Tensor, position: Any, context: TargetContext, mask_token: int | None) -> Tensor:
    """(B,) output columns to read: the mask token if there is one, else the last real token; or as given.

    Positions are columns of the padded row; negative ones count back from each example's last real token.
    Where the output is longer or shorter than the token row (soft prompts, ``logits_to_keep``) they meet at
    the end.
    """
    columns, last, mask = tensor.shape[1], context.last, context.attention_mask
    mask = mask if mask is not None and mask.ndim == 2 else None
    width = mask.shape[1] if mask is not None else 0
    if mask is None and context.input_ids is not None:
        width = context.input_ids.shape[1]
    ids = context.input_ids
    if last is None or getattr(context.config, "is_encoder_decoder", False):
        # The tokens known are the encoder's; the output's columns are the decoder's.
        last, mask, ids, width = torch.full((context.batch,), columns - 1), None, None, columns
    last = last.cpu()
    if position is None:
        chosen = last
        if ids is not None and mask_token is not None:
            masked = (ids == mask_token).cpu()
            chosen = torch.where(masked.any(1), masked.long().argmax(1), last)
    else:
        given = per_example(position, context.batch, "position")
        chosen = torch.where(given < 0, last + 1 + given.cpu(), given.cpu())
    read = chosen + columns - width
    outside = (read < 0) | (read >= columns) | (chosen < 0)
    if outside.any():
        example = int(outside.nonzero()[0])
        raise TargetError(
            f"position {int(chosen[example])} of example {example} is outside the output's {columns} columns "
            f"(0..{columns - 1}); output shape is {tuple(tensor.shape)}."
        )
    if mask is not None:
        padded = mask.cpu().gather(1, chosen[:, None])[:, 0] == 0
        if padded.any():
            example = int(padded.nonzero()[0])
            raise TargetError(
                f"position {int(chosen[example])} of example {example} is padding; see attention_mask."
            )
    return read.to(tensor.device)


@dataclass(frozen=True, eq=False)
class ClassScores:
    """Reads (R, K) class scores of an output: (R,) as one class, (R, K), or (R, T, K) at positions."""

    shape: torch.Size
    positions: Tensor | None
    context: TargetContext

    @classmethod
    def of(
        cls, output: Any, context: TargetContext, position: Any = None, mask_token: int | None = None
    ) -> ClassScores:
        name, tensor = named_tensor(output)
        check_rows(tensor, context.batch)
        if name == "logits_per_image" and 1 < context.batch == tensor.shape[-1]:
            raise TargetError(
                f"the {context.batch} classes of logits_per_image are the batch's own texts, which are not "
                "all there in every evaluation. Use target=None (each image with its own text), or one image "
                "at a time."
            )
        if tensor.ndim <= 2 and position is None:
            return cls(tensor.shape, None, context)
        if is_tokens(name, tensor, context) or (tensor.ndim == 3 and position is not None):
            if mask_token is None:
                mask_token = getattr(context.config, "mask_token_id", None)
            return cls(tensor.shape, token_positions(tensor, position, context, mask_token), context)
        raise TargetError(
            f"a class alone does not name one number of an output of shape {tuple(tensor.shape)}"
            + (" at a position" if position is not None else "")
            + ". Pass a tuple (one index per dimension after the first), Mean(), MaskSum(...) or a callable."
        )

    @property
    def classes(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    def __call__(self, output: Any, examples: Tensor) -> Tensor:
        tensor = check_rows(main_tensor(output), examples.numel(), self.shape[1:])
        if self.positions is not None:
            positions = self.positions.to(tensor.device)[examples.to(tensor.device)]
            tensor = tensor[torch.arange(len(positions), device=tensor.device), positions]
        return real(tensor if tensor.ndim == 2 else tensor[:, None])

    def index(self, index: Index, output: Any) -> Tensor:
        """(B,) classes: as given, by label, or the highest score where None; range-checked."""
        if index is None:
            return self(output, torch.arange(self.context.batch)).argmax(1)
        config, classes = self.context.config, self.classes
        if isinstance(index, str):
            index = label_index(index, classes, config)
        elif isinstance(index, list | tuple) and index and all(isinstance(entry, str) for entry in index):
            index = [label_index(str(entry), classes, config) for entry in index]
        result = per_example(index, self.context.batch)
        check_range(result, classes, self.shape)
        return result.to(main_tensor(output).device)

    def names(self, index: Tensor, tokenizer: Any = None) -> list[str]:
        """One text per example: "class 3 (cat)", or "token ' Paris'" where the classes are a vocabulary."""
        labels = getattr(self.context.config, "id2label", None) or {}
        if self.positions is None or (tokenizer is None and len(labels) == self.classes):
            return [class_name(i, self.classes, self.context.config) for i in index.tolist()]
        return [
            f"token {i}" if tokenizer is None else f"token {tokenizer.decode([i])!r}" for i in index.tolist()
        ]

    def places(self) -> list[str]:
        """One text per example: " at 11" where a position is read, else empty."""
        if self.positions is None:
            return [""] * self.context.batch
        return [f" at {position}" for position in self.positions.tolist()]


def pick(scores: Tensor, index: Tensor, examples: Tensor) -> Tensor:
    """(R,): the entry ``index[example]`` of each row of (R, K) scores."""
    chosen = index.to(scores.device)[examples.to(scores.device)]
    return scores.gather(1, chosen[:, None])[:, 0]


@dataclass(frozen=True)
class Logit:
    """A class's (or token's) score as the model returns it; ``index`` None is the predicted one.

    ``index``: class, (B,) classes, or label text. ``position``: for (B, T, V) outputs the column read, or
    (B,) of them; None is the mask token where there is one, else the last real token.

    >>> Logit(1).resolve(torch.tensor([[1.0, 3.0]]), TargetContext(batch=1)).labels
    ('class 1',)
    """

    index: Index = None
    position: Any = None

    def resolve(self, output: Any, context: TargetContext) -> Resolved:
        scores = ClassScores.of(output, context, self.position)
        index = scores.index(self.index, output)
        labels = [f"{name}{at}" for name, at in zip(scores.names(index), scores.places(), strict=True)]
        if scores.classes == 1 and self.index is None:
            labels = [f"the output{at}" for at in scores.places()]
            return Resolved(tuple(labels), None, lambda output, rows: scores(output, rows)[:, 0])
        return Resolved(tuple(labels), index, lambda output, rows: pick(scores(output, rows), index, rows))


@dataclass(frozen=True)
class Probability:
    """A class's softmax probability; of a single value, its sigmoid. ``index`` None is the predicted class.

    >>> resolved = Probability(0).resolve(torch.zeros(1, 2), TargetContext(batch=1))
    >>> resolved.score(torch.zeros(1, 2), torch.arange(1))
    tensor([0.5000])
    """

    index: Index = None

    def resolve(self, output: Any, context: TargetContext) -> Resolved:
        scores = ClassScores.of(output, context)
        if scores.classes == 1:
            if self.index is not None:
                raise TargetError(
                    f"Probability(index={self.index!r}): the output has a single value, leave index out."
                )
            labels = ("probability of the output",) * context.batch
            return Resolved(labels, None, lambda output, rows: scores(output, rows)[:, 0].sigmoid())
        index = scores.index(self.index, output)
        return Resolved(
            tuple(
                f"probability of {n}{at}" for n, at in zip(scores.names(index), scores.places(), strict=True)
            ),
            index,
            lambda output, rows: pick(scores(output, rows).softmax(1), index, rows),
        )


@dataclass(frozen=True)
class Margin:
    """A class's score minus another's; ``other`` None is the best other class of the clean output.

    >>> Margin().resolve(torch.tensor([[1.0, 3.0, 2.5]]), TargetContext(batch=1)).labels
    ('class 1 minus class 2',)
    """

    index: Index = None
    other: Index = None

    def resolve(self, output: Any, context: TargetContext) -> Resolved:
        scores = ClassScores.of(output, context)
        if scores.classes < 2:
            raise TargetError(
                f"Margin needs two classes; output shape is {tuple(scores.shape)}. Use target=None."
            )
        index = scores.index(self.index, output)
        if self.other is None:
            clean = scores(output, torch.arange(context.batch))
            other = clean.scatter(1, index[:, None], float("-inf")).argmax(1)
        else:
            other = scores.index(self.other, output)
        pairs = zip(scores.names(index), scores.names(other), scores.places(), strict=True)

        def score(output: Any, rows: Tensor) -> Tensor:
            values = scores(output, rows)
            return pick(values, index, rows) - pick(values, other, rows)

        return Resolved(tuple(f"{name} minus {rival}{at}" for name, rival, at in pairs), index, score)
