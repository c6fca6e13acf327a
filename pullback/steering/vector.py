"""Steering vectors: one direction per block of a transformer, with the model they are for and how they were made."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pullback import storage
from pullback.core.errors import FormatError, InputError, ModelError, SiteError

from .blocks import Fingerprint, Layers, fingerprint, select_layers

if TYPE_CHECKING:
    from .apply import Gate, Scale, Scope, Steering

__all__ = ["SteeringVector", "load"]

_KIND, _SCHEMA = "steering vector", 1


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """One direction v_l per block l; applied, it moves the hidden state h to h + s r v_l.

    Sums and multiples act on the directions, so that ``(2 * v).apply(strength=s)`` is ``v.apply(strength=2 * s)``.

    Attributes:
        directions: by block number, (width,) float32 on the CPU; unit vectors as fitted.
        scales: by block number, the length ||mean delta_l|| of the displacement found when fitting; 1 if not given.
            A sum's is the mean of its terms', weighted by the lengths of their directions.
        fingerprint: of the model it is for; None for a vector made by hand.
        provenance: how it was made: "method", "settings" and what the method found. Saved as JSON.

    Raises InputError for directions that are not finite vectors of one width.

    >>> v = SteeringVector({0: torch.tensor([3.0, 0.0])}).normalize()
    >>> (2 * v).directions[0], v.cosine(-v)
    (tensor([2., 0.]), {0: -1.0})
    """

    directions: Mapping[int, Tensor]
    scales: Mapping[int, float] = field(default_factory=dict)
    fingerprint: Fingerprint | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found: dict[int, Tensor] = {}
        for layer, direction in sorted(self.directions.items()):
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise InputError(f"{layer!r} is no block number; expected 0, 1, ...")
            if not isinstance(direction, Tensor) or direction.dim() != 1:
                shape = tuple(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
                raise InputError(f"the direction at block {layer} is {shape}; expected a (width,) tensor.")
            with torch.inference_mode(False):
                found[layer] = direction.detach().to("cpu", torch.float32, copy=True)
            if not bool(found[layer].isfinite().all()):
                raise InputError(f"the direction at block {layer} has NaN or infinite entries.")
        widths = {len(direction) for direction in found.values()}
        if len(widths) != 1:
            raise InputError(
                f"the directions have widths {sorted(widths)}; expected one width, at least one."
            )
        scales = {layer: float(self.scales.get(layer, 1.0)) for layer in found}
        if unknown := sorted(set(self.scales) - set(found)):
            raise InputError(f"there are scales for blocks {unknown} without a direction.")
        if wrong := [layer for layer, scale in scales.items() if not math.isfinite(scale) or scale < 0]:
            raise InputError(f"the scales at blocks {wrong} are negative or not finite; expected lengths.")
        object.__setattr__(self, "directions", MappingProxyType(found))
        object.__setattr__(self, "scales", MappingProxyType(scales))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    @classmethod
    def from_displacements(
        cls,
        displacements: Mapping[int, Tensor],
        model: nn.Module | None = None,
        *,
        blocks: str | None = None,
        **provenance: Any,
    ) -> SteeringVector:
        """Unit directions and their lengths from one displacement (width,) per block, for this model."""
        lengths = {layer: float(torch.linalg.vector_norm(d.double())) for layer, d in displacements.items()}
        units = {layer: d.double() / max(lengths[layer], 1e-300) for layer, d in displacements.items()}
        known = None if model is None else fingerprint(model, blocks)
        vector = cls(units, lengths, known, provenance)
        if model is not None:
            vector.check(model, blocks=blocks)
        return vector

    @property
    def layers(self) -> tuple[int, ...]:
        """The block numbers in order."""
        return tuple(self.directions)

    @property
    def width(self) -> int:
        """The size of the hidden state."""
        return len(next(iter(self.directions.values())))

    def __repr__(self) -> str:
        method = self.provenance.get("method", "given")
        model = "any model" if self.fingerprint is None else str(self.fingerprint)
        return f"SteeringVector({method}, blocks {list(self.layers)}, width {self.width}, for {model})"

    # --- arithmetic ---

    def __mul__(self, factor: float) -> SteeringVector:
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        directions = {layer: factor * direction for layer, direction in self.directions.items()}
        return self._made(
            directions, {"operation": "multiple", "factor": float(factor), "of": [self._origin]}
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> SteeringVector:
        return self * (1.0 / divisor)

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self + (-other) if isinstance(other, SteeringVector) else NotImplemented

    def __add__(self, other: SteeringVector) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        self._comparable(other)
        directions, scales = dict(self.directions), dict(self.scales)
        for layer, direction in other.directions.items():
            mine = self.directions.get(layer)
            if mine is None:
                directions[layer], scales[layer] = direction, other.scales[layer]
                continue
            directions[layer] = mine + direction
            a, b = float(mine.norm()), float(direction.norm())
            if a + b > 0:
                scales[layer] = (a * self.scales[layer] + b * other.scales[layer]) / (a + b)
        known = self.fingerprint or other.fingerprint
        origin = {"operation": "sum", "of": [self._origin, other._origin]}
        return SteeringVector(directions, scales, known, origin)

    def __getitem__(self, layers: Layers) -> SteeringVector:
        return self.select(layers)

    def select(self, layers: Layers) -> SteeringVector:
        """The same directions at some of the blocks: numbers, depths from 0.0 to 1.0, a slice, or several.

        Raises SiteError for a block without a direction.
        """
        count = self.layers[-1] + 1 if self.fingerprint is None else self.fingerprint.block_count
        wanted = select_layers(layers, count)
        if isinstance(layers, slice):
            wanted = [layer for layer in wanted if layer in self.directions]
        missing = [layer for layer in wanted if layer not in self.directions]
        if missing or not wanted:
            raise SiteError(
                f"the vector has no direction at block {missing[0] if missing else layers}; it has {list(self.layers)}."
            )
        return replace(
            self,
            directions={layer: self.directions[layer] for layer in wanted},
            scales={layer: self.scales[layer] for layer in wanted},
        )

    def normalize(self) -> SteeringVector:
        """Unit directions; zero ones stay zero."""
        directions = {
            layer: direction / direction.norm().clamp_min(1e-30)
            for layer, direction in self.directions.items()
        }
        return self._made(directions, {"operation": "normalize", "of": [self._origin]})

    def fitted(self) -> SteeringVector:
        """The displacements r_l v_l, with scales of 1: for sums that are exact under scale="fit"."""
        directions = {layer: self.scales[layer] * one for layer, one in self.directions.items()}
        made = self._made(directions, {"operation": "fitted", "of": [self._origin]})
        return replace(made, scales={})

    def project_onto(self, other: SteeringVector) -> SteeringVector:
        """The part along ``other``, block by block; zero where ``other`` has no direction."""
        self._comparable(other)
        directions = {
            layer: _along(direction, other.directions.get(layer))
            for layer, direction in self.directions.items()
        }
        return self._made(directions, {"operation": "project_onto", "of": [self._origin, other._origin]})

    def project_out(self, other: SteeringVector) -> SteeringVector:
        """What is left without the part along ``other``, block by block."""
        self._comparable(other)
        directions = {
            layer: direction - _along(direction, other.directions.get(layer))
            for layer, direction in self.directions.items()
        }
        return self._made(directions, {"operation": "project_out", "of": [self._origin, other._origin]})

    def cosine(self, other: SteeringVector) -> dict[int, float]:
        """<v_l, w_l> / (||v_l|| ||w_l||) at the blocks that both have; 0 for a zero direction."""
        self._comparable(other)
        found = {}
        for layer in sorted(set(self.directions) & set(other.directions)):
            a, b = self.directions[layer].double(), other.directions[layer].double()
            found[layer] = float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300))
        return found

    # --- use ---

    def apply(
        self,
        model: nn.Module,
        strength: float = 1.0,
        *,
        scale: Scale = "relative",
        scope: Scope = "all",
        preserve_norm: bool = True,
        gate: Gate | None = None,
        layers: Layers | None = None,
        blocks: str | None = None,
        allow_other_model: bool = False,
    ) -> Steering:
        """A context in which ``model`` is steered; see ``pullback.steering.apply.Steering``."""
        from .apply import Steering

        vector = self if layers is None else self.select(layers)
        return Steering(vector, model, strength, scale, scope, preserve_norm, gate, blocks, allow_other_model)

    def check(self, model: nn.Module, *, blocks: str | None = None, allow_other_model: bool = False) -> None:
        """Raise ModelError where the vector is for another model; it tells both."""
        given = fingerprint(model, blocks)
        fits = given.width in (None, self.width) and self.layers[-1] < given.block_count
        if fits and (self.fingerprint is None or allow_other_model):
            return
        if not fits or self.fingerprint is None or not self.fingerprint.same_architecture(given):
            raise ModelError(
                f"the vector has width {self.width} at blocks {list(self.layers)} and was made for "
                f"{self.fingerprint or 'no model in particular'}; the model given is {given}. "
                + (
                    "Fit a vector on this model, or pass allow_other_model=True if it is meant for both."
                    if fits
                    else "Fit a vector on this model."
                )
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with a JSON document: directions, scales, fingerprint and provenance."""
        fields = {
            "layers": list(self.layers),
            "directions": torch.stack(list(self.directions.values())),
            "scales": [self.scales[layer] for layer in self.layers],
            "fingerprint": None if self.fingerprint is None else asdict(self.fingerprint),
            "provenance": dict(self.provenance),
        }
        storage.write(path, _KIND, _SCHEMA, fields)

    def to_gguf(self, path: str | os.PathLike[str], *, strength: float = 1.0) -> None:
        """Write a control vector for llama.cpp; see ``pullback.steering.control_vectors.write_gguf``."""
        from .control_vectors import write_gguf

        write_gguf(self, path, strength)

    @property
    def _origin(self) -> dict[str, Any]:
        return dict(self.provenance)

    def _made(self, directions: Mapping[int, Tensor], origin: Mapping[str, Any]) -> SteeringVector:
        return replace(self, directions=directions, provenance=origin)

    def _comparable(self, other: SteeringVector) -> None:
        a, b = self.fingerprint, other.fingerprint
        if self.width != other.width or (a is not None and b is not None and not a.same_architecture(b)):
            raise ModelError(
                f"the vectors are for different models: width {self.width} for {a or 'no model in particular'}, and "
                f"width {other.width} for {b or 'no model in particular'}. Fit both on one model."
            )


def load(path: str | os.PathLike[str], *, model: nn.Module | None = None) -> SteeringVector:
    """Read a saved steering vector; with ``model``, check that it is for this model.

    Raises FormatError for another or a damaged file, ModelError for another model.
    """
    fields = storage.read(path, _KIND, _SCHEMA, "SteeringVector.save")
    try:
        layers: Sequence[int] = fields["layers"]
        known = fields["fingerprint"]
        vector = SteeringVector(
            dict(zip(layers, fields["directions"], strict=True)),
            dict(zip(layers, fields["scales"], strict=True)),
            None if known is None else Fingerprint(**known),
            fields["provenance"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"{path} is damaged ({type(error).__name__}: {error}); expected a file written by SteeringVector.save."
        ) from error
    if model is not None:
        vector.check(model)
    return vector


def _along(direction: Tensor, other: Tensor | None) -> Tensor:
    if other is None:
        return torch.zeros_like(direction)
    unit = other.double() / other.double().norm().clamp_min(1e-300)
    part: Tensor = ((direction.double() @ unit) * unit).float()
    return part
