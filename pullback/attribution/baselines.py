"""Baselines: the reference a path starts from, as small named values, so that a result's record says which one.

A baseline is called with a problem (and the number of the draw, for random ones) and gives a value at the site. None
means: zeros, or at token embeddings the mask token where there is one, else the mean embedding. A zero embedding is
no text at all to a pre-norm language model and gives noise at any number of steps.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, is_dataclass
from hashlib import blake2b
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..core import noise
from ..core.errors import InputError, MethodError
from ..core.points import Point, expand_like, map_leaves, widest
from ..core.problem import Problem

__all__ = [
    "Baseline",
    "Blur",
    "ChannelMean",
    "Constant",
    "Dataset",
    "Given",
    "MeanEmbedding",
    "TokenEmbedding",
    "Uniform",
    "Zeros",
    "baseline_point",
    "memo_text",
]


class Baseline(Protocol):
    """Gives the reference value at a problem's site."""

    def __call__(self, problem: Problem, draw: int = 0) -> Point: ...


@dataclass(frozen=True)
class Zeros:
    """All zeros: black where inputs are in [0, 1], the mean colour where they are normalised.

    >>> Zeros()
    Zeros()
    """

    def __call__(self, problem: Problem, draw: int = 0) -> Point:
        return map_leaves(torch.zeros_like, problem.point)


@dataclass(frozen=True)
class Constant:
    """One value everywhere, in the units of the site."""

    value: float = 0.0

    def __call__(self, problem: Problem, draw: int = 0) -> Point:
        return map_leaves(lambda leaf: torch.full_like(leaf, self.value), problem.point)


@dataclass(frozen=True)
class ChannelMean:
    """Each example's own mean, per channel where there is more than one dimension (B, C, ...); spelled "mean"."""

    def __call__(self, problem: Problem, draw: int = 0) -> Point:
        def mean(leaf: Tensor) -> Tensor:
            dims = tuple(range(2, leaf.dim())) if leaf.dim() > 2 else tuple(range(1, leaf.dim()))
            return leaf.mean(dims, keepdim=True).expand_as(leaf).clone()

        return map_leaves(mean, problem.point)


@dataclass(frozen=True)
class Blur:
    """A Gaussian-blurred copy of the input, over all dimensions after (B, C); ``sigma`` in pixels or samples."""

    sigma: float = 10.0

    def __call__(self, problem: Problem, draw: int = 0) -> Point:
        from skimage.filters import gaussian

        def blurred(leaf: Tensor) -> Tensor:
            if leaf.dim() < 3:
                raise MethodError(
                    f"Blur needs (B, C, ...) values with a spatial dimension, got {tuple(leaf.shape)}."
                )
            images = leaf.detach().flatten(0, 1).double().cpu().numpy()
            smooth = gaussian(images, sigma=self.sigma, channel_axis=0, mode="nearest", preserve_range=True)
            return torch.as_tensor(smooth).reshape(leaf.shape).to(leaf)

        return map_leaves(blurred, problem.point)


@dataclass(frozen=True, eq=False, repr=False)
class Given:
    """A tensor: (B, *S) one per example, or (1, *S) or S for all. Prints as a digest, compares by content."""

    value: Tensor

    def __call__(self, problem: Problem, draw: int = 0) -> Point:
        return map_leaves(lambda leaf: self._for(leaf, problem), problem.point)

    def _for(self, leaf: Tensor, problem: Problem) -> Tensor:
        value = self.value.to(leaf)
        if value.shape == leaf.shape[1:] or value.dim() == 0:
            return value.expand_as(leaf).clone()
        if value.shape[1:] == leaf.shape[1:]:
            if len(value) == 1:
                return value.expand_as(leaf).clone()
            if len(value) == problem.posed.batch:
                return value.index_select(0, problem.examples.to(value.device))
        raise InputError(
            f"the baseline has shape {tuple(self.value.shape)}; the site {problem.site!r} has {tuple(leaf.shape)}. "
            "Give one of that shape, one row of it, or one example's shape."
        )

    def __repr__(self) -> str:
        return f"Given({digest(self.value)})"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Given)
            and self.value.dtype == other.value.dtype
            and torch.equal(self.value, other.value)
        )

    def __hash__(self) -> int:
        return hash(digest(self.value))


@dataclass(frozen=True)
class Uniform:
    """Uniform noise between ``low`` and ``high``, by default each example's own range; draws are named by the seed."""

    low: float | None = None
    high: float | None = None
    seed: int = 0

    def __call__(self, problem: Problem, draw: int = 0) -> Point:
        free = problem.free

        def random(leaf: Tensor) -> Tensor:
            flat = leaf.detach().reshape(len(leaf), -1)
            low = flat.min(1).values if self.low is None else torch.full_like(flat[:, 0], self.low)
            high = flat.max(1).values if self.high is None else torch.full_like(flat[:, 0], self.high)
            unit = noise.uniform(leaf.shape[1:], self.seed, draw, "baseline").to(leaf)
            return expand_like(low, leaf) + unit * expand_like(high - low, leaf)

        if free is not None and isinstance(problem.point, Tensor):
            # each example by itself and without its padding, whose length depends on batch mates
            padded = problem.point.detach().clone()
            for number, real in enumerate(free.to(padded.device)):
                padded[number, real] = random(padded[number : number + 1, real])[0]
            return padded

        return map_leaves(random, problem.point)


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Rows of a reference set (N, *S), one per draw, for expected gradients. Prints as a digest."""

    values: Tensor
    seed: int = 0

    def __post_init__(self) -> None:
        if self.values.dim() == 0 or len(self.values) == 0:
            raise InputError(f"Dataset needs reference rows (N, *S), got shape {tuple(self.values.shape)}.")

    def __call__(self, problem: Problem, draw: int = 0) -> Point:
        row = int(noise.uniform((1,), self.seed, draw, "dataset") * len(self.values))
        return Given(self.values[row : row + 1])(problem)

    def __repr__(self) -> str:
        return f"Dataset({digest(self.values)}, seed={self.seed})"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Dataset) and self.seed == other.seed and torch.equal(self.values, other.values)
        )

    def __hash__(self) -> int:
        return hash((digest(self.values), self.seed))


@dataclass(frozen=True)
class MeanEmbedding:
    """The mean of all token embeddings, at every position of a text."""

    def __call__(self, problem: Problem, draw: int = 0) -> Point:
        module = embedding_module(problem)
        count = len(cast(Tensor, module.weight))
        with torch.no_grad():
            # called rather than read, since some models scale inside their embedding module
            parts = [
                widest(_looked_up(module, ids.to(problem.device))).sum(0)
                for ids in torch.arange(count).split(8192)
            ]
        mean = torch.stack(parts).sum(0) / count
        return map_leaves(lambda leaf: mean.to(leaf).expand_as(leaf).clone(), problem.point)


def _looked_up(module: Any, ids: Tensor) -> Tensor:
    found = module(ids)
    # quantised models return scales beside the values
    return cast(Tensor, found[0] if isinstance(found, tuple) else found)


@dataclass(frozen=True)
class TokenEmbedding:
    """One token's embedding at every position: an id, or "mask" or "pad" as the tokenizer or the config defines it."""

    token: int | str = "mask"

    def __call__(self, problem: Problem, draw: int = 0) -> Point:
        token = special_token(problem, self.token) if isinstance(self.token, str) else self.token
        if token is None:
            raise MethodError(
                f"no {self.token} token is known: neither the config nor a tokenizer of the target names one. "
                "Give its id, TokenEmbedding(103), or use MeanEmbedding()."
            )
        if self.token == "pad" and token in {special_token(problem, "eos"), special_token(problem, "bos")}:
            raise MethodError(
                f"the pad token {token} is also the end or beginning of text, which means something to the model. "
                "Use MeanEmbedding(), or give a token id."
            )
        with torch.no_grad():
            row = _looked_up(embedding_module(problem), torch.tensor([token], device=problem.device))[0]
        return map_leaves(lambda leaf: row.to(leaf).expand_as(leaf).clone(), problem.point)


def baseline_point(baseline: Any, problem: Problem, draw: int = 0) -> Point:
    """The reference value of a baseline at a problem's site; None is the default named in the module's docstring.

    Seen through a domain, the baseline is taken at the site and analysed there.
    """
    if problem.domains:
        return problem.analysis(baseline_point(baseline, problem.at_site(), draw))
    chosen: Baseline = default_baseline(problem) if baseline is None else baseline
    if problem.posed.token_site and isinstance(chosen, (Zeros, Constant)):
        warn_of_jump(problem, chosen)
    return chosen(problem, draw)


def default_baseline(problem: Problem) -> Baseline:
    """Zeros; at token embeddings the mask token where one is known, else the mean embedding."""
    if not problem.posed.token_site:
        return Zeros()
    return TokenEmbedding("mask") if special_token(problem, "mask") is not None else MeanEmbedding()


def warn_of_jump(problem: Problem, baseline: Baseline) -> None:
    """Say so when the score jumps right beside the baseline, as normalisation layers make it do at zero."""
    start = baseline(problem)
    near = map_leaves(lambda s, p: s + 0.01 * (p - s), start, problem.point)
    at_start, at_near, at_point = problem.score(start), problem.score(near), problem.score()
    if bool(((at_near - at_start).abs() > 0.1 * (at_point - at_start).abs()).any()):
        text = (
            f"the score jumps within the first hundredth of the path from {baseline!r}: the model normalises its "
            "embeddings, so this baseline gives noise at any affordable number of steps. Use baseline=MeanEmbedding()"
        )
        # a note is read only by those who look for it, and methods inside other methods have none of their own
        warnings.warn(text, stacklevel=2)
        problem.note(text)


def special_token(problem: Problem, name: str) -> int | None:
    """The id of the mask, pad, eos or bos token, from the target's tokenizer or the model's config."""
    for source in (problem.posed.tokenizer, problem.posed.config):
        found = getattr(source, f"{name}_token_id", None)
        if isinstance(found, int):
            return found
    return None


def embedding_module(problem: Problem) -> nn.Module:
    """The module that embeds token ids. Raises MethodError at sites that are not embeddings."""
    module = problem.posed.module
    if problem.posed.token_site and isinstance(module, nn.Module):
        found = problem.posed.site.module(module)
        if problem.posed.site.side == "output":
            return found
        return cast(nn.Module, module.get_input_embeddings())  # type: ignore[operator]
    raise MethodError(f'text baselines need the site "embeddings"; this problem is at "{problem.site}".')


def memo_text(value: Any) -> str:
    """The text under which methods share work: the repr, with the identity of objects whose repr may hide a difference.

    >>> memo_text((Constant(1.0), 8))
    '(Constant(value=1.0),8)'
    """
    if isinstance(value, (list, tuple)):
        return f"({','.join(memo_text(part) for part in value)})"
    if isinstance(value, (Given, Dataset)) or value is None or isinstance(value, (str, int, float)):
        return repr(value)
    if type(value).__module__.startswith("pullback.") and is_dataclass(value):
        parts = (f"{each.name}={memo_text(getattr(value, each.name))}" for each in fields(value))
        return f"{type(value).__name__}({','.join(parts)})"
    return f"{type(value).__name__}@{id(value)}"


def digest(tensor: Tensor) -> str:
    """Shape and a short hash of a tensor's content, for texts that record an experiment."""
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"'{'x'.join(map(str, tensor.shape))}:{blake2b(content, digest_size=4).hexdigest()}'"
