"""Reading and replacing the value at a site during a forward pass: the only forward hooks in the package.

They are registered on the shadow, which belongs to one call, never on the user's model. Values are cloned on reading
and on substitution, so that in-place operations downstream neither change what was read nor meet a leaf.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .errors import SiteError
from .sites import Site, first_tensor_at

__all__ = ["Edit", "capture", "edit"]

Edit: TypeAlias = "Callable[[Tensor, int], Tensor | None]"
"""Called with the value and the number of the call; returns what to put in its place, or None to leave it."""


@contextmanager
def edit(model: nn.Module, edits: Sequence[tuple[Site, Edit]]) -> Iterator[None]:
    """Run forwards of ``model`` with values at module sites replaced.

    Calls are counted from 0 since the context was entered. Raises SiteError when a site holds no tensor.
    """
    with ExitStack() as stack:
        for site, change in edits:
            module = site.module(model)
            if isinstance(module, torch.jit.ScriptModule):
                raise SiteError(
                    f'"{site}" is a ScriptModule, which takes no hooks. Choose the module around it, or explain the '
                    "model before torch.jit.script."
                )
            counter = _Counter(site, change)
            if site.side == "input":
                handle = module.register_forward_pre_hook(counter.before, with_kwargs=True)
            else:
                handle = module.register_forward_hook(counter.after, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def capture(model: nn.Module, wanted: Sequence[Site]) -> Iterator[dict[Site, list[Tensor]]]:
    """Collect the values at module sites, one per call of the module, cloned and detached."""
    found: dict[Site, list[Tensor]] = {site: [] for site in wanted}

    def reader(site: Site) -> Edit:
        def read(value: Tensor, call: int) -> None:
            found[site].append(value.detach().clone())

        return read

    with edit(model, [(site, reader(site)) for site in wanted]):
        yield found


class _Counter:
    """Counts the calls of one module and applies a change to the tensor the site means."""

    def __init__(self, site: Site, change: Edit) -> None:
        self.site = site
        self.change = change
        self.calls = 0

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nest: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        changed = self._apply(nest)
        if changed is nest:
            return None
        return tuple(changed[index] for index in range(len(args))), {name: changed[name] for name in kwargs}

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        changed = self._apply(output)
        return None if changed is output else changed

    def _apply(self, structure: Any) -> Any:
        call, self.calls = self.calls, self.calls + 1
        if self.site.call is not None and call != self.site.call:
            return structure
        try:
            keys = first_tensor_at(structure, self.site.leaf)
        except KeyError as missing:
            raise SiteError(
                f'site "{self.site}" holds no tensor {"" if self.site.leaf is None else missing}: it is a '
                f"{type(structure).__name__}. Name another module, or one entry, as in "
                f'"{self.site.path}:output.0".'
            ) from None
        value = structure
        for key in keys:
            value = value[key]
        replacement = self.change(value, call)
        return structure if replacement is None else _replaced(structure, keys, replacement)


def _replaced(structure: Any, keys: tuple[Any, ...], value: Tensor) -> Any:
    """The structure with one entry exchanged; the original is left as it is."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    part = _replaced(structure[key], rest, value)
    if isinstance(structure, tuple):
        entries = [*structure[:key], part, *structure[key + 1 :]]
        return type(structure)(*entries) if hasattr(structure, "_fields") else type(structure)(entries)
    changed = copy.copy(structure)
    changed[key] = part
    return changed
