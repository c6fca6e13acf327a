"""A method run again, on moved inputs or another model: what sensitivity and the sanity checks need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from pullback.attribution.spelling import parse_method
from pullback.core.errors import InputError, MethodError
from pullback.core.points import Point, leaves
from pullback.core.problem import Problem

__all__ = ["Rerun", "flat", "rerun"]


@dataclass(frozen=True, eq=False)
class Rerun:
    """A method that can be asked again, and the maps it gives at the problem's own point, flat: (B, d)."""

    ask: Callable[[Problem], Point]
    name: str
    shape: torch.Size
    clean: Tensor

    def maps(self, problem: Problem) -> Tensor:
        """The maps at another problem, flat: (rows, d). Raises InputError for another size or values not finite."""
        found = flat(_rows(self.ask(problem), problem, self.name))
        if found.shape[1] != self.clean.shape[1]:
            raise InputError(
                f"{self.name} gave maps of {found.shape[1]} values, and of {self.clean.shape[1]} before. Expected maps "
                "of one size."
            )
        return found


def rerun(problem: Problem, x: Any, attribution: Any, method: Any) -> Rerun:
    """What makes the maps again: ``method``, else the method of a result, else a callable (x, target).

    A tensor or result that comes along must be what the method gives, since otherwise the difference of two methods
    would be measured. Raises InputError where nothing can be run again or the maps differ.
    """
    known = attribution if isinstance(attribution, (Tensor, dict)) else getattr(attribution, "values", None)
    ask: Callable[[Problem], Point]
    if method is None and isinstance(getattr(attribution, "method", None), str):
        method = attribution.method
    if method is not None:
        chosen = parse_method(method) if isinstance(method, str) else method
        if isinstance(chosen, type) or not callable(chosen):
            raise MethodError(
                f"method={method!r} was given. Expected a method object such as Gradient(), or its text."
            )
        name, ask = repr(chosen), chosen
    elif known is None and callable(attribution):
        name, ask = "the attribution", _called(attribution, problem)
    else:
        raise InputError(
            "An attribution that cannot be made again was given. Expected method=, such as "
            'method="integrated_gradients", a result of explain, or a callable (x, target) -> tensor.'
        )
    first = _rows(ask(problem), problem, name)
    clean = flat(first)
    if known is not None:
        _require_same(flat(known), clean, name)
    return Rerun(ask, name, leaves(first)[0].shape, clean)


def flat(point: Point) -> Tensor:
    """All values of each example, in float64: (B, d). Raises InputError for values that are not finite."""
    parts = leaves(point)
    values = torch.cat([part.detach().to(parts[0].device).flatten(1).double() for part in parts], 1)
    broken = ~values.isfinite().all(1)
    if bool(broken.any()):
        raise InputError(
            f"{int(broken.sum())} attributions have NaN or infinite values (first: row {int(broken.nonzero()[0])}). "
            "Expected finite values; leave those examples out or look into the model there."
        )
    return values


def _rows(values: object, problem: Problem, name: str) -> Point:
    found = leaves(values) if isinstance(values, (Tensor, dict)) else []
    if not found or any(leaf.ndim < 2 or len(leaf) != problem.batch for leaf in found):
        given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"{name[:1].upper()}{name[1:]} gave {given} for {problem.batch} inputs. Expected a tensor with one row for "
            "each, or an object with such .values."
        )
    return values  # type: ignore[return-value]


def _called(
    attribution: Callable[[Tensor, Tensor | None], Any], problem: Problem
) -> Callable[[Problem], Point]:
    if problem.site != "input" or not isinstance(problem.point, Tensor):
        raise InputError(
            f"A callable attribution was given at the site {problem.site!r}. Expected one input tensor; for other "
            "sites pass method=."
        )

    def ask(moved: Problem) -> Point:
        index = moved.posed.targets[0].index
        target = None if index is None else index.to(moved.examples.device)[moved.examples]
        found = attribution(moved.point, target)  # type: ignore[arg-type]
        values: Any = found if isinstance(found, Tensor) else getattr(found, "values", None)
        return cast(Point, values)

    return ask


def _require_same(given: Tensor, made: Tensor, name: str) -> None:
    if given.shape != made.shape:
        raise InputError(
            f"An attribution with {given.shape[1]} values for each of {given.shape[0]} examples was given, but {name} "
            f"gives {made.shape[1]} for {made.shape[0]}. Expected what the method gives, or None."
        )
    off = float((given.to(made.device) - made).abs().max())
    if off > 1e-2 * float(made.abs().max()):
        raise InputError(
            f"The attribution given differs from what {name} gives by up to {off:.3g}. Expected what the method gives "
            "for this target, or None."
        )
