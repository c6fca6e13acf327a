"""FullGrad's maps: the paper's post-processing re-derived, sums that are preserved, tokens and grids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pullback as pb
from pullback.attribution import fullgrad_terms
from pullback.attribution.fullgrad import FullGrad
from pullback.attribution.fullgrad_grids import area_weights, on_grid, on_tokens
from tests.attribution.test_fullgrad_terms import Computes, conv, linear, weighted
from tests.golden_net import example, largest, tiny_cnn


def explain(net: nn.Module, x: Tensor, method: Any, target: Any = 1, **settings: Any) -> pb.Attribution:
    return pb.explain(net, x, method=method, target=target, **settings)


def values(found: pb.Attribution) -> Tensor:
    assert isinstance(found.values, Tensor)
    return found.values


def explained(found: pb.Attribution) -> Tensor:
    """The sum of the map and of what the diagnostics say it leaves out."""
    rest = found.diagnostics["fullgrad_outside"] + found.diagnostics["fullgrad_residual"]
    return values(found).flatten(1).sum(1) + rest  # type: ignore[no-any-return]


def rescaled(term: Tensor) -> Tensor:
    """|m| of one example, minus its least entry, over its largest plus 1e-6."""
    term = term.abs() - term.abs().min()
    return term / (term.max() + 1e-6)


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("psi", ["minmax", "abs", "identity"])
def test_post_processing_of_the_paper(psi: str, align: bool) -> None:
    """Slowly from the terms: ψ for each example over channels and space, resized, channels summed."""
    net, x = tiny_cnn(), example(2, 3, 8, 8)
    terms = fullgrad_terms(net, x, target=1)
    maps = [terms.input_term, *(term for _, term in terms.terms if term.dim() == 4)]
    assert len(maps) == 4
    wanted = []
    for row in range(2):
        total = torch.zeros(8, 8, dtype=torch.float64)
        for layer in maps:
            assert isinstance(layer, Tensor)
            shown = {"minmax": rescaled, "abs": torch.abs, "identity": torch.clone}[psi](layer[row])  # type: ignore[operator]
            total += F.interpolate(shown[None], (8, 8), mode="bilinear", align_corners=align)[0].sum(0)
        wanted.append(total)
    found = explain(net, x, FullGrad(psi=psi, align_corners=align))
    assert values(found).shape == (2, 1, 8, 8)
    assert largest(values(found)[:, 0], torch.stack(wanted)) < 1e-12
    assert found.diagnostics["evaluations"].tolist() == [1, 1]


def test_simple_fullgrad_takes_gradients_alone() -> None:
    """At modules with a bias: the first convolution and both batch norms; the second convolution has none."""
    net, x = tiny_cnn(), example(1, 3, 8, 8)
    z = x.clone().requires_grad_()
    outputs = [z]
    for layer in net:
        outputs.append(layer(outputs[-1]))
    gradients = torch.autograd.grad(outputs[-1][0, 1], [z, outputs[1], outputs[2], outputs[6]])
    wanted = torch.zeros(8, 8, dtype=torch.float64)
    for term in (gradients[0] * x, *gradients[1:]):
        wanted += F.interpolate(term.abs(), (8, 8), mode="bilinear", align_corners=True)[0].sum(0)
    found = explain(net, x, FullGrad(biases="simple"))
    assert largest(values(found)[0, 0], wanted) < 1e-13


@pytest.mark.parametrize(("before", "after"), [(3, 8), (8, 3), (4, 8), (5, 5), (1, 7)])
def test_area_weights_share_everything_out(before: int, after: int) -> None:
    weights = area_weights(before, after)
    assert weights.shape == (after, before)
    assert torch.allclose(weights.sum(0), torch.ones(before, dtype=torch.float64), atol=1e-15)
    # a constant density stays constant
    assert torch.allclose(
        weights.sum(1), torch.full((after,), before / after, dtype=torch.float64), atol=1e-14
    )
    if before == after:
        assert torch.equal(weights, torch.eye(before, dtype=torch.float64))


SUMS: dict[str, tuple[nn.Module, Tensor, dict[str, Any], tuple[int, ...]]] = {
    "cnn": (tiny_cnn(), example(2, 3, 8, 8), {}, (2, 1, 8, 8)),
    "odd sizes": (nn.Sequential(conv(), nn.GELU(), nn.MaxPool2d(2), conv(), nn.GroupNorm(3, 3).double()), example(2, 3, 7, 9), {}, (2, 1, 7, 9)),
    "series": (nn.Sequential(nn.Conv1d(5, 4, 3, 2).double(), nn.Softplus()), example(2, 5, 9), {}, (2, 1, 9)),
    "volume": (nn.Sequential(nn.Conv3d(1, 2, 2).double(), nn.ELU()), example(2, 1, 4, 5, 4), {}, (2, 1, 4, 5, 4)),
    "tokens": (nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).double().eval(), example(2, 5, 6), {"channel_dim": -1}, (2, 5, 1)),
    "recurrent": (Computes(lambda net, x: net.a(x)[0], a=nn.LSTM(6, 4, batch_first=True).double()), example(2, 5, 6), {"channel_dim": -1}, (2, 5, 1)),
    "flat": (nn.Sequential(linear(6, 4), nn.Tanh()), example(2, 6), {}, (2, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_signed_area_map_sums_to_the_score_but_for_what_has_no_place(name: str) -> None:
    net, x, options, shape = SUMS[name]
    found = explain(net, x, FullGrad(psi="identity", upsample="area", **options), weighted)
    assert values(found).shape == shape
    assert largest(explained(found), found.score) < 1e-12
    terms = fullgrad_terms(net, x, target=weighted)
    assert isinstance(terms.input_term, Tensor)
    if name == "tokens":
        # everything has its token here: also attention, whose heads come first
        assert float(found.diagnostics["fullgrad_outside"].abs().max()) < 1e-12
        first = terms.input_term.sum(-1)
        for _, term in terms.terms:
            dim = 2 if term.dim() == 4 and term.shape[1] != 5 else 1
            first = first + term.movedim(dim, 1).flatten(2).sum(-1)
        assert largest(values(found)[..., 0], first) < 1e-12
    elif name == "flat":
        assert largest(values(found), terms.input_term) < 1e-14
    elif name == "cnn":
        outside = terms.sums()["9:linear"]
        assert largest(found.diagnostics["fullgrad_outside"], outside) < 1e-12


def test_grids_and_tokens() -> None:
    grids = [(8, 8), (2, 3)]
    channels_last = example(2, 2, 3, 5)
    placed = on_grid(channels_last, grids)
    assert placed is not None
    assert torch.equal(placed, channels_last.permute(0, 3, 1, 2))
    patches = example(2, 7, 4)  # a class token before 2 x 3 patches
    placed = on_grid(patches, grids)
    assert placed is not None
    assert torch.equal(placed[:, :, 1, 2], patches[:, 6])
    assert torch.equal(placed[:, :, 0, 0], patches[:, 1])
    assert on_grid(example(2, 4, 5, 5), grids) is None
    heads = example(2, 4, 7, 3)
    tokens = on_tokens(heads, (7,))
    assert tokens is not None
    assert largest(tokens.sum(1), heads.sum((1, 3))) < 1e-15
    assert on_tokens(example(2, 4, 5), (7,)) is None


def test_vision_transformer_gets_a_map_of_patches() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        patches = net.a(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([torch.ones(len(x), 1, 6, dtype=x.dtype), patches], 1)
        return net.b(tokens)[:, 0]  # type: ignore[no-any-return]

    net = Computes(
        forward,
        a=nn.Conv2d(3, 6, 4, 4).double(),
        b=nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).double(),
    ).eval()
    found = explain(net, example(2, 3, 8, 12), FullGrad("identity", "area"), weighted)
    assert values(found).shape == (2, 1, 8, 12)
    assert largest(explained(found), found.score) < 1e-12
    convolution_only = FullGrad("abs")
    assert not torch.equal(
        values(explain(net, example(2, 3, 8, 12), convolution_only, weighted)), values(found)
    )


def test_padding_is_no_place() -> None:
    from tests.zoo.architectures import ARCHITECTURES

    model, inputs = ARCHITECTURES["bert_masked"]()
    found = pb.explain(model.double(), inputs, method=FullGrad("identity"))
    mask = inputs["attention_mask"].bool()
    assert not bool(mask.all())
    assert not values(found)[..., 0][~mask].any()
    assert values(found)[..., 0][mask].all()
    assert largest(explained(found), found.score) < 1e-12


def test_chunks_and_smoothing() -> None:
    net, x = tiny_cnn(), example(3, 3, 8, 8)
    assert largest(values(explain(net, x, FullGrad())), values(explain(net, x, FullGrad(), chunk=1))) < 1e-14
    one = values(explain(net, x, pb.SmoothGrad(FullGrad(), samples=1, noise=0.0)))
    assert torch.equal(one, values(explain(net, x, FullGrad())))
    smooth = values(explain(net, x, pb.SmoothGrad(FullGrad(), samples=3, noise=0.2)))
    assert smooth.shape == (3, 1, 8, 8)
    assert largest(smooth, one) > 1e-6


def test_under_rules_the_map_is_that_of_the_surrogate() -> None:
    from pullback.attribution.rules.presets import RELP

    net = nn.Sequential(conv(), nn.GELU(), conv())
    problem = pb.pose(net, example(2, 3, 6, 6), target=weighted).under(RELP)
    found = FullGrad("identity", "area")(problem)
    assert isinstance(found, Tensor)
    rest = problem.diagnostics["fullgrad_outside"] + problem.diagnostics["fullgrad_residual"]
    assert largest(found.flatten(1).sum(1) + rest, problem.score()) < 1e-12
    terms = dict(fullgrad_terms(net, example(2, 3, 6, 6), target=weighted, rules=RELP).terms)
    assert float(terms["1:gelu"].abs().max()) < 1e-13  # the identity rule leaves nothing behind
    with pytest.raises(pb.MethodError, match="simple"):
        FullGrad(biases="simple")(problem)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"psi": "square"}, r'psi is "abs", "minmax" or "identity", got \'square\''),
        ({"upsample": "nearest"}, r'upsample is "bilinear" or "area", got'),
        ({"biases": "all"}, r'biases is "full" or "simple", got'),
    ],
)
def test_options_are_checked(options: dict[str, str], message: str) -> None:
    with pytest.raises(pb.MethodError, match=message):
        FullGrad(**options)  # type: ignore[arg-type]


def test_points_it_cannot_map() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a * b).sum(1, keepdim=True)

    with pytest.raises(pb.MethodError, match=r'one map.*site="input:a"'):
        pb.explain(Two(), {"a": example(2, 3), "b": example(2, 3)}, method=FullGrad(), target=0)
    with pytest.raises(pb.MethodError, match="channel_dim is 1, or -1"):
        explain(tiny_cnn(), example(1, 3, 8, 8), FullGrad(channel_dim=2))
