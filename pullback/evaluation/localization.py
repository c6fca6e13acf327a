"""Does the attribution lie where the signal is known to be? Leakage, relevance mass and rank, the pointing game."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pullback.core.errors import InputError
from pullback.evaluation.results import MetricResult, flagged

__all__ = [
    "Attributions",
    "attribution_values",
    "leakage",
    "pointing_game",
    "relevance_mass",
    "relevance_rank",
]


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
    values = attribution_values(model, x, attribution, target)
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
            dead, undefined, _top_share(size, outside, max(1, round(fraction * size.shape[1])))
        )
    return MetricResult(
        name="leakage",
        values=torch.where(dead, undefined, (size * outside).sum(1) / total),
        direction="lower",
        params={"fractions": list(fractions), "reduce": reduce},
        details=details,
    )


def relevance_mass(
    model: nn.Module | Callable[[Tensor], Tensor] | None,
    x: Tensor | None,
    attribution: Attributions,
    *,
    signal_mask: Tensor,
    target: Tensor | None = None,
    reduce: Reduction = "positive",
) -> MetricResult:
    """Relevance mass accuracy: the share of the (positive) relevance on the signal. Higher is better.

    ``values`` (n,): Σ_{inside} a⁺ / Σ a⁺, in [0, 1]. ``details["area"]`` (n,): the share of elements on the signal,
    which is what an uninformative attribution gets. Arguments as in ``leakage``; with ``reduce="abs"`` it is
    1 - leakage. NaN, and warned of, where nothing is left after ``reduce`` or the mask is all signal or none.

    Raises ``InputError`` as ``leakage`` does.
    Source: L. Arras, A. Osman, W. Samek, CLEVR-XAI, Information Fusion 2022.

    >>> mask = torch.tensor([[True, True, False, False]])
    >>> relevance_mass(None, None, torch.tensor([[3.0, -5.0, 1.0, 0.0]]), signal_mask=mask).mean()
    0.75
    """
    size, inside = _sizes(model, x, attribution, target, signal_mask, reduce)
    share = (size * inside).sum(1) / size.sum(1)
    return _localized("relevance_mass", share, size, inside, size.sum(1) == 0, reduce)


def relevance_rank(
    model: nn.Module | Callable[[Tensor], Tensor] | None,
    x: Tensor | None,
    attribution: Attributions,
    *,
    signal_mask: Tensor,
    target: Tensor | None = None,
    reduce: Reduction = "positive",
) -> MetricResult:
    """Relevance rank accuracy: the share of the K most relevant elements on the signal, K its size. Higher is better.

    ``values`` (n,): |top K ∩ signal| / K, in [0, 1]; its mean over all ways to break ties. ``details["area"]`` (n,):
    what an uninformative attribution gets. Arguments as in ``leakage``. NaN, and warned of, for a constant
    attribution and where the mask is all signal or none.

    Raises ``InputError`` as ``leakage`` does.
    Source: L. Arras, A. Osman, W. Samek, CLEVR-XAI, Information Fusion 2022.

    >>> mask = torch.tensor([[True, True, False, False]])
    >>> relevance_rank(None, None, torch.tensor([[3.0, 1.0, 2.0, 0.0]]), signal_mask=mask).mean()
    0.5
    """
    size, inside = _sizes(model, x, attribution, target, signal_mask, reduce)
    share = 1 - _top_share(size, ~inside, inside.sum(1).clamp_min(1))
    return _localized("relevance_rank", share, size, inside, _constant(size), reduce)


def pointing_game(
    model: nn.Module | Callable[[Tensor], Tensor] | None,
    x: Tensor | None,
    attribution: Attributions,
    *,
    signal_mask: Tensor,
    target: Tensor | None = None,
    tolerance: float = 0.0,
    reduce: Reduction = "positive",
) -> MetricResult:
    """The pointing game: whether the most relevant element lies on the signal. Higher is better.

    ``values`` (n,): 1 for a hit, 0 for a miss; with several largest elements, the share of them that hit.
    ``details["area"]`` (n,): the share of elements that hit, which is what a random attribution gets.

    ``tolerance``: pixels (samples in a series) beside the signal that still count, by Euclidean distance. Further
    arguments as in ``leakage``. NaN, and warned of, for a constant attribution and where every place or none hits.

    Raises ``InputError`` as ``leakage`` does, and for a tolerance below 0 or without spatial dimensions.
    Source: J. Zhang et al., Top-down Neural Attention by Excitation Backprop, ECCV 2016 (tolerance of 15 pixels).

    >>> mask = torch.tensor([[True, True, False, False]])
    >>> pointing_game(None, None, torch.tensor([[3.0, 1.0, 2.0, 0.0]]), signal_mask=mask).mean()
    1.0
    """
    size, inside = _sizes(model, x, attribution, target, signal_mask, reduce, tolerance)
    largest = size == size.max(1, keepdim=True).values
    share = (largest & inside).sum(1).double() / largest.sum(1)
    result = _localized("pointing_game", share, size, inside, _constant(size), reduce)
    result.params["tolerance"] = tolerance
    return result


def _localized(
    name: str, share: Tensor, size: Tensor, inside: Tensor, empty: Tensor, reduce: str
) -> MetricResult:
    everywhere = inside.all(1) | ~inside.any(1)
    share = flagged(name, share, everywhere, "the mask is all signal, or has none", stacklevel=4)
    dead = "the attribution is constant" + (" after dropping negative parts" if reduce == "positive" else "")
    return MetricResult(
        name=name,
        values=flagged(name, share, empty, f"{dead}; has the model collapsed?", stacklevel=4),
        direction="higher",
        params={"reduce": reduce},
        details={"area": inside.double().mean(1).to(size.device)},
    )


def _sizes(
    model: nn.Module | Callable[[Tensor], Tensor] | None,
    x: Tensor | None,
    attribution: Attributions,
    target: Tensor | None,
    signal_mask: Tensor,
    reduce: str,
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The relevance of each element after ``reduce``, and whether it is on the signal: (n, elements) each."""
    if reduce not in _REDUCTIONS:
        raise InputError(f'reduce={reduce!r} was given. Expected "abs" or "positive".')
    values = attribution_values(model, x, attribution, target)
    inside = _dilated(_mask(signal_mask, values).to(values.device), tolerance)
    return _REDUCTIONS[reduce](values.detach()).flatten(1).double(), inside.flatten(1)


def _constant(size: Tensor) -> Tensor:
    return size.amax(1) == size.amin(1)


def _dilated(mask: Tensor, tolerance: float) -> Tensor:
    """The mask, and every place within the distance of it along the spatial dimensions."""
    if tolerance == 0:
        return mask
    if not 0 < tolerance < float("inf") or mask.ndim not in (3, 4):
        raise InputError(
            f"tolerance={tolerance} was given for attributions of shape {tuple(mask.shape)}. Expected pixels, 0 or "
            "more, and images (n, C, H, W) or series (n, C, T), which have distances."
        )
    planes = mask if mask.ndim == 4 else mask[:, :, None]
    # beyond the plane there is nothing to reach
    reach = [min(int(tolerance), length - 1) for length in planes.shape[2:]]
    rows, columns = (torch.arange(-each, each + 1, device=mask.device) for each in reach)
    disc = (rows[:, None] ** 2 + columns**2 <= tolerance**2).to(torch.float32)
    counted = F.conv2d(planes.flatten(0, 1)[:, None].float(), disc[None, None], padding=reach)
    return (counted > 0.5).reshape(mask.shape)


def _top_share(size: Tensor, outside: Tensor, k: int | Tensor) -> Tensor:
    """The share of the k (or k (n,)) largest elements that lie outside the signal, (n,).

    Elements tied at the k-th place share the places left over, which is the mean over random orders of the
    tied ones: sorting alone would prefer low indices, that is, one of the two blocks.
    """
    counts = torch.as_tensor(k, device=size.device).expand(len(size))
    threshold = size.sort(1, descending=True).values.gather(1, counts[:, None] - 1)
    above, tied = size > threshold, size == threshold
    places_left = counts - above.sum(1)
    tied_share = (tied & outside).sum(1).double() / tied.sum(1)
    return ((above & outside).sum(1) + places_left * tied_share) / counts


def attribution_values(
    model: nn.Module | Callable[[Tensor], Tensor] | None,
    x: Tensor | None,
    attribution: Attributions,
    target: Tensor | None,
) -> Tensor:
    """The values (n, ...) of an attribution, checked to be finite and one for each input. Raises InputError."""
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
