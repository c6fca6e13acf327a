"""The exact decomposition of a score: input term plus the gradient times the implicit bias of every operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.overrides import Rule
from ..core.points import Point, map_leaves
from .implicit_bias.recorder import Contribution, Keep
from .implicit_bias.recording import Grids, Recording, joined, pose_and_record

__all__ = ["FullGradTerms", "fullgrad_terms"]


@dataclass(frozen=True, eq=False)
class FullGradTerms:
    """``score = Σ input_term + Σ terms + residual`` for each example.

    Attributes:
        input_term: the value at the site times the gradient there, (B, *S), in score units.
        terms: (name, gradient times implicit bias (B, ...)) in execution order; a name is
            "module.path:operation", with "#2" for the second call.
        score: (B,).
        residual: (B,), what the terms leave unexplained: rounding, or the operations in ``uncovered``.
        uncovered: operations whose implicit bias is unknown.
    """

    input_term: Point
    terms: list[tuple[str, Tensor]]
    score: Tensor
    residual: Tensor
    uncovered: tuple[str, ...] = ()

    def sums(self) -> dict[str, Tensor]:
        """Each term summed for each example: name -> (B,)."""
        return {name: term.double().reshape(len(term), -1).sum(1) for name, term in self.terms}


def fullgrad_terms(
    model: Callable[..., Any],
    inputs: Any,
    target: Any = None,
    *,
    site: str | None = None,
    rules: Sequence[Rule] = (),
    chunk: int | str = "auto",
    memory_budget: int | float | str | None = None,
    allow_train: bool = False,
) -> FullGradTerms:
    """Everything a score is made of, for any architecture.

    ``f(x) = <∇f, x> + Σ_v <δ_v, b_v>`` with ``b_v = y_v - Σ_i J_i x_i`` at every operation v and δ_v the
    gradient at its result. Exact, also with smooth activations, norms and attention; with ``rules``, b and δ
    are those of the surrogate derivatives, and the sum stays exact.

    Args:
        model, inputs, target, site, chunk, memory_budget, allow_train: as for ``pullback.pose``.
        rules: replace derivatives, see ``Problem.under``.

    Returns:
        :class:`FullGradTerms`, in units of the score. A term under a rule is elementwise where operands and
        result have one shape, else (B,). An activation module written out in several elementwise operations has one
        term, named by its class; its parts have one each under rules.

    Raises:
        MethodError: the model is a plain callable, which cannot be looked into.

    Cost: one forward and one backward pass, with a term for each operation, for up to four examples; more have a
    forward first that measures and fixes the target. Examples one by one where a layer mixes their order.

    Source: Srinivas and Fleuret 2019, prop. 1, carried from ReLU networks to any operation.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.GELU(), torch.nn.Linear(3, 1))
        >>> found = fullgrad_terms(net, torch.ones(1, 2), target=0)
        >>> [name for name, _ in found.terms], bool(found.residual.abs().max() < 1e-6)
        (['0:linear', '1:gelu', '2:linear'], True)
    """
    problem, recordings = pose_and_record(
        model,
        inputs,
        target,
        rules,
        terms_of,
        site=site,
        chunk=chunk,
        memory_budget=memory_budget,
        allow_train=allow_train,
    )
    gradient = joined([each.gradient for each in recordings])
    return FullGradTerms(
        input_term=map_leaves(lambda x, g: x * g, problem.point, gradient),
        terms=_terms(recordings),
        score=torch.cat([each.score for each in recordings]),
        residual=torch.cat([each.residual() for each in recordings]),
        uncovered=tuple(sorted({name for each in recordings for name in each.uncovered})),
    )


def terms_of(rows: int, grids: Grids) -> Keep:
    """Keep ``δ ⊙ b`` whole, one row per example."""

    def keep(delta: Tensor | None, product: Tensor) -> Tensor:
        if product.dim() and len(product) == rows:
            return product
        return product.reshape(rows, -1, *product.shape[1:])

    return keep


def _terms(recordings: Sequence[Recording]) -> list[tuple[str, Tensor]]:
    """The parts' terms by name, zero where a part never ran the operation."""
    if len(recordings) == 1:
        return [(each.name, each.kept) for each in recordings[0].contributions]
    by_name: dict[str, dict[int, Contribution]] = {}
    for number, recording in enumerate(recordings):
        for each in recording.contributions:
            by_name.setdefault(each.name, {})[number] = each
    terms = []
    for name, found in by_name.items():
        kept = {number: each.kept for number, each in found.items()}
        if len({each.shape[1:] for each in kept.values()}) > 1:
            # how many entries it has depends on the example, so only their sums can stand together
            kept = {number: each.total() for number, each in found.items()}
        any_kept = next(iter(kept.values()))
        parts = [
            kept.get(number, any_kept.new_zeros(len(recording.index), *any_kept.shape[1:]))
            for number, recording in enumerate(recordings)
        ]
        terms.append((name, torch.cat(parts)))
    return terms
