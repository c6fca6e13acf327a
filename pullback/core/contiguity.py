"""Keep a wrong derivative of torch's away: batch norm of one example, whose gradient comes in another layout."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .audit import graph_nodes
from .operations import node_operation

__all__ = ["contiguous_gradients", "contiguous_gradients_behind"]


def contiguous_gradients(module: nn.Module) -> None:
    """Give batch norms of a private tree their gradient in the layout of their result.

    On the CPU, the derivative of an eval-mode batch norm misreads a gradient whose channels are innermost (from a
    permutation to tokens, or a channels-last convolution) when there is one contiguous example: off by the size of
    the gradient itself in torch 2.13. With two examples it is right. Copies such a gradient, nothing else.
    """
    for child in module.modules():
        if isinstance(child, _BatchNorm):
            child.register_forward_hook(_watched)


def _watched(module: nn.Module, args: Any, output: Any) -> None:
    if (
        isinstance(output, Tensor)
        and output.requires_grad
        and len(output) == 1
        and output.device.type == "cpu"
        and output.is_contiguous()
    ):
        output.register_hook(Tensor.contiguous)


def contiguous_gradients_behind(score: Tensor) -> None:
    """The same for every batch norm of one example that a score was computed by, called as a module or not.

    Walks the autograd graph, so it is for models whose first pass was seen to run a batch norm.
    """
    if not score.requires_grad or score.device.type != "cpu":
        return
    for node in graph_nodes([score.grad_fn], []):
        if "batch_norm" in node_operation(node.name()) and tuple(node._input_metadata[0].shape[:1]) == (1,):
            node.register_prehook(_made_contiguous)


def _made_contiguous(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if each is None else each.contiguous() for each in gradients)
