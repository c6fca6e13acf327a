"""The exact decomposition of a score: input term plus the gradient times the implicit bias of every operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..core.audit import Uncovered, audit
from ..core.errors import MethodError
from ..core.overrides import Rule, overrides
from ..core.points import Point, leaves, map_leaves, take, widest
from ..core.pose import pose
from ..core.posed import gradient_of, gradients_enabled
from ..core.problem import Problem
from ..core.resources import is_out_of_memory
from .implicit_bias.operations import HOMOGENEOUS
from .implicit_bias.parts import ImplicitBias
from .implicit_bias.recorder import BiasRecorder, Contribution, Keep, recorded
from .implicit_bias.sums import UnknownLayout, real_product
from .implicit_bias.writes import WriteRecorder

__all__ = ["FullGradTerms", "Grids", "Keeping", "Recording", "fullgrad_terms", "joined", "record"]

Grids: TypeAlias = "Mapping[tuple[int, ...], None]"
Keeping: TypeAlias = "Callable[[int, Grids], Keep | None]"


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


@dataclass(frozen=True, eq=False)
class Recording:
    """One recorded backward pass over R rows: scores (R,), gradient, contributions with (R,) sums.

    ``precision`` is the coarsest machine epsilon of any result on the way.
    """

    index: Tensor
    score: Tensor
    gradient: Point
    input_sum: Tensor
    contributions: list[Contribution]
    uncovered: tuple[str, ...]
    precision: float

    def residual(self) -> Tensor:
        """(R,), the score minus everything recorded."""
        found = self.score - self.input_sum
        for each in self.contributions:
            found = found - each.total().to(found)
        return found

    def is_exact(self) -> bool:
        """Whether nothing but rounding is left in any example."""
        return bool((self.residual().abs() <= 0.1 * self.precision**0.5 * self.size()).all())

    def size(self) -> Tensor:
        """(R,), the sum of absolute terms, against which rounding is judged."""
        total = self.input_sum.abs()
        for each in self.contributions:
            total = total + each.total().abs().to(total)
        return total


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
        result have one shape, else (B,).

    Raises:
        MethodError: the model is a plain callable, which cannot be looked into.

    Cost: one forward and one backward pass, 1.2 to 1.5 times the plain ones; examples one by one where a
    layer mixes their order.

    Source: Srinivas and Fleuret 2019, prop. 1, carried from ReLU networks to any operation.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 1))
        >>> found = fullgrad_terms(net, torch.ones(1, 2), target=0)
        >>> [name for name, _ in found.terms], bool(found.residual.abs().max() < 1e-6)
        (['0:linear', '1:gelu', '2:linear'], True)
    """
    problem = pose(
        model,
        inputs,
        target=target,
        site=site,
        chunk=chunk,
        memory_budget=memory_budget,
        allow_train=allow_train,
    )
    recordings = record(problem if not rules else problem.under(rules), terms_of)
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

    def keep(delta: Tensor, bias: ImplicitBias) -> Tensor:
        total = bias.total()
        assert total is not None
        product = real_product(delta, total)
        if product.dim() and len(product) == rows:
            return product
        return product.reshape(rows, -1, *product.shape[1:])

    return keep


def joined(points: Sequence[Point]) -> Point:
    """Rows of several points as one."""
    return points[0] if len(points) == 1 else map_leaves(lambda *parts: torch.cat(parts), *points)


def record(problem: Problem, keep: Keeping) -> list[Recording]:
    """Record every contribution at the problem's point, in as many parts as memory asks for.

    ``keep(rows, grids)`` makes what to keep of each δ and b, for a part of that many rows; ``grids`` has the
    spatial sizes that convolutions gave, complete by the time the backward pass asks.
    """
    if not isinstance(problem.posed.module, nn.Module):
        raise MethodError(
            "FullGrad looks at every operation of an nn.Module, and the model is a plain callable. "
            "Wrap it in an nn.Module, or use IntegratedGradients()."
        )
    if problem.domains:
        raise MethodError(
            "FullGrad decomposes the score at a site of the model, not in a domain's coordinates: "
            "use it without InDomain, or InDomain with IntegratedGradients()."
        )
    found: list[Recording] = []
    for part in torch.arange(problem.batch).split(_rows(problem)):
        found += _part(problem, part, keep)
    return found


def _rows(problem: Problem) -> int:
    """How many rows to record at once, measured with what recording holds; a few rows are not worth measuring."""
    unlimited = problem.resources.budget is None and problem.resources.chosen is None
    if problem.batch == 1 or (problem.batch <= 4 and unlimited):
        return problem.batch
    rules = recorded(problem.rules, BiasRecorder(1))
    measured = replace(problem, diagnostics={}).under(rules, uncovered="gradient")
    return min(problem.batch, measured.chunk_rows())


def _part(problem: Problem, index: Tensor, keep: Keeping) -> list[Recording]:
    """One part; in halves when memory runs out, row by row where a layer hides whose an entry is."""
    recording = None
    try:
        recording = _record(problem, index, keep)
        if len(index) == 1 or problem.posed.whole or recording.is_exact():
            return [recording]
        pieces = index.split(1)
    except UnknownLayout as error:
        if problem.posed.whole:
            raise MethodError(
                "FullGrad cannot tell which example an entry of an inner tensor belongs to, and this model "
                "in train mode needs its batch in one piece: call model.eval(), or give one example."
            ) from error
        pieces = index.split(1)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problem.resources.halve(len(index), error, len(problem.posed.targets))
        pieces = index.split(max(1, len(index) // 2))
    try:
        return [recording for piece in pieces for recording in _part(problem, piece, keep)]
    except (RuntimeError, ValueError, IndexError):
        if recording is None:
            raise
        return [recording]  # a model that cannot take one example; its residual says what is missing


def _record(problem: Problem, index: Tensor, keep: Keeping) -> Recording:
    posed, module = problem.posed, problem.posed.module
    assert isinstance(module, nn.Module)
    examples, asked = problem.examples[index], problem.asked[index]
    problem.evaluations.index_add_(0, examples * len(posed.targets) + asked, torch.ones_like(examples))
    recorder = BiasRecorder(len(index))
    recorder.keep = keep(len(index), recorder.grids)
    with posed.lock, gradients_enabled():
        variables = map_leaves(
            lambda leaf: leaf.detach().clone().requires_grad_(), take(problem.point, index)
        )
        with WriteRecorder(recorder), overrides(module, recorded(problem.rules, recorder)) as coverage:
            scores = posed.scores(
                variables, examples, asked, lambda output: setattr(recorder, "scoring", True)
            )
            recorder.scoring = False
            problem.require_path(scores)
            unknown = audit(scores, coverage) if scores.requires_grad else ()
            gradient = gradient_of(scores, variables, posed.site)
    products = map_leaves(lambda x, g: (x.detach() * g).flatten(1), variables, gradient)
    return Recording(
        index,
        widest(scores.detach()),
        gradient,
        torch.stack([widest(each).sum(1) for each in leaves(products)]).sum(0),
        recorder.finish(),
        tuple(sorted({*recorder.unknown, *filter(None, map(_unknown_name, unknown))})),
        max(recorder.precision, torch.finfo(scores.dtype).eps),
    )


def _unknown_name(uncovered: Uncovered) -> str | None:
    if uncovered.kind == "operation" and uncovered.operation in HOMOGENEOUS:
        return None
    where = f"{uncovered.module_path}:" if uncovered.module_path else ""
    return f"{where}{uncovered.operation}"


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
