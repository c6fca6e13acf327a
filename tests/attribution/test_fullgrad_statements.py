"""Statements about the decomposition: the classic theorem, homogeneity, folding, granularity, a golden transformer."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pullback.attribution import fullgrad_terms
from tests.attribution.test_fullgrad_terms import TOKENS, Computes, attention, linear, weighted
from tests.golden_net import example, largest, tiny_cnn


def test_classic_statement_on_a_relu_network() -> None:
    """Biases of convolutions and batch norms, broadcast over space, times the gradients at their outputs."""
    net, x = tiny_cnn(), example(2, 3, 8, 8)
    outputs: dict[str, Tensor] = {}
    z = x.clone().requires_grad_()
    value = z
    for name, layer in net.named_children():
        value = layer(value)
        outputs[name] = value
    places = {"0": "0:conv2d", "1": "1:batch_norm", "5": "5:batch_norm", "9": "9:linear"}
    deltas = torch.autograd.grad(value[:, 1].sum(), [z, *(outputs[name] for name in places)])
    biases = [net[0].bias.reshape(-1, 1, 1)]
    for norm in (net[1], net[5]):
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_var is not None
        assert norm.running_mean is not None
        shift = norm.bias - norm.weight * norm.running_mean / (norm.running_var + 1e-5).sqrt()
        biases.append(shift.reshape(-1, 1, 1))
    biases.append(net[9].bias)
    found = fullgrad_terms(net, x, target=1)
    assert isinstance(found.input_term, Tensor)
    assert largest(found.input_term, deltas[0] * x) < 1e-14
    assert [name for name, _ in found.terms] == list(places.values())
    for (_, term), delta, bias in zip(found.terms, deltas[1:], biases, strict=True):
        assert largest(term, delta * bias) < 1e-14


def test_without_biases_the_score_is_homogeneous() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2, bias=False)
    )
    net.double()
    x = example(2, 3, 6, 6)
    found, scaled = (fullgrad_terms(net, factor * x, target=1) for factor in (1, 2.5))
    assert found.terms == []
    assert isinstance(found.input_term, Tensor)
    assert largest(found.input_term.flatten(1).sum(1), found.score) < 1e-14
    assert largest(scaled.score, 2.5 * found.score) < 1e-14


def test_folding_batch_norm_adds_its_term_to_the_convolutions() -> None:
    net, x = tiny_cnn(), example(2, 3, 8, 8)
    folded = copy.deepcopy(net)
    folded[0] = torch.nn.utils.fusion.fuse_conv_bn_eval(net[0], net[1])  # type: ignore[type-var]
    folded[1] = nn.Identity()
    apart, together = (
        dict(fullgrad_terms(net, x, target=1).terms),
        dict(fullgrad_terms(folded, x, target=1).terms),
    )
    scale = net[1].weight / (net[1].running_var + 1e-5).sqrt()  # type: ignore[operator, union-attr]
    assert scale.min() > 0
    assert largest(together["0:conv2d"], apart["0:conv2d"] + apart["1:batch_norm"]) < 1e-13


def test_coarse_and_fine_totals_are_equal() -> None:
    """One composite of softmax attention carries what its parts carry together."""
    weights = linear(6, 12)
    coarse, fine = (Computes(attention("boolean", eager), a=weights) for eager in (False, True))
    fine.load_state_dict(coarse.state_dict())
    x = example(*TOKENS)
    one, parts = (fullgrad_terms(net, x, target=weighted).sums() for net in (coarse, fine))
    assert [*one] == ["a:linear", "scaled_dot_product_attention"]
    composite = one["scaled_dot_product_attention"]
    inside = torch.stack([total for name, total in parts.items() if name != "a:linear"])
    assert len(inside) == 4  # two products, a mask and a softmax
    inside = inside.sum(0)
    assert largest(composite, inside) < 1e-12


def test_golden_transformer() -> None:
    """The whole decomposition of a small transformer, term by term, as computed elsewhere."""
    with np.load(Path(__file__).parents[1] / "golden" / "fullgrad_general_ops.npz") as arrays:
        terms = dict(zip(arrays["tf_names"].tolist(), arrays["tf_terms"].tolist(), strict=True))
        score, share = float(arrays["tf_f"]), float(arrays["tf_input_term"])

    def t(shape: tuple[int, ...], offset: float) -> Tensor:
        k = torch.arange(math.prod(shape), dtype=torch.float64)
        return (2 * torch.sin(0.7 * k + 0.3 + offset)).reshape(shape)

    w = [t((8, 8), i) / math.sqrt(8) * 0.5 for i in range(9)]
    b = [0.1 * t((8,), 20 + i) for i in range(9)]
    pos, g, h = 0.2 * t((4, 8), 40), 1 + 0.1 * t((8,), 50), 0.1 * t((8,), 51)

    def forward(net: Any, x: Tensor) -> Tensor:
        x = x + pos
        n = F.layer_norm(x, (8,), g, h, 1e-5)
        q, k, v = (F.linear(n, w[i], b[i]) for i in range(3))
        x = x + F.linear((q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ v, w[3], b[3])
        n = F.rms_norm(x, (8,), g, 1e-6)
        x = x + F.linear(F.silu(F.linear(n, w[4], b[4])) * F.linear(n, w[5], b[5]), w[6], b[6])
        x = F.gelu(F.linear(x, w[7], b[7])).tanh().amax(1)
        return (F.linear(x, w[8], b[8]).sigmoid() * g).sum(-1, keepdim=True)

    found = fullgrad_terms(Computes(forward), t((4, 8), 7)[None], target=0)
    order = [
        "posadd", "layernorm", "q", "k", "v", "qk", "softmax", "av", "proj", "rmsnorm", "gate", "silu", "up",
        "mul", "down", "fc", "gelu", "tanh", "fc2", "sigmoid",
    ]  # fmt: skip
    assert abs(float(found.score) - score) < 1e-12
    assert isinstance(found.input_term, Tensor)
    assert abs(float(found.input_term.sum()) - share) < 1e-12
    assert len(found.terms) == len(order)
    for name, total in zip(order, found.sums().values(), strict=True):
        assert abs(float(total) - terms[name]) < 1e-12, name
    assert all(terms[name] == 0 for name in set(terms) - set(order))
    # a bias of the keys moves all logits of a query alike, which softmax does not see
    assert abs(float(found.sums()["linear#2"])) < 1e-15
