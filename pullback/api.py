"""The front door: ``explain`` and its siblings, which pose a problem, call a method and record the result."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attribution.baselines import Given
from .attribution.domains.axes import coordinates, signals
from .attribution.integrated_gradients import IntegratedGradients
from .attribution.spelling import parse_baseline, parse_method, with_settings
from .core.errors import InputError, MethodError, TargetError
from .core.points import Point, leaves, map_leaves
from .core.pose import pose, pose_targets
from .core.problem import Problem
from .core.sites import Site
from .core.targets import continuations
from .core.text_targets import LogProb
from .labels import token_labels
from .pipelines import opened
from .result import Attribution
from .version import __version__

__all__ = ["compare", "explain", "explain_generation", "explain_targets"]


def explain(
    model: Callable[..., Any],
    inputs: Any,
    *,
    target: Any = None,
    method: Any = "auto",
    site: str | Site | None = None,
    baseline: Any = None,
    chunk: int | str = "auto",
    memory_budget: int | float | str | None = None,
    seed: int | None = None,
    allow_train: bool = False,
) -> Attribution:
    """Attribute a model's score to its input, or to any site inside it.

    Args:
        model: any ``nn.Module``, callable or transformers pipeline; it is left exactly as it was.
        inputs: a tensor (B, ...), a tuple of positional arguments, or a dict of keyword arguments; for a pipeline also
            a text, a picture, or a list of them.
        target: the score: a class index, one per example, a label's text, a preset such as ``Contrast``, or a function
            ``output -> (B,)``; None is the predicted class, fixed on these inputs. See docs/concepts/targets.md.
        method: a method object, its text, or "auto": integrated gradients to a tolerance of 5 %.
        site: where: "input", "embeddings", a module path, or such a place in other coordinates. See
            docs/concepts/sites.md.
        baseline: a tensor, a baseline object or its name; replaces the method's own.
        chunk: rows through the model at once, or "auto". Results do not depend on it.
        memory_budget: bytes, or text such as "4GB", that the evaluation may hold at once.
        seed: replaces the method's own.
        allow_train: explain a model in train mode, with its random draws frozen.

    Returns:
        an Attribution; its ``diagnostics`` say how far to trust it.

    Raises:
        InputError, ModelError, SiteError, TargetError, MethodError: each says what to type instead.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
        >>> explain(net, torch.ones(2, 4), target=1).values.shape
        torch.Size([2, 4])
    """
    chosen = as_method(method, baseline=baseline, seed=seed)
    began = time.perf_counter()
    call = opened(model, inputs)
    problem = pose(
        call.model,
        call.inputs,
        target=call.target(target),
        site=site,
        chunk=chunk,
        memory_budget=memory_budget,
        allow_train=allow_train,
    )
    return attribute(call.named(problem), chosen, call.model, call.inputs, began)


def compare(
    model: Callable[..., Any],
    inputs: Any,
    methods: Mapping[str, Any] | Sequence[Any],
    *,
    target: Any = None,
    site: str | Site | None = None,
    baseline: Any = None,
    chunk: int | str = "auto",
    memory_budget: int | float | str | None = None,
    seed: int | None = None,
    allow_train: bool = False,
) -> dict[str, Attribution]:
    """Several methods on one problem: one shadow, one clean pass, one target, shared gradients and sweeps.

    Args:
        methods: name -> method (object or text), or a sequence of methods named by their text.

    Returns:
        name -> Attribution, each as ``explain`` alone gives it.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
        >>> sorted(compare(net, torch.ones(1, 4), {"g": "gradient", "ig": "ig"}))
        ['g', 'ig']
    """
    named = named_methods(methods)
    chosen = {
        name: as_method(each, baseline=baseline, seed=seed, lenient=True) for name, each in named.items()
    }
    call = opened(model, inputs)
    problem = pose(
        call.model,
        call.inputs,
        target=call.target(target),
        site=site,
        chunk=chunk,
        memory_budget=memory_budget,
        allow_train=allow_train,
    )
    call.named(problem)
    memo: dict[Any, Any] = {}
    results = {}
    for name, each in chosen.items():
        began = time.perf_counter()
        results[name] = attribute(problem.fresh(memo), each, call.model, call.inputs, began)
    return results


def explain_targets(
    model: Callable[..., Any],
    inputs: Any,
    targets: Sequence[Any],
    *,
    method: Any = "auto",
    site: str | Site | None = None,
    baseline: Any = None,
    chunk: int | str = "auto",
    memory_budget: int | float | str | None = None,
    seed: int | None = None,
    allow_train: bool = False,
) -> list[Attribution]:
    """One explanation per target, sharing every forward pass: k targets cost (1 + k) passes instead of 2k.

    Returns:
        one Attribution per target, in order, each as ``explain`` alone gives it.

    Raises:
        TargetError: there is no target. Others as ``explain``.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
        >>> len(explain_targets(net, torch.ones(1, 4), [0, 1, 2], method="gradient"))
        3
    """
    if isinstance(targets, (str, bytes)) or len(targets) == 0:
        raise TargetError("targets is a sequence of at least one target, for example [0, 1, 2].")
    chosen = as_method(method, baseline=baseline, seed=seed)
    call = opened(model, inputs)
    targets = [call.target(target) for target in targets]
    if any(continuations(target, 1) is not None for target in targets):
        # each whole-string target has a forward of its own, so there is nothing to share
        return [
            explain(
                model,
                inputs,
                target=target,
                method=chosen,
                site=site,
                chunk=chunk,
                memory_budget=memory_budget,
                allow_train=allow_train,
            )
            for target in targets
        ]
    began = time.perf_counter()
    problem = pose_targets(
        call.model,
        call.inputs,
        targets,
        site=site,
        chunk=chunk,
        memory_budget=memory_budget,
        allow_train=allow_train,
    )
    whole = attribute(call.named(problem), chosen, call.model, call.inputs, began)
    count = len(targets)
    parts = [whole[torch.arange(number, len(whole), count)] for number in range(count)]
    # one target without an index must not take the others' away
    known = [each.index for each in problem.posed.targets]
    return [
        part if index is None else dataclasses.replace(part, target=index.cpu())
        for part, index in zip(parts, known, strict=True)
    ]


def explain_generation(
    model: nn.Module,
    inputs: Any,
    generated: Any,
    *,
    tokenizer: Any = None,
    method: Any = "auto",
    site: str | Site | None = None,
    baseline: Any = None,
    chunk: int | str = "auto",
    memory_budget: int | float | str | None = None,
    seed: int | None = None,
) -> Attribution:
    """Explain each token of a generated text: one row per output token, from one teacher-forced forward.

    Row j explains the log-probability of output token j given the prompt and the output tokens before it; these
    tokens receive attribution like the prompt's, later ones none.

    Args:
        model: a causal language model, or a text-generation pipeline.
        inputs: the prompt, one example: the tokenizer's output, or a (1, T) tensor of ids; text for a pipeline.
        generated: what was generated: token ids, or text with ``tokenizer``.
        tokenizer: needed for text; also labels the tokens.

    Returns:
        an Attribution with one row per output token over the T + N - 1 tokens that were read.

    Raises:
        InputError: the prompt is not one example of token ids. TargetError: nothing was generated.

    Cost: one shared forward and one backward per output token and step.
    """
    call = opened(model, inputs)
    tokenizer = call.tokenizer if tokenizer is None else tokenizer
    ids = generated_ids(generated, tokenizer)
    longer, length = with_appended(call.inputs, ids[:-1])
    targets = [
        LogProb(token, tokenizer=tokenizer, position=length - 1 + number) for number, token in enumerate(ids)
    ]
    began = time.perf_counter()
    problem = pose_targets(call.model, longer, targets, site=site, chunk=chunk, memory_budget=memory_budget)
    return attribute(problem, as_method(method, baseline=baseline, seed=seed), call.model, longer, began)


def named_methods(methods: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """Methods by name; those of a sequence are named by their text. Raises MethodError when there are none."""
    if isinstance(methods, Mapping):
        named = dict(methods)
    elif isinstance(methods, (list, tuple)):
        named = {str(each): each for each in methods}
    else:
        named = {}
    if not named:
        raise MethodError(
            f'compare takes methods by name, for example {{"ig": "ig(steps=32)"}}, or a list of them; got {methods!r}. '
            "For one method call explain."
        )
    return named


def generated_ids(generated: Any, tokenizer: Any) -> list[int]:
    """Token ids of a generated text. Raises TargetError when there are none."""
    if isinstance(generated, str):
        if tokenizer is None:
            raise TargetError(
                "generated text needs its tokenizer: explain_generation(..., tokenizer=tokenizer)."
            )
        generated = tokenizer.encode(generated, add_special_tokens=False)
    ids = [int(token) for token in torch.as_tensor(generated).flatten()]
    if not ids:
        raise TargetError("nothing was generated: give at least one output token.")
    return ids


def with_appended(inputs: Any, ids: Sequence[int]) -> tuple[Any, int]:
    """A prompt of one example with tokens appended, and the prompt's length. Raises InputError."""
    given = dict(inputs.items()) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    tokens = given.get("input_ids")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or len(tokens) != 1:
        raise InputError(
            "explain_generation takes one prompt: token ids (1, T), or the tokenizer's output for it."
        )
    more = torch.tensor([list(ids)], dtype=tokens.dtype, device=tokens.device)
    longer = {name: value for name, value in given.items() if name in ("input_ids", "attention_mask")}
    longer |= {
        name: value for name, value in given.items() if name not in longer and name != "token_type_ids"
    }
    longer["input_ids"] = torch.cat([tokens, more], 1)
    if "attention_mask" in given:
        longer["attention_mask"] = torch.cat([given["attention_mask"], torch.ones_like(more)], 1)
    return longer, tokens.shape[1]


def as_method(method: Any, *, baseline: Any = None, seed: int | None = None, lenient: bool = False) -> Any:
    """A method object from an object, a text or "auto", with baseline and seed put in. Raises MethodError."""
    if isinstance(method, str):
        # measured against the others in docs/which-method.md
        method = IntegratedGradients(tol=0.05) if method.strip().lower() == "auto" else parse_method(method)
    if isinstance(method, type) or not callable(method):
        raise MethodError(
            f'a method is an object such as IntegratedGradients(), its text, or "auto"; got {method!r}.'
        )
    if isinstance(baseline, str):
        baseline = parse_baseline(baseline)
    elif isinstance(baseline, (Tensor, int, float)) or hasattr(baseline, "__array__"):
        baseline = Given(torch.as_tensor(baseline))
    elif baseline is not None and (isinstance(baseline, type) or not callable(baseline)):
        raise MethodError(
            f"a baseline is a tensor, an object such as Zeros(), or its name; got {type(baseline).__name__}. "
            'Write for example baseline=torch.zeros_like(x), baseline=Blur(5.0), baseline="mean".'
        )
    try:
        return with_settings(method, baseline=baseline, seed=seed)
    except MethodError:
        if lenient:
            return method
        raise


def attribute(problem: Problem, method: Any, model: Any, inputs: Any, began: float) -> Attribution:
    """Call a method on a problem and record everything a reader of the result needs."""
    values = method(problem)
    require_values(values, problem, method)
    if not all(bool(torch.isfinite(leaf).all()) for leaf in leaves(values)):
        problem.note(
            "some values are NaN or infinite: the gradient does not exist there, or overflowed in this dtype"
        )
    diagnostics = {
        "gap": None,
        "converged": None,
        "evaluations": problem.evaluations_of_rows(),
        "notes": [],
        **problem.diagnostics,
    }
    resolved = problem.posed.targets
    rows = list(zip(problem.examples.tolist(), problem.asked.tolist(), strict=True))
    labels = tuple(resolved[asked].labels[example] for example, asked in rows)
    index = None
    if all(each.index is not None for each in resolved):
        index = torch.stack([each.index.cpu() for each in resolved if each.index is not None], 1).flatten()
    domains = domains_of(method)
    seen = problem
    for domain in domains:
        seen = seen.in_domain(domain)
    return Attribution(
        values=map_leaves(torch.Tensor.detach, values),
        point=seen.point,
        target=labels if index is None else index,
        score=problem.score(),
        method=repr(method),
        site=problem.site,
        domain=" then ".join(repr(domain) for domain in domains) or None,
        diagnostics=diagnostics | signals(seen),
        meta={
            "model": type(model).__name__,
            "labels": list(labels),
            "tokens": token_labels(problem, inputs),
            "coordinates": coordinates(seen),
            "seconds": time.perf_counter() - began,
            "chunk": problem.resources.chosen,
            "dtype": str(leaves(problem.point)[0].dtype).removeprefix("torch."),
            "device": str(problem.device),
            "versions": {"pullback": __version__, "torch": torch.__version__},
        },
    )


def require_values(values: Point, problem: Problem, method: Any) -> None:
    """A method gives one row per example. Raises MethodError."""
    found = leaves(values) if isinstance(values, (Tensor, dict)) else []
    if not found or any(
        not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != problem.batch for leaf in found
    ):
        given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise MethodError(
            f"{method!r} gave {given}; a method gives one row for each of the {problem.batch} examples."
        )


def domains_of(method: Any) -> list[Any]:
    """The domains a method works in, the first applied first."""
    found = []
    while method is not None:
        if (domain := getattr(method, "domain", None)) is not None:
            found.append(domain)
        method = getattr(method, "method", None)
    return found
