"""Sparse autoencoders from the files of other programs: sparsify, dictionary_learning and OpenAI's.

The functions follow what each program computes, not what converters elsewhere assume: sparsify stores its decoder as
(latents, width) and always subtracts the decoder bias; the other two store it as (width, latents).
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import FormatError, InputError, MethodError

from .config import SparseAutoencoderConfig
from .model import SparseAutoencoder
from .store import exact_names, read_json, read_tensors, taken

__all__ = ["from_dictionary_learning", "from_openai", "from_sparsify", "to_sparsify"]

_UNIT = 1e-5  # decoder rows this near to norm 1 are float32's unit rows

_SPARSIFY = "expected a hookpoint's folder written by sparsify, with sae.safetensors and cfg.json"
_DICTIONARY = "expected a folder written by dictionary_learning, with ae.pt and config.json"
_OPENAI = "expected a file of openai/sparse_autoencoder"


def from_sparsify(directory: str | os.PathLike[str]) -> SparseAutoencoder:
    """The TopK autoencoder of a folder written by EleutherAI's sparsify.

    Raises FormatError for a damaged folder, for transcoders, skip connections, GroupMax and mixed k.
    """
    folder = Path(directory)
    document = read_json(folder / "cfg.json", _SPARSIFY)
    for name, possible in (
        ("activation", ("topk",)),
        ("transcode", (False,)),
        ("skip_connection", (False,)),
    ):
        if document.get(name, possible[0]) not in possible:
            raise FormatError(
                f"{folder / 'cfg.json'} has {name} {document[name]!r}; this pullback reads TopK autoencoders, "
                f"with {name} {possible[0]!r}."
            )
    tensors = read_tensors(
        folder / "sae.safetensors", ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), _SPARSIFY
    )
    return _converted(
        folder / "sae.safetensors",
        k=document.get("k"),
        encoder=tensors["encoder.weight"],
        encoder_bias=tensors["encoder.bias"],
        decoder=tensors["W_dec"],
        decoder_bias=tensors["b_dec"],
    )


def from_dictionary_learning(directory: str | os.PathLike[str]) -> SparseAutoencoder:
    """The TopK autoencoder of a folder written by dictionary_learning.

    Raises FormatError for a damaged folder and for other dictionaries: BatchTopK's files have the same names.
    """
    folder = Path(directory)
    trainer = read_json(folder / "config.json", _DICTIONARY).get("trainer")
    kind = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if kind != "AutoEncoderTopK":
        raise FormatError(
            f"{folder / 'config.json'} says dict_class {kind!r}; this pullback reads 'AutoEncoderTopK'."
        )
    path = folder / "ae.pt"
    loaded = _unpickled(path, _DICTIONARY)
    if isinstance(loaded.get("k"), int):
        loaded["k"] = torch.tensor(loaded["k"])
    loaded.setdefault("threshold", torch.tensor(-1.0))  # not in files before 2025; TopK does not use it
    tensors = exact_names(
        path, loaded, ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k", "threshold")
    )
    if tensors["k"].numel() != 1:
        raise FormatError(f"{path} has k of shape {tuple(tensors['k'].shape)}; expected one number.")
    return _converted(
        path,
        k=int(tensors["k"]),
        encoder=tensors["encoder.weight"],
        encoder_bias=tensors["encoder.bias"],
        decoder=tensors["decoder.weight"].t(),
        decoder_bias=tensors["b_dec"],
    )


def from_openai(path: str | os.PathLike[str]) -> SparseAutoencoder:
    """The TopK autoencoder of a file of openai/sparse_autoencoder, which normalises each token.

    Raises FormatError for a damaged file and for other activations than TopK.
    """
    file = Path(path)
    loaded = _unpickled(file, _OPENAI)
    state = loaded.get("activation_state_dict")
    if loaded.get("activation") != "TopK" or not isinstance(state, Mapping):
        raise FormatError(f"{file} has activation {loaded.get('activation')!r}; this pullback reads 'TopK'.")
    names = ("pre_bias", "latent_bias", "encoder.weight", "decoder.weight")
    kept = {name: value for name, value in loaded.items() if not name.startswith(("activation", "stats_"))}
    tensors = exact_names(file, kept, names)
    return _converted(
        file,
        k=state.get("k"),
        encoder=tensors["encoder.weight"],
        encoder_bias=tensors["latent_bias"],
        decoder=tensors["decoder.weight"].t(),
        decoder_bias=tensors["pre_bias"],
        normalization="row",
    )


def to_sparsify(autoencoder: SparseAutoencoder, directory: str | os.PathLike[str]) -> None:
    """Write the folder that sparsify reads. The gradient selection is not in it: sparsify selects by size.

    Raises InputError for row normalisation and where the decoder bias is not subtracted: sparsify has neither.
    """
    from safetensors.torch import save

    folded = autoencoder.folded()
    config = folded.config
    if config.normalization != "none" or not config.subtract_decoder_bias:
        raise InputError(
            f"sparsify has no autoencoder with normalization {config.normalization!r} and subtract_decoder_bias "
            f"{config.subtract_decoder_bias}; expected 'none' and True. Try pullback.steering.sae.save."
        )
    weights = {
        "encoder.weight": folded.encoder,
        "encoder.bias": folded.encoder_bias,
        "W_dec": folded.decoder,
        "b_dec": folded.decoder_bias,
    }
    document = {
        "activation": "topk",
        "expansion_factor": config.latents // config.width,
        "normalize_decoder": config.unit_decoder,
        "num_latents": config.latents,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": config.width,
    }
    data = save({name: value.detach().cpu().contiguous().clone() for name, value in weights.items()})
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("sae.safetensors", data), ("cfg.json", json.dumps(document).encode())):
        temporary = folder / f".{secrets.token_hex(8)}.part"
        try:
            temporary.write_bytes(content)
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)


def _converted(path: Path, *, k: Any, normalization: Any = "none", **parameters: Tensor) -> SparseAutoencoder:
    decoder = parameters["decoder"]
    if decoder.dim() != 2:
        raise FormatError(f"{path} has a decoder of shape {tuple(decoder.shape)}; expected a matrix.")
    latents, width = decoder.shape
    unit = bool(((decoder.float().norm(dim=1) - 1).abs() < _UNIT).all())
    try:
        config = SparseAutoencoderConfig(
            width=width, latents=latents, k=k, normalization=normalization, unit_decoder=unit
        )
    except MethodError as error:
        raise FormatError(f"{path} does not describe an autoencoder: {error}") from error
    return taken(path, config, **parameters)


def _unpickled(path: Path, expected: str) -> dict[str, Any]:
    """A file of torch.save with tensors, numbers and text only: no code of it is run."""
    if not path.is_file():
        raise FormatError(f"there is no {path}; {expected}.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's errors for a damaged file are of many types
        reason = str(error).split("\n")[0][:200]
        raise FormatError(f"{path} cannot be read without running code ({reason}); {expected}.") from error
    if not isinstance(loaded, dict):
        raise FormatError(f"{path} holds a {type(loaded).__name__}, not a dict; {expected}.")
    return {str(name): value for name, value in loaded.items()}
