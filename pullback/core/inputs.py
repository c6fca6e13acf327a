"""Inputs of any nest: which leaves are explained, which are repeated with the batch, which pass along."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import InputError

__all__ = ["ModelInputs", "Shared", "nested_tensors", "read_inputs"]


@dataclass(frozen=True)
class Shared:
    """Marks an input that belongs to all examples, though its first dimension happens to equal the batch size.

    >>> Shared(torch.arange(3)).value
    tensor([0, 1, 2])
    """

    value: Any


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """A call of the model, split into the leaves that carry examples and those that do not.

    ``nest`` is the call with every tensor leaf still in place; ``leaf`` maps names to tensors. ``examples`` holds the
    names of leaves whose first dimension is the batch.
    """

    call: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]
    leaf: dict[str, Tensor]
    examples: frozenset[str]
    explained: tuple[str, ...]
    token_leaf: str | None
    batch: int

    @property
    def attention_mask(self) -> Tensor | None:
        mask = self.leaf.get("attention_mask")
        if mask is None or mask.dim() != 2 or len(mask) != self.batch:
            return None
        # an additive mask is 0 at real tokens and very negative at padding
        return mask == 0 if mask.is_floating_point() and bool((mask <= 0).all()) else mask

    @property
    def tokens(self) -> Tensor | None:
        return None if self.token_leaf is None else self.leaf[self.token_leaf]

    def rows(
        self, rows: Tensor | None, replaced: Mapping[str, Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call for the given examples, some leaves replaced by values that already have one row each."""

        def value(name: str) -> Tensor:
            if name in replaced:
                return replaced[name]
            leaf = self.leaf[name]
            # always a copy: a forward may work in place, and these are the user's tensors
            if rows is None or name not in self.examples:
                return leaf.clone()
            if self.batch == 1:
                return leaf.expand(len(rows), *leaf.shape[1:]).contiguous() if len(rows) > 1 else leaf.clone()
            return leaf.index_select(0, rows.to(leaf.device))

        return self.call(value)

    def with_leaves(self, leaf: Mapping[str, Tensor]) -> ModelInputs:
        """The same call with other values for some leaves, for example a longer token sequence."""
        return dataclasses.replace(self, leaf={**self.leaf, **leaf})


def read_inputs(inputs: Any, model: Callable[..., Any]) -> ModelInputs:
    """Take any nest of tensors apart.

    A tensor is the only positional argument; a tuple is all of them; a mapping (also a BatchEncoding) the keyword
    arguments; anything else is passed as it is. Floating and complex leaves with a batch dimension are explained,
    except masks; integer leaves, masks and the rest pass along.

    Raises:
        InputError: there is no tensor, the batch is empty or ambiguous, or a value is not finite.
    """
    positional, keywords = _arguments(inputs)
    found: dict[str, tuple[Tensor, bool]] = {}
    names = _positional_names(model, len(positional))
    args = tuple(_collect(value, name, found) for name, value in zip(names, positional, strict=True))
    kwargs = {name: _collect(value, name, found) for name, value in keywords.items()}
    if not found:
        raise InputError(f"no tensor in the inputs (a {type(inputs).__name__}). {_as_tensors(inputs)}")

    leaf = {name: tensor for name, (tensor, _) in found.items()}
    per_example = {
        name: tensor for name, (tensor, shared) in found.items() if not shared and tensor.dim() > 0
    }
    floating = [
        name
        for name, tensor in per_example.items()
        if (tensor.is_floating_point() or tensor.is_complex())
        and not name.rsplit(".", 1)[-1].endswith("mask")
    ]
    tokens = next((name for name, tensor in per_example.items() if _looks_like_tokens(name, tensor)), None)
    reference = tokens if tokens is not None else (floating[0] if floating else next(iter(per_example), None))
    if reference is None:
        raise InputError(
            "no input has a batch dimension: every tensor is a scalar. Give inputs of shape (B, ...)."
        )
    batch = len(leaf[reference])
    if batch == 0:
        raise InputError(
            f'empty batch: input "{reference}" has shape {tuple(leaf[reference].shape)}. Give at least one example.'
        )
    explained = tuple(name for name in floating if len(leaf[name]) == batch)
    _require_finite({name: leaf[name] for name in explained})
    # positions along a sequence belong to all examples, though there may be as many of them
    along = [name for name, each in per_example.items() if each.dim() == 1 and _last(name) in _POSITIONS]
    examples = frozenset(
        name for name, tensor in per_example.items() if len(tensor) == batch and name not in along
    )

    def call(value: Callable[[str], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(_rebuild(part, value) for part in args), {
            k: _rebuild(part, value) for k, part in kwargs.items()
        }

    return ModelInputs(call, leaf, examples, explained, tokens, batch)


@dataclass(frozen=True)
class _Slot:
    """Where a tensor leaf was, by name."""

    name: str


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), {str(name): value for name, value in inputs.items()}
    if isinstance(inputs, tuple) and not hasattr(inputs, "_fields"):
        return inputs, {}
    return (inputs,), {}


def _collect(value: Any, name: str, found: dict[str, tuple[Tensor, bool]]) -> Any:
    """Replace every tensor in a nest by a slot and remember it under its dotted name."""
    shared = isinstance(value, Shared)
    if shared:
        value = value.value
    if type(value).__module__ == "numpy" and hasattr(value, "__array__"):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        found[name] = (_plain(value), shared)
        return _Slot(name)
    if hasattr(value, "get_seq_length"):
        raise InputError(
            f'"{name}" is a key-value cache; attribution needs the whole sequence. Pass all tokens, no cache.'
        )
    return _rebuilt(value, lambda key, part: _collect(part, f"{name}.{key}", found))


def _rebuild(value: Any, leaf: Callable[[str], Tensor]) -> Any:
    if isinstance(value, _Slot):
        return leaf(value.name)
    return _rebuilt(value, lambda _, part: _rebuild(part, leaf))


def _rebuilt(value: Any, change: Callable[[str, Any], Any]) -> Any:
    """One level of a nest, rebuilt with each part changed."""
    if isinstance(value, Mapping):
        return {name: change(str(name), part) for name, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(change(name, part) for name, part in zip(value._fields, value, strict=True)))
    if isinstance(value, (list, tuple)):
        return type(value)(change(str(index), part) for index, part in enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, _Slot)):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: change(name, part) for name, part in fields.items()})
    return value


def _plain(tensor: Tensor) -> Tensor:
    """Detached from the user's graph; a copy only where autograd could not use the tensor otherwise."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _positional_names(model: Callable[..., Any], count: int) -> list[str]:
    try:
        parameters = inspect.signature(getattr(model, "forward", model)).parameters.values()
    except (TypeError, ValueError):
        parameters = ()  # type: ignore[assignment]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in parameters if parameter.kind in kinds][:count]
    return names + [str(index) for index in range(len(names), count)]


_POSITIONS = ("cache_position", "position_ids")


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _looks_like_tokens(name: str, tensor: Tensor) -> bool:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        return False
    last = name.rsplit(".", 1)[-1]
    return not last.endswith("mask") and last not in {
        "token_type_ids",
        "position_ids",
        "labels",
        "cache_position",
    }


def _require_finite(explained: Mapping[str, Tensor]) -> None:
    for name, tensor in explained.items():
        finite = torch.isfinite(tensor).unsqueeze(1).flatten(1).all(1)
        if not finite.all():
            bad = int((~finite).nonzero()[0])
            count = int((~torch.isfinite(tensor[bad])).sum())
            raise InputError(
                f'input "{name}" is not finite: example {bad} has {count} NaN or infinite values. '
                "Clean it first, for example with torch.nan_to_num."
            )


def _as_tensors(inputs: Any) -> str:
    if isinstance(inputs, Mapping):
        return 'If it comes from a tokenizer, call it with return_tensors="pt".'
    if isinstance(inputs, str):
        return "Text has to be tokenized first: model inputs are tensors."
    return "Give a tensor, a tuple of positional arguments or a dict of keyword arguments."


def nested_tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor of a nest, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from nested_tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from nested_tensors(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from nested_tensors(getattr(value, field.name))
