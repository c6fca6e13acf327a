"""Activations written out in several elementwise operations: one term for the whole chain instead of one for each.

A chain is a scalar function f of each entry. With δ the gradient at its result and γ = δ f'(x) the one that it sends to
its operand, its term ``δ (f(x) - f'(x) x)`` is ``δ y - γ x``: two products, whatever f is, and nothing in the forward.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...core.audit import MARK, Mark, graph_nodes
from ...core.operations import node_operation
from ...core.running import looks_like_activation
from ..rules.surrogate import carries_signal, names, unhooked
from .operations import ELEMENTWISE, HOMOGENEOUS
from .recorder import BiasRecorder, Contribution
from .sums import per_example

__all__ = ["ChainRecorder"]

ENTRYWISE: Final = (
    ELEMENTWISE
    | HOMOGENEOUS & names("relu leaky_relu abs hardshrink")
    | names("add sub mul div neg square sqrt rsqrt reciprocal where masked_fill to_copy clone alias")
)
"""What an entry of the result depends on only through the same entry of the operands, if all have one shape."""


class ChainRecorder:
    """While open, activation modules of a private tree that are chains get one term each.

    An activation module has no parameters and children, maps one tensor to one of its shape, and is called so. Whether
    it is a chain is read off its autograd graph: two or more operations, all of them entrywise.
    """

    def __init__(self, recorder: BiasRecorder, module: nn.Module) -> None:
        self._recorder, self._module = recorder, module
        self._handles: list[Any] = []
        self._open: list[tuple[nn.Module, Tensor, Tensor, int]] = []

    def __enter__(self) -> None:
        for path, child in self._module.named_modules():
            if looks_like_activation(child) and not isinstance(child, torch.jit.ScriptModule):
                self._handles += [
                    child.register_forward_pre_hook(self._enter),
                    child.register_forward_hook(
                        lambda *call, path=path: self._leave(path, *call), always_call=True
                    ),
                ]

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        recorder = self._recorder
        if recorder.keep is None or recorder.in_chain or not torch.is_grad_enabled() or len(args) != 1:
            return None
        (x,) = args
        if not carries_signal(x) or not x.is_floating_point() or not _is_chain(module, x):
            return None
        probe = x.view_as(x)
        self._open.append((module, x, probe, x._version))
        recorder.in_chain = True
        return (probe,)

    def _leave(self, path: str, module: nn.Module, args: Any, output: Any) -> Any:
        if not self._open or self._open[-1][0] is not module:
            return None
        _, x, probe, version = self._open.pop()
        recorder = self._recorder
        recorder.in_chain = False
        nodes = [] if x._version != version else _nodes(output, probe)
        mark = Mark(type(module).__name__, path, True)
        if nodes and _are_entrywise(nodes, x.shape):
            for node in nodes:
                node.metadata[MARK] = mark
            contribution = Contribution("", mark.operation, path)
            recorder.contributions.append(contribution)
            _Chain(recorder, contribution, module, x, output).watch(probe)
            return None
        if output is not None and x._version == version:
            return module.forward(x)  # not what its sample was: every operation for itself
        return None


class _Chain:
    """The balance of one chain, taken in the backward pass."""

    def __init__(
        self, recorder: BiasRecorder, contribution: Contribution, module: nn.Module, x: Tensor, y: Tensor
    ) -> None:
        self.recorder, self.contribution, self.module = recorder, contribution, module
        self.x, self.y = x.detach(), y.detach()
        self.versions = x._version, y._version
        self.product: Tensor | None = None
        y.register_hook(self._arrived)

    def watch(self, probe: Tensor) -> None:
        probe.register_hook(self._sent)

    def _arrived(self, delta: Tensor) -> None:
        with torch.no_grad():
            if self.x._version != self.versions[0]:
                self.recorder.unknown.append(f"{self.contribution.module_path}:{self.contribution.operation}")
                return
            y = self.y
            if y._version != self.versions[1]:
                y = self.module.forward(self.x)
            self.product = delta.detach() * y

    def _sent(self, gamma: Tensor) -> None:
        if self.product is None:
            return
        with torch.no_grad():
            product = self.product.addcmul_(gamma.detach(), self.x, value=-1)
            self.product = None
            self.contribution.sum = per_example(product, self.recorder.rows)
            assert self.recorder.keep is not None
            self.contribution.kept = self.recorder.keep(None, product)


def _is_chain(module: nn.Module, x: Tensor) -> bool:
    """Whether two entries go through the module by several entrywise operations, leaving everything as it was."""
    with torch._C.DisableTorchFunction(), torch.enable_grad(), unhooked(), _WithoutDraws():  # type: ignore[no-untyped-call]
        entries = x.new_ones(2).requires_grad_()
        sample = entries.view_as(entries)
        try:
            nodes = _nodes(module.forward(sample), sample)
        except Exception:  # whatever it needs, two entries are not enough
            nodes = []
    return len(nodes) > 1 and sample._version == 0 and _are_entrywise(nodes, sample.shape)


class _WithoutDraws(TorchDispatchMode):
    """Refuses to draw random numbers: a sample must not move a generator that other threads use, not even back."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(f"{func} draws random numbers")
        return func(*args, **(kwargs or {}))


def _nodes(output: Any, given: Tensor) -> list[Any]:
    """The autograd nodes between an activation's result and its operand; none where the result is no such tensor."""
    if not (isinstance(output, Tensor) and output.shape == given.shape and output.grad_fn is not None):
        return []
    return [*graph_nodes([output.grad_fn], [given.grad_fn])]


def _are_entrywise(nodes: list[Any], shape: torch.Size) -> bool:
    return all(
        node_operation(node.name()) in ENTRYWISE and tuple(node._input_metadata[0].shape) == tuple(shape)
        for node in nodes
    )
