"""Methods in other coordinates: a domain is a change of variable of the problem."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..core.points import Point
from ..core.problem import Domain, Problem
from .integrated_gradients import IntegratedGradients

__all__ = ["InDomain"]


@dataclass(frozen=True)
class InDomain:
    """A method applied to the coefficients of the value in another domain.

    With c = T(x) and synthesis x = S(c), the problem becomes F = f ∘ S at c, and any method explains the coefficients.
    Integrated gradients sum to f(S(c)) - f(S(c')), also for complex coefficients, by Re(Δc · conj(∂F)).

    Args:
        domain: an object with ``analysis(x) -> coefficients`` and ``synthesis(coefficients) -> x``.
        method: what to apply there.

    Call:
        problem -> real values of the coefficients' shape, in the method's units.

    Source: Kechris et al. 2025 (cross-domain integrated gradients).
    """

    domain: Domain
    method: Any = field(default_factory=IntegratedGradients)

    def __call__(self, problem: Problem) -> Point:
        result: Point = self.method(problem.in_domain(self.domain))
        return result
