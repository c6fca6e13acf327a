"""Linear changes of coordinates: by a matrix, by principal components, and one domain after another."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.domain import Domain, domain_rows, is_linear
from ...core.errors import InputError, MethodError
from ..baselines import digest
from .coordinates import require_dimensions, transformable

__all__ = ["PCA", "Chain", "Linear"]


@dataclass(frozen=True, eq=False, repr=False)
class Linear:
    """Coordinates by a matrix: ``c = A x`` along one dimension, and ``x = A⁺ c`` with the (left) inverse.

    For an orthonormal A the attributions are ``(A Δx) ⊙ (A ḡ)``; for any other, the gradient is pulled back by the
    transpose of the inverse. A with more rows than columns is a frame.

    Args:
        matrix: A, (K, N).
        inverse: (N, K), another left inverse than the pseudo-inverse.
        dim: the dimension of N values.
        names: what the K coefficients are called.

    Coefficients:
        (B, ..., N) -> (B, ..., K).

    Raises:
        MethodError: no such matrix, or one that cannot be inverted. InputError: values of another length.

    Example:
        >>> Linear(torch.tensor([[1.0, 1.0], [1.0, -1.0]])).analysis(torch.tensor([[3.0, 1.0]]))
        tensor([[4., 2.]])
    """

    matrix: Tensor
    inverse: Tensor | None = None
    dim: int = -1
    names: tuple[str, ...] = ()
    _synthesis: Tensor = field(init=False)
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_dimensions(self.dim, most=1)
        for name, given in (("matrix", self.matrix), ("inverse", self.inverse)):
            if given is None and name == "inverse":
                continue
            if not isinstance(given, Tensor) or given.dim() != 2 or not given.numel():
                shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise MethodError(f"{name} is a tensor with two dimensions, got {shape}.")
            if not bool(torch.isfinite(given).all()):
                raise MethodError(f"{name} has values that are NaN or infinite.")
        matrix = self.matrix.detach()
        wide = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
        inverse = self.inverse
        if inverse is None:
            rank = int(torch.linalg.matrix_rank(wide))
            if rank < matrix.shape[1]:
                raise MethodError(
                    f"the matrix {tuple(matrix.shape)} has rank {rank}, so values of length {matrix.shape[1]} cannot "
                    "be put together again from their coefficients. Give more independent rows, or PCA.fit(data)."
                )
            inverse = torch.linalg.pinv(wide)
        elif tuple(inverse.shape) != (matrix.shape[1], matrix.shape[0]):
            raise MethodError(
                f"inverse has shape {tuple(inverse.shape)}; the matrix asks for {(matrix.shape[1], matrix.shape[0])}."
            )
        if self.names and len(self.names) != len(matrix):
            raise MethodError(f"{len(self.names)} names were given for {len(matrix)} coefficients.")
        object.__setattr__(self, "_synthesis", inverse.detach())

    def analysis(self, x: Tensor) -> Tensor:
        return _along(self, x, self.matrix)

    def synthesis(self, coefficients: Tensor) -> Tensor:
        return _along(self, coefficients, self._synthesis)

    def labels(self, shape: torch.Size) -> list[str]:
        return list(self.names) or [f"coefficient {number}" for number in range(len(self.matrix))]

    def __repr__(self) -> str:
        return _text(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Linear) and _text(self) == _text(other)

    def __hash__(self) -> int:
        return hash(_text(self))


@dataclass(frozen=True, eq=False, repr=False)
class PCA:
    """Principal components: ``c = V (x - mean)``, rows of V the orthonormal directions of most variance first.

    ``PCA.fit(data)`` keeps all directions and loses nothing. With fewer components what is explained is the score at
    the projection; the result has a note with what was lost.

    Args:
        basis: V, (K, N), orthonormal rows.
        mean: (N,).
        dim: the dimension of N values: -1 for patterns in time, 1 for patterns across channels.

    Coefficients:
        (B, ..., N) -> (B, ..., K), in the value's unit.

    Raises:
        MethodError: the rows are not orthonormal, or a parameter is out of range. InputError: values of another length.

    Example:
        >>> data = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-3.0, -4.0]], dtype=torch.float64)
        >>> PCA.fit(data, components=1).analysis(data).round(decimals=9).flatten().tolist()
        [5.0, 0.0, -5.0]
    """

    basis: Tensor
    mean: Tensor
    dim: int = -1
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_dimensions(self.dim, most=1)
        if self.basis.dim() != 2 or tuple(self.mean.shape) != tuple(self.basis.shape[1:]):
            raise MethodError(
                f"basis is (K, N) and mean (N,); got {tuple(self.basis.shape)} and {tuple(self.mean.shape)}."
            )
        wide = self.basis.double()
        if not torch.allclose(
            wide @ wide.T, torch.eye(len(wide), dtype=wide.dtype, device=wide.device), atol=1e-5
        ):
            raise MethodError(
                "the rows of basis are not orthonormal; for any other matrix use Linear(matrix)."
            )

    @classmethod
    def fit(cls, data: Tensor, components: int | None = None, dim: int = -1) -> PCA:
        """The principal components of data (M, ..., N, ...), every row along ``dim`` a sample; None keeps all N.

        Raises InputError where the data are too few or not finite, MethodError for more components than N.
        """
        given = torch.as_tensor(data).detach()
        if given.dim() < 2 or not given.is_floating_point() or not bool(torch.isfinite(given).all()):
            raise InputError(
                f"PCA.fit takes finite real data (M, ..., N), got {given.dtype} {tuple(given.shape)}."
            )
        rows = given.movedim(dim, -1).flatten(0, -2).double()
        if len(rows) < 2:
            raise InputError(f"PCA.fit needs at least two samples, got {len(rows)}.")
        count = rows.shape[1] if components is None else components
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= rows.shape[1]:
            raise MethodError(f"components is a whole number from 1 to {rows.shape[1]}, got {components!r}.")
        mean = rows.mean(0)
        centred = rows - mean
        basis = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1).T[:count]
        # the sign is arbitrary: the largest entry is made positive
        largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        return cls(basis * torch.where(largest < 0, -1.0, 1.0), mean, dim)

    @property
    def lossy(self) -> bool:
        """Whether components were left out."""
        return self.basis.shape[0] < self.basis.shape[1]

    def analysis(self, x: Tensor) -> Tensor:
        if not -x.dim() <= self.dim < x.dim() or x.shape[self.dim] != len(self.mean):
            raise InputError(
                f"{self!r} takes {len(self.mean)} values along dimension {self.dim}, got {tuple(x.shape)}."
            )
        x = transformable(x, self).movedim(self.dim, -1)
        return ((x - self.mean.to(x)) @ self.basis.to(x).T).movedim(-1, self.dim)

    def synthesis(self, coefficients: Tensor) -> Tensor:
        moved = coefficients.movedim(self.dim, -1)
        return (moved @ self.basis.to(moved) + self.mean.to(moved)).movedim(-1, self.dim)

    def labels(self, shape: torch.Size) -> list[str]:
        return [f"component {number}" for number in range(len(self.basis))]

    def __repr__(self) -> str:
        return _text(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PCA) and _text(self) == _text(other)

    def __hash__(self) -> int:
        return hash(_text(self))


@dataclass(frozen=True)
class Chain:
    """One domain after another: ``c = T₂(T₁(x))``, ``x = S₁(S₂(c))``. Linear where both are.

    Args:
        first: applied to the value.
        second: applied to the coefficients of the first.

    Example:
        >>> turned = Linear(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> Chain(turned, turned).analysis(torch.tensor([[3.0, 1.0]]))
        tensor([[3., 1.]])
    """

    first: Domain
    second: Domain

    @property
    def linear(self) -> bool:
        return is_linear(self.first) and is_linear(self.second)

    @property
    def lossy(self) -> bool:
        return any(bool(getattr(each, "lossy", False)) for each in (self.first, self.second))

    def analysis(self, x: Tensor) -> Tensor:
        return self.second.analysis(self.first.analysis(x))

    def synthesis(self, coefficients: Tensor) -> Tensor:
        return self.first.synthesis(self.second.synthesis(coefficients))

    def fitted(self, x: Tensor) -> Chain:
        """Both domains for these examples: the second for the first one's coefficients."""
        first = _fitted(self.first, x)
        return replace(self, first=first, second=_fitted(self.second, first.analysis(x)))

    def rows(self, index: Tensor) -> Chain:
        """Both domains for some of the examples."""
        return replace(self, first=domain_rows(self.first, index), second=domain_rows(self.second, index))


def _fitted(domain: Domain, x: Tensor) -> Domain:
    fitted = getattr(domain, "fitted", None)
    found: Domain = domain if fitted is None else fitted(x)
    return found


def _along(domain: Linear, values: Tensor, matrix: Tensor) -> Tensor:
    """The matrix applied along the domain's dimension, in the values' precision."""
    if not -values.dim() <= domain.dim < values.dim() or domain.dim % values.dim() == 0:
        raise InputError(
            f"{domain!r} acts on dimension {domain.dim}, but values have shape {tuple(values.shape)}."
        )
    if values.shape[domain.dim] != matrix.shape[1]:
        raise InputError(
            f"{domain!r} takes {matrix.shape[1]} values along dimension {domain.dim}, got {tuple(values.shape)}."
        )
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    same = matrix.to(values.device, values.real.dtype.to_complex() if matrix.is_complex() else values.dtype)
    return (values.movedim(domain.dim, -1).to(same.dtype) @ same.T).movedim(-1, domain.dim)


def _text(domain: Any) -> str:
    """What a domain was made with, tensors as digests and what was left out left out."""
    shown = []
    for each in fields(domain):
        value = getattr(domain, each.name)
        if (
            each.init
            and not (isinstance(value, (int, tuple)) and value == each.default)
            and value is not None
        ):
            shown.append(f"{each.name}={digest(value) if isinstance(value, Tensor) else repr(value)}")
    return f"{type(domain).__name__}({', '.join(shown)})"
