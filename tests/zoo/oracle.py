"""An oracle for relevance under the rules of RelP: read off the autograd graph of an ordinary forward pass.

No mode, no rule and no code of pullback takes part. The graph that autograd recorded is walked twice. From the leaves
up, to tell which nodes carry the signal: a gate, a denominator, a query or a key does not pass it on. Then from the
score down, calling each node for its own derivative, except that

* nothing goes along an edge that a rule holds constant,
* an activation multiplies by g(x) / x, computed from what it saved,
* a norm multiplies by γ / σ after centring, from the σ it saved,
* a product of two factors that both carry the signal sends half to each, and x^n an n-th.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn import functional

__all__ = ["OracleError", "coefficients"]

# nothing goes back through these at all
GATES = frozenset(
    [
        "Sigmoid",
        "Hardsigmoid",
        "LogSigmoid",
        "Softplus",
        "Exp",
        "Exp2",
        "Erf",
        "Erfc",
        "Erfinv",
        "Log",
        "Log2",
        "Log10",
        "Logaddexp",
        "Logaddexp2",
        "Logsumexp",
        "Logcumsumexp",
        "LogSoftmax",
        "Softmax",
        "SafeSoftmax",
        "Sqrt",
        "Rsqrt",
        "Reciprocal",
        "Norm",
        "LinalgVectorNorm",
        "Var",
        "Std",
        "Cos",
        "Sin",
        "Cosh",
        "Acos",
        "Acosh",
        "Sinc",
        "Atan2",
        "Lgamma",
        "Digamma",
        "Logit",
        "Sign",
        "Sgn",
        "Cumprod",
        "LinalgInvEx",
        "LinalgDet",
        "LinalgSlogdet",
        "LinalgMatrixExp",
        "LinalgCholeskyEx",
        "Xlogy",
        "Rsqrt",
    ]
)
# the edges that carry the signal; the others are held constant
CARRYING = {
    "Div": (0,),
    "GridSampler2D": (0,),
    "GridSampler3D": (0,),
    "LinalgSolveTriangular": (1,),
    "LinalgSolveEx": (1,),
    "Addcdiv": (0, 1),
    "Lerp": (0, 1),
}
FACTORS = {
    **dict.fromkeys(
        ("Mul", "Mm", "Bmm", "Mv", "Dot", "Vdot", "Convolution", "Linear", "LinalgCross", "Embedding"), (0, 1)
    ),
    **dict.fromkeys(("Addmm", "Baddbmm", "Addbmm", "Addmv", "Addr", "Addcmul"), (1, 2)),
    "GroupedMm": (0, 1),
}
# read as x -> g(x) with g(0) = 0; the arguments come from what the node saved
ACTIVATIONS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "Gelu": lambda node: lambda x: functional.gelu(x, approximate=node._saved_approximate),
    "Silu": lambda node: functional.silu,
    "Mish": lambda node: functional.mish,
    "Hardswish": lambda node: functional.hardswish,
    "Hardtanh": lambda node: lambda x: functional.hardtanh(x, node._saved_min_val, node._saved_max_val),
    "Softshrink": lambda node: lambda x: functional.softshrink(x, node._saved_lambd),
    "Log1P": lambda node: torch.log1p,
    "Atan": lambda node: torch.atan,
    "Asinh": lambda node: torch.asinh,
    "Sinh": lambda node: torch.sinh,
    "Clamp": lambda node: lambda x: x.clamp(node._saved_min, node._saved_max),
    "ClampMin": lambda node: lambda x: x.clamp(min=node._saved_min),
    "ClampMax": lambda node: lambda x: x.clamp(max=node._saved_max),
}
# those that saved their value: x is the inverse of it
INVERSES: dict[str, Callable[[Tensor], Tensor]] = {
    "Tanh": torch.atanh,
    "Expm1": torch.log1p,
    "Tan": torch.atan,
}


class OracleError(Exception):
    """A step whose derivative cannot be read off the graph."""


def coefficients(score: Tensor, leaves: Sequence[Tensor], writes_copy: bool = False) -> list[Tensor]:
    """The relevance coefficient of each leaf, for a score that ends the graph; the model's parameters are constants.

    Raises OracleError where a step hides what it computed: a custom Function, a script, a checkpoint, and a write
    through a view unless ``writes_copy`` says that all of them are plain assignments.
    """
    order = _consumers_first(score.grad_fn)
    signal = _carries_signal(order, leaves)
    if not signal[score.grad_fn]:
        raise OracleError("everything between the leaves and the score is held constant")
    arrived: dict[Any, list[Tensor | None]] = {score.grad_fn: [torch.ones_like(score)]}
    found = [torch.zeros_like(leaf) for leaf in leaves]
    for node in order:
        given = arrived.pop(node, None)
        if given is None or not signal[node]:
            continue
        if hasattr(node, "variable"):
            for leaf, total in zip(leaves, found, strict=True):
                if leaf is node.variable and given[0] is not None:
                    total += given[0]
            continue
        with torch.no_grad():
            sent = _send(node, given, signal, writes_copy)
        for (following, place), part in zip(node.next_functions, sent, strict=True):
            if part is not None and signal.get(following):
                kept = arrived.setdefault(following, [None] * len(following._input_metadata))
                part = _as_expected(part, following._input_metadata[place])
                before = kept[place]
                kept[place] = part if before is None else before + part
    return found


def _consumers_first(root: Any) -> list[Any]:
    waiting: dict[Any, int] = {root: 0}
    pending = [root]
    while pending:
        for following, _ in pending.pop().next_functions:
            if following is not None:
                if following not in waiting:
                    waiting[following] = 0
                    pending.append(following)
                waiting[following] += 1
    order, ready = [], [root]
    while ready:
        node = ready.pop()
        order.append(node)
        for following, _ in node.next_functions:
            if following is not None:
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)
    return order


def _carries_signal(order: Sequence[Any], leaves: Sequence[Tensor]) -> dict[Any, bool]:
    signal: dict[Any, bool] = {}
    for node in reversed(order):
        if hasattr(node, "variable"):
            signal[node] = any(leaf is node.variable for leaf in leaves)
        else:
            signal[node] = any(signal[node.next_functions[place][0]] for place in _carrying(node))
    return signal


def _kind(node: Any) -> str:
    return node.name().split("::")[-1].rstrip("0123456789").removesuffix("Backward")  # type: ignore[no-any-return]


def _carrying(node: Any) -> list[int]:
    """The places of the edges that no rule holds constant."""
    kind, edges = _kind(node), node.next_functions
    present = [place for place, (following, _) in enumerate(edges) if following is not None]
    if kind in GATES:
        return []
    if kind.startswith("ScaledDotProduct"):
        return [place for place in present if place == 2]
    if kind == "Pow":
        exponent = getattr(node, "_saved_exponent", None)
        return present if isinstance(exponent, (int, float)) and exponent >= 1 else []
    if kind == "Lerp" and len(edges) < 3:
        return present
    if kind in CARRYING:
        return [place for place in present if place in CARRYING[kind]]
    # number + tanh(u), tanh(u) - number and number - tanh(u) are gates; tensor - tanh(u) is not
    number_follows = kind in ("Add", "Sub") and len(edges) > 1 and edges[1][0] is None
    if (number_follows or kind == "Rsub") and present == [0] and _kind(edges[0][0]) == "Tanh":
        return []
    return present


def _send(
    node: Any, given: list[Tensor | None], signal: dict[Any, bool], writes_copy: bool
) -> list[Tensor | None]:
    """What the node sends along each of its edges."""
    kind = _kind(node)
    hidden = "DifferentiableGraph" in kind or (kind == "CopySlices" and not writes_copy)
    if isinstance(node, BackwardCFunction) or hidden:
        raise OracleError(f"{node.name()} hides what it computed")
    first = given[0]
    if kind in ACTIVATIONS or kind in INVERSES or kind == "Elu":
        assert first is not None
        ratio = _ratio(node, kind)
        if ratio is not None:
            return [first * ratio, *[None] * (len(node.next_functions) - 1)]
    if kind in NORMS:
        assert first is not None
        sent = NORMS[kind](node, first)
        if sent is not None:
            return [sent, *[None] * (len(node.next_functions) - 1)]
    if kind == "Glu":
        assert first is not None
        gate = node._saved_self.chunk(2, _signed(node._saved_dim))[1].sigmoid()
        return [torch.cat([first * gate, torch.zeros_like(first)], _signed(node._saved_dim))]
    if kind in ("VarMean", "StdMean"):
        given = [None, *given[1:]]
    called = node(*given)
    sent_all = list(called) if isinstance(called, tuple) else [called]
    carrying = _carrying(node)
    shares = _shares(node, kind, signal)
    return [
        None if part is None or place not in carrying else part * shares.get(place, shares.get(-1, 1.0))
        for place, part in enumerate(sent_all)
    ]


def _shares(node: Any, kind: str, signal: dict[Any, bool]) -> dict[int, float]:
    """Factors on what goes along each edge; -1 is every other edge."""
    if kind == "Pow":
        return {-1: 1 / node._saved_exponent}
    if kind == "Prod":
        length = node._saved_self.numel() if not hasattr(node, "_saved_dim") else 0
        return {-1: 1 / (length or node._saved_self.shape[_signed(node._saved_dim)])}
    factors = [place for place in FACTORS.get(kind, ()) if place < len(node.next_functions)]
    live = [place for place in factors if signal.get(node.next_functions[place][0])]
    return dict.fromkeys(live, 1 / len(live)) if len(live) > 1 else {}


def _ratio(node: Any, kind: str) -> Tensor | None:
    """g(x) / x, at zero g'(0); None where g(0) is not 0, and the derivative is the node's own."""
    if kind in INVERSES:
        value = node._saved_result
        x = INVERSES[kind](value)
        return torch.where(x == 0, 1.0, value / x)
    if kind == "Elu":
        scales = node._saved_alpha, node._saved_scale, node._saved_input_scale
        x = node._saved_self

        def function(x: Tensor) -> Tensor:
            bent: Tensor = scales[1] * torch.where(x > 0, x, scales[0] * torch.expm1(x * scales[2]))
            return bent

    else:
        x = node._saved_self
        function = ACTIVATIONS[kind](node)  # type: ignore[assignment]
    with torch.enable_grad():
        zero = torch.zeros(1, dtype=x.dtype, requires_grad=True)
        at_zero = function(zero)
        (slope,) = torch.autograd.grad(at_zero.sum(), zero)
    if at_zero.item() != 0:
        return None
    return torch.where(x.abs() < 1e-150, slope, function(x) / x)


def _layer_norm(node: Any, given: Tensor) -> Tensor:
    count = len(node._saved_normalized_shape)
    flowing = given if node._saved_weight is None else given * node._saved_weight
    dims = tuple(range(-count, 0))
    result: Tensor = (flowing - flowing.mean(dims, keepdim=True)) * node._saved_result2
    return result


def _rms_norm(node: Any, given: Tensor) -> Tensor:
    flowing = given if node._saved_weight is None else given * node._saved_weight
    result: Tensor = flowing * node._saved_result1
    return result


def _group_norm(node: Any, given: Tensor) -> Tensor:
    weight = node._saved_weight
    flowing = given if weight is None else given * weight.reshape(-1, *[1] * (given.dim() - 2))
    grouped = flowing.reshape(node._saved_N, node._saved_group, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    result: Tensor = (centred * node._saved_result2.reshape(node._saved_N, -1, 1)).reshape(given.shape)
    return result


def _batch_norm(node: Any, given: Tensor) -> Tensor | None:
    if not node._saved_training:
        return None
    shape = (1, -1, *[1] * (given.dim() - 2))
    weight = node._saved_weight
    flowing = given if weight is None else given * weight.reshape(shape)
    dims = (0, *range(2, given.dim()))
    result: Tensor = (flowing - flowing.mean(dims, keepdim=True)) * node._saved_result2.reshape(shape)
    return result


NORMS: dict[str, Callable[[Any, Tensor], Tensor | None]] = {
    "NativeLayerNorm": _layer_norm,
    "FusedRmsNorm": _rms_norm,
    "NativeGroupNorm": _group_norm,
    "NativeBatchNorm": _batch_norm,
}


def _signed(dimension: int) -> int:
    """Nodes show dimensions as unsigned numbers."""
    return dimension - 2**64 if dimension > math.isqrt(2**120) else dimension


def _as_expected(part: Tensor, expected: Any) -> Tensor:
    """What the engine does between two nodes: sum what was expanded, drop an imaginary part."""
    if part.is_complex() and not expected.dtype.is_complex:
        part = part.real
    return part.sum_to_size(expected.shape).to(expected.dtype)
