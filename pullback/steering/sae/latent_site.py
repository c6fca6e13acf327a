"""A sparse autoencoder's latents, and what they leave over, as a site that every attribution method explains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pullback.core.errors import InputError, MethodError
from pullback.core.sites import Site

from .latents import SparseLatents
from .model import SparseAutoencoder

__all__ = ["Latents"]

_PARTS = ("latents", "error", "all")


@dataclass(frozen=True, eq=False, repr=False)
class Latents:
    """The coordinates of activations in an autoencoder: x = decode(a) + e, with the latents a and the error e.

    ``Latents(autoencoder).at("transformer.h.8")`` is a site whose value is the latents (..., n); a method there
    explains a score by latents, from zero latents where it needs a baseline. With part "all" a gradient at x is
    shared out completely: sum_i a_i (w_i . g) + e . g + b_dec . g = x . g, the last term being the score's part
    that no latent and no error has.

    Args:
        autoencoder: for activations of the site's width.
        part: "latents" (..., n), the error staying as it is; "error" (..., width), the latents staying; or "all"
            (..., n + width), both.
        selection: as in ``SparseAutoencoder.encode``: "topk" for the gradient-free choice of a g-SAE.
        gradient: (B, ..., width) of the loss at the site, which the gradient selection needs; in patching both runs
            select by it.

    Raises MethodError for an unknown part, InputError for activations of another width and a missing gradient.

    Cost: one encoding where the site is entered, n x width products per token and evaluation; holds dense latents.

    Source: Marks et al. 2025 (sparse feature circuits, arXiv 2403.19647, section 2, latents and error nodes).

    Example:
        >>> import pullback as pb
        >>> from pullback.steering.sae import SparseAutoencoderConfig
        >>> site = Latents(SparseAutoencoder(SparseAutoencoderConfig(4, latents=8, k=2))).at("0")
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        >>> pb.explain(net, torch.ones(1, 3), site=site, method="gradient").values.shape
        torch.Size([1, 8])
    """

    autoencoder: SparseAutoencoder
    part: Literal["latents", "error", "all"] = "latents"
    selection: Literal["topk", "gradient"] | None = None
    gradient: Tensor | None = None
    kept: Tensor | None = None
    rescaling: tuple[Tensor, Tensor] | None = None
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.part not in _PARTS:
            raise MethodError(f'part is {self.part!r}; expected one of "latents", "error", "all".')

    def at(self, site: str | Site) -> Site:
        """The site in these coordinates."""
        return replace(Site.parse(site), domain=self)

    def fitted(self, x: Tensor) -> Latents:
        """The coordinates of these examples: what the part leaves out is held, as is a row's mean and deviation."""
        found = self._encoded(x)
        rescaling = None
        if found.mean is not None and found.deviation is not None:
            rescaling = found.mean.to(x.dtype), found.deviation.to(x.dtype)
        made = replace(self, rescaling=rescaling)
        decoded = made._decoded(found.dense().to(x.dtype))
        kept = {"latents": x - decoded, "error": decoded, "all": None}[self.part]
        return replace(made, kept=kept)

    def analysis(self, x: Tensor) -> Tensor:
        values = self._encoded(x).dense().to(x.dtype)
        if self.part == "latents":
            return values
        error = x - self._decoded(values)
        return error if self.part == "error" else torch.cat([values, error], -1)

    def synthesis(self, coefficients: Tensor) -> Tensor:
        if self.part == "all":
            count = self.autoencoder.config.latents
            return self._decoded(coefficients[..., :count]) + coefficients[..., count:]
        assert self.kept is not None
        rest = self.kept.to(coefficients.dtype)
        return (self._decoded(coefficients) if self.part == "latents" else coefficients) + rest

    def rows(self, index: Tensor) -> Latents:
        """The same for these rows of the examples, repeated or left out."""

        def taken(value: Tensor) -> Tensor:
            return value[index.to(value.device)]

        return replace(
            self,
            gradient=None if self.gradient is None else taken(self.gradient),
            kept=None if self.kept is None else taken(self.kept),
            rescaling=None
            if self.rescaling is None
            else (taken(self.rescaling[0]), taken(self.rescaling[1])),
        )

    def __repr__(self) -> str:
        config = self.autoencoder.config
        return f"Latents({config.latents} of width {config.width}, k={config.k}, part={self.part!r})"

    def _encoded(self, x: Tensor) -> SparseLatents:
        gradient = self.gradient
        if gradient is not None and gradient.shape != x.shape:
            raise InputError(
                f"the gradient given to Latents is {tuple(gradient.shape)}, the activations at the site are "
                f"{tuple(x.shape)}; expected the gradient of the loss at these activations."
            )
        with torch.no_grad():
            return self.autoencoder.encode(x, gradient, selection=self.selection)

    def _decoded(self, values: Tensor) -> Tensor:
        autoencoder = self.autoencoder
        decoder, bias = (
            part.detach().to(values.dtype) for part in (autoencoder.decoder, autoencoder.decoder_bias)
        )
        output = values @ decoder + bias
        if self.rescaling is not None:
            return output * self.rescaling[1] + self.rescaling[0]
        if autoencoder.config.normalization == "mean_norm":
            return output / autoencoder.input_scale.to(values.dtype)
        return output
