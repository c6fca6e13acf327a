"""What a model returns and how a target reads it: the part that every target shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import TargetError, nearest

__all__ = [
    "EMBEDDINGS",
    "LOGITS",
    "Resolved",
    "TargetContext",
    "check_range",
    "check_rows",
    "class_name",
    "fields",
    "label_index",
    "main_tensor",
    "named_tensor",
    "per_example",
    "real",
]

LOGITS = ("logits", "prediction_logits")
PREDICTIONS = (
    *LOGITS, "out", "logits_per_image", "prediction", "predictions", "prediction_outputs", "mean_predictions",
    "regression_outputs", "predicted_depth", "reconstruction", "start_logits", "sample",
)  # fmt: skip
EMBEDDINGS = ("pooler_output", "image_embeds", "text_embeds", "last_hidden_state")


@dataclass(frozen=True, eq=False)
class TargetContext:
    """What is known of the clean call besides its output.

    ``attention_mask`` (B, T) marks the real tokens (None: all are), ``input_ids`` is (B, T), ``config`` is
    the model's own (labels, mask token) or None.
    """

    batch: int
    attention_mask: Tensor | None = None
    input_ids: Tensor | None = None
    config: Any = None

    @property
    def last(self) -> Tensor | None:
        """(B,) column of each example's last real token, padded left or right; None without tokens."""
        mask = self.attention_mask
        if mask is not None and mask.ndim == 2:
            empty = (mask != 0).sum(1) == 0
            if empty.any():
                raise TargetError(
                    f"example {int(empty.nonzero()[0])} has no real token: its attention_mask is 0."
                )
            return mask.shape[1] - 1 - (mask != 0).long().flip(1).argmax(1)
        if self.input_ids is not None:
            return torch.full((self.batch,), self.input_ids.shape[1] - 1, device=self.input_ids.device)
        return None


@dataclass(frozen=True, eq=False)
class Resolved:
    """A target fixed on the clean output.

    ``labels`` says what is explained, one text per example; ``index`` (B,) is the class or token where there
    is one; ``score(output, examples)`` gives one real number per row, ``examples`` (R,) naming each row's
    example.
    """

    labels: tuple[str, ...]
    index: Tensor | None
    score: Callable[[Any, Tensor], Tensor]


def fields(output: Any) -> Mapping[Any, Any]:
    """The named parts of a mapping, dataclass, named tuple or plain object; empty for others."""
    if isinstance(output, Mapping):
        return output
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return dict(zip(output._fields, output, strict=True))
    if isinstance(output, Tensor | list | tuple):
        return {}
    return getattr(output, "__dict__", {})


def named_tensor(output: Any, names: Sequence[str] = (*PREDICTIONS, *EMBEDDINGS)) -> tuple[str, Tensor]:
    """The tensor a target reads and the name it was found under ("" where it has none)."""
    if isinstance(output, Tensor):
        return "", output
    parts = fields(output)
    for name in names:
        if isinstance(parts.get(name), Tensor):
            return name, parts[name]
    found = list(parts.values()) if parts else list(output) if isinstance(output, list | tuple) else []
    tensors = [part for part in found if isinstance(part, Tensor)]
    # A loss in front of the logits is a 0-d tensor: it is not what a target reads.
    tensors = [tensor for tensor in tensors if tensor.ndim > 0] or tensors
    if len(tensors) == 1 or (tensors and (not parts or isinstance(output, tuple))):
        return "", tensors[0]
    shown = (
        [f"{key}: {_kind(value)}" for key, value in parts.items()]
        if parts
        else [_kind(part) for part in found]
    )
    raise TargetError(
        f"no tensor to explain was found in the output, a {type(output).__name__} of "
        f"[{', '.join(shown[:12])}]. Pass a callable: target=lambda output: (one real number per row)."
    )


def main_tensor(output: Any) -> Tensor:
    """The tensor a target reads: itself, else logits by name, embeddings, or a tuple's first tensor.

    Raises TargetError, listing what is there, where nothing fits.

    >>> main_tensor({"loss": torch.tensor(1.0), "logits": torch.zeros(2, 5)}).shape
    torch.Size([2, 5])
    """
    return named_tensor(output)[1]


def _kind(value: Any) -> str:
    return f"Tensor{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def real(values: Tensor) -> Tensor:
    """Half precision raised to float32; complex and integer values refused, as no gradient explains them."""
    if not values.is_floating_point():
        raise TargetError(
            f"a score must be real and differentiable, the output is {values.dtype}. Pass a callable that "
            "returns a real number per row, as in target=lambda output: output.abs().sum(-1)."
        )
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def check_rows(tensor: Tensor, rows: int, clean: torch.Size | None = None) -> Tensor:
    """The tensor, if its first dimension counts the rows and the others are as on the clean output."""
    if tensor.ndim == 0 or tensor.shape[0] != rows:
        raise TargetError(
            f"the output has shape {tuple(tensor.shape)}, expected {rows} rows first, one per example. If "
            "the model reduces or reorders the batch, pass a callable: target=lambda output: (one number per "
            "row)."
        )
    if clean is not None and tensor.shape[1:] != clean:
        raise TargetError(
            f"the output has shape {tuple(tensor.shape)}, on the clean input its rows had shape "
            f"{tuple(clean)}: its size depends on the batch or on the values. Pass a callable that reads a "
            "fixed part of it."
        )
    return tensor


def per_example(value: Any, batch: int, what: str = "target") -> Tensor:
    """An integer, or (B,) integers as tensor, array or list, as a (B,) long tensor."""
    try:
        tensor = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TargetError(
            f"{what} {value!r} is not an integer or {batch} integers, one per example."
        ) from None
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TargetError(
            f"{what} has dtype {tensor.dtype}, expected integers: one, or one per example ({batch})."
        )
    if tensor.ndim > 0 and tensor.shape != (batch,):
        raise TargetError(
            f"{what} has shape {tuple(tensor.shape)}, expected one integer or {batch}, one per example. "
            "An entry of a larger output is a tuple, the same for all examples: target=(class, row, column)."
        )
    return tensor.long().expand(batch).clone()


def check_range(index: Tensor, classes: int, shape: Sequence[int]) -> None:
    """Raise TargetError for the first index outside 0..classes-1."""
    outside = (index < 0) | (index >= classes)
    if outside.any():
        raise TargetError(
            f"target {int(index[outside][0])} is outside the model's {classes} classes (0..{classes - 1}); "
            f"output shape is {tuple(shape)}."
        )


def label_index(text: str, classes: int, config: Any) -> int:
    """The class of a label text by the config's own labels; case and synonyms after a comma are forgiven."""
    labels: dict[int, str] = {
        int(i): str(name) for i, name in (getattr(config, "id2label", None) or {}).items()
    }
    if not labels:
        known = getattr(config, "label2id", None) or {}
        labels = {int(i): str(name) for name, i in known.items()}
    if len(labels) != classes:
        raise TargetError(
            f'target "{text}" is a text, and the model has no labels for its {classes} classes. Pass a class '
            f'index, or for a language model LogProb("{text}", tokenizer=tokenizer).'
        )
    wanted = text.strip().casefold()
    exact = [i for i, name in labels.items() if name.strip().casefold() == wanted]
    synonyms = [
        i for i, name in labels.items() if wanted in (part.strip().casefold() for part in name.split(","))
    ]
    for found in (exact, synonyms):
        if len(found) == 1:
            return found[0]
        if found:
            raise TargetError(f'label "{text}" is shared by classes {found[:8]}: pass the class index.')
    raise TargetError(
        f'no label "{text}" among the model\'s {classes}. Nearest: {nearest(text, labels.values())}.'
    )


def class_name(index: int, classes: int, config: Any) -> str:
    """The text "class 3 (cat)", or "class 3" where the config has no label of its own for it."""
    labels = getattr(config, "id2label", None) or {}
    name = labels.get(index, labels.get(str(index))) if len(labels) == classes else None
    return f"class {index}" if name in (None, f"LABEL_{index}") else f"class {index} ({name})"
