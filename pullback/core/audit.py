"""The audit: after a forward under rules, name every nonlinear step of the graph that no rule handled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from pullback.core.errors import CoverageError
from pullback.core.operations import GATES, LINEAR, PRODUCTS, node_operation

__all__ = [
    "GRADIENT",
    "Coverage",
    "Mark",
    "Uncovered",
    "audit",
    "flattened",
    "graph_nodes",
    "is_opaque",
    "require_covered",
    "write_mark",
    "written",
]

MARK: Final = "pullback"  # the key of our mark in a node's metadata
GRADIENT: Final = "gradient"

Kind = Literal["operation", "script", "function", "checkpoint", "compiled", "in-place"]
_WHAT: dict[Kind, str] = {
    "operation": "",
    "script": " (TorchScript: its operations cannot be seen)",
    "function": " (custom autograd.Function: its derivative cannot be seen)",
    "checkpoint": " (re-entrant checkpoint: use use_reentrant=False)",
    "compiled": ' (torch.compile: call it under torch.compiler.set_stance("force_eager"))',
    "in-place": " (an in-place write that no handler saw)",
}


@dataclass(frozen=True, eq=False)
class Mark:
    """Written on the autograd nodes of one call: which operation, where, and whether a rule handled it."""

    operation: str
    module_path: str
    covered: bool


class Coverage:
    """Counts of calls per (operation, module path, rule text), and of nonlinear calls left to the gradient.

    Only calls that something differentiates through are counted; recomputation in a backward pass is not.
    """

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self.intervals: list[tuple[int, int, str]] = []

    def count(self, operation: str, module_path: str, rule: str) -> None:
        if torch._C._current_autograd_node() is None:
            self._counts[operation, module_path, rule] += 1

    def module_at(self, sequence_number: int) -> str:
        """The path of the innermost module running when the node with this number was made, else ""."""
        around = [entry for entry in self.intervals if entry[0] <= sequence_number < entry[1]]
        return min(around, key=lambda entry: entry[1] - entry[0])[2] if around else ""

    @property
    def covered(self) -> dict[tuple[str, str, str], int]:
        """(operation, module path, rule text) -> calls handled by a rule."""
        return {key: count for key, count in self._counts.items() if key[2] != GRADIENT}

    @property
    def plain(self) -> dict[tuple[str, str], int]:
        """(operation, module path) -> nonlinear calls that no rule handled."""
        return {key[:2]: count for key, count in self._counts.items() if key[2] == GRADIENT}

    def summary(self) -> list[dict[str, str | int]]:
        """One JSON-able record per kind of call: operation, module, rule (or "gradient") and count."""
        return [
            {"operation": operation, "module": path, "rule": rule, "count": count}
            for (operation, path, rule), count in sorted(self._counts.items())
        ]


def flattened(value: Any) -> list[Any]:
    return (
        [item for entry in value for item in flattened(entry)]
        if isinstance(value, (list, tuple))
        else [value]
    )


def written(value: Any) -> list[Any]:
    """The tensors in ``value`` and those they are views of: a write through a view is theirs too."""
    found = flattened(value)
    return found + [item._base for item in found if isinstance(item, Tensor) and item._is_view()]


def write_mark(results: Any, mark: Mark, begin: int) -> None:
    """Write ``mark`` on every node made since ``begin`` that leads to ``results``."""
    pending: list[Any] = [tensor.grad_fn for tensor in results if isinstance(tensor, Tensor)]
    while pending:
        node = pending.pop()
        # a node without inputs is a leaf's accumulator, whose number is the largest there is
        if (
            node is None
            or not node.next_functions
            or node._sequence_nr() < begin
            or MARK in (metadata := node.metadata)
        ):
            continue
        metadata[MARK] = mark
        pending += [following for following, _ in node.next_functions]


@dataclass(frozen=True)
class Uncovered:
    """A nonlinear operation on the way to the output that no rule handled: its name, where, and how often."""

    operation: str
    module_path: str
    count: int
    kind: Kind = "operation"


def audit(
    output: Tensor | Sequence[Tensor],
    coverage: Coverage,
    *,
    above: Sequence[Tensor] | None = None,
    below: Sequence[Tensor] = (),
) -> tuple[Uncovered, ...]:
    """Every nonlinear step between ``output`` and its leaves that no rule handled, most frequent first.

    Linear steps, and products and quotients by a constant, are never named. Unknown steps are. Steps between
    ``output`` and the tensors ``above`` (a target's, on a model's outputs), and those before the tensors ``below`` (a
    domain's), are left out.

    >>> import torch; from pullback.core.overrides import overrides
    >>> with overrides(torch.nn.ReLU(), []) as coverage:
    ...     y = torch.ones(2, requires_grad=True).exp()
    >>> audit(y, coverage)
    (Uncovered(operation='exp', module_path='', count=1, kind='operation'),)
    """
    outputs = (output,) if isinstance(output, Tensor) else tuple(output)
    marks: set[Mark] = set()
    found: Counter[tuple[str, str, Kind]] = Counter()
    pending: list[Any] = [tensor.grad_fn for tensor in outputs]
    if above is not None:
        # where none of them is on the way (outputs in a class of the model's own), everything is audited
        pending = _reached([*pending], {tensor.grad_fn for tensor in above} - {None}) or pending
    for node in graph_nodes(pending, (tensor.grad_fn for tensor in below)):
        mark = node.metadata.get(MARK) if node.next_functions else None
        if isinstance(mark, Mark):
            if not mark.covered and mark not in marks:
                marks.add(mark)
                found[mark.operation, mark.module_path, "operation"] += 1
        elif (named := _nonlinear(node)) is not None:
            found[named[0], coverage.module_at(node._sequence_nr()), named[1]] += 1
    return tuple(Uncovered(name, path, count, kind) for (name, path, kind), count in found.most_common())


def _reached(pending: list[Any], wanted: set[Any]) -> list[Any]:
    """Which of the wanted nodes come first on the way from the pending ones to the leaves."""
    found: list[Any] = []
    seen: set[Any] = {None}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in wanted:
            found.append(node)
        else:
            pending += [following for following, _ in node.next_functions]
    return found


def is_opaque(output: Any, given: Any) -> bool:
    """Whether a tensor was computed from a given one of its shape by a step that no handler saw and that may bend."""
    if not (isinstance(output, Tensor) and isinstance(given, Tensor) and output.shape == given.shape):
        return False
    return any(
        MARK not in node.metadata and _nonlinear(node) is not None
        for node in graph_nodes([output.grad_fn], [given.grad_fn])
    )


def graph_nodes(starts: Iterable[Any], ends: Iterable[Any]) -> Iterator[Any]:
    """Every node from the starts towards the leaves, once each, up to the ends and without them."""
    pending = [*starts]
    seen = {None, *ends}  # holds the nodes: their Python faces are compared by identity
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        pending += [following for following, _ in node.next_functions]
        yield node


def _nonlinear(node: Any) -> tuple[str, Kind] | None:
    """The name and kind of a node that no handler marked, or None if it is linear."""
    name: str = node.name()
    if isinstance(node, BackwardCFunction):
        if name == "_GradientOfBackward":
            return None
        own = type(node).__name__.removesuffix("Backward")
        if own.startswith("CheckpointFunction"):
            return own, "checkpoint"
        return own, "compiled" if own.startswith("CompiledFunction") else "function"
    if "DifferentiableGraph" in name:
        return name, "script"
    if name.endswith("CopySlices"):
        return name, "in-place"
    if not node.next_functions:
        return None  # a leaf
    operation = node_operation(name)
    live = [following is not None for following, _ in node.next_functions]
    if operation in PRODUCTS:
        return (
            (operation, "operation")
            if sum(live[p] for p in PRODUCTS[operation] if p < len(live)) > 1
            else None
        )
    if operation in GATES:
        return (operation, "operation") if any(live[p] for p in GATES[operation] if p < len(live)) else None
    if operation.startswith(("batch_norm", "native_batch_norm_legit")):
        training = getattr(node, "_saved_training", "no_training" not in operation)
        return ("batch_norm", "operation") if training else None
    return None if operation in LINEAR else (operation, "operation")


def require_covered(uncovered: Sequence[Uncovered], rules_text: str) -> None:
    """Raise CoverageError, naming the operations, modules and counts, unless ``uncovered`` is empty.

    >>> require_covered([Uncovered("gelu", "mlp.act", 2)], "LRP()")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    pullback.core.errors.CoverageError: no rule of LRP() covers gelu in module 'mlp.act', 2 calls. ...
    """
    if not uncovered:
        return
    shown = [
        f"{entry.operation}{_WHAT[entry.kind]} in module {entry.module_path!r}, "
        f"{entry.count} call{'s' if entry.count > 1 else ''}"
        for entry in uncovered[:8]
    ]
    if len(uncovered) > len(shown):
        shown.append(f"and {len(uncovered) - len(shown)} more")
    raise CoverageError(
        f"no rule of {rules_text} covers {'; '.join(shown)}. Relevance through it would be silently wrong. "
        'Add a rule, or pass uncovered="gradient".'
    )
