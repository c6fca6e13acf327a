"""Any attribution class of captum as one of our methods, which never meets the user's model."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import errors
from ..core.errors import MethodError, nearest
from ..core.points import Point, leaves, map_leaves, take, total
from ..core.posed import gradients_enabled, kept_random_state
from ..core.problem import Problem, take_slice
from ..core.resources import is_out_of_memory
from .baselines import Dataset, Given, baseline_point
from .captum_scores import ScoreModule, reached, score_function
from .integrated_gradients import change_of_score

__all__ = ["Captum"]

# methods that hook activation modules and so need an nn.Module
HOOKED = frozenset({"DeepLift", "DeepLiftShap", "Deconvolution", "GuidedBackprop", "GuidedGradCam", "LRP"})
# methods that treat the rows of a batch one by one and expand none; all others get one example at a time
ROW_WISE = frozenset(
    {
        "Deconvolution",
        "DeepLift",
        "FeatureAblation",
        "GuidedBackprop",
        "GuidedGradCam",
        "InputXGradient",
        "LRP",
    }
    | {"Occlusion", "Saliency"}
)
COMPLETE = frozenset({"DeepLift", "IntegratedGradients"})
# set from the problem or from fields of their own
SET_ELSEWHERE = {
    "inputs": "the inputs of explain()",
    "target": "target= of explain()",
    "baselines": "baseline=",
    "additional_forward_args": "the inputs of explain()",
    "return_convergence_delta": "diagnostics['gap'] of the result",
    "forward_func": "the model of explain()",
    "model": "the model of explain()",
}
OURS = tuple(getattr(errors, name) for name in errors.__all__ if name.endswith("Error"))
# captum draws from the global generators and warns about hooks, so it runs alone
_ALONE = threading.RLock()


@dataclass(frozen=True)
class Captum:
    """Any attribution class of captum, at any site, on any score: captum's method, our inputs and targets.

    The user's model is never hooked, its parameters are constants, and the global random state is kept. Batch
    mates do not change results, except FeaturePermutation's, which permutes the batch.

    Args:
        name: a class of ``captum.attr``, such as "DeepLift"; case and underscores do not matter.
        parameters: what its constructor and its ``attribute`` take, by name; plain values or tensors.
            A ``layer`` (GuidedGradCam) is a path, NoiseTunnel's ``attribution_method`` a name.
        baseline: as of ``IntegratedGradients``; ``Dataset(values)`` for GradientShap and DeepLiftShap.
        seed: for classes that draw; every example gets the same draws.

    Call:
        problem -> (B, *S), in captum's units for the class.

    Raises:
        MethodError: the class or a parameter is unknown, or captum refuses.

    Cost: as captum's; in chunks of the problem's own size.

    Source: Kokhlikyan et al. 2020, Captum: A unified model interpretability library for PyTorch.

    Example:
        >>> import torch, pullback as pb
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> pb.explain(net, torch.ones(1, 2), method=Captum("DeepLift")).values.shape
        torch.Size([1, 2])
    """

    name: str = "Saliency"
    parameters: Any = ()
    baseline: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", canonical(self.name))
        object.__setattr__(self, "parameters", plain_pairs(self.parameters))
        given = dict(self.parameters)
        allowed = accepted(self.name) | (
            accepted(canonical(self._tunnelled)) if self.name == "NoiseTunnel" else set()
        )
        for key in given:
            if key in SET_ELSEWHERE:
                raise MethodError(f"captum's {key} is not a parameter here: use {SET_ELSEWHERE[key]}.")
            if key not in allowed:
                known = sorted(allowed - SET_ELSEWHERE.keys())
                raise MethodError(
                    f"captum's {self.name} has no parameter {key!r}. Nearest: {nearest(key, known)}. "
                    f"It has: {', '.join(known) or 'none'}."
                )
        if self.baseline is not None and "baselines" not in allowed:
            raise MethodError(f"captum's {self.name} takes no baseline; leave baseline= out.")

    @property
    def _tunnelled(self) -> str:
        return str(dict(self.parameters).get("attribution_method", "Saliency"))

    @property
    def _hooked(self) -> bool:
        return self.name in HOOKED or (self.name == "NoiseTunnel" and canonical(self._tunnelled) in HOOKED)

    @property
    def _distribution(self) -> bool:
        return self.name in ("DeepLiftShap", "GradientShap") and isinstance(self.baseline, Dataset)

    def __call__(self, problem: Problem) -> Point:
        if any(leaf.is_complex() for leaf in leaves(problem.point)):
            raise MethodError(
                f"captum has no complex numbers; {self.name} cannot explain complex coefficients."
            )
        reference = self._reference(problem)
        active = reached(problem, self.name) if self._hooked else ()
        with _ALONE, gradients_enabled(), quiet():
            parts = [self._attribute(problem, rows, reference, active) for rows in self._slices(problem)]
        values = map_leaves(lambda *found: torch.cat(found), *parts) if len(parts) > 1 else parts[0]
        if (
            self.name in COMPLETE
            and dict(self.parameters).get("multiply_by_inputs", True)
            and reference is not None
        ):
            problem.record(gap=total(values) - change_of_score(problem, reference))
        if self._hooked:
            problem.note(
                f"captum's {self.name} sees activations that are modules; functional ones pass their gradient"
            )
        return values

    def _slices(self, problem: Problem) -> tuple[Tensor, ...]:
        rows = torch.arange(problem.batch)
        if self.name == "FeaturePermutation":
            return (rows,)
        # DeepLift brings each row with its baseline
        return torch.split(rows, max(1, problem.chunk_rows() // 2) if self.name in ROW_WISE else 1)

    def _reference(self, problem: Problem) -> Point | None:
        """One baseline per example, or the rows of a Dataset, or None where the class takes none."""
        name = canonical(self._tunnelled) if self.name == "NoiseTunnel" else self.name
        if "baselines" not in accepted(name):
            return None
        if self._distribution:
            if not isinstance(problem.point, Tensor):
                raise MethodError("a Dataset has rows of one input; choose one leaf, for example with site=.")
            return problem.analysis(self.baseline.values.to(problem.point))
        return baseline_point(self.baseline, problem)

    def _attribute(
        self, problem: Problem, rows: Tensor, reference: Point | None, active: tuple[str, ...]
    ) -> Point:
        """captum on some examples of the problem."""
        cls, given = classes()[self.name], dict(self.parameters)
        function = ScoreModule(problem, rows, active) if self._hooked else score_function(problem, rows)
        if self.name == "NoiseTunnel":
            inner = classes()[canonical(self._tunnelled)]
            function = inner(function, **chosen(inner.__init__, given, function))
            given.pop("attribution_method", None)
        engine = cls(function, **chosen(cls.__init__, given, function))
        settings = chosen(cls.attribute, given, function)
        if self.name == "NoiseTunnel":
            settings |= chosen(classes()[canonical(self._tunnelled)].attribute, given, function)
        if reference is not None:
            settings["baselines"] = tuple(leaves(reference if self._distribution else take(reference, rows)))
        point = map_leaves(lambda leaf: leaf.detach().clone(), take_slice(problem.point, rows))
        if not is_perturbing(cls):
            point = map_leaves(torch.Tensor.requires_grad_, point)
        try:
            with random_state(self.seed):
                found = engine.attribute(tuple(leaves(point)), additional_forward_args=rows, **settings)
        except Exception as error:
            if isinstance(error, (*OURS, MemoryError)) or is_out_of_memory(error):
                raise
            raise MethodError(f"captum's {self.name} refuses: {type(error).__name__}: {error}") from error
        parts = iter(found)
        values = map_leaves(lambda leaf: next(parts).detach().to(leaf.dtype), point)
        for value, leaf in zip(leaves(values), leaves(point), strict=True):
            if value.shape != leaf.shape:
                raise MethodError(
                    f"captum's {self.name} gave shape {tuple(value.shape)} for shape {tuple(leaf.shape)}; "
                    "a method gives one value per entry. Leave out parameters that change the result's shape."
                )
        return values


def classes() -> dict[str, Any]:
    """captum's attribution classes that explain an input by a forward function, by name."""
    import captum.attr

    found: dict[str, Any] = {}
    every: dict[str, Any] = vars(captum.attr)
    for name, cls in every.items():
        attribute = getattr(cls, "attribute", None)
        if inspect.isclass(cls) and issubclass(cls, captum.attr.Attribution) and attribute is not None:
            first = next(iter(list(inspect.signature(attribute).parameters)[1:]), None)
            other = name in ("LimeBase", "InternalInfluence") or name.startswith(("Layer", "Neuron"))
            if first == "inputs" and not other:
                found[name] = cls
    return found


def canonical(name: Any) -> str:
    """captum's spelling of a class name. Raises MethodError with the nearest names."""
    known = classes()
    plain = str(name).lower().replace("_", "")
    for each in known:
        if each.lower() == plain:
            return each
    hint = ""
    if plain.startswith("layer") or plain == "internalinfluence":
        hint = ' A layer method is an input method at another site: explain(..., site="layer4").'
    if plain.startswith("neuron"):
        hint = " A neuron method is an input method with another target: a callable that returns that neuron."
    raise MethodError(
        f"captum has no class {str(name)!r} that explains an input.{hint} "
        f"Nearest: {nearest(str(name), known)}. Known: {', '.join(sorted(known))}."
    )


def accepted(name: str) -> set[str]:
    """Names of the parameters of a class's constructor and of its ``attribute``."""
    cls = classes()[name]
    found = [
        *inspect.signature(cls.__init__).parameters.values(),
        *inspect.signature(cls.attribute).parameters.values(),
    ]
    fixed = {each.name for each in found if each.kind is not inspect.Parameter.VAR_KEYWORD}
    return fixed - {"self", "device_ids"}


def chosen(function: Callable[..., Any], given: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The given parameters that a function takes, with tensors as such and a layer's path as its module."""
    names = inspect.signature(function).parameters
    values = {
        key: value.value if isinstance(value, Given) else value
        for key, value in given.items()
        if key in names
    }
    if "layer" in values:
        modules = dict(model.shadow.named_modules())
        if values["layer"] not in modules:
            raise MethodError(
                f"no module {values['layer']!r}. Nearest: {nearest(str(values['layer']), modules)}."
            )
        values["layer"] = modules[values["layer"]]
    return values


def plain_pairs(parameters: Any) -> tuple[tuple[str, Any], ...]:
    """Parameters as hashable pairs that print as they are typed. Raises MethodError."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return Given(value)
        if isinstance(value, (list, tuple)):
            return tuple(plain(each) for each in value)
        if value is None or isinstance(value, (bool, int, float, str, Given)):
            return value
        raise MethodError(
            "a parameter of Captum is a plain value or a tensor, so that its text records it; "
            f"got {type(value).__name__}."
        )

    try:
        pairs = dict(parameters)
    except (TypeError, ValueError):
        raise MethodError(
            f'parameters are given by name, for example {{"n_steps": 8}}; got {parameters!r}.'
        ) from None
    return tuple((str(key), plain(value)) for key, value in sorted(pairs.items()))


def is_perturbing(cls: Any) -> bool:
    """Whether a class works without gradients."""
    from captum.attr import PerturbationAttribution

    return issubclass(cls, PerturbationAttribution)


@contextmanager
def random_state(seed: int) -> Iterator[None]:
    """Global generators of torch and numpy seeded inside and as before outside: captum draws from them."""
    before = np.random.get_state()  # noqa: NPY002
    try:
        with kept_random_state(seed):
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


@contextmanager
def quiet() -> Iterator[None]:
    """Without captum's warnings about hooks, which land on a shadow."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting (forward, )?backward hooks")
        yield
