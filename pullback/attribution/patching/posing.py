"""Pose two inputs to one model: checked to be comparable, the metric fixed on the clean one, the sites found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from pullback.attribution.patching.runs import CounterfactualPair
from pullback.core.errors import InputError, SiteError, TargetError
from pullback.core.inputs import ModelInputs, read_inputs
from pullback.core.pose import pose
from pullback.core.problem import Problem
from pullback.core.sites import Site
from pullback.core.targets import Preset, continuations

__all__ = ["pose_pair"]


def pose_pair(
    model: Callable[..., Any],
    clean: Any,
    corrupted: Any,
    metric: Any,
    keys: Sequence[Any],
    needs_origin: bool,
    chunk: int | str,
    allow_train: bool,
) -> tuple[CounterfactualPair, dict[Any, Site]]:
    """The pair of runs, and which site of it each given site is.

    ``needs_origin`` asks for the place where values enter the model, and fails where there is none.
    """
    if not keys:
        raise SiteError('no sites given: name some, for example ["embeddings"] or ["transformer.h.0.mlp"].')
    asked = {key: Site.parse(key) for key in keys}
    first, second = read_inputs(clean, model), read_inputs(corrupted, model)
    _require_equal(first, second)
    if continuations(metric, first.batch) is not None:
        raise TargetError(
            "a metric of several tokens has no one run to patch: use texts of one token, or a callable of the output."
        )
    problem = _posed(model, clean, metric, tuple(asked.values()), needs_origin, chunk, allow_train)
    posed = problem.posed
    read = posed.inputs
    at = {
        key: replace(_resolved(site.plain, posed.site, read, posed.asked_site), domain=site.domain)
        for key, site in asked.items()
    }
    origin = [Site("input", leaf=name) for name in read.explained]
    if posed.asked_site == "embeddings":
        origin.append(posed.site)
    for site in at.values():
        if site.kind == "module" and not isinstance(posed.module, nn.Module):
            raise SiteError(f'"{site}" needs an nn.Module; of a plain callable only "input" can be patched.')
    pair = CounterfactualPair(
        module=posed.module,
        clean=read,
        corrupted=second,
        sites=tuple(dict.fromkeys(at.values())),
        origin=tuple(origin) if needs_origin else (),
        metric=posed.targets[0],
        per_row=isinstance(metric, Preset) or not callable(metric),
        size=problem.resources.rows(problem.device, lambda rows: 0),
        whole=posed.whole,
        stochastic=posed.stochastic,
        generators=posed.generators,
    )
    return pair, at


def _posed(
    model: Callable[..., Any],
    clean: Any,
    metric: Any,
    asked: tuple[Site, ...],
    needs_origin: bool,
    chunk: int | str,
    allow_train: bool,
) -> Problem:
    """The clean run, posed where values enter the model; else, if the method allows it, at a site that exists."""
    try:
        return pose(model, clean, target=metric, chunk=chunk, allow_train=allow_train)
    except InputError:
        inside = next((site for site in asked if site.kind == "module"), None)
        if needs_origin or inside is None:
            raise
        return pose(model, clean, target=metric, site=inside.plain, chunk=chunk, allow_train=allow_train)


def _resolved(site: Site, entry: Site, read: ModelInputs, entered: str) -> Site:
    """A site with a fixed place: the embedding module, or one leaf of the input."""
    if site.kind == "embeddings":
        if entered != "embeddings":
            raise SiteError('the inputs are no token ids, so there are no "embeddings": use "input".')
        return entry
    if site.kind == "input":
        names = [site.leaf] if site.leaf else list(read.explained)
        if len(names) != 1 or names[0] not in read.explained:
            raise SiteError(
                f'"{site}" is not one floating input: patch one of '
                f"{', '.join(f'input:{name}' for name in read.explained) or 'none (token ids: embeddings)'}."
            )
        return Site("input", leaf=names[0])
    return site


def _require_equal(clean: ModelInputs, corrupted: ModelInputs) -> None:
    """Both inputs hold the same tensors in the same shapes, and the same real tokens. Raises InputError."""
    if clean.leaf.keys() != corrupted.leaf.keys():
        raise InputError(
            f"the clean inputs are {', '.join(clean.leaf)}, the corrupted {', '.join(corrupted.leaf)}. "
            "Give both the same tensors."
        )
    for name, leaf in clean.leaf.items():
        shape, other = tuple(leaf.shape), tuple(corrupted.leaf[name].shape)
        if shape != other:
            raise InputError(
                f'input "{name}" has shape {shape} in the clean and {other} in the corrupted inputs: patching '
                "exchanges values position by position. Give as many examples, and prompts of equal token length: "
                "swap words for words of as many tokens."
            )
    masks = clean.attention_mask, corrupted.attention_mask
    if masks[0] is None or masks[1] is None:
        return
    real = [mask != 0 for mask in masks if mask is not None]
    unequal = (real[0] != real[1].to(real[0].device)).any(1).nonzero()
    if len(unequal):
        example = int(unequal[0])
        raise InputError(
            f"example {example} has {int(real[0][example].sum())} real tokens in the clean and "
            f"{int(real[1][example].sum())} in the corrupted inputs (attention_mask), or others: patching exchanges "
            "values position by position. Swap words for words of as many tokens."
        )
