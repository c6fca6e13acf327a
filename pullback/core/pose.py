"""``pose``: run the model once on the inputs, find the site, fix the target, and hand back a Problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .clean_pass import CleanPass, concatenated
from .contiguity import contiguous_gradients
from .continuations import extend
from .domain import enter, rounding
from .errors import InputError, ModelError, SiteError, TargetError
from .inputs import ModelInputs, read_inputs
from .live_pass import LivePass
from .points import map_leaves, widest
from .posed import PosedModel, Variant, free_positions
from .problem import Problem
from .resources import Resources, SharedWriteError, storages
from .shadow import shadow
from .sites import Site
from .targets import TargetContext, continuations, resolve

__all__ = ["on_shadow", "pose", "pose_targets", "require_settled", "unsettled"]


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
    live: LivePass | None = None,
) -> Problem:
    """Pose several targets together: B·K rows, example-major, that share their forwards where points coincide.

    A ``live`` pass keeps the graph of the first forward, for a caller that evaluates the clean point once.
    """
    if not callable(model):
        raise InputError(
            f"the model is a {type(model).__name__}, which cannot be called. Give an nn.Module or a function."
        )
    resources = Resources(chunk, memory_budget)
    with torch.inference_mode(False):
        read = read_inputs(inputs, model)
        asked = Site.parse(site) if site is not None else None
        wanted = None if asked is None else asked.plain
        notes: list[str] = []
        if isinstance(model, nn.Module):
            require_settled(model, allow_train)
            clean = on_shadow(model, read, wanted, resources, notes, live)
        else:
            notes.append(
                "a plain callable: only its input can be explained, and parameters it closes over are not shielded"
            )
            clean = CleanPass(model, read, default_site(wanted, read, hookable=False), resources)
            clean.run()
    context = TargetContext(
        read.batch, read.attention_mask, read.tokens, getattr(clean.module, "config", None)
    )
    problem = _problem(clean, targets, context, resources, notes)
    if asked is not None and asked.domain is not None:
        problem = _in_coordinates(problem, asked, len(targets))
    mates = isinstance(model, nn.Module) and any(
        part.training and unsettled(part) for part in model.modules()
    )
    problem.posed.whole = problem.posed.stochastic or mates
    if problem.posed.whole and (resources.budget is not None or (resources.chunk or read.batch) < read.batch):
        problem.note(
            "random draws or batch statistics differ between parts of the batch, and chunk or memory_budget divides "
            "it: results depend on them"
        )
    return problem


def on_shadow(
    model: nn.Module,
    read: ModelInputs,
    wanted: Site | None,
    resources: Resources,
    notes: list[str],
    live: LivePass | None = None,
) -> CleanPass:
    """The first pass on a shadow; on private copies of the tensors where the forward writes into them."""
    writes = any(module.training and unsettled(module) for module in model.modules())
    while True:
        built = shadow(model, private=writes)
        contiguous_gradients(built.module)
        site = default_site(wanted, read, hookable=not isinstance(built.module, torch.jit.ScriptModule))
        protected = frozenset[int]() if writes else storages(built.module)
        clean = CleanPass(built.module, read, site, resources, protected, live)
        try:
            clean.run()
        except SharedWriteError:
            writes = True
            if live is not None:
                live.drop()
            notes.append(
                "the forward writes into its parameters or buffers, so it runs on private copies of them"
            )
            continue
        notes.extend(built.notes)
        return clean


def default_site(site: Site | None, read: ModelInputs, hookable: bool) -> Site:
    """The site meant by None, and a check that a site of this kind exists here."""
    if site is None:
        site = Site("embeddings") if read.token_leaf is not None and hookable else Site("input")
    if site.kind != "input" and not hookable:
        raise SiteError(
            f'"{site}" needs an nn.Module that takes hooks; for a callable or a ScriptModule use site="input".'
        )
    if site.kind == "input":
        if site.leaf is not None and site.leaf not in read.explained:
            raise SiteError(
                f'no floating input "{site.leaf}". Those that can be explained: '
                f"{', '.join(f'input:{name}' for name in read.explained) or 'none'}."
            )
        if not read.explained:
            kinds = ", ".join(
                f"{name} {str(leaf.dtype).removeprefix('torch.')}" for name, leaf in read.leaf.items()
            )
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
                f'{type(model).__name__} is in train mode and "{path or type(module).__name__}" {reason}: the '
                "result would be random or depend on batch mates. Call model.eval() first, or pass allow_train=True."
            )


def unsettled(module: nn.Module) -> str | None:
    """Why a module in train mode gives other values than in eval mode, or None."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return "drops at random" if module.p > 0 else None
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return (
            "uses batch statistics"
            if module.track_running_stats or isinstance(module, nn.modules.batchnorm._BatchNorm)
            else None
        )
    if isinstance(module, nn.RReLU):
        return "draws slopes at random"
    for name, value in vars(module).items():
        if "drop" in name and isinstance(value, float) and value > 0:
            return f"has {name}={value}"
    return None


def _problem(
    clean: CleanPass, targets: Sequence[Any], context: TargetContext, resources: Resources, notes: list[str]
) -> Problem:
    read, point = clean.read, clean.point()
    posed = PosedModel(
        module=clean.module,
        variants=[Variant(read)],
        site=clean.site,
        leaf_names=(clean.site.leaf,) if clean.site.leaf and clean.site.kind == "input" else read.explained,
        point=point,
        targets=(),
        free=free_positions(read, clean.site, point),
        stochastic=clean.stochastic,
        generators=clean.generators,
        batch_norms=clean.batch_norms,
        asked_site=clean.asked_site,
        token_site=_is_token_site(clean),
        tokenizer=next(
            (found for target in targets if (found := getattr(target, "tokenizer", None)) is not None), None
        ),
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
        output = concatenated(clean.outputs)
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
        problem.note(
            "the forward draws random numbers: every evaluation uses the same draws, fixed by seed 0"
        )
    return problem


def _in_coordinates(problem: Problem, site: Site, count: int) -> Problem:
    """The problem whose value is the coordinates of what the model has at the site."""
    posed = problem.posed
    if not isinstance(posed.point, Tensor) or site.domain is None:
        raise SiteError(
            f'"{site}" needs one tensor at "{site.plain}", but several leaves are there. Name one.'
        )
    domain, coefficients, loss = enter(site.domain, posed.point)
    posed.domain, posed.point, posed.asked_site, posed.token_site = domain, coefficients, str(site), False
    point = coefficients.repeat_interleave(count, 0) if count > 1 else coefficients
    # the score is that of the synthesis, which is another where the domain loses something
    known = problem.known_score if loss <= rounding(point.dtype) else None
    return replace(problem, point=point, known_score=known)


def _is_token_site(clean: CleanPass) -> bool:
    """Whether the point is a sequence of token embeddings, so that text baselines make sense."""
    if clean.asked_site == "embeddings":
        return True
    if clean.site.kind != "module" or not isinstance(clean.module, nn.Module):
        return False
    return clean.site.side == "output" and isinstance(clean.site.module(clean.module), nn.Embedding)


def _finite(scores: Tensor) -> Tensor:
    bad = (~torch.isfinite(scores)).nonzero()
    if len(bad):
        raise TargetError(
            f"the clean score of example {int(bad[0])} is {float(scores[bad[0]])}: the output is not finite there. "
            "Check the model in its present dtype, or the target."
        )
    return scores.detach()
