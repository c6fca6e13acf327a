"""captum as the oracle: the same definitions give the same numbers, and where captum differs, by how much."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum import attr as captum_attr
from torch import Tensor, nn

import pullback as pb
from pullback.attribution import noisy_points
from tests.golden_net import example, golden, largest, tiny_cnn, tiny_mlp

X, TARGET = example(2, 3, 8, 8), torch.tensor([0, 2])


def ours(method: Any, **settings: Any) -> Tensor:
    values = pb.explain(tiny_cnn(), X, target=TARGET, method=method, **settings).values
    assert isinstance(values, Tensor)
    return values


def test_gradient_is_saliency_without_absolute_values() -> None:
    theirs = captum_attr.Saliency(tiny_cnn()).attribute(X.clone(), target=TARGET, abs=False)
    assert largest(ours(pb.Gradient()), theirs) < 1e-10
    assert float(theirs.min()) < 0


def test_input_times_gradient() -> None:
    theirs = captum_attr.InputXGradient(tiny_cnn()).attribute(X.clone(), target=TARGET)
    assert largest(ours(pb.InputXGradient()), theirs) < 1e-10


@pytest.mark.parametrize(
    ("name", "moment"), [("smoothgrad", "mean"), ("smoothgrad_sq", "square"), ("vargrad", "variance")]
)
@pytest.mark.parametrize("inner", ["gradient", "integrated"])
def test_noise_tunnel_with_our_draws(
    name: str, moment: str, inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """captum's noise is sample-major, ours is keyed by draw and shared by the rows of a batch."""
    samples, stdev, x, target = 5, 0.5, X[:1], 0  # captum rounds the deviation to float32; 0.5 is exact
    noise = stdev / float(x.max() - x.min())
    draws = torch.stack(
        [noisy_points.draws.normal(x.shape[1:], 7, draw, "0/") for draw in range(samples)]
    ).double()
    monkeypatch.setattr(torch, "normal", lambda mean, std: draws * std)
    method: Any = pb.Gradient()
    engine: Any = captum_attr.Saliency(tiny_cnn())
    settings: dict[str, Any] = {"abs": False}
    if inner == "integrated":
        method = pb.IntegratedGradients(steps=4, quadrature="left")
        engine, settings = (
            captum_attr.IntegratedGradients(tiny_cnn()),
            {"n_steps": 4, "method": "riemann_left"},
        )
    theirs = captum_attr.NoiseTunnel(engine).attribute(
        x.clone(), nt_type=name, nt_samples=samples, stdevs=stdev, target=target, **settings
    )
    smooth = pb.SmoothGrad(method, samples=samples, noise=noise, seed=7, moment=moment)
    assert largest(pb.explain(tiny_cnn(), x, target=target, method=smooth).values, theirs) < 1e-10


@pytest.mark.parametrize("steps", [3, 16])
def test_integrated_gradients_from_a_baseline(steps: int) -> None:
    """A power of two of equal steps is exact in captum's float32 step sizes; a third is not."""
    start = 0.3 * example(2, 3, 8, 8).flip(0)
    theirs = captum_attr.IntegratedGradients(tiny_cnn()).attribute(
        X.clone(), baselines=start, target=TARGET, n_steps=steps, method="riemann_middle"
    )
    found = ours(pb.IntegratedGradients(steps=steps), baseline=start)
    apart = largest(found, theirs) / float(theirs.abs().max())
    assert apart < (1e-12 if steps == 16 else 5e-8)
    assert steps == 16 or apart > 1e-10


def layer(net: nn.Sequential, site: str) -> nn.Module:
    return net[int(site)]


@pytest.mark.parametrize("site", ["0", "3", "6"])
def test_methods_at_a_layer(site: str) -> None:
    net = tiny_cnn()
    activation = captum_attr.LayerActivation(net, layer(net, site)).attribute(X)
    assert torch.equal(pb.explain(net, X, target=TARGET, site=site, method="gradient").point, activation)
    product = captum_attr.LayerGradientXActivation(net, layer(net, site)).attribute(X.clone(), target=TARGET)
    assert largest(ours(pb.InputXGradient(), site=site), product) < 1e-10
    for rectify in (True, False):
        cam = captum_attr.LayerGradCam(net, layer(net, site)).attribute(
            X.clone(), target=TARGET, relu_attributions=rectify
        )
        assert largest(ours(pb.GradCAM(rectify=rectify), site=site), cam) < 1e-10


@pytest.mark.parametrize("site", ["0", "3"])
def test_integrated_gradients_at_a_layer(site: str) -> None:
    """captum's layer path starts where the layer is at the input's baseline."""
    net = tiny_cnn()
    start = pb.pose(net, torch.zeros_like(X), target=0, site=site).point
    theirs = captum_attr.LayerIntegratedGradients(net, layer(net, site)).attribute(
        X.clone(), target=TARGET, n_steps=8, method="riemann_left"
    )
    assert (
        largest(ours(pb.IntegratedGradients(steps=8, quadrature="left"), site=site, baseline=start), theirs)
        < 1e-10
    )


def test_infidelity_of_exact_linear_attributions_is_zero() -> None:
    """captum's metric agrees that our gradient explains a linear score, and that a flipped one does not."""
    from captum.metrics import infidelity

    net = nn.Linear(5, 2).double()
    x = example(3, 5)
    gradient = pb.explain(net, x, target=1, method="gradient").values

    def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.linspace(0.1, 0.5, 5, dtype=torch.float64).expand_as(inputs)
        return noise, inputs - noise

    assert float(infidelity(net, perturb, x, gradient, target=1).max()) < 1e-24
    assert float(infidelity(net, perturb, x, -gradient, target=1).min()) > 1e-6


# where captum differs, on purpose on our side


def test_captums_trapezoid_is_two_percent_short_on_a_linear_score() -> None:
    net = nn.Linear(4, 1, bias=False).double()
    x = example(1, 4)
    theirs = captum_attr.IntegratedGradients(net).attribute(x.clone(), n_steps=50, method="riemann_trapezoid")
    exact = x * net.weight.detach()
    torch.testing.assert_close(theirs, 0.98 * exact, rtol=1e-7, atol=0)
    found = pb.explain(net, x, target=0, method=pb.IntegratedGradients(steps=50)).values
    assert largest(found, exact) < 1e-15


def test_captum_refuses_a_whole_number_of_noise() -> None:
    tunnel = captum_attr.NoiseTunnel(captum_attr.Saliency(tiny_mlp()))
    with pytest.raises(AssertionError, match="stdevs must be type float"):
        tunnel.attribute(example(1, 6), target=0, stdevs=1)
    assert torch.isfinite(
        pb.explain(tiny_mlp(), example(1, 6), target=0, method=pb.SmoothGrad(samples=2, noise=1)).values
    ).all()


def test_captums_variance_goes_negative_where_ours_cannot() -> None:
    """Gradients of mean 100 and variance 1e-4 in float32."""

    def score(z: Tensor) -> Tensor:
        return (100 * z + 0.005 * z.square()).sum(1)

    x = torch.linspace(0, 1, 100)[None]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = captum_attr.NoiseTunnel(captum_attr.Saliency(score)).attribute(
            x.clone(), nt_type="vargrad", nt_samples=200, stdevs=1.0, abs=False
        )
    assert float(theirs.min()) < -1e-4
    found = pb.explain(
        lambda z: score(z)[:, None], x, target=0, method=pb.VarGrad(samples=200, noise=1.0)
    ).values
    assert float(found.min()) > 0


def test_captums_half_precision_noise_fails_where_ours_runs() -> None:
    x = example(1, 6).to(torch.bfloat16)
    net = tiny_mlp().to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        captum_attr.NoiseTunnel(captum_attr.Saliency(net)).attribute(x.clone(), target=0)
    assert pb.explain(net, x, target=0, method=pb.SmoothGrad(samples=2)).values.dtype == torch.bfloat16


def test_golden_deltas_are_captums() -> None:
    """The golden maps still are what the installed captum gives, so both oracles agree."""
    arrays = golden()
    theirs = captum_attr.IntegratedGradients(tiny_cnn()).attribute(
        arrays["x"].clone(), target=arrays["target"], n_steps=50
    )
    assert largest(theirs, arrays["captum_ig_gausslegendre50"]) < 1e-12
