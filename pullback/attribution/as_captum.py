"""Methods of ours in captum's form, for captum.metrics, NoiseTunnel and code written against captum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from ..core.errors import InputError, TargetError
from ..core.inputs import read_inputs
from ..core.points import Point, leaves
from ..core.pose import pose
from ..core.problem import Problem
from ..core.targets import main_tensor
from .baselines import Constant, Given

__all__ = ["CaptumForm", "as_captum"]


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def decorated(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The same function with a ``__wrapped__``, which NoiseTunnel calls to get past captum's logging."""

    @wraps(function)
    def same(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return function(*args, **kwargs)

    return same


@dataclass(frozen=True, eq=False)
class CaptumForm:
    """A method with a model, in the form of captum's attribution objects: ``as_captum(method)(model)``."""

    method: Callable[[Problem], Point]
    forward_func: Callable[..., Any]

    @decorated
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        baselines: Any = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Attributions in the structure of ``inputs``.

        Args:
            inputs: a floating tensor (B, ...), or a tuple of them.
            target: as captum's: None for one number per example, a class, one class per example, a tuple of
                indices for outputs with more dimensions; or any target of ``explain``.
            additional_forward_args: further positional arguments of the model, never explained.
            baselines: as captum's, replacing the method's own: a number, a tensor, or a tuple of them.

        Raises:
            InputError: an input or baseline does not fit.
            TargetError: the target is None and the output has more than one number per example.
        """
        several = isinstance(inputs, tuple)
        given: tuple[Tensor, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
        extra = additional_forward_args
        extra = () if extra is None else extra if isinstance(extra, tuple) else (extra,)
        explained = read_inputs((*given, *extra), self.forward_func).explained
        if len(explained) < len(given):
            raise InputError(
                "every input must be a floating tensor (B, ...); pass others as additional_forward_args."
            )
        if len(explained) > len(given) > 1:
            raise InputError(
                "several inputs with floating additional_forward_args: give the latter as pullback.Shared."
            )
        problem = pose(
            self.forward_func,
            (*given, *extra),
            target=only_number if target is None else target,
            site=f"input:{explained[0]}" if len(given) == 1 else "input",
        )
        found = leaves(self._with_baselines(baselines)(problem))
        return tuple(found) if several else found[0]

    def has_convergence_delta(self) -> bool:
        return False

    @property
    def multiplies_by_inputs(self) -> bool:
        return False

    def _with_baselines(self, baselines: Any) -> Callable[[Problem], Point]:
        from .spelling import with_settings

        if baselines is None:
            return self.method
        values = baselines if isinstance(baselines, tuple) else (baselines,)
        method: Callable[[Problem], Point] = with_settings(self.method, baseline=_Each(values))
        return method


@dataclass(frozen=True, eq=False)
class _Each:
    """One baseline per input, numbers or tensors."""

    values: tuple[Any, ...]

    def __call__(self, problem: Problem, draw: int = 0) -> Point:
        point = problem.point
        named = {"": point} if isinstance(point, Tensor) else point
        if len(named) != len(self.values):
            raise InputError(f"{len(self.values)} baselines for {len(named)} inputs; give one for each.")
        found: dict[str, Tensor] = {}
        for (name, leaf), value in zip(named.items(), self.values, strict=True):
            one = Given(value) if isinstance(value, Tensor) else Constant(float(value or 0))
            part = one(replace(problem, point=leaf))
            assert isinstance(part, Tensor)
            found[name] = part
        return found[""] if isinstance(point, Tensor) else found


def only_number(output: Any) -> Tensor:
    """The output itself where it is one number per example. Raises TargetError."""
    tensor = main_tensor(output)
    if tensor.dim() == 0 or tensor.numel() != len(tensor):
        raise TargetError(
            "captum's target=None means one number per example, but the output has shape "
            f"{tuple(tensor.shape)}. Give target=, for example a class index."
        )
    return tensor.reshape(-1)


def as_captum(method: Any) -> Callable[[Callable[..., Any]], CaptumForm]:
    """A method of ours in captum's form: ``as_captum(method)(model).attribute(inputs, target=...)``.

    The result stands where captum takes an attribution object (``NoiseTunnel``), and its ``attribute`` where
    captum takes an explanation function (``captum.metrics.sensitivity_max``).

    Args:
        method: a method object, or its text.

    Returns:
        model -> CaptumForm.

    Example:
        >>> import torch, pullback as pb
        >>> engine = as_captum(pb.SmoothGrad(samples=4))(torch.nn.Linear(2, 3))
        >>> engine.attribute(torch.ones(1, 2), target=1).shape
        torch.Size([1, 2])
    """
    from .spelling import parse_method

    chosen = parse_method(method) if isinstance(method, str) else method

    def on(model: Callable[..., Any]) -> CaptumForm:
        return CaptumForm(chosen, model)

    return on
