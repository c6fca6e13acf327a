"""The rule tables: for each kind of operation, how relevance goes back through it. Presets are plain tuples."""

from .activations import IdentityRule, OpaqueActivation, ShiftedIdentityRule, TanhGate
from .attention import ATTENTION, AttnLRPAttention, ConstantAttention, GradientAttention
from .gates import ConstantModule, ConstantOperands, GatedLinearUnit, GateRule
from .norms import CosineRule, NormRule
from .pooling import WinnerTakesAll
from .presets import PRESETS, register_rule
from .products import HalfRule, PowerRule, SignalTakesAll
from .recurrent import RecurrentDecomposition

__all__ = [
    "ATTENTION",
    "PRESETS",
    "AttnLRPAttention",
    "ConstantAttention",
    "ConstantModule",
    "ConstantOperands",
    "CosineRule",
    "GateRule",
    "GatedLinearUnit",
    "GradientAttention",
    "HalfRule",
    "IdentityRule",
    "NormRule",
    "OpaqueActivation",
    "PowerRule",
    "RecurrentDecomposition",
    "ShiftedIdentityRule",
    "SignalTakesAll",
    "TanhGate",
    "WinnerTakesAll",
    "register_rule",
]
