"""Recording ``<δ, b>`` of every operation in one backward pass, under any rules, without touching a value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from ...core.audit import MARK
from ...core.overrides import PASS, Operation, Rule
from ..rules.surrogate import carries_signal, scaled_gradient
from .dispatch import differentiable, implicit_bias
from .operations import OPERATIONS
from .parts import ImplicitBias, signal_operands, with_operands, with_tensors
from .sums import inner, per_example, real_product

__all__ = ["BiasRecorder", "Contribution", "Keep", "recorded"]


@dataclass(eq=False)
class Contribution:
    """What one operation's implicit bias adds to the score, per example: ``sum``, or its two parts.

    ``kept`` is what the recorder's ``keep`` made of the gradient and its product with the bias; with it there is only
    the sum, without it the parts are told apart. ``has_constant`` says whether an additive constant is among them.
    """

    name: str
    operation: str
    module_path: str
    has_constant: bool = False
    sum: Tensor | None = None
    constant: Tensor | None = None
    curvature: Tensor | None = None
    kept: Any = None

    @property
    def reached(self) -> bool:
        """Whether the score depends on this operation."""
        return any(part is not None for part in (self.sum, self.constant, self.curvature))

    def total(self) -> Tensor:
        """Everything, (B,) in float64."""
        parts = [part for part in (self.sum, self.constant, self.curvature) if part is not None]
        return torch.stack([part.double() for part in parts]).sum(0)


Keep = Callable[["Tensor | None", Tensor], Any]
"""Takes δ (the gradient at an operation's result) and δ ⊙ b, gives what to keep of them.

δ is None where only the product is known, under a rule and for a chain of elementwise operations.
"""


class BiasRecorder:
    """The rule that leaves every derivative as it is and records ``<δ, b>`` when the backward pass arrives.

    The bias is computed in the forward pass, since in-place operations may change the operands later; a hook
    on the result, which autograd ties to its value before any later write, takes δ.
    """

    operations: Final = OPERATIONS
    within: Final = None

    def __init__(self, rows: int, keep: Keep | None = None) -> None:
        self.rows, self.keep = rows, keep
        self.contributions: list[Contribution] = []
        self.unknown: list[str] = []
        self.precision = 0.0
        self.grids: dict[tuple[int, ...], None] = {}
        self.in_chain = False  # the chain has a term of its own
        self.scoring = False  # rules are the model's: targets keep their own derivatives
        self._surrogates: list[_Surrogate] = []

    def __repr__(self) -> str:
        return "implicit bias"

    def __call__(self, operation: Operation) -> Any:
        return PASS if self.in_chain else self.watch(operation, operation.value())

    def watch(self, operation: Operation, result: Any) -> Any:
        """Record the bias of an operation with its ordinary derivative."""
        values = differentiable(result)
        if not values:
            return result
        if operation.name in _CHANNELS_SECOND and values[0].dim() > 2:
            self.grids[tuple(values[0].shape[2:])] = None
        biases = implicit_bias(operation, result)
        if biases is None:
            self.unknown.append(_name(operation.module_path, operation.name))
            return PASS
        result, values = _apart(operation, result, values)
        for value, bias in zip(values, biases, strict=True):
            self.precision = max(self.precision, _EPSILON[value.dtype])
            if not bias.is_zero:
                self.add(operation.name, operation.module_path, value, bias)
        return result

    def add(self, operation: str, module_path: str, value: Tensor, bias: ImplicitBias) -> None:
        """Tie a bias to a value."""
        contribution = Contribution("", operation, module_path, bias.constant is not None)
        self.contributions.append(contribution)
        value.register_hook(partial(self._arrived, contribution, bias))

    def surrogate(self, operation: Operation, rule: Rule) -> Any:
        """Run a rule between probes: ``<δ, b~> = <δ, y> - Σ <c_i, x_i>`` with the coefficients it sends on."""
        operands = signal_operands(operation.args, operation.kwargs)
        probes = [_probe(each) for each in operands]
        result = rule(with_operands(operation, probes))
        if result is PASS:
            return PASS
        result, values = _apart(operation, result, differentiable(result))
        contribution = Contribution("", operation.name, operation.module_path)
        same_shape = len({each.shape for each in (*values, *operands)}) == 1
        surrogate = _Surrogate(contribution, same_shape, bool(getattr(rule, "conserves", False)))
        if values:
            self.contributions.append(contribution)
            self._surrogates.append(surrogate)
        plain = _constant_part(operation, values)
        for place, value in enumerate(values):
            surrogate.watch(value, self.rows, 1, plain if place == 0 else None)
        for probe in probes:
            surrogate.watch(probe, self.rows, -1)
        return result

    def finish(self) -> list[Contribution]:
        """The contributions that the score depends on, in execution order, with their names."""
        for surrogate in self._surrogates:
            surrogate.settle(self.rows, self.keep)
        reached = [each for each in self.contributions if each.reached]
        count: Counter[str] = Counter()
        for each in reached:
            name = _name(each.module_path, each.operation)
            count[name] += 1
            each.name = name if count[name] == 1 else f"{name}#{count[name]}"
        return reached

    def _arrived(self, contribution: Contribution, bias: ImplicitBias, delta: Tensor | None) -> None:
        if delta is None:
            return
        with torch.no_grad():
            delta = delta.detach()
            if self.keep is not None:
                total = bias.total()
                assert total is not None  # zero biases are not recorded
                product = real_product(delta, total)
                contribution.sum = per_example(product, self.rows)
                contribution.kept = self.keep(delta, product)
                return
            if bias.constant is not None:
                contribution.constant = inner(delta, bias.constant, self.rows)
            if (curvature := bias.bent()) is not None:
                contribution.curvature = inner(delta, curvature, self.rows)


class _Surrogate:
    """The balance of one operation under a rule: what reached its result minus what left its operands."""

    def __init__(self, contribution: Contribution, same_shape: bool, conserves: bool) -> None:
        self.contribution, self.same_shape, self.conserves = contribution, same_shape, conserves
        self.balance: Tensor | None = None
        self.constant: Tensor | None = None

    def watch(self, value: Tensor, rows: int, sign: int, constant: Tensor | None = None) -> None:
        # copied: either may be overwritten before the backward pass
        here = value.detach().clone()

        def arrived(delta: Tensor | None) -> None:
            if delta is None:
                return
            with torch.no_grad():
                delta = delta.detach()
                product = real_product(delta, here)
                # 0 · ∞ where a mask removed an entry
                product = torch.where(delta == 0, 0, product) * sign
                if not self.same_shape:
                    product = per_example(product, rows)
                self.balance = product if self.balance is None else self.balance + product
                if constant is not None:
                    absorbed = real_product(delta, constant)
                    self.constant = absorbed if self.same_shape else per_example(absorbed, rows)

        if value.requires_grad:
            value.register_hook(arrived)

    def settle(self, rows: int, keep: Keep | None) -> None:
        if self.balance is None:
            return
        if keep is not None:
            self.contribution.sum = per_example(self.balance, rows)
            self.contribution.kept = keep(None, self.balance)
            return
        if self.conserves:
            self.contribution.constant = per_example(self.balance, rows)
            return
        curvature = self.balance if self.constant is None else self.balance - self.constant
        self.contribution.curvature = per_example(curvature, rows)
        if self.constant is not None:
            self.contribution.constant = per_example(self.constant, rows)


def _apart(operation: Operation, result: Any, values: list[Tensor]) -> tuple[Any, list[Tensor]]:
    """The result under names of its own, where another use inside the operation would count in its gradient.

    That is an operand handed back, or one of several results from which another was computed (an LSTM's state). A view
    of a tensor that the operation hides (einsum) gets a node of its own: a later write through another view would
    otherwise lead around the hook.
    """
    if len(values) == 1 and _hides_its_base(operation, values[0]):
        values = [scaled_gradient(values[0], 1.0)]
        return with_tensors(result, iter(values)), values
    if len(values) == 1 and not any(values[0] is each for each in operation.args):
        return result, values
    values = [each.view_as(each) for each in values]
    return with_tensors(result, iter(values)), values


def _hides_its_base(operation: Operation, value: Tensor) -> bool:
    if not value._is_view():
        return False
    known = [
        each
        for operand in signal_operands(operation.args, operation.kwargs)
        for each in (operand, operand._base)
    ]
    return not any(value._base is each for each in known)


def _probe(operand: Tensor) -> Tensor:
    """The operand under a name of its own, behind which rules still see the operation that made it."""
    probe = operand.view_as(operand)
    if operand.grad_fn is not None and probe.grad_fn is not None:
        behind: Any = operand.grad_fn
        here: Any = probe.grad_fn
        if (mark := behind.metadata.get(MARK)) is not None:
            here.metadata[MARK] = mark
    return probe


def _constant_part(operation: Operation, values: Sequence[Tensor]) -> Tensor | None:
    """The additive constants of an operation, which every derivative leaves behind."""
    bias = operation.argument(*_BIAS_AT[operation.name]) if operation.name in _BIAS_AT else None
    if bias is not None and not carries_signal(bias) and len(values) == 1:
        trailing = values[0].dim() - 2 if operation.name in _CHANNELS_SECOND else 0
        return bias.detach().reshape(-1, *[1] * trailing) if bias.dim() == 1 else bias.detach()  # type: ignore[no-any-return]
    return None


_CHANNELS_SECOND: Final = frozenset(
    f"{name}{n}d" for name in ("conv", "conv_transpose") for n in (1, 2, 3)
) | {"group_norm", "batch_norm"}
_BIAS_AT: Final[dict[str, tuple[int, str]]] = {
    "linear": (2, "bias"),
    "layer_norm": (3, "bias"),
    "group_norm": (3, "bias"),
    "batch_norm": (4, "bias"),
    **{f"{name}{n}d": (2, "bias") for name in ("conv", "conv_transpose") for n in (1, 2, 3)},
}


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A rule with its implicit bias on record."""

    rule: Rule
    recorder: BiasRecorder

    @property
    def operations(self) -> frozenset[str] | tuple[str, ...]:
        return self.rule.operations

    @property
    def within(self) -> str | None:
        return self.rule.within

    @property
    def preserves_gradient(self) -> bool:
        return bool(getattr(self.rule, "preserves_gradient", False))

    def __call__(self, operation: Operation) -> Any:
        if self.recorder.scoring:
            return PASS
        if not self.preserves_gradient:
            return self.recorder.surrogate(operation, self.rule)
        result = self.rule(operation)
        return PASS if result is PASS else self.recorder.watch(operation, result)

    def __repr__(self) -> str:
        return repr(self.rule)


def recorded(rules: Sequence[Rule], recorder: BiasRecorder) -> tuple[Rule, ...]:
    """The same rules, with what each leaves behind on record, and the recorder for everything else."""
    return (*(_Recorded(rule, recorder) for rule in rules), recorder)


_EPSILON: Final = {
    dtype: torch.finfo(dtype).eps
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.complex128,
        torch.complex64,
    )
}


def _name(module_path: str, operation: str) -> str:
    return f"{module_path}:{operation}" if module_path else operation
