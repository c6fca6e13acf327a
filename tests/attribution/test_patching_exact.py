"""Exact activation patching: the user's own hooks, one position at a time, give the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.attribution.patching import patching_scores
from tests.attribution.patching_models import brute_force, gpt2, logit_difference, prompts, two_layers
from tests.conformance.fingerprint import assert_untouched

SITES = ["transformer.h.0", "transformer.h.1.attn", "transformer.h.0.mlp", "transformer.h.1.mlp.c_fc"]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_own_hooks_give_the_same_scores(direction: Any, attention: str) -> None:
    model = gpt2(attn_implementation=attention)
    clean, corrupted = prompts()
    found = patching_scores(model, clean, corrupted, logit_difference, SITES, direction=direction)
    base, other = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    assert list(found) == SITES
    for site in SITES:
        expected = brute_force(model, base, other, logit_difference, site)
        # float64 sums in another order
        torch.testing.assert_close(found[site], expected, atol=1e-10, rtol=0)
        assert expected.abs().max() > 1e-2


def test_one_head_at_a_time() -> None:
    model = gpt2()
    clean, corrupted = prompts()
    site = "transformer.h.1.attn.c_attn"
    heads = patching_scores(model, clean, corrupted, logit_difference, [site], per_head=9)[site]
    assert heads.shape == (2, 5, 9)
    for head in (0, 4, 8):
        entry = (slice(4 * head, 4 * head + 4),)
        expected = brute_force(model, corrupted, clean, logit_difference, site, entry)
        torch.testing.assert_close(heads[..., head], expected, atol=1e-10, rtol=0)


def test_heads_where_a_mapping_asks_for_them() -> None:
    model = gpt2()
    found = patching_scores(
        model, *prompts(), logit_difference, SITES[:2], "atp", per_head={"transformer.h.0": 3}
    )
    assert [value.shape for value in found.values()] == [(2, 5, 3), (2, 5)]


def test_input_and_output_of_neighbours_are_one_place() -> None:
    sites = ["transformer.h.0", "transformer.h.1:input", "embeddings", "transformer.wte"]
    found = patching_scores(gpt2(), *prompts(), logit_difference, sites)
    torch.testing.assert_close(found[sites[0]], found[sites[1]], atol=1e-12, rtol=0)
    assert torch.equal(found["embeddings"], found["transformer.wte"])


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, "auto"])
@pytest.mark.parametrize("method", ["exact", "atp", "ig"])
def test_chunks_and_batch_mates_change_nothing(chunk: Any, method: Any) -> None:
    """The metric indexes per example, so it is right only if it always sees the whole batch in order."""
    model, (clean, corrupted) = gpt2(), prompts()
    whole = patching_scores(model, clean, corrupted, logit_difference, SITES, method, chunk=100)
    parts = patching_scores(model, clean, corrupted, logit_difference, SITES, method, chunk=chunk)
    for row in range(2):

        def metric(output: Any, row: int = row) -> Tensor:
            return output.logits[:, -1, 3 + row] - output.logits[:, -1, 5 + row]

        single = patching_scores(
            model, clean[row : row + 1], corrupted[row : row + 1], metric, SITES, method, chunk=chunk
        )
        for site in SITES:
            torch.testing.assert_close(single[site][0], whole[site][row], atol=1e-11, rtol=0)
    for site in SITES:
        torch.testing.assert_close(parts[site], whole[site], atol=1e-11, rtol=0)


def test_a_target_object_is_the_callable_it_stands_for() -> None:
    model = gpt2()
    for method in ("exact", "atp", "relp", "ig"):
        by_callable = patching_scores(model, *prompts(), logit_difference, SITES, method)  # type: ignore[arg-type]
        target = pb.Contrast([3, 4], [5, 6])
        by_target = patching_scores(model, *prompts(), target, SITES, method, chunk=3)  # type: ignore[arg-type]
        for site in SITES:
            torch.testing.assert_close(by_target[site], by_callable[site], atol=1e-11, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["exact", "atp", "relp", "ig"])
def test_padding_gets_zero_and_changes_nothing(side: str, method: Any) -> None:
    model, (clean, corrupted) = gpt2(), prompts()
    target = pb.Contrast([3, 4], [5, 6])
    plain = patching_scores(model, clean, corrupted, target, SITES, method)

    def padded(ids: Tensor) -> dict[str, Tensor]:
        amount = (2, 0) if side == "left" else (0, 2)
        mask = nn.functional.pad(torch.ones_like(ids), amount)
        # other tokens under the mask in the two runs: their values differ there, and must not count
        return {
            "input_ids": nn.functional.pad(ids, amount, value=int(ids[0, 1])),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }

    found = patching_scores(model, padded(clean), padded(corrupted), target, SITES, method)
    real = slice(2, None) if side == "left" else slice(0, 5)
    hidden = slice(0, 2) if side == "left" else slice(5, None)
    for site in SITES:
        torch.testing.assert_close(found[site][:, real], plain[site], atol=1e-10, rtol=0)
        assert torch.equal(found[site][:, hidden], torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("method", ["exact", "atp", "relp", "ig"])
def test_padding_that_the_metric_reads_still_gets_zero(method: Any) -> None:
    clean, corrupted = prompts()
    mask = torch.ones_like(clean)
    mask[:, 4] = 0
    corrupted[:, 4] = 9
    inputs = ({"input_ids": ids, "attention_mask": mask} for ids in (clean, corrupted))

    def every_position(output: Any) -> Tensor:
        return output.logits[:, :, 3].sum(1)

    found = patching_scores(gpt2(), *inputs, every_position, SITES[:1], method)[SITES[0]]
    assert not found[:, 4].any()
    assert found[:, 1:4].abs().max() > 1e-2


def test_a_shared_value_scores_exactly_zero_in_single_precision() -> None:
    found = patching_scores(gpt2(torch.float32), *prompts(), logit_difference, SITES)
    for value in found.values():
        assert value.dtype == torch.float32
        # causal: nothing differs before the first token that does
        assert not value[0, :1].any()
        assert not value[1, :2].any()
        assert value[0, -1] != 0


def test_normalised_full_recovery_is_one() -> None:
    """At the last position of the last block everything that the metric reads is exchanged."""
    model = gpt2()
    site = "transformer.h.1"
    found = patching_scores(model, *prompts(), logit_difference, [site], normalised=True)[site]
    torch.testing.assert_close(found[:, -1], torch.ones(2, dtype=torch.float64), atol=1e-12, rtol=0)
    assert not found[:, :-1].abs().gt(1e-12).any()
    back = patching_scores(model, *prompts(), logit_difference, [site], direction="noise", normalised=True)[
        site
    ]
    torch.testing.assert_close(back[:, -1], -torch.ones(2, dtype=torch.float64), atol=1e-12, rtol=0)
    clean, corrupted = prompts()
    difference = logit_difference(model(clean)) - logit_difference(model(corrupted))
    plain = patching_scores(model, clean, corrupted, logit_difference, [site])[site]
    torch.testing.assert_close(plain[:, -1], difference.detach(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("method", ["exact", "atp", "relp", "ig"])
def test_vectors_and_maps(method: Any) -> None:
    """(B, D) gives (B, 1); maps (B, C, H, W) give (B, H, W). All four methods are exact where M is linear."""
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randn(2, 3, 2, 4, 5, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(60, 2)).double()
    read = model(clean - corrupted)[:, 0] - model(torch.zeros_like(clean))[:, 0]
    found = patching_scores(
        model, clean, corrupted, lambda output: output[:, 0], ["input", "0", "1", "2"], method
    )
    assert [value.shape for value in found.values()] == [(3, 4, 5), (3, 4, 5), (3, 1), (3, 1)]
    for value in found.values():
        torch.testing.assert_close(value.flatten(1).sum(1), read.detach(), atol=1e-12, rtol=0)
    place = torch.zeros_like(clean)
    place[:, :, 2, 3] = (clean - corrupted)[:, :, 2, 3]
    alone = model(place)[:, 0] - model(torch.zeros_like(clean))[:, 0]
    torch.testing.assert_close(found["input"][:, 2, 3], alone.detach(), atol=1e-12, rtol=0)


def test_every_call_of_a_shared_block() -> None:
    block = two_layers()[0]
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = model, block

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.block(x)))

    generator = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randn(2, 2, 4, generator=generator, dtype=torch.float64)
    twice = Twice()
    found = patching_scores(twice, clean, corrupted, 1, ["block@0", "block@1"], normalised=True)
    for value in found.values():  # either call carries everything
        torch.testing.assert_close(value, torch.ones(2, 1, dtype=torch.float64), atol=1e-12, rtol=0)
    with pytest.raises(pb.SiteError, match=r'"block" runs several times.*"block@0", "block@1"'):
        patching_scores(twice, clean, corrupted, 1, ["block"])
    with pytest.raises(pb.SiteError, match=r'"block@2" never ran'):
        patching_scores(twice, clean, corrupted, 1, ["block@2"])


@pytest.mark.parametrize("method", ["exact", "atp", "relp", "ig"])
def test_nothing_is_touched(method: Any) -> None:
    model, pair = gpt2(), prompts()
    with assert_untouched(model, pair):
        patching_scores(model, *pair, logit_difference, SITES, method)


def test_inference_mode_and_no_grad_change_nothing() -> None:
    model, pair = gpt2(), prompts()
    for method in ("exact", "atp", "relp", "ig"):
        plain = patching_scores(model, *pair, logit_difference, SITES, method)  # type: ignore[arg-type]
        with torch.inference_mode():
            inside = patching_scores(model, *pair, logit_difference, SITES, method)  # type: ignore[arg-type]
        for site in SITES:
            assert torch.equal(plain[site], inside[site])
