"""Keep a wrong derivative of torch's away: batch norm of one example, whose gradient comes in another layout."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["contiguous_gradients"]


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
