"""Recurrent rules against loops over single examples and single steps, written from the cells' equations."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pullback.attribution.rules.recurrent import (
    GATES_CONSTANT,
    PLAIN,
    RecurrentDecomposition,
    decomposed,
)
from pullback.core.overrides import Operation, overrides, with_gradient_of
from tests.core.rules import points

KINDS: dict[str, Callable[..., Any]] = {
    "lstm": nn.LSTM,
    "lstm_projected": functools.partial(nn.LSTM, proj_size=2),
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": functools.partial(nn.RNN, nonlinearity="relu"),
}
CELLS: dict[str, Callable[..., Any]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn_tanh": nn.RNNCell,
    "rnn_relu": functools.partial(nn.RNNCell, nonlinearity="relu"),
}
LENGTHS = (5, 3, 4, 1)
WIDTH, HIDDEN = 3, 4


def assert_equal_in_float64(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """To 1e-12: a few dozen roundings of numbers about 1."""
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
        torch.manual_seed(0)
        yield


@dataclass(frozen=True)
class Plain:
    """Native values, the ordinary derivative of the decomposition."""

    operations: frozenset[str] = RecurrentDecomposition.operations
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        if "pack" in operation.name:
            return operation.value()
        values, surrogates = operation.value(), decomposed(operation, PLAIN)
        if isinstance(values, Tensor):
            return with_gradient_of(values, surrogates)
        return tuple(with_gradient_of(value.detach(), s) for value, s in zip(values, surrogates, strict=True))


def times_tanh(z: Tensor) -> Tensor:
    return z * (z.tanh() / z).detach()


def step_by_hand(kind: str, x: Tensor, h: Tensor, c: Tensor, w: list[Any]) -> tuple[Tensor, Tensor]:
    """One step of one cell, gates constant and tanh by its secant, from row blocks of the weights."""
    n = len(h) if kind != "lstm_projected" else HIDDEN
    bi, bh = (w[2], w[3]) if w[2] is not None else (torch.zeros(len(w[0])).to(x),) * 2

    def block(k: int, state: Tensor | None = h) -> Tensor:
        rows = slice(k * n, (k + 1) * n)
        given: Tensor = w[0][rows] @ x + bi[rows]
        return given if state is None else given + w[1][rows] @ state + bh[rows]

    if kind.startswith("lstm"):
        i, f, o = (block(k).sigmoid().detach() for k in (0, 1, 3))
        c = f * c + i * times_tanh(block(2))
        h = o * times_tanh(c)
        return (h if w[4] is None else w[4] @ h), c
    if kind == "gru":
        r, z = block(0).sigmoid().detach(), block(1).sigmoid().detach()
        candidate = times_tanh(block(2, None) + r * (w[1][2 * n :] @ h + bh[2 * n :]))
        return candidate + z * (h - candidate), c
    z = block(0)
    return (times_tanh(z) if kind == "rnn_tanh" else z * (z > 0)), c


def by_hand(kind: str, net: Any, x: Tensor, h0: Tensor, c0: Tensor) -> Tensor:
    """Output and last states of one example (T, features) as one vector; h0, c0 (layers·directions, n)."""
    states: list[Tensor] = []
    slot = 0
    for layer in range(net.num_layers):
        sides = []
        for suffix in ("", "_reverse")[: 1 + net.bidirectional]:
            names = [f"{name}_l{layer}{suffix}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            w = [getattr(net, name, None) for name in [*names, f"weight_hr_l{layer}{suffix}"]]
            h, c = h0[slot], c0[slot]
            slot += 1
            rows = []
            for step in x.flip(0) if suffix else x:
                h, c = step_by_hand(kind, step, h, c, w)
                rows.append(h)
            states += [h, c] if kind.startswith("lstm") else [h]
            sides.append(torch.stack(rows[::-1] if suffix else rows))
        x = torch.cat(sides, -1)
    return torch.cat([x.flatten(), *states])


def network(kind: str, layers: int, both: bool, bias: bool, batch_first: bool) -> Any:
    settings = {"bias": bias, "bidirectional": both, "batch_first": batch_first}
    return KINDS[kind](WIDTH, HIDDEN, layers, dtype=torch.float64, **settings)


def states(kind: str, net: Any, seed: int = 7) -> tuple[Tensor, Tensor]:
    slots = net.num_layers * (1 + net.bidirectional)
    hidden = 2 if kind == "lstm_projected" else HIDDEN
    return points(slots, len(LENGTHS), hidden, seed=seed), points(slots, len(LENGTHS), HIDDEN, seed=seed + 1)


def run(kind: str, net: Any, x: Tensor, h0: Tensor, c0: Tensor, form: str) -> tuple[Tensor, ...]:
    """Per example, output and last states as one vector. x is (B, T, features)."""
    hx = (h0, c0) if kind.startswith("lstm") else h0
    lengths: tuple[int, ...] = LENGTHS
    if form == "packed":
        y, last = net(pack_padded_sequence(x, list(LENGTHS), batch_first=True, enforce_sorted=False), hx)
        assert isinstance(y, PackedSequence)
        y, _ = pad_packed_sequence(y, batch_first=True)
    else:
        y, last = net(x if net.batch_first else x.transpose(0, 1), hx)
        y = y if net.batch_first else y.transpose(0, 1)
        lengths = (x.shape[1],) * len(x)
    last = last if isinstance(last, tuple) else (last,)
    entries = [entry for slot in zip(*last, strict=True) for entry in slot]
    return tuple(
        torch.cat([y[b, :length].flatten(), *(entry[b] for entry in entries)])
        for b, length in enumerate(lengths)
    )


def total(vectors: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([points(len(v), seed=b).detach() @ v.double() for b, v in enumerate(vectors)]).sum()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("form", ["time_first", "batch_first", "packed"])
@pytest.mark.parametrize("both", [False, True], ids=["one_way", "both_ways"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind: str, layers: int, both: bool, form: str, bias: bool) -> None:
    net = network(kind, layers, both, bias, form != "time_first")
    x, (h0, c0) = points(len(LENGTHS), max(LENGTHS), WIDTH), states(kind, net)
    weights = list(net.parameters())
    leaves = [x, h0, *([c0] if kind.startswith("lstm") else []), *weights]
    native = run(kind, net, x, h0, c0, form)
    plain_gradients = torch.autograd.grad(total(native), leaves)

    with overrides(net, [Plain()], detach=False):
        plain = torch.autograd.grad(total(run(kind, net, x, h0, c0, form)), leaves)
    assert_equal_in_float64(plain, plain_gradients)

    with overrides(net, [RecurrentDecomposition()], detach=False):
        ruled = run(kind, net, x, h0, c0, form)
        score = total(ruled)
        relevances = torch.autograd.grad(score, leaves)
    for value, expected in zip(ruled, native, strict=True):
        assert torch.equal(value, expected)

    lengths = LENGTHS if form == "packed" else (max(LENGTHS),) * len(LENGTHS)
    hand = tuple(by_hand(kind, net, x[b, :length], h0[:, b], c0[:, b]) for b, length in enumerate(lengths))
    assert_equal_in_float64(hand, native)
    assert_equal_in_float64(relevances, torch.autograd.grad(total(hand), leaves))

    # homogeneous of degree one in everything but the weight matrices
    named = dict(zip([name for name, _ in net.named_parameters()], relevances[-len(weights) :], strict=True))
    kept = [(leaf * rho).sum() for leaf, rho in zip(leaves, relevances[: -len(weights)], strict=False)]
    kept += [(getattr(net, name) * rho).sum() for name, rho in named.items() if name.startswith("bias")]
    assert_equal_in_float64([torch.stack(kept).sum()], [score.detach()])
    assert kind == "rnn_relu" or not torch.allclose(relevances[0], plain_gradients[0], rtol=1e-2)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: str, bias: bool) -> None:
    cell = CELLS[kind](WIDTH, HIDDEN, bias=bias, dtype=torch.float64)
    x, h0, c0 = points(2, WIDTH), points(2, HIDDEN, seed=1), points(2, HIDDEN, seed=2)
    leaves = [x, h0, *([c0] if kind == "lstm" else []), *cell.parameters()]

    def outcome() -> tuple[Tensor, ...]:
        found = cell(x, (h0, c0) if kind == "lstm" else h0)
        return tuple(torch.cat(found if kind == "lstm" else (found,), -1))

    native = outcome()
    with overrides(cell, [Plain()], detach=False):
        plain = torch.autograd.grad(total(outcome()), leaves)
    assert_equal_in_float64(plain, torch.autograd.grad(total(native), leaves))
    with overrides(cell, [RecurrentDecomposition()], detach=False):
        ruled = outcome()
        relevances = torch.autograd.grad(total(ruled), leaves)
    assert all(map(torch.equal, ruled, native))
    w = [getattr(cell, name, None) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")]
    hand = [step_by_hand(kind, x[b], h0[b], c0[b], w)[: 2 if kind == "lstm" else 1] for b in range(2)]
    expected = torch.autograd.grad(total(tuple(map(torch.cat, hand))), leaves)
    assert_equal_in_float64(relevances, expected)


def test_arguments_by_name_reach_the_cell() -> None:
    cell = nn.GRUCell(WIDTH, HIDDEN, dtype=torch.float64)
    x, h = points(2, WIDTH), points(2, HIDDEN, seed=1)
    named = {"hx": h, "w_ih": cell.weight_ih, "w_hh": cell.weight_hh, "b_ih": cell.bias_ih}
    call = Operation("gru_cell", torch.gru_cell, (x,), {**named, "b_hh": cell.bias_hh})
    assert_equal_in_float64([decomposed(call, GATES_CONSTANT)], [call.value()])


@pytest.mark.parametrize("z", [0.0, 1e-320, -1e-320, 1e-9])
def test_secant_of_tanh_tends_to_the_slope_at_zero(z: float) -> None:
    cell = nn.RNNCell(1, 1, bias=False, dtype=torch.float64)
    x = torch.tensor([[z]], dtype=torch.float64, requires_grad=True)
    with overrides(cell, [RecurrentDecomposition()]):
        (rho,) = torch.autograd.grad(cell(x).sum(), x)
    # tanh(z)/z = 1 - z²/3 + ...; a denormal has few digits, but tanh of it is itself
    torch.testing.assert_close(rho, cell.weight_ih.detach(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_precision(kind: str, dtype: torch.dtype) -> None:
    exact = network(kind, 2, True, True, True).requires_grad_(False)
    for parameter in exact.parameters():
        parameter.copy_(parameter.to(dtype))
    net = network(kind, 2, True, True, True).to(dtype).requires_grad_(False)
    net.load_state_dict(exact.state_dict())
    x, h0, c0 = points(4, 5, WIDTH, dtype=dtype), *(s.to(dtype) for s in states(kind, exact))
    found = {}
    for model in (exact, net):
        given = [value.detach().to(next(model.parameters()).dtype).requires_grad_() for value in (x, h0, c0)]
        with overrides(model, [RecurrentDecomposition()]):
            ruled = torch.cat(run(kind, model, given[0], given[1], given[2], "batch_first"))
            (found[model],) = torch.autograd.grad(ruled.sum(), given[0])
        native = torch.cat(run(kind, model, given[0], given[1], given[2], "batch_first"))
        assert torch.equal(ruled, native)
    # ones come in exactly and the steps of half precision run in float32: only the result is rounded
    rounding = max(torch.finfo(dtype).eps / 2, 1e-5)
    torch.testing.assert_close(found[net].double(), found[exact], rtol=1.01 * rounding, atol=1e-6)


def test_autocast_keeps_the_value_and_the_float32_steps() -> None:
    cell = nn.GRUCell(WIDTH, HIDDEN).requires_grad_(False)
    x = points(2, WIDTH, dtype=torch.float32)
    with overrides(cell, [RecurrentDecomposition()]):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ruled = cell(x)
        (lowered,) = torch.autograd.grad(ruled.float().sum(), x)
        (full,) = torch.autograd.grad(cell(x).sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ruled, cell(x))
    assert not torch.equal(ruled.float(), cell(x))  # autocast did something
    assert torch.equal(lowered, full)
