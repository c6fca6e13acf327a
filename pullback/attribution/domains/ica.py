"""Independent components of multichannel signals (Hyvärinen 1999), as a domain."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...core.errors import InputError, MethodError
from ...core.problem import Domain
from ..baselines import digest
from .fixed_parts import FixedParts, require_kept

__all__ = ["ICA"]


@dataclass(frozen=True, eq=False, repr=False)
class ICA:
    """Independent components: ``x[c, t] = mean[c] + Σ_k mixing[c, k] · source[k, t]``, fitted to data by FastICA.

    ``parts="sources"``: the coefficients are the sources, which represent every signal and every baseline; the
    score of a component is the sum over time. ``parts="mixing"``: they are each example's mixing entries with its
    sources held fixed, and the means as one more column; the integrated gradient of an entry is
    ``(A - A')[c, k] · Σ_t S[k, t] · ḡ[c, t]``, and the score of a component is the sum over channels. A baseline must
    then be a mixture of the example's sources and a constant per channel, such as zeros.

    Args:
        components: number of components to fit; None for as many as the data have dimensions, which is the number
            of channels, or fewer after an average reference. What fewer cannot give back is refused.
        parts: "sources" or "mixing".
        seed: of FastICA's starting point.
        tolerance: change of the unmixing at which FastICA stops, after at most ``iterations``.
        mixing: (C, K), from ``fit`` or from another tool; ``unmixing`` (K, C) is its pseudo-inverse if left out,
            ``mean`` (C,) zeros.

    Coefficients:
        (B, C, T) -> sources (B, K, T), or mixing entries (B, C, K + 1), the last column the mean.

    Raises:
        MethodError: not fitted, scikit-learn is missing, FastICA did not converge, or a parameter is out of range.
        InputError: other channels than fitted, or a signal the components cannot represent.

    Source: Hyvärinen 1999; mixing entries as coefficients in Kechris et al. 2025, there always from the mean.

    Example:
        >>> signals = torch.rand(4, 2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> ICA().fit(signals).analysis(signals).shape
        torch.Size([4, 2, 50])
    """

    components: int | None = None
    parts: str = "sources"
    seed: int = 0
    tolerance: float = 1e-6
    iterations: int = 2000
    mixing: Tensor | None = None
    unmixing: Tensor | None = None
    mean: Tensor | None = None
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.parts not in ("sources", "mixing"):
            raise MethodError(f'parts is "sources" or "mixing", got {self.parts!r}.')
        for name in ("components", "iterations"):
            value = getattr(self, name)
            if not (value is None and name == "components") and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                raise MethodError(f"{name} is a whole number, at least 1, got {value!r}.")
        if self.mixing is None:
            if self.unmixing is not None or self.mean is not None:
                raise MethodError(
                    "ICA with unmixing or mean needs the mixing too; or call ICA().fit(signals)."
                )
            return
        channels, count = self.mixing.shape if self.mixing.dim() == 2 else (0, 0)
        if not channels or not count:
            raise MethodError(f"mixing is (channels, components), got {tuple(self.mixing.shape)}.")
        for name, shape in (("unmixing", (count, channels)), ("mean", (channels,))):
            given = getattr(self, name)
            if given is not None and tuple(given.shape) != shape:
                raise MethodError(f"{name} has shape {tuple(given.shape)}; the mixing asks for {shape}.")

    def fit(self, signals: Tensor) -> ICA:
        """The ICA estimated from signals (N, C, T) or (C, T), every time a sample; strongest component first."""
        given = torch.as_tensor(signals).detach().cpu()
        if given.dim() not in (2, 3) or not given.numel() or not bool(given.isfinite().all()):
            raise InputError(
                f"ICA.fit takes finite signals (N, C, T) or (C, T), got shape {tuple(given.shape)}."
            )
        if not given.is_floating_point():
            raise InputError(f"ICA.fit takes real signals, got {given.dtype}.")
        samples = (given if given.dim() == 3 else given[None]).transpose(1, 2).flatten(0, 1).double()
        count = self._count(samples, torch.finfo(given.dtype).eps)
        mixing, unmixing, mean = self._fast_ica(samples, count)
        order = mixing.norm(dim=0).argsort(descending=True)  # the sources have unit variance
        fitted = replace(self, components=count, mixing=mixing[:, order], unmixing=unmixing[order], mean=mean)
        fitted._sources(samples.T[None])
        return fitted

    def analysis(self, x: Tensor) -> Tensor:
        self._require_sources("coefficients")
        return self._sources(x)

    def synthesis(self, coefficients: Tensor) -> Tensor:
        self._require_sources("a signal")
        return self._mixed(coefficients)

    def fitted(self, x: Tensor) -> Domain:
        """The domain for these examples: for mixing entries, with their sources held fixed."""
        if self.parts == "sources":
            return self
        sources = self._sources(x)
        parts = torch.cat([sources, torch.ones_like(sources[:, :1])], 1)[:, None]  # the same for all channels
        mixing, _, mean = self._matrices(x, side=0)
        entries = torch.cat([mixing, mean[:, None]], 1).expand(len(x), -1, -1)
        return FixedParts(repr(self), parts, x.detach(), entries, tuple(self._names(mean=True)))

    def labels(self, shape: torch.Size) -> list[str]:
        return self._names(mean=self.parts == "mixing")

    def _names(self, mean: bool) -> list[str]:
        count = 0 if self.mixing is None else self.mixing.shape[1]
        return [f"component {number}" for number in range(count)] + ["mean"] * mean

    def _sources(self, x: Tensor) -> Tensor:
        mixing, unmixing, mean = self._matrices(x, side=0)
        sources = unmixing @ (x - mean[:, None])
        again = mixing @ sources + mean[:, None]
        require_kept(
            x,
            again,
            mean[None],
            f"ICA with {mixing.shape[1]} components does not represent this signal of {mixing.shape[0]} channels: "
            "{lost} of it would be lost and not be explained. Fit as many components as the signals have dimensions, "
            "ICA().fit(signals), and look at those that matter by their scores.",
        )
        return sources

    def _mixed(self, sources: Tensor) -> Tensor:
        mixing, _, mean = self._matrices(sources, side=1)
        return mixing @ sources + mean[:, None]

    def _matrices(self, like: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mixing, unmixing and mean in the precision and on the device of signals (side 0) or sources (side 1)."""
        if self.mixing is None:
            raise MethodError(
                f"{self!r} is not fitted: call ICA().fit(signals) with signals (N, C, T), such as the training data, "
                "or give a mixing matrix, ICA(mixing=matrix)."
            )
        if like.is_complex() or not like.is_floating_point():
            raise InputError(f"ICA takes real signals, got {like.dtype}.")
        if like.dim() != 3 or like.shape[1] != self.mixing.shape[side]:
            what = ("signals", "sources")[side]
            raise InputError(
                f"this ICA has {self.mixing.shape[0]} channels and {self.mixing.shape[1]} components: it takes {what} "
                f"(B, {self.mixing.shape[side]}, T), got {tuple(like.shape)}."
            )
        unmixing = torch.linalg.pinv(self.mixing) if self.unmixing is None else self.unmixing
        mean = torch.zeros_like(self.mixing[:, 0]) if self.mean is None else self.mean
        return self.mixing.to(like), unmixing.to(like), mean.to(like)

    def _count(self, samples: Tensor, precision: float) -> int:
        """How many components: the dimensions of the samples (N, C) unless fewer are asked for."""
        sizes = torch.linalg.svdvals(samples - samples.mean(0))
        dimensions = int((sizes > 50 * precision * sizes.max()).sum())
        if not dimensions or (self.components or 0) > dimensions:
            raise MethodError(
                f"{self.components or 1} components were asked of signals with {samples.shape[1]} channels and "
                f"{dimensions} dimensions. Leave components out, ICA().fit(signals), or ask for at most as many."
            )
        return self.components or dimensions

    def _fast_ica(self, samples: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mixing (C, K), unmixing (K, C) and mean (C,) of samples (N, C)."""
        try:
            from sklearn.decomposition import FastICA
            from sklearn.exceptions import ConvergenceWarning
        except ImportError:
            raise MethodError("ICA needs scikit-learn: pip install 'pullback[series]'.") from None
        estimator = FastICA(
            count,
            whiten="unit-variance",
            whiten_solver="svd",
            tol=self.tolerance,
            max_iter=self.iterations,
            random_state=self.seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            try:
                estimator.fit(samples.numpy())
            except ConvergenceWarning:
                raise MethodError(
                    f"FastICA did not reach tolerance={self.tolerance} in {self.iterations} iterations. Raise either, "
                    "try another seed, or give more data: sources that are Gaussian cannot be told apart."
                ) from None
        found = (estimator.mixing_, estimator.components_, estimator.mean_)
        mixing, unmixing, mean = (torch.as_tensor(each) for each in found)
        return mixing, unmixing, mean

    def _require_sources(self, asked: str) -> None:
        if self.parts == "mixing" and self.mixing is not None:
            raise MethodError(
                f"{self!r} gives {asked} only together with the example whose sources are mixed. Use InDomain(...) or "
                'problem.in_domain(...), call .fitted(x) first, or take parts="sources".'
            )

    def _settings(self) -> dict[str, str]:
        """What it was made with, as texts; tensors as digests."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return {
            name: digest(value) if isinstance(value, Tensor) else repr(value) for name, value in given.items()
        }

    def __repr__(self) -> str:
        defaults = {each.name: repr(each.default) for each in fields(self)}
        shown = (f"{name}={text}" for name, text in self._settings().items() if text != defaults[name])
        return f"ICA({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ICA) and self._settings() == other._settings()

    def __hash__(self) -> int:
        return hash(tuple(self._settings().values()))
