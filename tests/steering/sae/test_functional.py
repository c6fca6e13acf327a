"""Top-k and sparse products against torch's dense ones, the closed-form backward against autograd of the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pullback.core.errors import InputError, MethodError
from pullback.steering.sae.functional import (
    Activations,
    Selection,
    gathered_dot,
    sparse_autoencode,
    sparse_decode,
    sparse_outer,
    two_stage_topk,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --- top-k ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("columns", "k", "group"),
    [
        (64, 5, 8),
        (67, 5, 8),
        (67, 20, 8),
        (67, 67, 8),
        (1000, 7, None),
        (5, 1, 64),
        (3, 3, None),
        (130, 2, 128),
    ],
)
def test_top_k_is_torchs(dtype: torch.dtype, columns: int, k: int, group: int | None) -> None:
    scores = random(6, columns).to(dtype)
    values, indices = two_stage_topk(scores, k, group)
    assert values.equal(scores.topk(k).values)
    assert values.equal(scores.gather(1, indices))
    if dtype == torch.float64:  # no ties
        assert indices.equal(scores.topk(k).indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group", [None, 3, 8, 100])
def test_of_equal_scores_the_first_index_wins(dtype: torch.dtype, group: int | None) -> None:
    scores = random(40, 50).mul(1.5).round().to(dtype)  # about seven values, with 0 and -0
    scores[0] = -torch.inf
    scores[1, :49] = -torch.inf
    scores[2] = torch.tensor([0.0, -0.0]).repeat(25)
    for k in (1, 4, 17, 50):
        values, indices = two_stage_topk(scores, k, group)
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
        assert indices.equal(order)
        assert values.equal(scores.gather(1, order))


def test_top_k_says_what_is_wrong() -> None:
    with pytest.raises(MethodError, match=r"^k is 4 for 3 columns; expected 1 to 3\.$"):
        two_stage_topk(torch.ones(2, 3), 4)
    with pytest.raises(MethodError, match="k is 0"):
        two_stage_topk(torch.ones(2, 3), 0)
    for place in (0, 63, 69):  # in the first and the last whole group, and in the tail
        scores = random(2, 70)
        scores[1, place] = torch.nan
        with pytest.raises(InputError, match=r"^the scores have NaN entries; expected finite"):
            two_stage_topk(scores, 2, 8)


# --- sparse products ---


def sparse(tokens: int, latents: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    indices = random(tokens, latents, seed=1).topk(k).indices
    values = random(tokens, k, seed=2)
    return indices, values, torch.zeros(tokens, latents, dtype=values.dtype).scatter(1, indices, values)


def test_sparse_products_are_the_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    indices, values, dense = sparse(37, 50, 4)
    rows, vectors = random(50, 9, seed=3), random(37, 9, seed=4)
    torch.testing.assert_close(sparse_decode(indices, values, rows), dense @ rows, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        sparse_outer(indices, values, vectors, 50), dense.t() @ vectors, rtol=0, atol=1e-12
    )
    sampled = (vectors @ rows.t()).gather(1, indices)
    torch.testing.assert_close(gathered_dot(indices, vectors, rows), sampled, rtol=0, atol=1e-12)
    monkeypatch.setattr(
        "pullback.steering.sae.functional._GATHERED_BYTES", 8 * 4 * 9 * 5
    )  # five tokens at once
    torch.testing.assert_close(gathered_dot(indices, vectors, rows), sampled, rtol=0, atol=1e-12)


def test_sparse_products_in_float32() -> None:
    indices, values, dense = sparse(64, 300, 8)
    rows, vectors = random(300, 40, seed=3), random(64, 40, seed=4)
    single = indices, values.float()
    # sums of 8 products of order one: rounding of 1e-7 each
    torch.testing.assert_close(sparse_decode(*single, rows.float()).double(), dense @ rows, rtol=0, atol=1e-5)
    found = sparse_outer(*single, vectors.float(), 300)
    torch.testing.assert_close(found.double(), dense.t() @ vectors, rtol=0, atol=1e-5)
    assert found.equal(sparse_outer(*single, vectors.float(), 300))  # the same bits each time


# --- the autoencoder ---

TOKENS, WIDTH, LATENTS, K = 11, 6, 23, 5


def problem() -> dict[str, Tensor]:
    made = {
        "centred": random(TOKENS, WIDTH, seed=5),
        "gradient": random(TOKENS, WIDTH, seed=6),
        "encoder": random(LATENTS, WIDTH, seed=7),
        "encoder_bias": random(LATENTS, seed=8) - 2.5,  # so that some selected pre-activations are negative
        "decoder": random(LATENTS, WIDTH, seed=9),
    }
    return {name: value.requires_grad_(name != "gradient") for name, value in made.items()}


def definition(p: dict[str, Tensor], how: Selection) -> Activations:
    """The same from dense matrices, by the definition: every score, a loop over tokens, autograd through it."""
    pre = p["centred"] @ p["encoder"].t() + p["encoder_bias"]
    scores = pre * (1 + how.beta * (p["gradient"] @ p["decoder"].t()).abs()) if how.beta else pre
    indices = torch.stack(
        [torch.tensor(sorted(range(LATENTS), key=lambda i: -row[i])[: how.k]) for row in scores.tolist()]
    )
    values = pre.gather(1, indices).relu()
    decoded = torch.stack([a @ p["decoder"][i] for a, i in zip(values, indices, strict=True)])
    if how.dead is None:
        return Activations(values, indices, decoded, None, None, None)
    # the input and its bias do not learn from the dead latents
    silent = p["centred"].detach() @ p["encoder"].t() + p["encoder_bias"]
    chosen = silent.masked_fill(~how.dead, -torch.inf).topk(how.auxiliary_k).indices
    auxiliary = (silent * how.dead).gather(1, chosen).relu()
    total = torch.stack([a @ p["decoder"][i] for a, i in zip(auxiliary, chosen, strict=True)])
    return Activations(values, indices, decoded, auxiliary, chosen, total)


def objective(found: Activations) -> Tensor:
    """Something that depends on all of it, unevenly."""
    loss = (found.decoded - 0.3).pow(2).sum() + (found.values**3 * torch.arange(1, K + 1)).sum()
    if found.auxiliary_decoded is not None:
        loss = loss + (found.auxiliary_decoded + 0.2).pow(4).sum()
    return loss


DEAD = torch.arange(LATENTS) % 4 == 1  # six of them


@pytest.mark.parametrize("beta", [0.0, 3.0])
@pytest.mark.parametrize(("dead", "auxiliary"), [(None, 0), (DEAD, 3), (DEAD, 8)])
@pytest.mark.parametrize("columns", [None, 1, 4, 9, 22])
def test_values_and_derivatives_are_those_of_the_definition(
    beta: float, dead: Tensor | None, auxiliary: int, columns: int | None
) -> None:
    p = problem()
    found = sparse_autoencode(**p, selection=Selection(K, beta, dead, auxiliary, columns))
    expected = definition(p, Selection(K, beta, dead, auxiliary))
    assert found.indices.equal(expected.indices)
    assert (expected.values == 0).any()  # a selected latent with z <= 0 is among them
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.decoded, expected.decoded, rtol=0, atol=1e-12)
    if dead is not None:
        torch.testing.assert_close(found.auxiliary_decoded, expected.auxiliary_decoded, rtol=0, atol=1e-12)
    wanted = [value for name, value in p.items() if name != "gradient"]
    for closed, autograd in zip(
        torch.autograd.grad(objective(found), wanted),
        torch.autograd.grad(objective(expected), wanted),
        strict=True,
    ):
        # relative: the fourth power makes derivatives of up to about 1e4
        torch.testing.assert_close(closed, autograd, rtol=1e-12, atol=1e-12)


def test_derivatives_are_finite_differences() -> None:
    p = problem()
    how = Selection(K, 2.0, columns=7)
    derivatives = torch.autograd.grad(
        objective(sparse_autoencode(**p, selection=how)), [p["encoder"], p["decoder"]]
    )
    step = 1e-6
    for name, derivative in zip(("encoder", "decoder"), derivatives, strict=True):
        direction = random(LATENTS, WIDTH, seed=20)
        ends = [
            objective(
                sparse_autoencode(**{**p, name: p[name].detach() + sign * step * direction}, selection=how)
            )
            for sign in (1, -1)
        ]
        # the cubic remainder is 1e-12 of derivatives of about 1e3
        assert ((ends[0] - ends[1]) / (2 * step)).item() == pytest.approx(
            float((derivative * direction).sum()), rel=1e-6
        )


def test_what_is_not_selected_or_not_positive_has_no_derivative() -> None:
    p = problem()
    found = sparse_autoencode(**p, selection=Selection(K, 2.0))
    encoder, decoder = torch.autograd.grad(objective(found), [p["encoder"], p["decoder"]])
    active = set(found.indices[found.values > 0].tolist())
    idle = [latent for latent in range(LATENTS) if latent not in active]
    assert idle
    assert not encoder[idle].any()
    assert not decoder[idle].any()
    assert encoder[sorted(active)].any(1).all()


def test_a_tile_never_holds_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    widest = []
    plain = torch.addmm

    def recorded(*arguments: Tensor) -> Tensor:
        widest.append(plain(*arguments).shape[1])
        return plain(*arguments)

    monkeypatch.setattr(torch, "addmm", recorded)
    sparse_autoencode(**problem(), selection=Selection(K, 1.0, columns=4))
    assert widest == [4, 4, 4, 4, 4, 3]


def test_ties_between_tiles_go_to_the_first_latent() -> None:
    p = {name: value.detach().round() for name, value in problem().items()}  # exact in any order of summation
    with torch.no_grad():
        for name in ("encoder", "encoder_bias", "decoder"):
            p[name][12:] = p[name][:11]  # latents 12... repeat 0...
    for columns in (None, 3, 12):
        found = sparse_autoencode(**p, selection=Selection(K, columns=columns))
        for row in found.indices.tolist():
            assert all(latent < 12 or latent - 12 in row[: row.index(latent)] for latent in row)


@pytest.mark.parametrize("beta", [0.0, 3.0])
@pytest.mark.parametrize("columns", [None, 9])
def test_scores_in_less_precision_change_the_choice_only(beta: float, columns: int | None) -> None:
    p = {name: value.detach().float() for name, value in problem().items()}
    exact = sparse_autoencode(**p, selection=Selection(K, beta, DEAD, 3))
    rough = sparse_autoencode(**p, selection=Selection(K, beta, DEAD, 3, columns, torch.bfloat16))
    # bfloat16 errs by 2^-8; the fifth and the tenth of 23 scores are further apart than that here
    assert rough.indices.equal(exact.indices)
    torch.testing.assert_close(rough.values, exact.values, rtol=0, atol=1e-5)
    torch.testing.assert_close(rough.decoded, exact.decoded, rtol=0, atol=1e-5)
    assert rough.auxiliary_indices is not None
    pre = p["centred"] @ p["encoder"].t() + p["encoder_bias"]
    assert DEAD[rough.auxiliary_indices].all()
    torch.testing.assert_close(
        rough.auxiliary_values, pre.gather(1, rough.auxiliary_indices).relu(), rtol=0, atol=1e-5
    )
