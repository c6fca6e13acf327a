"""Targets: which number of a model's output is explained. Resolved once on the clean output, then frozen.

None, class indices, labels, tuples, callables and presets all become a `Resolved`; what None means for each
kind of output is in docs/concepts/targets.md. A preset is any object with ``resolve(output, context)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pullback.core.class_targets import Logit, Margin, Probability, is_tokens
from pullback.core.dense_targets import Detection, MaskSum, is_detection
from pullback.core.errors import TargetError
from pullback.core.inputs import nested_tensors
from pullback.core.target_outputs import (
    EMBEDDINGS,
    Resolved,
    TargetContext,
    check_rows,
    main_tensor,
    named_tensor,
    real,
)
from pullback.core.text_targets import Contrast, LogProb, TokenAt
from pullback.core.value_targets import Loss, Mean, Norm, Similarity

__all__ = [
    "Contrast",
    "Detection",
    "LogProb",
    "Logit",
    "Loss",
    "Margin",
    "MaskSum",
    "Mean",
    "Norm",
    "Preset",
    "Probability",
    "Resolved",
    "Similarity",
    "TargetContext",
    "TokenAt",
    "continuations",
    "main_tensor",
    "resolve",
]


@runtime_checkable
class Preset(Protocol):
    """A target object: fixes its choice on the clean output."""

    def resolve(self, output: Any, context: TargetContext) -> Resolved: ...


@runtime_checkable
class _Continued(Protocol):
    def continuations(self, batch: int) -> list[list[list[int]]] | None: ...


def resolve(target: Any, output: Any, context: TargetContext) -> Resolved:
    """Fix ``target`` on the clean ``output``: afterwards neither class, token, mask nor box moves.

    Raises TargetError where the target does not name one finite real number per example.

    >>> logits = torch.tensor([[1.0, 3.0], [2.0, 0.5]])
    >>> resolved = resolve(None, logits, TargetContext(batch=2))
    >>> resolved.labels, resolved.score(-logits, torch.tensor([0, 1]))
    (('class 1', 'class 0'), tensor([-3., -2.]))
    """
    # Indices kept under inference mode could not be saved for a later backward pass.
    with torch.inference_mode(False), torch.no_grad():
        resolved = _preset(target, output, context).resolve(output, context)
        values = resolved.score(output, torch.arange(context.batch))
    wrong = ~torch.isfinite(values)
    if wrong.any():
        example = int(wrong.nonzero()[0])
        raise TargetError(
            f"the clean score of example {example} is {float(values[example])} ({resolved.labels[example]}): "
            "look for nan or inf in the model's output, or explain an entry that is finite."
        )
    return resolved


def continuations(target: Any, batch: int) -> list[list[list[int]]] | None:
    """Token ids of the several-token strings of a text target, [continuation][example][token]; else None.

    Where not None, outputs given to `resolve` and to ``score`` are tuples, one output per continuation, of
    the prompt followed by that continuation without its last token.
    """
    return target.continuations(batch) if isinstance(target, _Continued) else None


def _preset(target: Any, output: Any, context: TargetContext) -> Preset:
    if isinstance(target, type):
        raise TargetError(f"target is the class {target.__name__}: write {target.__name__}(...).")
    if isinstance(target, Preset):
        return target
    if target is None:
        return _default(output, context)
    if isinstance(target, Tensor | str | int | list) or hasattr(target, "__array__"):
        dense = not is_detection(output) and main_tensor(output).ndim in (4, 5)
        return MaskSum(index=target) if dense else Logit(target)
    if isinstance(target, tuple):
        return _Entry(target)
    if callable(target):
        return _Callable(target)
    raise TargetError(
        f"target is a {type(target).__name__}; expected None, a class index, (B,) indices, a label, a tuple "
        "of indices, a callable output -> (B,), or a preset such as Logit(3), Contrast(1, 2), Mean()."
    )


def _default(output: Any, context: TargetContext) -> Preset:
    """What None means for this output."""
    if is_detection(output):
        return Detection()
    name, tensor = named_tensor(output)
    check_rows(tensor, context.batch)
    if name in EMBEDDINGS:
        return Norm()
    if name == "logits_per_image" and tensor.shape[1:] == (context.batch,):
        return _Pair()
    if tensor.ndim <= 2 or is_tokens(name, tensor, context):
        return Logit()
    if tensor.ndim in (4, 5):
        return MaskSum()
    raise TargetError(
        f"None has no meaning for an output of shape {tuple(tensor.shape)} that is not known to be over "
        "tokens. Pass Mean(), a tuple of indices such as target=(0, 5), or a callable output -> (B,)."
    )


@dataclass(frozen=True)
class _Entry:
    """The entry of an output at one index per dimension after the first, the same for all examples."""

    entry: tuple[int, ...]

    def resolve(self, output: Any, context: TargetContext) -> Resolved:
        clean = check_rows(main_tensor(output), context.batch)
        if len(self.entry) != clean.ndim - 1:
            raise TargetError(
                f"target {self.entry} has {len(self.entry)} indices, expected {clean.ndim - 1}, one for each "
                f"dimension after the first; output shape is {tuple(clean.shape)}. Per-example indices are a "
                "list."
            )
        for number, size in zip(self.entry, clean.shape[1:], strict=True):
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < size:
                raise TargetError(
                    f"target {self.entry}: {number!r} is outside 0..{size - 1}; output shape is "
                    f"{tuple(clean.shape)}."
                )
        place: tuple[Any, ...] = (slice(None), *self.entry)

        def score(output: Any, rows: Tensor) -> Tensor:
            return real(check_rows(main_tensor(output), rows.numel(), clean.shape[1:])[place])

        return Resolved((f"output{list(self.entry)}",) * context.batch, None, score)


@dataclass(frozen=True, eq=False)
class _Callable:
    """A user's function of the whole output, checked at every call."""

    function: Callable[[Any], Any]

    def resolve(self, output: Any, context: TargetContext) -> Resolved:
        name = getattr(self.function, "__name__", type(self.function).__name__)

        def score(output: Any, rows: Tensor) -> Tensor:
            parts = [part for part in nested_tensors(output) if not part.is_inference()]
            before = [part._version for part in parts]
            values = self.function(output)
            if before != [part._version for part in parts]:
                raise TargetError(
                    f"the target callable {name} changes the output in place, which other scores read too. Work on a "
                    "copy, for example output = output.clone()."
                )
            expected = f"expected a real tensor of shape ({rows.numel()},), one number per row of the output"
            if not isinstance(values, Tensor):
                raise TargetError(
                    f"the target callable {name} returned a {type(values).__name__}, {expected}."
                )
            if values.shape != (rows.numel(),):
                raise TargetError(
                    f"the target callable {name} returned shape {tuple(values.shape)}, {expected}. "
                    "Reduce every dimension but the first, as in output.flatten(1).sum(1)."
                )
            if not values.is_floating_point():
                raise TargetError(f"the target callable {name} returned {values.dtype}, {expected}.")
            return real(values)

        label = "callable" if name == "<lambda>" else f"callable {name}"
        return Resolved((label,) * context.batch, None, score)


@dataclass(frozen=True)
class _Pair:
    """The similarity of each image with its own text, where images and texts are batched together."""

    def resolve(self, output: Any, context: TargetContext) -> Resolved:
        def score(output: Any, rows: Tensor) -> Tensor:
            tensor = main_tensor(output)
            return real(check_rows(tensor, rows.numel(), torch.Size([rows.numel()])).diagonal())

        return Resolved(("similarity of the image and its text",) * context.batch, None, score)
