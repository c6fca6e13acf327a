"""Gates: what scales a signal rather than carries it is constant, so that relevance goes to the signal alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...core.operations import GATES
from ...core.overrides import PASS, Operation, with_gradient_of
from .surrogate import carries_signal, constant, names

__all__ = ["ConstantModule", "ConstantOperands", "GateRule", "GatedLinearUnit"]


@dataclass(frozen=True)
class GateRule:
    """Sigmoids, exponentials, norms, square roots, determinants, ...: their result is constant, nothing flows through.

    Multiplied with a signal, they leave the model homogeneous of degree one, which is why relevance is conserved. In
    ``var_mean`` and ``std_mean`` the mean stays alive.

    Source: Ali et al. 2022, section 3; Arras et al. 2017 (signal takes all).
    """

    operations: ClassVar[frozenset[str]] = names(
        """
        sigmoid hardsigmoid logsigmoid softplus exp exp2 erf erfc erfinv log log2 log10 logaddexp logaddexp2
        logsumexp logcumsumexp log_softmax sqrt rsqrt reciprocal norm linalg_norm linalg_vector_norm
        linalg_matrix_norm var std var_mean std_mean cos sin cosh acos acosh sinc atan2 hypot lgamma digamma
        logit xlogy sign cumprod linalg_inv inverse linalg_pinv linalg_det det logdet linalg_slogdet matrix_exp
        linalg_matrix_exp linalg_cholesky cholesky ndtr log_ndtr
        """
    )
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        with torch.no_grad():
            value = operation.value()
        if operation.name in ("var_mean", "std_mean"):
            # the mean is linear: only the spread is a gate
            return (value[0], operation.value()[1])
        return value


@dataclass(frozen=True)
class ConstantOperands:
    """Denominators, interpolation weights, sampling grids and the matrices of linear systems are constant."""

    operations: ClassVar[frozenset[str]] = frozenset(GATES)
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        gates = GATES[operation.name]
        args = tuple(
            constant(value) if position in gates else value for position, value in enumerate(operation.args)
        )
        kwargs = {
            key: value if key in ("input", "self", "B") else constant(value)
            for key, value in operation.kwargs.items()
        }
        if not any(map(carries_signal, [*operation.args, *operation.kwargs.values()])):
            return PASS
        return operation.function(*args, **kwargs)


@dataclass(frozen=True)
class GatedLinearUnit:
    """``glu(a, b) = a · σ(b)`` with the gate σ(b) constant."""

    operations: ClassVar[frozenset[str]] = frozenset({"glu"})
    within: str | None = None

    def __call__(self, operation: Operation) -> Any:
        x, dim = operation.args[0], operation.argument(1, "dim", -1)
        with torch.no_grad():
            value = operation.value()
        signal, gate = x.chunk(2, dim)
        return with_gradient_of(value, signal * gate.detach().sigmoid())


@dataclass(frozen=True)
class ConstantModule:
    """What the modules matching ``within`` compute is constant.

    MambaLRP holds the projection constant from which a selective scan takes its step size, input and output matrices.

    Source: Jafari et al. 2024, section 4.
    """

    within: str
    operations: ClassVar[frozenset[str]] = names(
        """
        linear matmul mm bmm addmm baddbmm einsum conv1d conv2d conv3d add mul sub div embedding reshape view
        cat split chunk unbind getitem transpose permute
        """
    )

    def __call__(self, operation: Operation) -> Any:
        with torch.no_grad():
            return operation.value()
