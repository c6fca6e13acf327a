"""Slow definitions of the linear rules: loops over every input j and output k, in numpy float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from pullback.core.overrides import Rule, overrides

__all__ = ["RULES", "coefficient", "dense_matrix", "draws", "reference", "relevance"]


def draws(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal draws, the same in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def coefficient(
    model: nn.Module | Callable[[Tensor], Tensor], x: Tensor, outgoing: Tensor, rules: Iterable[Rule]
) -> Tensor:
    """The coefficient of x under the rules, where the output has the coefficient ``outgoing``."""
    x = x.detach().requires_grad_()
    module = model if isinstance(model, nn.Module) else nn.Identity()
    with overrides(module, tuple(rules)):
        return torch.autograd.grad((model(x) * outgoing).sum(), x)[0]


def relevance(
    model: nn.Module | Callable[[Tensor], Tensor], x: Tensor, outgoing: Tensor, rules: Iterable[Rule]
) -> Tensor:
    return x.detach() * coefficient(model, x, outgoing, rules)


def dense_matrix(linear: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """The matrix (outputs, inputs) of a linear map, column by column from the unit vectors."""
    size = int(np.prod(shape))
    columns = [linear(unit.reshape(1, *shape)).flatten() for unit in torch.eye(size, dtype=torch.float64)]
    return torch.stack(columns, 1)


def _stabilised(z: float, epsilon: float) -> float:
    return z + epsilon if z >= 0 else z - epsilon


def _quotient(a: float, z: float, epsilon: float) -> float:
    return 0.0 if z == 0 else a / _stabilised(z, epsilon)


def _epsilon(terms: list[float], b: float, y: float, bias: bool) -> list[float]:
    z = sum(terms) + (b if bias else 0.0)
    return [_quotient(term, z, 1e-6) for term in terms]


def _part(terms: list[float], b: float, bias: bool, sign: int) -> list[float]:
    kept = [term if term * sign > 0 else 0.0 for term in terms]
    z = sum(kept) + (b if bias and b * sign > 0 else 0.0)
    return [_quotient(term, z, 1e-6) for term in kept]


def _alpha_beta(alpha: float, beta: float) -> Callable[..., list[float]]:
    def share(terms: list[float], b: float, y: float, bias: bool) -> list[float]:
        up, down = _part(terms, b, bias, 1), _part(terms, b, bias, -1)
        return [alpha * p - beta * n for p, n in zip(up, down, strict=True)]

    return share


def _gamma(gamma: float) -> Callable[..., list[float]]:
    def share(terms: list[float], b: float, y: float, bias: bool) -> list[float]:
        entries = [*terms, b if bias else 0.0]
        sign = 1 if y >= 0 else -1
        enlarged = [entry + gamma * (entry if entry * sign > 0 else 0.0) for entry in entries]
        return [_quotient(entry, sum(enlarged), 1e-6) for entry in enlarged[:-1]]

    return share


RULES: dict[str, Callable[..., list[float]]] = {
    "epsilon": _epsilon,
    "z_plus": lambda terms, b, y, bias: _part(terms, b, bias, 1),
    "alpha_beta": _alpha_beta(2.0, 1.0),
    "gamma": _gamma(0.25),
}


def reference(name: str, matrix: Tensor, x: Tensor, b: Tensor | None, outgoing: Tensor, bias: bool) -> Tensor:
    """Relevance of one x (inputs) by the definition: R_j = Σ_k share_jk y_k c_k."""
    result = [0.0] * matrix.shape[1]
    for k in range(matrix.shape[0]):
        offset = 0.0 if b is None else float(b[k])
        terms = [float(matrix[k, j] * x[j]) for j in range(matrix.shape[1])]
        y = sum(terms) + offset
        for j, share in enumerate(RULES[name](terms, offset, y, bias)):
            result[j] += share * y * float(outgoing[k])
    return torch.tensor(result, dtype=torch.float64)
