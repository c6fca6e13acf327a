"""SmoothGrad against golden arrays, closed forms and its own promises (attribution-methods.md 1.5)."""

from __future__ import annotations

from math import erf, sqrt

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.attribution import noisy_points
from pullback.core.errors import MethodError
from tests.golden_net import example, golden, largest, tiny_cnn, tiny_mlp

SAMPLES, STDEV = 6, 1.5
MOMENTS = {"smoothgrad": "mean", "smoothgrad_sq": "square", "vargrad": "variance"}


def of_golden_noise(monkeypatch: pytest.MonkeyPatch, moment: str, method: object) -> Tensor:
    """Our map with the golden draws, one example at a time so that each gets σ = 1.5 from its own range."""
    arrays, maps = golden(), []
    for row, (x, target) in enumerate(zip(arrays["x"], arrays["target"], strict=True)):
        draws = arrays["unit_noise"][row * SAMPLES : (row + 1) * SAMPLES]
        monkeypatch.setattr(
            noisy_points.draws, "normal", lambda shape, seed, draw, name, draws=draws: draws[draw]
        )
        smooth = pb.SmoothGrad(method, samples=SAMPLES, noise=STDEV / float(x.max() - x.min()), moment=moment)
        maps.append(pb.explain(tiny_cnn(), x[None], target=int(target), method=smooth).values)
    return torch.cat(maps)


def test_the_net_is_the_golden_one() -> None:
    expected = [[-0.9868, 0.0748, -0.5531], [-0.8842, -0.0420, -0.4371]]
    x = example(2, 3, 8, 8)
    assert largest(x, golden()["x"]) == 0
    torch.testing.assert_close(tiny_cnn()(x), torch.tensor(expected).double(), rtol=0, atol=5e-5)
    assert sum(parameter.numel() for parameter in tiny_cnn().parameters()) == 328


@pytest.mark.parametrize("name", MOMENTS)
def test_golden_moments_of_the_signed_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = of_golden_noise(monkeypatch, MOMENTS[name], pb.Gradient())
    assert largest(ours, golden()[f"captum_{name}_absFalse"]) < 1e-12


@pytest.mark.parametrize("name", MOMENTS)
def test_golden_moments_of_captums_absolute_saliency(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = of_golden_noise(monkeypatch, MOMENTS[name], pb.Captum("Saliency"))
    assert largest(ours, golden()[f"captum_{name}_absTrue"]) < 1e-12


def test_absolute_values_change_the_mean_but_not_the_mean_of_squares() -> None:
    arrays = golden()
    assert largest(arrays["captum_smoothgrad_absTrue"], arrays["captum_smoothgrad_absFalse"]) > 0.09
    assert largest(arrays["captum_smoothgrad_sq_absTrue"], arrays["captum_smoothgrad_sq_absFalse"]) == 0


def test_no_noise_is_the_gradient() -> None:
    x = example(2, 3, 8, 8)
    smooth = pb.explain(tiny_cnn(), x, target=1, method=pb.SmoothGrad(samples=3, noise=0.0)).values
    # six rows at once and two at once round differently in a convolution
    assert largest(smooth, pb.explain(tiny_cnn(), x, target=1, method="gradient").values) < 1e-16


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_a_linear_score_is_exact_for_any_number_of_draws(samples: int) -> None:
    net = nn.Linear(5, 2).double()
    x = example(3, 5)
    mean = pb.explain(net, x, target=1, method=pb.SmoothGrad(samples=samples)).values
    variance = pb.explain(net, x, target=1, method=pb.VarGrad(samples=samples)).values
    assert largest(mean, net.weight[1].detach().expand(3, 5)) < 1e-15
    assert 0 <= float(variance.min()) <= float(variance.max()) <= 1e-28


def quadratic(x: Tensor) -> Tensor:
    matrix = torch.sin(torch.arange(16, dtype=x.dtype)).reshape(4, 4)
    return (x @ matrix * x).sum(1, keepdim=True)


def test_antithetic_pairs_are_exact_on_a_quadratic_at_two_draws() -> None:
    x = example(2, 4)
    exact = pb.explain(quadratic, x, target=0, method="gradient").values
    pair = pb.SmoothGrad(samples=2, noise=0.7, antithetic=True)
    assert largest(pb.explain(quadratic, x, target=0, method=pair).values, exact) < 1e-14
    plain = pb.SmoothGrad(samples=2, noise=0.7)
    assert largest(pb.explain(quadratic, x, target=0, method=plain).values, exact) > 1e-2
    with pytest.raises(MethodError, match=r"samples must be even, got 3"):
        pb.SmoothGrad(samples=3, antithetic=True)


def test_relu_of_a_linear_form_has_the_normal_distribution_function_as_its_map() -> None:
    """f = relu(w·x): E ḡ = w Φ(w·x / (σ‖w‖)) and population variance w² Φ (1 - Φ)."""
    w, x, sigma = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([[0.2, 0.1, 0.3]]).double(), 0.5
    phi = 0.5 * (1 + erf(float(x @ w) / (sigma * float(w.norm())) / sqrt(2)))
    settings = {"samples": 20000, "noise": sigma / 0.2}

    def score(z: Tensor) -> Tensor:
        return (z @ w).relu()[:, None]

    smooth = pb.explain(score, x, target=0, method=pb.SmoothGrad(**settings))
    error = smooth.diagnostics["standard_error"]
    # four standard errors of 20000 draws, 0.014 for the unit weight; the error is itself good to 1 %
    assert bool(((smooth.values - w * phi).abs() < 4 * error).all())
    torch.testing.assert_close(error, (w.square() * phi * (1 - phi) / 20000).sqrt()[None], rtol=0.01, atol=0)
    variance = pb.explain(score, x, target=0, method=pb.VarGrad(**settings)).values
    torch.testing.assert_close(variance, (w.square() * phi * (1 - phi))[None], rtol=0.02, atol=0)


@pytest.mark.parametrize("chunk", [1, 7, 12])
def test_draws_are_bit_equal_in_any_chunks(chunk: int) -> None:
    net, x, seen = tiny_mlp(), example(2, 6), []

    def model(z: Tensor) -> Tensor:
        seen.append(z.detach().clone())
        return net(z)

    smooth = pb.SmoothGrad(samples=6, seed=3)
    values = pb.explain(model, x, target=1, method=smooth, chunk=chunk).values
    rows = torch.cat(seen)[2:]
    seen.clear()
    whole = pb.explain(model, x, target=1, method=smooth, chunk=1000).values
    assert torch.equal(rows, torch.cat(seen)[2:])
    assert rows.shape == (12, 6)
    assert largest(values, whole) < 1e-12


def test_a_batch_is_its_examples_one_by_one() -> None:
    x = example(3, 6)
    smooth = pb.SmoothGrad(samples=5, noise=0.3)
    batch = pb.explain(tiny_mlp(), x, target=2, method=smooth).values
    singles = [pb.explain(tiny_mlp(), row[None], target=2, method=smooth).values for row in x]
    assert largest(batch, torch.cat(singles)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_stay_what_they_are(dtype: torch.dtype) -> None:
    net, x = tiny_mlp(), example(2, 6)
    smooth = pb.SmoothGrad(samples=8)
    exact = pb.explain(net, x, target=0, method=smooth).values
    half = pb.explain(tiny_mlp().to(dtype), x.to(dtype), target=0, method=smooth).values
    assert half.dtype == dtype
    # a few roundings of 8-bit (bfloat16) or 11-bit mantissas through five layers
    assert largest(half.double(), exact) < 0.05 * float(exact.abs().max())


def test_the_mean_of_squares_is_the_squared_mean_plus_the_variance() -> None:
    x = example(2, 6)
    mean, square, variance = (
        pb.explain(tiny_mlp(), x, target=0, method=pb.SmoothGrad(samples=9, moment=moment)).values
        for moment in ("mean", "square", "variance")
    )
    assert largest(square, mean.square() + variance) < 1e-14
    assert float(variance.min()) > 0


def test_variances_of_nearly_equal_float32_gradients_are_right_and_never_negative() -> None:
    """Gradients of mean 100 and variance 1e-4, where the difference of squares keeps no digit of float32."""

    def score(z: Tensor) -> Tensor:
        return (100 * z + 0.005 * z.square()).sum(1, keepdim=True)

    x = torch.linspace(0, 1, 100)[None]
    variance = pb.explain(score, x, target=0, method=pb.VarGrad(samples=200, noise=1.0)).values
    assert variance.dtype == torch.float32
    assert float(variance.min()) > 0
    # the mean of 100 sample variances with 200 draws each scatters by 1 %
    torch.testing.assert_close(float(variance.mean()), 1e-4, rtol=0.05, atol=0)


def test_a_constant_example_is_noted() -> None:
    x = torch.ones(1, 6).double()
    smooth = pb.explain(tiny_mlp(), x, target=0, method=pb.SmoothGrad(samples=2))
    assert "constant at the site: its noise is zero" in smooth.diagnostics["notes"][0]
    assert largest(smooth.values, pb.explain(tiny_mlp(), x, target=0, method="gradient").values) < 1e-16


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"samples": 0}, "samples is a whole number, at least 1; got 0"),
        ({"noise": float("nan")}, "noise is a fraction of the example's range, at least 0; got nan"),
        ({"moment": "median"}, 'moment is "mean", "square" or "variance", got \'median\''),
        ({"method": pb.Gradient}, r"method is a class; give an object: Gradient\(\)"),
        ({"method": 3}, "method is a method object"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, object], text: str) -> None:
    with pytest.raises(MethodError, match=text):
        pb.SmoothGrad(**settings)  # type: ignore[arg-type]
