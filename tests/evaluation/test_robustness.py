"""Infidelity and max-sensitivity: closed forms on linear models, the published equations by loops, captum, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.core.errors import InputError, MethodError
from pullback.core.problem import Problem
from pullback.evaluation import GaussianNoise, NoisyBaseline, SquareRemoval, infidelity, sensitivity_max


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def smooth(channels: int = 2, classes: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, classes)
        ).double().eval()  # fmt: skip


def linear(features: int) -> nn.Linear:
    net = nn.Linear(features, 1).double()
    net.weight.data.copy_(normal(1, features, seed=9))
    return net


class Shifts:
    """A perturbation from a table: what captum can be given too."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, problem: Problem, draw: int, seed: int) -> tuple[Tensor, None]:
        return self.table[draw].expand_as(problem.point), None

    def __repr__(self) -> str:
        return "Shifts()"


@pytest.mark.parametrize(
    "perturbation",
    ["square", "gaussian", "noisy_baseline", SquareRemoval(0.8, noise=0.3, mask="mean"), GaussianNoise(2.0), NoisyBaseline(0.0)],
)  # fmt: skip
def test_the_gradient_of_a_linear_model_has_none(perturbation: Any) -> None:
    net, x = linear(12), normal(3, 12)
    result = infidelity(net, x, net.weight.detach().expand(3, -1), perturbation=perturbation, samples=20)
    assert float(result.values.max()) < 1e-20
    assert bool((result.details["zero"] > 1e-3).all())
    torch.testing.assert_close(result.details["scale"], torch.ones(3, dtype=torch.float64))
    # k times the gradient is (k - 1)^2 times as wrong as zero is, and nothing is left with the best scale
    tripled = infidelity(net, x, 3 * net.weight.detach().expand(3, -1), perturbation=perturbation, samples=20)
    torch.testing.assert_close(tripled.values, 4 * result.details["zero"])
    assert float(tripled.details["scaled"].max()) < 1e-20
    assert (result.name, result.direction) == ("infidelity", "lower")


@pytest.mark.parametrize("shape", [(3, 9), (3, 2, 9), (3, 2, 6, 7)])
def test_contributions_of_a_linear_model_have_none_for_removals(shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Flatten(), linear(int(torch.tensor(shape[1:]).prod())))
    x, weight = normal(*shape), net[1].weight.detach().reshape(1, *shape[1:])
    result = infidelity(net, x, weight * x, units="contribution", samples=20)
    assert float(result.values.max()) < 1e-20
    assert float(infidelity(net, x, weight * x, samples=20).values.min()) > 1e-3


@pytest.mark.parametrize("scaled", [False, True])
def test_it_is_captums_for_the_same_perturbations(scaled: bool) -> None:
    from captum.metrics import infidelity as reference

    net, x, a, table = (
        smooth(),
        normal(3, 2, 5, 5),
        normal(3, 2, 5, 5, seed=1),
        0.3 * normal(7, 2, 5, 5, seed=2),
    )
    ours = infidelity(net, x, a, target=1, perturbation=Shifts(table), samples=7, scaled=scaled)

    def perturbed(inputs: Tensor) -> tuple[Tensor, Tensor]:
        shifts = table.repeat(len(inputs) // 7, 1, 1, 1)
        return shifts, inputs - shifts

    theirs = reference(net, perturbed, x, a, target=1, n_perturb_samples=7, normalize=scaled)
    torch.testing.assert_close(ours.values, theirs)


def test_infidelity_follows_the_equation() -> None:
    net, x, a = smooth(), normal(2, 2, 6, 6), normal(2, 2, 6, 6, seed=1)
    perturbation = SquareRemoval(noise=0.1)
    problem = pb.pose(net, x, target=2)
    sums = torch.zeros(2, dtype=torch.float64)
    for draw in range(9):
        change, _ = perturbation(problem, draw, 5)
        for row in range(2):
            fall = net(x)[row, 2] - net((x - change)[row : row + 1])[0, 2]
            sums[row] += ((change[row] * a[row]).sum() - fall).item() ** 2 / 9
    torch.testing.assert_close(
        infidelity(net, x, a, target=2, perturbation=perturbation, samples=9, seed=5).values, sums
    )


def test_undefined_infidelity_is_flagged() -> None:
    net, x = linear(6), torch.stack([torch.zeros(6), torch.ones(6)]).double()
    with pytest.warns(
        UserWarning,
        match=r"infidelity is undefined \(NaN\) for 1 of 2 examples: no perturbation changes the input",
    ):
        result = infidelity(net, x, torch.ones(2, 6))
    assert result.values.isnan().tolist() == [True, False]
    net.weight.data.zero_()
    with pytest.warns(
        UserWarning, match="for 2 of 2 examples: no perturbation changes the score; has the model collapsed"
    ):
        assert bool(infidelity(net, x + 1, torch.zeros(2, 6)).values.isnan().all())
    with pytest.warns(UserWarning, match="I, a⟩ is 0 for all perturbations"):
        assert bool(infidelity(linear(6), x + 1, torch.zeros(2, 6), scaled=True).values.isnan().all())


def test_sensitivity_of_closed_forms() -> None:
    """The gradient of w·x moves not at all; that of Σx²/2 is x, which moves by u itself; u stays in the cube."""
    x = 1 + normal(3, 8).abs()
    assert sensitivity_max(linear(8), x, method="gradient").values.tolist() == [0.0] * 3

    class Squares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x**2).sum(1, keepdim=True) / 2

    seen: list[Tensor] = []

    def own(moved: Tensor, target: Tensor | None) -> Tensor:
        seen.append(moved)
        return moved

    by_method = sensitivity_max(Squares(), x, method="gradient", radius=0.1, samples=6)
    by_call = sensitivity_max(Squares(), x, own, radius=0.1, samples=6)
    torch.testing.assert_close(by_method.values, by_call.values)
    shifts = seen[1].reshape(6, 3, 8) - x
    assert 0.08 < float(shifts.max()) <= 0.1
    assert -0.1 <= float(shifts.min()) < -0.08
    torch.testing.assert_close(by_method.curve, (shifts.norm(dim=2) / x.norm(dim=1)).T)
    assert torch.equal(by_method.values, by_method.curve.max(1).values)
    torch.testing.assert_close(by_method.details["mean"], by_method.curve.mean(1))


def test_sensitivity_is_captums_for_the_same_draws() -> None:
    from captum.attr import Saliency
    from captum.metrics import sensitivity_max as reference

    net, x, seen = smooth(), normal(3, 2, 5, 5), []

    def gradient(moved: Tensor, target: Tensor) -> Tensor:
        seen.append(moved)
        return Saliency(net).attribute(moved.clone(), target=target, abs=False)

    target = torch.tensor([1, 0, 3])
    ours = sensitivity_max(net, x, gradient, target=target, radius=0.2, samples=5)
    moved = seen[1].reshape(5, 3, 2, 5, 5).transpose(0, 1).flatten(0, 1)
    theirs = reference(
        lambda inputs, target: Saliency(net).attribute(inputs, target=target, abs=False),
        x, lambda inputs, radius: moved, perturb_radius=0.2, n_perturb_samples=5, target=target,
    )  # fmt: skip
    torch.testing.assert_close(ours.values, theirs)
    torch.testing.assert_close(
        sensitivity_max(net, x, method="gradient", target=target, radius=0.2, samples=5).values, theirs
    )


def test_a_result_is_run_again_by_its_own_method() -> None:
    net, x = smooth(), normal(2, 2, 5, 5)
    explained = pb.explain(net, x, target=1, method="integrated_gradients(steps=4)")
    by_result = sensitivity_max(net, x, explained)
    by_name = sensitivity_max(net, x, method="integrated_gradients(steps=4)", target=1)
    assert torch.equal(by_result.values, by_name.values)
    assert "steps=4" in str(by_result.params["method"])
    with pytest.raises(InputError, match=r"differs from what Gradient\(.* gives by up to"):
        sensitivity_max(net, x, explained, method="gradient")


@pytest.mark.parametrize("perturbation", ["square", "gaussian", SquareRemoval(noise=0.2)])
def test_batch_mates_chunks_seeds_and_the_global_generator(perturbation: Any) -> None:
    net, x, a = smooth(), normal(4, 2, 6, 6), normal(4, 2, 6, 6, seed=1)
    state = torch.get_rng_state()

    def both(rows: slice, **more: Any) -> tuple[Tensor, Tensor]:
        infidel = infidelity(net, x[rows], a[rows], target=1, perturbation=perturbation, samples=8, **more)
        return infidel.values, sensitivity_max(net, x[rows], method="gradient", target=1, **more).values

    whole = both(slice(None))
    for first, second in zip(both(slice(2, 3)), whole, strict=True):
        torch.testing.assert_close(first[0], second[2])
    for first, second in zip(both(slice(None), chunk=3), whole, strict=True):
        torch.testing.assert_close(first, second)
    assert all(not torch.allclose(u, v) for u, v in zip(both(slice(None), seed=1), whole, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_padding_of_a_text_neither_moves_nor_counts() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 2).double()
            self.embedding.weight.data.copy_(normal(9, 2))

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return (self.embedding(input_ids).sin().sum(2) * attention_mask).sum(1, keepdim=True)

    ids, real = torch.tensor([[1, 2, 4, 6, 7], [5, 3, 8, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    a = normal(2, 5, 2, seed=3)
    for perturbation in ("square", "gaussian", SquareRemoval(0.7, noise=0.2)):
        both = infidelity(Words(), {"input_ids": ids, "attention_mask": real}, a, perturbation=perturbation)
        short = {"input_ids": ids[1:, :3], "attention_mask": real[1:, :3]}
        alone = infidelity(Words(), short, a[1:, :3], perturbation=perturbation)
        torch.testing.assert_close(alone.values[0], both.values[1])
    both = sensitivity_max(Words(), {"input_ids": ids, "attention_mask": real}, method="gradient")
    alone = sensitivity_max(Words(), short, method="gradient")
    torch.testing.assert_close(alone.values[0], both.values[1])


def test_a_zero_attribution_has_no_sensitivity() -> None:
    with pytest.warns(
        UserWarning, match="sensitivity_max is undefined .* the attribution is zero everywhere"
    ):
        result = sensitivity_max(linear(4), normal(2, 4), lambda x, target: x * 0)
    assert bool(result.values.isnan().all())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"perturbation": "cube"}, "perturbation='cube' was given. Expected \"square\", \"noisy_baseline\", \"gaussian\""),
        ({"units": "logit"}, "units='logit' was given. Expected 'gradient' or 'contribution'"),
        ({"units": "contribution", "perturbation": "gaussian"}, r"GaussianNoise\(noise=0.15\), which removes nothing"),
        ({"perturbation": SquareRemoval(mask="noisy_linear")}, "was given to a perturbation. Expected a baseline"),
        ({"attribution": torch.ones(2, 5)}, r"shape \(2, 5\) was given for 'input' of shape \(2, 4\)"),
        ({"attribution": torch.full((2, 4), torch.nan)}, "2 attributions have NaN"),
    ],
)  # fmt: skip
def test_errors_of_infidelity(change: dict[str, Any], text: str) -> None:
    settings: dict[str, Any] = {"attribution": torch.ones(2, 4), **change}
    with pytest.raises(InputError, match=text):
        infidelity(linear(4), normal(2, 4), settings.pop("attribution"), **settings)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"radius": 0.0}, "radius=0.0 was given. Expected a distance above 0"),
        ({}, 'cannot be made again was given. Expected method=, such as method="integrated_gradients"'),
        ({"attribution": torch.ones(2, 4)}, "cannot be made again was given"),
        ({"attribution": torch.ones(2, 5), "method": "gradient"}, "with 5 values for each of 2 examples was given, but Gradient"),
        ({"attribution": lambda x, target: x[:1]}, r"The attribution gave \(1, 4\) for 2 inputs"),
        ({"method": lambda problem: problem.point[:1]}, r"gave \(1, 4\) for 2 inputs"),
        ({"attribution": lambda x, target: x / 0}, "2 attributions have NaN or infinite values"),
    ],
)  # fmt: skip
def test_errors_of_sensitivity(change: dict[str, Any], text: str) -> None:
    settings: dict[str, Any] = {"attribution": None, **change}
    with pytest.raises(InputError, match=text):
        sensitivity_max(linear(4), normal(2, 4), settings.pop("attribution"), **settings)


def test_what_is_no_method_is_named() -> None:
    with pytest.raises(MethodError, match=r"Expected a method object such as Gradient\(\), or its text"):
        sensitivity_max(linear(4), normal(2, 4), method=pb.Gradient)
    with pytest.raises(MethodError, match='"gradiant" is unknown'):
        sensitivity_max(linear(4), normal(2, 4), method="gradiant")
