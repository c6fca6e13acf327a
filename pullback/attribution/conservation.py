"""Where relevance goes: what constants absorb and nonlinear operations leak, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import MethodError
from ..core.overrides import Rule
from .implicit_bias.recording import pose_and_record

__all__ = ["Block", "ConservationReport", "conservation_report"]


@dataclass(frozen=True, eq=False)
class Block:
    """One block of modules: what its additive constants absorbed and what its other operations leaked, (B,)."""

    name: str
    absorbed: Tensor
    leaked: Tensor


@dataclass(frozen=True, eq=False)
class ConservationReport:
    """``score = input_share + Σ_blocks (absorbed + leaked) + residual`` for each example, all (B,).

    Attributes:
        score: the explained score.
        input_share: relevance that arrives at the site, ``Σ x ⊙ c``.
        blocks: in execution order; ``absorbed`` by biases, position tables and literals, and by the stabilisers of
            LRP's rules for linear layers; ``leaked`` at nonlinear operations whose derivative, or that of the rule
            for them, does not conserve (without rules, the biases of a fused recurrent kernel among them).
        residual: what is missing from the sum: rounding, or the operations in ``uncovered``.
        uncovered: operations that could not be looked into.
    """

    score: Tensor
    input_share: Tensor
    blocks: tuple[Block, ...]
    residual: Tensor
    uncovered: tuple[str, ...] = ()

    @property
    def absorbed(self) -> Tensor:
        """What all additive constants absorbed, (B,)."""
        return self._sum([block.absorbed for block in self.blocks])

    @property
    def leaked(self) -> Tensor:
        """What all other operations leaked, (B,)."""
        return self._sum([block.leaked for block in self.blocks])

    def _sum(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(parts)).sum(0) if parts else torch.zeros_like(self.score)

    def to_rows(self) -> list[dict[str, Any]]:
        """One record per example and block, and per example "input", "residual" and "score"."""
        rows: list[dict[str, Any]] = []
        for example in range(len(self.score)):
            parts = [("input", None, None, self.input_share)]
            parts += [(b.name, b.absorbed, b.leaked, b.absorbed + b.leaked) for b in self.blocks]  # type: ignore[misc]
            parts += [("residual", None, None, self.residual), ("score", None, None, self.score)]
            for name, absorbed, leaked, total in parts:
                rows.append(
                    {
                        "example": example,
                        "block": name,
                        "absorbed": None if absorbed is None else float(absorbed[example]),
                        "leaked": None if leaked is None else float(leaked[example]),
                        "total": float(total[example]),
                    }
                )
        return rows

    def __str__(self) -> str:
        rows = self.to_rows()
        width = max(len(str(row["block"])) for row in rows) + 2
        several = len(self.score) > 1
        lines = []
        for row in rows:
            if row["block"] == "input":
                head = f"example {row['example']}" if several else "block"
                lines.append(f"{head:<{width}}{'absorbed':>12}{'leaked':>12}{'total':>12}")
            cells = "".join(
                f"{'' if row[key] is None else format(row[key], '.4g'):>12}"
                for key in ("absorbed", "leaked", "total")
            )
            lines.append(f"{row['block']:<{width}}{cells}")
        if self.uncovered:
            lines.append(f"not looked into: {', '.join(self.uncovered)}")
        return "\n".join(lines)


def conservation_report(
    model: Callable[..., Any],
    inputs: Any,
    target: Any = None,
    rules: Sequence[Rule] = (),
    *,
    site: str | None = None,
    depth: int = 1,
    chunk: int | str = "auto",
    memory_budget: int | float | str | None = None,
    allow_train: bool = False,
) -> ConservationReport:
    """How much of a score reaches the input under these rules, and which blocks keep the rest.

    With ``b~ = y - Σ c_i x_i`` at every operation, c_i the coefficients its rule sends back, the shares add up to
    the score exactly: ``f = Σ x ⊙ c + Σ_v <δ_v, b~_v>``. Give the model and inputs in float64 for a sum to 1e-10.

    Args:
        model, inputs, target, site, chunk, memory_budget, allow_train: as for ``pullback.pose``.
        rules: a sequence of rules, for example a preset; empty is the gradient.
        depth: how many parts of a module's dotted path name its block.

    Returns:
        a :class:`ConservationReport`; print it, or take ``to_rows()``.

    Raises:
        MethodError: depth below 1, or a plain callable.

    Cost: one forward and one backward pass with copies of the operands of ruled operations.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> report = conservation_report(net, torch.ones(1, 2), target=0)
        >>> [block.name for block in report.blocks], float(report.leaked)
        (['0', '2'], 0.0)
    """
    if depth < 1:
        raise MethodError(f"depth counts parts of a module's path, at least 1, got {depth}.")
    _, recordings = pose_and_record(
        model,
        inputs,
        target,
        rules,
        lambda rows, grids: None,
        site=site,
        chunk=chunk,
        memory_budget=memory_budget,
        allow_train=allow_train,
    )
    score = torch.cat([each.score for each in recordings])
    absorbed: dict[str, Tensor] = {}
    leaked: dict[str, Tensor] = {}
    for recording in recordings:
        for each in recording.contributions:
            name = ".".join(each.module_path.split(".")[:depth]) or "(root)"
            for table, part in ((absorbed, each.constant), (leaked, each.curvature)):
                total = table.setdefault(name, torch.zeros_like(score))
                if part is not None:
                    total[recording.index.to(total.device)] += part.to(total)
    return ConservationReport(
        score,
        torch.cat([each.input_sum for each in recordings]),
        tuple(Block(name, absorbed[name], leaked[name]) for name in absorbed),
        torch.cat([each.residual() for each in recordings]),
        tuple(sorted({name for each in recordings for name in each.uncovered})),
    )
