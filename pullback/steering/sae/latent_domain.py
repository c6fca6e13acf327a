"""The latents of a sparse autoencoder as coordinates of a site, so that every method can explain them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from pullback.core.errors import InputError, MethodError
from pullback.core.problem import Domain

from .latents import SparseLatents
from .model import SparseAutoencoder

__all__ = ["Latents"]

Part = Literal["latents", "error", "both"]


@dataclass(frozen=True, eq=False)
class Latents:
    """Activations as what the latents say, and what they leave out: ``x = Σ_i a_i w_i + b + e``.

    The values a (..., latents) of the dictionary are the coefficients, the error ``e = x - decode(a)`` the rest, which
    is held fixed ("latents"), explained instead of them ("error"), or put behind them ("both"). With ∂F/∂x = g the
    derivative by a_i is w_i · g, so that ``Σ_i a_i (w_i · g) + e · g + b · g = x · g`` exactly.

    Args:
        autoencoder: of the site's width.
        part: "latents", "error" or "both".
        gradient: of the loss at x, of x's shape, where the autoencoder selects by gradient; None selects by size.

    Coefficients:
        (B, ..., width) -> (B, ..., latents), (B, ..., width), or (B, ..., latents + width).

    Raises:
        MethodError: no such part, or no example to hold the rest of. InputError: another width, or a gradient of
        another shape.

    Cost: an encoding; (B, ..., latents) is stored in full.

    Source: Marks et al. 2024 (sparse feature circuits): latents and the error node as a decomposition of a site.

    Example:
        >>> import pullback as pb
        >>> from pullback.steering.sae import SparseAutoencoderConfig
        >>> sae = SparseAutoencoder(SparseAutoencoderConfig(width=3, latents=8, k=2))
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.GELU(), torch.nn.Linear(3, 1)).eval()
        >>> method = pb.InDomain(Latents(sae), pb.InputXGradient())
        >>> pb.explain(net, torch.ones(1, 4), site="0", method=method).values.shape
        torch.Size([1, 8])
    """

    autoencoder: SparseAutoencoder
    part: Part = "latents"
    gradient: Tensor | None = None
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.autoencoder, SparseAutoencoder):
            raise MethodError(
                f"Latents takes a SparseAutoencoder, got a {type(self.autoencoder).__name__}; load it with "
                "pullback.steering.sae.load(path)."
            )
        if self.part not in get_args(Part):
            raise MethodError(f'part={self.part!r}; expected "latents", "error" or "both".')

    def __repr__(self) -> str:
        config = self.autoencoder.config
        return f"Latents({config.latents} of width {config.width}, {self.part!r})"

    def fitted(self, x: Tensor) -> Domain:
        """The domain for these examples, whose error and scale are held."""
        if self.gradient is not None and self.gradient.shape != x.shape:
            raise InputError(
                f"the gradient is {tuple(self.gradient.shape)} for activations {tuple(x.shape)}; expected equal "
                "shapes, as ActivationGradientStream gives them."
            )
        return _FittedLatents(self, x.detach(), self.gradient)

    def analysis(self, x: Tensor) -> Tensor:
        raise self._needs_examples()

    def synthesis(self, coefficients: Tensor) -> Tensor:
        raise self._needs_examples()

    def _needs_examples(self) -> MethodError:
        return MethodError(
            f"{self!r} needs the examples whose error it holds: use InDomain(...) or problem.in_domain(...), or call "
            ".fitted(x) first."
        )


@dataclass(frozen=True, eq=False)
class _FittedLatents:
    """``Latents`` for examples x (B, ..., width), with what decoding takes of each: scale, mean, and error."""

    of: Latents
    x: Tensor
    gradient: Tensor | None
    linear: ClassVar[bool] = True

    def __repr__(self) -> str:
        return repr(self.of)

    def rows(self, index: Tensor) -> Domain:
        index = index.to(self.x.device)
        taken = None if self.gradient is None else self.gradient[index.to(self.gradient.device)]
        return replace(self, x=self.x[index], gradient=taken)

    def analysis(self, x: Tensor) -> Tensor:
        latents, error = self._split(x)
        dense = latents.dense().to(x.dtype)
        if self.of.part == "latents":
            return dense
        return error if self.of.part == "error" else torch.cat([dense, error], -1)

    def synthesis(self, coefficients: Tensor) -> Tensor:
        latents, error = self._split(self.x)
        if self.of.part == "error":
            return self.of.autoencoder.decode(latents).to(coefficients.dtype).detach() + coefficients
        dense = coefficients
        if self.of.part == "both":
            count = self.of.autoencoder.config.latents
            dense, error = coefficients[..., :count], coefficients[..., count:]
        return self._decoded(dense, latents) + error

    def _split(self, x: Tensor) -> tuple[SparseLatents, Tensor]:
        """The latents of x and what they leave out."""
        sae = self.of.autoencoder
        gradient = self.gradient if self.gradient is not None and self.gradient.shape == x.shape else None
        with torch.no_grad():
            latents = sae.encode(x.detach(), gradient, selection=None if gradient is not None else "topk")
            error = x.detach() - sae.decode(latents).to(x.dtype)
        return latents, error

    def _decoded(self, dense: Tensor, latents: SparseLatents) -> Tensor:
        """``decode`` for coefficients of all latents; the scale of each token is the example's own."""
        sae = self.of.autoencoder
        decoder, bias = sae.decoder.detach().to(dense), sae.decoder_bias.detach().to(dense)
        output = dense @ decoder + bias
        if latents.mean is not None and latents.deviation is not None:
            return output * latents.deviation.to(dense) + latents.mean.to(dense)
        return output / sae.input_scale.to(dense) if sae.config.normalization == "mean_norm" else output
