"""What rules and decompositions do on one model of the zoo, in numbers.

Some models cast to float32 inside. ``WithoutFloat32`` is entered around each call: as the outer mode it receives what
the mode of the rules, innermost on the private shadow, passes on, so the shadow's forwards stay in float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import pullback as pb
from pullback.attribution.conservation import conservation_report
from pullback.attribution.fullgrad_terms import fullgrad_terms
from pullback.attribution.rules.presets import RELP
from pullback.core.inputs import nested_tensors
from pullback.core.overrides import Rule, overrides
from pullback.core.points import leaves, map_leaves
from pullback.core.posed import gradients_enabled
from pullback.core.problem import Problem
from tests.zoo.architectures import (
    ARCHITECTURES,
    Built,
    Inputs,
    WithoutFloat32,
    in_float64,
    target_of,
    with_attention,
)

__all__ = ["EXCEPTIONS", "Conservation", "Kind", "Measurement", "kind_of", "measure", "prepared"]

Kind = Literal["piecewise linear", "faint", "held", "hidden", "patch rows"]

# where something other than the rule holds: in which way, and why
EXCEPTIONS: dict[str, tuple[Kind, str]] = {
    **dict.fromkeys(
        ("resnet", "resnet_bottleneck", "plain_vgg", "plain_resnet", "plain_densenet", "plain_inception",
         "plain_squeezenet", "plain_shufflenet", "plain_unet"),
        ("piecewise linear", "only ReLU and max pooling: the plain gradient conserves"),
    ),
    "dpt": ("faint", "only 1e-9 of the score comes from the image, the rest from constants"),
    "patchtsmixer": ("faint", "only 1e-4 of the score comes from the series, the rest from constants"),
    "convolution_3d": ("held", "MethodError: a softplus as hidden activation is a gate, and nothing gets through"),
    "bloom": ("hidden", "FullGrad names GeLUFunction, a custom autograd.Function, as uncovered"),
    "recurrent_gemma": ("hidden", "FullGrad names SqrtBoundDerivative, a custom autograd.Function, as uncovered"),
    "qwen2_vl": ("patch rows", "IG and SmoothGrad need chunk=2: image patches are no rows of the batch"),
}  # fmt: skip


@dataclass(frozen=True)
class Conservation:
    """The score's account under RelP's rules, over all examples.

    Attributes:
        error: ``Σ |score - Σ relevance - absorbed|`` per ``Σ |score|``; relevance is what ``RelP()`` gives, absorbed
            what the report books to additive constants.
        leaked: what the report books to other operations, per relevance at the site.
        equal: whether every output is that without rules, bit for bit.
        rules: how many calls each rule handled, by its name.
    """

    error: float
    leaked: float
    equal: bool
    rules: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Measurement:
    """One model of the zoo.

    Attributes:
        built: under RelP as it is built, with fused attention (SDPA) where it has the choice; None where RelP raises.
        eager: with attention written out; None where the class offers no choice.
        refusal: the text of the error that RelP raises.
        gradient: as ``error``, for the plain gradient and the constants it leaves behind.
        gradient_leaked: as ``leaked``, for the plain gradient.
        fullgrad: residual of ``fullgrad_terms`` per sum of absolute terms.
        uncovered: operations that FullGrad names as unknown.
    """

    name: str
    built: Conservation | None
    eager: Conservation | None
    refusal: str | None
    gradient: float
    gradient_leaked: float
    fullgrad: float
    uncovered: tuple[str, ...]


def kind_of(name: str) -> Kind | None:
    """In which way the model is an exception."""
    return EXCEPTIONS[name][0] if name in EXCEPTIONS else None


def prepared(name: str) -> Built:
    """The entry in float64."""
    return in_float64(ARCHITECTURES[name]())


def measure(name: str, entry: Built | None = None) -> Measurement:
    """The figures of one model; ``entry`` is :func:`prepared` where the caller has it already."""
    model, inputs = prepared(name) if entry is None else entry
    other = with_attention(name, "eager")
    target = target_of(name)
    refusal, built, eager = None, None, None
    with WithoutFloat32():
        try:
            built = conservation(model, inputs, target)
            eager = None if other is None else conservation(*in_float64(other), target)
        except (pb.CoverageError, pb.MethodError) as error:
            refusal = f"{type(error).__name__}: {error}"
        plain = conservation_report(model, inputs, target)
        terms = fullgrad_terms(model, inputs, target)
    gap = total(plain.score - plain.input_share - plain.absorbed)
    sizes = [*terms.sums().values(), *(leaf.flatten(1).sum(1) for leaf in leaves(terms.input_term))]
    return Measurement(
        name=name,
        built=built,
        eager=eager,
        refusal=refusal,
        gradient=gap / total(plain.score),
        gradient_leaked=total(plain.leaked) / total(plain.input_share),
        fullgrad=total(terms.residual) / sum(map(total, sizes)),
        uncovered=terms.uncovered,
    )


def conservation(model: nn.Module, inputs: Inputs, target: Any) -> Conservation:
    """The account under RelP, and whether the rules leave every value alone."""
    problem = pb.pose(model, inputs, target=target)
    values = pb.RelP()(problem)
    relevance = torch.stack([leaf.flatten(1).sum(1) for leaf in leaves(values)]).sum(0)
    counts: Counter[str] = Counter()
    for entry in problem.diagnostics["coverage"]:
        counts[entry["rule"].split("(")[0]] += entry["count"]
    report = conservation_report(model, inputs, target, RELP)
    plain, ruled = outputs(problem, ()), outputs(problem, RELP)
    return Conservation(
        error=total(report.score - relevance - report.absorbed) / total(report.score),
        leaked=total(report.leaked) / total(report.input_share),
        equal=len(plain) == len(ruled) > 0 and all(map(torch.equal, plain, ruled)),
        rules=tuple(sorted(counts.items())),
    )


def outputs(problem: Problem, rules: Sequence[Rule]) -> list[Tensor]:
    """Every tensor the shadow gives, as for a derivative: from a leaf at the site that requires a gradient."""
    module = problem.posed.module
    assert isinstance(module, nn.Module)
    z = map_leaves(lambda leaf: leaf.detach().clone().requires_grad_(), problem.point)
    with gradients_enabled(), overrides(module, rules) if rules else nullcontext():
        output = problem.posed.output(z, problem.examples)
    return [each.detach() for each in nested_tensors(output)]


def total(values: Tensor) -> float:
    """The sum of absolute values."""
    return float(values.abs().sum())
