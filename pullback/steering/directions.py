"""Fitting steering vectors to pairs of answers, by attribution, by gradients, by differences, and at random."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from pullback.attribution.paths import require_count
from pullback.core import noise
from pullback.core.errors import MethodError

from .agreement import agreement_of, displacement, unit, warn_of_disagreement
from .blocks import Layers, find_blocks, select_layers
from .grains import Evidence, ImageBaseline, Masking, TokenCount, baseline_text, evidence
from .pairs import EncodedPair, Pair, digest, encode_pairs, in_batches, prompt_digest
from .posed_prompts import PosedPrompts, answer_states, last_gradients, last_states, pose_prompts
from .vector import SteeringVector

__all__ = ["fit"]

Method: TypeAlias = Literal["grains", "mean_grad", "mean_diff", "random_tokens", "random"]
Aggregate: TypeAlias = Literal["pca", "mean"]
Combine: TypeAlias = Literal["both", "positive", "negative"]

LARGEST_GAP = 0.1


def fit(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Pair | tuple[Any, ...]],
    method: Method = "grains",
    *,
    k: TokenCount = 8,
    attribution: Literal["ig", "relp", "gradient"] = "ig",
    steps: int = 32,
    quadrature: str = "midpoint",
    baseline: Any = None,
    image_baseline: ImageBaseline = "mean",
    protect: Sequence[int] = (),
    aggregate: Aggregate = "pca",
    combine: Combine = "both",
    layers: Layers | None = None,
    blocks: str | None = None,
    batch_size: int = 8,
    chunk: int | str = "auto",
    seed: int = 0,
) -> SteeringVector:
    """A direction per block towards the preferred answers of pairs and away from the dispreferred ones.

    "grains": the tokens of each prompt are scored for F = log p(preferred) - log p(dispreferred); S+ are the k highest
    positive and S- the k lowest negative ones. With d±_l = h_l(x) - h_l(x without S±) at the last token, the direction
    is ``v_l = a(d+_l) - a(d-_l)``, a being the first principal direction over the pairs, uncentred and turned towards
    the mean, or the mean. "random_tokens": the same with tokens drawn at random. "mean_grad": the mean of ∂F/∂h_l at
    the last token. "mean_diff": the mean difference of h_l at the last tokens of the two answers. "random": a random
    direction.

    Args:
        model: any transformer with text as input, alone or with images.
        tokenizer: of the model, or its processor; None where pairs hold token ids.
        pairs: ``Pair(prompt, preferred, dispreferred, image=None)`` or such tuples.
        method: as above.
        k: tokens per sign in each example and modality: a number, a share such as 0.2, or {"text": 8, "image": 20}.
        attribution: "ig", "relp" or "gradient": the last two take one backward pass.
        steps, quadrature: of integrated gradients.
        baseline: where attribution starts and what masked text becomes: None (the mask token's embedding, else the mean
            embedding), "mask", "pad", "mean", "zero", a token id, an embedding (width,), or a baseline.
        image_baseline: the same for what comes from an image: its "mean" or "zero".
        protect: token ids never masked, besides special tokens and the last one.
        aggregate: "pca" or "mean".
        combine: "both", or the "positive" or "negative" half alone.
        layers: which blocks: numbers, depths, a slice; None is all.
        blocks: dotted path of the list of blocks, where it is not found.
        batch_size: pairs at once; results do not depend on it.
        chunk: rows of integrated gradients at once.
        seed: of the random methods.

    Returns:
        unit directions; scales are the lengths of the mean displacement, in score per unit for "mean_grad", 1 for
        "random". The provenance holds settings, chosen tokens, completeness, and by block how well the pairs agree.

    Raises:
        InputError: pairs that are no contrast or do not fit into the model. MethodError: parameters out of range, or
        nothing found. ModelError, SiteError, TargetError: as ``pullback.pose`` and ``find_blocks``.

    Warns: completeness gap above 0.1 of the change of F; pairs whose displacements do not agree.

    Cost: per pair ``steps`` forward and backward passes of each answer ("relp", "gradient", "mean_grad": one), and
    three forwards of the prompt. Images go through the vision tower once.

    Source: Nguyen et al. 2025 (GrAInS), as ``pullback.steering.grains`` says; "mean_diff": Rimsky et al. 2024 (CAA).

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> fit(LlamaForCausalLM(LlamaConfig(**sizes)).eval(), None, [([5, 6, 7], 8, 9)], "mean_grad").layers
    (0, 1)
    """
    for name, value, known in (
        ("method", method, Method),
        ("aggregate", aggregate, Aggregate),
        ("combine", combine, Combine),
    ):
        if value not in get_args(known):
            raise MethodError(f"{name}={value!r}; expected one of {', '.join(map(repr, get_args(known)))}.")
    require_count("batch_size", batch_size)
    if method == "mean_diff" and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise MethodError(
            'method="mean_diff" reads answers where they follow the prompt; in an encoder-decoder they do not. Use '
            'method="mean_grad" or "grains".'
        )
    chosen = None if method == "random_tokens" else attribution
    masking = Masking(k, chosen, steps, quadrature, baseline, image_baseline, tuple(protect), seed)
    numbers = list(range(len(find_blocks(model, blocks))))
    wanted = numbers if layers is None else select_layers(layers, len(numbers))
    encoded = encode_pairs(model, tokenizer, pairs)
    found = _Found()
    width = 0
    for batch in in_batches(model, encoded, batch_size):
        posed = pose_prompts(
            model, tokenizer, batch, blocks=blocks, chunk=chunk, whole_answers=method == "mean_diff"
        )
        if method == "random":
            width = last_states(posed, posed.embeddings).shape[-1]
            break
        if method == "mean_grad":
            found.take(posed, {"moves": last_gradients(posed)})
        elif method == "mean_diff":
            preferred, dispreferred = answer_states(posed)
            found.take(posed, {"moves": preferred - dispreferred})
        else:
            each = evidence(posed, masking, model, tokenizer)
            found.take(posed, _rows(each, combine), _choices(posed, each))
            found.vision_once &= posed.vision_once
    settings: dict[str, Any] = {"seed": seed} if method == "random" else {}
    facts: dict[str, Any] = {}
    if method in ("grains", "random_tokens"):
        settings = {
            "k": dict(k) if isinstance(k, Mapping) else k, "attribution": chosen, "steps": steps,
            "quadrature": quadrature, "baseline": baseline_text(baseline), "image_baseline": image_baseline,
            "protect": list(protect), "aggregate": aggregate, "combine": combine,
            "seed": seed,
        }  # fmt: skip
        facts = {"chosen": [found.choices[pair.number] for pair in encoded], "vision_once": found.vision_once}
        if chosen is not None:
            facts["completeness"] = _completeness(facts["chosen"], chosen)
        if not any(each["positive"] or each["negative"] for each in facts["chosen"]):
            raise MethodError(
                "no token was chosen: every token of the prompts is special, protected, last, or has a score of 0. "
                "Give longer prompts, or check that the answers depend on them."
            )
    if method == "random":
        moves = {layer: unit(noise.normal((width,), seed, layer, "random").double()) for layer in wanted}
        agreement: list[dict[str, float]] = []
    else:
        rows = found.stacked("moves", encoded)
        if not bool(rows.any()):
            raise MethodError(
                "no hidden state moved at the last token in any block: nothing there depends on the prompt's other "
                'tokens. Use method="mean_diff", or prompts whose answers depend on them.'
            )
        halves = [found.stacked(name, encoded) for name in ("positive", "negative") if name in found.names]
        moves = {layer: displacement(rows, halves, layer, aggregate) for layer in wanted}
        agreement = [agreement_of(rows[:, layer], moves[layer], layer) for layer in wanted]
        warn_of_disagreement(agreement, len(encoded))
    return SteeringVector.from_displacements(
        moves, model, blocks=blocks, method=method, settings=settings, pairs=len(encoded), pairs_digest=digest(encoded),
        prompts=[prompt_digest(pair.ids, pair.others) for pair in encoded], agreement=agreement, **facts,
    )  # fmt: skip


@dataclass
class _Found:
    """What the batches gave, by the number of the pair."""

    rows: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    choices: dict[int, dict[str, Any]] = field(default_factory=dict)
    vision_once: bool = True

    @property
    def names(self) -> set[str]:
        return set(self.rows)

    def take(
        self, posed: PosedPrompts, rows: Mapping[str, Tensor], choices: Sequence[dict[str, Any]] = ()
    ) -> None:
        for name, each in rows.items():
            self.rows.setdefault(name, {}).update(
                zip((pair.number for pair in posed.pairs), each, strict=True)
            )
        self.choices.update(zip((pair.number for pair in posed.pairs), choices, strict=False))

    def stacked(self, name: str, pairs: Sequence[EncodedPair]) -> Tensor:
        """(N, block, width) in the order of the pairs."""
        return torch.stack([self.rows[name][pair.number] for pair in pairs])


def _rows(found: Evidence, combine: Combine) -> dict[str, Tensor]:
    """The displacements of each pair: of both halves together, and each half."""
    halves = {"positive": found.without_positive, "negative": -found.without_negative}
    kept = {name: rows for name, rows in halves.items() if combine in ("both", name)}
    return {"moves": torch.stack(list(kept.values())).sum(0), **kept}


def _choices(posed: PosedPrompts, found: Evidence) -> list[dict[str, Any]]:
    every = []
    for row in range(len(posed.pairs)):
        each: dict[str, Any] = {
            name: [
                [place, float(found.scores[row, place]), "image" if posed.image[row, place] else "text"]
                for place in mask[row].nonzero()[:, 0].tolist()
            ]
            for name, mask in (("positive", found.positive), ("negative", found.negative))
        }
        every.append({**each, "gap": float(found.gap[row]), "change": float(found.change[row])})
    return every


def _completeness(chosen: Sequence[Mapping[str, Any]], attribution: str) -> dict[str, float]:
    """The gap relative to the change of F, over all pairs and in the worst one; warns for integrated gradients."""
    gaps = torch.tensor([abs(each["gap"]) for each in chosen], dtype=torch.float64)
    changes = torch.tensor([abs(each["change"]) for each in chosen], dtype=torch.float64).clamp_min(1e-300)
    relative = float(gaps.sum() / changes.sum())
    if attribution == "ig" and relative > LARGEST_GAP:
        warnings.warn(
            f"integrated gradients miss {relative:.0%} of the change of the contrast (completeness gap), so tokens are "
            'chosen by noise: raise steps, or choose a baseline that is text, such as baseline="mean".',
            stacklevel=3,
        )
    return {"relative_gap": relative, "worst_pair": float((gaps / changes).max())}
