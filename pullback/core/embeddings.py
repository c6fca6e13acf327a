"""Where token ids become vectors: the site called "embeddings", found by watching one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .edits import Edit
from .errors import InputError
from .inputs import ModelInputs
from .sites import Site

__all__ = ["find_embeddings"]


@contextmanager
def find_embeddings(
    model: nn.Module, inputs: ModelInputs, substitute: Edit | None = None
) -> Iterator[_Watch]:
    """Watch one forward pass of a (shadow) model for the embeddings of the given token ids.

    The site is the output of the embedding module that is called with those ids; where other inputs (pixels, sound)
    are merged into the sequence, it is the ``inputs_embeds`` handed to the language model after the merge. An edit
    given as ``substitute`` is applied to the embeddings of the ids.
    """
    watch = _Watch(type(model).__name__, inputs, substitute)
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if isinstance(module, nn.Embedding) or "embedding" in type(module).__name__.lower():
                handle: Any = module.register_forward_hook(watch.embedded(path))
                stack.callback(handle.remove)
            if path:
                handle = module.register_forward_pre_hook(watch.handed(path), with_kwargs=True)
                stack.callback(handle.remove)
        yield watch


class _Watch:
    """What one forward pass showed: embedding calls with our ids, and merged embeddings handed on."""

    def __init__(self, model_name: str, inputs: ModelInputs, substitute: Edit | None) -> None:
        self.model_name = model_name
        self.substitute = substitute
        self.tokens = inputs.tokens
        self.given = "inputs_embeds" in inputs.leaf
        # also pixels with a row per patch instead of per example, which are no explained leaf
        self.merges = any(
            value.is_floating_point() and not name.endswith("mask") for name, value in inputs.leaf.items()
        )
        self.calls: dict[str, int] = {}
        self.found: tuple[Site, Tensor] | None = None
        self.handed_on: list[tuple[Site, Tensor]] = []

    def embedded(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            call = self.calls[path] = self.calls.get(path, -1) + 1
            # a quantised embedding returns its scale as well
            value = output[0] if isinstance(output, tuple) and output else output
            if self.found is None and isinstance(value, Tensor) and args and self._ours(args[0], value):
                self.found = Site("module", path, call), value.detach().clone()
                if self.substitute is not None and value is output:
                    return self.substitute(value, call)
            return None

        return hook

    def handed(self, path: str) -> Any:
        calls = [0]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call, calls[0] = calls[0], calls[0] + 1
            value = kwargs.get("inputs_embeds")
            if self.merges and isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3:
                self.handed_on.append(
                    (Site("module", path, call, "input", "inputs_embeds"), value.detach().clone())
                )

        return hook

    def _ours(self, ids: Any, output: Tensor) -> bool:
        if (
            not isinstance(ids, Tensor)
            or ids.is_floating_point()
            or output.dim() != ids.dim() + 1
            or self.tokens is None
        ):
            return False
        if not output.is_floating_point() or ids.shape[-1] != self.tokens.shape[-1]:
            return False
        # rows may be a chunk of the batch, so it is enough that they are among ours
        ours = self.tokens.to(ids.device)
        return ids.shape == ours.shape and torch.equal(ids, ours) if len(ids) == len(ours) else True

    def resolve(self) -> tuple[Site, Tensor]:
        """The site and its clean value. Raises InputError where no embedding was seen."""
        if self.found is None:
            raise InputError(
                f"the inputs are integers and no embedding module of {self.model_name} was called with them. "
                "Explain a module site instead (pullback.sites(model) lists them), pass floating inputs, or embeddings "
                "as inputs_embeds."
            )
        if not self.given:
            for site, value in self.handed_on:
                if _merged(value, self.found[1]):
                    return site, value
        return self.found


def _merged(value: Tensor, embedded: Tensor) -> bool:
    """Whether a value is the embedded tokens with other vectors put in at some positions."""
    if value.shape != embedded.shape:
        return False
    kept = (value == embedded.to(value)).all(-1)
    return bool(kept.any()) and not bool(kept.all())
