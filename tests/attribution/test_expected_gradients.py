"""Expected gradients against expectations that can be written down, within their own standard errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pullback as pb
from pullback.core.errors import InputError, MethodError
from tests.golden_net import example, largest, tiny_mlp

X = example(2, 4)
REFERENCES = example(5, 4).flip(0) * 0.7


def linear(z: Tensor) -> Tensor:
    return (z @ torch.tensor([1.0, -2.0, 0.5, 3.0]).to(z))[:, None]


def squares(z: Tensor) -> Tensor:
    return z.square().sum(1, keepdim=True)


def test_a_linear_score_has_the_distance_from_the_mean_reference() -> None:
    """E (x - x') w = (x - mean x') w, whatever the draws of α."""
    found = pb.explain(linear, X, target=0, method=pb.ExpectedGradients(pb.Dataset(REFERENCES), samples=4000))
    error = found.diagnostics["standard_error"]
    expected = (X - REFERENCES.mean(0)) * torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    assert bool(((found.values - expected).abs() < 4 * error).all())
    # the error itself: population deviation of five references over √4000, estimated to a few per cent
    spread = REFERENCES.std(0, correction=0) * torch.tensor([1.0, 2.0, 0.5, 3.0]).double() / 4000**0.5
    torch.testing.assert_close(error, spread.expand(2, 4), rtol=0.05, atol=0)
    # a flipped sign would be far outside
    assert float(((found.values + expected).abs() / error).min()) > 4


def test_squares_have_the_difference_of_squares() -> None:
    """∫ 2 (x' + α (x - x')) (x - x') dα = x² - x'², so the expectation is x² - mean x'²."""
    found = pb.explain(
        squares, X, target=0, method=pb.ExpectedGradients(pb.Dataset(REFERENCES), samples=4000)
    )
    expected = X.square() - REFERENCES.square().mean(0)
    assert bool(((found.values - expected).abs() < 4 * found.diagnostics["standard_error"]).all())


def test_one_reference_is_integrated_gradients() -> None:
    reference = REFERENCES[:1]
    found = pb.explain(squares, X, target=0, method=pb.ExpectedGradients(pb.Dataset(reference), samples=3000))
    exact = pb.explain(
        squares, X, target=0, method=pb.IntegratedGradients(baseline=pb.Given(reference))
    ).values
    assert largest(exact, X.square() - reference.square()) < 1e-12
    assert bool(((found.values - exact).abs() < 4 * found.diagnostics["standard_error"]).all())


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("baseline", [pb.Uniform(), pb.Dataset(example(5, 6))])
def test_chunks_and_batch_mates_do_not_matter(chunk: int, baseline: object) -> None:
    x, method = example(3, 6), pb.ExpectedGradients(baseline, samples=6)  # type: ignore[arg-type]
    whole = pb.explain(tiny_mlp(), x, target=1, method=method, chunk=1000).values
    assert largest(pb.explain(tiny_mlp(), x, target=1, method=method, chunk=chunk).values, whole) < 1e-12
    singles = [pb.explain(tiny_mlp(), row[None], target=1, method=method).values for row in x]
    assert largest(torch.cat(singles), whole) < 1e-12


def test_the_seed_names_the_draws() -> None:
    first, again, other = (
        pb.explain(
            tiny_mlp(), example(1, 6), target=0, method=pb.ExpectedGradients(samples=3, seed=seed)
        ).values
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_refusals() -> None:
    with pytest.raises(MethodError, match="samples is a whole number, at least 1; got 0"):
        pb.ExpectedGradients(samples=0)
    with pytest.raises(InputError, match=r"Dataset needs reference rows \(N, \*S\), got shape \(0, 4\)"):
        pb.Dataset(torch.empty(0, 4))
