"""Clean and corrupted runs of one model, on a private shadow: values at sites read, exchanged and differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from pullback.attribution.patching.exchange import Exchange
from pullback.attribution.patching.output_rows import completed, mapped, sliced
from pullback.core.audit import Coverage, audit, require_covered
from pullback.core.clean_pass import concatenated
from pullback.core.domain import domain_rows, enter
from pullback.core.edits import Edit, edit
from pullback.core.errors import MethodError, SiteError
from pullback.core.inputs import ModelInputs
from pullback.core.overrides import Rule, overrides, rules_paused, with_gradient_of
from pullback.core.points import take
from pullback.core.posed import gradients_enabled, kept_random_state
from pullback.core.resources import is_out_of_memory
from pullback.core.sites import Site
from pullback.core.targets import Resolved

__all__ = ["Change", "CounterfactualPair"]

Change: TypeAlias = "Callable[[Tensor], Tensor | None]"
Result = TypeVar("Result")


@dataclass(eq=False)
class CounterfactualPair:
    """A model with its two inputs of equal shapes, the metric fixed on the clean run, and what to read.

    ``origin`` is where the values that differ enter the model: the embeddings, or the floating inputs.
    ``per_row`` says that the metric reads each row by its example (target objects); a plain callable always gets
    the whole batch in order, because it may hold per-example answers.
    ``whole`` evaluates whole batches only, where rows depend on one another or on random draws.

    All but ``gradients`` is called under no_grad, as ``patching_scores`` does.
    """

    module: Callable[..., Any]
    clean: ModelInputs
    corrupted: ModelInputs
    sites: tuple[Site, ...]
    origin: tuple[Site, ...]
    metric: Resolved
    per_row: bool
    size: int
    whole: bool
    stochastic: bool
    generators: tuple[torch.Generator, ...]

    @property
    def batch(self) -> int:
        return self.clean.batch

    def run(self, read: ModelInputs, examples: Tensor, changes: Sequence[tuple[Site, Change]]) -> Any:
        """The output for rows of the inputs, every change applied to the value at its site."""
        replaced: dict[str, Tensor] = {}
        edits: list[tuple[Site, Edit]] = []
        ran: dict[Site, int] = {}

        def once(site: Site, change: Change) -> Edit:
            def apply(value: Tensor, call: int) -> Tensor | None:
                _require_value(site, value, len(examples))
                if site in ran and ran[site] != call:
                    raise SiteError(
                        f'"{site}" runs several times in one forward pass. Choose one call: "{site.path}@0", '
                        f'"{site.path}@1", ...'
                    )
                ran[site] = call
                return _through(site, change, examples)(value)

            return apply

        for site, change in changes:
            if site.kind != "input":
                edits.append((site, once(site, change)))
                continue
            name = str(site.leaf)
            value = replaced[name] if name in replaced else _taken(read.leaf[name], examples)
            changed = _through(site, change, examples)(value)
            replaced[name] = value if changed is None else changed
        args, kwargs = read.rows(examples, replaced)
        with ExitStack() as stack:
            if edits:
                assert isinstance(self.module, nn.Module)
                stack.enter_context(edit(self.module, edits))
            if self.stochastic:
                stack.enter_context(kept_random_state(0, self.generators))
            output = self.module(*args, **kwargs)
        for site, _ in changes:
            if site.kind != "input" and site not in ran:
                raise SiteError(
                    f'"{site}" never ran in this forward pass. Choose a module that the forward uses, and a call '
                    "counted from 0."
                )
        return output

    def values(self, read: ModelInputs) -> tuple[dict[Site, Tensor], Any]:
        """The values at all sites and at the origin, (B, ...), and the output of the whole batch."""
        wanted = tuple(dict.fromkeys((*self.origin, *self.sites)))
        found: dict[Site, list[Tensor]] = {site: [] for site in wanted}
        outputs: list[Any] = []

        def evaluate(rows: Tensor) -> tuple[dict[Site, Tensor], Any]:
            read_here: dict[Site, Tensor] = {}

            def reader(site: Site) -> Change:
                def keep(value: Tensor) -> None:
                    read_here[site] = value.detach().clone()

                return keep

            return read_here, self.run(read, rows, [(site, reader(site)) for site in wanted])

        for _, (values, output) in self.pieces(self.batch, evaluate):
            outputs.append(output)
            for site, value in values.items():
                found[site].append(value)
        return {site: torch.cat(parts) for site, parts in found.items()}, concatenated(outputs)

    def pieces(self, rows: int, evaluate: Callable[[Tensor], Result]) -> Iterator[tuple[Tensor, Result]]:
        """``evaluate`` for consecutive row numbers, as many at once as fit; fewer when memory runs out."""
        start, size = 0, self.batch if self.whole else self.size
        if size > self.batch:
            # whole batches where rows come batch after batch: a callable metric then needs no completion
            size -= size % self.batch
        while start < rows:
            part = torch.arange(start, min(rows, start + size))
            try:
                result = evaluate(part)
            except (RuntimeError, MemoryError) as error:
                if self.whole or size == 1 or not is_out_of_memory(error):
                    raise
                size = self.size = max(1, len(part) // 2)
                continue
            yield part, result
            start += len(part)

    def score(self, output: Any, examples: Tensor, reference: Any = None) -> Tensor:
        """The metric of every row, (R,); ``reference`` is a whole batch's output that completes a partial one."""
        if self.per_row:
            return self.metric.score(output, examples)
        every = torch.arange(self.batch)
        breaks = (examples[1:] <= examples[:-1]).nonzero()[:, 0] + 1
        bounds = [0, *breaks.tolist(), len(examples)]
        parts = []
        for start, stop in pairwise(bounds):
            rows = examples[start:stop]
            part = sliced(output, start, stop, len(examples))
            whole = part if len(rows) == self.batch else completed(part, reference, rows, self.batch)
            scores = self.metric.score(whole, every)
            parts.append(scores[rows.to(scores.device)])
        return torch.cat(parts)

    def patched(
        self, read: ModelInputs, reference: Any, examples: Tensor, at: Sequence[tuple[Site, Exchange]]
    ) -> Tensor:
        """The metric of rows that run ``read`` with entries exchanged, (R,)."""
        return self.score(self.run(read, examples, at), examples, reference)

    def gradients(
        self,
        read: ModelInputs,
        reference: Any,
        examples: Tensor,
        line: Mapping[Site, Tensor] | None = None,
        rules: Sequence[Rule] | None = None,
        uncovered: str = "error",
    ) -> dict[Site, Tensor]:
        """The gradient of each row's metric at every site, from one forward and one backward.

        ``line`` puts values (R, ...) at the origin instead of the run's own. Under ``rules`` the graph starts at the
        origin whatever sites are asked for, so that a product of two signals counts as one.
        """
        recorded: dict[Site, Tensor] = {}

        def record(site: Site) -> Change:
            def keep(value: Tensor) -> Tensor:
                kept = value.clone() if value.requires_grad else value.detach().clone().requires_grad_()
                recorded[site] = kept
                # a clone of the clone: a later in-place operation must not turn what was recorded into its result
                return kept.clone()

            return keep

        def put(value: Tensor) -> Change:
            def place(current: Tensor) -> Tensor:
                here = value.to(current.dtype)
                # what comes before (an image merged into the sequence) still receives its gradient
                return with_gradient_of(here, current) if current.requires_grad else start(here)

            return place

        def start(value: Tensor) -> Tensor:
            return value if value.requires_grad else value.detach().clone().requires_grad_().clone()

        changes: list[tuple[Site, Change]] = []
        if line is not None:
            changes += [(site, put(value)) for site, value in line.items()]
        elif rules is not None:
            changes += [(site, start) for site in self.origin]
        changes += [(site, record(site)) for site in self.sites]
        with gradients_enabled(), ExitStack() as stack:
            coverage: Coverage | None = None
            if rules is not None:
                if not isinstance(self.module, nn.Module):
                    raise MethodError("rules need a torch.nn.Module; a plain callable cannot be looked into.")
                coverage = stack.enter_context(overrides(self.module, rules))
            outputs, cotangents = self._pulled_metric(self.run(read, examples, changes), examples, reference)
            if coverage is not None and uncovered == "error":
                require_covered(audit(outputs, coverage), ", ".join(map(repr, rules or ())))
            found = torch.autograd.grad(outputs, list(recorded.values()), cotangents, allow_unused=True)
        return {
            site: torch.zeros_like(value) if part is None else part
            for (site, value), part in zip(recorded.items(), found, strict=True)
        }

    def _pulled_metric(
        self, output: Any, examples: Tensor, reference: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The output tensors that the metric reads, and its derivative there, taken outside the rules."""
        pairs: list[tuple[Tensor, Tensor]] = []

        def cut(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            leaf = tensor.detach().requires_grad_()
            pairs.append((tensor, leaf))
            return leaf

        with rules_paused():
            detached = mapped(output, cut)
            scores = self.score(detached, examples, reference)
            read = [leaf for _, leaf in pairs]
            if not scores.requires_grad:
                raise SiteError(
                    "the metric does not depend on any of the sites through differentiable operations: the forward or "
                    'the metric detaches it, or never uses them. Use method="exact", or choose other sites.'
                )
            found = torch.autograd.grad(scores.sum(), read, allow_unused=True)
        used = [(tensor, part) for (tensor, _), part in zip(pairs, found, strict=True) if part is not None]
        return [tensor for tensor, _ in used], [part for _, part in used]


def _through(site: Site, change: Change, examples: Tensor) -> Change:
    """A change of the site's coordinates as one of the model's value there.

    The value moves by the difference of two syntheses: unchanged coordinates leave it bit for bit, what the domain
    loses stays, and what comes before the site still receives its gradient.
    """
    if site.domain is None:
        return change
    given = domain_rows(site.domain, examples)

    def changed(value: Tensor) -> Tensor | None:
        with rules_paused():
            with torch.no_grad():
                domain, coefficients, _ = enter(given, value.detach())
                before = domain.synthesis(coefficients)
            after = change(coefficients)
            return None if after is None else value + (domain.synthesis(after) - before).to(value.dtype)

    return changed


def _require_value(site: Site, value: Tensor, rows: int) -> None:
    if not value.is_floating_point() and not value.is_complex():
        raise SiteError(f'the value at "{site}" is {value.dtype}; only floating values can be patched.')
    if value.dim() == 0 or len(value) != rows:
        raise SiteError(
            f'the value at "{site}" has shape {tuple(value.shape)}, expected {rows} rows first, one per example. '
            "Choose a module around it, before the batch is flattened or reordered."
        )


def _taken(leaf: Tensor, examples: Tensor) -> Tensor:
    taken = take(leaf, examples)
    assert isinstance(taken, Tensor)
    return taken.clone()
