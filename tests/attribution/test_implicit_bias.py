"""The implicit bias of single operations: golden arrays, and every closed form against forward-mode AD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pullback.attribution.implicit_bias import CLOSED_FORMS, implicit_bias
from pullback.attribution.implicit_bias.operations import AFFINE, ELEMENTWISE, HOMOGENEOUS, OPERATIONS
from pullback.core.overrides import Operation
from pullback.core.spellings import canonical, canonical_call

with np.load(Path(__file__).parents[1] / "golden" / "fullgrad_general_ops.npz") as arrays:
    GOLDEN = {name: torch.from_numpy(arrays[name]) for name in arrays.files if arrays[name].dtype.kind == "f"}

# the golden arrays and closed forms agree to 2e-15 where they were made; another summation order costs a little
EXACT = 1e-12


def operation(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Operation:
    """The call as a rule would see it."""
    spelling = canonical(function)
    assert spelling is not None
    assert spelling.function is not None
    _, given, named = canonical_call(spelling, args, kwargs)
    return Operation(spelling.name, spelling.function, given, named)


def bias(call: Operation) -> Tensor:
    """The whole bias of the only result."""
    result = call.value()
    found = implicit_bias(call, result)
    assert found is not None
    assert len(found) == 1
    total = found[0].total()
    return torch.zeros_like(result) if total is None else total.expand(result.shape).detach()


def by_forward_mode(call: Operation) -> Tensor:
    """``y - J x`` from torch.func.jvp over every operand that requires grad."""
    live = [index for index, each in enumerate(call.args) if isinstance(each, Tensor) and each.requires_grad]
    points = tuple(call.args[index].detach() for index in live)

    def function(*given: Tensor) -> Tensor:
        args = [each.detach() if isinstance(each, Tensor) else each for each in call.args]
        for index, each in zip(live, given, strict=True):
            args[index] = each
        return call.function(*args, **call.kwargs)  # type: ignore[no-any-return]

    value, moved = torch.func.jvp(function, points, points)  # type: ignore[misc]
    return value - moved


def wave(*shape: int, offset: float = 0.0, live: bool = True) -> Tensor:
    k = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return (2 * torch.sin(0.7 * k + 0.3 + offset)).reshape(shape).requires_grad_(live)


UNARY = {
    "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "sigmoid": torch.sigmoid,
    "tanh": torch.tanh, "softplus": F.softplus, "elu": F.elu, "hardswish": F.hardswish, "mish": F.mish,
    "relu6": F.relu6, "exp": torch.exp, "erf": torch.erf,
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_golden_activations(name: str) -> None:
    x = GOLDEN["x"].clone().requires_grad_()
    native = {"gelu_tanh": F.gelu}.get(name, UNARY[name])
    call = operation(native, x, **({"approximate": "tanh"} if name == "gelu_tanh" else {}))
    assert (bias(call) - GOLDEN[f"b_{name}"]).abs().max() < EXACT


def test_golden_softmax_norms_products_and_attention() -> None:
    z, y, v = (GOLDEN[name].clone().requires_grad_() for name in ("z", "y", "v"))
    w, bb = GOLDEN["w"], GOLDEN["bb"]
    calls = {
        "softmax": operation(F.softmax, z, dim=-1),
        "logsoftmax": operation(F.log_softmax, z, dim=-1),
        "lse": operation(torch.logsumexp, z, -1),
        "layernorm_eps1e2": operation(F.layer_norm, z, (6,), w, bb, 1e-2),
        "rmsnorm_eps1e2": operation(F.rms_norm, z, (6,), w, 1e-2),
        "mul": operation(torch.mul, z, y),
        "qk": operation(torch.matmul, z, y.t()),
        "sdpa": operation(F.scaled_dot_product_attention, z[None], y[None], v[None]),
    }
    for name, call in calls.items():
        assert (bias(call).reshape(GOLDEN[f"b_{name}"].shape) - GOLDEN[f"b_{name}"]).abs().max() < EXACT, name


X, Y, CONSTANT = wave(2, 3, 6), wave(2, 3, 6, offset=3), wave(3, 6, offset=5, live=False)
IMAGE = wave(2, 4, 5, 5)
POSITIVE = (wave(2, 3, 6).detach().abs() + 0.3).requires_grad_()
WEIGHT, OFFSET = wave(5, 6, offset=1, live=False), wave(5, offset=2, live=False)
MATRIX, OTHER = wave(3, 6), wave(6, 4, offset=2)
# a closed form for every way in which constants and signals can meet
CALLS: dict[str, Operation] = {
    "linear": operation(F.linear, X, WEIGHT, OFFSET),
    "linear, weight with signal": operation(F.linear, X, WEIGHT.clone().requires_grad_(), OFFSET),
    "linear, all signal": operation(F.linear, X, WEIGHT.clone().requires_grad_(), OFFSET.clone().requires_grad_()),
    "conv2d": operation(F.conv2d, IMAGE, wave(3, 4, 3, 3, live=False), wave(3, live=False), padding=1),
    "conv_transpose2d": operation(F.conv_transpose2d, IMAGE, wave(4, 3, 3, 3, live=False), wave(3, live=False)),
    "conv1d, live kernel": operation(F.conv1d, wave(2, 4, 7), wave(3, 4, 3, offset=1), wave(3, live=False)),
    "bilinear": operation(F.bilinear, X, Y, wave(2, 6, 6, live=False), wave(2, live=False)),
    "addmm": operation(torch.addmm, wave(3, 4, live=False), MATRIX, OTHER, beta=0.5, alpha=2.0),
    "addmm, live": operation(torch.addmm, wave(3, 4), MATRIX, OTHER, beta=0.5),
    "addmm, constant matrix": operation(torch.addmm, wave(4, live=False), MATRIX, OTHER.detach()),
    "baddbmm": operation(torch.baddbmm, wave(2, 3, 3, live=False), X, Y.transpose(1, 2).contiguous()),
    "addcmul": operation(torch.addcmul, CONSTANT, X, Y, value=0.3),
    "addcmul, live": operation(torch.addcmul, X, Y, CONSTANT, value=0.3),
    "matmul": operation(torch.matmul, X, Y.transpose(1, 2)),
    "mul by a constant": operation(torch.mul, X, CONSTANT),
    "div": operation(torch.div, X, POSITIVE),
    "div of a constant": operation(torch.div, CONSTANT, POSITIVE),
    "div by a constant": operation(torch.div, X, POSITIVE.detach()),
    "add": operation(torch.add, X, CONSTANT, alpha=0.5),
    "add, constant first": operation(torch.add, CONSTANT, X, alpha=0.5),
    "add a number": operation(torch.add, X, 1.5),
    "sub": operation(torch.sub, X, CONSTANT),
    "sub, constant first": operation(torch.sub, CONSTANT, X, alpha=0.5),
    "batch_norm": operation(F.batch_norm, IMAGE, wave(4, live=False), wave(4, live=False).abs() + 1, wave(4, live=False), wave(4, offset=1, live=False)),
    "batch_norm, training": operation(F.batch_norm, IMAGE, None, None, wave(4, live=False), wave(4, live=False), True),
    "instance_norm": operation(F.instance_norm, IMAGE, None, None, wave(4, live=False), wave(4, live=False)),
    "layer_norm": operation(F.layer_norm, X, (3, 6), None, None, 1e-2),
    "layer_norm, adaptive": operation(F.layer_norm, X, (6,), wave(6), wave(6, offset=1)),
    "group_norm": operation(F.group_norm, IMAGE, 2, wave(4, live=False), wave(4, offset=1, live=False), 1e-1),
    "rms_norm": operation(F.rms_norm, X, (6,)),
    "softplus": operation(F.softplus, X, 3.0, 2.0),
    "elu": operation(F.elu, X, 0.7),
    "log": operation(torch.log, POSITIVE),
    "square": operation(torch.square, X),
    "sqrt": operation(torch.sqrt, POSITIVE),
    "rsqrt": operation(torch.rsqrt, POSITIVE),
    "reciprocal": operation(torch.reciprocal, POSITIVE),
    "pow": operation(torch.pow, POSITIVE, 2.7),
    "pow, exponent with signal": operation(torch.pow, POSITIVE, X),
    "power of a number": operation(torch.pow, torch.tensor(2.5, dtype=torch.float64), X),
    "var": operation(torch.var, X, -1),
    "softmax": operation(torch.softmax, X, 1),
    "log_softmax": operation(torch.log_softmax, X, 1),
    "logsumexp": operation(torch.logsumexp, X, 1, keepdim=True),
    "where": operation(torch.where, X.detach() > 0, X, CONSTANT),
    "masked_fill": operation(torch.masked_fill, X, X.detach() > 0, 3.0),
    "pad": operation(F.pad, X, (1, 2), value=0.5),
    "clamp": operation(torch.clamp, X, -0.5, 0.8),
    "lerp": operation(torch.lerp, X, CONSTANT, 0.3),
    "maximum": operation(torch.maximum, X, CONSTANT),
    "atan2": operation(torch.atan2, X, POSITIVE),
    "cumprod": operation(torch.cumprod, X, -1),
    "cosine_similarity": operation(F.cosine_similarity, X, Y, -1),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_agrees_with_forward_mode(case: str) -> None:
    call = CALLS[case]
    assert (bias(call) - by_forward_mode(call)).abs().max() < EXACT


@pytest.mark.parametrize("case", ["linear", "conv2d", "add", "cat", "pad", "layer_norm"])
def test_additive_constants_are_told_from_curvature(case: str) -> None:
    if case == "cat":
        call = operation(torch.cat, [X, CONSTANT.expand(2, 3, 6)], 1)
        wanted = torch.cat([torch.zeros_like(X), CONSTANT.expand(2, 3, 6)], 1)
    elif case == "layer_norm":
        call, wanted = operation(F.layer_norm, X, (6,), None, OFFSET.new_ones(6)), torch.ones(6)
    else:
        call = CALLS[case]
        wanted = by_forward_mode(call)
    (found,) = implicit_bias(call, call.value()) or ()
    assert found.constant is not None
    assert torch.allclose(found.constant.expand_as(wanted).double(), wanted.double(), atol=EXACT)
    assert (found.bent() is None) == (case != "layer_norm")


MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 1, 0, 1, 0]], dtype=torch.bool)
ALIBI = wave(4, 5, offset=2, live=False)


@pytest.mark.parametrize("live", ["qkv", "q", "k", "v", "qv", "qk"])
@pytest.mark.parametrize("mask", [None, "boolean", "additive", "infinite", "causal"])
def test_attention_with_masks(live: str, mask: str | None) -> None:
    """The composite against its own eager form, whose masks remove entries by -inf."""
    length = 4 if mask == "causal" else 5
    q, k, v = wave(2, 3, 4, 8), wave(2, 3, length, 8, offset=1), wave(2, 3, length, 6, offset=2)
    q, k, v = (
        each.detach().requires_grad_(name in live) for name, each in zip("qkv", (q, k, v), strict=True)
    )
    infinite = torch.zeros(4, 5, dtype=torch.float64).masked_fill(~MASK, -torch.inf)
    given = {"boolean": MASK, "additive": ALIBI, "infinite": infinite}.get(mask or "")
    call = operation(
        F.scaled_dot_product_attention, q, k, v, attn_mask=given, is_causal=mask == "causal", scale=0.4
    )
    removed = {"boolean": ~MASK, "infinite": ~MASK, "causal": torch.ones(4, 4).triu(1).bool()}.get(mask or "")

    def eager(*given: Tensor) -> Tensor:
        full = {"q": q.detach(), "k": k.detach(), "v": v.detach(), **dict(zip(live, given, strict=True))}
        logits = full["q"] @ full["k"].transpose(-1, -2) * 0.4
        logits = logits + ALIBI if mask == "additive" else logits
        return (logits if removed is None else logits.masked_fill(removed, -torch.inf)).softmax(-1) @ full[
            "v"
        ]

    points = tuple({"q": q, "k": k, "v": v}[name].detach() for name in live)
    value, moved = torch.func.jvp(eager, points, points)  # type: ignore[misc]
    assert (bias(call) - (value - moved)).abs().max() < EXACT


def test_attention_with_grouped_heads_and_empty_rows() -> None:
    q, k, v = wave(1, 4, 3, 8), wave(1, 2, 3, 8, offset=1), wave(1, 2, 3, 8, offset=2)
    grouped = bias(operation(F.scaled_dot_product_attention, q, k, v, enable_gqa=True))
    wide = [each.repeat_interleave(2, 1) for each in (k, v)]
    assert torch.equal(grouped, bias(operation(F.scaled_dot_product_attention, q, *wide)))
    empty = torch.zeros(3, 3, dtype=torch.bool)
    assert not bias(operation(F.scaled_dot_product_attention, q, wide[0], wide[1], attn_mask=empty)).any()


def test_softmax_biases_sum_to_one_and_do_not_see_removed_entries() -> None:
    s = wave(2, 5).detach()
    s[:, 3] = -torch.inf
    p = bias(operation(torch.softmax, s.requires_grad_(), -1))
    assert torch.allclose(p.sum(-1), torch.ones(2, dtype=torch.float64), atol=1e-14)
    assert not p[:, 3].any()
    kept = s.detach()[:, [0, 1, 2, 4]].requires_grad_()
    assert torch.allclose(p[:, [0, 1, 2, 4]], bias(operation(torch.softmax, kept, -1)), atol=1e-14)
    assert not bias(operation(torch.exp, s))[:, 3].any()
    assert torch.isfinite(bias(operation(torch.log_softmax, s, -1))).all()
    assert torch.isfinite(bias(operation(torch.sigmoid, s))).all()


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "hardshrink", "threshold"])
def test_piecewise_linear_operations(name: str) -> None:
    args = (0.5, 0.0) if name == "threshold" else ()
    call = operation(getattr(F, name), X, *args)
    assert not bias(call).any()


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recurrent_kernels(kind: str, dtype: torch.dtype) -> None:
    """Against a double-vjp through the same kernel in float64; both results of the LSTM count."""
    cls = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn_tanh": torch.nn.RNN}[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = cls(4, 3, 2, batch_first=True).to(dtype).requires_grad_(False)
    x, hidden = wave(2, 5, 4).detach().to(dtype).requires_grad_(), torch.zeros(2, 2, 3, dtype=dtype)
    state = (hidden, hidden) if kind == "lstm" else hidden
    call = operation(getattr(torch, kind), x, state, net._flat_weights, True, 2, 0.0, False, False, True)
    found = implicit_bias(call, call.value())
    assert found is not None
    assert len(found) == (3 if kind == "lstm" else 2)
    net, x64 = net.double(), x.detach().double().requires_grad_()
    y = net(x64)[0]
    u = torch.zeros_like(y, requires_grad=True)
    (pulled,) = torch.autograd.grad(y, x64, u, create_graph=True)
    (moved,) = torch.autograd.grad(pulled, u, x64.detach())
    first = found[0].total()
    assert first is not None
    assert (first - (y - moved)).abs().max() < (EXACT if dtype == torch.float64 else 1e-5)


def test_an_operation_without_any_derivative_of_its_derivative_is_unknown() -> None:
    call = Operation(
        "scaled_dot_product_attention", F.scaled_dot_product_attention, (X, X, X), {"dropout_p": 0.5}
    )
    assert implicit_bias(call, call.value()) is None


def test_every_listed_operation_is_watched() -> None:
    assert set(CLOSED_FORMS) | AFFINE | ELEMENTWISE <= OPERATIONS
    assert not HOMOGENEOUS & OPERATIONS
