"""Whether a score is smooth, from its autograd graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pullback as pb
from pullback.core.smoothness import has_smooth_score, is_smooth

SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: 2 * x - 1,
    "gelu": F.gelu,
    "silu": F.silu,
    "product of two": lambda x: x * x.flip(1),
    "quotient": lambda x: x / (1 + x.square().sum(1, keepdim=True)),
    "layer norm": lambda x: F.layer_norm(x, (4,)),
    "rms norm spelled out": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "attention": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0],
    "attention spelled out": lambda x: (x[:, :, None] * x[:, None]).softmax(-1) @ x[:, :, None],
    "attention mask": lambda x: (
        x.masked_fill(torch.tensor([True, False, False, True]), -1e9).softmax(1).square()
    ),
    "attention mask by where": lambda x: (
        torch.where(torch.eye(4) > 0, x[:, None], -1e9).softmax(2) @ x[:, :, None]
    ),
    "average pool": lambda x: F.avg_pool1d(x[:, None], 2).exp(),
}
KINKED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu in place": lambda x: (2 * x).relu_(),
    "relu of a part in place": lambda x: _first_half_rectified(2 * x),
    "leaky relu": F.leaky_relu,
    "prelu": lambda x: F.prelu(x, torch.tensor(0.1, dtype=x.dtype)),
    "elu": F.elu,
    "hardswish": F.hardswish,
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(-1, 1),
    "maximum": lambda x: torch.maximum(x, x.flip(1)),
    "relu by where": lambda x: torch.where(x > 0, x, 0),
    "relu by masked_fill": lambda x: x.masked_fill(x < 0, 0),
    "relu by assignment": lambda x: _rectified(2 * x),
    "max pool": lambda x: F.max_pool1d(x[:, None], 2),
    "max": lambda x: x.amax(1),
    "top entries": lambda x: x.topk(2).values,
    "root, singular at zero": torch.sqrt,
    "norm, with a kink at zero": lambda x: x / x.norm(dim=1, keepdim=True),
    "kink deep inside": lambda x: F.gelu(x + (x @ torch.ones(4, 4).to(x)).relu().tanh()),
    "custom function": lambda x: Opaque.apply(x),  # type: ignore[no-untyped-call]
}


class Opaque(torch.autograd.Function):
    """Nobody can see what its derivative is."""

    @staticmethod
    def forward(context: object, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return gradient


def _first_half_rectified(x: Tensor) -> Tensor:
    x[:, :2].relu_()
    return x


def _rectified(x: Tensor) -> Tensor:
    x[x < 0] = 0
    return x


def graph(function: Callable[[Tensor], Tensor]) -> Tensor:
    x = torch.tensor([[0.3, -0.7, 1.1, 0.2]], dtype=torch.float64, requires_grad=True)
    return function(x).sum()


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_operations(name: str) -> None:
    assert is_smooth(graph(SMOOTH[name]))


@pytest.mark.parametrize("name", KINKED)
def test_operations_with_kinks_and_unknown_ones(name: str) -> None:
    assert not is_smooth(graph(KINKED[name]))


def test_a_score_is_judged_between_site_and_target() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)).double()
    x = torch.ones(3, 4).double()
    assert not has_smooth_score(pb.pose(net, x, target=0))
    assert has_smooth_score(pb.pose(net, x, target=0, site="2"))
    assert not has_smooth_score(pb.pose(net, x, target=lambda output: output.abs().sum(1), site="2"))


def test_asking_counts_no_evaluation_and_leaves_no_gradient() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    problem = pb.pose(net, torch.ones(3, 4), target=0)
    with torch.inference_mode():
        assert has_smooth_score(problem)
    assert problem.evaluations_of_rows().tolist() == [0, 0, 0]
    assert all(parameter.grad is None for parameter in net.parameters())


def test_random_forwards_and_domains() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2)).train()
    x = torch.ones(3, 4)
    assert not has_smooth_score(pb.pose(net, x, target=0, allow_train=True))

    class Magnitude:
        def analysis(self, x: Tensor) -> Tensor:
            return x.abs()

        def synthesis(self, coefficients: Tensor) -> Tensor:
            return coefficients.abs()

    assert has_smooth_score(pb.pose(net.eval(), x, target=0))
    assert not has_smooth_score(pb.pose(net, x, target=0).in_domain(Magnitude()))


def test_padding_of_batch_mates_does_not_matter() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    net = BertForSequenceClassification(
        BertConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    ).eval()
    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    padded = pb.pose(net, {"input_ids": ids, "attention_mask": mask})
    assert padded.free is not None
    assert has_smooth_score(padded)
    assert has_smooth_score(pb.pose(net, {"input_ids": ids[:1], "attention_mask": mask[:1]}))
