"""Recurrent layers and cells: the value of the native kernel, the derivative of the unrolled computation.

One unrolled computation serves every recurrent operation of torch: LSTM (with projections), GRU and RNN, layers
and cells, bidirectional, dense and packed. A ``CellRule`` says how gates, tanh and products in it differentiate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...core.errors import MethodError
from ...core.operations import LINEAR
from ...core.overrides import Operation, with_gradient_of
from .activations import secant

__all__ = ["GATES_CONSTANT", "PLAIN", "CellRule", "RecurrentDecomposition", "decomposed"]


@dataclass(frozen=True)
class CellRule:
    """The nonlinear parts of a recurrent cell, each with the derivative it shall have.

    ``gate`` is the sigmoid of the gates, ``tanh`` and ``relu`` bound what is carried, ``product(gate, carried)``
    lets it through. All are elementwise; values are to be those of the plain functions.
    """

    gate: Callable[[Tensor], Tensor] = torch.sigmoid
    tanh: Callable[[Tensor], Tensor] = torch.tanh
    relu: Callable[[Tensor], Tensor] = torch.relu
    product: Callable[[Tensor, Tensor], Tensor] = torch.mul


def _constant_gate(x: Tensor) -> Tensor:
    return x.detach().sigmoid()


def _secant_tanh(x: Tensor) -> Tensor:
    return secant(x, x.detach().tanh(), slope=1.0)


PLAIN: Final = CellRule()
"""The ordinary derivative: gates are functions of the input and the state."""

GATES_CONSTANT: Final = CellRule(gate=_constant_gate, tanh=_secant_tanh)
"""Gates are constants, tanh(z) = z·(tanh(z)/z) with the ratio constant: homogeneous of degree one."""

State = tuple[Tensor, ...]  # (h,) or, for an LSTM, (h, c); each (rows, features)


class _Weights(NamedTuple):
    from_input: Tensor
    from_state: Tensor
    input_bias: Tensor | None = None
    state_bias: Tensor | None = None
    projection: Tensor | None = None


def _lstm_step(from_input: Tensor, from_state: Tensor, state: State, cell: CellRule) -> State:
    enter, forget, candidate, leave = (from_input + from_state).chunk(4, -1)
    kept = cell.product(cell.gate(forget), state[1])
    carry = kept + cell.product(cell.gate(enter), cell.tanh(candidate))
    return cell.product(cell.gate(leave), cell.tanh(carry)), carry


def _gru_step(from_input: Tensor, from_state: Tensor, state: State, cell: CellRule) -> State:
    reset_input, update_input, new_input = from_input.chunk(3, -1)
    reset_state, update_state, new_state = from_state.chunk(3, -1)
    reset = cell.gate(reset_input + reset_state)
    update = cell.gate(update_input + update_state)
    candidate = cell.tanh(new_input + cell.product(reset, new_state))
    return (cell.product(1 - update, candidate) + cell.product(update, state[0]),)


def _tanh_step(from_input: Tensor, from_state: Tensor, state: State, cell: CellRule) -> State:
    return (cell.tanh(from_input + from_state),)


def _relu_step(from_input: Tensor, from_state: Tensor, state: State, cell: CellRule) -> State:
    return (cell.relu(from_input + from_state),)


Step = Callable[[Tensor, Tensor, State, CellRule], State]
_STEPS: Final[dict[str, Step]] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _tanh_step,
    "rnn_relu": _relu_step,
}
# linear, but the audit cannot tell: torch writes them in place, out of sight
_PACKING: Final = LINEAR & {"_pack_padded_sequence", "_pad_packed_sequence"}
_COMMON: Final = ("hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")
_LAYER_ARGUMENTS: Final = ("input", *_COMMON, "batch_first")
_PACKED_ARGUMENTS: Final = ("data", "batch_sizes", *_COMMON)
_CELL_ARGUMENTS: Final = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")


def _advance(step: Step, from_input: Tensor, state: State, weights: _Weights, cell: CellRule) -> State:
    from_state = linear(state[0], weights.from_state, weights.state_bias)
    hidden, *carry = step(from_input, from_state, state, cell)
    return (hidden if weights.projection is None else linear(hidden, weights.projection), *carry)


def _unrolled(
    step: Step,
    times: Sequence[Tensor],
    state: State,
    weights: _Weights,
    cell: CellRule,
    backward: bool,
) -> tuple[list[Tensor], State]:
    """One direction of one layer over ``times``, the input's share (rows, gates) of each: outputs, last state.

    Sequences are sorted by length, so the first rows are those that still run (backward: that run already);
    the state of the others stays.
    """
    outputs: list[Tensor] = []
    for from_input in reversed(times) if backward else times:
        rows = len(from_input)
        running = tuple(part[:rows] for part in state)
        moved = _advance(step, from_input, running, weights, cell)
        outputs.append(moved[0])
        still = rows == len(state[0])
        state = moved if still else tuple(torch.cat([m, s[rows:]]) for m, s in zip(moved, state, strict=True))
    return outputs[::-1] if backward else outputs, state


def _grouped(parameters: Sequence[Tensor], biased: bool, groups: int) -> list[_Weights]:
    """The flat weights by layer and direction: w_ih, w_hh, b_ih and b_hh if biased, w_hr if projected."""
    size = len(parameters) // groups
    found = []
    for start in range(0, len(parameters), size):
        group = list(parameters[start : start + size])
        if not biased:
            group[2:2] = [None, None]  # type: ignore[list-item]
        found.append(_Weights(*group))
    return found


def _stacked_layers(operation: Operation, cell: CellRule) -> tuple[Tensor, ...]:
    packed = "batch_sizes" in operation.kwargs or isinstance(operation.argument(3, ""), (list, tuple))
    names = _PACKED_ARGUMENTS if packed else _LAYER_ARGUMENTS
    given = {name: operation.argument(position, name) for position, name in enumerate(names)}
    layers, directions = given["num_layers"], 2 if given["bidirectional"] else 1
    if given["train"] and given["dropout"] and layers > 1:
        raise MethodError(
            f"{operation.name} in module {operation.module_path!r} draws dropout({given['dropout']}) between "
            "its layers, and no rule can know the draws; expected no dropout: call model.eval() first"
        )
    sizes = given["batch_sizes"].tolist() if packed else []
    sequence_first = packed or not given["batch_first"]
    signal = _widened(given["data"] if packed else given["input"])
    signal = signal if sequence_first else signal.transpose(0, 1)
    hx = _widened(given["hx"])
    initial = list(zip(*(part.unbind() for part in ((hx,) if isinstance(hx, Tensor) else hx)), strict=True))
    weights = _grouped(_widened(given["params"]), given["has_biases"], layers * directions)
    last: list[State] = []
    for _ in range(layers):
        sides = []
        for direction in range(directions):
            mine = weights[len(last)]
            from_input = linear(signal, mine.from_input, mine.input_bias)
            times = from_input.split(sizes) if packed else from_input.unbind()
            outputs, state = _unrolled(
                _STEPS[operation.name], times, initial[len(last)], mine, cell, backward=direction == 1
            )
            last.append(state)
            sides.append(torch.cat(outputs) if packed else torch.stack(outputs))
        signal = sides[0] if directions == 1 else torch.cat(sides, -1)
    output = signal if sequence_first else signal.transpose(0, 1)
    return output, *(torch.stack(parts) for parts in zip(*last, strict=True))


def _single_step(operation: Operation, cell: CellRule) -> Any:
    given = (_widened(operation.argument(position, name)) for position, name in enumerate(_CELL_ARGUMENTS))
    signal, hx, *parameters = given
    weights = _Weights(*parameters)
    state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    from_input = linear(signal, weights.from_input, weights.input_bias)
    state = _advance(_STEPS[operation.name.removesuffix("_cell")], from_input, state, weights, cell)
    return state if len(state) > 1 else state[0]


def _widened(value: Any) -> Any:
    """Half precision in float32: ratios and sums over time need its digits."""
    if isinstance(value, (list, tuple)):
        return [_widened(part) for part in value]
    narrow = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if narrow else value


def decomposed(operation: Operation, cell: CellRule) -> Any:
    """A recurrent operation as its unrolled elementary steps, with the derivatives of ``cell``.

    LSTM: c = f⊙c₋ + i⊙tanh(g), h = o⊙tanh(c); GRU: n = tanh(Wx + r⊙Uh₋), h = (1−z)⊙n + z⊙h₋;
    RNN: h = tanh(Wx + Uh₋) or relu. Differentiable in inputs, initial states and parameters, any number of
    times. Returns what the operation returns, in the same shapes, equal up to rounding (float32 for half
    precision). Raises MethodError for dropout that is drawn between layers.

    >>> call = Operation("rnn_tanh_cell", torch.rnn_tanh_cell, (torch.ones(1, 1), torch.zeros(1, 1),
    ...                  torch.ones(1, 1), torch.ones(1, 1)), {})
    >>> bool(decomposed(call, PLAIN) == call.value())
    True
    """
    signal = operation.argument(0, "data" if "data" in operation.kwargs else "input")
    with torch.autocast(signal.device.type, enabled=False):
        unroll = _single_step if operation.name.endswith("_cell") else _stacked_layers
        return unroll(operation, cell)


@dataclass(frozen=True)
class RecurrentDecomposition:
    """Relevance through LSTM, GRU and RNN, layers and cells: gates are constants, tanh has slope tanh(z)/z.

    What reaches the output is then homogeneous of degree one in inputs, initial states and biases, so
    x·coefficient is conserved: score = Σ x·ρ(x) + Σ h₀·ρ(h₀) + Σ b·ρ(b). ReLU cells keep the gradient; packing and
    padding of sequences are linear and kept too. Values are the native kernel's, bit for bit; the derivative
    is that of the unrolled layers. Raises MethodError for dropout that is drawn between layers.

    Source: Arras, Montavon, Müller and Samek, WASSA 2017 (the signal takes all, gates nothing).

    >>> import pullback as pb
    >>> cell = torch.nn.RNNCell(1, 1, bias=False).requires_grad_(False)
    >>> problem = pb.pose(cell, torch.ones(1, 1), target=0).under((RecurrentDecomposition(),))
    >>> bool(torch.isclose(problem.grad(), cell(torch.ones(1, 1))))
    True
    """

    operations: ClassVar[frozenset[str]] = frozenset(
        [*_STEPS, *(f"{name}_cell" for name in _STEPS), *_PACKING]
    )
    conserves: ClassVar[bool] = True  # what does not reach inputs and states is with the biases
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        if operation.name in _PACKING:
            return operation.value()
        # as without rules: which kernel runs depends on what requires a gradient, and in rounding its value
        native = operation.value()
        single = isinstance(native, Tensor)
        values = [part.detach() for part in ([native] if single else native)]
        del native  # and its graph, before the unrolled one is built
        surrogate = decomposed(operation, GATES_CONSTANT)
        if single:
            return with_gradient_of(values[0], surrogate)
        return tuple(map(with_gradient_of, values, surrogate))
