"""Operations and blocks as people write them: relevance adds up, or what has no rule is named."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pullback as pb
from pullback.attribution.rules.presets import RELP

from .propagation import Expression, coefficients, random, relevance

X = random(2, 5, 8)
IMAGE = random(2, 4, 8, 8, seed=1)
W = [random(8, 8, seed=10 + number) / 3 for number in range(4)]
TABLE, SMALL = random(9, 2, seed=20), random(4, 4, 3, 3, seed=21)
HALF = 0.5**0.5


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)  # type: ignore[no-any-return]


def projected(x: Tensor) -> list[Tensor]:
    return [heads(x @ weight) for weight in W[:3]]


def einsum_attention(x: Tensor) -> Tensor:
    query, key, value = projected(x)
    weights = torch.einsum("bhid,bhjd->bhij", query, key).softmax(dim=-1)
    return torch.einsum("bhij,bhjd->bhid", weights, value)


def relative_bias(x: Tensor) -> Tensor:
    place = torch.arange(5)[None] - torch.arange(5)[:, None] + 4
    query, key, value = projected(x)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=TABLE[place].permute(2, 0, 1)[None])


def alibi(x: Tensor) -> Tensor:
    query, key, value = (each.flatten(0, 1) for each in projected(x))
    distance = (torch.arange(5)[None] - torch.arange(5)[:, None]).clamp(max=0).double()
    return torch.baddbmm(distance.expand(4, 5, 5), query, key.mT, alpha=0.5).softmax(-1) @ value


def cosine_attention(x: Tensor) -> Tensor:
    query, key, value = projected(x)
    return (F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT * 5).softmax(-1) @ value


def linear_attention(x: Tensor) -> Tensor:
    query, key, value = projected(x)
    query, key = query.relu(), key.relu()
    scale = 1 / (torch.einsum("bhnd,bhd->bhn", query, key.sum(2)) + 1e-6)
    together = torch.einsum("bhnd,bhne->bhde", key, value)
    return torch.einsum("bhnd,bhde,bhn->bhne", query, together, scale)


def rotary_complex(x: Tensor) -> Tensor:
    turn = torch.polar(
        torch.ones(5, 2).double(), torch.arange(5.0).double()[:, None] * torch.tensor([1.0, 0.1])
    )

    def turned(part: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(part.reshape(2, 2, 5, 2, 2)) * turn).flatten(3)

    query, key, value = projected(x)
    return (turned(query) @ turned(key).mT).softmax(-1) @ turned(value)


def gated_attention_unit(x: Tensor) -> Tensor:
    shared = F.silu(x @ W[2])
    scores = F.relu((shared * 0.3) @ (shared * 0.7).mT) ** 2
    return F.silu(x @ W[0]) * (scores @ F.silu(x @ W[1]))


def hyena(x: Tensor) -> Tensor:
    first, second, third = x @ W[0], x @ W[1], x @ W[2]
    product = torch.fft.rfft(first * second, n=10, dim=1) * torch.fft.rfft(W[3][:5], n=10, dim=0)
    return third * torch.fft.irfft(product, n=10, dim=1)[:, :5]  # type: ignore[no-any-return]


def spectral_convolution(x: Tensor) -> Tensor:
    modes = torch.fft.rfft2(x)
    kept = torch.zeros_like(modes)
    kept[:, :, :2, :2] = torch.einsum("bixy,io->boxy", modes[:, :, :2, :2], W[0][:4, :4].to(modes.dtype))
    return torch.fft.irfft2(kept, s=(8, 8))  # type: ignore[no-any-return]


def slice_writes(x: Tensor) -> Tensor:
    held, hidden = torch.zeros(2, 5, 8).double(), F.gelu(x @ W[0])
    held[:, :3] = hidden[:, :3]
    held[:, 3:] += hidden[:, 3:]
    held[:, 1:] *= hidden[:, 1:].sigmoid()
    held[:, 2] *= hidden[:, 2]
    return held


def graph_attention(x: Tensor) -> Tensor:
    source, goal, hidden = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 3, 4, 0, 2]), x @ W[0]
    score = F.leaky_relu(hidden[:, source, 0] + hidden[:, goal, 1], 0.2)
    highest = torch.full((2, 5), -1e9).double().scatter_reduce(1, goal.expand(2, -1), score, "amax")
    score = torch.exp(score - highest[:, goal])
    weight = score / torch.zeros(2, 5).double().scatter_add(1, goal.expand(2, -1), score)[:, goal]
    return F.elu(torch.zeros(2, 5, 8).double().index_add_(1, goal, weight[..., None] * hidden[:, source]))


def coupling(x: Tensor) -> Tensor:
    kept, changed = x.chunk(2, -1)
    scale, shift = F.gelu(kept @ W[0][:4]).chunk(2, -1)
    return torch.cat([kept, changed * torch.exp(scale.tanh()) + shift], -1)


def sparse_product(x: Tensor) -> Tensor:
    edges = torch.tensor([[0, 1, 2, 4], [1, 2, 3, 0]])
    adjacency = torch.sparse_coo_tensor(edges, torch.tensor([1.0, 2.0, 0.5, 1.0]).double(), (5, 5))
    return torch.stack([F.gelu(torch.sparse.mm(adjacency, each @ W[0])) for each in x])


def response_norm(x: Tensor) -> Tensor:
    norm = x.norm(dim=(2, 3), keepdim=True)
    return x * (norm / (norm.mean(1, keepdim=True) + 1e-6)) + x  # type: ignore[no-any-return]


def standardised(x: Tensor) -> Tensor:
    spread, mean = torch.var_mean(SMALL, [1, 2, 3], keepdim=True)
    return F.relu(F.conv2d(x, (SMALL - mean) / torch.sqrt(spread + 1e-10)))


def made_convolution(x: Tensor) -> Tensor:
    made = x.mean((0, 2, 3))
    return F.conv2d(x, made[:, None, None, None] * SMALL, (made @ W[0][:4, :4]))


def written_gelu(x: Tensor, one: float | Tensor = 1.0) -> Tensor:
    return 0.5 * x * (one + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


CONSERVING: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    **{
        function.__name__: (function, X)
        for function in (
            einsum_attention, relative_bias, alibi, cosine_attention, linear_attention, rotary_complex,
            gated_attention_unit, hyena, slice_writes, graph_attention, coupling, sparse_product, written_gelu,
        )
    },
    **{
        function.__name__: (function, IMAGE)
        for function in (spectral_convolution, response_norm, standardised, made_convolution)
    },
    "gelu with a scalar tensor": (lambda x: written_gelu(x, torch.ones(()).double()), X),
    "gelu by ndtr": (lambda x: x * torch.special.ndtr(x), X),
    "gelu by erf": (lambda x: x * 0.5 * (1 + torch.erf(x * HALF)), X),
    "fourier mixing": (lambda x: F.gelu(torch.fft.fft2(x).real @ W[0]), X),
    "correlation by fft": (
        lambda x: torch.fft.irfft(torch.fft.rfft(x @ W[0], dim=1) * torch.fft.rfft(x @ W[1], dim=1).conj(), n=5, dim=1),
        X,
    ),
    "complex modulus": (lambda x: torch.complex(x[..., :4], x[..., 4:]).abs(), X),
    "squeeze and excite": (lambda x: x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1) * 2), IMAGE),
    "local response norm": (lambda x: F.local_response_norm(x, 3, alpha=1.0), IMAGE),
    "accumulating index_put": (
        lambda x: torch.zeros(3, 2, 8).double().index_put_((torch.tensor([0, 1, 1, 2, 0]),), F.gelu(x.mT.mT).transpose(0, 1), accumulate=True),
        X,
    ),
    "segment sums": (lambda x: torch.segment_reduce(F.gelu(x[0]), "sum", lengths=torch.tensor([2, 3])), X[:1]),
    "short-time Fourier": (
        lambda x: torch.istft(torch.stft(x.flatten(1), 16, window=torch.ones(16).double(), return_complex=True), 16, window=torch.ones(16).double()),
        IMAGE,
    ),
    "linear with made weight and bias": (
        lambda x: F.linear(x, weight=x.mean((0, 1))[:, None] * W[0], bias=x.mean((0, 1)) @ W[1]), X,
    ),
    "bilinear with made bias": (
        lambda x: F.bilinear(x, x, W[0].expand(3, 8, 8).contiguous(), x.mean((0, 1))[:3]), X,
    ),
    "layer norm with made weight and bias": (
        lambda x: F.layer_norm(x, (8,), x.mean((0, 1)) @ W[0], x.mean((0, 1)) @ W[1]), X,
    ),
    "layer norm with made bias": (lambda x: F.layer_norm(x, (8,), W[1][0], x.mean((0, 1)) @ W[0]), X),
    "rms norm with made weight": (lambda x: F.rms_norm(x, (8,), x.mean((0, 1)) @ W[0]), X),
    "group norm with made weight and bias": (
        lambda x: F.group_norm(x, 2, x.mean((0, 2, 3)), x.amax((0, 2, 3))), IMAGE,
    ),
    "batch norm with made weight and bias": (
        lambda x: F.batch_norm(x, None, None, x.mean((0, 2, 3)), x.amax((0, 2, 3)), training=True), IMAGE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSERVING)
def test_relevance_adds_up(name: str) -> None:
    function, x = CONSERVING[name]
    value = function(x)
    weight = random(*value.shape, seed=5)
    total = relevance(function, RELP, x, weight=weight)
    scale = (value * weight).abs().sum()
    assert (total - (value * weight).sum()).abs() <= 1e-12 * scale


NAMED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "singular values": (torch.linalg.svdvals, "linalg_svd"),
    "powers of matrices": (lambda x: torch.matrix_power(x[..., :5], 3), "matrix_power"),
    "distances": (lambda x: torch.cdist(x, x), "cdist"),
    "complex tanh": (lambda x: torch.complex(x, x).tanh().real, "tanh"),
    "products of segments": (
        lambda x: torch.segment_reduce(x[0].contiguous(), "prod", lengths=torch.tensor([2, 3])),
        "segment_reduce",
    ),
    "live sparse entries": (
        lambda x: torch.sparse.mm(torch.sparse_coo_tensor(torch.tensor([[0, 1], [1, 0]]), x[0, :2, 0], (5, 5)), x[0]),
        "sparse_addmm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_what_has_no_rule_is_named(name: str) -> None:
    function, operation = NAMED[name]
    model = Expression(lambda x: function(x).reshape(1, -1))
    with pytest.raises(pb.CoverageError, match=rf"no rule of .*{operation} in module"):
        pb.pose(model, X[:1], target=0).under(RELP).grad()


def test_a_computed_bias_keeps_all_of_its_share() -> None:
    """y = w x + b: half to the weight and half to the input of their product, and b its own."""
    x, weight, bias = random(1, 3), random(2, 3, seed=1), random(2, seed=2)
    found = coefficients(F.linear, RELP, x, weight, bias)
    assert torch.equal(found[2], torch.ones(2).double())
    assert torch.allclose(found[0], weight.sum(0, keepdim=True) / 2, rtol=1e-15)
    assert torch.allclose(found[1], x.expand(2, 3) / 2, rtol=1e-15)


def test_a_computed_scale_of_a_norm_shares_with_what_it_scales() -> None:
    x, weight, bias = random(1, 6), random(6, seed=1), random(6, seed=2)
    found = coefficients(lambda *args: F.layer_norm(args[0], (6,), *args[1:]), RELP, x, weight, bias)
    normalised = F.layer_norm(x, (6,))
    assert torch.allclose((x * found[0]).sum(), (normalised * weight).sum() / 2, rtol=1e-12)
    assert torch.allclose(found[1], normalised[0] / 2, rtol=1e-12)
    assert torch.equal(found[2], torch.ones(6).double())
