"""Whether a score is a smooth function of the site's value, read off its autograd graph.

Quadrature on a path converges faster where the gradient has no jumps, and its error is predicted otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .operations import GATES, LINEAR, PRODUCTS, node_operation
from .points import map_leaves
from .posed import gradients_enabled
from .problem import Problem

__all__ = ["has_smooth_score", "is_smooth"]

# Analytic where their value is finite. Left out on purpose: sqrt, log and norms, singular at a baseline of zeros; elu,
# selu and celu, whose second derivative jumps; everything that selects, rounds or clamps.
SMOOTH = """
    gelu silu mish softplus sigmoid tanh logsigmoid log_sigmoid_forward glu softmax log_softmax logsumexp
    scaled_dot_product_attention batch_norm native_batch_norm_legit_no_training instance_norm layer_norm rms_norm
    group_norm exp exp2 expm1 sin cos sinh cosh atan asinh erf erfc square pow rsqrt reciprocal var var_mean einsum
    lstm gru nll_loss cross_entropy_loss mse_loss prod sinc
"""
# linear in what they pass on, but what they pass on may depend on the values: where(x > 0, x, 0)
MASKS = frozenset(
    ["where", "masked_fill", "masked_scatter", "masked_select", "index_put", "index_put_impl", "index_fill"]
)
ANALYTIC = (LINEAR | frozenset(SMOOTH.split()) | frozenset(PRODUCTS) | frozenset(GATES)) - MASKS


def is_smooth(output: Tensor) -> bool:
    """Whether every step between ``output`` and its leaves is an analytic operation that autograd names.

    Steps that cannot be looked into (custom functions, TorchScript, in-place writes to parts) count as not smooth.
    So do masks, except right before a softmax, where they are attention masks. A product with a mask is a product with
    a constant to autograd: ``x * (x > 0)`` counts as smooth.

    >>> x = torch.ones(2, requires_grad=True)
    >>> is_smooth(x.tanh().sum()), is_smooth(x.relu().sum())
    (True, False)
    """
    seen: set[Any] = set()
    pending: list[tuple[Any, str]] = [(output.grad_fn, "")]
    while pending:
        node, after = pending.pop()
        # a node without inputs is a leaf
        if node is None or not node.next_functions or node in seen:
            continue
        seen.add(node)
        operation = node_operation(node.name())
        masks_attention = after == "softmax" and operation in MASKS
        if isinstance(node, BackwardCFunction) or not (operation in ANALYTIC or masks_attention):
            return False
        pending += [(following, operation) for following, _ in node.next_functions]
    return True


def has_smooth_score(problem: Problem) -> bool:
    """Whether the score is a smooth function of the point, from the graph of the first row.

    False under rules, whose derivative is not the graph's, and where draws depend on the whole batch. Cost: one
    forward of one row; apart from those whose numbers are used, since other kernels may run where a graph is kept.

    >>> import pullback as pb
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.SiLU())
    >>> has_smooth_score(pb.pose(net, torch.ones(4, 2), target=0))
    True
    """
    if problem.rules or problem.posed.whole:
        return False
    first = problem.rows(torch.arange(1))
    with problem.posed.lock, gradients_enabled():
        variables = map_leaves(lambda leaf: leaf.detach().clone().requires_grad_(), first.point)
        row = replace(first, point=variables).at_site()
        # without the mask that holds padding still: whether there is one depends on the batch
        posed = replace(row.posed, free=None)
        return is_smooth(posed.scores(row.point, row.examples, row.asked))
