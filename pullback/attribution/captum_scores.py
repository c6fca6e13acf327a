"""A problem's score in the forms captum calls: a differentiable function of rows, or a module to hook.

captum repeats rows in several orders and promises only that ``additional_forward_args`` are repeated alike.
Row numbers travel there and say which example each row is about.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import MethodError
from ..core.points import Point, expand_like, leaves, map_leaves
from ..core.posed import PosedModel, gradients_enabled
from ..core.problem import Problem, take_slice
from ..core.shadow import shadow

__all__ = ["ScoreModule", "reached", "score_function"]


class ScoreModule(nn.Module):
    """The score per row as a module on a private shadow, made for one call of captum, which sets hooks there.

    Only modules behind the site are shown to captum, since no gradient reaches the others.
    """

    def __init__(self, problem: Problem, rows: Tensor, active: tuple[str, ...] = ()) -> None:
        super().__init__()
        assert isinstance(problem.posed.module, nn.Module)
        self.shadow = shadow(problem.posed.module).module
        self.problem, self.rows = problem, rows
        self.posed: PosedModel = replace(problem.posed, module=self.shadow, lock=threading.RLock())
        modules = dict(self.shadow.named_modules())
        self.active = [modules[name] for name in active]

    def forward(self, *values: Tensor) -> Tensor:
        index, z = row_numbers(self.rows, values), rebuilt(self.problem, values[:-1])
        z = self.problem.synthesis(z, index)
        examples, asked = self.problem.examples[index], self.problem.asked[index]
        places = examples * len(self.posed.targets) + asked
        self.problem.evaluations.index_add_(0, places, torch.ones_like(examples))
        return self.posed.scores(z, examples, asked)

    def children(self) -> Iterator[nn.Module]:
        return iter(self.active)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {}

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: LRP would write weights in place, into storage shared with the user's model."""


def reached(problem: Problem, name: str) -> tuple[str, ...]:
    """Names of the innermost modules between site and score. Raises MethodError where none can be hooked."""
    module = problem.posed.module
    if not isinstance(module, nn.Module) or any(
        isinstance(part, torch.jit.ScriptModule) for part in module.modules()
    ):
        raise MethodError(
            f"captum's {name} sets hooks on modules, so it needs an nn.Module that is no ScriptModule."
        )
    if problem.rules:
        raise MethodError(
            f"captum's {name} replaces derivatives by hooks and cannot run under rules as well."
        )
    scored = ScoreModule(problem.fresh(), torch.tensor([0]))
    found: dict[str, None] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if any(isinstance(each, Tensor) and each.requires_grad for each in (*args, *kwargs.values())):
                found[path] = None

        return hook

    for path, part in scored.shadow.named_modules():
        if not list(part.children()):
            part.register_forward_hook(watch(path), with_kwargs=True)
    first = map_leaves(lambda leaf: leaf[:1].detach().clone().requires_grad_(), problem.point)
    with gradients_enabled():
        scored(*leaves(first), torch.tensor([0]))
    return tuple(found)


class _Score(torch.autograd.Function):
    """The score of many rows and its first derivative, evaluated in chunks: no graph of the model is held."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, index: Tensor, *values: Tensor) -> Tensor:
        z = rebuilt(problem, values)
        found = [
            problem.evaluate_rows(take_slice(z, rows), index[rows])
            for rows in torch.split(torch.arange(len(index)), problem.chunk_rows())
        ]
        ctx.save_for_backward(
            *(torch.cat(parts) for parts in zip(*(leaves(each) for _, each in found), strict=True))
        )
        return torch.cat([scores for scores, _ in found])

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(each * expand_like(grad[0], each).to(each.dtype) for each in ctx.saved_tensors)


def row_numbers(asked: Tensor, values: tuple[Tensor, ...]) -> Tensor:
    """Which example each row is about: the one asked for, else what captum repeated along with the rows."""
    count, index = len(values[0]), values[-1]
    if len(asked) == 1:
        return asked.expand(count)
    if index.shape != (count,):
        raise MethodError(
            f"captum repeated row numbers to {tuple(index.shape)} for {count} rows of this method."
        )
    return index


def score_function(problem: Problem, rows: Tensor) -> Callable[..., Tensor]:
    """(leaves of R rows..., row numbers (R,)) -> scores (R,), differentiable once."""

    def scores(*values: Tensor) -> Tensor:
        index = row_numbers(rows, values)
        if torch.is_grad_enabled() and any(value.requires_grad for value in values[:-1]):
            return _Score.apply(problem, index, *values[:-1])  # type: ignore[no-any-return,no-untyped-call]
        return problem.rows(index, rebuilt(problem, values[:-1])).score()

    return scores


def rebuilt(problem: Problem, values: tuple[Tensor, ...]) -> Point:
    """A point of the problem's structure from its leaves."""
    parts = iter(values)
    return map_leaves(lambda leaf: next(parts), problem.point)
