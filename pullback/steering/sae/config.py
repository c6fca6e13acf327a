"""The configuration of a sparse autoencoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pullback.core.errors import MethodError

__all__ = ["NORMALIZATIONS", "SELECTIONS", "SparseAutoencoderConfig"]

SELECTIONS = ("topk", "gradient")
NORMALIZATIONS = ("none", "mean_norm", "row")


@dataclass(frozen=True)
class SparseAutoencoderConfig:
    """The shape of a sparse autoencoder and how it selects latents.

    Attributes:
        width: of the activations.
        latents: how many, n.
        k: latents selected per token.
        selection: "topk" by z_i, or "gradient" by z_i (1 + beta |w_i . g|), g = grad_x L per token.
        beta: weight of the gradient, in units of 1 / (mean norm of g). Tuned by us on a toy; the paper's is not known.
        subtract_decoder_bias: whether the encoder sees x - b_dec.
        normalization: of the input, undone at the output: "none"; "mean_norm", one factor that makes the mean norm
            sqrt(width), folded into the weights on save; "row", each token to mean 0 and deviation 1.
        unit_decoder: whether decoder rows are kept at norm 1.
        auxiliary_weight: of the AuxK loss, by which dead latents learn the residual.
        auxiliary_k: dead latents per token in it; None for min(256, width // 2).
        dead_after: tokens without firing after which a latent is dead.

    Raises MethodError for values out of range.

    >>> SparseAutoencoderConfig(width=16, latents=64, k=4, selection="gradient").beta
    10.0
    """

    width: int
    latents: int
    k: int
    selection: Literal["topk", "gradient"] = "topk"
    beta: float = 10.0
    subtract_decoder_bias: bool = True
    normalization: Literal["none", "mean_norm", "row"] = "none"
    unit_decoder: bool = True
    auxiliary_weight: float = 1 / 32
    auxiliary_k: int | None = None
    dead_after: int = 10_000_000

    def __post_init__(self) -> None:
        counts = ("width", "latents", "k", "dead_after", "auxiliary_k")
        for name in counts:
            value = getattr(self, name)
            if name == "auxiliary_k" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MethodError(f"{name} is {value!r}; expected a whole number of at least 1.")
        if self.k > self.latents:
            raise MethodError(f"k is {self.k} for {self.latents} latents; expected 1 to {self.latents}.")
        for name, known in (("selection", SELECTIONS), ("normalization", NORMALIZATIONS)):
            if getattr(self, name) not in known:
                choices = ", ".join(f'"{choice}"' for choice in known)
                raise MethodError(f"{name} is {getattr(self, name)!r}; expected one of {choices}.")
        for name in ("beta", "auxiliary_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise MethodError(f"{name} is {value!r}; expected a finite number of at least 0.")
