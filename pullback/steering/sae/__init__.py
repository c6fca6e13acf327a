"""Sparse autoencoders on a model's activations: training, TopK and gradient selection, and files of four programs."""

from .buffer import ShuffleBuffer
from .config import SparseAutoencoderConfig
from .converters import from_dictionary_learning, from_openai, from_sparsify, to_sparsify
from .evaluation import SelectionMeasures, SparseAutoencoderEvaluation, evaluate_sae, steering_effect
from .latent_domain import Latents
from .latents import SparseAutoencoderLoss, SparseLatents
from .model import SparseAutoencoder
from .steering import LatentStatistics, clamp, latent_statistics, latent_vector
from .store import load, load_extra, save
from .stream import ActivationGradientStream, SiteActivations
from .trainer import Trainer
from .training import TrainingResult, train_sae
from .training_config import TrainingConfig

__all__ = [
    "ActivationGradientStream",
    "LatentStatistics",
    "Latents",
    "SelectionMeasures",
    "ShuffleBuffer",
    "SiteActivations",
    "SparseAutoencoder",
    "SparseAutoencoderConfig",
    "SparseAutoencoderEvaluation",
    "SparseAutoencoderLoss",
    "SparseLatents",
    "Trainer",
    "TrainingConfig",
    "TrainingResult",
    "clamp",
    "evaluate_sae",
    "from_dictionary_learning",
    "from_openai",
    "from_sparsify",
    "latent_statistics",
    "latent_vector",
    "load",
    "load_extra",
    "save",
    "steering_effect",
    "to_sparsify",
    "train_sae",
]
