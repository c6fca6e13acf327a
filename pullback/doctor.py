"""The doctor: what a model is, which methods work and are exact on it, and what would stop them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pullback.attribution import METHODS
from pullback.core import errors
from pullback.core.operations import canonical
from pullback.core.points import leaves, map_leaves, total
from pullback.core.pose import pose, unsettled
from pullback.core.problem import Problem
from pullback.core.shadow import shadow

__all__ = ["Diagnosis", "Verdict", "diagnose"]

_KINKS = frozenset(
    ["relu", "relu6", "leaky_relu", "prelu", "rrelu", "threshold", "hardtanh", "hardsigmoid", "hardswish", "softshrink", "hardshrink", "selu", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"]
)
_SMOOTH = frozenset(
    ["gelu", "silu", "mish", "sigmoid", "tanh", "softplus", "logsigmoid", "elu", "celu", "glu", "softmax", "scaled_dot_product_attention", "layer_norm", "rms_norm", "group_norm", "instance_norm", "lstm", "gru", "rnn_tanh"]
)
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
    "InDomain": (None, "as the method inside"),
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
    """One method at the site: whether it works (None: not tried), whether its values add up exactly, and why."""

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
        a Diagnosis. What would stop ``explain`` is in ``obstacles``, in the words of the error; nothing is raised for it.

    Cost: a forward or two, and a few gradients of one example for each method.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> found = diagnose(net, torch.ones(1, 4))
        >>> found.ready, found.activations, found.site
        (True, ('relu',), 'input')
    """
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    watch = _Watch()
    problem, obstacles = None, []
    if inputs is not None:
        problem, obstacles = _tried(model, inputs, site, target, watch)
    elif isinstance(model, nn.Module):
        obstacles = _refused(lambda: shadow(model))
    train_mode = tuple(
        f"{path or 'the model'} {reason}"
        for path, module in modules.items()
        if (reason := _unsettled(module))
    )
    if train_mode and inputs is None:
        obstacles.append("the model is in train mode. Call model.eval() first, or pass allow_train=True.")
    names = watch.names | {name for module in modules.values() if (name := _operation(module))}
    kinks, smooth = names & _KINKS, names & _SMOOTH
    convergence = _RATES[bool(kinks), bool(smooth)]
    return Diagnosis(
        model=_class_name(model),
        parameters=sum(parameter.numel() for parameter in parameters),
        dtypes=_distinct(str(parameter.dtype).removeprefix("torch.") for parameter in parameters),
        devices=_distinct(str(parameter.device) for parameter in parameters),
        wrapping=_distinct(_wrappers(model, modules)),
        train_mode=train_mode,
        scripted=tuple(
            path or "the model"
            for path, module in modules.items()
            if isinstance(module, torch.jit.ScriptModule)
        ),
        reused=_distinct([*_registered_twice(model, "named_modules"), *(watch.repeated if problem else ())]),
        tied_parameters=_registered_twice(model, "named_parameters"),
        batch_norms=sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules.values()),
        attention=_attention(model, modules, watch.names),
        activations=tuple(sorted(kinks | smooth)),
        convergence=convergence,
        site=problem.site if problem is not None else site or _default_site(model),
        point=() if problem is None else tuple(tuple(leaf.shape) for leaf in leaves(problem.point)),
        tried=problem is not None,
        methods=tuple(_verdict(name, cls, problem, convergence) for name, cls in METHODS.items()),
        obstacles=tuple(dict.fromkeys(obstacles)),
    )


class _Watch(TorchFunctionMode):
    """Collects the names of the operations that run while it is entered, functional ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.repeated: tuple[str, ...] = ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (spelling := canonical(func)) is not None:
            self.names.add(spelling.name)
        return func(*args, **(kwargs or {}))


def _tried(
    model: Any, inputs: Any, site: str | None, target: Any, watch: _Watch
) -> tuple[Problem | None, list[str]]:
    """The posed problem and what stopped it or its gradient."""
    try:
        with watch:
            problem = pose(model, inputs, target=target, site=site)
        problem = problem.rows(torch.tensor([0]))
        watch.repeated = _repeated(problem)
    except _FAILURES as error:
        return None, [_said(error)]
    return problem, _refused(problem.grad)


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
        return Verdict(name, False, None, _said(error))
    if exact is None and isinstance(values, (Tensor, dict)):
        exact, measured = _adds_up(values, problem)
        remark = "; ".join(part for part in (remark, measured) if part)
    return Verdict(name, True, exact, remark)


def _adds_up(values: Any, problem: Problem) -> tuple[bool, str]:
    score = float(problem.score()[0])
    left = float(total(map_leaves(lambda leaf: leaf.double(), values))[0]) - score
    return abs(left) <= _TOLERANCE * max(
        abs(score), 1e-12
    ), f"here the sum misses the score {score:.4g} by {left:.2g}"


def _refused(work: Callable[[], Any]) -> list[str]:
    try:
        work()
    except _FAILURES as error:
        return [_said(error)]
    return []


def _said(error: Exception) -> str:
    name = type(error).__name__
    text = " ".join(str(error).split()) or "no message"
    return f"{name}: {text}" if hasattr(errors, name) else f"{name} in the model or the method: {text}"


def _unsettled(module: nn.Module) -> str | None:
    return unsettled(module) if module.training else None


def _operation(module: nn.Module) -> str | None:
    """The operation a module's class is named after: GELU, NewGELUActivation, LayerNorm, ..."""
    squeezed = {name.replace("_", ""): name for name in _KINKS | _SMOOTH}
    plain = type(module).__name__.lower().replace("activation", "").removeprefix("new").removeprefix("fast")
    if "norm" in plain:
        plain = next((kind for kind in ("layernorm", "rmsnorm", "groupnorm") if kind in plain), plain)
    return squeezed.get(plain)


def _class_name(model: Any) -> str:
    kind = model if isinstance(model, type) or not isinstance(model, nn.Module) else type(model)
    return getattr(kind, "__qualname__", type(model).__name__)


def _wrappers(model: Any, modules: dict[str, nn.Module]) -> Iterator[str]:
    for module in modules.values():
        lineage = {base.__name__ for base in type(module).__mro__}
        if "OptimizedModule" in lineage:
            yield "torch.compile"
        if getattr(module, "_compiled_call_impl", None) is not None:
            yield "torch.compile in place"
        yield from sorted(lineage & {"DataParallel", "DistributedDataParallel"})
        if lineage & {"FullyShardedDataParallel", "FSDPModule"}:
            yield "FSDP"
        if type(module).__module__.startswith("peft."):
            yield "PEFT"
        if hasattr(module, "_hf_hook"):
            yield "accelerate hooks"
    if hasattr(model, "_torchdynamo_orig_callable"):
        yield "torch.compile"


def _registered_twice(model: Any, listing: str) -> tuple[str, ...]:
    """Names under which one module or parameter is registered, joined, where there are several."""
    names: dict[int, list[str]] = {}
    if isinstance(model, nn.Module):
        for name, each in getattr(model, listing)(remove_duplicate=False):
            names.setdefault(id(each), []).append(name)
    return tuple(" = ".join(same) for same in names.values() if len(same) > 1)


def _attention(model: Any, modules: dict[str, nn.Module], names: set[str]) -> str | None:
    if found := getattr(getattr(model, "config", None), "_attn_implementation", None):
        return str(found)
    if "scaled_dot_product_attention" in names:
        return "scaled_dot_product_attention"
    return (
        "MultiheadAttention"
        if any(isinstance(each, nn.MultiheadAttention) for each in modules.values())
        else None
    )


def _default_site(model: Any) -> str:
    return "embeddings" if getattr(model, "main_input_name", None) == "input_ids" else "input"


def _distinct(names: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
