"""Assertions for users' own test suites: an explanation adds up, and explaining left the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from pullback.attribution.integrated_gradients import IntegratedGradients
from pullback.attribution.spelling import parse_baseline, parse_method, with_settings
from pullback.core.errors import InputError
from pullback.core.points import map_leaves, total
from pullback.core.pose import pose

__all__ = ["assert_complete", "assert_model_untouched"]


def assert_complete(
    model: Callable[..., Any],
    inputs: Any,
    *,
    method: Any = "auto",
    tolerance: float = 0.05,
    target: Any = None,
    site: str | None = None,
    baseline: Any = None,
) -> None:
    """Fail unless each example's values add up to the change of score they claim to explain.

    ``|Σ a - (f(x) - f(x'))| <= tolerance · Σ |a|`` for every example. What the values should add up to is said
    by the completeness gap that the method records; where it records none, it is the score itself, as for input
    times gradient on a net that is homogeneous of degree one.

    Args:
        model, inputs, target, site: as for ``explain``.
        method: a method object, its text, or "auto".
        tolerance: allowed gap as a share of Σ |a|, at least 0.
        baseline: a baseline object or its name; replaces the method's own.

    Raises:
        AssertionError: an example's gap is larger; the message names the worst one.
        InputError: ``tolerance`` is negative. Others as ``explain``.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
        >>> assert_complete(net, torch.ones(2, 4), tolerance=0.05)
    """
    if not tolerance >= 0:
        raise InputError(f"tolerance is a share of the sum of |values|, at least 0; got {tolerance!r}.")
    chosen = IntegratedGradients(tol=0.05) if method == "auto" else method
    chosen = parse_method(chosen) if isinstance(chosen, str) else chosen
    chosen = with_settings(
        chosen, baseline=parse_baseline(baseline) if isinstance(baseline, str) else baseline
    )
    problem = pose(model, inputs, target=target, site=site)
    values = chosen(problem)
    gap = problem.diagnostics.get("gap")
    gap = (total(values) - problem.score().to(total(values).device)) if gap is None else gap
    scale = total(map_leaves(torch.abs, values)).to(gap.device)
    # written so that NaN fails
    wrong = ~(gap.abs() <= tolerance * scale)
    if wrong.any():
        excess = torch.where(wrong, (gap.abs() / scale).nan_to_num(nan=torch.inf), -1.0)
        worst = int(excess.argmax())
        raise AssertionError(
            f"{int(wrong.sum())} of {len(gap)} examples are not complete: the values of example {worst} miss the "
            f"change of score by {float(gap[worst]):.4g}, their absolute values sum to {float(scale[worst]):.4g}, "
            f"and tolerance={tolerance} allows {tolerance * float(scale[worst]):.4g}. "
            f"Method: {chosen!r}. More steps or a smaller tol close the gap of a path method."
        )


@contextmanager
def assert_model_untouched(model: nn.Module) -> Iterator[None]:
    """Fail if the body changes the model, whether or not the body raises.

    Compared are all entries of every module: parameters, buffers and other tensors (object, storage, version,
    flags, gradient, content), hooks, train mode, children and own attributes (containers two levels deep).

    Raises:
        AssertionError: names what changed; an error of the body is kept as its context.

    Example:
        >>> import pullback as pb
        >>> net = nn.Linear(4, 3)
        >>> with assert_model_untouched(net):
        ...     values = pb.explain(net, torch.ones(2, 4)).values
    """
    before = _entries(model)
    try:
        yield
    finally:
        after = _entries(model)
        names = list(dict.fromkeys([*before, *after]))
        changed = [name for name in names if before.get(name, "absent") != after.get(name, "absent")]
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise AssertionError(f"the model was changed: {', '.join(changed[:5])}{more}.")


def _entries(model: nn.Module) -> dict[str, Any]:
    """A comparable record of every entry, named by its path: "0.weight", "layer4._forward_hooks"."""
    entries: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                entries |= {f"{prefix}{key}": _record(tensor) for key, tensor in value.items()}
            else:
                entries[f"{prefix}{name}"] = _record(value)
    return entries


def _record(value: Any, depth: int = 2) -> Any:
    """Content of tensors, plain values and containers to a depth; the identity of everything else."""
    if isinstance(value, Tensor):
        return _tensor_record(value)
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        return type(value).__name__, repr(value)
    if depth and isinstance(value, dict):
        return id(value), [(repr(key), _record(entry, depth - 1)) for key, entry in value.items()]
    if depth and isinstance(value, (list, tuple)):
        return id(value), [_record(entry, depth - 1) for entry in value]
    return id(value)


def _tensor_record(tensor: Tensor) -> tuple[Any, ...]:
    grad = tensor.grad if tensor.is_leaf else None
    return (
        id(tensor),
        tensor.requires_grad,
        None if tensor.is_inference() else tensor._version,
        _content(tensor),
        None if grad is None else (id(grad), _content(grad)),
    )


def _content(tensor: Tensor) -> Any:
    """Address, layout and a hash of the bytes, so that NaN equals itself."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return tuple(tensor.shape)
    data = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten().view(torch.uint8)
    digest = blake2b(data.numpy().tobytes(), digest_size=16).hexdigest()
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, digest
