"""Relevance under RelP's rules on the whole zoo, against an oracle that reads it off the plain autograd graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pullback as pb
from pullback.attribution.rules.presets import RELP
from tests.zoo.architectures import ARCHITECTURES, Inputs, WithoutFloat32, in_float64, target_of
from tests.zoo.oracle import OracleError, coefficients

pytest.importorskip("transformers")

# steps that the graph does not show
HIDDEN = {"bloom": "GeLUFunctionBackward hides"}
# a softplus as hidden activation is a gate to these rules, and nothing is left
HELD = {"convolution_3d": "softplus"}
# writes through views (CopySlices) do not show what they wrote; these models only assign
ASSIGNING = ("rwkv", "recurrent_gemma", "qwen3_next")
# the model's own embeddings of images and text together, which a module receives by name
MERGED = dict.fromkeys(("llava", "paligemma", "qwen2_vl"), "model.language_model")


def with_leaf(model: nn.Module, inputs: Inputs, merged: str | None) -> tuple[Any, Tensor]:
    """The output of an ordinary forward and the leaf it was computed from: embeddings of the ids, or the first float."""
    name = next((each for each in ("input_ids", "decoder_input_ids") if each in inputs), next(iter(inputs)))
    given = inputs[name]
    if given.is_floating_point():
        leaf = given.clone().requires_grad_()
        return model(**{**inputs, name: leaf.clone()}), leaf
    leaves: list[Tensor] = []

    def replace(values: Tensor) -> Tensor:
        leaves.append(values.detach().requires_grad_())
        return leaves[0].clone()

    def embedded(module: nn.Module, args: Any, output: Any) -> Any:
        if leaves or not args or args[0].shape != given.shape or not torch.equal(args[0], given):
            return None
        return (replace(output[0]), *output[1:]) if isinstance(output, tuple) else replace(output)

    def received(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "inputs_embeds": replace(kwargs["inputs_embeds"])}

    if merged is not None:
        handles = [model.get_submodule(merged).register_forward_pre_hook(received, with_kwargs=True)]
    else:
        tables = [module for module in model.modules() if "Embedding" in type(module).__name__]
        handles = [module.register_forward_hook(embedded) for module in tables if hasattr(module, "weight")]
    try:
        return model(**inputs), leaves[0]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_relevance_is_what_the_oracle_reads_off_the_graph(name: str) -> None:
    model, inputs = in_float64(ARCHITECTURES[name]())
    model.requires_grad_(False)
    with WithoutFloat32():
        problem = pb.pose(model, inputs, target=target_of(name))
        output, leaf = with_leaf(model, inputs, MERGED.get(name))
        score = problem.posed.targets[0].score(output, torch.arange(2)).sum()
        if name in HELD:
            with pytest.raises(pb.MethodError, match="hold everything between constant"):
                problem.under(RELP).grad()
            with pytest.raises(OracleError, match="held constant"):
                coefficients(score, [leaf])
            return
        found = problem.under(RELP).grad()
    assert isinstance(found, Tensor)
    if name in HIDDEN:
        with pytest.raises(OracleError, match=HIDDEN[name]):
            coefficients(score, [leaf])
        return
    (wanted,) = coefficients(score, [leaf], writes_copy=name in ASSIGNING)
    mask = inputs.get("attention_mask")
    if mask is not None and wanted.shape[:2] == mask.shape:
        wanted = wanted * mask[:, :, None]
    assert wanted.abs().max() > 0
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# an expression, and the coefficient worked out by hand
CLOSED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "activation": (F.gelu, lambda x: F.gelu(x) / x),
    "inverse": (torch.tanh, lambda x: torch.tanh(x) / x),
    "gate": (lambda x: x * x.sigmoid(), lambda x: x.sigmoid()),
    "tanh gate": (lambda x: x * (1 - x.tanh()), lambda x: 1 - x.tanh()),
    "tanh signal": (lambda x: x - x.tanh(), lambda x: 1 - x.tanh() / x),
    "half": (lambda x: x * (2 * x), lambda x: 2 * x),
    "power": (lambda x: x**3, lambda x: x**2),
    "quotient": (lambda x: x / (1 + x.exp()), lambda x: 1 / (1 + x.exp())),
    "root mean square": (
        lambda x: x * (x.pow(2).mean() + 1).rsqrt(),
        lambda x: (x.pow(2).mean() + 1).rsqrt() * torch.ones_like(x),
    ),
    "layer norm": (
        lambda x: (F.layer_norm(x, (5,)) * torch.arange(5.0).double()).sum(-1),
        lambda x: (torch.arange(5.0).double() - 2) * (x.var(unbiased=False) + 1e-5).rsqrt(),
    ),
    "bound": (lambda x: x.clamp(min=0.5), lambda x: (x > 0.5).double()),
}


@pytest.mark.parametrize("name", CLOSED)
def test_the_oracle_itself_against_closed_forms(name: str) -> None:
    expression, wanted = CLOSED[name]
    x = random(5).requires_grad_()
    (found,) = coefficients(expression(x).sum(), [x])
    assert torch.allclose(found, wanted(x.detach()), rtol=1e-13, atol=0)


def test_queries_and_keys_get_nothing_and_values_the_weights() -> None:
    query, key, value = (random(1, 4, 3).requires_grad_() for _ in range(3))
    found = coefficients(F.scaled_dot_product_attention(query, key, value).sum(), [query, key, value])
    weights = (query @ key.mT / 3**0.5).softmax(-1).detach()
    assert not found[0].any()
    assert not found[1].any()
    assert torch.allclose(found[2], weights.sum(1)[..., None].expand(1, 4, 3), rtol=1e-13)


def test_a_hidden_write_is_refused() -> None:
    x = random(4).requires_grad_()
    y = 1 * x
    y[:2].mul_(x[2:].sigmoid())
    with pytest.raises(OracleError, match="CopySlices hides"):
        coefficients(y.sum(), [x])
