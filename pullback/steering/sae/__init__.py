"""Sparse autoencoders on a model's activations: training, TopK and gradient selection, and files of four programs."""

from .buffer import ShuffleBuffer
from .circuits import CircuitCurve, LatentEffects, Node, circuit_curve, latent_effects
from .config import SparseAutoencoderConfig
from .converters import from_dictionary_learning, from_openai, from_sparsify, to_sparsify
from .latent_site import Latents
from .latents import SparseAutoencoderLoss, SparseLatents
from .model import SparseAutoencoder
from .store import load, load_extra, save
from .stream import ActivationGradientStream, SiteActivations
from .trainer import Trainer
from .training import TrainingResult, train_sae
from .training_config import TrainingConfig

__all__ = [
    "ActivationGradientStream",
    "CircuitCurve",
    "LatentEffects",
    "Latents",
    "Node",
    "ShuffleBuffer",
    "SiteActivations",
    "SparseAutoencoder",
    "SparseAutoencoderConfig",
    "SparseAutoencoderLoss",
    "SparseLatents",
    "Trainer",
    "TrainingConfig",
    "TrainingResult",
    "circuit_curve",
    "from_dictionary_learning",
    "from_openai",
    "from_sparsify",
    "latent_effects",
    "load",
    "load_extra",
    "save",
    "to_sparsify",
    "train_sae",
]
