"""The doctor: what a model is, which methods work and are exact on it, and what would stop them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pullback.attribution import METHODS
from pullback.attribution.relevance import rules_of
from pullback.core import errors
from pullback.core.audit import GRADIENT
from pullback.core.points import leaves, map_leaves, total
from pullback.core.pose import pose, unsettled
from pullback.core.problem import Problem
from pullback.core.shadow import shadow
from pullback.inspection import (
    KINKS,
    SMOOTH,
    OperationNames,
    attention,
    class_name,
    distinct,
    operation,
    registered_twice,
    wrappers,
)

__all__ = ["Diagnosis", "Verdict", "diagnose"]

_RATES = {
    (
        True,
        True,
    ): "its error falls about as 1/n in the number of steps n, since the derivative jumps at kinks",
    (True, False): "its error falls as 1/n in the number of steps n, since the model is piecewise linear",
    (False, True): "its error falls as 1/n² in the number of steps n, since the model is smooth",
    (False, False): "no activation was recognised; if the model is linear, one step is exact",
}
# What the values add up to, by method; whether that is exact. None: measured on the given inputs.
_PROMISES: dict[str, tuple[bool | None, str]] = {
    "Gradient": (False, "the exact derivative; it does not add up to the score"),
    "InputXGradient": (None, "adds up to the score only where the score is homogeneous of degree one"),
    "IntegratedGradients": (True, "adds up to score - score at the baseline"),
    "ExpectedGradients": (
        True,
        "adds up to score - mean score of the baselines in expectation; see standard_error",
    ),
    "SmoothGrad": (False, "an average over noise; see standard_error"),
    "VarGrad": (False, "a variance over noise; never negative, adds up to nothing"),
    "GradCAM": (False, "a map of one layer; adds up to nothing"),
    "LayerCAM": (False, "a map of one layer; adds up to nothing"),
    "Relevance": (None, 'adds up to the score less what biases absorb, with attention="detach"'),
    "LRP": (False, "conserves relevance but for what biases absorb; an operation without a rule raises"),
    "RelP": (None, "adds up to the score less what biases absorb: see conservation_report"),
    "CPLRP": (None, "adds up to the score less what biases absorb: see conservation_report"),
    "AttnLRP": (False, "the softmax keeps a part of the relevance; adds up to nothing"),
    "MambaLRP": (None, "adds up to the score less what biases absorb: see conservation_report"),
    "ExcitationPullback": (False, "a gradient through soft gates; it does not add up to the score"),
    "SemanticPullback": (False, "a gradient through soft gates; it does not add up to the score"),
    "PullbackAscent": (False, "a displacement in units of the value; adds up to nothing"),
    "InDomain": (None, "as the method inside"),
    "Captum": (False, "by default captum's Saliency, the unsigned gradient; adds up to nothing"),
    "RandomAttribution": (False, "a control that knows nothing of the model"),
    "EdgeDetector": (False, "a control that knows nothing of the model"),
}
_TOLERANCE = 1e-3
_FAILURES = (
    ValueError,
    RuntimeError,
    TypeError,
    NotImplementedError,
    ImportError,
    IndexError,
    KeyError,
    AttributeError,
)


@dataclass(frozen=True)
class Verdict:
    """One method at the site: does it work (None: not tried), do its values add up exactly, and why."""

    method: str
    works: bool | None
    exact: bool | None
    remark: str


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` found. ``print`` shows it; ``to_dict`` gives types JSON knows."""

    model: str
    parameters: int
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]
    wrapping: tuple[str, ...]
    train_mode: tuple[str, ...]
    scripted: tuple[str, ...]
    reused: tuple[str, ...]
    tied_parameters: tuple[str, ...]
    batch_norms: int
    attention: str | None
    activations: tuple[str, ...]
    convergence: str
    site: str
    point: tuple[tuple[int, ...], ...]
    tried: bool
    coverage: tuple[str, ...]
    methods: tuple[Verdict, ...]
    obstacles: tuple[str, ...]

    @property
    def ready(self) -> bool:
        """Whether nothing was found that stops ``explain``."""
        return not self.obstacles

    def to_dict(self) -> dict[str, Any]:
        """All fields as types JSON knows, and ``ready``."""
        return {**dataclasses.asdict(self), "ready": self.ready}

    def __str__(self) -> str:
        def row(name: str, found: Any, empty: str = "none") -> str:
            shown = ", ".join(map(str, found)) if isinstance(found, tuple) else found
            return f"  {name:<18}{shown or empty}"

        point = " and ".join(str(shape) for shape in self.point)
        lines = [
            f"{self.model}: {self.parameters:,} parameters in {', '.join(self.dtypes) or 'no dtype'} "
            f"on {', '.join(self.devices) or 'no device'}",
            row("wrapped by", self.wrapping, "nothing"),
            row("train mode", self.train_mode, "no problem"),
            row("scripted", self.scripted),
            row("runs repeatedly", self.reused, "none" if self.tried else "none registered twice"),
            row("tied parameters", self.tied_parameters),
            row("batch norms", str(self.batch_norms)),
            row("attention", self.attention),
            row("activations", self.activations, "none recognised"),
            row("path methods", self.convergence),
            row("rules of RelP()", self.coverage, "not tried"),
            row("default site", self.site + (f", value of shape {point}" if point else "")),
            "  methods" + ("" if self.tried else " (not tried: give inputs to try each at low cost)"),
        ]
        for verdict in self.methods:
            works = {True: "works", False: "no", None: "-"}[verdict.works]
            exact = {True: "exact", False: "", None: "?"}[verdict.exact]
            lines.append(f"    {verdict.method:<20}{works:<7}{exact:<7}{verdict.remark}")
        lines += [f"  stops: {obstacle}" for obstacle in self.obstacles] or [
            "  nothing found that stops explain()"
        ]
        return "\n".join(lines)


def diagnose(
    model: Callable[..., Any], inputs: Any = None, *, site: str | None = None, target: Any = None
) -> Diagnosis:
    """Examine a model, and with inputs try every method at low cost on their first example.

    Args:
        model: an ``nn.Module`` or callable; it is left as it was.
        inputs: as for ``explain``; None examines the modules alone.
        site, target: as for ``explain``; None are the defaults.

    Returns:
        a Diagnosis. What would stop ``explain`` is in ``obstacles``, in the words of the error; nothing is
        raised for it.

    Cost: a forward or two, and a few gradients of one example for each method.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> found = diagnose(net, torch.ones(1, 4))
        >>> found.ready, found.activations, found.site
        (True, ('relu',), 'input')
    """
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    seen = OperationNames()
    problem: Problem | None = None
    repeated: tuple[str, ...] = ()
    obstacles: list[str] = []
    if inputs is not None:
        problem, repeated, obstacles = _tried(model, inputs, site, target, seen)
    elif isinstance(model, nn.Module):
        obstacles = _refused(lambda: shadow(model))
    train_mode = tuple(
        f"{path or 'the model'} {reason}"
        for path, module in modules.items()
        if (reason := _unsettled(module))
    )
    if train_mode and inputs is None:
        obstacles.append("the model is in train mode. Call model.eval() first, or pass allow_train=True.")
    names = seen.names | {name for module in modules.values() if (name := operation(module))}
    kinks, smooth = names & KINKS, names & SMOOTH
    convergence = _RATES[bool(kinks), bool(smooth)]
    return Diagnosis(
        model=class_name(model),
        parameters=sum(parameter.numel() for parameter in parameters),
        dtypes=distinct(str(parameter.dtype).removeprefix("torch.") for parameter in parameters),
        devices=distinct(str(parameter.device) for parameter in parameters),
        wrapping=distinct(wrappers(model, modules)),
        train_mode=train_mode,
        scripted=tuple(
            path or "the model"
            for path, module in modules.items()
            if isinstance(module, torch.jit.ScriptModule)
        ),
        reused=distinct([*registered_twice(model, "named_modules"), *repeated]),
        tied_parameters=registered_twice(model, "named_parameters"),
        batch_norms=sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules.values()),
        attention=attention(model, modules, seen.names),
        activations=tuple(sorted(kinks | smooth)),
        convergence=convergence,
        site=problem.site if problem is not None else site or _default_site(model),
        point=() if problem is None else tuple(tuple(leaf.shape) for leaf in leaves(problem.point)),
        tried=problem is not None,
        coverage=() if problem is None else _coverage(problem),
        methods=tuple(_verdict(name, cls, problem, convergence) for name, cls in METHODS.items()),
        obstacles=tuple(dict.fromkeys(obstacles)),
    )


def _tried(
    model: Any, inputs: Any, site: str | None, target: Any, seen: OperationNames
) -> tuple[Problem | None, tuple[str, ...], list[str]]:
    """The first example's problem, modules that ran several times, and what stopped it or its gradient."""
    try:
        with seen:
            whole = pose(model, inputs, target=target, site=site)
        problem = whole.rows(torch.tensor([0]))
        return problem, _repeated(problem), _refused(problem.grad)
    except _FAILURES as error:
        return None, (), [_said(error)]


def _repeated(problem: Problem) -> tuple[str, ...]:
    """Modules that run several times in one forward, counted by hooks on the private shadow."""
    module = problem.posed.module
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        return ()
    counts: Counter[str] = Counter()

    def counted(path: str) -> Callable[..., None]:
        return lambda *_: counts.update([path])

    handles = [
        each.register_forward_pre_hook(counted(path))
        for path, each in module.named_modules()
        if path and not isinstance(each, torch.jit.ScriptModule)
    ]
    try:
        problem.score(problem.point)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(
        f'{path} ({count} times: sites "{path}@0"...)' for path, count in counts.items() if count > 1
    )


def _verdict(name: str, cls: type[Any], problem: Problem | None, convergence: str) -> Verdict:
    exact, remark = _PROMISES.get(name, (None, ""))
    if name == "IntegratedGradients":
        remark = f"{remark}; {convergence}"
    required = [
        field.name
        for field in dataclasses.fields(cls)
        if field.init
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if required:
        return Verdict(name, None, exact, f"needs {', '.join(required)}; {remark}".rstrip("; "))
    if problem is None:
        return Verdict(name, None, exact, remark)
    method = cls()
    cheap = {field.name: 2 for field in dataclasses.fields(cls) if field.name in ("steps", "samples")}
    try:
        values = dataclasses.replace(method, **cheap)(problem.fresh())
    except _FAILURES as error:
        return Verdict(name, False, False, _said(error))
    if exact is None and isinstance(values, (Tensor, dict)):
        exact, measured = _adds_up(values, problem)
        remark = "; ".join(part for part in (remark, measured) if part)
    return Verdict(name, True, exact, remark)


def _coverage(problem: Problem) -> tuple[str, ...]:
    """What RelP's rules do with each kind of operation here, most frequent first; the plain gradient says where."""
    ruled = problem.fresh().under(rules_of("relp"), uncovered="gradient")
    refused = _refused(ruled.grad)
    if refused:
        return tuple(refused)
    kinds: Counter[str] = Counter()
    for entry in ruled.diagnostics.get("coverage", ()):
        rule = f"{entry['rule']}".split("(")[0]
        place = f"the plain gradient in {entry['module']!r}" if rule == GRADIENT else rule
        kinds[f"{entry['operation']} by {place}"] += entry["count"]
    return tuple(f"{text} ({count})" for text, count in kinds.most_common()) or ("nothing to act on",)


def _adds_up(values: Any, problem: Problem) -> tuple[bool, str]:
    """Whether the values sum to the score here, and by how much they miss it."""
    score = float(problem.score()[0])
    missed = float(total(map_leaves(lambda leaf: leaf.double(), values))[0]) - score
    exact = abs(missed) <= _TOLERANCE * max(abs(score), 1e-12)
    return exact, f"here the sum misses the score {score:.4g} by {missed:.2g}"


def _refused(work: Callable[[], Any]) -> list[str]:
    try:
        work()
    except _FAILURES as error:
        return [_said(error)]
    return []


def _said(error: Exception) -> str:
    name = type(error).__name__
    text = " ".join(str(error).split()) or "no message"
    return text if hasattr(errors, name) else f"{name} in the model or the method: {text}"


def _unsettled(module: nn.Module) -> str | None:
    return unsettled(module) if module.training else None


def _default_site(model: Any) -> str:
    return "embeddings" if getattr(model, "main_input_name", None) == "input_ids" else "input"
