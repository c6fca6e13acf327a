"""What the coefficients of a domain stand for, as a result keeps it for its pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.problem import Problem
from .fixed_parts import FixedParts
from .linear import Chain

__all__ = ["coordinates", "signals"]


def coordinates(problem: Problem) -> dict[str, Any] | None:
    """Frequencies, times, levels or names of a problem's coefficients, JSON-able; None at the site itself.

    ``dim`` is the dimension of the frequencies, or of time, counted from the end; ``sample_rate`` None where they
    are in cycles per sample and in samples; ``named`` the dimension that names run along, -2 if left out.
    """
    if not problem.domains or not isinstance(problem.point, Tensor):
        return None
    x = problem.at_site().point
    assert isinstance(x, Tensor)
    domain, *before = reversed(problem.domains)
    for each in reversed(before):
        x = each.analysis(x)
    while isinstance(domain, Chain):
        chain: Chain = domain
        domain, x = chain.second, chain.first.analysis(x)
    dim = getattr(domain, "dim", -1)
    known: dict[str, Any] = {"sample_rate": getattr(domain, "sample_rate", None)}
    if not isinstance(dim, int) or not -x.dim() < dim < x.dim() or dim == 0:
        return known
    length = x.shape[dim]
    known["dim"] = dim - x.dim() if dim > 0 else dim
    for name in ("frequencies", "times"):
        if (found := getattr(domain, name, None)) is not None:
            known[name] = torch.as_tensor(found(length)).flatten().tolist()
    if (sizes := getattr(domain, "level_sizes", None)) is not None:
        known["levels"] = sizes(length)
    if (names := getattr(domain, "labels", None)) is not None:
        known["names"] = list(map(str, names(problem.point.shape[1:])))
    if "frequencies" not in known and known["dim"] == -2:
        known["dim"] = -1  # patterns across channels, each with its course in time
    elif "frequencies" not in known and hasattr(domain, "dim"):
        known["named"] = -1  # patterns in time: no course of their own
    return known


def signals(problem: Problem) -> dict[str, Tensor]:
    """The value at the site, and the parts that the domain holds fixed, for pictures beside the coefficients."""
    if not problem.domains:
        return {}
    site = problem.at_site().point
    found = {"signal": site} if isinstance(site, Tensor) else {}
    last = problem.domains[-1]
    return found | ({"parts": last.parts} if isinstance(last, FixedParts) else {})
