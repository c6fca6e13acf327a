"""Sparse autoencoders on a model's activations: training, TopK and gradient selection, and files of four programs."""

from .buffer import ShuffleBuffer
from .circuits import CircuitCurve, LatentEffects, Node, circuit_curve, latent_effects
from .config import SparseAutoencoderConfig
from .converters import from_dictionary_learning, from_openai, from_sparsify, to_sparsify
from .evaluation import (
    Evaluation,
    ParetoPoint,
    SelectionEvaluation,
    evaluate_sae,
    pareto_curve,
    pareto_table,
)
from .latent_site import Latents
from .latent_statistics import Context, LatentStatistics, latent_statistics
from .latent_steering import SteeringEffects, clamped, latent_vector, steering_effects
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
    "Context",
    "Evaluation",
    "LatentEffects",
    "LatentStatistics",
    "Latents",
    "Node",
    "ParetoPoint",
    "SelectionEvaluation",
    "ShuffleBuffer",
    "SiteActivations",
    "SparseAutoencoder",
    "SparseAutoencoderConfig",
    "SparseAutoencoderLoss",
    "SparseLatents",
    "SteeringEffects",
    "Trainer",
    "TrainingConfig",
    "TrainingResult",
    "circuit_curve",
    "clamped",
    "evaluate_sae",
    "from_dictionary_learning",
    "from_openai",
    "from_sparsify",
    "latent_effects",
    "latent_statistics",
    "latent_vector",
    "load",
    "load_extra",
    "pareto_curve",
    "pareto_table",
    "save",
    "steering_effects",
    "to_sparsify",
    "train_sae",
]
