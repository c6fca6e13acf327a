"""A Problem: the value at a site, and one real number per example if the value there were another.

Everything a method does is asked of a problem: ``score``, ``grad``, and the same problem moved (``at``), repeated
(``rows``), seen in other coordinates (``in_domain``) or differentiated by other rules (``under``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .audit import GRADIENT, audit, require_covered
from .domain import Domain, domain_rows, enter, rounding
from .errors import InputError, MethodError
from .inputs import nested_tensors
from .lean import lean_backward
from .overrides import Rule, overrides, rules_paused
from .points import Point, leaves, map_leaves, take, widest
from .posed import PosedModel, gradient_of, gradients_enabled
from .resources import HELD_COPIES, PeakMeter, Resources, is_out_of_memory

__all__ = ["Domain", "Problem", "take_slice"]

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Problem:
    """A model cut at a site, with a score to explain.

    Attributes:
        point: the value at the site, (B, *S), or a dict of such tensors where several input leaves are explained.
        posed: the model, the site and the targets.
        examples: (B,) which of the caller's examples each row is.
        asked: (B,) which target each row is about (0 unless several were posed together).
        resources: chunk and memory policy.
        diagnostics: what methods record about their result, for example the completeness gap.
        seen_from: the same problem in the site's own coordinates, where this one is it through domains, unmoved.
    """

    point: Point
    posed: PosedModel
    examples: Tensor
    asked: Tensor
    resources: Resources
    evaluations: Tensor
    domains: tuple[Domain, ...] = ()
    rules: tuple[Rule, ...] = ()
    uncovered: str = "error"
    known_score: Tensor | None = None
    diagnostics: dict[str, Any] = field(default_factory=dict)
    memo: dict[Any, Any] | None = None
    seen_from: Problem | None = None

    @property
    def batch(self) -> int:
        return len(self.examples)

    @property
    def device(self) -> torch.device:
        return leaves(self.point)[0].device

    @property
    def site(self) -> str:
        return self.posed.asked_site

    @property
    def free(self) -> Tensor | None:
        """(B, T) true where the value may move: everywhere but at padding. None where there is no padding."""
        free = self.posed.free
        return None if free is None or self.domains else free.index_select(0, self.examples.to(free.device))

    # the same problem elsewhere

    def at(self, z: Point) -> Problem:
        """The problem with its point moved to z (same shape), for example by noise or a patch."""
        self._require_shape(z, self.batch)
        return replace(
            self,
            point=map_leaves(torch.Tensor.detach, z),
            known_score=None,
            diagnostics={},
            memo=None,
            seen_from=None,
        )

    def rows(self, index: Tensor, z: Point | None = None) -> Problem:
        """A problem whose examples are the given rows of this one, repeated or left out, at their points or at z."""
        known = self.known_score if z is None else None
        return replace(
            self,
            point=take(self.point, index) if z is None else map_leaves(torch.Tensor.detach, z),
            examples=self.examples[index],
            asked=self.asked[index],
            domains=self._domains_of(index),
            known_score=None if known is None else known[index.to(known.device)],
            diagnostics={},
            memo=None,
            seen_from=None,
        )

    def in_domain(self, domain: Domain) -> Problem:
        """The problem in other coordinates: point' = analysis(point), score'(c) = score(synthesis(c)).

        Raises MethodError where synthesis does not give the point back and the domain does not say so (``lossy``).
        """
        if not isinstance(self.point, Tensor):
            raise MethodError(
                f"a domain needs one tensor, but {len(self.point)} input leaves are explained: "
                f'{", ".join(self.point)}. Choose one, for example site="input:{next(iter(self.point))}".'
            )
        domain, coefficients, loss = enter(domain, self.point)
        kept = loss <= rounding(self.point.dtype)
        if not kept:
            self.note(
                f"{domain!r} loses something: its synthesis is off by {loss:.2g} of the largest entry, and it is the "
                "synthesis that is explained"
            )
        origin = self.seen_from if self.domains else self
        # the score is that of the synthesis, which is another where the domain loses something
        return replace(
            self,
            point=coefficients,
            domains=(*self.domains, domain),
            known_score=None,
            memo=None,
            seen_from=origin if kept else None,
        )

    def at_site(self) -> Problem:
        """The problem in the site's own coordinates again."""
        if not self.domains:
            return self
        if self.seen_from is not None:
            return self.seen_from
        everyone = torch.arange(self.batch)
        return replace(self, point=self.synthesis(self.point, everyone), domains=(), memo=None)

    def analysis(self, z: Point) -> Point:
        """Coefficients, in this problem's domains, of a value at the site."""
        for domain in self.domains:
            z = domain.analysis(z)  # type: ignore[arg-type]
        return z

    def synthesis(self, z: Point, index: Tensor) -> Point:
        """The value at the site of coefficients, row r being about example ``index[r]``; differentiable."""
        for domain in reversed(self._domains_of(index)):
            z = domain.synthesis(z)  # type: ignore[arg-type]
        # transforms may work in a wider precision than the model
        clean = self.posed.point
        return (
            z.to(clean.dtype) if self.domains and isinstance(z, Tensor) and isinstance(clean, Tensor) else z
        )

    def under(self, rules: Sequence[Rule], *, uncovered: str = "error") -> Problem:
        """The problem with the derivative of matching operations replaced; scores stay as they are."""
        if uncovered not in ("error", "gradient"):
            raise MethodError(f'uncovered is "error" or "gradient", got {uncovered!r}.')
        return replace(self, rules=tuple(rules), uncovered=uncovered, memo=None, seen_from=None)

    def fresh(self, memo: dict[Any, Any] | None = None) -> Problem:
        """The same problem with its own record, sharing a memo of what other methods computed."""
        notes = {"notes": list(self.diagnostics.get("notes", []))}
        return replace(
            self,
            evaluations=torch.zeros_like(self.evaluations),
            diagnostics=notes,
            memo=memo,
            seen_from=None,
        )

    def evaluations_of_rows(self) -> Tensor:
        """How many gradients were evaluated for each row so far: (B,)."""
        return self.evaluations[self.examples * len(self.posed.targets) + self.asked]

    # what a method may ask

    def score(self, z: Point | None = None) -> Tensor:
        """One real number per row, (R,), float64 where the device has it; z has k·B rows, the point if left out."""
        if z is None and self.known_score is not None:
            return self.known_score
        z = self.point if z is None else z
        rows = self._require_shape(z, None)
        pieces = self._pieces(z, rows)
        return torch.cat([each for piece in pieces for each in self._in_halves(self._scores, *piece)])

    def grad(self, z: Point | None = None) -> Point:
        """The gradient of the score at z (k·B rows; the point if left out), same structure as z."""
        if z is None:
            return self.shared("gradient", lambda: self._grad(self.point))
        return self._grad(z)

    def score_and_grad(self, z: Point, index: Tensor) -> tuple[Tensor, Point]:
        """Scores (R,) and gradients of R rows, row r being about example ``index[r]``. Not divided into chunks."""
        examples, asked = self.examples[index], self.asked[index]
        self.evaluations.index_add_(0, examples * len(self.posed.targets) + asked, torch.ones_like(examples))
        # rules may need what a lean backward lets go of
        smallest = None if self.rules else self.resources.lean_from(len(index))
        lean = nullcontext() if smallest is None else lean_backward(smallest)
        with self.posed.lock, gradients_enabled(), lean:
            if not self.domains and not self.rules:
                return self.posed.gradients(z, examples, asked)
            return self._through(z, index)

    def grad_rows(self, z: Point, index: Tensor) -> Point:
        """Gradients of R rows at once, row r being about example ``index[r]``; in halves when memory runs out."""
        return self.evaluate_rows(z, index)[1]

    def shared(self, key: Any, compute: Callable[[], Result]) -> Result:
        """Compute once per problem when several methods ask for the same thing (``compare``)."""
        if self.memo is None:
            return compute()
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]  # type: ignore[no-any-return]

    def record(self, **facts: Any) -> None:
        """Leave facts about the result for its diagnostics."""
        self.diagnostics.update(facts)

    def note(self, text: str) -> None:
        """Leave a sentence for the reader of the result."""
        notes = self.diagnostics.setdefault("notes", [])
        if text not in notes:
            notes.append(text)

    # evaluation in chunks

    def chunk_rows(self) -> int:
        """How many rows the estimator should bring at once."""
        if self.posed.whole and self.resources.chosen is None and self.resources.budget is None:
            return self.batch
        row = sum(widest(leaf[:1]).nbytes for leaf in leaves(self.point))
        chosen = self.resources.rows(self.device, self._peak, row, HELD_COPIES * row * self.batch)
        return chosen * len(self.posed.targets)

    def _peak(self, rows: int) -> int:
        """The most bytes alive at once while evaluating this many rows, beyond what was there before."""
        uncounted = replace(self, evaluations=torch.zeros_like(self.evaluations))
        with PeakMeter() as meter:
            index = torch.zeros(rows, dtype=torch.long)
            uncounted.score_and_grad(take(self.point, index), index)
        return int(meter.peak)

    def _grad(self, z: Point) -> Point:
        rows = self._require_shape(z, None)
        pieces = [self.evaluate_rows(part, index)[1] for part, index in self._pieces(z, rows)]
        if len(pieces) == 1:
            return pieces[0]
        return map_leaves(lambda *parts: torch.cat(parts), *pieces)

    def _pieces(self, z: Point, rows: int) -> list[tuple[Point, Tensor]]:
        index = torch.arange(rows) % self.batch
        size = (
            rows if rows <= len(self.posed.targets) and self.resources.budget is None else self.chunk_rows()
        )
        parts = index.split(size)
        starts = torch.arange(rows).split(size)
        return [(take_slice(z, start), part) for start, part in zip(starts, parts, strict=True)]

    def evaluate_rows(self, z: Point, index: Tensor) -> tuple[Tensor, Point]:
        """Scores and gradients of rows, in halves when memory runs out."""
        parts = self._in_halves(self.score_and_grad, z, index)
        if len(parts) == 1:
            return parts[0]
        scores = torch.cat([scores for scores, _ in parts])
        return scores, map_leaves(lambda *grads: torch.cat(grads), *(gradient for _, gradient in parts))

    def _scores(self, z: Point, index: Tensor) -> Tensor:
        with self.posed.lock, torch.inference_mode(False), torch.no_grad():
            scores = self.posed.scores(self.synthesis(z, index), self.examples[index], self.asked[index])
        return widest(scores.detach())

    def _in_halves(
        self, evaluate: Callable[[Point, Tensor], Result], z: Point, index: Tensor
    ) -> list[Result]:
        """What ``evaluate`` gives for rows: in one part, or in halves of halves when memory runs out."""
        try:
            return [evaluate(z, index)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.resources.halve(len(index), error, len(self.posed.targets))
        # outside the handler, whose traceback keeps what the failed attempt allocated
        halves = torch.arange(len(index)).split(max(1, len(index) // 2))
        return [
            part for rows in halves for part in self._in_halves(evaluate, take_slice(z, rows), index[rows])
        ]

    def _domains_of(self, index: Tensor) -> tuple[Domain, ...]:
        """The domains for these rows: what a domain holds of each example follows the rows."""
        return tuple(domain_rows(domain, index) for domain in self.domains)

    def _through(self, z: Point, index: Tensor) -> tuple[Tensor, Point]:
        """Scores and gradients through a change of variable and under rules."""
        examples, asked = self.examples[index], self.asked[index]
        variables = map_leaves(lambda leaf: leaf.detach().clone().requires_grad_(), z)
        with self._overridden() as audited:
            # rules are the model's: the domain and the target keep their own derivatives
            with rules_paused():
                synthesis = self.synthesis(variables, index)
                outputs: list[Any] = []
                scores = self.posed.scores(synthesis, examples, asked, outputs.append)
            self.require_path(scores)
            audited(scores, outputs, synthesis)
            return scores.detach(), gradient_of(scores, variables, self.posed.site)

    def require_path(self, scores: Tensor) -> None:
        """Raise MethodError where the rules leave no way from the site to the scores."""
        if self.rules and not scores.requires_grad:
            raise MethodError(
                f'under these rules nothing leads from "{self.site}" to the score: they hold everything between '
                "constant, for example the softmax of a model that returns probabilities, a sigmoid as hidden "
                "activation or, at a query or key, the attention weights. Take the score before it, another site, "
                'attention="gradient", or put ShiftedIdentityRule(("sigmoid",)) before the preset.'
            )

    @contextmanager
    def _overridden(self) -> Any:
        if not self.rules:
            yield lambda scores, outputs, synthesis: None
            return
        module = self.posed.module
        if not isinstance(module, torch.nn.Module):
            raise MethodError("rules need a torch.nn.Module; a plain callable cannot be looked into.")
        with overrides(module, self.rules) as coverage:

            def audited(scores: Tensor, outputs: Any, synthesis: Point) -> None:
                uncovered = audit(scores, coverage, above=[*nested_tensors(outputs)], below=leaves(synthesis))
                if self.uncovered == "error":
                    texts = [repr(rule) for rule in self.rules]
                    named = ", ".join(texts) if len(texts) <= 3 else f"the {len(texts)} given"
                    require_covered(uncovered, named)
                unseen = [
                    {
                        "operation": each.operation,
                        "module": each.module_path,
                        "rule": GRADIENT,
                        "count": each.count,
                    }
                    for each in uncovered
                    if (each.operation, each.module_path) not in coverage.plain
                ]
                self.record(coverage=coverage.summary() + unseen)

            yield audited

    def _require_shape(self, z: Point, rows: int | None) -> int:
        given, wanted = leaves(z), leaves(self.point)
        count = len(given[0]) if given and given[0].dim() else 0
        right = rows == count if rows is not None else count > 0 and count % self.batch == 0
        if (
            not right
            or len(given) != len(wanted)
            or (isinstance(z, dict) and isinstance(self.point, dict) and z.keys() != self.point.keys())
            or any(a.shape[1:] != b.shape[1:] for a, b in zip(given, wanted, strict=True))
        ):

            def shapes(point: Point) -> Any:
                named = point.items() if isinstance(point, dict) else enumerate([point])
                each = {name: tuple(leaf.shape) for name, leaf in named}
                return each if isinstance(point, dict) else list(each.values())

            raise InputError(
                f"a value at the site {self.site!r} has shape {shapes(self.point)} "
                f"(or a multiple of {self.batch} rows), got {shapes(z)}."
            )
        return count


def take_slice(point: Point, rows: Tensor) -> Point:
    """Consecutive rows of a point, without a copy."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    return map_leaves(lambda leaf: leaf[first:last], point)
