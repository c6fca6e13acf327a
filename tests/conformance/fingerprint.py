"""Everything that an explanation could leave changed: of a model, of inputs and of the process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["assert_untouched", "of_model", "of_process"]


def of_tensor(tensor: Tensor) -> tuple[Any, ...]:
    """Identity, storage, version, flags, layout and content (bytes, so that NaN compares)."""
    version = None if tensor.is_inference() else tensor._version
    plain = tensor.detach()
    stored = plain.contiguous().cpu().clone().flatten().view(torch.uint8).numpy().tobytes()
    grad = None if tensor.is_leaf is False else tensor.grad
    return (
        id(tensor), tensor.data_ptr(), version, tensor.requires_grad, tensor.stride(), tensor.dtype, tensor.is_inference(),
        id(grad) if grad is not None else None, None if grad is None else grad.clone().numpy().tobytes(), stored,
    )  # fmt: skip


def of_value(value: Any, depth: int = 3) -> Any:
    """A comparable record of a plain value: identities of objects, contents of containers and tensors."""
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        return value
    if depth and isinstance(value, dict):
        return id(value), [(repr(key), of_value(item, depth - 1)) for key, item in value.items()]
    if depth and isinstance(value, (list, tuple)):
        return id(value), [of_value(item, depth - 1) for item in value]
    if depth and isinstance(value, set):
        return id(value), sorted(map(repr, value))
    return id(value)


def of_model(model: nn.Module) -> dict[str, Any]:
    """Every entry of every module's ``__dict__``: parameters, buffers, hooks, modes, children, own attributes."""
    return {
        f"{path}.{name}": of_value(value)
        for path, module in model.named_modules(remove_duplicate=False)
        for name, value in vars(module).items()
    }


def of_process() -> dict[str, Any]:
    """Random states, autograd and autocast modes, backend flags, default dtype."""
    state = np.random.get_state()  # noqa: NPY002 - the global state is what is compared
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (state[0], state[1].tobytes(), state[2:]),
        "python": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "cudnn": (
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
        ),
        "tf32": (
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
        ),
        "mkldnn": torch.backends.mkldnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "global hooks": (
            len(nn.modules.module._global_forward_hooks),
            len(nn.modules.module._global_forward_pre_hooks),
            len(nn.modules.module._global_backward_hooks),
        ),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
    }


def tensors_of(inputs: Any) -> list[Tensor]:
    """The tensors of a nest of inputs."""
    if isinstance(inputs, Tensor):
        return [inputs]
    if hasattr(inputs, "values"):
        return [tensor for part in inputs.values() for tensor in tensors_of(part)]
    if isinstance(inputs, (list, tuple)):
        return [tensor for part in inputs for tensor in tensors_of(part)]
    return []


@contextmanager
def assert_untouched(model: nn.Module, inputs: Any = ()) -> Iterator[None]:
    """Fails, naming the entry, if the body changed the model, the inputs or the process; errors pass through."""
    before = of_model(model), [of_tensor(each) for each in tensors_of(inputs)], of_process()
    try:
        yield
    finally:
        after = of_model(model), [of_tensor(each) for each in tensors_of(inputs)], of_process()
        changed = [
            name for name in before[0].keys() | after[0].keys() if before[0].get(name) != after[0].get(name)
        ]
        changed += [
            f"input {number}" for number, (a, b) in enumerate(zip(before[1], after[1], strict=True)) if a != b
        ]
        changed += [name for name in before[2] if before[2][name] != after[2][name]]
        assert not changed, f"changed: {changed}"
