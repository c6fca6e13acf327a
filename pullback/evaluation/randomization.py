"""Sanity checks: an attribution that says something of the model changes with its parameters and with the class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pullback.core import noise
from pullback.core.errors import InputError, nearest
from pullback.core.points import leaves
from pullback.core.pose import pose
from pullback.core.problem import Problem
from pullback.core.shadow import shadow
from pullback.evaluation.correlation import cosine, spearman, structural_similarity
from pullback.evaluation.ranking import Ranking, content_of
from pullback.evaluation.removal import Attributions, posed
from pullback.evaluation.rerun import Rerun, rerun
from pullback.evaluation.results import MetricResult, flagged

__all__ = ["parameter_randomization", "random_logit"]

Order = Literal["cascading", "bottom_up", "independent"]
Draw = Literal["normal", "permutation"]
Similarity = Literal["spearman", "ssim", "cosine"]

_CHOICES = {
    "order": ("cascading", "bottom_up", "independent"),
    "draw": ("normal", "permutation"),
    "similarity": ("spearman", "ssim", "cosine"),
    "ranking": ("absolute", "signed"),
}
_CONSTANT = "a map is constant, so it has no similarity to another; has the model collapsed?"


def parameter_randomization(
    model: nn.Module,
    x: Any,
    attribution: Attributions = None,
    *,
    method: Any = None,
    target: Any = None,
    site: str | None = None,
    order: Order = "cascading",
    layers: Sequence[str] | None = None,
    draw: Draw = "normal",
    similarity: Similarity = "spearman",
    ranking: Ranking = "absolute",
    seed: int = 0,
    chunk: int | str = "auto",
) -> MetricResult:
    """Model parameter randomization: how similar the maps stay while layers lose what they learnt. Lower is better.

    ``curve`` (n, layers + 1): the similarity to the model's own map before (1) and after each layer. "cascading"
    randomizes from the top down, each layer in addition to those before; "bottom_up" likewise from the input;
    "independent" one layer at a time. ``values`` (n,): the last of the curve, where all is random; for "independent"
    the mean over layers. A method whose maps survive, as an edge detector's do, does not explain this model.
    ``details``, (n, layers + 1) each: "spearman", "cosine" (and "ssim" where asked for) over all elements;
    "spearman_nonzero", "cosine_nonzero" over those where x is not 0. Gradient times input stays similar over all
    elements, because x = 0 (black) ties their ranks; read its variant.

    ``method``: what is run again, as in ``sensitivity_max``; ``target`` is kept, None being the model's own predicted
    class. ``layers``: paths of modules, the lowest first; by default all with parameters of their own, in the
    order in which they were registered. ``draw``: each parameter tensor becomes normal with its own mean and standard
    deviation, or a permutation of itself; where all its values are equal it stays, as buffers do. ``ranking``:
    similarity of |a| or of a. All happens to a copy; ``seed`` names the draws. NaN, and warned of, where a map becomes
    constant.

    Raises ``InputError`` for shapes, values, layers or settings that do not fit, or if nothing can be run again.
    Source: J. Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> parameter_randomization(net, torch.ones(1, 4), method="gradient").curve.shape
    torch.Size([1, 3])
    """
    _require_choices(order=order, draw=draw, similarity=similarity, ranking=ranking)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"A model of type {type(model).__name__} was given. Expected a torch.nn.Module, whose parameters can be "
            "randomized."
        )
    if method is None and callable(attribution):
        raise InputError(
            "A callable attribution was given, which would explain the model it was written for. Expected method=, "
            'such as method="integrated_gradients", or a result of explain.'
        )
    problem = posed(model, x, attribution, target=target, site=site, chunk=chunk)
    again = rerun(problem, x, attribution, method)
    fixed = _fixed(target, problem)
    copy = shadow(model, private=True).module
    parameters = _layers(copy, layers)
    turn = list(reversed(parameters)) if order == "cascading" else list(parameters)
    maps = [again.clean]
    for name in turn:
        own = parameters[name]
        before = [parameter.detach().clone() for parameter in own]
        _randomize(own, draw, seed, name)
        maps.append(again.maps(pose(copy, x, target=fixed, site=problem.site, chunk=chunk)))
        if order == "independent":
            for parameter, value in zip(own, before, strict=True):
                parameter.data.copy_(value)
    details = _similarities(again, maps, problem, similarity, ranking)
    curve = details[similarity]
    after = curve[:, 1:]
    values = after.mean(1) if order == "independent" else after[:, -1]
    values = flagged("parameter_randomization", values, values.isnan(), _CONSTANT)
    return MetricResult(
        name="parameter_randomization",
        values=values,
        direction="lower",
        curve=curve,
        params={
            "method": again.name,
            "order": order,
            "layers": turn,
            "draw": draw,
            "similarity": similarity,
            "ranking": ranking,
            "seed": seed,
            "site": problem.site,
        },
        details=details,
    )


def random_logit(
    model: nn.Module | Callable[..., Any],
    x: Any,
    attribution: Attributions = None,
    *,
    method: Any = None,
    target: Any = None,
    other: Tensor | None = None,
    site: str | None = None,
    similarity: Similarity = "spearman",
    ranking: Ranking = "absolute",
    seed: int = 0,
    chunk: int | str = "auto",
) -> MetricResult:
    """The random logit test: how similar the map of the class is to that of another class. Lower is better.

    ``values`` (n,): the similarity, as in ``parameter_randomization``, of the maps for ``target`` (class indices; None
    is the predicted class) and for ``other`` (n,), by default a random other class named by ``seed`` and each
    example's content. ``details``: as there, (n, 1) each, and "other" (n,). With two classes the logits are often
    each other's negative, so that |a| is the same: take ``ranking="signed"``. NaN, and warned of, where a map is
    constant.

    Raises ``InputError`` for an output of fewer than two classes, and as ``parameter_randomization`` does.
    Source: L. Sixt, M. Granz, T. Landgraf, When Explanations Lie, ICML 2020.

    >>> random_logit(nn.Linear(4, 3), torch.ones(2, 4), method="gradient").values.shape
    torch.Size([2])
    """
    _require_choices(similarity=similarity, ranking=ranking)
    problem = posed(model, x, attribution, target=target, site=site, chunk=chunk)
    index = problem.posed.targets[0].index
    if index is None:
        raise InputError(
            f"target={target!r} was given, which is no class. Expected class indices, or None for the predicted class."
        )
    again = rerun(problem, x, attribution, method)
    chosen = _another_class(problem, index, seed) if other is None else torch.as_tensor(other)
    if chosen.shape != index.shape or bool((chosen.to(index.device) == index).any()):
        raise InputError(
            f"other={chosen.tolist()} was given for the classes {index.tolist()}. Expected another class for each."
        )
    moved = pose(model, x, target=chosen, site=problem.site, chunk=chunk)
    found = again.maps(moved)
    details = _similarities(again, [found], problem, similarity, ranking)
    values = details[similarity][:, 0]
    return MetricResult(
        name="random_logit",
        values=flagged("random_logit", values, values.isnan(), _CONSTANT),
        direction="lower",
        params={
            "method": again.name,
            "similarity": similarity,
            "ranking": ranking,
            "seed": seed,
            "site": problem.site,
        },
        details={**details, "other": chosen},
    )


def _similarities(
    again: Rerun, maps: Sequence[Tensor], problem: Problem, similarity: str, ranking: str
) -> dict[str, Tensor]:
    """Similarities of the clean maps with each of the others, (n, maps), by name."""
    sized: Callable[[Tensor], Tensor] = torch.abs if ranking == "absolute" else torch.clone
    clean, others = sized(again.clean), [sized(each) for each in maps]
    real = _real(problem, clean)
    nonzero = torch.cat([(leaf != 0).flatten(1) for leaf in leaves(problem.point)], 1).to(clean.device)
    if nonzero.shape != clean.shape:
        # maps with values other than the input's elements have no zero inputs to leave out
        nonzero = torch.ones_like(clean, dtype=torch.bool)
    found: dict[str, Tensor] = {}
    for name, measure in (("spearman", spearman), ("cosine", cosine)):
        for suffix, where in (("", real), ("_nonzero", nonzero & real)):
            found[name + suffix] = torch.stack([measure(clean, each, where) for each in others], 1)
    if similarity == "ssim":
        images = [each.reshape(again.shape) for each in (clean, *others)]
        found["ssim"] = torch.stack([structural_similarity(images[0], each) for each in images[1:]], 1)
    return found


def _real(problem: Problem, maps: Tensor) -> Tensor:
    """True at all but padding, where maps agree on zeros that no method chose."""
    everywhere = torch.ones_like(maps, dtype=torch.bool)
    if problem.free is None or maps.shape[1] % problem.free.shape[1]:
        return everywhere
    return problem.free.to(maps.device).repeat_interleave(maps.shape[1] // problem.free.shape[1], 1)


def _fixed(target: Any, problem: Problem) -> Any:
    """The target with the class it found on the clean model, so that a randomized one is asked about the same."""
    index = problem.posed.targets[0].index
    if index is None:
        return target
    if target is None or isinstance(target, (int, Tensor, str)):
        return index
    if is_dataclass(target) and any(each.name == "index" for each in fields(target)):
        return replace(cast(Any, target), index=index)
    return target


def _layers(model: nn.Module, layers: Sequence[str] | None) -> dict[str, list[nn.Parameter]]:
    """The parameters of each layer: the modules' own, or with all below for layers that are named."""
    modules = dict(model.named_modules())
    every = layers is None
    found = {}
    for name in modules if layers is None else layers:
        if name not in modules:
            raise InputError(
                f"layers has {name!r}, which the model has not. Nearest: {nearest(name, modules)}."
            )
        own = [each for each in modules[name].parameters(recurse=not every) if each.is_floating_point()]
        if own:
            found[name] = own
        elif not every:
            raise InputError(f"layers has {name!r}, a module without parameters. Expected one with some.")
    if not found:
        raise InputError("There are no layers with parameters to randomize. Expected some, or layers=None.")
    return found


def _randomize(parameters: Sequence[Tensor], draw: Draw, seed: int, layer: str) -> None:
    for number, parameter in enumerate(parameters):
        generator = noise.generator(seed, number, f"randomization/{layer}")
        values = parameter.detach()
        if draw == "permutation":
            order = torch.randperm(values.numel(), generator=generator).to(values.device)
            drawn = values.flatten()[order].reshape(values.shape)
        else:
            unit = torch.randn(values.shape, generator=generator).to(values.device, torch.float64)
            wide = values.double()
            drawn = wide.mean() + wide.std(correction=0) * unit
        parameter.data.copy_(drawn)


def _another_class(problem: Problem, index: Tensor, seed: int) -> Tensor:
    """A random class other than ``index`` for each example, whatever its batch mates: (n,)."""
    outputs: list[Any] = []
    with problem.posed.lock, torch.no_grad():
        problem.posed.scores(problem.point, problem.examples, problem.asked, outputs.append)
    logits = outputs[0] if isinstance(outputs[0], Tensor) else getattr(outputs[0], "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(outputs[0]).__name__
        raise InputError(
            f"The model's output is {shape}, without another class to choose. Expected (n, classes); pass other=."
        )
    steps = []
    for row in range(problem.batch):
        key = "/".join(content_of(leaf[row], problem, row) for leaf in leaves(problem.point))
        generator = noise.generator(seed, 0, f"random_logit/{key}")
        steps.append(1 + int(torch.randint(logits.shape[1] - 1, (1,), generator=generator)))
    return (index + torch.tensor(steps, device=index.device)) % logits.shape[1]


def _require_choices(**given: str) -> None:
    for name, value in given.items():
        if value not in _CHOICES[name]:
            raise InputError(f"{name}={value!r} was given. Expected {', '.join(map(repr, _CHOICES[name]))}.")
