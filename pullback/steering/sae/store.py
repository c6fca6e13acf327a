"""Files of sparse autoencoders: SAELens' layout, with what is ours in the metadata and in a file of its own.

``sae_weights.safetensors`` holds W_enc (width, latents), b_enc, W_dec (latents, width) and b_dec, nothing else, since
SAELens loads it strictly; ``cfg.json`` says "topk", which is what other programs run; ``extra.safetensors`` is ours.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from pullback.core.errors import FormatError, InputError, MethodError

from .config import SparseAutoencoderConfig
from .model import SparseAutoencoder

__all__ = ["exact_names", "load", "load_extra", "read_json", "read_tensors", "save", "taken"]

_SCHEMA = 1
_WEIGHTS, _CONFIG, _EXTRA, _SPARSITY = (
    "sae_weights.safetensors",
    "cfg.json",
    "extra.safetensors",
    "sparsity.safetensors",
)
_OWN_EXTRA = ("gradient_scale", "tokens_since_fired")
_LONGEST_DOCUMENT = 16 * 2**20  # bytes of JSON
_NORMALIZATIONS = {"none": "none", "row": "layer_norm"}
_EXPECTED = "expected a folder written by pullback.steering.sae.save or by SAELens 6"


def save(
    autoencoder: SparseAutoencoder,
    directory: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a folder that SAELens reads too: raw activations in, unit decoder rows, "mean_norm" folded.

    Everything is written beside the folder first, so that a full disk leaves an earlier save as it was.

    Args:
        autoencoder: what to save.
        directory: the folder; an earlier save in it is replaced.
        metadata: JSON for ``cfg.json``, such as "model_name" and "hook_name".
        extra: more tensors for ``extra.safetensors``.

    Raises InputError if the folder holds other files, or a name in ``metadata`` or ``extra`` is taken.
    """
    from safetensors.torch import save as serialized

    final = Path(directory).absolute()
    other = [entry.name for entry in final.iterdir()] if final.is_dir() else [final.name] * final.exists()
    if other := sorted(set(other) - {_WEIGHTS, _CONFIG, _EXTRA, _SPARSITY}):
        raise InputError(f"{final} holds {other[0]!r}, which saving would remove; choose an empty folder.")
    if clash := set(_OWN_EXTRA) & set(extra or {}) or {"pullback"} & set(metadata or {}):
        raise InputError(f"the name {sorted(clash)[0]!r} is pullback's own; choose another.")
    folded = autoencoder.folded()
    config = folded.config
    weights = {
        "W_enc": folded.encoder.t(),
        "b_enc": folded.encoder_bias,
        "W_dec": folded.decoder,
        "b_dec": folded.decoder_bias,
    }
    tensors = {**(extra or {}), **{name: getattr(folded, name) for name in _OWN_EXTRA}}
    document = {
        "architecture": "topk",
        "d_in": config.width,
        "d_sae": config.latents,
        "k": config.k,
        "dtype": str(folded.decoder.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": config.subtract_decoder_bias,
        "normalize_activations": _NORMALIZATIONS[config.normalization],
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {**(metadata or {}), "pullback": {"schema": _SCHEMA, "config": asdict(config)}},
    }
    try:
        text = json.dumps(document, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the metadata is not JSON ({error}); expected numbers, text, lists and dicts."
        ) from error
    token = secrets.token_hex(8)
    staging, old = (final.with_name(f".{final.name}.{token}.{end}") for end in ("part", "old"))
    staging.mkdir(parents=True)
    try:
        _write(staging / _WEIGHTS, serialized(_plain(weights)))
        _write(staging / _EXTRA, serialized(_plain(tensors)))
        _write(staging / _CONFIG, text.encode())
        if final.exists():
            final.rename(old)
        try:
            staging.rename(final)
        except OSError:
            if old.exists():
                old.rename(final)
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def load(directory: str | os.PathLike[str]) -> SparseAutoencoder:
    """The autoencoder of a folder written by ``save`` or, of the architecture "topk", by SAELens; on the CPU.

    Raises FormatError for a damaged or foreign folder: other keys, shapes, architectures or normalisations.
    """
    folder = Path(directory)
    document = read_json(folder / _CONFIG, _EXPECTED)
    config, fold = _config(document, folder / _CONFIG)
    tensors = read_tensors(folder / _WEIGHTS, ("W_enc", "b_enc", "W_dec", "b_dec"), _EXPECTED)
    encoder, bias = tensors["W_enc"].t(), tensors["b_enc"]
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if fold and len(shapes["W_dec"]) == 2 and shapes["W_enc"] == shapes["W_dec"][::-1]:
        # SAELens then selects by z_i |w_i| and decodes along w_i / |w_i|
        norms = tensors["W_dec"].norm(dim=1)
        encoder, bias = encoder * norms.unsqueeze(1), bias * norms
        tensors["W_dec"] = tensors["W_dec"] / norms.unsqueeze(1)
    made = taken(
        folder / _WEIGHTS,
        config,
        encoder=encoder,
        encoder_bias=bias,
        decoder=tensors["W_dec"],
        decoder_bias=tensors["b_dec"],
    )
    if (folder / _EXTRA).exists():
        extra = read_tensors(folder / _EXTRA, _OWN_EXTRA, _EXPECTED, others=True)
        for name in _OWN_EXTRA:
            buffer = getattr(made, name)
            if extra[name].shape != buffer.shape:
                raise FormatError(
                    f"{folder / _EXTRA} has {name} of shape {tuple(extra[name].shape)}; expected {tuple(buffer.shape)}."
                )
            buffer.copy_(extra[name])
    return made


def load_extra(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors given to ``save`` as ``extra``."""
    tensors = read_tensors(Path(directory) / _EXTRA, _OWN_EXTRA, _EXPECTED, others=True)
    return {name: value for name, value in tensors.items() if name not in _OWN_EXTRA}


def _config(document: Mapping[str, Any], path: Path) -> tuple[SparseAutoencoderConfig, bool]:
    """The configuration that ``cfg.json`` describes, and whether decoder norms are to be folded."""
    for name, possible in (
        ("architecture", ("topk",)),
        ("normalize_activations", ("none", "layer_norm")),
        ("reshape_activations", ("none",)),
    ):
        if document.get(name) not in possible:
            raise FormatError(
                f"{path} has {name} {document.get(name)!r}; this pullback reads {' and '.join(map(repr, possible))}. "
                "Older SAELens folders: load and save them with SAELens 6, with the scale folded."
            )
    counts = {name: document.get(name) for name in ("d_in", "d_sae", "k")}
    settings: dict[str, Any] = {}
    try:
        own = (document.get("metadata") or {}).get("pullback")
        if own is not None:
            if own["schema"] != _SCHEMA:
                raise FormatError(
                    f"{path} has schema version {own['schema']!r}; this pullback reads version {_SCHEMA}. "
                    "Try: pip install --upgrade pullback"
                )
            settings = dict(own["config"])
            if unknown := sorted(set(settings) - {field.name for field in fields(SparseAutoencoderConfig)}):
                raise FormatError(f"{path} has the unknown setting {unknown[0]!r}; {_EXPECTED}.")
            if (mine := [settings[name] for name in ("width", "latents", "k")]) != list(counts.values()):
                raise FormatError(f"{path} contradicts itself: {counts} and {mine}; {_EXPECTED}.")
        else:
            settings = {"width": counts["d_in"], "latents": counts["d_sae"], "k": counts["k"]}
            settings["unit_decoder"] = bool(document.get("rescale_acts_by_decoder_norm"))
        settings["subtract_decoder_bias"] = bool(document["apply_b_dec_to_input"])
        settings["normalization"] = "row" if document["normalize_activations"] == "layer_norm" else "none"
        config = SparseAutoencoderConfig(**settings)
    except (KeyError, TypeError, AttributeError, MethodError) as error:
        raise FormatError(f"{path} is damaged ({type(error).__name__}: {error}); {_EXPECTED}.") from error
    return config, bool(document.get("rescale_acts_by_decoder_norm"))


# --- reading, for the converters too ---


def taken(path: Path, config: SparseAutoencoderConfig, **parameters: Tensor) -> SparseAutoencoder:
    """``SparseAutoencoder.from_parameters`` of what a file holds; FormatError where they do not fit."""
    try:
        return SparseAutoencoder.from_parameters(config, **parameters)
    except InputError as error:
        raise FormatError(f"{path} does not fit its configuration: {error}") from error


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """The JSON object in a file."""
    if not path.is_file():
        raise FormatError(f"there is no {path}; {expected}.")
    if (size := path.stat().st_size) > _LONGEST_DOCUMENT:
        raise FormatError(f"{path} has {size} bytes; the limit is {_LONGEST_DOCUMENT}.")
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON ({error}); {expected}.") from error
    if not isinstance(document, dict):
        raise FormatError(f"{path} holds a {type(document).__name__}, not an object; {expected}.")
    return document


def read_tensors(
    path: Path, names: tuple[str, ...], expected: str, others: bool = False
) -> dict[str, Tensor]:
    """The tensors of a safetensors file with exactly these names, or with ``others`` besides."""
    from safetensors.torch import load as parsed

    if not path.is_file():
        raise FormatError(f"there is no {path}; {expected}.")
    try:
        tensors: dict[str, Tensor] = parsed(path.read_bytes())
    except Exception as error:  # the parser's errors for a damaged file are of many types
        raise FormatError(
            f"{path} is not a safetensors file, or is damaged ({error}); {expected}."
        ) from error
    return exact_names(path, tensors, names, others)


def exact_names(
    path: Path, tensors: Mapping[str, Any], names: tuple[str, ...], others: bool = False
) -> dict[str, Tensor]:
    """The tensors, if their names are these."""
    missing, unknown = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names))
    if missing or (unknown and not others):
        raise FormatError(
            f"{path} has the tensors {sorted(tensors)[:12]}; expected {sorted(names)}"
            f"{f', missing {missing}' if missing else ''}{f', not {unknown[:6]}' if unknown else ''}."
        )
    if wrong := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise FormatError(f"{path} holds {wrong[0]!r} that is no tensor; expected {sorted(names)}.")
    return dict(tensors)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
