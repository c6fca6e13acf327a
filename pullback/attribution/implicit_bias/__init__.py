"""Implicit biases: what an operation's value has beyond its derivative times its operands, ``b = y - Σ J_i x_i``."""

from .dispatch import CLOSED_FORMS, differentiable, implicit_bias
from .parts import ImplicitBias
from .recorder import BiasRecorder, recorded

__all__ = ["CLOSED_FORMS", "BiasRecorder", "ImplicitBias", "differentiable", "implicit_bias", "recorded"]
