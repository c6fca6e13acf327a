"""Targets against hand formulas, on rows repeated and permuted, frozen on the clean output."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pullback.core.errors import TargetError
from pullback.core.targets import (
    Detection,
    Logit,
    Loss,
    Margin,
    MaskSum,
    Mean,
    Norm,
    Probability,
    Resolved,
    Similarity,
    TargetContext,
    continuations,
    main_tensor,
    resolve,
)

EVERY = torch.arange(3)
ROWS = torch.tensor([2, 0, 0, 1, 2])
LABELS = SimpleNamespace(id2label={0: "cat", 1: "tabby, tabby cat", 2: "dog", 3: "LABEL_3", 4: "Plane"})


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def context(batch: int = 3, **known: Any) -> TargetContext:
    return TargetContext(batch=batch, **known)


def scores(resolved: Resolved, output: Any, rows: Tensor = EVERY) -> Tensor:
    return resolved.score(output, rows)


K = draw(3, 5)
IMAGES = draw(3, 4, 2, 3)
REFERENCE = draw(3, 5, seed=9)
MASK = torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.bool)


def close(actual: Tensor, expected: Tensor) -> None:
    # float64, a handful of terms: 1e-12 is a thousand roundings
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def loop(z: Tensor, read: Any) -> Tensor:
    return torch.stack([read(row, example) for example, row in enumerate(z)])


FORMULAS: dict[str, tuple[Any, Tensor, Any]] = {
    "int": (3, K, lambda z, b: z[3]),
    "list": ([4, 0, 2], K, lambda z, b: z[[4, 0, 2][b]]),
    "tensor": (torch.tensor([1, 1, 0]), K, lambda z, b: z[[1, 1, 0][b]]),
    "tuple": ((1, 0, 2), IMAGES, lambda z, b: z[1, 0, 2]),
    "callable": (lambda output: output.flatten(1).amin(1), IMAGES, lambda z, b: z.min()),
    "Logit": (Logit([0, 1, 2]), K, lambda z, b: z[b]),
    "Probability": (Probability(2), K, lambda z, b: z[2].exp() / z.exp().sum()),
    "sigmoid": (Probability(), K[:, :1], lambda z, b: 1 / (1 + (-z[0]).exp())),
    "Margin": (Margin(1, 4), K, lambda z, b: z[1] - z[4]),
    "Mean": (Mean(), IMAGES, lambda z, b: z.sum() / 24),
    "Norm": (Norm(), K, lambda z, b: (z * z).sum() / 2),
    "dot": (Similarity(REFERENCE, "dot"), K, lambda z, b: (z * REFERENCE[b]).sum()),
    "cosine": (
        Similarity(REFERENCE[0]),
        K,
        lambda z, b: (z * REFERENCE[0]).sum() / (z.square().sum() * REFERENCE[0].square().sum()).sqrt(),
    ),
    "MaskSum": (MaskSum(MASK, 2), IMAGES, lambda z, b: z[2, 0, 0] + z[2, 0, 2] + z[2, 1, 2]),
    "weights": (MaskSum(REFERENCE[:, 0, None, None] + IMAGES[:, 0], 1), IMAGES,
                lambda z, b: ((REFERENCE[b, 0] + IMAGES[b, 0]) * z[1]).sum()),
    "cross entropy": (Loss(torch.tensor([0, 4, 2])), K, lambda z, b: z.exp().sum().log() - z[[0, 4, 2][b]]),
    "mse": (Loss(REFERENCE, "mse"), K, lambda z, b: ((z - REFERENCE[b]) ** 2).mean()),
    "l1": (Loss(REFERENCE, "l1"), K, lambda z, b: (z - REFERENCE[b]).abs().mean()),
    "bce": (Loss((REFERENCE > 0).double(), "binary_cross_entropy"), K,
            lambda z, b: -((1 - 2 * (REFERENCE[b] > 0).double()) * z).sigmoid().neg().log1p().mean()),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_a_target_is_its_formula_at_any_output_and_row_order(name: str) -> None:
    target, clean, read = FORMULAS[name]
    resolved = resolve(target, clean, context())
    changed = clean + 0.7 * draw(*clean.shape, seed=4)
    expected = loop(changed, read)
    close(scores(resolved, changed), expected)
    close(scores(resolved, changed[ROWS], ROWS), expected[ROWS])
    assert len(resolved.labels) == 3
    point = changed.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: scores(resolved, z), (point,)), (
        "the score must be differentiable"
    )


BY_SHAPE: dict[str, tuple[Tensor, Any, str | None]] = {
    "(B,)": (K[:, 0], lambda z, b: z, "the output"),
    "(B,1)": (K[:, :1], lambda z, b: z[0], "the output"),
    "(B,K)": (K, lambda z, b: z[int(K[b].argmax())], f"class {int(K[0].argmax())}"),
    "(B,K,H,W)": (IMAGES, None, None),
    "(B,K,D,H,W)": (IMAGES.unsqueeze(2), None, None),
}


@pytest.mark.parametrize("name", BY_SHAPE)
def test_none_by_shape_is_frozen_on_the_clean_output(name: str) -> None:
    output, read, label = BY_SHAPE[name]
    if read is None:
        flat = output.flatten(2)
        predicted = flat.argmax(1)
        most = [max(range(4), key=lambda k, row=row: int((row == k).sum())) for row in predicted]

        def read(z: Tensor, b: int) -> Tensor:
            return sum(z.flatten(1)[most[b], p] for p in range(6) if predicted[b, p] == most[b])

    resolved = resolve(None, output, context())
    # at -output every argmax is another class
    close(scores(resolved, -output), loop(-output, read))
    expected = loop(output, read)[ROWS]
    close(scores(resolved, output[ROWS], ROWS), expected)
    assert label is None or resolved.labels[0] == label
    assert (resolved.index is None) == (label == "the output")


def test_margin_keeps_the_clean_rival() -> None:
    clean = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, -1.0]])
    resolved = resolve(Margin(), clean, context(2))
    assert resolved.labels == ("class 0 minus class 2", "class 1 minus class 0")
    changed = torch.tensor([[1.0, 9.0, 2.0], [4.0, 2.0, 7.0]])
    assert scores(resolved, changed, torch.arange(2)).tolist() == [-1.0, -2.0]


def test_none_for_embeddings_is_half_the_squared_norm_of_real_tokens() -> None:
    hidden = draw(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1]])
    resolved = resolve(None, {"last_hidden_state": hidden}, context(attention_mask=mask))
    real = [h[m == 1] for h, m in zip(hidden, mask, strict=True)]
    expected = torch.stack([sum(z @ z for z in tokens) / 2 for tokens in real])
    close(scores(resolved, {"last_hidden_state": hidden}), expected)
    assert resolved.labels[0] == "half the squared norm of last_hidden_state"
    pooled = resolve(None, {"last_hidden_state": hidden, "pooler_output": K}, context())
    close(scores(pooled, {"pooler_output": K}), (K * K).sum(1) / 2)


def test_image_text_pairs_read_their_own_text_and_refuse_a_column() -> None:
    square = {"logits_per_image": draw(3, 3)}
    resolved = resolve(None, square, context())
    rows = {"logits_per_image": draw(5, 5, seed=2)}
    assert scores(resolved, rows, ROWS).tolist() == rows["logits_per_image"].diagonal().tolist()
    with pytest.raises(TargetError, match="the batch's own texts"):
        resolve(1, square, context())


def test_label_text_forgives_case_and_synonyms() -> None:
    for text, index in [("CAT", 0), ("tabby cat", 1), ("tabby", 1), ("plane", 4), ("LABEL_3", 3)]:
        resolved = resolve(text, K, context(config=LABELS))
        assert resolved.index is not None
        assert resolved.index.tolist() == [index] * 3
    each = resolve(["dog", "cat", "plane"], K, context(config=LABELS))
    assert each.labels == ("class 2 (dog)", "class 0 (cat)", "class 4 (Plane)")
    assert resolve(3, K, context(config=LABELS)).labels[0] == "class 3"
    assert (
        resolve("b", K[:, :2], context(config=SimpleNamespace(label2id={"a": 0, "b": 1}))).labels[0]
        == "class 1"
    )


def test_cross_entropy_over_tokens_and_space_ignores_minus_100() -> None:
    tokens, labels = draw(3, 4, 5), torch.tensor([[1, -100, 0, 4], [2, 2, 2, 2], [-100, -100, 3, -100]])
    expected = torch.stack([
        torch.stack([z.exp().sum().log() - z[k] for z, k in zip(row, own, strict=True) if k >= 0]).mean()
        for row, own in zip(tokens, labels, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(
        scores(resolve(Loss(labels), tokens, context()), tokens), expected, rtol=1e-12, atol=0
    )
    space = tokens.movedim(2, 1).reshape(3, 5, 2, 2)
    resolved = resolve(Loss(labels.reshape(3, 2, 2)), space, context())
    close(scores(resolved, space[ROWS], ROWS), expected[ROWS])


def test_main_tensor_reads_every_container() -> None:
    @dataclass
    class Out:
        hidden: Tensor
        logits: Tensor

    pair, loss = namedtuple("pair", ["aux", "logits"]), K[0, 0]
    named = [
        {"loss": loss, "logits": K},
        Out(IMAGES, K),
        pair(IMAGES, K),
        SimpleNamespace(logits=K),
        {"z": K},
    ]
    for output in (
        K,
        (K, IMAGES),
        [K],
        (loss, K),
        {"out": K, "aux": IMAGES},
        {"y": 1, "prediction": K},
        *named,
    ):
        assert main_tensor(output) is K
    with pytest.raises(TargetError, match=r"dict of \[a: Tensor\(3, 5\), b: Tensor\(3, 5\), c: int\]"):
        main_tensor({"a": K, "b": K, "c": 1})


def test_half_precision_is_reduced_in_float32() -> None:
    # 4096 equal bfloat16 logits: in bfloat16 the log of the sum would be rounded to 8.3125
    output = torch.zeros(1, 4096, dtype=torch.bfloat16)
    value = scores(resolve(Loss(torch.tensor([7])), output, context(1)), output, torch.arange(1))
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(8.317766, abs=1e-5)


ERRORS: list[tuple[Any, Any, str]] = [
    (1000, torch.zeros(3, 1000),
     r"target 1000 is outside the model's 1000 classes \(0..999\); output shape is \(3, 1000\)\."),
    (-1, K, "target -1 is outside"),
    ([1, 2], K, r"target has shape \(2,\), expected one integer or 3"),
    (torch.rand(3), K, "dtype torch.float32, expected integers"),
    (True, K, "dtype torch.bool"),
    ("cat", K[:, :4], r'LogProb\("cat", tokenizer=tokenizer\)'),
    ("planne", K, 'no label "planne".*Nearest: "Plane"'),
    ((1, 2), K, r"has 2 indices, expected 1"),
    ((9, 0, 0), IMAGES, r"9 is outside 0..3"),
    (lambda output: output.sum(), K, r"returned shape \(\), expected a real tensor of shape \(3,\)"),
    (lambda output: 1.0, K, "returned a float"),
    (lambda output: output[:, 0] * 1j, K, "complex128"),
    (lambda output: output.argmax(1), K, "int64"),
    (None, K[0, 0], r"shape \(\), expected 3 rows"),
    (None, K[:2], r"shape \(2, 5\), expected 3 rows"),
    (None, draw(3, 4, 5), r"None has no meaning for an output of shape \(3, 4, 5\)"),
    (1, draw(3, 4, 5), "a class alone does not name one number"),
    (None, draw(3, 1, 1, 1, 1, 2), "None has no meaning"),
    (None, K * 1j, "score must be real"),
    (None, torch.tensor([[0.0], [float("nan")], [1.0]]), r"clean score of example 1 is nan \(the output\)"),
    (Mean, K, r"write Mean\(\.\.\.\)"),
    ({"a": 1}, K, "target is a dict"),
    (Margin(), K[:, :1], "Margin needs two classes"),
    (Probability(0), K[:, :1], "leave index out"),
    (MaskSum(torch.ones(5, 5)), IMAGES, r"the mask has shape \(5, 5\), expected \(2, 3\)"),
    (MaskSum(torch.zeros(2, 3)), IMAGES, "the mask of example 0 is empty"),
    (MaskSum(index=1), IMAGES * torch.tensor([1, 0, 1, 1]).view(4, 1, 1) - torch.eye(4)[1].view(4, 1, 1) * 99,
     "class 1 is predicted nowhere in example 0"),
    (Loss(torch.zeros(3)), K, r"labels are torch.float32 of shape \(3,\), expected integers"),
    (Loss(torch.tensor([0, 1, 7])), K, "target 7 is outside"),
    (Loss(K, "rmse"), K, 'no loss "rmse": use one of cross_entropy'),
    (Similarity(torch.ones(4)), K, r"the reference's is \(4,\)"),
    (Detection(), K, "Detection reads logits with pred_boxes"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "output", "text"), ERRORS, ids=[str(i) for i in range(len(ERRORS))])
def test_errors_say_what_was_given_and_what_to_type(target: Any, output: Any, text: str) -> None:
    with pytest.raises(TargetError, match=text):
        resolve(target, output, context(config=LABELS))


def test_an_output_that_changes_shape_with_the_rows_is_refused() -> None:
    resolved = resolve(1, draw(3, 3), context())
    with pytest.raises(TargetError, match="its size depends on the batch"):
        scores(resolved, draw(5, 5), ROWS)
    with pytest.raises(TargetError, match="expected 5 rows first"):
        scores(resolved, draw(3, 3), ROWS)


def test_reprs_are_short_and_other_targets_have_no_continuations() -> None:
    assert repr(Loss(K)) == "Loss(function='cross_entropy')"
    assert repr(Similarity(K)) == "Similarity(kind='cosine')"
    assert repr(MaskSum(MASK, 1)) == "MaskSum(mask=<(2, 3)>, index=1)"
    for target in (None, 3, "cat", Logit(), (0, 1), Mean()):
        assert continuations(target, 3) is None
