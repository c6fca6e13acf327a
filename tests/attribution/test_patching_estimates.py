"""The first-order estimates: exact where the model is linear, derivatives by finite differences, RelP by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.attribution.patching import patching_scores
from tests.attribution.patching_models import gpt2, logit_difference, prompts, two_layers


def vectors(count: int = 3, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randn(2, count, size, generator=generator, dtype=torch.float64)
    return clean, corrupted


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("method", ["atp", "relp", "ig"])
def test_a_linear_model_is_estimated_exactly(method: Any, direction: Any) -> None:
    model = two_layers(nn.Identity)
    generator = torch.Generator().manual_seed(2)
    clean, corrupted = torch.randn(2, 2, 5, 4, generator=generator, dtype=torch.float64)
    weights = torch.randn(5, 3, generator=generator, dtype=torch.float64)

    def metric(output: Tensor) -> Tensor:
        return (output * weights).sum((1, 2))

    sites = ["input", "0", "1:input", "2"]
    exact = patching_scores(model, clean, corrupted, metric, sites, direction=direction)
    found = patching_scores(model, clean, corrupted, metric, sites, method, direction)
    for site in sites:
        torch.testing.assert_close(found[site], exact[site], atol=1e-12, rtol=0)
        assert exact[site].abs().max() > 0.1
        # by hand: the metric of the difference at one position alone
        by_hand = torch.stack([(model(clean) - model(corrupted))[:, t] @ weights[t] for t in range(5)], 1)
        signed = by_hand.detach() * (1 if direction == "denoise" else -1)
        torch.testing.assert_close(found[site], signed, atol=1e-12, rtol=0)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_attribution_patching_is_the_directional_derivative(direction: Any) -> None:
    """At t = 0, of the metric with a + t (other - a) at one position; central differences by the user's own hooks."""
    model, (clean, corrupted) = gpt2(), prompts()
    base, other = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    sites = ["transformer.h.0", "transformer.h.1.attn", "transformer.h.0.mlp"]
    found = patching_scores(model, clean, corrupted, logit_difference, sites, "atp", direction)
    for site in sites:
        module = model.get_submodule(site)
        seen: list[Tensor] = []

        def first(output: Any) -> Tensor:
            return output[0] if isinstance(output, tuple) else output

        def keep(module: nn.Module, args: Any, output: Any, seen: list[Tensor] = seen) -> None:
            seen.append(first(output).detach())

        handle = module.register_forward_hook(keep)
        model(other)
        handle.remove()

        def at(amount: float, position: int, module: nn.Module = module, seen: list[Tensor] = seen) -> Tensor:
            def move(module: nn.Module, args: Any, output: Any) -> Any:
                value = first(output).clone()
                value[:, position] += amount * (seen[0] - value)[:, position]
                return (value, *output[1:]) if isinstance(output, tuple) else value

            handle = module.register_forward_hook(move)
            with torch.no_grad():
                score = logit_difference(model(base))
            handle.remove()
            return score

        step = 1e-5
        slopes = torch.stack([(at(step, t) - at(-step, t)) / (2 * step) for t in range(5)], 1)
        # the second-order error of central differences, about step² times a third derivative
        torch.testing.assert_close(found[site], slopes, atol=1e-6, rtol=1e-6)
        assert slopes.abs().max() > 1e-2


@pytest.mark.parametrize("method", ["atp", "relp", "ig"])
def test_heads_sum_to_the_site(method: Any) -> None:
    site = "transformer.h.1.attn.c_proj:input"
    whole = patching_scores(gpt2(), *prompts(), logit_difference, [site], method)[site]
    heads = patching_scores(gpt2(), *prompts(), logit_difference, [site], method, per_head=3)[site]
    assert heads.shape == (2, 5, 3)
    torch.testing.assert_close(heads.sum(-1), whole, atol=1e-12, rtol=0)
    assert not torch.allclose(heads[..., 0], heads[..., 1])


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_relp_by_hand(direction: Any) -> None:
    """M = Σ w gelu(h): the coefficient of h is w gelu(h)/h in the run that is patched."""
    model, (clean, corrupted) = two_layers(), vectors()
    base, other = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    found = patching_scores(
        model, clean, corrupted, lambda output: output[:, 1], ["0", "1", "input"], "relp", direction
    )
    with torch.no_grad():
        h, there, weight = model[0](base), model[0](other), model[2].weight[1]
        ratio = nn.functional.gelu(h) / h
        torch.testing.assert_close(
            found["0"][:, 0], ((there - h) * weight * ratio).sum(1), atol=1e-12, rtol=0
        )
        after = nn.functional.gelu(there) - nn.functional.gelu(h)
        torch.testing.assert_close(found["1"][:, 0], (after * weight).sum(1), atol=1e-12, rtol=0)
        at_input = ((other - base) * ((weight * ratio) @ model[0].weight)).sum(1)
        torch.testing.assert_close(found["input"][:, 0], at_input, atol=1e-12, rtol=0)


def test_relp_is_the_coefficient_of_explain_times_the_difference() -> None:
    model, (clean, corrupted) = gpt2(), prompts()
    site, target = "transformer.h.0", pb.Contrast([3, 4], [5, 6])
    found = patching_scores(model, clean, corrupted, target, [site], "relp")[site]
    a = pb.explain(model, corrupted, target=target, method=pb.RelP(), site=site)
    there = pb.pose(model, clean, target=target, site=site).point
    assert isinstance(a.values, Tensor)
    assert isinstance(a.point, Tensor)
    assert isinstance(there, Tensor)
    coefficient = a.values / a.point
    torch.testing.assert_close(found, ((there - a.point) * coefficient).sum(-1), atol=1e-9, rtol=0)


class Gated(nn.Module):
    """Two branches of the input, multiplied: each alone is a factor, and both carry signal."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = two_layers()[0], two_layers(nn.ReLU)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) * self.right(x)


def test_a_product_is_halved_whatever_sites_are_asked_for() -> None:
    model, pair = Gated().double(), vectors()

    def metric(output: Tensor) -> Tensor:
        return output.sum(1)

    alone = patching_scores(model, *pair, metric, ["left"], "relp")["left"]
    together = patching_scores(model, *pair, metric, ["input", "left", "right"], "relp")["left"]
    plain = patching_scores(model, *pair, metric, ["left"], "atp")["left"]
    assert torch.equal(alone, together)
    torch.testing.assert_close(alone, plain / 2, atol=1e-12, rtol=0)


def test_queries_and_keys_get_nothing_where_attention_is_constant() -> None:
    """GPT-2's c_attn puts out queries, keys and values of three heads each."""
    site, pair = "transformer.h.1.attn.c_attn", prompts()
    constant = patching_scores(gpt2(), *pair, logit_difference, [site], "relp", per_head=9)[site]
    assert not constant[..., :6].any()
    assert constant[..., 6:].abs().max() > 1e-2
    through = patching_scores(
        gpt2(), *pair, logit_difference, [site], "relp", per_head=9, attention="gradient"
    )[site]
    assert through[..., :6].abs().max() > 1e-3


def test_the_metric_is_not_ruled() -> None:
    """A log-softmax and a product in the metric keep their derivative: on a linear model relp is then atp."""
    model, pair = two_layers(nn.Identity), vectors()
    for metric in (
        pb.LogProb(1),
        lambda output: nn.functional.gelu(output[:, 0]) * output.softmax(1)[:, 2],
    ):
        relp = patching_scores(model, *pair, metric, ["0", "input"], "relp")
        atp = patching_scores(model, *pair, metric, ["0", "input"], "atp")
        for site in relp:
            torch.testing.assert_close(relp[site], atp[site], atol=1e-12, rtol=0)
            assert atp[site].abs().max() > 1e-3


def test_an_operation_without_a_rule_raises_or_keeps_its_gradient() -> None:
    model, pair = two_layers(), vectors()
    with pytest.raises(pb.CoverageError, match=r"gelu in module '1'.*uncovered=\"gradient\""):
        patching_scores(model, *pair, 0, ["0"], "relp", rules=())
    plain = patching_scores(model, *pair, 0, ["0"], "relp", rules=(), uncovered="gradient")["0"]
    atp = patching_scores(model, *pair, 0, ["0"], "atp")["0"]
    torch.testing.assert_close(plain, atp, atol=1e-14, rtol=0)


def test_integrated_gradients_at_the_input_sum_to_the_difference() -> None:
    """Completeness. The midpoint rule is exact for a quadratic, whose gradient is linear along the line."""

    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square() @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]], dtype=x.dtype)

    clean, corrupted = vectors()
    difference = (Square()(clean) - Square()(corrupted))[:, 0]
    for direction, sign in (("denoise", 1), ("noise", -1)):
        one = patching_scores(Square(), clean, corrupted, 0, ["input"], "ig", direction, steps=1)["input"]  # type: ignore[arg-type]
        torch.testing.assert_close(one[:, 0], sign * difference, atol=1e-12, rtol=0)
    model = two_layers().requires_grad_(False)
    gaps = []
    for steps in (10, 20, 40):
        found = patching_scores(model, clean, corrupted, 0, ["input"], "ig", steps=steps)["input"]
        gaps.append(float((found[:, 0] - (model(clean) - model(corrupted))[:, 0]).abs().max()))
    # the midpoint rule converges with the square of the step
    assert gaps[1] < gaps[0] / 3
    assert gaps[2] < gaps[1] / 3


def test_the_line_of_integrated_gradients_runs_between_embeddings() -> None:
    """Re-derived with autograd of a model that takes inputs_embeds, two steps."""
    model, (clean, corrupted) = gpt2(), prompts()
    sites = ["transformer.h.0.mlp", "embeddings"]
    found = patching_scores(model, clean, corrupted, logit_difference, sites, "ig", steps=2, chunk=3)
    table = model.get_submodule("transformer.wte").weight.detach()
    module = model.get_submodule("transformer.h.0.mlp")
    total = dict.fromkeys(sites, 0.0)
    values = {}
    for name, embedded in (("clean", table[clean]), ("corrupted", table[corrupted])):
        seen: list[Tensor] = []
        handle = module.register_forward_hook(lambda m, a, output, seen=seen: seen.append(output.detach()))
        model(inputs_embeds=embedded)
        handle.remove()
        values[name] = {"transformer.h.0.mlp": seen[0], "embeddings": embedded}
    for fraction in (0.25, 0.75):
        start, end = (values[name]["embeddings"] for name in ("corrupted", "clean"))
        line = (start + fraction * (end - start)).requires_grad_()
        seen = []
        handle = module.register_forward_hook(lambda m, a, output, seen=seen: seen.append(output))
        score = logit_difference(model(inputs_embeds=line)).sum()
        handle.remove()
        at_mlp, at_embeddings = torch.autograd.grad(score, [seen[0], line])
        total["transformer.h.0.mlp"] = total["transformer.h.0.mlp"] + at_mlp / 2
        total["embeddings"] = total["embeddings"] + at_embeddings / 2
    for site in sites:
        expected = ((values["clean"][site] - values["corrupted"][site]) * total[site]).sum(-1)
        torch.testing.assert_close(found[site], expected, atol=1e-11, rtol=0)


def test_an_in_place_operation_after_a_site_does_not_spoil_its_gradient() -> None:
    model, pair = two_layers(nn.ReLU), vectors()
    in_place = two_layers(nn.ReLU)
    in_place[1].inplace = True
    for method in ("exact", "atp", "relp", "ig"):
        plain = patching_scores(model, *pair, 0, ["0", "1"], method)  # type: ignore[arg-type]
        found = patching_scores(in_place, *pair, 0, ["0", "1"], method)  # type: ignore[arg-type]
        for site in plain:
            torch.testing.assert_close(found[site], plain[site], atol=1e-14, rtol=0)


def test_a_site_that_the_metric_never_reads_scores_zero() -> None:
    model = gpt2()

    def first_token(output: Any) -> Tensor:
        return output.logits[:, 0, 0]

    found = patching_scores(model, *prompts(), first_token, ["transformer.h.0"], "atp")["transformer.h.0"]
    assert not found.any()


def test_a_random_forward_draws_the_same_in_every_run() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double().train()
    # before the dropout: full recovery only if the patched run drops what the clean run dropped
    found = patching_scores(model, *vectors(), 0, ["0", "1", "2"], normalised=True, allow_train=True)
    for value in found.values():
        torch.testing.assert_close(value, torch.ones(3, 1, dtype=torch.float64), atol=1e-12, rtol=0)
