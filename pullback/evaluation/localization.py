"""Does the attribution lie where the signal is known to be?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from pullback.core.errors import InputError
from pullback.evaluation.results import MetricResult

__all__ = ["leakage"]


class HasValues(Protocol):
    """An attribution result: anything with a tensor ``values``."""

    @property
    def values(self) -> Tensor: ...


Attributions: TypeAlias = Tensor | HasValues | Callable[[Tensor | None, Tensor | None], Tensor | HasValues]
Reduction = Literal["abs", "positive"]

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"abs": torch.abs, "positive": lambda a: a.clamp_min(0)}


def leakage(
    model: nn.Module | Callable[[Tensor], Tensor] | None,
    x: Tensor | None,
    attribution: Attributions,
    *,
    signal_mask: Tensor,
    target: Tensor | None = None,
    fractions: Sequence[float] = (0.05, 0.1, 0.25),
    reduce: Reduction = "abs",
) -> MetricResult:
    """Feature leakage: the share of the attribution outside the signal. Lower is better.

    ``values`` (n,): the null mass, Σ_{outside} |a| / Σ |a|. ``details["null_share@0.1"]`` (n,), one per
    fraction: the share of the top 10% elements of |a| that lie outside, its mean over all ways to break ties.
    ``details["null_area"]`` (n,): the share of elements outside, which is what an uninformative attribution
    gets.

    ``attribution``: (n, ...), or an object with such ``.values``, or a callable (x, target) returning either;
    only a callable needs ``x``, and only one without ``target`` needs ``model``, for the predicted class.
    ``signal_mask``: bool, True on the signal, of the attribution's shape or broadcast to it (channels, a mask
    shared by all). ``reduce``: "abs" or "positive" (negative parts count as nothing). An all-zero attribution
    (a dead model) is NaN and warned of, never the 0.5 of chance.

    Raises ``InputError`` for shapes that do not fit, values that are not finite, fractions outside (0, 1].
    Source: H. Shah, P. Jain, P. Netrapalli, NeurIPS 2021 (leakage); the share of the top pixels, arXiv
    2206.06854.

    >>> mask = torch.tensor([[True, True, False, False]])
    >>> leakage(None, None, torch.tensor([[3.0, 0.0, -1.0, 0.0]]), signal_mask=mask).mean()
    0.25
    """
    if reduce not in _REDUCTIONS:
        raise InputError(f'reduce={reduce!r} was given. Expected "abs" or "positive".')
    fractions = tuple(float(fraction) for fraction in fractions)
    if not all(0 < fraction <= 1 for fraction in fractions):
        raise InputError(f"fractions={fractions} was given. Expected shares of the elements in (0, 1].")
    values = _values(model, x, attribution, target)
    outside = ~_mask(signal_mask, values).to(values.device)

    size = _REDUCTIONS[reduce](values.detach()).flatten(1).double()
    outside = outside.flatten(1)
    total = size.sum(1)
    dead = total == 0
    if bool(dead.any()):
        warnings.warn(
            f"{int(dead.sum())} of {len(dead)} attributions are zero everywhere"
            + (" after dropping negative parts" if reduce == "positive" else "")
            + ": their leakage is undefined (NaN). Has the model collapsed to a constant?",
            UserWarning,
            stacklevel=2,
        )
    undefined = torch.full_like(total, torch.nan)
    details = {"null_area": outside.double().mean(1)}
    for fraction in fractions:
        details[f"null_share@{fraction:g}"] = torch.where(
            dead, undefined, _top_share(size, outside, fraction)
        )
    return MetricResult(
        name="leakage",
        values=torch.where(dead, undefined, (size * outside).sum(1) / total),
        direction="lower",
        params={"fractions": list(fractions), "reduce": reduce},
        details=details,
    )


def _top_share(size: Tensor, outside: Tensor, fraction: float) -> Tensor:
    """The share of the k largest elements that lie outside the signal, (n,).

    Elements tied at the k-th place share the places left over, which is the mean over random orders of the
    tied ones: sorting alone would prefer low indices, that is, one of the two blocks.
    """
    k = max(1, round(fraction * size.shape[1]))
    threshold = size.topk(k, dim=1).values[:, -1:]
    above, tied = size > threshold, size == threshold
    places_left = k - above.sum(1)
    tied_share = (tied & outside).sum(1).double() / tied.sum(1)
    return ((above & outside).sum(1) + places_left * tied_share) / k


def _values(
    model: nn.Module | Callable[[Tensor], Tensor] | None,
    x: Tensor | None,
    attribution: Attributions,
    target: Tensor | None,
) -> Tensor:
    given: object = attribution
    if not isinstance(getattr(given, "values", None), Tensor) and not isinstance(given, Tensor):
        if not callable(attribution):
            raise InputError(
                f"An attribution of type {type(given).__name__} was given. Expected a tensor (n, ...), an "
                "object with .values, or a callable (x, target) -> tensor."
            )
        if x is None:
            raise InputError(
                "A callable attribution was given without x. Expected the inputs: leakage(model, x, ...)."
            )
        if target is None and model is not None:
            target = _predicted(model, x)
        given = attribution(x, target)
    values = given if isinstance(given, Tensor) else getattr(given, "values", None)
    if not isinstance(values, Tensor):
        raise InputError(
            f"The attribution is a {type(given).__name__}. Expected a tensor (n, ...) or .values."
        )
    if values.ndim < 2 or not values.numel():
        raise InputError(
            f"An attribution of shape {tuple(values.shape)} was given. Expected (n, ...), not empty."
        )
    if x is not None and values.shape[0] != x.shape[0]:
        raise InputError(
            f"{values.shape[0]} attributions for {x.shape[0]} inputs were given. Expected one per input."
        )
    if not bool(values.isfinite().all()):
        rows = (~values.isfinite()).flatten(1).any(1).nonzero().squeeze(1).tolist()
        raise InputError(
            f"{len(rows)} attributions have NaN or infinite values (first: example {rows[0]}). Expected "
            "finite values; leave those examples out or look into the model there."
        )
    return values


def _predicted(model: nn.Module | Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(x)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise InputError(
            "The model's output has no single predicted class. Expected (n, classes); pass target=."
        )
    return logits.argmax(1)


def _mask(signal_mask: Tensor, values: Tensor) -> Tensor:
    if signal_mask.dtype != torch.bool:
        raise InputError(
            f"A signal_mask of type {signal_mask.dtype} was given. Expected bool, True on the signal: "
            "mask.bool()."
        )
    if signal_mask.ndim == values.ndim:
        sizes = zip(signal_mask.shape, values.shape, strict=True)
        if all(have in (1, want) for have, want in sizes):
            return signal_mask.expand_as(values)
    raise InputError(
        f"A signal_mask of shape {tuple(signal_mask.shape)} was given for attributions of shape "
        f"{tuple(values.shape)}. Expected the same shape, or 1 where it is shared."
    )
