"""A domain: other coordinates of the value at a site, and what must hold when a problem enters them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import InputError, MethodError

__all__ = ["Domain", "domain_rows", "enter", "is_linear", "rounding"]


class Domain(Protocol):
    """A change of variable: ``synthesis(analysis(x))`` is x again.

    A domain may also have:

    - ``linear: bool``: its synthesis is linear, up to a constant. Integrated gradients then take the gradient at the
      site, where all linear domains share it. Left out: not linear.
    - ``lossy: bool``: something of x is lost on purpose; otherwise a loss is an error.
    - ``fitted(x) -> Domain``: the domain for these examples, where the synthesis needs something that only x knows,
      such as its length. Asked before analysis.
    - ``rows(index) -> Domain``: what was fitted for some of the examples, repeated or left out.
    - ``frequencies(length) -> Tensor`` in Hz, or cycles per sample without a sample rate; ``labels(shape)``.
    """

    def analysis(self, x: Tensor) -> Tensor:
        """Coefficients of x, (B, ...) real or complex."""
        ...

    def synthesis(self, coefficients: Tensor) -> Tensor:
        """The value with these coefficients; differentiable."""
        ...


def is_linear(domain: Domain) -> bool:
    """Whether a domain says that its synthesis is linear, up to a constant."""
    return getattr(domain, "linear", False) is True


def domain_rows(domain: Domain, index: Tensor) -> Domain:
    """The domain for these rows of the examples it was fitted to."""
    rows = getattr(domain, "rows", None)
    found: Domain = domain if rows is None else rows(index)
    return found


def enter(domain: Domain, x: Tensor) -> tuple[Domain, Tensor, float]:
    """The domain fitted to x, the coefficients of x, and how much of x they lose, relative to its largest entry.

    Raises:
        MethodError: the domain is none, or loses something without saying so (``lossy = True``).
        InputError: the coefficients are not finite or have another number of rows.
    """
    if isinstance(domain, type) or not all(
        callable(getattr(domain, name, None)) for name in ("analysis", "synthesis")
    ):
        raise MethodError(
            f"a domain is an object with analysis(x) and synthesis(coefficients), such as Fourier(); got {domain!r}."
        )
    fitted: Any = getattr(domain, "fitted", None)
    domain = domain if fitted is None else fitted(x)
    with torch.no_grad():
        coefficients = domain.analysis(x)
        if not isinstance(coefficients, Tensor) or coefficients.dim() == 0 or len(coefficients) != len(x):
            given = tuple(coefficients.shape) if isinstance(coefficients, Tensor) else coefficients
            raise InputError(
                f"{domain!r} gave coefficients {given} for {len(x)} examples; one row each is expected."
            )
        if not bool(torch.isfinite(coefficients).all()):
            raise InputError(f"the coefficients of {domain!r} are NaN or infinite at this value.")
        return domain, coefficients.detach(), _loss(domain, x, coefficients)


def _loss(domain: Domain, x: Tensor, coefficients: Tensor) -> float:
    again = domain.synthesis(coefficients)
    if again.shape != x.shape:
        raise MethodError(
            f"the synthesis of {domain!r} gives shape {tuple(again.shape)} for a value of shape {tuple(x.shape)}; it "
            "must give the value back. Where it needs the length, it may have a method fitted(x) -> domain."
        )
    if x.is_complex() and not again.is_complex():
        raise InputError(f"{domain!r} gives real values, but the value at the site is complex ({x.dtype}).")
    largest = _largest(x)
    error = _largest(again.to(x.dtype) - x)
    # rounding also grows with a constant that the synthesis adds, such as a mean
    if bool((error > rounding(x.dtype) * largest).any()):
        largest = torch.maximum(
            largest, _largest(domain.synthesis(torch.zeros_like(coefficients)).to(x.dtype))
        )
    loss = float((error / largest.clamp_min(torch.finfo(largest.dtype).tiny)).nan_to_num(nan=torch.inf).max())
    if loss > rounding(x.dtype) and not getattr(domain, "lossy", False):
        raise MethodError(
            f"{domain!r} does not give the value back: synthesis(analysis(x)) is off by {loss:.2g} of the largest "
            "entry, so another input would be explained. Correct the pair, or say lossy = True in the class."
        )
    return loss


def rounding(dtype: torch.dtype) -> float:
    """How far, relative to the largest entry, a value may come back off: eps^(2/3), in float64 4e-11."""
    return float(torch.finfo(dtype).eps ** (2 / 3))


def _largest(x: Tensor) -> Tensor:
    return x.abs().unsqueeze(1).flatten(1).amax(1)
