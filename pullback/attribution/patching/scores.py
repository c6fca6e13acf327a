"""Activation patching, exact and by first-order estimates: attribution patching, RelP and integrated gradients.

Two inputs of equal length, clean and corrupted, and a metric of the output. A site matters where exchanging its value
between the runs moves the metric.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from pullback.attribution.patching.exchange import Exchange, Layout
from pullback.attribution.patching.posing import pose_pair
from pullback.attribution.patching.runs import CounterfactualPair
from pullback.attribution.relevance import rules_of
from pullback.attribution.rules.presets import registered_rules
from pullback.core.errors import InputError, MethodError
from pullback.core.inputs import ModelInputs
from pullback.core.overrides import Rule
from pullback.core.points import contract, expand_like, widest
from pullback.core.sites import Site

__all__ = ["patching_scores"]

Method = Literal["exact", "atp", "relp", "ig"]
Direction = Literal["denoise", "noise"]
Key = TypeVar("Key", bound=Hashable)

_METHODS = ("exact", "atp", "relp", "ig")
_DIRECTIONS = ("denoise", "noise")


def patching_scores(
    model: Callable[..., Any],
    clean: Any,
    corrupted: Any,
    metric: Any,
    sites: Sequence[Key] | str | Site,
    method: Method = "exact",
    direction: Direction = "denoise",
    *,
    normalised: bool = False,
    per_head: int | Mapping[Any, int] | None = None,
    steps: int = 10,
    rules: str | Sequence[Rule] | None = None,
    attention: str | None = None,
    uncovered: str = "error",
    chunk: int | str = "auto",
    allow_train: bool = False,
) -> dict[Any, Tensor]:
    """How much exchanging the value at one position of a site between two runs changes a metric M.

    With a the site's value and p a position (b ↦ means "in its place"):

    - ``"exact"``, denoise: M(corrupted run, a_p ↦ clean) - M(corrupted); noise: M(clean run, a_p ↦ corrupted) -
      M(clean). One forward for each site, position, head and example, in chunks.
    - ``"atp"``: Σ_d (a_clean - a_corrupted) ∂M/∂a at the corrupted run; noise: Σ_d (a_corrupted - a_clean) ∂M/∂a at
      the clean run. All sites from one forward and one backward; exact where M is linear in a.
    - ``"relp"``: the same with the gradient under the RelP rules. ``explain(..., RelP())`` is the activation times
      this coefficient; the paper's RelP, (clean - corrupted) times the coefficient, is this function.
      With attention="detach", its default, nothing flows to queries and keys: sites there score 0.
    - ``"ig"``: the gradient averaged over ``steps`` midpoints of the straight line between the corrupted and the clean
      embeddings (or floating inputs), as in EAP-IG, not between values at the site; times the site's difference.

    So a positive denoise score says that the clean value raises the metric, a negative noise score that the corrupted
    value lowers it. Where both runs have the same value the score is exactly 0.

    Args:
        model: an ``nn.Module`` (left untouched), or a plain callable, which has the site "input" only.
        clean, corrupted: what ``explain`` takes, of equal shapes and equal attention masks.
        metric: a callable output -> (B,), always called with whole batches in order, or a target such as
            ``Contrast(" Mary", " John", tokenizer=tok)``, fixed on the clean run; larger is cleaner, usually.
        sites: texts or ``Site`` objects; of a tuple output the first tensor is exchanged.
        normalised: divide by M(clean) - M(corrupted) of each example: denoise 1 is full recovery, noise -1 full loss.
        per_head: heads that the features of every site divide into, or such numbers by site. A head's own output is
            the input of the projection after it, for example "transformer.h.0.attn.c_proj:input".
        steps: points on the line, for "ig".
        rules, attention: for "relp", another preset's name or own rules, and the way through attention ("detach",
            "gradient", "attnlrp"), as in ``Relevance``.
        uncovered: "error", or "gradient" to let operations without a rule keep their derivative.
        chunk: rows through the model at once, or "auto".
        allow_train: take a model in train mode as it is.

    Returns:
        for each site, keyed as given, scores in the metric's dtype and unit (or normalised): (B, T) for values
        (B, T, D), (B, 1) for (B, D), (B, H, W) for maps (B, C, H, W); heads last where asked for. Padding is 0.

    Raises:
        InputError: unequal shapes or masks; a metric that does not differ between the runs, if normalised.
        MethodError, SiteError, TargetError, CoverageError: each says what to do instead.

    Cost: three forwards beside those named above; holds the values of all sites of both runs.

    Source: Nanda 2023 (attribution patching); Jafari et al. 2025 (RelP); Hanna et al. 2024 (EAP-IG);
    Zhang and Nanda 2024 (denoising and noising).

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> found = patching_scores(model, x, y, lambda output: output[:, 0], ["input"])["input"]
        >>> torch.allclose(found, model.weight[:, :1])
        True
    """
    if method not in _METHODS:
        raise MethodError(f"no patching method {method!r}: use one of {', '.join(map(repr, _METHODS))}.")
    if direction not in _DIRECTIONS:
        raise MethodError(f'no direction {direction!r}: use "denoise" or "noise".')
    if uncovered not in ("error", "gradient"):
        raise MethodError(f'uncovered is "error" or "gradient", got {uncovered!r}.')
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise MethodError(f"steps is a number of points on the line, at least 1; got {steps!r}.")
    keys: list[Any] = [sites] if isinstance(sites, (str, Site)) else list(sites)
    ruled = _relevance_rules(method, rules, attention)
    with torch.inference_mode(False), torch.no_grad():
        pair, at = pose_pair(
            model, clean, corrupted, metric, keys, method in ("relp", "ig"), chunk, allow_train
        )
        runs = {
            name: (read, *pair.values(read))
            for name, read in (("clean", pair.clean), ("corrupted", pair.corrupted))
        }
        known = {name: _scored(pair, output) for name, (_, _, output) in runs.items()}
        base, other = ("corrupted", "clean") if direction == "denoise" else ("clean", "corrupted")
        read, values, reference = runs[base]
        source = runs[other][1]
        heads = _heads(keys, per_head)
        layouts = {key: _layout(key, tuple(values[at[key]].shape[1:]), heads[key]) for key in keys}
        free = {key: _free(pair, layouts[key]) for key in keys}
        if method == "exact":
            found = _exchanged(pair, read, reference, known[base], values, source, at, layouts, free)
        else:
            if method == "ig":
                gradients = _averaged(pair, read, reference, runs["corrupted"][1], runs["clean"][1], steps)
            else:
                gradients = _at_base(pair, read, reference, ruled, uncovered)
            difference = {site: widest(source[site]) - widest(values[site]) for site in pair.sites}
            products = {site: contract(widest(gradients[site]), difference[site]) for site in pair.sites}
            found = {key: layouts[key].split(products[at[key]]).sum(-1) for key in keys}
        scale = _recovered(known["clean"], known["corrupted"]) if normalised else None
        result = {}
        for key in keys:
            scores = found[key]
            if (mask := free[key]) is not None:
                scores = torch.where(mask.to(scores.device)[:, :, None], scores, 0.0)
            if scale is not None:
                scores = scores / expand_like(scale, scores)
            shape = (pair.batch, *layouts[key].positions, *([heads[key]] if heads[key] else []))
            result[key] = scores.reshape(shape).to(known["clean"].dtype)
        return result


def _relevance_rules(
    method: Method, rules: str | Sequence[Rule] | None, attention: str | None
) -> tuple[Rule, ...] | None:
    """The rules of "relp". Raises MethodError for settings that another method would not read."""
    if method == "relp":
        return (*registered_rules(), *rules_of("relp" if rules is None else rules, attention))
    if rules is not None or attention is not None:
        raise MethodError(f'rules and attention are settings of method="relp", not of {method!r}.')
    return None


def _heads(keys: Sequence[Any], per_head: int | Mapping[Any, int] | None) -> dict[Any, int]:
    """Heads of each site, 0 where none were asked for."""
    if per_head is None:
        return dict.fromkeys(keys, 0)
    if isinstance(per_head, Mapping):
        texts = {str(key): int(count) for key, count in per_head.items()}
        unknown = [text for text in texts if text not in {str(key) for key in keys}]
        if unknown:
            raise MethodError(f'per_head names "{unknown[0]}", which is none of the sites.')
        heads = {key: texts.get(str(key), 0) for key in keys}
    else:
        texts = {"": per_head}
        heads = dict.fromkeys(keys, per_head)
    if any(count < 1 for count in texts.values()):
        raise MethodError(f"per_head is a number of heads, at least 1, or one by site; got {per_head!r}.")
    return heads


def _layout(key: Any, shape: tuple[int, ...], heads: int) -> Layout:
    layout = Layout(shape, max(1, heads))
    features = torch.Size(shape).numel() // torch.Size(layout.positions).numel()
    if features % layout.heads:
        raise MethodError(f'the {features} features at "{key}" do not divide into {heads} heads.')
    return layout


def _free(pair: CounterfactualPair, layout: Layout) -> Tensor | None:
    """(B, T) true at real tokens, for values with a feature vector per token; None where nothing is padding."""
    mask = pair.clean.attention_mask
    if mask is None or len(layout.shape) != 2 or layout.positions != (mask.shape[1],):
        return None
    return mask != 0


def _scored(pair: CounterfactualPair, output: Any) -> Tensor:
    return pair.score(output, torch.arange(pair.batch))


def _exchanged(
    pair: CounterfactualPair,
    read: ModelInputs,
    reference: Any,
    known: Tensor,
    values: Mapping[Site, Tensor],
    source: Mapping[Site, Tensor],
    at: Mapping[Any, Site],
    layouts: Mapping[Any, Layout],
    free: Mapping[Any, Tensor | None],
) -> dict[Any, Tensor]:
    """Change of the metric for every site, position, head and example: (B, P, heads) by site."""
    keys = list(at)
    found, table = {}, []
    for number, key in enumerate(keys):
        layout = layouts[key]
        places = torch.Size(layout.positions).numel()
        found[key] = torch.zeros(
            pair.batch, places, layout.heads, dtype=widest(known).dtype, device=known.device
        )
        rows = torch.cartesian_prod(
            torch.tensor([number]), torch.arange(places), torch.arange(layout.heads), torch.arange(pair.batch)
        )
        if not pair.whole:
            # an entry that both runs share changes nothing: most of them, before the first token that differs
            moved = (layout.split(values[at[key]]) != layout.split(source[at[key]])).any(-1).cpu()
            if (mask := free[key]) is not None:
                moved &= mask.cpu()[:, :, None]
            rows = rows[moved[rows[:, 3], rows[:, 1], rows[:, 2]]]
        table.append(rows)
    every = torch.cat(table)

    def evaluate(part: Tensor) -> Tensor:
        rows = every[part]
        exchanges: list[tuple[Site, Exchange]] = []
        for number in rows[:, 0].unique().tolist():
            (where,) = (rows[:, 0] == number).nonzero(as_tuple=True)
            _, position, head, example = rows[where].unbind(1)
            site = at[keys[number]]
            exchange = Exchange(layouts[keys[number]], source[site], where, position, head, example)
            exchanges.append((site, exchange))
        return pair.patched(read, reference, rows[:, 3], exchanges)

    before = widest(known)
    for part, scores in pair.pieces(len(every), evaluate):
        rows = every[part]
        change = widest(scores) - before[rows[:, 3].to(before.device)]
        for number in rows[:, 0].unique().tolist():
            mine = rows[:, 0] == number
            _, position, head, example = rows[mine].unbind(1)
            found[keys[number]][example, position, head] = change[mine.to(change.device)]
    return found


def _at_base(
    pair: CounterfactualPair, read: ModelInputs, reference: Any, rules: Sequence[Rule] | None, uncovered: str
) -> dict[Site, Tensor]:
    """The gradient at each site in one of the two runs, under rules if there are any."""
    parts = [
        each
        for _, each in pair.pieces(
            pair.batch,
            lambda rows: pair.gradients(read, reference, rows, rules=rules, uncovered=uncovered),
        )
    ]
    return {site: torch.cat([part[site] for part in parts]) for site in pair.sites}


def _averaged(
    pair: CounterfactualPair,
    read: ModelInputs,
    reference: Any,
    corrupted: Mapping[Site, Tensor],
    clean: Mapping[Site, Tensor],
    steps: int,
) -> dict[Site, Tensor]:
    """The gradient at each site, averaged over midpoints of the line between the two runs' origins."""
    total = {site: torch.zeros_like(widest(corrupted[site])) for site in pair.sites}

    def evaluate(rows: Tensor) -> dict[Site, Tensor]:
        examples = rows % pair.batch
        fraction = (rows // pair.batch + 0.5) / steps
        line = {}
        for site in pair.origin:
            start, end = (values[site][examples.to(values[site].device)] for values in (corrupted, clean))
            line[site] = start + expand_like(fraction.to(start.real.dtype), start) * (end - start)
        return pair.gradients(read, reference, examples, line)

    for rows, gradients in pair.pieces(steps * pair.batch, evaluate):
        for site, gradient in gradients.items():
            examples = (rows % pair.batch).to(gradient.device)
            total[site].index_add_(0, examples, widest(gradient) / steps)
    return total


def _recovered(clean: Tensor, corrupted: Tensor) -> Tensor:
    """What full recovery is worth, M(clean) - M(corrupted), (B,). Raises InputError where it is rounding only."""
    difference = widest(clean) - widest(corrupted)
    rounding = 16 * torch.finfo(clean.dtype).eps * torch.maximum(clean.abs(), corrupted.abs())
    flat = (difference.abs() <= rounding).nonzero()
    if len(flat):
        example = int(flat[0])
        raise InputError(
            f"the metric of example {example} is {float(clean[example]):.6g} on the clean and "
            f"{float(corrupted[example]):.6g} on the corrupted input, so there is nothing to normalise by. "
            "Leave the example out, corrupt it more, or pass normalised=False."
        )
    return difference
