"""``pose``: run the model once on the inputs, find the site, fix the target, and hand back a Problem."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .continuations import extend
from .edits import capture
from .embeddings import find_embeddings
from .errors import InputError, ModelError, SiteError, TargetError
from .inputs import ModelInputs, read_inputs
from .points import Point, map_leaves, widest
from .posed import PosedModel, Variant, kept_random_state, random_state_lock
from .problem import Problem
from .resources import AllocationMeter, PeakMeter, Resources, is_out_of_memory
from .shadow import shadow
from .sites import Site
from .targets import TargetContext, continuations, resolve

__all__ = ["pose"]


def pose(
    model: Callable[..., Any],
    inputs: Any,
    *,
    target: Any = None,
    site: str | Site | None = None,
    chunk: int | str = "auto",
    memory_budget: int | float | str | None = None,
    allow_train: bool = False,
) -> Problem:
    """Cut a model at a site and fix the score to explain.

    Args:
        model: any ``nn.Module`` (also compiled, DDP, PEFT, dispatched by accelerate), or a plain callable, for which
            only ``site="input"`` exists.
        inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments, batch first.
        target: what to explain, see docs/concepts/targets.md; None is the predicted class, fixed on these inputs.
        site: where, see docs/concepts/sites.md; None is the input, or the embeddings where the input is token ids.
        chunk: rows through the model at once, or "auto".
        memory_budget: bytes, or text such as "4GB", that evaluations may hold at once.
        allow_train: explain a model in train mode as it is, with frozen random draws.

    Returns:
        a Problem: ``point`` (B, *S), ``score(z)`` (B,), ``grad(z)``, ``at``, ``rows``, ``under``, ``in_domain``.

    Raises:
        InputError, ModelError, SiteError, TargetError: each says what to do instead.

    Cost: one forward pass of the batch.

    Example:
        >>> problem = pose(nn.Linear(3, 2), torch.ones(1, 3), target=1)
        >>> problem.grad().shape
        torch.Size([1, 3])
    """
    return pose_targets(
        model, inputs, [target], site=site, chunk=chunk, memory_budget=memory_budget, allow_train=allow_train
    )


def pose_targets(
    model: Callable[..., Any],
    inputs: Any,
    targets: Sequence[Any],
    *,
    site: str | Site | None = None,
    chunk: int | str = "auto",
    memory_budget: int | float | str | None = None,
    allow_train: bool = False,
) -> Problem:
    """Pose several targets together: B·K rows, example-major, that share their forwards where points coincide."""
    if not callable(model):
        raise InputError(f"the model is a {type(model).__name__}, which cannot be called. Give an nn.Module or a function.")
    resources = Resources(chunk, memory_budget)
    with torch.inference_mode(False):
        read = read_inputs(inputs, model)
        wanted = Site.parse(site) if site is not None else None
        notes: list[str] = []
        module: Callable[..., Any] = model
        hookable = False
        if isinstance(model, nn.Module):
            require_settled(model, allow_train)
            private = shadow(model, private_buffers=True)
            module, hookable = private.module, not private.scripted or not isinstance(private.module, torch.jit.ScriptModule)
            notes.extend(private.notes)
        else:
            notes.append("a plain callable: only its input can be explained, and parameters it closes over are not shielded")
        wanted = default_site(wanted, read, hookable)
        clean = _Clean(module, read, wanted, resources)
        clean.run()
    context = TargetContext(read.batch, read.attention_mask, read.tokens, getattr(module, "config", None))
    problem = _problem(clean, targets, context, resources, notes)
    mates = isinstance(model, nn.Module) and any(part.training and unsettled(part) for part in model.modules())
    problem.posed.whole = problem.posed.stochastic or mates
    return problem


def default_site(site: Site | None, read: ModelInputs, hookable: bool) -> Site:
    """The site meant by None, and a check that a site of this kind exists here."""
    if site is None:
        site = Site("embeddings") if read.token_leaf is not None and hookable else Site("input")
    if site.kind != "input" and not hookable:
        raise SiteError(f'"{site}" needs an nn.Module that takes hooks; for a callable or a ScriptModule use site="input".')
    if site.kind == "input":
        if site.leaf is not None and site.leaf not in read.explained:
            raise SiteError(
                f'no floating input "{site.leaf}". Those that can be explained: '
                f'{", ".join(f"input:{name}" for name in read.explained) or "none"}.'
            )
        if not read.explained:
            kinds = ", ".join(f"{name} {str(leaf.dtype).removeprefix('torch.')}" for name, leaf in read.leaf.items())
            raise InputError(
                f"no floating input to differentiate ({kinds}). Token ids: use an nn.Module with an embedding, "
                'site="embeddings". An image: convert it with x.float().'
            )
    return site


def require_settled(model: nn.Module, allow_train: bool) -> None:
    """Refuse models whose output is random or depends on batch mates because they are in train mode."""
    if allow_train:
        return
    for path, module in model.named_modules():
        if module.training and (reason := unsettled(module)):
            raise ModelError(
                f'{type(model).__name__} is in train mode and "{path or type(module).__name__}" {reason}: the result would be '
                "random or depend on batch mates. Call model.eval() first, or pass allow_train=True."
            )


def unsettled(module: nn.Module) -> str | None:
    """Why a module in train mode gives other values than in eval mode, or None."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return "drops at random" if module.p > 0 else None
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return "uses batch statistics" if module.track_running_stats or isinstance(module, nn.modules.batchnorm._BatchNorm) else None
    if isinstance(module, nn.RReLU):
        return "draws slopes at random"
    for name, value in vars(module).items():
        if "drop" in name and isinstance(value, float) and value > 0:
            return f"has {name}={value}"
    return None


class _Clean:
    """The first pass: the clean point, the number of calls of the site, the output, and what a row allocates."""

    def __init__(self, module: Callable[..., Any], read: ModelInputs, site: Site, resources: Resources) -> None:
        self.module = module
        self.read = read
        self.site = site
        self.asked_site = str(site)
        self.resources = resources
        self.stochastic = False
        self.outputs: list[Any] = []
        self.points: list[Point] = []

    def run(self) -> None:
        """Run the whole batch, in chunks where the user bounded them."""
        batch = self.read.batch
        size = self.resources.chunk or batch
        if self.resources.budget is not None:
            size = min(size, self._fitting())
        start, seeded = 0, self.stochastic
        while start < batch:
            rows = torch.arange(start, min(batch, start + size))
            try:
                self._run_rows(None if len(rows) == batch else rows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise self._explained(error) from error
                if len(rows) == 1:
                    raise
                size = max(1, len(rows) // 2)
                continue
            if self.stochastic and not seeded:
                # again with the draws that every later evaluation will see, so that clean values belong to them
                self.outputs.clear()
                self.points.clear()
                seeded, start = True, 0
                continue
            start += len(rows)

    def _fitting(self) -> int:
        with PeakMeter() as meter:
            self._run_rows(torch.tensor([0]))
        self.outputs.clear()
        self.points.clear()
        return max(1, int(self.resources.budget or 0) // max(1, meter.peak))

    def _run_rows(self, rows: Tensor | None) -> None:
        args, kwargs = self.read.rows(rows, {})
        seeded = self.stochastic
        meter = AllocationMeter() if self.resources.row_bytes is None else nullcontext()
        with torch.no_grad(), kept_random_state(0) if seeded else random_state_lock, ExitStack() as stack:
            states = [] if seeded else _random_states()
            found: Any = None
            if self.site.kind == "embeddings":
                assert isinstance(self.module, nn.Module)
                found = stack.enter_context(find_embeddings(self.module, self.read))
            elif self.site.kind == "module":
                assert isinstance(self.module, nn.Module)
                # every call is read, so that an error can say how many there were
                every = dataclasses.replace(self.site, call=None)
                found = stack.enter_context(capture(self.module, [every]))[every]
            stack.enter_context(meter)
            try:
                output = self.module(*args, **kwargs)
            finally:
                # other threads may draw too, so the state counts only where this forward was seen to draw
                if not seeded and isinstance(meter, AllocationMeter) and meter.draws:
                    self.stochastic = _restored(states)
        if isinstance(meter, AllocationMeter):
            self.resources.row_bytes = meter.bytes // (self.read.batch if rows is None else len(rows))
        if self.site.kind == "embeddings":
            self.site, point = found.resolve()
            self.points.append(point)
        elif self.site.kind == "module":
            self.points.append(self._captured(found))
        self.outputs.append(output)

    def _captured(self, values: list[Tensor]) -> Tensor:
        path = self.site.path
        if self.site.call is None and len(values) > 1:
            choices = ", ".join(f'"{path}@{call}"' for call in range(len(values)))
            raise SiteError(f'"{path}" ran {len(values)} times in one forward pass. Choose one call: {choices}.')
        if not values:
            raise SiteError(f'"{self.site}" never ran in this forward pass. Choose a module that the forward uses.')
        if self.site.call is not None and self.site.call >= len(values):
            raise SiteError(f'"{path}" ran {len(values)} times; calls are counted from 0, so "{self.site}" does not exist.')
        value = values[self.site.call or 0]
        if not value.is_floating_point() and not value.is_complex():
            raise SiteError(f'the value at "{self.site}" is {value.dtype}; only floating values can be explained.')
        return value

    def point(self) -> Point:
        if self.site.kind == "input":
            names = (self.site.leaf,) if self.site.leaf else self.read.explained
            found: dict[str, Tensor] = {str(name): self.read.leaf[str(name)].detach().clone() for name in names}
            return found if len(found) > 1 else next(iter(found.values()))
        if len(self.points) == 1:
            return self.points[0]
        return map_leaves(lambda *parts: torch.cat(parts), *self.points)

    def _explained(self, error: RuntimeError | MemoryError) -> Exception:
        """An input of the wrong dtype or device said in the user's words; other errors as they are."""
        if not isinstance(self.module, nn.Module):
            return error
        parameter = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        if parameter is not None and not self.read.explained and re.search(r"\bd?type\b", str(error)):
            name, leaf = next(iter(self.read.leaf.items()))
            return InputError(
                f'input "{name}" is {leaf.dtype}, the model\'s parameters are {parameter.dtype}, and the forward failed: '
                f"{error}. If it holds numbers rather than token ids, convert it: x.to({parameter.dtype})."
            )
        for name in self.read.explained if parameter is not None else ():
            leaf = self.read.leaf[name]
            assert parameter is not None
            if leaf.dtype != parameter.dtype:
                return InputError(
                    f'input "{name}" is {leaf.dtype}, the model\'s parameters are {parameter.dtype}, and the forward failed: '
                    f"{error}. Convert one of them, for example x.to({parameter.dtype})."
                )
            if leaf.device != parameter.device:
                return InputError(
                    f'input "{name}" is on {leaf.device}, the model on {parameter.device}. '
                    f'Move the input: x.to("{parameter.device}").'
                )
        return error


def _problem(
    clean: _Clean, targets: Sequence[Any], context: TargetContext, resources: Resources, notes: list[str]
) -> Problem:
    read, point = clean.read, clean.point()
    posed = PosedModel(
        module=clean.module,
        variants=[Variant(read)],
        site=clean.site,
        leaf_names=(clean.site.leaf,) if clean.site.leaf and clean.site.kind == "input" else read.explained,
        point=point,
        targets=(),
        free=_free(read, clean.site, point),
        stochastic=clean.stochastic,
        asked_site=clean.asked_site,
        token_site=_is_token_site(clean),
        tokenizer=next((found for target in targets if (found := getattr(target, "tokenizer", None)) is not None), None),
    )
    examples = torch.arange(read.batch)
    continued = [continuations(target, read.batch) for target in targets]
    if any(each is not None for each in continued):
        if len(targets) > 1 or continued[0] is None:
            raise TargetError("targets of several tokens are explained one at a time: call explain for each.")
        posed.variants = [extend(read, ids, context.last) for ids in continued[0]]
        posed.paired = True
        with torch.inference_mode(False), torch.no_grad():
            output = posed.output(point, examples)
    else:
        output = _concatenated(clean.outputs)
    posed.targets = tuple(resolve(target, output, context) for target in targets)
    count = len(posed.targets)
    with torch.inference_mode(False), torch.no_grad():
        scores = [_finite(posed.score_of(number, output, examples)) for number in range(count)]
    problem = Problem(
        point=map_leaves(lambda leaf: leaf.repeat_interleave(count, 0), point) if count > 1 else point,
        posed=posed,
        examples=examples.repeat_interleave(count),
        asked=torch.arange(count).repeat(read.batch),
        resources=resources,
        evaluations=torch.zeros(read.batch * count, dtype=torch.long),
        known_score=torch.stack([widest(each) for each in scores], 1).flatten(),
    )
    for text in notes:
        problem.note(text)
    if clean.stochastic:
        problem.note("the forward draws random numbers: every evaluation uses the same draws, fixed by seed 0")
    return problem


def _is_token_site(clean: _Clean) -> bool:
    """Whether the point is a sequence of token embeddings, so that text baselines make sense."""
    if clean.asked_site == "embeddings":
        return True
    if clean.site.kind != "module" or not isinstance(clean.module, nn.Module):
        return False
    return clean.site.side == "output" and isinstance(clean.site.module(clean.module), nn.Embedding)


def _free(read: ModelInputs, site: Site, point: Point) -> Tensor | None:
    """Where the value may move: token positions that the attention mask calls real."""
    mask = read.attention_mask
    if mask is None or read.token_leaf is None or site.kind == "input" or not isinstance(point, Tensor):
        return None
    if point.dim() < 3 or point.shape[:2] != mask.shape or bool(mask.bool().all()):
        return None
    return mask.bool()


def _finite(scores: Tensor) -> Tensor:
    bad = (~torch.isfinite(scores)).nonzero()
    if len(bad):
        raise TargetError(
            f"the clean score of example {int(bad[0])} is {float(scores[bad[0]])}: the model's output is not finite there. "
            "Check the model in its present dtype, or the target."
        )
    return scores.detach()


def _concatenated(outputs: Sequence[Any]) -> Any:
    """Outputs of several chunks of the batch as one: tensors joined along the batch, the rest from the first."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(outputs)) if first.dim() else first
    if hasattr(first, "items"):
        joined = copy.copy(first)
        for key in list(first.keys()):
            joined[key] = _concatenated([output[key] for output in outputs])
        return joined
    if isinstance(first, list) and first and not isinstance(first[0], Tensor):
        return [entry for output in outputs for entry in output]
    if isinstance(first, (list, tuple)):
        parts = [_concatenated([output[index] for output in outputs]) for index in range(len(first))]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if any(isinstance(part, Tensor) for part in getattr(first, "__dict__", {}).values()):
        joined = copy.copy(first)
        for name in vars(first):
            object.__setattr__(joined, name, _concatenated([vars(output)[name] for output in outputs]))
        return joined
    return first


def _random_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def _restored(states: list[Tensor]) -> bool:
    """Whether the forward drew from the global generators; if so they are put back."""
    after = _random_states()
    if all(torch.equal(before, now) for before, now in zip(states, after, strict=False)):
        return False
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
    return True
