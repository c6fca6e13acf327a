"""Methods in other coordinates: a domain is a change of variable of the problem."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...core.points import Point, contract, leaves, map_leaves
from ...core.problem import Domain, Problem
from ..integrated_gradients import IntegratedGradients

__all__ = ["InDomain"]


@dataclass(frozen=True)
class InDomain:
    """A method applied to the coefficients of the value in another domain.

    With c = T(x) and synthesis x = S(c), the problem becomes F = f ∘ S at c, and any method explains the coefficients.
    Integrated gradients sum to f(S(c)) - f(S(c')), also for complex coefficients, by Re(Δc · conj(∂F)). Where S is
    linear the path is the same straight line at the site, so that ``compare`` walks it once for all linear domains.

    Args:
        domain: an object with ``analysis(x) -> coefficients`` and ``synthesis(coefficients) -> x``.
        method: what to apply there; baselines are given at the site and analysed.

    Call:
        problem -> real values of the coefficients' shape, in the method's units. A complex result, such as a gradient,
        is given as the derivative with respect to each coefficient's amplitude, its phase kept (0 where it is 0).

    Raises:
        MethodError: synthesis does not give the value back. InputError: the domain cannot take the value.

    Cost: as the method's.

    Source: Kechris et al. 2025 (cross-domain integrated gradients).

    Example:
        >>> import torch, pullback as pb
        >>> method = InDomain(pb.Fourier(), IntegratedGradients(steps=8))
        >>> pb.explain(torch.nn.Linear(6, 1), torch.ones(1, 6), method=method).values.shape
        torch.Size([1, 6])
    """

    domain: Domain
    method: Any = field(default_factory=IntegratedGradients)

    def __call__(self, problem: Problem) -> Point:
        inside = problem.in_domain(self.domain)
        result: Point = self.method(inside)
        dtype = leaves(problem.point)[0].real.dtype

        def real(values: Tensor) -> Tensor:
            if (
                values.is_complex()
                and isinstance(inside.point, Tensor)
                and values.shape == inside.point.shape
            ):
                values = contract(values, torch.sgn(inside.point))
            # transforms may work in a wider precision than the model
            return values.to(dtype) if values.is_floating_point() else values

        return map_leaves(real, result)
