"""Smooth FullGrad: every term's mean over noisy points, before ψ; re-derived from the terms of each noisy point."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pullback as pb
from pullback.attribution import fullgrad_terms
from pullback.attribution.fullgrad import FullGrad
from tests.golden_net import example, largest, tiny_cnn

SAMPLES, NOISE = 3, 0.2


def noisy_points(x: Tensor) -> list[Tensor]:
    """The points themselves, read from a method that SmoothGrad moves by the same draws."""
    seen: list[Tensor] = []

    def reads(problem: pb.Problem) -> Tensor:
        assert isinstance(problem.point, Tensor)
        seen.append(problem.point.clone())
        return problem.point

    pb.explain(tiny_cnn(), x, target=1, method=pb.SmoothGrad(reads, SAMPLES, NOISE), chunk=len(x))
    return seen


def explain(x: Tensor, method: FullGrad, chunk: int | str = "auto") -> pb.Attribution:
    return pb.explain(tiny_cnn(), x, target=1, method=method, chunk=chunk)


def image(found: pb.Attribution) -> Tensor:
    assert isinstance(found.values, Tensor)
    return found.values[:, 0]


@pytest.mark.parametrize("psi", ["abs", "identity"])
def test_terms_are_averaged_before_psi(psi: str) -> None:
    x = example(2, 3, 8, 8)
    decompositions = [fullgrad_terms(tiny_cnn(), z, target=1) for z in noisy_points(x)]
    assert len(decompositions) == SAMPLES
    layers = [[d.input_term, *(term for _, term in d.terms if term.dim() == 4)] for d in decompositions]
    wanted = torch.zeros(2, 8, 8, dtype=torch.float64)
    after = torch.zeros_like(wanted)
    bend = {"abs": torch.abs, "identity": torch.clone}[psi]
    for draws in zip(*layers, strict=True):
        stacked = torch.stack(draws)  # type: ignore[arg-type]
        for into, term in ((wanted, bend(stacked.mean(0))), (after, bend(stacked).mean(0))):
            into += F.interpolate(term, (8, 8), mode="bilinear", align_corners=True).sum(1)
    found = image(explain(x, FullGrad(psi, samples=SAMPLES, noise=NOISE)))
    assert largest(found, wanted) < 1e-13
    wrapped = pb.explain(tiny_cnn(), x, target=1, method=pb.SmoothGrad(FullGrad(psi), SAMPLES, NOISE))
    assert largest(image(wrapped), after) < 1e-13
    # the two differ by what changes sign from draw to draw
    assert (largest(wanted, after) > 1e-2 * float(after.abs().max())) == (psi == "abs")


def test_simple_and_smooth_together() -> None:
    x = example(1, 3, 8, 8)
    total = torch.zeros(4, 8, 8, 8, dtype=torch.float64)
    for z in noisy_points(x):
        values = [z.clone().requires_grad_()]
        for layer in tiny_cnn():
            values.append(layer(values[-1]))
        found = torch.autograd.grad(values[-1][0, 1], [values[0], values[1], values[2], values[6]])
        for number, term in enumerate((found[0] * z, *found[1:])):
            term = (
                F.interpolate(term, (8, 8), mode="bilinear", align_corners=True)[0]
                if number == 3
                else term[0]
            )
            total[number, : len(term)] += term / SAMPLES
    smooth = image(explain(x, FullGrad("identity", biases="simple", samples=SAMPLES, noise=NOISE)))
    assert largest(smooth[0], total.sum((0, 1))) < 1e-13


def test_without_noise_it_is_the_plain_map_and_the_sum_is_kept_with_it() -> None:
    x = example(2, 3, 8, 8)
    assert largest(image(explain(x, FullGrad(samples=2, noise=0.0))), image(explain(x, FullGrad()))) < 1e-14
    found = explain(x, FullGrad("identity", "area", samples=SAMPLES, noise=NOISE))
    facts = found.diagnostics
    scores = torch.stack([tiny_cnn()(z)[:, 1] for z in noisy_points(x)]).mean(0)
    assert largest(facts["fullgrad_score"], scores) < 1e-14
    explained = image(found).flatten(1).sum(1) + facts["fullgrad_outside"] + facts["fullgrad_residual"]
    assert largest(explained, scores) < 1e-13
    assert facts["evaluations"].tolist() == [SAMPLES, SAMPLES]


def test_draws_follow_the_seed_and_nothing_else() -> None:
    x, method = example(3, 3, 8, 8), FullGrad(samples=SAMPLES, noise=NOISE)
    whole = image(explain(x, method))
    assert largest(whole, image(explain(x, method, chunk=1))) < 1e-14
    assert largest(whole[:1], image(explain(x[:1], method))) < 1e-14
    net, state = tiny_cnn(), torch.get_rng_state()
    assert largest(whole, image(pb.explain(net, x, target=1, method=method))) == 0
    assert torch.equal(state, torch.get_rng_state())
    other = pb.explain(tiny_cnn(), x, target=1, method=method, seed=5)
    assert largest(image(other), whole) > 1e-4
    assert other.method == repr(FullGrad(samples=SAMPLES, noise=NOISE, seed=5))
    again = pb.explain(tiny_cnn(), x, target=1, method=other.method.replace("FullGrad", "full_grad"))
    assert largest(image(again), image(other)) < 1e-14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": -1}, r"samples is a whole number, 0 for the point itself .* got -1"),
        ({"samples": 2.5}, r"samples is a whole number"),
        ({"samples": 2, "noise": -0.1}, r"noise is a fraction of the example's range"),
    ],
)
def test_options_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(pb.MethodError, match=message):
        FullGrad(**options)  # type: ignore[arg-type]
