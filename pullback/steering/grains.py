"""GrAInS: what the tokens that speak for and against an answer add to the hidden state of the last token.

Tokens of the prompt are scored by a contrast of two answers, those that speak for it and those that speak against it
are put back to the baseline of the attribution, and the change of the last token's hidden state is read at each block.

Source: Nguyen et al. 2025 (GrAInS, arXiv:2507.18043). Differences: whole answers are scored, only the prompt is
attributed, images are merged before, the baseline is no zero embedding, hidden states are read before the final norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from pullback.attribution.baselines import Given, MeanEmbedding, TokenEmbedding, Zeros, baseline_point
from pullback.attribution.integrated_gradients import IntegratedGradients, change_of_score
from pullback.attribution.paths import QUADRATURES, require_count
from pullback.attribution.relevance import rules_of
from pullback.attribution.rules.presets import registered_rules
from pullback.core import noise
from pullback.core.errors import MethodError
from pullback.core.points import Point, contract, widest

from .posed_prompts import PosedPrompts, last_states

__all__ = ["Evidence", "Masking", "baseline_text", "evidence", "select_tokens"]

TokenCount: TypeAlias = "int | float | Mapping[str, int | float]"
Attribution: TypeAlias = Literal["ig", "relp", "gradient"]
ImageBaseline: TypeAlias = Literal["mean", "zero"]


@dataclass(frozen=True)
class Masking:
    """How tokens are scored, chosen and put back.

    Attributes:
        k: tokens per sign in each example and modality: a number, a share of the tokens that may be chosen, or a
            mapping with "text" and "image".
        attribution: "ig", "relp" (derivative under the rules of RelP, one backward pass) or "gradient", each times
            (embedding - baseline); None chooses at random.
        steps, quadrature: of integrated gradients.
        baseline: for text: None (the mask token's embedding where there is one, else the mean embedding), "mask",
            "pad", "mean", "zero", a token id, an embedding (width,), or a baseline of ``pullback.baselines``.
        image_baseline: for what comes from an image: its "mean" or "zero".
        protect: token ids never chosen, besides the special ones.
        seed: for random choices.
    """

    k: TokenCount = 8
    attribution: Attribution | None = "ig"
    steps: int = 32
    quadrature: str = "midpoint"
    baseline: Any = None
    image_baseline: ImageBaseline = "mean"
    protect: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        require_count("steps", self.steps)
        if self.attribution is not None and self.attribution not in get_args(Attribution):
            raise MethodError(
                f"attribution={self.attribution!r}; expected one of {', '.join(map(repr, get_args(Attribution)))}."
            )
        if self.quadrature not in QUADRATURES:
            raise MethodError(f"quadrature={self.quadrature!r}; expected one of {', '.join(QUADRATURES)}.")
        if self.image_baseline not in get_args(ImageBaseline):
            raise MethodError(f'image_baseline={self.image_baseline!r}; expected "mean" or "zero".')
        for modality in ("text", "image"):
            self.count(modality, 1)

    def count(self, modality: str, available: int) -> int:
        """How many tokens of a modality are chosen for each sign, of those available."""
        k = self.k
        if isinstance(k, Mapping):
            unknown = sorted(set(k) - {"text", "image"})
            if unknown:
                raise MethodError(f'k has {unknown}; expected the modalities "text" and "image".')
            k = k.get(modality, 0)
        whole = isinstance(k, int) and not isinstance(k, bool)
        if whole and k >= (0 if isinstance(self.k, Mapping) else 1):
            return min(int(k), available)
        if isinstance(k, float) and 0.0 < k < 1.0:
            return math.ceil(k * available)
        raise MethodError(
            f'k={self.k!r}; expected a number of tokens from 1, a share such as 0.2, or {{"text": 8, "image": 20}}.'
        )


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was found for the pairs of one batch.

    Attributes:
        scores: (B, T) the contrast's attribution to each token, 0 at padding.
        positive, negative: (B, T) bool, the chosen tokens.
        gap: (B,) Σ scores - (F(x) - F(baseline)), NaN for random choices.
        change: (B,) F(x) - F(baseline).
        states: (B, block, width) hidden states of the last token.
        without_positive, without_negative: states less those with the chosen tokens at the baseline.
    """

    scores: Tensor
    positive: Tensor
    negative: Tensor
    gap: Tensor
    change: Tensor
    states: Tensor
    without_positive: Tensor
    without_negative: Tensor


def evidence(posed: PosedPrompts, masking: Masking, model: nn.Module, tokenizer: Any) -> Evidence:
    """Score the tokens of each prompt, mask those of either sign, and read what that moves.

    Cost: for integrated gradients ``steps`` forward and backward passes of each answer, for the others one; three
    forwards of the prompt.
    """
    baseline = baseline_embeddings(posed, masking, tokenizer)
    allowed = eligible(posed, model, tokenizer, masking.protect)
    if masking.attribution is None:
        scores = random_scores(posed, masking, allowed)
        gap = change = torch.full((len(scores),), math.nan, dtype=torch.float64)
    else:
        values, gap, change = _attributed(posed, masking, baseline)
        scores = widest(values).sum(-1).cpu() * posed.real
    positive, negative = select_tokens(scores, allowed, posed.image, masking)
    states = last_states(posed, posed.embeddings)
    moved = [states - last_states(posed, masked(posed, baseline, chosen)) for chosen in (positive, negative)]
    return Evidence(scores, positive, negative, gap.cpu(), change.cpu(), states, *moved)


def select_tokens(scores: Tensor, allowed: Tensor, image: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:
    """The k highest positive and the k lowest negative scores of each row and modality: two (B, T) bool masks.

    Only positive scores count as evidence for and only negative ones as evidence against, so there may be fewer. Of
    equal scores the earlier token is taken.
    """
    chosen = []
    for sign in (1.0, -1.0):
        mask = torch.zeros_like(allowed)
        for row in range(len(scores)):
            for modality, of_it in (("text", ~image[row]), ("image", image[row])):
                candidates = allowed[row] & of_it
                count = masking.count(modality, int(candidates.sum()))
                found = sign * scores[row]
                places = (candidates & (found > 0)).nonzero()[:, 0]
                order = found[places].sort(descending=True, stable=True).indices
                mask[row, places[order[:count]]] = True
        chosen.append(mask)
    return chosen[0], chosen[1]


def random_scores(posed: PosedPrompts, masking: Masking, allowed: Tensor) -> Tensor:
    """Scores in random order, half of either sign; a pair's depend on the seed and its number only."""
    scores = torch.zeros(allowed.shape, dtype=torch.float64)
    for row, pair in enumerate(posed.pairs):
        for image in (False, True):
            places = (allowed[row] & (posed.image[row] == image)).nonzero()[:, 0]
            drawn = noise.uniform((len(pair.ids),), masking.seed, pair.number, f"tokens/{image}").double()[
                places
            ]
            ranks = drawn.argsort().argsort()
            scores[row, places] = ranks.double() - (len(places) - 1) / 2
    return scores


def eligible(posed: PosedPrompts, model: nn.Module, tokenizer: Any, protect: Iterable[int]) -> Tensor:
    """(B, T) bool: no padding, no special token, not the last token; positions of an image are free."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else None
    sources = (tokenizer, getattr(tokenizer, "tokenizer", None), config, text)
    special = {int(token) for token in protect}
    for source in sources:
        special.update(getattr(source, "all_special_ids", None) or ())
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            found = getattr(source, name, None)
            special.update(found if isinstance(found, Sequence) else () if found is None else (found,))
    allowed = posed.real.clone()
    for row, pair in enumerate(posed.pairs):
        ordinary = torch.tensor([int(token) not in special for token in pair.ids])
        allowed[row, : len(ordinary)] &= ordinary | posed.image[row, : len(ordinary)]
        allowed[row, len(pair.ids) - 1] = False
    return allowed


def baseline_embeddings(posed: PosedPrompts, masking: Masking, tokenizer: Any) -> Tensor:
    """(B, T, width): the baseline of text at text, that of images at what comes from one."""
    text = _text_baseline(masking.baseline, tokenizer)
    if isinstance(text, Tensor):
        width = posed.embeddings.shape[-1]
        if text.shape != (width,):
            raise MethodError(
                f"the baseline has shape {tuple(text.shape)}; expected one embedding, ({width},), for every token."
            )
        text = Given(text.to(posed.embeddings).expand_as(posed.embeddings[0]))
    found = baseline_point(text, posed.problem)
    assert isinstance(found, Tensor)
    if not bool(posed.image.any()):
        return found
    found = found.clone()
    embeddings = posed.embeddings
    for row, image in enumerate(posed.image.to(embeddings.device)):
        if bool(image.any()):
            features = embeddings[row, image]
            found[row, image] = (
                features.mean(0) if masking.image_baseline == "mean" else torch.zeros_like(features[0])
            )
    return found


def masked(posed: PosedPrompts, baseline: Tensor, chosen: Tensor) -> Tensor:
    """The embeddings with the baseline at the chosen tokens."""
    return torch.where(chosen.to(baseline.device)[..., None], baseline, posed.embeddings)


def _text_baseline(baseline: Any, tokenizer: Any) -> Any:
    named = {
        "mean": MeanEmbedding(),
        "zero": Zeros(),
        "mask": TokenEmbedding("mask"),
        "pad": TokenEmbedding("pad"),
    }
    if baseline is None or (isinstance(baseline, str) and baseline in ("mask", "pad")):
        name = "mask" if baseline is None else baseline
        for source in (tokenizer, getattr(tokenizer, "tokenizer", None)):
            token = getattr(source, f"{name}_token_id", None)
            if isinstance(token, int) and not (name == "pad" and token in _ends(source)):
                return TokenEmbedding(token)
    if isinstance(baseline, str):
        if baseline not in named:
            raise MethodError(
                f"baseline={baseline!r}; expected None, one of {', '.join(map(repr, named))}, a token id, an "
                "embedding, or a baseline such as MeanEmbedding()."
            )
        return named[baseline]
    if isinstance(baseline, int) and not isinstance(baseline, bool):
        return TokenEmbedding(baseline)
    return baseline


def baseline_text(baseline: Any) -> str | int | None:
    """A baseline as it is written down."""
    if baseline is None or isinstance(baseline, str | int):
        return baseline
    return repr(Given(baseline) if isinstance(baseline, Tensor) else baseline)


def _ends(tokenizer: Any) -> set[Any]:
    """Tokens that mean something to the model, though some tokenizers pad with them."""
    return {getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos")}


def _attributed(posed: PosedPrompts, masking: Masking, baseline: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values (B, T, width), the completeness gap and the change of the score (B,)."""
    problem = posed.problem.fresh()
    if masking.attribution == "ig":
        method = IntegratedGradients(masking.steps, masking.quadrature, Given(baseline))
        values: Point = method(problem)
        assert isinstance(values, Tensor)
        gap = widest(problem.diagnostics["gap"])
        return values, gap, widest(values).flatten(1).sum(1) - gap
    if masking.attribution == "relp":
        problem = problem.under((*registered_rules(), *rules_of("relp")))
    gradient = problem.grad()
    assert isinstance(gradient, Tensor)
    values = contract(widest(gradient), widest(posed.embeddings - baseline))
    change = widest(change_of_score(problem, baseline))
    return values, values.flatten(1).sum(1) - change, change
