"""Recording every contribution to a score in one forward and one backward pass, in as many parts as memory asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...core.audit import Coverage, Uncovered, audit
from ...core.errors import MethodError
from ...core.live_pass import LivePass
from ...core.overrides import Rule, overrides
from ...core.points import Point, leaves, map_leaves, take, widest
from ...core.pose import pose_targets
from ...core.posed import gradient_of, gradients_enabled
from ...core.problem import Problem
from ...core.resources import is_out_of_memory
from .chains import ChainRecorder
from .operations import HOMOGENEOUS
from .recorder import BiasRecorder, Contribution, Keep, recorded
from .sums import UnknownLayout
from .writes import WriteRecorder

__all__ = ["Grids", "Keeping", "Recording", "joined", "pose_and_record", "record"]

Grids: TypeAlias = "Mapping[tuple[int, ...], None]"
Keeping: TypeAlias = "Callable[[int, Grids], Keep | None]"


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


def joined(points: Sequence[Point]) -> Point:
    """Rows of several points as one."""
    return points[0] if len(points) == 1 else map_leaves(lambda *parts: torch.cat(parts), *points)


class _Pass:
    """A forward being recorded: its recorder, and the coverage that the backward goes on with."""

    def __init__(self, rules: Sequence[Rule], keeping: Keeping) -> None:
        self.rules, self.keeping = rules, keeping
        self.recorder = BiasRecorder(0)
        self.coverage: Coverage | None = None

    def begin(self, rows: int) -> None:
        self.recorder, self.coverage = BiasRecorder(rows), None
        self.recorder.keep = self.keeping(rows, self.recorder.grids)

    @contextmanager
    def open(self, module: nn.Module) -> Iterator[None]:
        rules = recorded(self.rules, self.recorder)
        # what a rule sends on is not the derivative of a chain, so there every operation stands for itself
        chains = ChainRecorder(self.recorder, nn.Module() if self.rules else module)
        with (
            WriteRecorder(self.recorder),
            overrides(module, rules, coverage=self.coverage) as self.coverage,
            chains,
        ):
            yield

    @contextmanager
    def around(self, module: nn.Module, rows: int) -> Iterator[None]:
        """As ``LivePass`` wants it."""
        self.begin(rows)
        with self.open(module):
            yield


def pose_and_record(
    model: Callable[..., Any],
    inputs: Any,
    target: Any,
    rules: Sequence[Rule],
    keep: Keeping,
    *,
    site: str | None,
    chunk: int | str,
    memory_budget: int | float | str | None,
    allow_train: bool,
) -> tuple[Problem, list[Recording]]:
    """Pose, and record in the same forward pass where a few rows allow it."""
    passing = _Pass(rules, keep)
    live = LivePass(passing.around)
    problem = pose_targets(
        model,
        inputs,
        [target],
        site=site,
        chunk=chunk,
        memory_budget=memory_budget,
        allow_train=allow_train,
        live=live,
    )
    if rules:
        problem = problem.under(rules)
    recording = _of_live(problem, passing, live)
    live.drop()
    if recording is not None and (problem.batch == 1 or problem.posed.whole or recording.is_exact()):
        return problem, [recording]
    return problem, record(problem, keep)


def _of_live(problem: Problem, passing: _Pass, live: LivePass) -> Recording | None:
    """What the first pass recorded; None where it does not serve, and the point is evaluated again."""
    module = problem.posed.module
    if not live.ready or problem.posed.paired or not isinstance(module, nn.Module):
        return None
    assert live.variables is not None
    try:
        with problem.posed.lock, gradients_enabled(), passing.open(module):
            return _finished(problem, torch.arange(problem.batch), passing, live.variables, live.output)
    except UnknownLayout:
        return None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


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
    """A forward with everything on record, and its backward."""
    posed, module = problem.posed, problem.posed.module
    assert isinstance(module, nn.Module)
    examples = problem.examples[index]
    passing = _Pass(problem.rules, keep)
    passing.begin(len(index))
    with posed.lock, gradients_enabled():
        variables = map_leaves(
            lambda leaf: leaf.detach().clone().requires_grad_(), take(problem.point, index)
        )
        with passing.open(module):
            output = posed.output(posed.held(variables, examples), examples)
            return _finished(problem, index, passing, variables, output)


def _finished(problem: Problem, index: Tensor, passing: _Pass, variables: Point, output: Any) -> Recording:
    """Score a recorded forward and go back through it, with the recording open."""
    posed, recorder = problem.posed, passing.recorder
    examples, asked = problem.examples[index], problem.asked[index]
    problem.evaluations.index_add_(0, examples * len(posed.targets) + asked, torch.ones_like(examples))
    recorder.scoring = True
    scores = posed.asked_scores(output, examples, asked)
    recorder.scoring = False
    problem.require_path(scores)
    assert passing.coverage is not None
    unknown = audit(scores, passing.coverage) if scores.requires_grad else ()
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
