"""The sparse autoencoder's arithmetic: exact top-k in two stages, sparse products, one closed-form backward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from pullback.core.errors import InputError, MethodError

__all__ = [
    "Activations",
    "Selection",
    "cached_rows",
    "gathered_dot",
    "sparse_autoencode",
    "sparse_decode",
    "sparse_outer",
    "two_stage_topk",
]

_CACHED_BYTES = 2**19
_GATHERED_BYTES = 8 * 2**20  # rows gathered at once in a sampled product: stays in the cache


# --- top-k ---


def two_stage_topk(scores: Tensor, k: int, group: int | None = None) -> tuple[Tensor, Tensor]:
    """The k largest of each row, in descending order; of equal values those with the lowest index.

    Exact: each of the k largest lies in one of the k groups of neighbours with the largest maxima. The values are
    those of ``torch.topk``, which leaves open which index wins a tie.

    Args:
        scores: (rows, columns), without NaN.
        k: how many, at most the number of columns.
        group: columns per group; by default about sqrt(columns / k).

    Returns values and indices, (rows, k) each. Raises InputError for NaN and MethodError for k out of range.

    >>> two_stage_topk(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), 2)
    (tensor([[3., 3.]]), tensor([[1, 3]]))
    """
    columns = scores.shape[1]
    if not 1 <= k <= columns:
        raise MethodError(f"k is {k} for {columns} columns; expected 1 to {columns}.")
    size = group if group is not None else 2 ** round(math.log2(max(columns / k, 1.0)) / 2)
    whole = columns // size
    tail = columns - whole * size
    maxima = scores[:, : whole * size].unflatten(1, (whole, size)).amax(2)
    if tail:
        maxima = torch.cat([maxima, scores[:, whole * size :].amax(1, keepdim=True)], 1)
    if scores.device.type == "cpu" and bool(maxima.isnan().any()):  # a GPU would have to be waited for
        raise InputError("the scores have NaN entries; expected finite activations, weights and gradients.")
    if maxima.shape[1] <= k or size == 1:
        indices = _ranked(scores, k)
        return scores.gather(1, indices), indices
    # groups in ascending order, so that the position among the candidates orders them as the index does
    groups = _ranked(maxima, k).sort(1).values
    members = (groups.unsqueeze(2) * size + torch.arange(size, device=scores.device)).flatten(1)
    candidates = scores.gather(1, members.clamp(max=columns - 1))
    if tail:
        candidates = candidates.masked_fill(members >= columns, -torch.inf)
    indices = members.gather(1, _ranked(candidates, k))
    return scores.gather(1, indices), indices


def _ranked(scores: Tensor, k: int) -> Tensor:
    """Positions of the k largest of each row, descending; of equal values the first."""
    if scores.dtype == torch.float64:
        return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    # one int64 key: the bits of the float, made to order as integers, above the reversed position
    bits = (scores.float() + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    position = torch.arange(scores.shape[1], device=scores.device)
    return ((ordered.long() << 32) | (0xFFFFFFFF - position)).topk(k, dim=1).indices


# --- sparse products: k entries per row ---


def sparse_decode(indices: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """sum_j values_tj rows[indices_tj] of each token t: (tokens, k), (tokens, k), (latents, width) -> (tokens, width).

    >>> sparse_decode(torch.tensor([[0, 1]]), torch.tensor([[2.0, 3.0]]), torch.eye(2))
    tensor([[2., 3.]])
    """
    return embedding_bag(indices, rows, per_sample_weights=values, mode="sum")


def gathered_dot(indices: Tensor, dense: Tensor, rows: Tensor) -> Tensor:
    """rows[indices_tj] . dense_t: (tokens, k), (tokens, width), (latents, width) -> (tokens, k), in cached pieces."""
    k, width = indices.shape[1], rows.shape[1]
    step = max(1, _GATHERED_BYTES // max(1, k * width * rows.element_size()))
    pieces = [
        torch.bmm(rows[part], vectors.unsqueeze(2)).squeeze(2)
        for part, vectors in zip(indices.split(step), dense.split(step), strict=True)
    ]
    return torch.cat(pieces)


def cached_rows(matrix: Tensor) -> tuple[Tensor, ...]:
    """Pieces of so many rows of a matrix on the CPU that each stays in the cache through several operations."""
    if matrix.device.type != "cpu":
        return (matrix,)
    rows = max(1, _CACHED_BYTES // (matrix.shape[1] * matrix.element_size()))
    return tuple(matrix.split(rows))


class _Transposed(NamedTuple):
    """The (token, latent) pairs in order of latents: where each latent's begin, whose token, at which place."""

    order: Tensor
    tokens: Tensor
    latents: Tensor
    offsets: Tensor


def _transpose(indices: Tensor, latents: int) -> _Transposed:
    ordered, order = indices.flatten().sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(latents, device=indices.device))
    return _Transposed(order, order // indices.shape[1], ordered, offsets)


def _outer(pairs: _Transposed, values: Tensor, dense: Tensor) -> Tensor:
    weights = values.flatten()[pairs.order]
    return embedding_bag(pairs.tokens, dense, pairs.offsets, per_sample_weights=weights, mode="sum")


def sparse_outer(indices: Tensor, values: Tensor, dense: Tensor, latents: int) -> Tensor:
    """S^T R of the sparse S (tokens, latents) and R (tokens, width), as (latents, width), by a transposed bag.

    The pairs are sorted by latent, so there are no atomics, hence the same bits each time, and no
    (tokens, k, width) temporary.

    >>> sparse_outer(torch.tensor([[1]]), torch.tensor([[2.0]]), torch.tensor([[1.0, 3.0]]), 2)
    tensor([[0., 0.],
            [2., 6.]])
    """
    return _outer(_transpose(indices, latents), values, dense)


# --- selection, in column tiles ---


@dataclass(frozen=True)
class Selection:
    """What ``sparse_autoencode`` selects.

    Attributes:
        k: latents per token.
        beta: weight of the gradient in the score; 0 does not look at the gradient.
        dead: (latents,) bool, latents of which ``auxiliary_k`` more are selected; None for none.
        auxiliary_k: how many dead latents per token.
        columns: latents scored at once; None for all. Fewer need less memory and give the same result.
        dtype: of the score products, such as bfloat16 where that is fast; None for the weights'. The best 3k/2 are
            scored again in the weights' type, so that values are exact and only the choice may miss a latent.
    """

    k: int
    beta: float = 0.0
    dead: Tensor | None = None
    auxiliary_k: int = 0
    columns: int | None = None
    dtype: torch.dtype | None = None


class Activations(NamedTuple):
    """What ``sparse_autoencode`` gives: per token the selected latents, their values, and what they decode to."""

    values: Tensor
    indices: Tensor
    decoded: Tensor
    auxiliary_values: Tensor | None
    auxiliary_indices: Tensor | None
    auxiliary_decoded: Tensor | None


_Best = tuple[Tensor, Tensor, Tensor]  # score, pre-activation, index


def _better(best: _Best | None, scores: Tensor, pre: Tensor, first: int, k: int) -> _Best:
    """The best k of those so far, all with lower indices, and this tile's."""
    top, local = two_stage_topk(scores, min(k, scores.shape[1]))
    tile = (top, pre.gather(1, local), local + first)
    if best is None:
        return tile
    score, activation, index = (torch.cat(pair, 1) for pair in zip(best, tile, strict=True))
    # equal scores stand in order of index here too, so the first one is the lowest
    order = _ranked(score, min(k, score.shape[1]))
    return score.gather(1, order), activation.gather(1, order), index.gather(1, order)


def _select(
    centred: Tensor, gradient: Tensor | None, encoder: Tensor, bias: Tensor, decoder: Tensor, how: Selection
) -> tuple[_Best, _Best | None]:
    latents = len(encoder)
    columns = how.columns or latents
    dtype = how.dtype or encoder.dtype
    rough = dtype != encoder.dtype
    candidates = min(how.k + how.k // 2 + 1, latents) if rough else how.k
    gradient = None if how.beta == 0 else gradient
    seen, slope = centred.to(dtype), None if gradient is None else gradient.to(dtype)
    best: _Best | None = None
    dead: _Best | None = None
    for first in range(0, latents, columns):
        part = slice(first, first + columns)
        pre = torch.addmm(bias[part].to(dtype), seen, encoder[part].to(dtype).t()).to(encoder.dtype)
        if slope is None:
            best = _better(best, pre, pre, first, candidates)
        else:
            scores = (slope @ decoder[part].to(dtype).t()).to(encoder.dtype)
            scores.abs_().mul_(how.beta).add_(1.0).mul_(pre)
            best = _better(best, scores, pre, first, candidates)
            del scores
        if how.dead is not None and how.auxiliary_k:
            pre.masked_fill_(~how.dead[part], -torch.inf)
            dead = _better(dead, pre, pre, first, how.auxiliary_k)
    assert best is not None
    if rough:
        indices = best[2].sort(1).values
        pre = gathered_dot(indices, centred, encoder) + bias[indices]
        scores = pre
        if gradient is not None:
            scores = gathered_dot(indices, gradient, decoder).abs_().mul_(how.beta).add_(1.0).mul_(pre)
        order = _ranked(scores, how.k)
        best = scores.gather(1, order), pre.gather(1, order), indices.gather(1, order)
        if dead is not None:
            exact = gathered_dot(dead[2], centred, encoder) + bias[dead[2]]
            dead = dead[0], exact.masked_fill(dead[0] == -torch.inf, -torch.inf), dead[2]
    return best, dead


class _SparseAutoencode(torch.autograd.Function):
    """Saves the input and the k selected entries per token, never anything of size (tokens, latents)."""

    @staticmethod
    def forward(
        centred: Tensor,
        gradient: Tensor | None,
        encoder: Tensor,
        bias: Tensor,
        decoder: Tensor,
        how: Selection,
    ) -> Activations:
        (_, pre, indices), dead = _select(centred, gradient, encoder, bias, decoder, how)
        values = pre.relu()
        decoded = sparse_decode(indices, values, decoder)
        if dead is None:
            return Activations(values, indices, decoded, None, None, None)
        auxiliary = dead[1].relu()
        return Activations(
            values, indices, decoded, auxiliary, dead[2], sparse_decode(dead[2], auxiliary, decoder)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Activations) -> None:
        centred, _, encoder, _, decoder, _ = inputs
        values, indices, _, auxiliary, dead, _ = output
        ctx.save_for_backward(centred, encoder, decoder, values, indices, auxiliary, dead)
        ctx.mark_non_differentiable(*(kept for kept in (indices, auxiliary, dead) if kept is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        centred, encoder, decoder, values, indices, auxiliary, dead = ctx.saved_tensors
        to_input = None
        weights: list[Tensor | None] = [None, None, None]  # encoder, its bias, decoder
        branches = [(values, indices, grads[0], grads[2], ctx.needs_input_grad[0])]
        if dead is not None:
            # AuxK moves the dead latents alone: nothing goes to the input, nor to the bias subtracted from it
            branches.append((auxiliary, dead, None, grads[5], False))
        for value, index, to_value, to_decoded, needs_input in branches:
            if to_value is None and to_decoded is None:
                continue
            to_pre = torch.zeros_like(value) if to_value is None else to_value
            if to_decoded is not None:
                to_pre = to_pre + gathered_dot(index, to_decoded, decoder)
            to_pre = to_pre.masked_fill(value <= 0, 0.0)
            if needs_input:
                to_input = sparse_decode(index, to_pre, encoder)
            if not any(ctx.needs_input_grad[2:5]):
                continue
            pairs = _transpose(index, len(decoder))
            wanted = (
                (to_pre, centred),
                (to_pre, centred.new_ones(len(centred), 1)),
                (value, to_decoded),
            )
            for place, (factor, dense) in enumerate(wanted):
                if dense is None or not ctx.needs_input_grad[2 + place]:
                    continue
                found = _outer(pairs, factor, dense.contiguous())
                before = weights[place]
                weights[place] = found if before is None else before.add_(found)
        to_encoder, to_bias, to_decoder = weights
        return to_input, None, to_encoder, None if to_bias is None else to_bias.squeeze(1), to_decoder, None


def sparse_autoencode(
    centred: Tensor,
    gradient: Tensor | None,
    encoder: Tensor,
    encoder_bias: Tensor,
    decoder: Tensor,
    selection: Selection,
) -> Activations:
    """a = ReLU(z) on the k latents with the largest score, z = W_enc x + b, and W_dec^T a, with one closed backward.

    s_i = z_i (1 + beta |w_i . g|) with the decoder rows w_i; no gradient flows through the choice. With R = dL/dxhat:
    da_j = w_j . R where z_j > 0, dW_dec = S^T R, dW_enc = D^T x, db = sum_t D_t, dx = D W_enc (S values, D = da).

    Args:
        centred: (tokens, width), the input less the decoder bias.
        gradient: (tokens, width), g in units of its mean norm; None where beta is 0.
        encoder, decoder: (latents, width); encoder_bias: (latents,).
        selection: what to select.

    Returns Activations: values and indices (tokens, k), decoded (tokens, width) without bias, and the same for the
    dead latents, whose derivative reaches their own weights only.

    >>> eye = torch.eye(2)
    >>> sparse_autoencode(torch.tensor([[1.0, 3.0]]), None, eye, torch.zeros(2), eye, Selection(1)).decoded
    tensor([[0., 3.]])
    """
    found = _SparseAutoencode.apply(centred, gradient, encoder, encoder_bias, decoder, selection)  # type: ignore[no-untyped-call]
    return Activations(*found)
