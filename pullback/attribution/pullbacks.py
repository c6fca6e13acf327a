"""Excitation and semantic pullbacks: one backward pass through soft gates (arXiv 2507.22832, v1 to v4 and v5 to v6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core.audit import GRADIENT
from ..core.errors import MethodError
from ..core.overrides import Rule
from ..core.points import Point
from ..core.problem import Problem
from .rules.frozen import FrozenNorm, ValueAttention
from .rules.soft_gates import NormalGate, SigmoidGate, require_temperature
from .rules.soft_pool import SoftPool

__all__ = ["ExcitationPullback", "SemanticPullback"]

Padding = Literal["corrected", "faithful"]


@dataclass(frozen=True)
class ExcitationPullback:
    """The gradient with each ReLU's step replaced by σ(z/T) and each max pool by soft pooling; the score is untouched.

    Backward only: ReLU multiplies by σ(z/T), z its pre-activation (leaky_relu, prelu, relu6, hardtanh: see
    ``SigmoidGate``); max pooling passes on the derivative of Σ w u, w = softmax(u/T) over the window. Everything else
    keeps its gradient. T → 0 is the gradient; large T a net with ReLU → z/2 and average pooling.

    Args:
        temperature: T, in units of the pre-activations; one for all layers, 0.3 for every net of the paper, all of
            which have batch norm.
        pooling: "live", the derivative through w too (the paper); "detached"; None leaves max pooling as it is.
        padding: "corrected", padding takes no share of a max pool's gradient; "faithful", padding is 0 and absorbs
            some, as in the official code.
        absent: "error" or "gradient": what to do where neither a ReLU nor a max pool lies before the score, since the
            result then is the plain gradient.

    Call:
        problem -> (B, *S), signed, score units per unit of the value. ``rules`` are the rules, for use with others.

    Raises:
        MethodError: a parameter is out of range, or there is no ReLU and no max pool (``absent="error"``).

    Cost: one forward and one backward pass. Deterministic.

    Source: Pulling Back the Curtain on ReLU Networks, arXiv 2507.22832v4. Corrected padding: ours.

    Example:
        >>> import torch, pullback as pb
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        >>> pb.explain(net, torch.ones(1, 2), method=ExcitationPullback()).values.shape
        torch.Size([1, 2])
    """

    temperature: float = 0.3
    pooling: Literal["live", "detached"] | None = "live"
    padding: Padding = "corrected"
    absent: Literal["error", "gradient"] = "error"

    def __post_init__(self) -> None:
        if self.absent not in ("error", "gradient"):
            raise MethodError(f'absent is "error" or "gradient", got {self.absent!r}.')
        _ = self.rules  # the rules check their parameters

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of this pullback, for ``problem.under(method.rules, uncovered="gradient")``."""
        gate = SigmoidGate(self.temperature)
        if self.pooling is None:
            return (gate,)
        return gate, SoftPool(self.temperature, self.pooling, self.padding)

    def __call__(self, problem: Problem) -> Point:
        return modified_gradient(problem, self.rules, repr(self), self.absent)


@dataclass(frozen=True)
class SemanticPullback:
    """The gradient through soft gates: ReLU, SiLU, GELU, max pooling, norms and attention; the score is untouched.

    Backward only: ReLU Φ(z/τ), SiLU σ(z/τ), GELU Φ(z/τ); max pooling by softmax(u/τ), weights detached; layer norm
    diag(γ/σ), mean and variance constant; attention through its values alone, weights softmax(L/τ). Gates are never
    negative, so no τ gives GELU's or SiLU's own gradient. Nonlinear operations that the paper does not name, such as
    sigmoid, keep their gradient; ``coverage`` in the diagnostics lists both. Where none of these lies before the score
    the result is the plain gradient, and a note says so.

    Args:
        relu, silu, gelu: temperatures of the gates, in units of the pre-activation. Defaults as published (v5 code);
            the authors' ablation of August 2026 has relu=0.5, pool=0.5 for ResNets. Below relu=0.4 the result is
            sensitive: on their ResNet50 the infidelity is 26.7 at 0.3, 6.0 at 0.6.
        pool: temperature of max pooling.
        attention: temperature of the attention weights in the backward; 1 are the forward's. None leaves attention
            as it is.
        norms: "frozen", or "gradient" for the plain derivative of layer, group, instance and RMS norms.
        padding: as ``ExcitationPullback``.

    Call:
        problem -> (B, *S), signed, score units per unit of the value. ``rules`` are the rules, for use with others.

    Raises:
        MethodError: a parameter is out of range.

    Cost: one forward and one backward pass. Deterministic.

    Source: Pulling Back the Curtain on Deep Networks, arXiv 2507.22832v5, eq. 12 to 19, A.3, A.5. Corrected padding,
    value-only attention for every kind of attention, norms other than layer norm: ours.

    Example:
        >>> import torch, pullback as pb
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.GELU(), torch.nn.Linear(4, 1))
        >>> pb.explain(net, torch.ones(1, 2), method=SemanticPullback()).values.shape
        torch.Size([1, 2])
    """

    relu: float = 0.6
    silu: float = 1.6
    gelu: float = 1.0
    pool: float = 0.3
    attention: float | None = 1.0
    norms: Literal["frozen", "gradient"] = "frozen"
    padding: Padding = "corrected"

    def __post_init__(self) -> None:
        for name in ("relu", "silu", "gelu", "pool"):
            require_temperature(getattr(self, name), name)
        if self.attention is not None:
            require_temperature(self.attention, "attention")
        if self.norms not in ("frozen", "gradient"):
            raise MethodError(f'norms is "frozen" or "gradient", got {self.norms!r}.')
        _ = self.rules  # the rules check the rest

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of this pullback, for ``problem.under(method.rules, uncovered="gradient")``."""
        rules: list[Rule] = [
            NormalGate(self.relu),
            SigmoidGate(self.silu, "silu"),
            NormalGate(self.gelu, "gelu"),
            SoftPool(self.pool, "detached", self.padding),
        ]
        if self.norms == "frozen":
            rules.append(FrozenNorm())
        if self.attention is not None:
            rules.append(ValueAttention(self.attention))
        return tuple(rules)

    def __call__(self, problem: Problem) -> Point:
        return modified_gradient(problem, self.rules, repr(self), None)


def modified_gradient(problem: Problem, rules: tuple[Rule, ...], name: str, absent: str | None) -> Point:
    """The gradient under rules, with coverage recorded. ``absent``: an error, silence or a note (None)."""
    ruled = problem.under(rules, uncovered="gradient")
    gradient = ruled.grad()
    coverage = ruled.diagnostics.get("coverage", [])
    problem.record(coverage=coverage)
    if absent != "gradient" and all(each["rule"] == GRADIENT for each in coverage):
        plain = ", ".join(sorted({each["operation"] for each in coverage})) or "none"
        found = f"softens no operation between {problem.site!r} and the score (nonlinear operations there: {plain})"
        if absent == "error":
            raise MethodError(
                f"{name} {found}, so it would be the plain gradient. Use SemanticPullback() for GELU, SiLU, norms and "
                'attention, Gradient(), or absent="gradient" to have the gradient in that case.'
            )
        problem.note(f"{name} {found}: this is the plain gradient")
    return gradient
