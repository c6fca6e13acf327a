"""Sparse autoencoders on a model's activations: TopK and gradient selection, and files of four programs."""

from .config import SparseAutoencoderConfig
from .converters import from_dictionary_learning, from_openai, from_sparsify, to_sparsify
from .model import SparseAutoencoder, SparseAutoencoderLoss, SparseLatents
from .store import load, load_extra, save

__all__ = [
    "SparseAutoencoder",
    "SparseAutoencoderConfig",
    "SparseAutoencoderLoss",
    "SparseLatents",
    "from_dictionary_learning",
    "from_openai",
    "from_sparsify",
    "load",
    "load_extra",
    "save",
    "to_sparsify",
]
