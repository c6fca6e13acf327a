"""Segmentation and detection targets: the region, the query or the box is the clean input's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pullback.core.errors import TargetError
from pullback.core.targets import Detection, Resolved, TargetContext, resolve

EVERY = torch.arange(3)
ROWS = torch.tensor([2, 0, 0, 1, 2])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def context(batch: int = 3, config: object = None) -> TargetContext:
    return TargetContext(batch=batch, config=config)


def scores(resolved: Resolved, output: object, rows: Tensor = EVERY) -> Tensor:
    return resolved.score(output, rows)


def test_int_and_label_on_a_segmentation_sum_where_that_class_is_predicted() -> None:
    logits = torch.tensor([[[[2.0, 0.0, 5.0]], [[1.0, 3.0, 4.0]]]])
    resolved = resolve(1, logits, context(1))
    assert resolved.labels == ("class 1 summed over 1 of 3 places",)
    assert scores(resolved, 10 * logits, torch.arange(1)).tolist() == [30.0]
    foreground = torch.tensor([[[[2.0, -1.0, 5.0]]]])
    assert scores(resolve(None, foreground, context(1)), foreground, torch.arange(1)).tolist() == [7.0]


def test_detr_detection_keeps_query_and_class() -> None:
    logits = draw(3, 4, 3)
    logits[:, :, 2] += 1  # "no object"
    output = {"logits": logits, "pred_boxes": draw(3, 4, 4)}
    probability = logits.exp() / logits.exp().sum(2, keepdim=True)
    places = [(q, k) for q in range(4) for k in range(2)]
    best = [max(places, key=lambda at, b=b: probability[b][at]) for b in range(3)]
    for target in (None, Detection()):
        resolved = resolve(target, output, context())
        assert resolved.labels == tuple(f"query {q}, class {k}" for q, k in best)
        changed = {"logits": -logits[ROWS], "pred_boxes": None}
        assert scores(resolved, changed, ROWS).tolist() == [-float(logits[b][best[b]]) for b in ROWS.tolist()]
    fixed = resolve(Detection(index=3, label=0), output, context())
    assert scores(fixed, output).tolist() == logits[:, 3, 0].tolist()
    focal = {"logits": torch.tensor([[[0.0, 1.0, 9.0]]]), "pred_boxes": draw(1, 1, 4)}
    three = SimpleNamespace(id2label={0: "a", 1: "b", 2: "c"})
    assert resolve(None, focal, context(1, config=three)).labels == ("query 0, class 2 (c)",)


def test_torchvision_box_is_matched_by_overlap_and_class() -> None:
    def found(*boxes: tuple[list[float], int, float]) -> dict[str, Tensor]:
        where, kinds, values = zip(*boxes, strict=True) if boxes else ([], [], [])
        return {"boxes": torch.tensor(where).reshape(-1, 4), "labels": torch.tensor(kinds, dtype=torch.long),
                "scores": torch.tensor(values)}  # fmt: skip

    left, right, shifted = [0.0, 0.0, 4.0, 4.0], [10.0, 0.0, 14.0, 4.0], [1.0, 0.0, 5.0, 4.0]
    clean = [found((left, 1, 0.9), (right, 2, 0.6)), found((right, 1, 0.3), (left, 2, 0.8))]
    resolved = resolve(None, clean, context(2))
    assert resolved.labels == ("box 0, class 1", "box 1, class 2")
    # shifted overlaps left by 12/20 = 0.6; the more confident boxes are of another class or elsewhere
    now = [found((left, 1, 0.95), (shifted, 2, 0.7)), found((right, 1, 0.99), (shifted, 1, 0.5)), found()]
    assert scores(resolved, now, torch.tensor([1, 0, 0])).tolist() == pytest.approx([0.7, 0.5, 0.0])
    with pytest.raises(TargetError, match="nothing is detected in example 1"):
        resolve(None, [clean[0], found()], context(2))
