"""A first pass that keeps its graph, for methods that need one evaluation at the clean point and no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .edits import edit
from .inputs import ModelInputs, nested_tensors
from .points import Point, map_leaves
from .posed import free_positions, gradients_enabled, held
from .sites import Site

__all__ = ["LivePass"]

LARGEST_BATCH = 4
"""More rows are first measured, so that what their graph holds keeps to the memory there is."""


@dataclass(eq=False)
class LivePass:
    """What ``pose`` is asked to keep of its first pass, so that the clean point need not be evaluated again.

    ``around(module, batch)`` is open during the forward. Afterwards ``variables`` are the leaves at the site and
    ``output`` is the model's, with its graph; ``ready`` says whether it serves. It does not for more than a few rows,
    where the forward draws random numbers, or at modules and embeddings of padded or merged sequences.
    """

    around: Callable[[nn.Module, int], AbstractContextManager[Any]]
    variables: Point | None = None
    output: Any = None
    _versions: list[tuple[Tensor, int]] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether the pass ran as asked, and nothing wrote into its output since."""
        written = any(each._version != version for each, version in self._versions)
        return self.variables is not None and self.output is not None and not written

    def drop(self) -> None:
        """Let go of the graph."""
        self.variables, self.output, self._versions = None, None, []

    def suits(self, site: Site, read: ModelInputs) -> bool:
        """Whether a first pass at this site can be this one."""
        mask = read.attention_mask
        padded = mask is not None and not bool(mask.bool().all())
        merged = any(
            each.is_floating_point() and not name.endswith("mask") for name, each in read.leaf.items()
        )
        if site.kind == "input":
            return read.batch <= LARGEST_BATCH
        return read.batch <= LARGEST_BATCH and not padded and not (site.kind == "embeddings" and merged)

    @contextmanager
    def running(self, module: nn.Module, site: Site, read: ModelInputs) -> Iterator[dict[str, Tensor]]:
        """Open for the forward, which takes the leaves given; at a module an edit puts in the variable.

        Embeddings, whose module the forward only tells, are exchanged by whoever finds them: with ``substitute``.
        """
        self.drop()
        replaced: dict[str, Tensor] = {}
        with gradients_enabled(), self.around(module, read.batch):
            if site.kind == "input":
                names = (site.leaf,) if site.leaf else read.explained
                leaf = {str(name): self._leaf(read.leaf[str(name)]) for name in names}
                self.variables = leaf if len(leaf) > 1 else next(iter(leaf.values()))
                everyone = torch.arange(read.batch)
                clean = map_leaves(torch.Tensor.detach, self.variables)
                moved = held(self.variables, clean, free_positions(read, site, clean), everyone)
                replaced = moved if isinstance(moved, dict) else {next(iter(leaf)): moved}
                yield {name: each.clone() for name, each in replaced.items()}
            elif site.kind == "module":
                with edit(module, [(site, self.substitute)]):
                    yield replaced
            else:
                yield replaced

    def finish(self, output: Any) -> None:
        """Keep the output and notice later writes into it."""
        self.output = output
        self._versions = [(each, each._version) for each in nested_tensors(output) if not each.is_inference()]

    def substitute(self, current: Tensor, call: int) -> Tensor | None:
        """The variable in the place of the first value, as an edit."""
        if self.variables is not None or not (current.is_floating_point() or current.is_complex()):
            return None
        self.variables = self._leaf(current)
        return self.variables.clone()

    def _leaf(self, value: Tensor) -> Tensor:
        return value.detach().clone().requires_grad_()
