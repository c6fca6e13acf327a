"""Dense targets: the summed logits of a segmented region, and one detection of an object detector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pullback.core.class_targets import Index
from pullback.core.errors import TargetError
from pullback.core.target_outputs import (
    Resolved,
    TargetContext,
    check_range,
    check_rows,
    class_name,
    fields,
    label_index,
    main_tensor,
    per_example,
    real,
)

__all__ = ["Detection", "MaskSum", "is_detection"]


@dataclass(frozen=True, eq=False)
class MaskSum:
    """Summed logits of a class over a region of a (B, K, *space) output, such as a segmentation.

    ``mask``: weights or booleans, (*space) or (B, *space); None is where the class is predicted on the clean
    input. ``index``: class, (B,) or label; None is the class predicted most often in the mask. With K = 1
    the prediction is where the logit is positive (everywhere, if nowhere).

    >>> logits = torch.tensor([[[[2.0, 0.0]], [[0.0, 1.0]]]])
    >>> MaskSum(index=1).resolve(logits, TargetContext(batch=1)).labels
    ('class 1 summed over 1 of 2 places',)
    """

    mask: Tensor | None = None
    index: Index = None

    def __repr__(self) -> str:
        mask = None if self.mask is None else f"<{tuple(self.mask.shape)}>"
        return f"MaskSum(mask={mask}, index={self.index!r})"

    def resolve(self, output: Any, context: TargetContext) -> Resolved:
        clean = check_rows(main_tensor(output), context.batch)
        if clean.ndim < 3:
            raise TargetError(f"MaskSum reads (B, K, *space) outputs; output shape is {tuple(clean.shape)}.")
        batch, classes, space = clean.shape[0], clean.shape[1], clean.shape[2:]
        everywhere = torch.ones((batch, *space), dtype=torch.bool, device=clean.device)
        if self.mask is None:
            mask = everywhere
        elif self.mask.shape in (space, (batch, *space)):
            mask = self.mask.detach().to(clean.device).expand(batch, *space).clone()
        else:
            raise TargetError(
                f"the mask has shape {tuple(self.mask.shape)}, expected {tuple(space)} or {(batch, *space)}."
            )
        predicted = clean.argmax(1)
        if self.index is None:
            votes = [row[inside != 0] for row, inside in zip(predicted, mask, strict=True)]
            index = torch.stack([torch.bincount(row, minlength=classes).argmax() for row in votes])
        else:
            given = (
                label_index(self.index, classes, context.config)
                if isinstance(self.index, str)
                else self.index
            )
            index = per_example(given, batch).to(clean.device)
            check_range(index, classes, clean.shape)
        names = [class_name(i, classes, context.config) for i in index.tolist()]
        if self.mask is None:
            mask = predicted == index.reshape(-1, *[1] * len(space))
            if classes == 1:
                positive = clean[:, 0] > 0
                mask = torch.where(
                    positive.flatten(1).any(1).reshape(-1, *[1] * len(space)), positive, everywhere
                )
        sizes = (mask != 0).flatten(1).sum(1)
        if bool((sizes == 0).any()):
            example = int((sizes == 0).nonzero()[0])
            raise TargetError(
                f"{names[example]} is predicted nowhere in example {example}: pass mask=, another index, or "
                "None."
                if self.mask is None
                else f"the mask of example {example} is empty."
            )

        def score(output: Any, rows: Tensor) -> Tensor:
            tensor = check_rows(main_tensor(output), rows.numel(), clean.shape[1:])
            rows = rows.to(tensor.device)
            own = tensor[torch.arange(len(rows), device=tensor.device), index.to(tensor.device)[rows]]
            own = real(own)
            return (own * mask.to(own)[rows]).flatten(1).sum(1)

        places = f"of {everywhere[0].numel()} places"
        labels = (
            f"{name} summed over {size} {places}" for name, size in zip(names, sizes.tolist(), strict=True)
        )
        return Resolved(tuple(labels), index, score)


def is_detection(output: Any) -> bool:
    """Whether the output is DETR-like (logits, pred_boxes) or torchvision-like (a list of dicts of boxes)."""
    parts = fields(output)
    return ("pred_boxes" in parts and "logits" in parts) or _is_boxes(output)


def _is_boxes(output: Any) -> bool:
    return (
        isinstance(output, list | tuple)
        and len(output) > 0
        and all(isinstance(part, Mapping) and {"boxes", "scores", "labels"} <= set(part) for part in output)
    )


@dataclass(frozen=True)
class Detection:
    """One detected object: the class logit of a query (DETR), or the score of a box (torchvision).

    ``index``: query or box, one or (B,); ``label``: class or label text; None is the most confident. The
    class, and the query or box, are fixed on the clean input. A torchvision box is the one of the same label
    that overlaps the clean box most, by intersection over union; below one half the object is gone and the
    score is 0.

    >>> output = {"logits": torch.tensor([[[0.0, 2.0, 1.0]]]), "pred_boxes": torch.zeros(1, 1, 4)}
    >>> Detection().resolve(output, TargetContext(batch=1)).labels
    ('query 0, class 1',)
    """

    index: Index = None
    label: int | str | None = None

    def resolve(self, output: Any, context: TargetContext) -> Resolved:
        if _is_boxes(output):
            return self._of_boxes(output, context)
        if not is_detection(output):
            raise TargetError(
                "Detection reads logits with pred_boxes, or a list of dicts with boxes, labels and scores; "
                f"the output is a {type(output).__name__}. Pass a callable output -> (B,)."
            )
        return self._of_queries(output, context)

    def _of_queries(self, output: Any, context: TargetContext) -> Resolved:
        clean = real(check_rows(main_tensor(output), context.batch))
        batch, queries, columns = clean.shape
        labels = getattr(context.config, "id2label", None) or {}
        # Models of the focal-loss kind have no last "no object" column; only the labels can tell.
        objects = columns if len(labels) == columns else columns - 1
        confidence = clean.sigmoid() if objects == columns else clean.softmax(2)[:, :, :objects]
        if self.label is not None:
            label = (
                label_index(self.label, objects, context.config)
                if isinstance(self.label, str)
                else self.label
            )
            check_range(torch.tensor([label]), objects, clean.shape)
            confidence = confidence[:, :, label : label + 1]
        if self.index is None:
            query = confidence.amax(2).argmax(1)
        else:
            query = per_example(self.index, batch, "query").to(clean.device)
            check_range(query, queries, clean.shape)
        own = confidence[torch.arange(batch, device=clean.device), query].argmax(1)
        index = own if self.label is None else torch.full_like(own, label)

        def score(output: Any, rows: Tensor) -> Tensor:
            tensor = check_rows(main_tensor(output), rows.numel(), clean.shape[1:])
            rows = rows.to(tensor.device)
            each = torch.arange(len(rows), device=tensor.device)
            return real(tensor[each, query.to(tensor.device)[rows], index.to(tensor.device)[rows]])

        pairs = zip(query.tolist(), index.tolist(), strict=True)
        names = (f"query {place}, {class_name(i, objects, context.config)}" for place, i in pairs)
        return Resolved(tuple(names), index, score)

    def _of_boxes(self, output: Any, context: TargetContext) -> Resolved:
        if len(output) != context.batch:
            raise TargetError(
                f"the output lists {len(output)} images, expected {context.batch}, one per example."
            )
        if isinstance(self.label, str):
            raise TargetError(
                f'label "{self.label}": torchvision detections have no label texts, pass the number.'
            )
        wanted = None if self.index is None else per_example(self.index, context.batch, "box")
        chosen = []
        for example, found in enumerate(output):
            scores = found["scores"]
            allowed = (
                torch.ones_like(scores, dtype=torch.bool)
                if self.label is None
                else found["labels"] == self.label
            )
            if not bool(allowed.any()):
                what = "nothing" if self.label is None else f"no object of class {self.label}"
                raise TargetError(
                    f"{what} is detected in example {example}; lower the model's score threshold."
                )
            best = (
                int(scores.masked_fill(~allowed, -1.0).argmax()) if wanted is None else int(wanted[example])
            )
            check_range(torch.tensor([best]), len(scores), found["boxes"].shape)
            chosen.append(best)
        boxes = (
            torch.stack([found["boxes"][i] for found, i in zip(output, chosen, strict=True)]).detach().clone()
        )
        index = (
            torch.stack([found["labels"][i] for found, i in zip(output, chosen, strict=True)]).long().clone()
        )

        def score(output: Any, rows: Tensor) -> Tensor:
            if not _is_boxes(output) or len(output) != rows.numel():
                raise TargetError(
                    f"the output no longer lists {rows.numel()} images of boxes, labels and scores."
                )
            values = real(pad_sequence([found["scores"] for found in output], batch_first=True))
            places = pad_sequence([found["boxes"] for found in output], batch_first=True).detach()
            kinds = pad_sequence([found["labels"] for found in output], batch_first=True, padding_value=-1)
            if values.shape[1] == 0:
                return values.sum(1)
            rows = rows.to(values.device)
            overlap = _overlap(places, boxes.to(places)[rows][:, None])
            overlap = overlap.masked_fill(kinds != index.to(kinds.device)[rows][:, None], -1.0)
            most, match = overlap.max(1)
            return values.gather(1, match[:, None])[:, 0] * (most >= 0.5)

        names = (f"box {i}, class {kind}" for i, kind in zip(chosen, index.tolist(), strict=True))
        return Resolved(tuple(names), index, score)


def _overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4) given as x0, y0, x1, y1."""
    sides = (
        torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])
    ).clamp(min=0)
    common = sides.prod(-1)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(-1) + (others[..., 2:] - others[..., :2]).prod(-1)
    return common / (areas - common).clamp(min=torch.finfo(common.dtype).tiny)
