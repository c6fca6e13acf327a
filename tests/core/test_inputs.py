"""Inputs of any nest: what is explained, what goes along, and inputs that are refused."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.core.inputs import Shared, nested_tensors, read_inputs

WEIGHT = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.25, 4.0]], dtype=torch.float64)
X = torch.tensor([[1.0, 2.0, -1.0], [0.5, -3.0, 2.0]], dtype=torch.float64)


@dataclass
class Record:
    x: Tensor
    name: str = "a"


@dataclass(frozen=True)
class Frozen:
    x: Tensor


Pair = namedtuple("Pair", ["x", "scale"])


def linear(x: Any) -> Tensor:
    return x @ WEIGHT.T


NESTS: list[tuple[Any, Any]] = [
    (X, lambda x: linear(x)),
    ((X,), lambda x: linear(x)),
    ({"x": X}, lambda x: linear(x)),
    ({"a": {"b": [X, 3]}}, lambda a: linear(a["b"][0]) * 1.0),
    ([X, "text"], lambda pair: linear(pair[0])),
    (({"b": [None, (X,)]}, True), lambda nest, flag: linear(nest["b"][1][0])),
    (Record(X), lambda record: linear(record.x) if record.name == "a" else None),
    ({"record": Frozen(X)}, lambda record: linear(record.x)),
    ((Pair(X, 1.0),), lambda pair: linear(pair.x) * pair.scale),
    (X.numpy(), lambda x: linear(x)),
    ({"x": X.numpy()}, lambda x: linear(x)),
    ((X, Shared(torch.ones(2, dtype=torch.float64))), lambda x, shared: linear(x) * shared.sum() / 2),
    ((X, torch.tensor([0, 1])), lambda x, ids: linear(x) + 0 * ids[:, None]),
    ({"x": X, "attention_mask": torch.ones(2, 3)}, lambda x, attention_mask: linear(x * attention_mask)),
]


@pytest.mark.parametrize("number", range(len(NESTS)))
def test_one_float_leaf_in_any_nest(number: int) -> None:
    inputs, function = NESTS[number]
    if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[1], Tensor):
        with pytest.raises(
            pb.TargetError
        ):  # the ids are taken for tokens, but x is still what can be explained
            pb.explain(function, inputs, target=7, method="gradient", site="input")
    found = pb.explain(function, inputs, target=[0, 1], method="gradient", site="input")
    assert isinstance(found.values, Tensor)
    assert torch.allclose(found.values, WEIGHT)
    cut = pb.explain(
        function, inputs, target=[0, 1], method=pb.IntegratedGradients(steps=5), site="input", chunk=3
    )
    assert isinstance(cut.values, Tensor)
    assert torch.allclose(cut.values, WEIGHT * X)


def test_two_float_leaves_are_a_dict_by_name() -> None:
    def product(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(1, keepdim=True)

    found = pb.explain(product, (X, 2 * X), target=0, method="gradient")
    assert isinstance(found.values, dict)
    assert list(found.values) == ["left", "right"]
    assert torch.equal(found.values["left"], 2 * X)
    assert torch.equal(found.values["right"], X)
    path = pb.explain(product, (X, 2 * X), target=0, method=pb.IntegratedGradients(steps=8))
    assert isinstance(path.values, dict)
    # ∫ α dα · 2 x² from each side: half the product each
    assert torch.allclose(path.values["left"], X * X)
    assert float(path.diagnostics["gap"].abs().max()) <= 1e-12
    one = pb.explain(product, (X, 2 * X), target=0, method="gradient", site="input:right")
    assert torch.equal(one.values, X)  # type: ignore[arg-type]
    smooth = pb.explain(product, (X, 2 * X), target=0, method=pb.SmoothGrad(samples=2000, noise=0.1))
    assert isinstance(smooth.values, dict)
    # the two leaves have noise of their own; the mean error is 0.1 · range / √2000
    assert torch.allclose(smooth.values["right"], X, atol=0.05)
    assert not torch.allclose(smooth.values["left"] - 2 * X, 2 * (smooth.values["right"] - X), atol=1e-4)


def test_unknown_leaf() -> None:
    with pytest.raises(pb.SiteError, match=r'no floating input "z"\. Those that can be explained: input:x'):
        pb.explain(lambda x: linear(x), X, site="input:z")


@pytest.mark.parametrize(
    "output",
    [
        lambda y: y, lambda y: (y, None), lambda y: [y], lambda y: {"logits": y, "loss": y.sum()},
        lambda y: SimpleNamespace(logits=y), lambda y: Pair(y, 1.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chunk", ["auto", 1])
def test_outputs_of_any_kind(output: Any, chunk: Any) -> None:
    """Also in chunks of the clean pass, where outputs are put together again."""
    found = pb.explain(lambda x: output(linear(x)), X, target=[0, 1], method="gradient", chunk=chunk)
    assert torch.allclose(found.values, WEIGHT)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", ["auto", 1])
def test_model_outputs_of_transformers(chunk: Any) -> None:
    from transformers.modeling_outputs import SequenceClassifierOutput

    found = pb.explain(
        lambda x: SequenceClassifierOutput(logits=linear(x)), X, target=[0, 1], method="gradient", chunk=chunk
    )
    assert torch.allclose(found.values, WEIGHT)  # type: ignore[arg-type]


def test_shared_leaves_are_not_repeated() -> None:
    """A matrix whose first dimension happens to be the batch size is data of all examples if marked so."""
    graph = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)

    def net(x: Tensor, graph: Tensor) -> Tensor:
        assert graph.shape == (2, 2)
        return linear(x) @ graph

    found = pb.explain(net, (X, Shared(graph)), target=0, method=pb.SmoothGrad(samples=7, noise=0.0))
    assert torch.allclose(found.values, WEIGHT[1].expand(2, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.ones(0, 3), r'empty batch: input "input" has shape \(0, 3\)\. Give at least one example'),
        (torch.tensor([[1.0, 2.0, 3.0], [1.0, float("nan"), float("inf")]]), r'"input" is not finite: example 1 has 2 NaN or infinite'),
        (torch.tensor(1.0), r"no input has a batch dimension: every tensor is a scalar"),
        ("text", r"no tensor in the inputs \(a str\)\. Text has to be tokenized first"),
        ({"input_ids": [[1, 2]]}, r'no tensor in the inputs .* return_tensors="pt"'),
        (None, r"no tensor in the inputs \(a NoneType\)\. Give a tensor, a tuple"),
        (torch.ones(2, 3).double(), r'input "input" is torch\.float64, the model\'s parameters are torch\.float32.*x\.to\(torch\.float32\)'),
        (torch.ones(2, 3, dtype=torch.long), r"is torch\.int64, .*If it holds numbers rather than token ids, convert it: x\.to\(torch\.float32\)"),
    ],
)  # fmt: skip
def test_refused(inputs: Any, message: str) -> None:
    with pytest.raises(pb.InputError, match=message):
        pb.explain(nn.Linear(3, 2), inputs)


def test_a_cache_is_refused() -> None:
    class Cache:
        def get_seq_length(self) -> int:
            return 3

    with pytest.raises(pb.InputError, match=r'"past_key_values" is a key-value cache'):
        pb.explain(linear, {"x": X, "past_key_values": Cache()})


def test_the_users_tensors_are_never_written() -> None:
    """Neither leaves nor masks nor numpy memory, by a net that works in place on all it gets."""

    def rude(x: Tensor, mask: Tensor, shared: Tensor) -> Tensor:
        x *= 2
        mask.zero_()
        shared.add_(1)
        return linear(x)

    x, mask, shared = X.numpy().copy(), torch.ones(2, 3), torch.zeros(2)
    found = pb.explain(
        rude, (x, mask, Shared(shared)), target=[0, 1], method=pb.IntegratedGradients(steps=3), chunk=2
    )
    assert torch.allclose(found.values, 2 * WEIGHT * X)  # type: ignore[arg-type]
    assert np.array_equal(x, X.numpy())
    assert bool((mask == 1).all())
    assert bool((shared == 0).all())
    first = pb.explain(rude, (x[:1], mask[:1], Shared(shared)), target=0, method=pb.SmoothGrad(samples=3))
    assert np.array_equal(x, X.numpy())
    assert bool((mask == 1).all())
    # the record does not follow later changes of the user's memory
    x[:] = 0
    assert torch.equal(found.point, X)  # type: ignore[arg-type]
    assert first.values.shape == (1, 3)  # type: ignore[union-attr]


def test_leaf_names_come_from_the_signature() -> None:
    read = read_inputs((X, {"deep": [X]}), lambda image, extra: image)
    assert list(read.leaf) == ["image", "extra.deep.0"]
    assert read.explained == ("image", "extra.deep.0")
    assert len(list(nested_tensors((X, {"deep": [X], "record": Record(X)})))) == 3


def test_complex_inputs() -> None:
    """∂|z|² = 2z in PyTorch's convention, so Re(z · conj(gradient)) = 2|z|²."""
    z = torch.complex(X, X + 1)
    found = pb.explain(lambda z: z.abs().square().sum(1, keepdim=True), z, target=0, method="inputxgradient")
    assert torch.allclose(found.values, 2 * z.abs().square())  # type: ignore[arg-type]


def test_one_number_per_example() -> None:
    """Inputs of shape (B,): the path of a square gives the square itself."""
    x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = pb.explain(lambda x: x.square(), x, method=pb.IntegratedGradients(steps=4))
    assert torch.allclose(found.values, x.square())  # type: ignore[arg-type]
    both = pb.explain_targets(lambda x: torch.stack([x, 3 * x], 1), x, [0, 1], method="gradient")
    assert [each.values.tolist() for each in both] == [[1.0] * 3, [3.0] * 3]  # type: ignore[union-attr]
    with pytest.raises(pb.InputError, match="example 1 has 1 NaN or infinite"):
        pb.explain(lambda x: x, torch.tensor([0.0, float("nan")]))
