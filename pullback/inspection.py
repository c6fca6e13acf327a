"""What a model is made of, read from its modules: activations, wrappers, names registered twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from pullback.core.spellings import canonical

__all__ = [
    "KINKS", "SMOOTH", "OperationNames", "attention", "class_name", "distinct", "operation",
    "registered_twice", "wrappers",
]  # fmt: skip

# fmt: off
KINKS = frozenset((
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "threshold", "hardtanh", "hardsigmoid", "hardswish",
    "softshrink", "hardshrink", "selu", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d",
))
"""Activations and poolings whose derivative jumps."""
SMOOTH = frozenset((
    "gelu", "silu", "mish", "sigmoid", "tanh", "softplus", "logsigmoid", "elu", "celu", "glu", "softmax",
    "scaled_dot_product_attention", "layer_norm", "rms_norm", "group_norm", "instance_norm", "lstm", "gru",
    "rnn_tanh",
))
"""Nonlinear operations with a continuous derivative."""
# fmt: on


class OperationNames(TorchFunctionMode):
    """Collects the names of the operations that run while it is entered, functional ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (spelling := canonical(func)) is not None:
            self.names.add(spelling.name)
        return func(*args, **(kwargs or {}))


def operation(module: nn.Module) -> str | None:
    """The operation a module's class is named after: GELU, NewGELUActivation, LayerNorm, ..."""
    squeezed = {name.replace("_", ""): name for name in KINKS | SMOOTH}
    plain = type(module).__name__.lower().replace("activation", "").removeprefix("new").removeprefix("fast")
    if "norm" in plain:
        plain = next((kind for kind in ("layernorm", "rmsnorm", "groupnorm") if kind in plain), plain)
    return squeezed.get(plain)


def class_name(model: Any) -> str:
    """The class of a module, the name of a function."""
    kind = model if isinstance(model, type) or not isinstance(model, nn.Module) else type(model)
    return getattr(kind, "__qualname__", type(model).__name__)


def wrappers(model: Any, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """What wraps a model or parts of it: compilation, data parallelism, sharding, PEFT, accelerate."""
    for module in modules.values():
        lineage = {base.__name__ for base in type(module).__mro__}
        if "OptimizedModule" in lineage:
            yield "torch.compile"
        if getattr(module, "_compiled_call_impl", None) is not None:
            yield "torch.compile in place"
        yield from sorted(lineage & {"DataParallel", "DistributedDataParallel"})
        if lineage & {"FullyShardedDataParallel", "FSDPModule"}:
            yield "FSDP"
        if type(module).__module__.startswith("peft."):
            yield "PEFT"
        if hasattr(module, "_hf_hook"):
            yield "accelerate hooks"
    if hasattr(model, "_torchdynamo_orig_callable"):
        yield "torch.compile"


def registered_twice(model: Any, listing: str) -> tuple[str, ...]:
    """Names under which one module or parameter is registered, joined, where there are several."""
    names: dict[int, list[str]] = {}
    if isinstance(model, nn.Module):
        for name, each in getattr(model, listing)(remove_duplicate=False):
            names.setdefault(id(each), []).append(name)
    return tuple(" = ".join(same) for same in names.values() if len(same) > 1)


def attention(model: Any, modules: Mapping[str, nn.Module], names: set[str]) -> str | None:
    """How attention is computed: the config's implementation, or what was seen."""
    if found := getattr(getattr(model, "config", None), "_attn_implementation", None):
        return str(found)
    if "scaled_dot_product_attention" in names:
        return "scaled_dot_product_attention"
    has_heads = any(isinstance(each, nn.MultiheadAttention) for each in modules.values())
    return "MultiheadAttention" if has_heads else None


def distinct(names: Iterable[str]) -> tuple[str, ...]:
    """The names once each, in order."""
    return tuple(dict.fromkeys(names))
