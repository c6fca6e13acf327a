"""Relevance propagation: input times gradient under rules. LRP, RelP, CP-LRP, AttnLRP and MambaLRP are presets of it.

Some uses of layer-wise relevance propagation may be subject to patents.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..core.errors import MethodError
from ..core.overrides import Rule
from ..core.points import Point, contract, map_leaves
from ..core.problem import Problem
from .rules.gates import ConstantModule
from .rules.presets import PRESETS, registered_rules, require_consistent, with_attention

__all__ = ["CPLRP", "LRP", "AttnLRP", "MambaLRP", "RelP", "Relevance", "rules_of"]


def rules_of(rules: str | Sequence[Rule], attention: str | None = None) -> tuple[Rule, ...]:
    """The rules that a preset's name or a sequence of rules means, with the chosen way through attention.

    Raises MethodError for an unknown preset or attention, an unknown operation, or rules that contradict one another.
    """
    if isinstance(rules, str):
        if rules not in PRESETS:
            near = difflib.get_close_matches(rules, PRESETS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise MethodError(f"rules {rules!r} is no preset. Choose one of {', '.join(PRESETS)}.{hint}")
        rules = PRESETS[rules]
    chosen = with_attention(rules, attention)
    require_consistent(chosen)
    return chosen


@dataclass(frozen=True)
class Relevance:
    """The value at the site times its propagation coefficient: the derivative of the score under rules.

    ``R = x ⊙ ρ``, ρ = ∂f/∂x with each operation's derivative replaced by its rule's. Where the rules make the model
    homogeneous of degree one, R sums to the score less what biases and other additive constants absorb:
    ``conservation_report`` shows where. An operation without a rule raises, since relevance through it would be
    silently wrong.

    Args:
        rules: a preset's name ("relp", "relp_without_attention", "lrp", "cp_lrp", "attnlrp", "mambalrp") or a tuple of
            rules, asked in order.
        attention: "detach" (weights are constant; conserves), "gradient", "attnlrp", or None: as the rules say.
        uncovered: "error", or "gradient" to take the ordinary gradient where no rule acts, which is recorded.

    Call:
        problem -> (B, *S), score units. Diagnostics ``coverage`` counts what each rule handled and what was left to the
        gradient.

    Raises:
        MethodError: rules that are unknown, contradict one another, or name modules that the model does not have.
        CoverageError: a nonlinear operation that no rule covers.

    Cost: one forward and one backward pass, 1.0 to 1.1 times plain ones. Deterministic.

    Source: Bach et al. 2015; Ali et al. 2022; in gradient form as in Shrikumar et al. 2016.

    Example:
        >>> import torch, pullback as pb
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.GELU(), nn.Linear(3, 1, bias=False))
        >>> a = pb.explain(net, torch.ones(1, 2), method=Relevance("relp"))
        >>> bool((a.values.sum() - a.score).abs() < 1e-6)
        True
    """

    rules: str | tuple[Rule, ...] = "relp"
    attention: str | None = None
    uncovered: str = "error"

    def __post_init__(self) -> None:
        rules_of(self.rules, self.attention)
        if self.uncovered not in ("error", "gradient"):
            raise MethodError(f'uncovered is "error" or "gradient", got {self.uncovered!r}.')

    def __call__(self, problem: Problem) -> Point:
        return relevance(problem, rules_of(self.rules, self.attention), self.uncovered)


def relevance(problem: Problem, rules: Sequence[Rule], uncovered: str) -> Point:
    """The point times its coefficient under rules; says so where no rule acted."""
    _require_modules(problem.posed.module, rules)
    ruled = problem.under((*registered_rules(), *rules), uncovered=uncovered)
    values = map_leaves(contract, ruled.grad(), ruled.point)
    acted = any(entry["rule"] != "gradient" for entry in ruled.diagnostics.get("coverage", ()))
    if not acted:
        problem.note(
            "no rule had anything to act on: the model is linear, and this is its input times gradient"
        )
    return values


def _require_modules(module: Any, rules: Sequence[Rule]) -> None:
    if not isinstance(module, nn.Module):
        return
    named = {name: type(child).__name__ for name, child in module.named_modules()}
    texts = {*named, *named.values()}
    for rule in rules:
        if rule.within is not None and not any(fnmatchcase(text, rule.within) for text in texts):
            last = rule.within.replace("*", "").split(".")[-1]
            near = difflib.get_close_matches(last, {text.split(".")[-1] for text in texts}, n=3)
            hint = f"; it has {', '.join(near)}" if near else ""
            raise MethodError(
                f"{rule!r} is for modules matching {rule.within!r}, and {type(module).__name__} has none{hint}. "
                "Give a pattern on a module's path or class, or another preset."
            )


@dataclass(frozen=True)
class LRP:
    """Layer-wise relevance propagation for convolutional networks: z+ in convolutions, epsilon in dense layers.

    ``Relevance("lrp")``; batch norm is merged into the convolution before it, all else follows the rules of RelP.

    Args:
        attention, uncovered: as in :class:`Relevance`.

    Call:
        problem -> (B, *S), score units.

    Raises:
        CoverageError: a nonlinear operation that no rule covers.

    Cost: one forward and one backward pass, with two to four times the work in convolutions. Deterministic.

    Source: Bach et al. 2015, eqs. 56 and 58; Montavon et al. 2017 (z+); the composite of Kohlbrenner et al. 2020. Some
    uses may be subject to patents.

    Example:
        >>> import torch, pullback as pb
        >>> pb.explain(torch.nn.Linear(2, 1), torch.ones(1, 2), method=LRP()).values.shape
        torch.Size([1, 2])
    """

    attention: str | None = None
    uncovered: str = "error"

    def __call__(self, problem: Problem) -> Point:
        return relevance(problem, rules_of("lrp", self.attention), self.uncovered)


@dataclass(frozen=True)
class RelP:
    """Relevance patching's rules: activation times coefficient, for any architecture.

    Norms with constant spread, activations by the identity rule, half to each factor of a product, attention weights
    constant. The only preset that conserves relevance on transformers. The paper's score is (clean - corrupted)
    activation times coefficient: that is ``patching_scores(..., method="relp")``.

    Args:
        attention, uncovered: as in :class:`Relevance`.

    Call:
        problem -> (B, *S), score units.

    Raises:
        CoverageError: a nonlinear operation that no rule covers.

    Cost: one forward and one backward pass. Deterministic.

    Source: Jafari et al. 2025 (RelP). Difference: its published code drops the identity rule when set up after loading,
    and attention's by default; both act here.

    Example:
        >>> import torch, pullback as pb
        >>> pb.explain(torch.nn.Linear(2, 1), torch.ones(1, 2), method=RelP()).values.shape
        torch.Size([1, 2])
    """

    attention: str | None = None
    uncovered: str = "error"

    def __call__(self, problem: Problem) -> Point:
        return relevance(problem, rules_of("relp", self.attention), self.uncovered)


@dataclass(frozen=True)
class CPLRP:
    """Conservative propagation: as RelP, but a gated product gives all relevance to the factor that is not activated.

    Args:
        attention, uncovered: as in :class:`Relevance`.

    Call:
        problem -> (B, *S), score units.

    Raises:
        CoverageError: a nonlinear operation that no rule covers.

    Cost: one forward and one backward pass. Deterministic.

    Source: Ali et al. 2022, eqs. 8 and 11.

    Example:
        >>> import torch, pullback as pb
        >>> pb.explain(torch.nn.Linear(2, 1), torch.ones(1, 2), method=CPLRP()).values.shape
        torch.Size([1, 2])
    """

    attention: str | None = None
    uncovered: str = "error"

    def __call__(self, problem: Problem) -> Point:
        return relevance(problem, rules_of("cp_lrp", self.attention), self.uncovered)


@dataclass(frozen=True)
class AttnLRP:
    """AttnLRP: as RelP, but relevance also flows through the attention weights to queries and keys. Does not conserve.

    Args:
        uncovered: as in :class:`Relevance`.

    Call:
        problem -> (B, *S), score units.

    Raises:
        CoverageError: a nonlinear operation that no rule covers.

    Cost: one forward and one backward pass. Deterministic.

    Source: Achtibat et al. 2024, eqs. 8 to 15.

    Example:
        >>> import torch, pullback as pb
        >>> pb.explain(torch.nn.Linear(2, 1), torch.ones(1, 2), method=AttnLRP()).values.shape
        torch.Size([1, 2])
    """

    uncovered: str = "error"

    def __call__(self, problem: Problem) -> Point:
        return relevance(problem, rules_of("attnlrp"), self.uncovered)


@dataclass(frozen=True)
class MambaLRP:
    """LRP for selective state-space models: as RelP, with the parameters of the scan constant.

    Args:
        constant: fnmatch patterns of modules whose outputs are constant; the projection to step size, input and output
            matrices in Mamba, FalconMamba and Jamba. Mamba-2 has none of its own: use ``RelP()``.
        attention, uncovered: as in :class:`Relevance`.

    Call:
        problem -> (B, *S), score units.

    Raises:
        MethodError: a pattern that no module matches.
        CoverageError: a nonlinear operation that no rule covers.

    Cost: one forward and one backward pass. Deterministic.

    Source: Jafari et al. 2024 (MambaLRP), section 4.

    Example:
        >>> import torch, pullback as pb
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.SiLU())
        >>> pb.explain(net, torch.ones(1, 2), method=MambaLRP(constant=())).values.shape
        torch.Size([1, 2])
    """

    constant: tuple[str, ...] = ("*x_proj",)
    attention: str | None = None
    uncovered: str = "error"

    def __call__(self, problem: Problem) -> Point:
        held = tuple(ConstantModule(pattern) for pattern in self.constant)
        return relevance(problem, (*held, *rules_of("relp", self.attention)), self.uncovered)
