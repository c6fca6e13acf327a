"""Sparse autoencoders whose latents are selected by size (TopK) or by size and gradient (g-SAE)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from pullback.core.errors import InputError, MethodError

from .config import SELECTIONS, SparseAutoencoderConfig
from .functional import Activations, Selection, cached_rows, sparse_autoencode, sparse_decode
from .latents import SparseAutoencoderLoss, SparseLatents
from .processes import Processes

__all__ = ["SparseAutoencoder"]

_FIRED = 1e-3  # a latent counts as fired above this value (Gao et al. 2024)
_ROW_EPSILON = 1e-5  # added to the standard deviation of a row, as in OpenAI's and SAELens' files


class SparseAutoencoder(nn.Module):
    """A dictionary of directions of activations: z = W_enc (x - b_dec) + b_enc, a_i = ReLU(z_i) for i in S, else 0,
    xhat = W_dec^T a + b_dec.

    S holds the k latents with the largest z_i ("topk": Gao et al. 2024, arXiv 2406.04093), or the largest
    s_i = z_i (1 + beta |w_i . g|) ("gradient": Olmo et al. 2024, arXiv 2411.10397; our reading of the abstract), with
    the decoder rows w_i and the gradient g of the model's loss at x, summed over tokens, divided by ``gradient_scale``.

    Args:
        config: shape and selection.
        seed: of the decoder's random unit rows; the encoder starts as a copy of them, the biases at 0.
        memory_budget: bytes that the scores of a batch may take; latents are then scored in column tiles, with the
            same result. None scores all at once.
        score_dtype: of the products that choose, such as torch.bfloat16 where it is fast: the best 3k/2 are then scored
            again exactly, so that only the choice may differ. None for ``dtype``.
        dtype, device: of the parameters.

    Attributes:
        encoder, decoder: (latents, width); encoder_bias: (latents,); decoder_bias: (width,).
        input_scale: the factor of "mean_norm", see ``fit_normalization_``.
        gradient_scale: the mean norm of g over tokens.
        tokens_since_fired: (latents,) int64, see ``count_``.

    >>> autoencoder = SparseAutoencoder(SparseAutoencoderConfig(width=4, latents=8, k=2))
    >>> autoencoder.encode(torch.ones(3, 4)).dense().count_nonzero(1).tolist()
    [2, 2, 2]
    """

    input_scale: Tensor
    gradient_scale: Tensor
    tokens_since_fired: Tensor

    def __init__(
        self,
        config: SparseAutoencoderConfig,
        *,
        seed: int = 0,
        memory_budget: int | None = None,
        score_dtype: torch.dtype | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config = config
        self.memory_budget = memory_budget
        self.score_dtype = score_dtype
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(config.latents, config.width, generator=generator, dtype=torch.float64)
        rows = (rows / rows.norm(dim=1, keepdim=True)).to(device, dtype)
        self.encoder = nn.Parameter(rows.clone())
        self.encoder_bias = nn.Parameter(rows.new_zeros(config.latents))
        self.decoder = nn.Parameter(rows)
        self.decoder_bias = nn.Parameter(rows.new_zeros(config.width))
        self.register_buffer("input_scale", rows.new_ones(()))
        self.register_buffer("gradient_scale", rows.new_ones(()))
        since = torch.zeros(config.latents, dtype=torch.int64, device=device)
        self.register_buffer("tokens_since_fired", since)

    # --- encoding and decoding ---

    def encode(
        self,
        x: Tensor,
        gradient: Tensor | None = None,
        *,
        selection: Literal["topk", "gradient"] | None = None,
        beta: float | None = None,
    ) -> SparseLatents:
        """The latents of activations x (..., width).

        Args:
            x: activations, finite.
            gradient: of the loss at x, of the same shape; needed for the gradient selection unless beta is 0.
            selection, beta: in place of the config's, as for gradient-free inference and while beta warms up.

        Raises InputError for a wrong width, a missing gradient, NaN or infinite entries.
        """
        return self._autoencode(x, gradient, selection, beta, None)[1]

    def decode(self, latents: SparseLatents) -> Tensor:
        """xhat (..., width) of selected latents, in the units of the input."""
        shape, k = latents.values.shape[:-1], latents.values.shape[-1]
        indices, values = latents.indices.reshape(-1, k), latents.values.reshape(-1, k)
        decoded = sparse_decode(indices, values, self.decoder) + self.decoder_bias
        return self._denormalize(decoded.reshape(*shape, -1), latents)

    def forward(
        self,
        x: Tensor,
        gradient: Tensor | None = None,
        *,
        selection: Literal["topk", "gradient"] | None = None,
        beta: float | None = None,
    ) -> Tensor:
        """The reconstruction xhat (..., width) of activations; arguments and errors as in ``encode``."""
        _, latents, activations = self._autoencode(x, gradient, selection, beta, None)
        output = (activations.decoded + self.decoder_bias).reshape(x.shape)
        return self._denormalize(output, latents)

    def latent_direction(self, latent: int) -> Tensor:
        """w_i (width,), the direction that latent i writes."""
        if not 0 <= latent < self.config.latents:
            raise InputError(
                f"there is no latent {latent}; expected 0 to {self.config.latents - 1}, as in latent_direction(0)."
            )
        return self.decoder[latent].detach()

    def loss(
        self,
        x: Tensor,
        gradient: Tensor | None = None,
        *,
        beta: float | None = None,
        dead: Tensor | None = None,
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> SparseAutoencoderLoss:
        """MSE(xhat, x) / MSE(mean, x) + weight * AuxK, AuxK = MSE(e, r) / MSE(mean, r) with the residual r = x - xhat
        (no derivative) and e the dead latents' decoding, without the bias that r has lost already.

        Args:
            x, gradient, beta: as in ``encode``.
            dead: (latents,) bool; by default those silent for ``config.dead_after`` tokens.
            average: mean of a tensor over the processes of a data-parallel run, for the two variances.
        """
        config = self.config
        dead = self.dead_latents() if dead is None else dead
        if config.auxiliary_weight == 0 or (dead.device.type == "cpu" and not bool(dead.any())):
            dead = None
        target, latents, activations = self._autoencode(x, gradient, None, beta, dead)
        output = activations.decoded + self.decoder_bias
        reconstruction = (output - target).square().mean() / _variance(target, average)
        auxiliary = reconstruction.new_zeros(())
        if dead is not None and activations.auxiliary_decoded is not None:
            residual = (target - output).detach()
            error = (activations.auxiliary_decoded - residual).square().mean()
            # on a GPU also without dead latents, when nothing of it counts
            auxiliary = (error / _variance(residual, average)).nan_to_num(0.0) * dead.any()
        total = reconstruction + config.auxiliary_weight * auxiliary
        return SparseAutoencoderLoss(
            total,
            reconstruction,
            auxiliary,
            self._denormalize(output.detach().reshape(x.shape), latents),
            latents,
        )

    # --- upkeep in training ---

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Bring every decoder row to norm 1 (nothing if the config says no ``unit_decoder``)."""
        if self.config.unit_decoder:
            for rows in cached_rows(self.decoder):
                norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
                rows.div_(norms.clamp_min_(torch.finfo(norms.dtype).tiny))

    @torch.no_grad()
    def project_decoder_gradient_(self) -> None:
        """Take from each decoder row's gradient its part along the row, which renormalising would undo."""
        if self.config.unit_decoder and self.decoder.grad is not None:
            for gradient, rows in zip(cached_rows(self.decoder.grad), cached_rows(self.decoder), strict=True):
                along = torch.einsum("nd,nd->n", gradient, rows)
                gradient.addcmul_(rows, along.unsqueeze(1), value=-1.0)

    @torch.no_grad()
    def count_(self, latents: SparseLatents, processes: Processes | None = None) -> None:
        """Add the tokens of a batch (of all processes) to the counters of silence; a latent with a value above 0.001
        restarts at 0."""
        flat = latents.indices.flatten(), latents.values.detach().flatten()
        largest = flat[1].new_zeros(self.config.latents).scatter_reduce(0, *flat, "amax")
        tokens = latents.values.shape[:-1].numel()
        if processes is not None:
            largest, tokens = processes.largest(largest), tokens * processes.count
        self.tokens_since_fired.add_(tokens).masked_fill_(largest > _FIRED, 0)

    def dead_latents(self) -> Tensor:
        """(latents,) bool: silent for at least ``config.dead_after`` tokens."""
        return self.tokens_since_fired >= self.config.dead_after

    @torch.no_grad()
    def fit_normalization_(self, x: Tensor) -> None:
        """Set the factor of "mean_norm" so that these activations have mean norm sqrt(width)."""
        if self.config.normalization == "mean_norm":
            mean = torch.linalg.vector_norm(self._flat(x, "x").double(), dim=1).mean()
            if not bool(mean > 0):
                raise InputError("the activations are all 0; expected some to measure the mean norm of.")
            self.input_scale.copy_(math.sqrt(self.config.width) / mean)

    @torch.no_grad()
    def folded(self) -> SparseAutoencoder:
        """A copy for raw activations: the same reconstruction and selection without the factor of "mean_norm".

        Latents are then in the units of the input (biases and values divided by the factor); decoder rows keep
        their norm, except that ``unit_decoder`` renormalises them once more.
        """
        config = self.config
        if config.normalization == "mean_norm":
            config = replace(config, normalization="none")
        made = SparseAutoencoder.from_parameters(
            config,
            encoder=self.encoder,
            encoder_bias=self.encoder_bias / self.input_scale,
            decoder=self.decoder,
            decoder_bias=self.decoder_bias / self.input_scale,
        )
        made.gradient_scale.copy_(self.gradient_scale)
        made.tokens_since_fired.copy_(self.tokens_since_fired)
        made.memory_budget, made.score_dtype = self.memory_budget, self.score_dtype
        made.normalize_decoder_()
        return made.train(self.training)

    @classmethod
    def from_parameters(
        cls,
        config: SparseAutoencoderConfig,
        *,
        encoder: Tensor,
        encoder_bias: Tensor,
        decoder: Tensor,
        decoder_bias: Tensor,
    ) -> SparseAutoencoder:
        """An autoencoder with copies of these parameters: (latents, width) twice, (latents,) and (width,)."""
        wide, high = (config.latents, config.width), (config.latents,)
        given = {"encoder": (encoder, wide), "encoder_bias": (encoder_bias, high)}
        given |= {"decoder": (decoder, wide), "decoder_bias": (decoder_bias, (config.width,))}
        for name, (value, shape) in given.items():
            if tuple(value.shape) != shape:
                raise InputError(f"{name} has shape {tuple(value.shape)}; expected {shape}.")
            if not bool(value.isfinite().all()):
                raise InputError(f"{name} has NaN or infinite entries; expected finite weights.")
        made = cls(config, dtype=decoder.dtype, device=decoder.device)
        with torch.no_grad():
            for name, (value, _) in given.items():
                getattr(made, name).copy_(value)
        return made

    def extra_repr(self) -> str:
        config = self.config
        chosen = f"beta={config.beta:g}" if config.selection == "gradient" else "by size"
        return f"width={config.width}, latents={config.latents}, k={config.k}, {config.selection} ({chosen})"

    # --- inside ---

    def normalized(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What is encoded: activations (tokens, width) under the input normalisation, and each row's mean and deviation
        where those were taken out."""
        flat = self._flat(x, "x")
        if self.config.normalization == "row":
            mean = flat.mean(1, keepdim=True)
            deviation = (flat - mean).std(1, keepdim=True) + _ROW_EPSILON
            return (flat - mean) / deviation, mean, deviation
        return flat * self.input_scale if self.config.normalization == "mean_norm" else flat, None, None

    def _autoencode(
        self,
        x: Tensor,
        gradient: Tensor | None,
        selection: str | None,
        beta: float | None,
        dead: Tensor | None,
    ) -> tuple[Tensor, SparseLatents, Activations]:
        """The normalised input (tokens, width), its latents, and what they decode to without bias."""
        config = self.config
        flat, mean, deviation = self.normalized(x)
        how = selection or config.selection
        if how not in SELECTIONS:
            raise MethodError(f'selection is {how!r}; expected one of "topk", "gradient".')
        weight = 0.0 if how == "topk" else config.beta if beta is None else float(beta)
        if not 0 <= weight < math.inf:
            raise MethodError(f"beta is {weight!r}; expected a finite number of at least 0.")
        scaled = None
        if weight > 0:  # at 0 the gradient is not looked at: 0 times infinity is not 0
            if gradient is None:
                raise InputError(
                    "the gradient selection needs the gradient of the loss at x, of the same shape; none was given. "
                    'Try encode(x, gradient), or selection="topk" for gradient-free inference.'
                )
            if gradient.shape != x.shape:
                raise InputError(f"the gradient is {tuple(gradient.shape)} for x {tuple(x.shape)}.")
            scaled = self._flat(gradient, "the gradient").detach() / self.gradient_scale
        centred = flat - self.decoder_bias if config.subtract_decoder_bias else flat
        auxiliary = config.auxiliary_k or max(1, min(256, config.width // 2))
        plan = Selection(
            config.k,
            weight,
            dead,
            min(auxiliary, config.latents) if dead is not None else 0,
            self._columns(len(flat), (1 if scaled is None else 2) + (self.score_dtype is not None)),
            self.score_dtype,
        )
        found = sparse_autoencode(centred, scaled, self.encoder, self.encoder_bias, self.decoder, plan)
        shape = x.shape[:-1]
        latents = SparseLatents(
            found.indices.reshape(*shape, -1),
            found.values.reshape(*shape, -1),
            config.latents,
            None if mean is None else mean.reshape(*shape, 1),
            None if deviation is None else deviation.reshape(*shape, 1),
        )
        return flat, latents, found

    def _flat(self, x: Tensor, name: str) -> Tensor:
        if not x.is_floating_point() or x.dim() < 1 or x.shape[-1] != self.config.width:
            raise InputError(
                f"{name} is {tuple(x.shape)} {x.dtype}; expected activations (..., {self.config.width}), as the "
                f"site gives them to an autoencoder of width {self.config.width}."
            )
        flat = x.reshape(-1, self.config.width).to(self.decoder.dtype)
        if len(flat) == 0:
            raise InputError(f"{name} is {tuple(x.shape)}, without a token; expected at least one.")
        # a GPU would have to be waited for; there NaN shows in the loss
        if flat.device.type == "cpu" and not bool(flat.detach().isfinite().all()):
            raise InputError(
                f"{name} has NaN or infinite entries; expected finite activations. Mask padding."
            )
        return flat

    def _columns(self, tokens: int, matrices: int) -> int | None:
        if self.memory_budget is None:
            return None
        fitting = self.memory_budget // (tokens * matrices * self.decoder.element_size())
        return max(1, min(self.config.latents, max(fitting, self.config.k)))

    def _denormalize(self, output: Tensor, latents: SparseLatents) -> Tensor:
        if latents.mean is not None and latents.deviation is not None:
            return output * latents.deviation + latents.mean
        return output / self.input_scale if self.config.normalization == "mean_norm" else output


def _variance(x: Tensor, average: Callable[[Tensor], Tensor] | None) -> Tensor:
    """MSE of the mean over the batch (of all processes), without derivative."""
    x = x.detach()
    mean = x.mean(0) if average is None else average(x.mean(0))
    variance = (x - mean).square().mean()
    return variance if average is None else average(variance)
