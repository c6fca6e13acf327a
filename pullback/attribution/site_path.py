"""Where a straight path of coefficients is walked: at the site, if every domain's synthesis is linear.

A linear synthesis S turns the straight path of coefficients into a straight path at the site, the same for every
domain. Its mean gradient ḡ there gives S*ḡ, the mean gradient of the coefficients, by one vector-Jacobian product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.domain import is_linear, rounding
from ..core.errors import MethodError
from ..core.points import Point, map_leaves
from ..core.posed import gradients_enabled
from ..core.problem import Problem
from .baselines import baseline_point

__all__ = ["SitePath", "site_path"]


@dataclass(frozen=True)
class SitePath:
    """A straight path, in the coordinates where its gradients are evaluated.

    Attributes:
        problem: the problem in those coordinates.
        start: where the path starts there.
        coefficients: the problem in the coordinates that are explained, where these are others.
    """

    problem: Problem
    start: Point
    coefficients: Problem | None = None

    def pulled_back(self, gradient: Point, index: Tensor | None = None) -> Point:
        """S*ḡ of gradients at the site, row r being about example ``index[r]``; PyTorch's convention where complex."""
        outer = self.coefficients
        if outer is None:
            return gradient
        index = torch.arange(outer.batch) if index is None else index
        assert isinstance(gradient, Tensor)
        with gradients_enabled():
            assert isinstance(outer.point, Tensor)
            rows = outer.point.index_select(0, index.to(outer.point.device))
            variable = rows.detach().clone().requires_grad_()
            value = outer.synthesis(variable, index)
            assert isinstance(value, Tensor)
            (found,) = torch.autograd.grad(value, [variable], gradient.to(value.dtype), allow_unused=True)
        return torch.zeros_like(variable) if found is None else found


def site_path(problem: Problem, start: Point, baseline: Any) -> SitePath:
    """The path from ``start``, the baseline in the problem's coordinates, to the point.

    Raises MethodError where a domain calls itself linear and its synthesis is not.
    """
    if not problem.domains or not all(is_linear(domain) for domain in problem.domains):
        return SitePath(problem, start)
    everyone = torch.arange(problem.batch)
    with torch.no_grad():
        first, last = problem.synthesis(start, everyone), problem.synthesis(problem.point, everyone)
        middle = problem.synthesis(map_leaves(lambda a, b: (a + b) / 2, start, problem.point), everyone)
    assert isinstance(first, Tensor)
    assert isinstance(last, Tensor)
    assert isinstance(middle, Tensor)
    if not close(middle, (first + last) / 2, first, last):
        names = ", ".join(repr(domain) for domain in problem.domains)
        raise MethodError(f"{names} says linear = True, but its synthesis is not linear. Leave linear out.")
    site = problem.at_site()
    given = baseline_point(baseline, site)
    if isinstance(given, Tensor) and close(given, first, last):
        # the very path that methods in other domains walk
        return SitePath(site, given, problem)
    return SitePath(replace(site.at(last), diagnostics=problem.diagnostics), first, problem)


def close(found: Tensor, wanted: Tensor, *scale: Tensor) -> bool:
    """Whether two values at the site agree up to rounding, relative to the largest entries around."""
    largest = max(float(each.abs().max()) for each in (wanted, *scale))
    return float((found - wanted).abs().max()) <= rounding(found.dtype) * largest
