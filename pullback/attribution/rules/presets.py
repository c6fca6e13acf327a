"""Presets: plain tuples of rules, asked in order. And rules of one's own for operations that none of them knows."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from ...core.errors import MethodError
from ...core.operations import LINEAR, NONLINEAR
from ...core.overrides import PASS, Operation, Rule
from ...core.spellings import canonical
from .activations import IdentityRule, OpaqueActivation, TanhGate
from .attention import ATTENTION
from .composites import EPSILON_PLUS
from .gates import ConstantModule, ConstantOperands, GatedLinearUnit, GateRule
from .norms import CosineRule, NormRule
from .pooling import WinnerTakesAll
from .products import HalfRule, PowerRule, SignalTakesAll
from .recurrent import RecurrentDecomposition
from .surrogate import scaled_gradient

__all__ = [
    "ATTNLRP",
    "CP_LRP",
    "LRP_COMPOSITE",
    "MAMBALRP",
    "PRESETS",
    "RELP",
    "RELP_WITHOUT_ATTENTION",
    "register_rule",
    "registered_rules",
    "require_consistent",
    "with_attention",
]

Rules = tuple[Rule, ...]

_COMMON: Rules = (
    OpaqueActivation(),
    TanhGate(),
    IdentityRule(),
    GateRule(),
    ConstantOperands(),
    GatedLinearUnit(),
    NormRule(),
    CosineRule(),
    RecurrentDecomposition(),
    HalfRule(),
    PowerRule(),
    WinnerTakesAll(),
)
RELP: Rules = (ATTENTION["detach"], *_COMMON)
RELP_WITHOUT_ATTENTION: Rules = (ATTENTION["gradient"], *_COMMON)
ATTNLRP: Rules = (ATTENTION["attnlrp"], *_COMMON)
CP_LRP: Rules = (ATTENTION["detach"], SignalTakesAll(), *_COMMON)
MAMBALRP: Rules = (ConstantModule("*x_proj"), *RELP)
LRP_COMPOSITE: Rules = (*EPSILON_PLUS, *RELP)

PRESETS: Mapping[str, Rules] = MappingProxyType(
    {
        "relp": RELP,
        "relp_without_attention": RELP_WITHOUT_ATTENTION,
        "lrp": LRP_COMPOSITE,
        "cp_lrp": CP_LRP,
        "attnlrp": ATTNLRP,
        "mambalrp": MAMBALRP,
    }
)
"""The rules of each preset by its name."""

_KNOWN = LINEAR | NONLINEAR | {"opaque_module"}
_registered: dict[str, Rule] = {}


def with_attention(rules: Sequence[Rule], attention: str | None) -> Rules:
    """The rules with another way through attention: "detach", "gradient" or "attnlrp"; None leaves them as they are.

    >>> with_attention(RELP, "attnlrp") == ATTNLRP
    True
    """
    if attention is None:
        return tuple(rules)
    if attention not in ATTENTION:
        raise MethodError(f"attention is one of {', '.join(map(repr, ATTENTION))}, got {attention!r}.")
    others = (rule for rule in rules if getattr(rule, "family", None) != "attention")
    return (ATTENTION[attention], *others)


def require_consistent(rules: Sequence[Rule]) -> None:
    """Raise MethodError for a rule about an operation that does not exist, or for two that claim the same one."""
    claimed: dict[tuple[str, str, str | None], Rule] = {}
    for rule in rules:
        for name in rule.operations:
            _require_known(name, repr(rule))
            family = getattr(rule, "family", None)
            if family is None:
                continue
            other = claimed.setdefault((family, name, rule.within), rule)
            if other is not rule:
                place = "everywhere" if rule.within is None else f"within {rule.within!r}"
                raise MethodError(
                    f"{other!r} and {rule!r} both claim {name} {place}, so the second would never act. Leave one out, "
                    'or give one of them within="pattern" and put it first.'
                )


def _require_known(name: str, owner: str) -> None:
    if name in _KNOWN or "." in name or any(hasattr(home, name) for home in (torch, torch.nn.functional)):
        return
    near = difflib.get_close_matches(name, _KNOWN, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise MethodError(
        f"{owner} is about an operation {name!r}, which does not exist.{hint} "
        "Operations have torch's names; your own are 'namespace.name'."
    )


@dataclass(frozen=True)
class _Registered:
    operation: str
    treatment: str
    handle: Callable[[Operation], Any] = field(repr=False)
    within: str | None = None

    @property
    def operations(self) -> frozenset[str]:
        return frozenset({self.operation})

    def __call__(self, operation: Operation) -> Any:
        return self.handle(operation)


def _as_constant(operation: Operation) -> Any:
    with torch.no_grad():
        return operation.value()


def _as_product(operation: Operation) -> Any:
    live = sum(isinstance(value, torch.Tensor) and value.requires_grad for value in operation.args)
    return scaled_gradient(operation.value(), 1 / live) if live > 1 else PASS


TREATMENTS: Mapping[str, Callable[[Operation], Any]] = MappingProxyType(
    {
        "gradient": Operation.value,
        "constant": _as_constant,
        "product": _as_product,
    }
)


def register_rule(
    operation: str | Callable[..., Any],
    treatment: str | Callable[[Operation], Any],
    *,
    replace: bool = False,
) -> Rule:
    """Teach every relevance preset an operation of your own, for example a custom kernel.

    Args:
        operation: the torch function, ``torch.ops`` entry or its name.
        treatment: "gradient" (it is linear, or homogeneous of degree one), "constant" (a gate), "product" (of the
            tensors that carry signal), "identity" (an elementwise activation with g(0) = 0), or a callable that gets
            the ``Operation`` and returns its native value with another derivative.
        replace: put it in the place of a rule registered before.

    Returns:
        the rule, which can also be put into a tuple of rules by hand.

    Raises:
        MethodError: the operation or the treatment does not exist, or the operation has a registered rule already.

    Example:
        >>> rule = register_rule("mykernels.scan", "product")
        >>> rule
        _Registered(operation='mykernels.scan', treatment='product', within=None)
    """
    if callable(operation):
        spelling = canonical(operation)
        if spelling is None:
            raise MethodError(f"{operation!r} is no operation: give a torch function or its name.")
        name = spelling.name
    else:
        name = operation
        _require_known(name, "register_rule")
    if name in _registered and not replace:
        raise MethodError(
            f"{name} has a rule already: {_registered[name]!r}. Pass replace=True to put yours in its place."
        )
    known: dict[str, Callable[[Operation], Any]] = {**TREATMENTS, "identity": IdentityRule()}
    if isinstance(treatment, str) and treatment not in known:
        raise MethodError(
            f"treatment is one of {', '.join(map(repr, known))} or a callable, got {treatment!r}."
        )
    handle = known[treatment] if isinstance(treatment, str) else treatment
    text = treatment if isinstance(treatment, str) else getattr(treatment, "__name__", repr(treatment))
    rule = _registered[name] = _Registered(name, text, handle)
    return rule


def registered_rules() -> Rules:
    """The rules that users registered, which come before a preset's own."""
    return tuple(_registered.values())
